"""The loop of a training: what is done when, and that several processes are one training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from driftfield.training import (
    Action,
    Stopped,
    StopRequest,
    UserError,
    checkpoint_steps,
    read_checkpoint,
    read_log,
    run_loop,
    sum_gradients,
)

WORKER = Path(__file__).parent / "loop_worker.py"


class Counting:
    """Four samples a step; its only state is how many steps it has done."""

    samples_per_step = 4

    def __init__(self) -> None:
        self.step_number = 0
        self.total = torch.zeros(1)

    def step(self) -> dict[str, float | Tensor]:
        self.step_number += 1
        self.total += self.step_number
        return {"loss": self.total[0], "half": 0.5}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": {"total": self.total}}

    def state(self) -> dict[str, int]:
        return {"steps": self.step_number}

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, int]) -> None:
        assert state == {"steps": step}
        self.step_number, self.total = step, tensors["model"]["total"]


def loop(
    training: Counting, folder: Path, done: list[int], *, samples: int = 30, stop: StopRequest | None = None
) -> None:
    run_loop(
        training,
        folder,
        stop or StopRequest(),
        name="count",
        samples=30,
        checkpoint_every=12,
        log_every=8,
        shown=("loss",),
        actions=[Action(10, lambda: done.append(training.step_number * 4))],
    )


def test_everything_happens_at_multiples_of_its_samples_and_at_the_end(tmp_path: Path) -> None:
    done: list[int] = []
    loop(Counting(), tmp_path, done)
    assert done == [0, 12, 20, 32]  # the start, the steps that cross 10, 20 and 30, and the last one
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [(line["samples_seen"], line["loss"], line["half"]) for line in lines] == [
        (samples, step * (step + 1) / 2, 0.5) for samples, step in ((8, 2), (16, 4), (24, 6), (32, 8))
    ]
    assert checkpoint_steps(tmp_path / "checkpoints") == [6, 8]


def test_a_stopped_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    training, done = Counting(), []  # type: Counting, list[int]
    with StopRequest() as stop, pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        loop(training, tmp_path, done, stop=stop)
    assert training.step_number == 1 and done == [0]
    again = Counting()
    loop(again, tmp_path, done)
    assert again.step_number == 8 and again.total.item() == 36
    assert done == [0, 12, 20, 32]


def test_a_finished_training_is_left_alone(tmp_path: Path) -> None:
    loop(Counting(), tmp_path, [])
    again = Counting()
    loop(again, tmp_path, [])
    assert again.step_number == 8


def test_alone_a_gradient_is_its_own_sum() -> None:
    parameter = torch.ones(2, requires_grad=True)
    (3 * parameter).sum().backward()
    sum_gradients([parameter])
    assert parameter.grad is not None and parameter.grad.tolist() == [3.0, 3.0]


def torchrun(folder: Path, count: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={count}",
        "--master-port=0",
        "--nnodes=1",
    ]
    command = [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(WORKER), str(folder), *arguments]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, timeout=100
    )


def test_three_processes_make_one_training(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, 3)
    assert ended.returncode == 0, ended.stderr
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text(encoding="utf-8")) for rank in range(3)]
    assert [report["share"] for report in reports] == [[0, 1], [2, 3], [4, 5]]
    # the gradient of the mean over the whole batch, the same in each process
    assert all(report["gradient"] == pytest.approx([2.5, 5.0]) for report in reports)
    assert [report["any"] for report in reports] == [True] * 3
    assert [report["steps"] for report in reports] == [8] * 3
    assert "config: expected the same in all processes, found another in [2] than in 0" in reports[1]["refused"]
    loaded = read_checkpoint(tmp_path / "checkpoints")
    assert loaded is not None and loaded.step == 8


def test_a_stop_in_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, 2, "stop")
    assert ended.returncode != 0  # torchrun's own way to say that the workers returned 143
    steps = [json.loads((tmp_path / f"report-{rank}.json").read_text(encoding="utf-8"))["steps"] for rank in range(2)]
    assert steps == [3, 3]
    assert checkpoint_steps(tmp_path / "checkpoints") == [3]


def test_a_killed_process_ends_all_and_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, 2, "kill")
    assert ended.returncode != 0
    assert checkpoint_steps(tmp_path / "checkpoints") == [3]  # step 6 was being written when the process died
    assert torchrun(tmp_path, 2).returncode == 0
    loaded = read_checkpoint(tmp_path / "checkpoints")
    assert loaded is not None and loaded.step == 8 and loaded.tensors["model"]["total"].item() == 36
    assert not list(tmp_path.glob("checkpoints/.tmp*"))


def test_an_error_in_one_process_is_told_and_ends_all_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = torchrun(tmp_path, 2, "error")
    assert ended.returncode != 0 and "error: process 1: file 7 is damaged" in ended.stderr
    assert time.monotonic() - start < 60  # far below the 10 minutes after which a collective gives up
    assert not list(tmp_path.glob("report-*.json"))


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    from driftfield.training import distributed

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match="^batch_size: expected a number that 3 processes can share evenly, found 64"),
    ):
        patch.setattr(distributed, "world_size", lambda: 3)
        distributed.share(64, "batch_size")
