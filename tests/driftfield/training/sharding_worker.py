"""One of the processes of test_sharding, as torchrun starts them: FOLDER; and the training that they share.

Trains a sharded model from nothing, and another from FOLDER/start, a checkpoint of a whole one. The main process writes
what a checkpoint gets of both, and each process what it saw.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from driftfield.training import EMA, Checkpoint, Update, process_group, rank, read_checkpoint, share
from driftfield.training.pretrained import write_model
from driftfield.training.sharding import class_name, shard

STEPS = 3
DECAYS = (0.5, 0.9)
EXAMPLES = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


class Training:
    """A network of 5 and 1 rows, which two processes cannot share evenly, that learns by each example's square."""

    def __init__(self, *, sharded: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        if sharded:
            shard(self.model, [self.model[0]], torch.device("cpu"))
        optimizer = torch.optim.AdamW(self.model.named_parameters(), fused=True)
        self.ema = EMA(self.model, DECAYS)
        self.update = Update(self.model, optimizer, self.ema, clip_norm=0.1)

    def step(self, factor: float = 1.0) -> float:
        """One step, in two passes over the examples as memory may ask for; the norm of the gradient."""
        self.model.zero_grad()
        for examples in EXAMPLES[share(len(EXAMPLES))].chunk(2):
            (factor * self.model(examples).square().sum() / len(EXAMPLES)).backward()
        return self.update(0.01)

    def save(self, folder: Path, step: int) -> None:
        tensors, state = self.update.tensors(), self.update.state()
        if rank() == 0:
            Checkpoint(folder).save(step, tensors, state)

    def restore(self, folder: Path) -> int:
        loaded = read_checkpoint(folder)
        assert loaded is not None
        self.update.restore(loaded.tensors, loaded.state)
        return loaded.step


def parts(training: Training) -> int:
    """How many numbers of the weights, the averages and AdamW's moments this process holds."""
    tensors = [*training.model.parameters(), *training.ema.state_dict().values()]
    moments = [each for state in training.update._optimizer.state.values() for each in state.values()]
    return sum(local(tensor).numel() for tensor in [*tensors, *moments] if tensor.dim())


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def main(folder: Path) -> int:
    with process_group(torch.device("cpu")):
        training = Training(sharded=True)
        norms = [training.step() for _ in range(STEPS)]
        before = {name: local(tensor).clone() for name, tensor in training.ema.state_dict().items()}
        rejected = training.step(float("nan"))
        unchanged = all(torch.equal(local(tensor), before[name]) for name, tensor in training.ema.state_dict().items())
        training.save(folder / "sharded", STEPS)
        with training.ema.swapped(DECAYS[1]):
            write_model(folder / "model", training.model, class_name(training.model), {})
            with torch.no_grad():
                averaged = training.model(EXAMPLES)
        with torch.no_grad():
            own = training.model(EXAMPLES)
        resumed = Training(sharded=True)
        for _ in range(resumed.restore(folder / "start"), STEPS):
            resumed.step()
        resumed.save(folder / "resumed", STEPS)
        report = {
            "norms": norms, "rejected": str(rejected), "unchanged": unchanged, "numbers": parts(training),
            "averaged": averaged.flatten().tolist(), "own": own.flatten().tolist(),
        }  # fmt: skip
        (folder / f"report-{rank()}.json").write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
