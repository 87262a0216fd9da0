"""Rollouts: receding horizon, the same numbers with any number of workers, environments and policies that fail."""

import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import envs
from driftfield.training import Progress, UserError
from policy import rollout as module
from policy.rollout import Episode, PolicyError, RolloutError, replay, rollout
from policy.rollout_worker import Setup

sys.path.append(str(Path(__file__).parent))  # worker processes import it as well
from stub_environments import Stub, make  # noqa: E402

SEEDS = [100000, 100001, 100002, 100003, 100004, 100005, 100006]


class StubPolicy:
    """Mixes all rows of its batch on purpose: its numbers reveal any change of a batch."""

    obs_steps, action_steps, horizon = 2, 4, 6

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def predict(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        state = observation["state"]  # [B, To, 3]
        self.seen.append(state.clone())
        noise = torch.stack([torch.randn(self.action_steps, 2, generator=draw) for draw in generators])
        return torch.tanh(noise - 0.3 * state[:, -1:, :2] + 0.01 * state.mean() + 0.01 * state[:, :1, :2])


class Whole(StubPolicy):
    """Whole chunks, the first action of the past; what it said is kept by row."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: list[Tensor] = []

    def predict_chunk(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        self.seen.append(observation["state"].clone())
        noise = torch.stack([torch.rand(self.horizon, 2, generator=draw) for draw in generators])
        self.chunks.append(noise - 0.5 + 0.01 * observation["state"][:, -1:, :2])
        return self.chunks[-1]


class Broken(StubPolicy):
    def __init__(self, spoil: Any) -> None:
        super().__init__()
        self.spoil = spoil

    def predict(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        return self.spoil(super().predict(observation, generators))


def run(seeds: Sequence[int] = SEEDS, *, policy: StubPolicy | None = None, **options: Any) -> list[Episode]:
    keywords: dict[str, Any] = {"batch": 3, "noise_seed": 5, "make": make, "task": "stub", **options}
    return rollout(policy or StubPolicy(), keywords.pop("task"), seeds=seeds, **keywords)


def numbers(episodes: Sequence[Episode]) -> list[Any]:
    """All that must not depend on how an episode was simulated."""
    varying = ("latencies", "retries")
    return [
        {key: value for key, value in episode.to_plain().items() if key not in varying}
        | {"actions": episode.actions.tobytes()}
        for episode in episodes
    ]


@pytest.fixture(scope="module")
def undisturbed() -> list[Any]:
    return numbers(run())


# ---- the protocol


def test_slices_are_executed_whole_and_the_window_starts_with_the_first_observation_repeated() -> None:
    policy = StubPolicy()
    (episode,) = run([100000], policy=policy, task_options={"length": 9})  # 100000 mod 3 = 1: 10 steps
    assert episode.steps == 10
    steps = [seen[0, :, 2].tolist() for seen in policy.seen]  # the state's last entry counts the steps
    assert steps == [[0, 0], [3, 4], [7, 8]]
    assert torch.equal(policy.seen[0][0, 0], policy.seen[0][0, 1])
    assert len(episode.latencies) == 3
    assert episode.actions.shape == (10, 2) and episode.actions.dtype == np.float32


def test_actions_replayed_in_a_bare_environment_give_the_episode_s_score() -> None:
    for episode in run(workers=2):
        environment = Stub()
        _, info = environment.reset(seed=episode.seed)
        for action in episode.actions:
            *_, info = environment.step(action)
        assert info["score"] == episode.score
        assert (info["phases"], info["success"]) == (episode.phases, episode.success)


def test_an_episode_that_cannot_get_better_ends_with_the_figures_of_the_whole_one() -> None:
    episodes = run(task_options={"solved_at": 6, "length": 30}, workers=2)
    for episode in episodes:
        assert episode.steps == len(episode.actions) == 6  # within the second slice of four
        whole = Stub(solved_at=6, length=30)
        _, info = whole.reset(seed=episode.seed)
        over, steps = False, 0
        while not over:
            action = episode.actions[steps] if steps < 6 else np.zeros(2, np.float32)
            _, _, over, _, info = whole.step(action)
            steps += 1
        assert steps >= 30
        assert (episode.score, episode.success, episode.phases) == (info["score"], info["success"], info["phases"])
        assert (episode.score, episode.success, episode.phases) == (1.0, True, 2)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_with_an_ensemble_every_action_is_the_mean_of_what_all_chunks_say_of_its_step(decay: float) -> None:
    policy = Whole()
    episodes = run(SEEDS[:2], policy=policy, batch=2, ensemble=decay)  # 12 and 13 steps: the first ends before
    assert [episode.steps for episode in episodes] == [12, 13] and len(policy.chunks) == 13
    assert [seen[1, :, 2].tolist() for seen in policy.seen[:3]] == [[0, 0], [0, 1], [1, 2]]  # a prediction a step
    for row, episode in enumerate(episodes):
        for step in range(episode.steps):
            made = range(max(0, step - 4), step + 1)  # a chunk reaches 5 steps: 6 less one of the past
            weights = [np.exp(-decay * age) for age in range(len(made))]  # the oldest weighs most
            said = [policy.chunks[m][row, 1 + step - m].double().numpy() for m in made]
            mean = sum(w * each for w, each in zip(weights, said, strict=True)) / sum(weights)
            np.testing.assert_allclose(episode.actions[step], mean, rtol=1e-5, atol=1e-7)


def test_an_ensemble_begins_anew_in_every_block_and_depends_on_no_worker() -> None:
    alone = run(SEEDS[2:4], policy=Whole(), batch=2, ensemble=0.1)
    assert numbers(run(SEEDS[:4], policy=Whole(), batch=2, ensemble=0.1))[2:] == numbers(alone)
    assert numbers(run(SEEDS[2:4], policy=Whole(), batch=2, ensemble=0.1, workers=2)) == numbers(alone)


def test_an_ensemble_leaves_what_finished_rows_say_alone_and_refuses_nan_of_the_others() -> None:
    class Spoiled(Whole):
        def predict_chunk(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
            chunk = super().predict_chunk(observation, generators)
            chunk[row, 2:] = torch.nan if len(self.chunks) == 13 else chunk[row, 2:]
            return chunk

    row = 0  # ended after 12 steps
    assert [episode.steps for episode in run(SEEDS[:2], policy=Spoiled(), batch=2, ensemble=0.0)] == [12, 13]
    row = 1
    with pytest.raises(PolicyError, match="expected finite actions, found nan at row 1, step 2, entry 0"):
        run(SEEDS[:2], policy=Spoiled(), batch=2, ensemble=0.0)


@pytest.mark.parametrize("short", ["score", "phases"])
def test_an_episode_with_anything_left_to_gain_goes_on(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"score": 1.0, "phases": 2, "success": True, "diverged": False}
    info |= {"score": 0.999} if short == "score" else {"phases": 1, "success": False}
    monkeypatch.setattr(Stub, "_info", lambda _: info)
    assert [episode.steps for episode in run([0, 1])] == [11, 12]


class Looks(StubPolicy):
    """Keeps the images of each prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []

    def predict(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        self.images.append(observation["image"].clone())
        return super().predict(observation, generators)


def test_only_images_that_the_policy_sees_are_drawn_and_it_sees_the_same() -> None:
    made: list[Stub] = []

    def keep(task: str, **options: Any) -> Stub:
        made.append(Stub(**options))
        return made[-1]

    sparing, lavish = Looks(), Looks()
    options = {"camera": True, "length": 10}
    some = run([100001], policy=sparing, make=keep, task_options=options)  # 100001 mod 3 = 2: 12 steps
    every = run([100001], policy=lavish, make=keep, task_options=options | {"always_draws": True})
    assert numbers(some) == numbers(every)
    assert [image.unique().tolist() for image in sparing.images] == [[100], [103, 104], [107, 108]]
    assert all(torch.equal(one, other) for one, other in zip(sparing.images, lavish.images, strict=True))
    assert made[0].drawn == [0, 3, 4, 7, 8, 11, 12]
    assert made[1].drawn == list(range(13))


def test_the_policy_sees_one_batch_size_always() -> None:
    policy = StubPolicy()
    run(policy=policy)
    assert {len(seen) for seen in policy.seen} == {3}  # 7 episodes: the last block is filled up


def test_an_episode_s_state_and_noise_follow_from_its_seeds_alone() -> None:
    class Rowwise(StubPolicy):
        def predict(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
            state = observation["state"]
            rows = zip(generators, state, strict=True)
            return torch.stack([torch.tanh(torch.randn(4, 2, generator=draw) - row[-1:, :2]) for draw, row in rows])

    alone = [numbers(run([seed], policy=Rowwise()))[0] for seed in SEEDS]
    assert alone == numbers(run(policy=Rowwise(), batch=5))
    assert alone != numbers(run(policy=Rowwise(), noise_seed=6))


def test_clipped_entries_are_counted_and_never_reach_the_environment() -> None:
    def far(actions: Tensor) -> Tensor:
        actions[..., 1] = -7
        return actions.clamp(max=0.5)

    for episode in run(policy=Broken(far)):
        assert episode.failure is None
        assert episode.clipped == episode.steps


def test_progress_counts_episodes() -> None:
    stream = io.StringIO()
    with Progress(len(SEEDS), unit="episodes", stream=stream) as progress:
        run(progress=progress)
    assert "7/7 episodes" in stream.getvalue()


def test_no_seed_gives_no_episode() -> None:
    assert run([], workers=2) == []


# ---- F6: workers change nothing


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_worker_processes_change_no_bit(workers: int, undisturbed: list[Any]) -> None:
    assert numbers(run(workers=workers)) == undisturbed


def test_workers_import_neither_torch_nor_driftfield() -> None:
    (episode,) = run([0], task="without_torch", workers=1)
    assert episode.steps == 11


def test_no_worker_outlives_its_rollout() -> None:
    with module._crew(Setup(make, "stub", {}, 2), 2, 60) as crew:
        assert isinstance(crew, module._Processes)
        crew.start([0, 1, 2])
        processes = [worker.process for worker in crew._workers]
        assert [process.poll() for process in processes] == [None, None]
    assert None not in [process.poll() for process in processes]


# ---- F4: the environment raises


@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_that_raises_is_a_failed_episode_and_the_others_finish(
    workers: int, undisturbed: list[Any]
) -> None:
    episodes = run(task_options={"raises": (100006,)}, workers=workers, failure_cap=0.2)
    assert numbers(episodes[:6]) == undisturbed[:6]
    failed = episodes[6]
    assert failed.failure is not None and failed.failure.startswith("Traceback")
    assert module.last_line(failed.failure) == "RuntimeError: the gripper is lost"
    assert (failed.score, failed.success, failed.phases, failed.steps) == (0.0, False, 0, 2)


def test_an_environment_that_raises_in_the_middle_of_a_block_leaves_its_neighbours_their_end() -> None:
    episodes = run(task_options={"raises": (100001,), "no_reset": (100002,)}, workers=2, failure_cap=0.5)
    assert [episode.failure is None for episode in episodes] == [True, False, False, True, True, True, True]
    assert [episode.steps for episode in episodes] == [12, 2, 0, 12, 13, 11, 12]


def test_a_block_without_any_initial_state_ends() -> None:
    episodes = run([3, 4], task_options={"no_reset": (3, 4)}, failure_cap=1.0)
    assert all(episode.failure and "no initial state" in episode.failure for episode in episodes)
    assert [len(episode.actions) for episode in episodes] == [0, 0]


def test_too_many_failures_are_an_error_that_keeps_the_episodes() -> None:
    with pytest.raises(RolloutError, match=r"raised in 2 of 7 .* at most 10%.*seed 100001.*gripper is lost") as caught:
        run(task_options={"raises": (100001, 100005)})
    assert len(caught.value.episodes) == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_that_cannot_be_made_is_the_user_s_error(workers: int) -> None:
    with pytest.raises(UserError, match="task nowhere: ValueError: there is no task 'nowhere'"):
        run(task="nowhere", workers=workers)


def test_a_simulator_that_cannot_be_imported_is_the_user_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "none")  # of the worker: this process has its own already
    with pytest.raises(UserError, match="task arm_reach: RuntimeError: invalid value .* MUJOCO_GL: none"):
        run(task="arm_reach", make=envs.make, workers=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_drawn_are_the_user_s_error(workers: int) -> None:
    with pytest.raises(UserError, match="task stub: ImportError: no picture can be drawn"):
        run(task_options={"no_opengl": True}, workers=workers)


# ---- F5: a worker is lost


@pytest.mark.parametrize(("fault", "workers"), [("dies", 1), ("dies", 2), ("exits", 2), ("hangs", 2)])
def test_a_lost_worker_s_episodes_are_played_again_with_the_same_result(
    fault: str, workers: int, tmp_path: Path, undisturbed: list[Any]
) -> None:
    timeout = {"timeout_s": 6.0} if fault == "hangs" else {}
    episodes = run(task_options={fault: (100001,), "once": str(tmp_path)}, workers=workers, **timeout)
    assert numbers(episodes) == undisturbed
    assert episodes[1].retries >= 1 and sum(episode.retries for episode in episodes[3:]) == 0


@pytest.mark.parametrize(("fault", "what"), [("dies", "was killed by SIGKILL"), ("exits", "ended with exit status 3")])
def test_an_episode_that_loses_three_workers_is_named(fault: str, what: str) -> None:
    with pytest.raises(RolloutError, match=f"seed 100001 of stub: its worker {what}"):
        run(task_options={fault: (100001,)}, workers=1)


@pytest.mark.slow
def test_an_episode_that_hangs_thrice_is_named() -> None:
    start = time.monotonic()
    with pytest.raises(RolloutError, match="seed 7 of stub: its worker gave no answer in time"):
        run([7], task_options={"hangs": (7,)}, workers=1, timeout_s=1.0)
    assert time.monotonic() - start < 30


# ---- F8: the policy is wrong


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda a: a.index_fill(1, torch.tensor([2]), torch.nan),
            "found nan at row 0, step 2, entry 0",
        ),
        (lambda a: a / 0, "finite actions"),
        (lambda a: a[:, :3], r"\[3, 4, 2\], found \[3, 3, 2\]"),
        (lambda a: a[:1], r"\[3, 4, 2\], found \[1, 4, 2\]"),
        (lambda a: a[..., :1], r"\[3, 4, 2\], found \[3, 4, 1\]"),
        (lambda a: a.double(), "float32 on cpu, found torch.float64"),
        (lambda a: a.to("meta"), "float32 on cpu, found torch.float32 on meta"),
        (lambda a: a.numpy(), "tensor of actions, found ndarray"),
    ],
)
def test_what_a_policy_must_not_return_is_refused_before_the_environment_sees_it(spoil: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        run(policy=Broken(spoil))


def test_rows_of_finished_episodes_may_hold_anything(undisturbed: list[Any]) -> None:
    class SpoilsFinishedRows(StubPolicy):
        def predict(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
            finished = observation["state"][:, -1, 2] >= 11 + torch.tensor([1, 2, 0])  # 100000 mod 3 = 1
            self.padding = int(finished.sum())
            return super().predict(observation, generators).masked_fill(finished[:, None, None], torch.nan)

    policy = SpoilsFinishedRows()
    assert numbers(run(SEEDS[:3], policy=policy)) == undisturbed[:3]
    assert policy.padding == 2  # at the last prediction


# ---- pictures


def test_pictures_come_from_the_executed_actions_and_are_small() -> None:
    episodes = run([0, 1])
    shown = replay(episodes, "stub", task_options={"picture": 600}, make=make)
    assert [frames.pictures.shape for frames in shown] == [(12, 192, 192, 3), (13, 192, 192, 3)]
    assert shown[0].pictures[:, 0, 0, 0].tolist() == [20 * step for step in range(12)]
    assert shown[0].steps == tuple(range(12)) and shown[0].hz == 20


def test_a_long_episode_is_drawn_at_a_lower_rate_up_to_its_end() -> None:
    episodes = run([0, 1], task_options={"length": 400})
    shown = replay(episodes, "stub", task_options={"length": 400}, make=make)
    assert [frames.hz for frames in shown] == [pytest.approx(20 / 3)] * 2
    assert shown[0].steps[:3] == (0, 3, 6) and shown[0].steps[-2:] == (399, 400)
    assert len(shown[1].pictures) == len(shown[1].steps) == 135


@pytest.mark.parametrize(("fault", "message"), [("raises", "ImportError: there is no OpenGL"), ("dies", "by SIGSEGV")])
def test_what_cannot_be_drawn_is_said(fault: str, message: str) -> None:
    with pytest.raises(RolloutError, match=f"stub can't be drawn: .*{message}"):
        replay(run([0]), "stub", task_options={"draws_badly": fault}, make=make)


def test_a_picture_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(RolloutError, match="gave no answer in 1 s"):
        replay(run([0]), "stub", task_options={"hangs": (0,)}, timeout_s=1, make=make)
