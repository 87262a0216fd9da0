"""Episodes of a scripted expert, each a function of its seed alone, in a process without torch.

parent                              worker: environments, experts and numpy
line 1: Settings as JSON      ->
                              <-    the task's facts, or {"error": one sentence}
line n: seed                  ->    plays the episode and writes it into the folder
                              <-    its Record
"""

import io
import json
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import gymnasium
import numpy as np

import envs
from envs.experts import make_expert
from envs.task import PhysicsError, Task

PACKAGES: Final = {  # whose versions are noted, where they are used, by the name of their module
    "mujoco": "mujoco",
    "gymnasium": "gymnasium",
    "numpy": "numpy",
    "robosuite": "robosuite",
    "gymnasium_robotics": "gymnasium-robotics",
}
TEMPORARY_PREFIX: Final = ".tmp-"
FAILURE_LENGTH: Final = 400  # characters kept of what an environment raised

Episode = dict[str, np.ndarray]


class Settings(NamedTuple):
    """What decides, with its seed, what an episode holds.

    Attributes:
        task: name in `envs.TASKS`.
        observation: "state" or "image".
        action: kind of action, where the task has several; None for its own.
        action_noise: standard deviation of what is added to executed actions, in their unit.
        phases: how many phases an episode has to complete; None for all that the expert aims at.
        success_only: whether an episode that does not complete them is a failure.
    """

    task: str
    observation: Literal["state", "image"] = "state"
    action: str | None = None
    action_noise: float = 0.0
    phases: int | None = None
    success_only: bool = True


class Record(NamedTuple):
    """How an episode went; `failure` says why it is not kept, "" for one that is."""

    seed: int
    failure: str
    success: bool
    score: float
    phases: int
    steps: int


class CannotCollect(Exception):
    """A task that cannot be played here, or has no expert."""


class Recorder:
    """Plays episodes of a task's expert.

    Args:
        settings: what decides what they hold.

    Raises:
        CannotCollect: the task can't be made or drawn, or knows no such expert or phases.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        options: dict[str, Any] = {"on_divergence": "raise"}
        if settings.action is not None:
            options["action"] = settings.action
        try:
            self._env = envs.make(settings.task, observation=settings.observation, **options)
            self._env.reset(seed=0)  # draws the first images
            make_expert(settings.task, self._env, _random(0, "expert"))
        except Exception as error:  # whatever a simulator raises that can't begin
            raise CannotCollect(f"task {settings.task}: {error}") from error
        self._task, self._box = _task(self._env), _box(self._env)
        if settings.phases is not None and settings.phases > len(self._task.PHASES):
            raise CannotCollect(
                f"phases: {settings.task} has {len(self._task.PHASES)}, so expected at most that, "
                f"found {settings.phases}"
            )

    def facts(self) -> dict[str, Any]:
        """What is known of every episode: the task, its action, the names of the state's entries, versions."""
        task = self._task
        names = "STATE_NAMES" if self._settings.observation == "state" else "PROPRIOCEPTION_NAMES"
        return {
            "environment": envs.TASKS[self._settings.task],
            "action": getattr(task, "action_kind", "absolute"),
            "action_low": self._box.low.tolist(),
            "action_high": self._box.high.tolist(),
            "state_names": list(getattr(task, names, ())),
            "control_hz": task.CONTROL_HZ,
            "versions": {name: metadata.version(name) for module, name in PACKAGES.items() if module in sys.modules},
        }

    def play(self, seed: int) -> tuple[Record, Episode]:
        """Play an episode.

        Args:
            seed: of the initial state, of the expert and of the noise.

        Returns:
            How it went, and its arrays by key, `[T, ...]` each; no arrays if it is a failure.
        """
        rows: list[Episode] = []
        try:
            info, wanted = self._play(seed, rows)
        except PhysicsError as error:
            return _failed(seed, f"the physics diverged: {error}", len(rows))
        except Exception as error:  # of the simulator or the expert: other seeds may do well
            return _failed(seed, f"{type(error).__name__}: {error}", len(rows))
        done = int(info["phases"])
        if not rows:
            return _failed(seed, "the task is done before the first action", 0)
        if self._settings.success_only and done < wanted:
            return _failed(seed, f"{done} of {wanted} phases after {len(rows)} steps", len(rows))
        record = Record(seed, "", done >= wanted, float(info["score"]), done, len(rows))
        return record, {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def _play(self, seed: int, rows: list[Episode]) -> tuple[Mapping[str, Any], int]:
        observation, info = self._env.reset(seed=seed)
        expert = make_expert(self._settings.task, self._env, _random(seed, "expert"))
        wanted = self._settings.phases
        if wanted is None:
            wanted = int(getattr(expert, "PHASES_AIMED_AT", len(self._task.PHASES)))
        noise = _random(seed, "noise")
        over = False
        while not over and info["phases"] < wanted:
            action = np.asarray(expert.action(), np.float32)
            rows.append({**observation, "action": action})
            observation, _, terminated, truncated, info = self._env.step(self._with_noise(action, noise))
            over = terminated or truncated
        if rows and getattr(expert, "RECORDS_LAST_OBSERVATION", False):
            rows.append({**observation, "action": np.asarray(expert.action(), np.float32)})
        return info, wanted

    def _with_noise(self, action: np.ndarray, noise: np.random.Generator) -> np.ndarray:
        """What is executed; the clean action is what is stored."""
        if not self._settings.action_noise:
            return action
        noisy = action + noise.normal(0.0, self._settings.action_noise, action.shape)
        return np.clip(noisy, self._box.low, self._box.high)


def episode_file(folder: Path, seed: int) -> Path:
    """Where the arrays of a seed's episode are written, if it is kept."""
    return folder / f"seed_{seed:08d}.npz"


def record_file(folder: Path, seed: int) -> Path:
    """Where how a seed's episode went is written, after its arrays."""
    return folder / f"seed_{seed:08d}.json"


def serve() -> None:
    """Play the seeds that come on standard input: what a worker process runs."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # simulators print
    folder, settings = json.loads(sys.stdin.readline())
    try:
        recorder = Recorder(Settings(**settings))
    except CannotCollect as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    print(json.dumps(recorder.facts()), file=answers, flush=True)
    for line in sys.stdin:  # it ends when the parent does
        record, episode = recorder.play(int(line))
        _write(Path(folder), record, episode)
        print(json.dumps(record._asdict()), file=answers, flush=True)
    recorder.close()


def _write(folder: Path, record: Record, episode: Episode) -> None:
    if not record.failure:
        content = io.BytesIO()
        np.savez(content, **episode)  # type: ignore[arg-type] # its stub takes the arrays for allow_pickle
        _replace(episode_file(folder, record.seed), content.getvalue())
    _replace(record_file(folder, record.seed), json.dumps(record._asdict()).encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _failed(seed: int, failure: str, steps: int) -> tuple[Record, Episode]:
    return Record(seed, failure[:FAILURE_LENGTH], False, 0.0, 0, steps), {}


def _random(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


def _task(env: gymnasium.Env) -> Task:
    task = env.unwrapped
    if not isinstance(task, Task):
        raise CannotCollect(f"expected an environment with an envs.task.Task, found {task}")
    return task


def _box(env: gymnasium.Env) -> gymnasium.spaces.Box:
    box = env.action_space
    if not isinstance(box, gymnasium.spaces.Box):
        raise CannotCollect(f"expected an environment whose actions are a Box, found {box}")
    return box


if __name__ == "__main__":
    serve()
