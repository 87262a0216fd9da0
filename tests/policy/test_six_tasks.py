"""Every task end to end by the programs' command lines: demonstrations, a training that is killed, a rollout.

A tiny network and a handful of steps: it shows that the parts fit each other, not that anything is learned.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium
import pytest
import torch

import envs
from driftfield.training import run_program
from driftfield.training.faults import VARIABLE
from envs.offscreen import backend
from policy import collect, evaluate, train
from policy.config import CONFIG_DIR
from policy.replay_buffer import ReplayBuffer

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS: dict[str, tuple[ModuleType, type]] = {
    "collect": (collect, collect.CollectConfig),
    "train": (train, train.TrainConfig),
    "evaluate": (evaluate, evaluate.EvaluateConfig),
}
BATCH, STEPS, KILLED_AT = 8, 6, 3
IMAGE = ("observation=image",)


class Case(NamedTuple):
    """A task, and how it is shown and learned here."""

    task: str
    both: tuple[str, ...] = ()  # to collect and to train
    collect: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    needs: str = ""  # a simulator

    @property
    def name(self) -> str:
        return "-".join([self.task, *("image" for word in self.both if word in IMAGE)])


# PushT's expert plans for seconds, ToolHang's acts for as long: one episode will do, and it need not succeed.
ONE = ("episodes=1", "success_only=false")
FAST = [
    Case("arm_reach", collect=("action_noise=0.005",), train=("drifting.positives=2", "frequencies=2")),
    Case("push_t", IMAGE, ONE, ("crop=40",)),
    Case("block_push", ("action=delta",), train=("network.name=unet1d", "network.channels=[8,16]")),
]
SLOW = [
    Case("arm_reach", IMAGE, train=("crop=40",)),
    Case("push_t", collect=("action_noise=5", *ONE), train=("method=regression",)),
    Case("lift", ("action=delta",), ("action_noise=0.3",), needs="robosuite"),
    Case("can", train=("method=diffusion", "diffusion.steps=4"), needs="robosuite"),
    Case("tool_hang", collect=ONE, needs="robosuite"),
    Case("kitchen", collect=("action_noise=0.01",), needs="gymnasium_robotics"),
]
CASES = [pytest.param(case, id=case.name) for case in FAST]
CASES += [pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in SLOW]


def run(program: str, *words: str) -> int:
    """A program with its command line, in this process."""
    module, schema = PROGRAMS[program]
    main: Callable[[Any], int] = module.main
    return run_program(main, schema, config_dir=CONFIG_DIR, config_name=program, description="", arguments=[*words])


def killed(step: int, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m policy.train` in a process of its own, which dies before a step as if it were killed."""
    environment = {**os.environ, VARIABLE: f"train.step.{step}:exit", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "policy.train", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def skip_what_is_not_installed(case: Case) -> None:
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"{case.task} needs {case.needs}: pip install -e '.[simulators]'")
    if IMAGE[0] in case.both and case.task != "push_t":  # which draws without OpenGL
        # Training loads Triton; where Mesa's LLVM is in the process before Triton's own, that crashes.
        importlib.import_module("torch._dynamo")
        try:
            backend()
        except ImportError as error:
            pytest.skip(str(error))


def test_all_tasks_are_here() -> None:
    assert {case.task for case in (*FAST, *SLOW)} == set(envs.TASKS)


@pytest.mark.timeout(600)  # of a machine that is busy; seconds otherwise
@pytest.mark.parametrize("case", CASES)
def test_a_task_is_shown_learned_and_rolled_out(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip_what_is_not_installed(case)
    torch.set_num_threads(1)
    data, folder = tmp_path / "data.zarr", tmp_path / "run"

    assert run("collect", f"task={case.task}", f"out={data}", "episodes=2", "workers=2", *case.both, *case.collect) == 0
    buffer = ReplayBuffer.load(data)
    assert buffer.attributes["task"] == case.task
    image = any(array.ndim == 4 for array in buffer.arrays.values())
    assert image == (IMAGE[0] in case.both)

    words = [
        f"task={case.task}", f"run_dir={folder}", f"demonstrations.path={data}", "device=cpu", *case.both,
        "network.width=16", "network.depth=1", "drifting.generated=2", f"batch_size={BATCH}",
        f"samples={STEPS * BATCH}", "warmup_samples=0", f"log_every={BATCH}", f"checkpoint_every={BATCH}",
        "evaluation.episodes=1", "evaluation.workers=0", "evaluation.videos=0", *case.train,
    ]  # fmt: skip
    dead = killed(KILLED_AT, *words)
    assert dead.returncode == 9, dead.stderr
    assert not (folder / "results.json").exists()
    capsys.readouterr()
    assert run("train", *words) == 0
    assert f"resuming at {KILLED_AT * BATCH} samples" in capsys.readouterr().out
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in metrics] == [*range(1, STEPS + 1)]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["samples_seen"] == STEPS * BATCH

    assert run("train", *words) == 0
    assert "this run is complete" in capsys.readouterr().out

    evaluation = ("episodes=1", "workers=0", "show=0", "latency_chunks=1", "device=cpu")
    assert run("evaluate", f"run_dir={folder}", *evaluation) == 0
    log = json.loads((folder / "evaluation" / "eval_log.json").read_text(encoding="utf-8"))
    (evaluated,) = log["evaluations"]
    (episode,) = evaluated["episodes"]
    assert log["task"] == case.task and episode["seed"] == 100_000
    assert episode["failure"] is None and not episode["diverged"]
    assert 0 < episode["steps"] <= (gymnasium.spec(envs.TASKS[case.task]).max_episode_steps or 0)
    # The finished policy is the one that was rolled out at the end of the training, on the same seed and noise.
    assert evaluated["summary"]["score"] == results["last_evaluation"]["summary"]["score"]
    assert evaluated["summary"]["steps"] == results["last_evaluation"]["summary"]["steps"]
