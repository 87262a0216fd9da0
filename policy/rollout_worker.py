"""Environments that execute whole slices of actions, in the caller's process or in one of their own.

parent, with the policy                     worker: environments and numpy, never torch
start   row, seed, chunks so far     ->     reset, replay the chunks
execute row, actions [Ta, A]         ->     Ta control steps, fewer at the end of the episode
                                     <-     Report: the last To observations, the score so far

An episode also ends as soon as all its phases are completed with score 1: its score is the best so far, so nothing
more can be gained, and robosuite's tasks would go on for hundreds of steps. Cameras draw only what the policy sees.
"""

import contextlib
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

import gymnasium
import numpy as np

SCRIPT: Final = "import sys; from policy.rollout_worker import serve; serve(int(sys.argv[1]))"
FRAME_SIDE: Final = 192  # largest side of a frame that is sent back, in pixels

MakeEnvironment = Callable[..., gymnasium.Env]


class Setup(NamedTuple):
    """What a worker is told first: `make(task, **task_options)` makes an environment."""

    make: MakeEnvironment
    task: str
    task_options: Mapping[str, Any]
    obs_steps: int


class Report(NamedTuple):
    """Where an episode stands after a command.

    Attributes:
        observations: the last To of each key, `[To, ...]`; at reset the first one repeated; None if there is none yet.
            Where an episode ends before its slice does, nobody acts on them, and images may be black.
        action_shape: of one action, such as `(7,)`.
        num_phases: what `phases` counts up to.
        done: terminated, cut at the task's length, solved with score 1, or failed.
        steps: control steps so far.
        score: the episode's score so far, in [0, 1]; 0 if it failed.
        success: whether all phases are completed.
        phases: how many are completed.
        diverged: whether the physics ran away.
        clipped: entries of executed actions that lay outside the action's box.
        failure: traceback of what the environment raised.
    """

    observations: dict[str, np.ndarray] | None
    action_shape: tuple[int, ...]
    num_phases: int
    done: bool
    steps: int
    score: float
    success: bool
    phases: int
    diverged: bool
    clipped: int
    failure: str | None


class Frames(NamedTuple):
    """An episode to look at."""

    pictures: np.ndarray  # uint8 [n, H, W, 3]
    steps: tuple[int, ...]  # [n], after how many control steps each was taken; the last is the episode's end
    hz: float  # pictures per second of the robot's time


class CannotMake(Exception):
    """An environment that cannot even be made, or drawn, so that no episode can say anything."""


class Host:
    """Environments of some rows, one each, made when a row first starts.

    Args:
        setup: what environments to make.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._environments: dict[int, gymnasium.Env] = {}
        self._episodes: dict[int, _RunningEpisode] = {}

    def start(self, row: int, seed: int, chunks: Sequence[np.ndarray] = ()) -> Report:
        """Begin an episode, and execute again what it had executed before its worker was lost.

        Args:
            row: whose environment to use.
            seed: of the initial state.
            chunks: actions `[Ta, A]` each, in order.

        Raises:
            CannotMake: there is no such environment here, or nothing to draw its images with.
        """
        if row not in self._environments:
            self._environments[row] = self._make()
        self._episodes[row] = _RunningEpisode(self._environments[row], self._setup.obs_steps)
        self._guarded(row, self._episodes[row].reset, seed)
        for chunk in chunks:
            self.execute(row, chunk)
        return self._episodes[row].report()

    def execute(self, row: int, actions: np.ndarray) -> Report:
        """Take control steps until the actions or the episode end.

        Args:
            row: a started one.
            actions: finite, `[Ta, A]`; clipped to the environment's box.
        """
        self._guarded(row, self._episodes[row].execute, actions)
        return self._episodes[row].report()

    def frames(self, seed: int, actions: np.ndarray, every: int) -> Frames:
        """Show an episode by executing its actions again in an environment made for that.

        Args:
            seed: of the initial state.
            actions: all that the episode executed, `[steps, A]`.
            every: steps between two pictures.

        Raises:
            CannotMake: it can't be drawn.

        Returns:
            Pictures of the initial state and of what follows, the larger side at most `FRAME_SIDE`.
        """
        environment = self._make(render_mode="rgb_array")
        try:
            episode = _RunningEpisode(environment, obs_steps=0)
            episode.reset(seed)
            steps, pictures = [0], [_picture(environment)]
            for start in range(0, len(actions), every):
                episode.execute(actions[start : start + every])
                steps.append(min(start + every, len(actions)))
                pictures.append(_picture(environment))
            hz = float(environment.get_wrapper_attr("CONTROL_HZ")) / every
            return Frames(np.stack(pictures), tuple(steps), hz)
        except Exception as error:
            raise CannotMake(f"{type(error).__name__}: {error}") from error
        finally:
            environment.close()

    def close(self) -> None:
        """Close all environments."""
        for environment in self._environments.values():
            with contextlib.suppress(Exception):  # an environment that failed may not close either
                environment.close()
        self._environments.clear()

    def _make(self, **more: Any) -> gymnasium.Env:
        try:
            return self._setup.make(self._setup.task, **{**self._setup.task_options, **more})
        except Exception as error:
            raise CannotMake(f"{type(error).__name__}: {error}") from error

    def _guarded(self, row: int, act: Callable[[Any], None], argument: Any) -> None:
        """Do something; what the environment raises ends the episode, and the row's next one gets a new environment.

        Raises:
            CannotMake: something is not installed, such as OpenGL, which no other episode can do without.
        """
        try:
            act(argument)
        except ImportError as error:
            raise CannotMake(f"{type(error).__name__}: {error}") from error
        except Exception:
            self._episodes[row].fail(traceback.format_exc())
            with contextlib.suppress(Exception):
                self._environments.pop(row).close()


class _RunningEpisode:
    def __init__(self, environment: gymnasium.Env, obs_steps: int) -> None:
        if not isinstance(environment.action_space, gymnasium.spaces.Box):
            raise TypeError(f"action_space: expected a Box, found {environment.action_space}")
        self.environment, self._box = environment, environment.action_space
        self._observations: deque[dict[str, np.ndarray]] = deque(maxlen=obs_steps)
        self._obs_steps = obs_steps
        self._score, self._success, self._phases, self._diverged = 0.0, False, 0, False
        self._done, self._steps, self._clipped = False, 0, 0
        self._failure: str | None = None

    def reset(self, seed: int) -> None:
        self._draw(True)
        observation, info = self.environment.reset(seed=seed)
        self._observations.extend([observation] * self._obs_steps)
        self._note(info)

    def execute(self, actions: np.ndarray) -> None:
        for step, action in enumerate(actions):  # [A]
            if self._done:
                return
            self._draw(step >= len(actions) - self._obs_steps)
            allowed = np.clip(action, self._box.low, self._box.high)
            self._clipped += int(np.count_nonzero(allowed != action))
            observation, _, terminated, truncated, info = self.environment.step(allowed)
            self._observations.append(observation)
            self._steps += 1
            self._note(info)
            self._done = bool(terminated or truncated) or (self._success and self._score >= 1.0)

    def _draw(self, seen: bool) -> None:
        task: Any = self.environment.unwrapped
        task.draws_images = seen

    def fail(self, text: str) -> None:
        self._score, self._success, self._phases = 0.0, False, 0
        self._done, self._failure = True, text

    def _note(self, info: Mapping[str, Any]) -> None:
        self._score, self._success = float(info["score"]), bool(info["success"])
        self._phases, self._diverged = int(info["phases"]), bool(info["diverged"])

    def report(self) -> Report:
        seen = list(self._observations)
        return Report(
            observations={key: np.stack([each[key] for each in seen]) for key in seen[0]} if seen else None,
            action_shape=self._box.shape,
            num_phases=len(self.environment.get_wrapper_attr("PHASES")),
            done=self._done,
            steps=self._steps,
            score=self._score,
            success=self._success,
            phases=self._phases,
            diverged=self._diverged,
            clipped=self._clipped,
            failure=self._failure,
        )


def serve(descriptor: int) -> None:
    """Obey commands from a connection until it is closed: what a worker process runs.

    Args:
        descriptor: the inherited end of a connection. The first message is a `Setup`, every further one the name of a
            method of `Host` with its arguments; the answer is what it returns, or a `CannotMake`.
    """
    connection = Connection(descriptor)
    host = Host(connection.recv())
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:  # the parent is gone, or needs nothing more
            return
        try:
            answer = getattr(host, name)(*arguments)
        except CannotMake as error:
            answer = error
        connection.send(answer)


def _picture(environment: gymnasium.Env) -> np.ndarray:
    """What the environment shows, uint8 `[H, W, 3]`, made small enough for a video of several episodes."""
    from PIL import Image

    image = Image.fromarray(np.asarray(environment.render(), dtype=np.uint8))
    image.thumbnail((FRAME_SIDE, FRAME_SIDE))
    return np.asarray(image)
