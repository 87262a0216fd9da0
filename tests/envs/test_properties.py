"""Ten properties that every task of the registry has, whatever it is about."""

import hashlib
import io
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from envs.offscreen import backend
from envs.task import Observation, Outcome, PhysicsError, Task

ROOT = Path(__file__).resolve().parents[2]
SEED = 100_000
STEPS = 200
FEW = 20
SLOW = {"lift", "tool_hang"}  # a reset of Lift and a step of ToolHang take longest; Can stands for them in `make test`
SLOWLY = (pytest.mark.slow, pytest.mark.timeout(900))
SIMULATED = {"can", "kitchen", *SLOW}  # tens of milliseconds a step or a picture
# Advice of gymnasium's checker that a task in metres, radians or pixels does not take.
ADVICE = (
    ".*we recommend using a symmetric and normalized space.*",
    ".*space (minimum|maximum) value is -?infinity.*",
)


def rows(names: Iterable[str], slow: set[str]) -> list[Any]:
    return [pytest.param(name, marks=SLOWLY) if name in slow else name for name in names]


every_task = pytest.mark.parametrize("name", rows(envs.TASKS, SLOW))
every_task_drawn = pytest.mark.parametrize("name", rows(envs.TASKS, SIMULATED))


class Built:
    """Tasks that are built once and used by all tests: two of a kind, so that one can be compared with the other."""

    def __init__(self) -> None:
        self._built: dict[tuple[str, str, int], gymnasium.Env[Any, Any]] = {}

    def env(self, name: str, observation: Observation = "state", instance: int = 0) -> gymnasium.Env:
        key = (name, observation, instance)
        if key not in self._built:
            try:
                self._built[key] = envs.make(name, observation=observation, render_mode="rgb_array")
            except ModuleNotFoundError as error:
                if error.name not in envs.SIMULATORS:
                    raise
                pytest.skip(str(error))
        return self._built[key]

    def task(self, name: str, observation: Observation = "state", instance: int = 0) -> Task:
        task = self.env(name, observation, instance).unwrapped
        assert isinstance(task, Task)
        return task

    def close(self) -> None:
        for env in self._built.values():
            env.close()


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    every = Built()
    yield every
    every.close()


@pytest.fixture
def drawing() -> str:
    try:
        return backend()
    except ImportError as error:
        pytest.skip(str(error))


def actions(task: Task, number: int, seed: int = 0) -> np.ndarray:
    task.action_space.seed(seed)
    return np.array([task.action_space.sample() for _ in range(number)])


def run(task: Task, every_action: np.ndarray, seed: int) -> list[Any]:
    """Everything a task returns under some actions; a new episode begins, with the next seed, where one ends."""
    seen: list[Any] = [task.reset(seed=seed)]
    for action in every_action:
        seen.append(task.step(action))
        if seen[-1][2]:
            seed += 1
            seen.append(task.reset(seed=seed))
    return seen


def go_on(task: Task, every_action: np.ndarray) -> list[Any]:
    """Everything a task returns from its present state on, also after the episode's end."""
    return [task.step(action) for action in every_action]


def fingerprint(seen: object) -> str:
    """Equal for equal numbers, bit for bit, in whatever dicts and tuples they lie."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, dict):
            for key in value:
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            for entry in value:
                add(entry)
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        else:
            digest.update(repr(value).encode())

    add(seen)
    return digest.hexdigest()


# ---- 1


@every_task
def test_gymnasium_finds_nothing_wrong(built: Built, name: str) -> None:
    task = built.task(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for advice in ADVICE:
            warnings.filterwarnings("ignore", message=advice)
        check_env(task, skip_render_check=True, skip_close_check=True)


@every_task
def test_the_registry_says_what_the_class_says(built: Built, name: str) -> None:
    env, task = built.env(name), built.task(name)
    assert env.spec is not None
    assert env.spec.id == envs.TASKS[name]
    assert env.spec.max_episode_steps == task.MAX_STEPS
    assert task.metadata == {"render_modes": ["rgb_array"], "render_fps": task.CONTROL_HZ}
    assert len(task.PHASES) == len(set(task.PHASES)) > 0


# ---- 2


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, STEPS) for name in envs.TASKS if name not in SIMULATED]
    + [("can", FEW), ("kitchen", FEW)]
    + [pytest.param(name, STEPS, marks=SLOWLY) for name in sorted(SIMULATED)],
)
def test_the_same_seed_and_actions_give_the_same_episodes(built: Built, name: str, steps: int) -> None:
    first, second = built.task(name), built.task(name, instance=1)
    every_action = actions(first, steps)
    seen = fingerprint(run(first, every_action, SEED))
    assert fingerprint(run(first, every_action, SEED)) == seen
    assert fingerprint(run(second, every_action, SEED)) == seen
    assert fingerprint(run(second, every_action, SEED + 1)) != seen


EPISODES_IN_ANOTHER_PROCESS = """
import sys
sys.path[:0] = [{folder!r}, {root!r}]
import envs, test_properties as properties
for name in {names!r}:
    task = envs.make(name).unwrapped
    print(properties.fingerprint(properties.run(task, properties.actions(task, {steps}), properties.SEED)))
"""


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["arm_reach", "push_t", "block_push"], STEPS),
        pytest.param(sorted(SIMULATED), FEW, marks=SLOWLY),
    ],
)
def test_another_process_sees_the_same_episodes(built: Built, names: list[str], steps: int) -> None:
    here = [fingerprint(run(task, actions(task, steps), SEED)) for task in map(built.task, names)]
    script = EPISODES_IN_ANOTHER_PROCESS.format(
        folder=str(Path(__file__).parent), root=str(ROOT), names=names, steps=steps
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, encoding="utf-8")
    assert there.returncode == 0, there.stderr
    assert there.stdout.split()[-len(names) :] == here


# ---- 3


@every_task
def test_the_initial_state_is_a_function_of_the_seed_alone(built: Built, name: str) -> None:
    first, second = built.task(name), built.task(name, instance=1)
    observation, info = first.reset(seed=SEED)
    state = fingerprint([observation, info, first.get_state()])
    second.reset(seed=7)
    go_on(second, actions(second, 10))
    observation, info = second.reset(seed=SEED)
    assert fingerprint([observation, info, second.get_state()]) == state
    assert info["seed"] == SEED


@every_task
def test_a_reset_without_seed_draws_one_and_says_it(built: Built, name: str) -> None:
    task = built.task(name)
    task.reset(seed=3)
    observation, info = task.reset()
    drawn = fingerprint([observation, info])
    task.reset(seed=3)
    assert fingerprint(task.reset()) == drawn, "np_random, seeded by 3, says the next seed"
    assert fingerprint(task.reset(seed=info["seed"])) == drawn
    assert fingerprint(task.reset()) != drawn


# ---- 4


@every_task
def test_a_state_restores_everything(built: Built, name: str) -> None:
    first, second = built.task(name), built.task(name, instance=1)
    every_action = actions(first, 25)
    first.reset(seed=SEED)
    go_on(first, every_action[:5])
    file = io.BytesIO()
    np.savez(file, **first.get_state())
    expected = fingerprint([go_on(first, every_action[5:]), first.get_state()])

    file.seek(0)
    state = dict(np.load(file, allow_pickle=False))
    first.set_state(state)
    assert fingerprint([go_on(first, every_action[5:]), first.get_state()]) == expected
    second.reset(seed=8)
    second.set_state(state)
    assert fingerprint([go_on(second, every_action[5:]), second.get_state()]) == expected


@every_task
def test_a_state_is_a_copy(built: Built, name: str) -> None:
    task = built.task(name)
    task.reset(seed=SEED)
    state = task.get_state()
    before = fingerprint(state)
    go_on(task, actions(task, 2))
    assert fingerprint(state) == before
    task.set_state(state)
    go_on(task, actions(task, 2))
    assert fingerprint(state) == before


# ---- 5


@every_task
def test_bad_actions_are_refused_before_any_physics(built: Built, name: str) -> None:
    task = built.task(name)
    task.reset(seed=SEED)
    before = fingerprint(task.get_state())
    good = actions(task, 1)[0]
    assert isinstance(task.action_space, gymnasium.spaces.Box)
    last = len(good) - 1
    for shape in [(), (last,), (last + 2,), (1, last + 1)]:
        with pytest.raises(ValueError, match=r"expected shape .* got"):
            task.step(np.zeros(shape, np.float32))
    for index in (0, last):
        low, high = task.action_space.low[index], task.action_space.high[index]
        for value in (np.nan, np.inf, -np.inf, 1e30, low - 0.01 * (high - low), high + 0.01 * (high - low)):
            bad = good.astype(np.float64)
            bad[index] = value
            with pytest.raises(ValueError, match=rf"action\[{index}\]"):
                task.step(bad)
    assert fingerprint(task.get_state()) == before


# ---- 6

BROKEN = [("qvel", 1e20), ("qpos", np.nan), ("qpos", 1e20), ("qvel", np.inf)]


def broken(task: Task, field: str, value: float) -> dict[str, np.ndarray]:
    state = task.get_state()
    assert state[field].size
    state[field] = np.full_like(state[field], value)
    return state


@every_task
@pytest.mark.parametrize(("field", "value"), BROKEN)
def test_a_simulation_that_diverges_ends_the_episode_with_score_0(
    built: Built, name: str, field: str, value: float
) -> None:
    task = built.task(name)
    task.reset(seed=SEED)
    task.step(actions(task, 1)[0])
    task.set_state(broken(task, field, value))
    observation, reward, terminated, truncated, info = task.step(actions(task, 1)[0])
    assert (terminated, truncated, reward) == (True, False, 0.0)
    assert (info["diverged"], info["score"], info["success"]) == (True, 0.0, False)
    assert task.observation_space.contains(observation)
    observation, info = task.reset(seed=SEED)
    assert not info["diverged"]
    assert not task.step(actions(task, 1)[0])[4]["diverged"]


@every_task
@pytest.mark.parametrize(("field", "value"), BROKEN)
def test_a_simulation_that_diverges_is_an_error_where_asked(
    built: Built, name: str, field: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = built.task(name)
    monkeypatch.setattr(task, "on_divergence", "raise")
    task.reset(seed=SEED)
    task.set_state(broken(task, field, value))
    with pytest.raises(PhysicsError, match=r"\w"):
        task.step(actions(task, 1)[0])


# ---- 7


@every_task
def test_info_keeps_its_contract(built: Built, name: str) -> None:
    task = built.task(name)
    task.reset(seed=1)
    score = phases = 0.0
    for returned in run(task, actions(task, FEW, seed=1), seed=1):
        info = returned[-1]
        if len(returned) == 2:  # a reset
            score = phases = 0.0
        assert {key: type(info[key]) for key in ("score", "phases", "success", "diverged", "seed")} == {
            "score": float,
            "phases": int,
            "success": bool,
            "diverged": bool,
            "seed": int,
        }
        assert 0.0 <= info["score"] <= 1.0
        assert 0 <= info["phases"] <= len(task.PHASES)
        assert info["success"] == (info["phases"] == len(task.PHASES))
        assert info["score"] >= score and info["phases"] >= phases
        score, phases = info["score"], info["phases"]
        if len(returned) == 5:
            assert [type(entry) for entry in returned[1:4]] == [float, bool, bool]
            assert np.isfinite(returned[1])


# ---- 8


def check_observations(task: Task) -> None:
    assert isinstance(task.observation_space, gymnasium.spaces.Dict)
    kept, copies = [], []
    for returned in run(task, actions(task, 5), SEED):
        observation = returned[0]
        assert task.observation_space.contains(observation)
        for key, value in observation.items():
            assert value.dtype == task.observation_space[key].dtype
            assert np.isfinite(value).all()
        kept.append(observation)
        copies.append({key: value.copy() for key, value in observation.items()})
    assert fingerprint(kept) == fingerprint(copies), "an observation has changed after it was returned"

    state = task.get_state()
    expected = fingerprint(go_on(task, actions(task, 2)))
    task.set_state(state)
    for value in kept[-1].values():
        value[...] = 77
    assert fingerprint(go_on(task, actions(task, 2))) == expected, "writing to an observation changes the task"


@every_task
def test_observations_are_finite_copies_within_their_space(built: Built, name: str) -> None:
    task = built.task(name)
    assert {key: space.dtype for key, space in task.observation_space.items()} == {"state": np.float32}
    check_observations(task)


@every_task_drawn
def test_images_are_finite_copies_within_their_space(built: Built, name: str, drawing: str) -> None:
    task = built.task(name, "image")
    cameras = {key: space for key, space in task.observation_space.items() if key != "state"}
    assert cameras
    for space in cameras.values():
        assert (space.dtype, len(space.shape or ()), (space.shape or ())[-1]) == (np.uint8, 3, 3)
    check_observations(task)
    observation, _ = task.reset(seed=SEED)
    for key in cameras:
        assert observation[key].std() > 1, f"{key} shows nothing"


@every_task_drawn
def test_images_that_nobody_looks_at_are_black_and_all_else_is_the_same(built: Built, name: str, drawing: str) -> None:
    task = built.task(name, "image")
    every_action = actions(task, 3)
    seen = run(task, every_action, SEED)
    task.draws_images = False
    try:
        unseen = run(task, every_action, SEED)
    finally:
        task.draws_images = True
    for (drawn, *rest), (black, *others) in zip(seen, unseen, strict=True):
        assert task.observation_space.contains(black)
        assert fingerprint([drawn["state"], rest]) == fingerprint([black["state"], others])
        for key in set(drawn) - {"state"}:
            assert drawn[key].any() and not black[key].any()


# ---- 9


@every_task
def test_an_episode_is_cut_at_the_step_limit(built: Built, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env, task = built.env(name), built.task(name)
    monkeypatch.setattr(task, "_control", lambda action: None)  # nothing moves, and nothing ends the episode
    monkeypatch.setattr(task, "_outcome", lambda: Outcome(0.0, 0.0, 0, False))
    action = actions(task, 1)[0]
    env.reset(seed=SEED)
    for step in range(1, task.MAX_STEPS + 1):
        _, _, terminated, truncated, _ = env.step(action)
        assert (terminated, truncated) == (False, step == task.MAX_STEPS)
    assert task.steps == task.MAX_STEPS


def indices(cell: str) -> list[int]:
    """What a cell of a datasheet's index column names: `3`, `3 4`, `3, 4`, `3 to 5` or `3-5`."""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?:\s*(?:to|-|–|\.\.)\s*(\d+))?", cell):
        found += range(int(first), int(last or first) + 1)
    return found


def tables(text: str) -> list[list[int]]:
    """The indices of every Markdown table with a column `index`; one for each value of a column to its left."""
    found: list[dict[str, list[int]]] = []
    column = None
    left = ""
    for line in text.splitlines():
        line = line.strip()
        if not line.startswith("|"):
            column = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "index" in cells:
            column, left = cells.index("index"), ""
            found.append({})
        elif column is not None and not set(line) <= set("|-: "):
            left = " ".join(cells[:column]).strip() or left
            found[-1].setdefault(left, []).extend(indices(cells[column]))
    return [sorted(group) for table in found for group in table.values() if group]


def test_tables_are_read_in_every_form() -> None:
    text = """
    | index | what |
    |---|---|
    | 0 | x |
    | 1 to 3 | y |

    | action | index |
    |---|---|
    | delta | 0 1 |
    | | 2 |
    | absolute | 0-1 |
    """
    assert tables(text) == [[0, 1, 2, 3], [0, 1, 2], [0, 1]]


@every_task
def test_the_datasheet_names_every_entry_of_action_and_observation(built: Built, name: str) -> None:
    task = built.task(name)
    text = "\n".join(vars(kind).get("__doc__") or "" for kind in type(task).__mro__ if issubclass(kind, Task))
    described = tables(text)
    assert all(table == list(range(len(table))) for table in described), described
    state = task.observation_space["state"].shape[0]  # type: ignore[index]
    lengths = [len(table) for table in described]
    assert task.action_space.shape is not None
    for wanted in (task.action_space.shape[0], state):
        assert wanted in lengths, f"{type(task).__name__} has no table of {wanted} rows, only {lengths}"
        lengths.remove(wanted)


# ---- 10


@every_task_drawn
def test_drawing_changes_no_number(built: Built, name: str, drawing: str) -> None:
    first, second = built.task(name), built.task(name, instance=1)
    every_action = actions(first, 4)
    first.reset(seed=SEED)
    second.reset(seed=SEED)
    pictures = []
    for action in every_action:
        pictures.append(first.render())
        assert fingerprint(first.step(action)) == fingerprint(second.step(action))
    assert fingerprint(first.get_state()) == fingerprint(second.get_state())
    assert {(picture.dtype, picture.ndim, picture.shape[-1]) for picture in pictures} == {(np.dtype(np.uint8), 3, 3)}
    assert pictures[0].std() > 1, "the picture shows nothing"


@every_task
def test_nothing_is_written_to_the_current_directory(
    built: Built, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = built.task(name)
    monkeypatch.chdir(tmp_path)
    task.reset(seed=SEED)
    task.set_state(broken(task, "qvel", 1e20))
    task.step(actions(task, 1)[0])
    task.reset(seed=SEED)
    task.step(actions(task, 1)[0])
    assert list(tmp_path.iterdir()) == []
