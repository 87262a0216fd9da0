"""One of several processes for test_loop.py, started by torchrun: FOLDER [stop | kill | error]."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from driftfield.training import (
    Stopped,
    StopRequest,
    UserError,
    any_process,
    process_group,
    rank,
    require_equal,
    run_loop,
    share,
    sum_gradients,
)


class Counting:
    """Four samples a step."""

    samples_per_step = 4

    def __init__(self, fault: str) -> None:
        self.step_number, self.total, self.fault = 0, torch.zeros(1), fault

    def step(self) -> dict[str, float | Tensor]:
        self.step_number += 1
        self.total += self.step_number
        if self.fault == "stop" and self.step_number == 3 and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.fault == "error" and self.step_number == 3 and rank() == 1:
            raise UserError("file 7 is damaged")
        if self.fault == "kill" and self.step_number == 6 and rank() == 0:
            os.environ["DRIFTFIELD_FAULT"] = "checkpoint.before_rename:exit"
        return {"loss": self.total[0]}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": {"total": self.total}}

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, int]) -> None:
        self.step_number, self.total = step, tensors["model"]["total"]


def gradient_of_the_mean() -> list[float]:
    """Of w · x over x = 0 ... 5 and twice that, each process with its share of the x."""
    weight = torch.ones(2, requires_grad=True)
    mine = torch.arange(6.0)[share(6)]
    ((weight * torch.tensor([1.0, 2.0])).sum() * mine.sum() / 6).backward()
    sum_gradients([weight])
    assert weight.grad is not None
    return weight.grad.tolist()


def main(folder: Path, fault: str) -> int:
    with process_group(torch.device("cpu"), timeout_s=20.0), StopRequest() as stop:
        report: dict[str, object] = {
            "share": list(range(6)[share(6)]) if not fault else None,
            "gradient": gradient_of_the_mean(),
            "any": any_process(rank() == 1),
        }
        try:
            require_equal(config="other" if rank() == 2 else "same")
        except UserError as error:
            report["refused"] = str(error)
        training, code = Counting(fault), 0
        try:
            run_loop(
                training, folder, stop, name="count", samples=32, checkpoint_every=12, log_every=8, shown=("loss",)
            )
        except Stopped:
            code = stop.exit_code or 143
        report["steps"] = training.step_number
        (folder / f"report-{rank()}.json").write_text(json.dumps(report), encoding="utf-8")
    return code


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), *(sys.argv[2:] or [""])))
