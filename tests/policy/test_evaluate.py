"""`python -m policy.evaluate`: a scripted policy on the arm, what is written, and what is said of mistakes."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import envs
from driftfield.training import run_program
from envs.offscreen import backend
from policy import evaluate as program
from policy.drifting_policy import DriftingPolicy
from policy.evaluate import CONFIG_DIR, EvaluateConfig
from policy.normalizer import Normalizer, Part

ROOT = Path(__file__).resolve().parents[2]
STEP_M = 0.025


class RoundTheObstacle(nn.Module):
    """Goes to the target by way of a point beside the obstacle, on a side that the noise chooses; no network."""

    task, task_options = "arm_reach", {"observation": "state"}
    obs_steps, action_steps, horizon = 2, 8, 16

    def __init__(self, *, clearance_m: float = 0.13, spoil: bool = False) -> None:
        super().__init__()
        self.clearance_m, self.spoil = clearance_m, spoil
        self.chunks = 0  # asked of predict_chunk

    def predict(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        actions = self._plans(observation["state"][:, -1], generators)
        return actions / 0 if self.spoil else actions

    def predict_chunk(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        self.chunks += 1
        plans = self._plans(observation["state"][:, -1], [torch.Generator() for _ in generators])  # all on one side
        past = observation["state"][:, :1, 3:5]
        return torch.cat([past, plans, plans[:, -1:].expand(-1, 7, -1)], 1)

    def _plans(self, states: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        rows = zip(states.double().numpy(), generators, strict=True)
        return torch.stack([self._plan(row, draw) for row, draw in rows])

    def _plan(self, state: np.ndarray, draw: torch.Generator) -> Tensor:
        tip, target, obstacle = state[3:5].copy(), state[5:7], state[7:9]
        first_side = 1 if torch.rand((), generator=draw) < 0.5 else -1
        side = first_side if abs(tip[0] - obstacle[0]) < 0.05 else np.sign(tip[0] - obstacle[0])
        planned = []
        for _ in range(self.action_steps):
            below = tip[1] < obstacle[1] + 0.04
            goal = obstacle + [side * self.clearance_m, 0.05] if below else target
            way = goal - tip
            tip = tip + way * min(1.0, STEP_M / max(1e-9, float(np.linalg.norm(way))))
            planned.append(tip.copy())
        return torch.from_numpy(np.stack(planned)).float()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with two snapshots and a finished policy; what the files hold is the stub's affair."""
    for name in ("model", "snapshots/000100", "snapshots/000200"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "run"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    clearances = {"model": 0.13, "000200": 0.13, "000100": 0.0}  # the oldest runs into the obstacle
    monkeypatch.setattr(program, "load_policy", lambda path: RoundTheObstacle(clearance_m=clearances[path.name]))


def run(*arguments: str) -> int:
    return run_program(
        program.main,
        EvaluateConfig,
        config_dir=CONFIG_DIR,
        config_name="evaluate",
        description="",
        arguments=[*arguments, "device=cpu"],
    )


def read_log(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation" / "eval_log.json").read_text(encoding="utf-8")))


@pytest.mark.usefixtures("scripted")
def test_every_episode_is_logged_with_figures_versions_and_command(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("episodes=5", "batch=3", "workers=0", "show=0", "latency_chunks=5")
    assert run(f"run_dir={run_folder}", *small, "snapshots=2") == 0
    log = read_log(run_folder)
    assert (log["task"], log["task_options"]) == ("arm_reach", {"observation": "state"})
    assert [each["policy"] for each in log["evaluations"]] == ["snapshots/000100", "snapshots/000200", "model"]
    poor, _, good = log["evaluations"]
    assert [episode["seed"] for episode in good["episodes"]] == [100000 + index for index in range(5)]
    assert good["summary"]["success"] == 1.0 and poor["summary"]["success"] == 0.0
    assert good["summary"]["success_low"] == pytest.approx(0.566, abs=1e-3)
    assert good["summary"]["phases"] == [1.0]
    assert all(episode["failure"] is None and episode["steps"] <= 80 for episode in good["episodes"])
    assert log["protocol"]["success"] == {"max": 1.0, "last10": 0.5, "evaluations": 2}  # of the snapshots
    assert log["config"]["episodes"] == 5
    assert {"mujoco", "gymnasium", "torch", "numpy"} <= log["start"]["versions"].keys()
    assert log["start"]["command"]
    assert 0 < good["latency"]["p50_s"] <= good["latency"]["p95_s"] and good["latency"]["chunks"] == 5
    shown = capsys.readouterr().out
    assert "| model | 1.00 (5/5) | [0.57, 1.00] |" in shown
    assert "success: max 1.000, last10 0.500" in shown
    assert "latency of a chunk: p50" in shown


@pytest.mark.usefixtures("scripted")
def test_episodes_are_shorter_on_request(run_folder: Path) -> None:
    small = (f"run_dir={run_folder}", "episodes=2", "batch=2", "workers=0", "show=0", "latency_chunks=0")
    assert run(*small, "max_steps=5") == 0
    log = read_log(run_folder)
    assert log["task_options"] == {"observation": "state", "max_episode_steps": 5}
    assert [episode["steps"] for episode in log["evaluations"][0]["episodes"]] == [5, 5]


def test_chunks_are_averaged_on_request(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RoundTheObstacle()
    monkeypatch.setattr(program, "load_policy", lambda path: policy)
    small = (f"run_dir={run_folder}", "episodes=3", "batch=3", "workers=0", "show=0", "latency_chunks=0")
    assert run(*small, "ensemble=0.01") == 0
    log = read_log(run_folder)
    (evaluation,) = log["evaluations"]
    assert log["config"]["ensemble"] == 0.01 and evaluation["summary"]["success"] == 1.0
    assert policy.chunks == max(episode["steps"] for episode in evaluation["episodes"])
    assert run(*small) == 0
    assert read_log(run_folder)["config"]["ensemble"] is None
    assert policy.chunks == max(episode["steps"] for episode in evaluation["episodes"])  # asked no more


def can_draw() -> bool:
    try:
        backend()
    except ImportError:
        return False
    return True


@pytest.mark.usefixtures("scripted")
def test_the_figures_depend_on_no_number_of_workers_and_on_no_video(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("policy.rollout.MOST_FRAMES", 3)  # without a GPU a picture takes a tenth of a second
    logs = []
    video = run_folder / "evaluation" / "episodes.mp4"
    for changes in (("workers=0", "show=0"), ("workers=2", "show=1")):
        assert not video.exists()
        assert run(f"run_dir={run_folder}", "episodes=4", "batch=2", "latency_chunks=0", *changes) == 0
        logs.append(read_log(run_folder)["evaluations"][0])
    assert logs[0]["episodes"] == logs[1]["episodes"] and logs[0]["summary"] == logs[1]["summary"]
    assert logs[0]["latency"] is None
    if can_draw():
        assert video.stat().st_size > 1000 and str(video) in capsys.readouterr().out
    else:
        assert not video.exists()


@pytest.mark.usefixtures("scripted")
def test_without_opengl_the_evaluation_ends_with_one_warning(
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "nothing")
    with caplog.at_level(logging.WARNING):
        assert run(f"run_dir={run_folder}", "episodes=2", "workers=1", "latency_chunks=0", "show=2") == 0
    assert len(caplog.records) == 1 and "no video: arm_reach can't be drawn" in caplog.text
    assert read_log(run_folder)["evaluations"][0]["summary"]["success"] == 1.0
    assert "episodes.mp4" not in capsys.readouterr().out


def test_a_policy_that_gives_nan_is_named(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "load_policy", lambda path: RoundTheObstacle(spoil=True))
    assert run(f"run_dir={run_folder}", "episodes=1", "workers=0") == 2
    assert "run/model: policy: expected finite actions" in capsys.readouterr().err


@pytest.mark.usefixtures("scripted")
def test_environments_that_raise_too_often_end_the_evaluation_after_its_log(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*arguments: Any, **keywords: Any) -> Any:
        environment = envs.make(*arguments, **keywords)

        def step(action: np.ndarray) -> Any:
            raise RuntimeError("a broken arm")

        environment.step = step  # type: ignore[method-assign]
        return environment

    roll_out = program.rollout
    monkeypatch.setattr(program, "rollout", lambda *words, **keys: roll_out(*words, **keys, make=failing))
    assert run(f"run_dir={run_folder}", "episodes=2", "workers=0") == 2
    assert "raised in 2 of 2 episodes" in capsys.readouterr().err
    (evaluation,) = read_log(run_folder)["evaluations"]
    assert evaluation["summary"]["failed"] == 2
    assert "a broken arm" in evaluation["episodes"][0]["failure"]


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("run_dir={folder}/nowhere",),
            "run_dir: expected the folder of a finished run of policy.train, or of a policy",
        ),
        (("run_dir={folder}", "snapshots=3"), "snapshots: expected at most the 2 in"),
        (("run_dir={folder}/model", "snapshots=1"), "snapshots: expected 0 for the folder of a single policy"),
        (("run_dir={folder}", "episodes=0"), "episodes: expected an integer >= 1, found 0"),
        (("run_dir={folder}", "ensemble=slow"), "ensemble: expected a number, found 'slow'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    arguments: tuple[str, ...], message: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(argument.format(folder=run_folder) for argument in arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


def test_a_folder_that_holds_no_policy_is_told(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"run_dir={run_folder}") == 2
    assert capsys.readouterr().err.startswith("error: run_dir: ")


def test_the_command_line_rolls_out_a_saved_policy(tmp_path: Path) -> None:
    normalizer = Normalizer({"action": [Part(2)], "state": [Part(9)]})
    policy = DriftingPolicy(
        shapes={"state": (9,)},
        action_dim=2,
        normalizer=normalizer.config,
        network={"name": "mlp", "width": 16, "depth": 1},
        task="arm_reach",
        task_options={"observation": "state"},
    )
    action, state = np.array([[-0.3, 0.0], [0.3, 0.5]], np.float32), np.eye(9, dtype=np.float32)
    policy.normalizer.fit({"action": action, "state": state})
    policy.save_pretrained(tmp_path / "policy")
    words = [f"run_dir={tmp_path / 'policy'}", "episodes=3", "workers=1", "device=cpu", "show=0", "latency_chunks=0"]
    done = subprocess.run(
        [sys.executable, "-m", "policy.evaluate", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert "| policy |" in done.stdout
    assert len(read_log(tmp_path / "policy")["evaluations"][0]["episodes"]) == 3
