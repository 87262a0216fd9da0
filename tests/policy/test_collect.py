"""Collecting: an episode is a function of its seed, the result of the options alone; kills, failures, mixed options."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from driftfield.training import run_program
from envs.block_push import BlockPush
from envs.experts.block_push import BlockPushExpert
from policy import collect, collect_worker
from policy.collect import CONFIG_DIR, CollectConfig, main
from policy.collect_worker import CannotCollect, Record, Recorder, Settings, episode_file, record_file
from policy.replay_buffer import ReplayBuffer

ROOT = Path(__file__).parents[2]


def run(*words: str) -> int:
    return run_program(
        main, CollectConfig, config_dir=CONFIG_DIR, config_name="collect", description="", arguments=words
    )


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "policy.collect", *words]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class StubWorkers:
    """Plays seeds in no time, in a shuffled order; every third fails."""

    def __init__(self, folder: Path, settings: Settings, count: int) -> None:
        self.folder = folder
        (folder / "facts.json").write_text('{"environment": "stub"}', encoding="utf-8")

    def __enter__(self) -> "StubWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def play(self, seed: int) -> Record:
        time.sleep(random.uniform(0, 0.01))
        failure = "0 of 1 phases after 5 steps" if seed % 3 == 2 else ""
        record = Record(seed, failure, not failure, float(not failure), int(not failure), 5)
        if not failure:
            np.savez(episode_file(self.folder, seed), action=np.full((5, 2), seed, np.float32))
        record_file(self.folder, seed).write_text(json.dumps(record._asdict()), encoding="utf-8")
        return record


@pytest.fixture
def stub_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_Workers", StubWorkers)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "demonstrations.zarr"
    assert run("task=block_push", "episodes=3", "workers=2", f"out={out}") == 0
    return out


# ---- an episode


def test_workers_have_no_torch() -> None:
    program = (
        "import sys\n"
        "from policy.collect_worker import Recorder, Settings\n"
        "record, episode = Recorder(Settings('block_push')).play(0)\n"
        "assert record.success and len(episode['action']) > 50\n"
        "assert 'torch' not in sys.modules and 'driftfield' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_episode_ends_with_the_terminal_observation(undisturbed: Path) -> None:
    buffer = ReplayBuffer.load(undisturbed)
    for number in range(len(buffer)):
        state = buffer.episode(number)["state"]
        for row, inside in ((-2, False), (-1, True)):
            blocks, targets = state[row, [0, 1, 3, 4]].reshape(2, 2), state[row, [10, 11, 13, 14]].reshape(2, 2)
            distance = np.linalg.norm(blocks[:, None] - targets, axis=-1)  # [block, zone]
            assert (distance.min(axis=1) < 0.05).all() == inside


def test_action_is_what_was_done_after_the_observation(undisturbed: Path) -> None:
    episode = ReplayBuffer.load(undisturbed).episode(0)
    # An absolute action is the rod's next target, which is part of the state.
    np.testing.assert_allclose(episode["state"][1:, 8:10], episode["action"][:-1], atol=1e-7)


def test_noise_is_executed_and_the_clean_action_stored() -> None:
    _, episode = Recorder(Settings("block_push", action_noise=0.004, success_only=False)).play(1)
    noise = episode["state"][1:, 8:10] - episode["action"][:-1]
    assert np.std(noise) == pytest.approx(0.004, rel=0.15)
    # The expert's own step is never longer than 3.5 cm.
    steps = np.linalg.norm(episode["action"] - episode["state"][:, 8:10], axis=1)
    assert steps.max() <= 0.035 + 1e-6


def test_delta_actions_are_changes_of_the_rods_target() -> None:
    _, episode = Recorder(Settings("block_push", action="delta")).play(0)
    np.testing.assert_allclose(np.diff(episode["state"][:, 8:10], axis=0), episode["action"][:-1], atol=1e-6)


def test_episode_is_a_function_of_its_seed() -> None:
    recorder = Recorder(Settings("block_push", action_noise=0.002))
    _, first = recorder.play(4)
    recorder.play(5)
    _, again = recorder.play(4)
    _, elsewhere = Recorder(Settings("block_push", action_noise=0.002)).play(4)
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
        np.testing.assert_array_equal(first[key], elsewhere[key])


def test_physics_that_diverges_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrecker(BlockPushExpert):
        def action(self) -> np.ndarray:
            self._task.data.qvel[0] = np.nan
            return super().action()

    monkeypatch.setattr(collect_worker, "make_expert", lambda name, env, random: Wrecker(env.unwrapped, random))
    record, episode = Recorder(Settings("block_push", success_only=False)).play(0)
    assert record.failure.startswith("the physics diverged") and not episode


@pytest.mark.parametrize(("success_only", "kept"), [(True, False), (False, True)])
def test_failed_episodes_are_kept_on_request(monkeypatch: pytest.MonkeyPatch, success_only: bool, kept: bool) -> None:
    class Idle(BlockPushExpert):
        def action(self) -> np.ndarray:
            return self._task.action_towards(self._task.effector_target())

    monkeypatch.setattr(collect_worker, "make_expert", lambda name, env, random: Idle(env.unwrapped, random))
    record, episode = Recorder(Settings("block_push", success_only=success_only)).play(0)
    assert not record.success and bool(episode) == kept
    assert record.failure == ("" if kept else "0 of 2 phases after 351 steps")


def test_an_experts_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(BlockPushExpert):
        def action(self) -> np.ndarray:
            raise RuntimeError("no way found")

    monkeypatch.setattr(collect_worker, "make_expert", lambda name, env, random: Lost(env.unwrapped, random))
    assert Recorder(Settings("block_push")).play(0)[0].failure == "RuntimeError: no way found"


def test_fewer_phases_can_be_asked_for() -> None:
    record, episode = Recorder(Settings("block_push", phases=1)).play(0)
    assert record.success and record.phases == 1 and record.score == pytest.approx(0.49)
    with pytest.raises(CannotCollect, match="phases: block_push has 2, so expected at most that, found 3"):
        Recorder(Settings("block_push", phases=3))


# ---- a collection


def test_result_does_not_depend_on_the_number_of_workers(undisturbed: Path, tmp_path: Path) -> None:
    assert run("task=block_push", "episodes=3", "workers=1", f"out={tmp_path / 'one.zarr'}") == 0
    assert files(tmp_path / "one.zarr") == files(undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.zarr"]


def test_same_command_again_changes_nothing(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(undisturbed)
    assert run("task=block_push", "episodes=3", "workers=1", f"out={undisturbed}") == 0
    assert files(undisturbed) == before and "3 episodes" in capsys.readouterr().out


def test_attributes_say_where_the_episodes_come_from(undisturbed: Path) -> None:
    attributes = ReplayBuffer.load(undisturbed).attributes
    assert attributes["task"] == "block_push" and attributes["action"] == "absolute"
    assert attributes["state_names"] == list(BlockPush.STATE_NAMES)
    assert [episode["seed"] for episode in attributes["episodes"]] == [0, 1, 2]
    assert {"mujoco", "gymnasium", "numpy"} == set(attributes["versions"])


def test_a_killed_run_goes_on_to_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "demonstrations.zarr"
    words = command("task=block_push", "episodes=3", "workers=1", f"out={out}")
    partial = out.with_name(f"{out.name}.partial")
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)
    while not record_file(partial, 0).exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not out.exists()
    assert run(*words[3:]) == 0
    assert files(out) == files(undisturbed) and not partial.exists()


def test_a_stopped_run_goes_on(
    stub_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(self: StubWorkers, seed: int) -> Record:
        if seed == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return undisturbed_play(self, seed)

    undisturbed_play = StubWorkers.play
    assert run("task=block_push", "episodes=7", "workers=1", f"out={tmp_path / 'undisturbed.zarr'}") == 0
    words = ("task=block_push", "episodes=7", "workers=1", f"out={tmp_path / 'stopped.zarr'}")
    with monkeypatch.context() as patch:
        patch.setattr(StubWorkers, "play", play)
        assert run(*words) == 130
    assert "4 of 7 episodes so far; the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "stopped.zarr").exists()
    assert run(*words) == 0
    assert files(tmp_path / "stopped.zarr") == files(tmp_path / "undisturbed.zarr")


def test_failed_seeds_are_replaced_and_listed(stub_workers: None, tmp_path: Path) -> None:
    for workers in (1, 4):
        out = tmp_path / f"{workers}.zarr"
        assert run("task=block_push", "episodes=7", f"workers={workers}", "first_seed=10", f"out={out}") == 0
        buffer = ReplayBuffer.load(out)
        seeds = [10, 12, 13, 15, 16, 18, 19]
        assert [episode["seed"] for episode in buffer.attributes["episodes"]] == seeds
        assert buffer.arrays["action"][::5, 0].tolist() == seeds
        assert [entry["seed"] for entry in buffer.attributes["failed"]] == [11, 14, 17]
    assert files(tmp_path / "1.zarr") == files(tmp_path / "4.zarr")


def test_too_many_failures_stop_it(stub_workers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("task=block_push", "episodes=9", "workers=1", "max_failures=1", f"out={tmp_path / 'a.zarr'}") == 2
    expected = "2 of 6 episodes failed, max_failures=1 are allowed; the last is seed 5: 0 of 1 phases after 5 steps"
    assert expected in capsys.readouterr().err
    assert run("task=block_push", "episodes=9", "workers=1", "max_failures=4", f"out={tmp_path / 'a.zarr'}") == 0


def test_options_are_not_mixed(stub_workers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={tmp_path / 'a.zarr'}"
    assert run("task=block_push", "episodes=9", "max_failures=1", out) == 2
    assert run("task=block_push", "episodes=9", "action_noise=0.01", out) == 2
    assert "action_noise (was 0.0, now 0.01); choose out=OTHER or delete it" in capsys.readouterr().err
    assert run("task=block_push", "episodes=9", out) == 0
    assert run("task=block_push", "episodes=9", "action=delta", out) == 2
    assert "action (was None, now delta); choose out=OTHER or delete it" in capsys.readouterr().err
    assert run("task=block_push", "episodes=5", out) == 2
    assert "episodes (was 9, now 5)" in capsys.readouterr().err


def test_an_episode_whose_worker_dies_is_played_again(tmp_path: Path) -> None:
    with collect._Workers(tmp_path, Settings("block_push"), 1) as workers:
        first = workers.play(0)
        os.kill(workers._started[-1].pid, signal.SIGKILL)
        workers._started[-1].wait()
        assert workers.play(0) == first and len(workers._started) == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["task=block_pull"], "task: expected one of arm_reach, push_t, block_push"),
        (["task=block_push", "phases=3"], "phases: block_push has 2"),
        (["task=arm_reach", "action=delta"], "task arm_reach: "),
    ],
)
def test_what_cannot_be_collected_is_told(
    words: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words, "episodes=1", f"out={tmp_path / 'a.zarr'}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("opengl", "observation", "text"),
    [
        ("none", "state", "task arm_reach: invalid value for environment variable MUJOCO_GL: none"),
        ("disable", "image", "task arm_reach: no picture can be drawn with MUJOCO_GL=disable: "),
    ],
)
def test_opengl_that_is_not_there_is_told_and_no_episode_counts_as_failed(
    opengl: str,
    observation: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MUJOCO_GL", opengl)  # of the worker: this process has its own already
    words = ["task=arm_reach", "episodes=1", f"observation={observation}", f"out={tmp_path / 'a.zarr'}"]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error and "Traceback" not in error
    assert not list(tmp_path.rglob("seed_*"))
