"""Rows A1-A3, G1, G2: a run killed at any instant and started again ends bit-identical to one never killed."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import toy_trainer
from killing import kill_when, lines_in, run_to_end, start
from toy_trainer import ITEMS, SAVE_EVERY

from driftfield.training import checkpoint_steps, read_checkpoint, read_log

STEPS = 22  # ends between two regular checkpoints, in the fifth epoch


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the final state of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_to_end(toy_trainer.run, folder, STEPS) == 0
    return digest(folder)


def digest(folder: Path) -> str:
    return (folder / "digest.txt").read_text(encoding="utf-8")


def assert_finishes_like(folder: Path, undisturbed: str) -> None:
    assert run_to_end(toy_trainer.run, folder, STEPS) == 0
    assert digest(folder) == undisturbed
    assert [line["step"] for line in read_log(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []


def kill_at_random_steps(folder: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    codes = []
    for attempt in range(kills):
        heartbeat, beats = folder.parent / f"heartbeat {attempt}", draw.randrange(1, SAVE_EVERY + 3)
        process = start(toy_trainer.run, folder, STEPS, heartbeat=heartbeat)
        codes.append(kill_when(process, lambda heartbeat=heartbeat, beats=beats: lines_in(heartbeat) >= beats))
    assert codes.count(-signal.SIGKILL) >= min(kills, 3)  # the later ones may find the run at its end


def test_two_undisturbed_runs_agree(tmp_path: Path, undisturbed: str) -> None:
    assert_finishes_like(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("kills", [3, pytest.param(24, marks=pytest.mark.slow)])
def test_kill_at_random_steps(tmp_path: Path, undisturbed: str, kills: int) -> None:
    kill_at_random_steps(tmp_path / "run", kills, seed=kills)
    assert_finishes_like(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("step", [0, SAVE_EVERY, 10])  # before any checkpoint, right after one, the first of an epoch
def test_kill_in_a_chosen_step(tmp_path: Path, undisturbed: str, step: int) -> None:
    assert run_to_end(toy_trainer.run, tmp_path / "run", STEPS, fault=f"step.{step}:exit") == 9
    assert_finishes_like(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("kills", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_kill_while_a_checkpoint_is_written(tmp_path: Path, undisturbed: str, kills: int) -> None:
    folder = tmp_path / "run"
    hit = 0
    for attempt in range(kills):
        # The weight of a checkpoint makes its writing take longer than the poll; each attempt aims at a later one.
        process = start(toy_trainer.run, folder, STEPS, pad_mib=16)
        target = f".tmp-step-{SAVE_EVERY * (attempt % 6 + 1)}-*"
        kill_when(process, lambda target=target: any((folder / "checkpoints").glob(target)))
        hit += any((folder / "checkpoints").glob(".tmp-*"))
    assert hit, "no kill hit the writing of a checkpoint"
    assert_finishes_like(folder, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_resumed_run_ends_the_same(tmp_path: Path, undisturbed: str, number: int) -> None:
    folder = tmp_path / "run"
    process = start(toy_trainer.run, folder, STEPS)
    code = kill_when(process, lambda: lines_in(folder / "metrics.jsonl") >= SAVE_EVERY + 1, number)
    assert code == 128 + number
    logged = read_log(folder / "metrics.jsonl")[-1]["step"]
    assert checkpoint_steps(folder / "checkpoints")[-1] == logged < STEPS
    assert_finishes_like(folder, undisturbed)


def test_resuming_twice_changes_nothing(tmp_path: Path, undisturbed: str) -> None:
    assert_finishes_like(tmp_path / "run", undisturbed)
    loaded = read_checkpoint(tmp_path / "run" / "checkpoints")
    assert loaded is not None and loaded.step == STEPS
    assert_finishes_like(tmp_path / "run", undisturbed)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was killed in the middle."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    assert run_to_end(toy_trainer.run, folder, STEPS, fault="step.13:exit") == 9
    return folder


@pytest.mark.parametrize("item", ITEMS)
def test_forgetting_any_item_is_noticed(tmp_path: Path, killed: Path, undisturbed: str, item: str) -> None:
    """Row A2: without this the tests above could pass while comparing nothing."""
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    assert run_to_end(toy_trainer.run, folder, STEPS, omit=item) == 0
    assert digest(folder) != undisturbed
