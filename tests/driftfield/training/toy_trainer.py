"""A whole training in small, to be killed: every kind of state that a real one has, on two-dimensional data."""

import hashlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from driftfield import DriftingLoss, SampleQueue
from driftfield.training import (
    EMA,
    Checkpoint,
    Loaded,
    RunFolder,
    RunLog,
    StopRequest,
    fault_point,
    generator,
    load_optimizer,
    optimizer_state,
    seed_everything,
    warmup_constant,
)
from driftfield.training.faults import VARIABLE

SEED, DATA, BATCH, SAVE_EVERY = 3, 40, 8, 4
ITEMS = ("model", "ema", "optim", "queue", "rng", "position", "samples_seen")


class ToyTrainer:
    """Its state is in eight places: weights and buffers, averages, AdamW, the queue, a generator and two counters."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        self.model = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
        self.ema = EMA(self.model, decays=(0.9, 0.99), warmup=True)
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=1e-2)
        self.queue = SampleQueue(num_classes=1, capacity=12)
        self.rng = torch.Generator().manual_seed(SEED)  # carries a state on purpose, beside the stateless draws
        self.position = 0  # in the data, over all epochs
        self.samples_seen = 0
        self.data = torch.randn(DATA, 2, generator=generator(SEED, "data"))
        self.loss = DriftingLoss()

    def step(self, step: int) -> float:
        seed_everything(SEED, rank=0, step=step)  # dropout draws from the global generator
        epoch, start = divmod(self.position, DATA)
        order = torch.randperm(DATA, generator=generator(SEED, "order", epoch))
        ids = order[start : start + BATCH]
        self.queue.push(ids, torch.zeros_like(ids))
        positives = self.data[self.queue.sample(torch.tensor([0]), BATCH, generator=self.rng)]
        noise = torch.stack([torch.randn(2, generator=generator(SEED, "noise", step, slot)) for slot in range(BATCH)])
        for group in self.optimizer.param_groups:
            group["lr"] = warmup_constant(self.samples_seen, peak=1e-2, warmup_samples=100)
        loss = self.loss(self.model(noise)[None], positives).loss.mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update()
        self.position += len(ids)
        self.samples_seen += BATCH
        return loss.item()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optim": optimizer_state(self.optimizer).tensors,
            "rank-00000": {"rng": self.rng.get_state()} | self.queue.state_dict(),
        }

    def state(self) -> dict[str, object]:
        optim = optimizer_state(self.optimizer).state
        return {"position": self.position, "samples_seen": self.samples_seen, "optim": optim}

    def restore(self, loaded: Loaded, omit: str = "") -> None:
        rank = loaded.tensors["rank-00000"]
        restore_item = {
            "model": lambda: self.model.load_state_dict(loaded.tensors["model"]),
            "ema": lambda: self.ema.load_state_dict(loaded.tensors["ema"]),
            "optim": lambda: load_optimizer(self.optimizer, loaded.tensors["optim"], loaded.state["optim"]),
            "queue": lambda: self.queue.load_state_dict({name: rank[name] for name in ("samples", "pushed")}),
            "rng": lambda: self.rng.set_state(rank["rng"]),
            "position": lambda: setattr(self, "position", loaded.state["position"]),
            "samples_seen": lambda: setattr(self, "samples_seen", loaded.state["samples_seen"]),
        }
        for item in ITEMS:
            if item != omit:
                restore_item[item]()

    def digest(self) -> str:
        """SHA-256 over every bit of state."""
        hasher = hashlib.sha256(repr(self.state()).encode())
        for group, named in sorted(self.tensors().items()):
            for name, tensor in sorted(named.items()):
                hasher.update(f"{group}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                hasher.update(tensor.detach().contiguous().numpy().tobytes())
        return hasher.hexdigest()


def run(
    folder: Path, steps: int, *, fault: str = "", omit: str = "", pad_mib: int = 0, heartbeat: Path | None = None
) -> None:
    """Train to a number of steps, resuming what the folder holds, and leave the digest of the final state there.

    Args:
        folder: the run's folder.
        steps: of the whole run.
        fault: what `DRIFTFIELD_FAULT` asks for.
        omit: an item of state that a resume forgets.
        pad_mib: weight of each checkpoint, to make its writing long enough to be hit.
        heartbeat: file that grows by a line after each step of this process.
    """
    torch.set_num_threads(1)
    os.environ[VARIABLE] = fault
    padding = {"padding": {"zeros": torch.zeros(pad_mib * 2**18)}} if pad_mib else {}
    trainer = ToyTrainer()
    with RunFolder(folder, {"seed": SEED}), StopRequest() as stop:
        checkpoint = Checkpoint(folder / "checkpoints")
        loaded = checkpoint.load()
        if loaded is not None:
            trainer.restore(loaded, omit)
        done = loaded.step if loaded else 0
        with RunLog(folder, resume_step=done if loaded else None) as log:
            while done < steps:
                loss = trainer.step(done)
                if heartbeat is not None:
                    with open(heartbeat, "ab") as file:
                        file.write(b"\n")
                fault_point(f"step.{done}")
                done += 1
                log.log(done, trainer.samples_seen, loss=loss)
                if done % SAVE_EVERY == 0 or done == steps or stop.requested:
                    checkpoint.save(done, trainer.tensors() | padding, trainer.state())
                if stop.requested:
                    sys.exit(stop.exit_code)
    (folder / "digest.txt").write_text(trainer.digest(), encoding="utf-8")
