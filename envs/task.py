"""What every task has in common: spaces, actions that are checked, an episode's score, its state, its divergence."""

from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import gymnasium
import numpy as np
from gymnasium import spaces

Observation = Literal["state", "image"]
OnDivergence = Literal["terminate", "raise"]
# Rounding of an action on its way through float32, as a part of the largest bound.
ROUNDING = 1e-6


class PhysicsError(RuntimeError):
    """The simulation has diverged: what follows has nothing to do with the task."""


class Outcome(NamedTuple):
    """What one control step has led to."""

    reward: float
    score: float  # in [0, 1]; the episode's score is the largest so far
    phases: int  # phases completed; the episode's number is the largest so far
    terminated: bool


class Task(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """Base of every task: a task fills in the hooks `_reset`, `_control`, `_observe`, `_outcome`, `_render`.

    A class names CONTROL_HZ, MAX_STEPS and PHASES, and its constructor sets `observation_space` (always a Dict) and
    `action_space` (a Box of float32, in the task's own units).

    Every reset and step returns an info with `score` (float in [0, 1], of the episode so far), `phases` (int, done so
    far), `success` (bool, all phases done), `diverged` (bool) and `seed` (int, of the initial state).

    While `draws_images` is False, cameras show black: for steps whose observation nobody looks at.

    Args:
        observation: "state" for the whole state as numbers, "image" for cameras and the robot's own part of the state.
        render_mode: "rgb_array" for pictures of render().
        on_divergence: what a simulation that diverges does: "terminate" ends the episode with score 0 and no
            phase done, for evaluation; "raise" raises PhysicsError, for collecting data.
    """

    CONTROL_HZ: ClassVar[float]
    MAX_STEPS: ClassVar[int]
    PHASES: ClassVar[tuple[str, ...]]
    observation_space: spaces.Dict  # type: ignore[assignment] # of numpy arrays by their names
    action_space: spaces.Box

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if hasattr(cls, "CONTROL_HZ"):
            cls.metadata = {"render_modes": ["rgb_array"], "render_fps": cls.CONTROL_HZ}

    def __init__(
        self,
        *,
        observation: Observation = "state",
        render_mode: Literal["rgb_array"] | None = None,
        on_divergence: OnDivergence = "terminate",
    ) -> None:
        _require("observation", observation, get_args(Observation))
        _require("render_mode", render_mode, (None, "rgb_array"))
        _require("on_divergence", on_divergence, get_args(OnDivergence))
        self.observation = observation
        self.render_mode = render_mode
        self.on_divergence = on_divergence
        self.draws_images = True
        self.seed = 0  # of the present episode's initial state
        self.steps = 0  # control steps of the present episode
        self._score = 0.0
        self._phases = 0
        self._diverged = False
        self._last_observation: dict[str, np.ndarray] = {}

    # ---- what a task fills in

    @abstractmethod
    def _reset(self, seed: int) -> None:
        """Put the simulator into the initial state of a seed, which depends on nothing else."""

    @abstractmethod
    def _control(self, action: np.ndarray) -> None:
        """Simulate one control step under a checked action (float64); raise PhysicsError where it diverges."""

    @abstractmethod
    def _observe(self) -> dict[str, np.ndarray]:
        """The observation of the simulator's state, in arrays of its own."""

    @abstractmethod
    def _outcome(self) -> Outcome:
        """Reward and progress of the simulator's state."""

    @abstractmethod
    def _render(self) -> np.ndarray:
        """A picture [H, W, 3] uint8; changes no number of the simulation."""

    @abstractmethod
    def _get_state(self) -> dict[str, np.ndarray]:
        """All the simulation depends on; `qpos` and `qvel` are the simulator's positions and velocities."""

    @abstractmethod
    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        """Undo `_get_state`."""

    def _check_physics(self) -> None:  # noqa: B027 - most tasks inherit it
        """Raise PhysicsError if the simulator's state has diverged; asked before and after each control step."""

    def _details(self) -> dict[str, Any]:
        """The task's own entries of info."""
        return {}

    # ---- gymnasium's interface

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: says the whole initial state; without it, one is drawn from `np_random`.
            options: none are known.

        Raises:
            ValueError: an option was given.
            PhysicsError: the simulation diverges before it begins.

        Returns:
            Observation and info.
        """
        if options:
            raise ValueError(f"reset takes no options, got {sorted(options)}")
        super().reset(seed=seed)
        self.seed = int(self.np_random.integers(2**31)) if seed is None else int(seed)
        self.steps, self._score, self._phases, self._diverged = 0, 0.0, 0, False
        self._reset(self.seed)
        self._check_physics()
        self._keep(self._outcome())
        self._last_observation = self._observe()
        return self._last_observation, self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One control step of 1 / CONTROL_HZ seconds.

        Args:
            action: within `action_space`, in the task's units.

        Raises:
            ValueError: the action has a wrong shape, or an entry that is not finite or out of its bounds.
            PhysicsError: the simulation has diverged, and `on_divergence` is "raise".

        Returns:
            Observation, reward, terminated, truncated (always False: the registered step limit is a wrapper), info.
            Once the simulation has diverged, the observation is the last one before that.
        """
        action = check_action(action, self.action_space)
        try:
            self._check_physics()
            self._control(action)
            self._check_physics()
            observation, outcome = self._observe(), self._outcome()
            _require_finite(observation)
        except PhysicsError:
            if self.on_divergence == "raise":
                raise
            self._diverged, self._score, self._phases = True, 0.0, 0
            last = {key: value.copy() for key, value in self._last_observation.items()}
            return last, 0.0, True, False, self._info()
        self.steps += 1
        self._keep(outcome)
        self._last_observation = observation
        return observation, float(outcome.reward), bool(outcome.terminated), False, self._info()

    def render(self) -> np.ndarray:
        """A picture of the present state [H, W, 3] uint8, upright.

        Raises:
            ValueError: the task was not made with render_mode="rgb_array".
            ImportError: there is no OpenGL to draw with.
        """
        if self.render_mode is None:
            raise ValueError('render() needs a task made with render_mode="rgb_array"')
        return self._render()

    # ---- state

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything an episode's future depends on, in arrays of its own: `qpos` and `qvel` are the simulator's."""
        progress = np.array([self.seed, self.steps, self._score, self._phases, self._diverged], np.float64)
        return {**self._get_state(), "progress": progress}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from a state that get_state returned, of this or another instance made with the same options."""
        seed, steps, score, phases, diverged = (float(number) for number in state["progress"])
        self._set_state(state)
        self.seed, self.steps, self._score = int(seed), int(steps), score
        self._phases, self._diverged = int(phases), bool(diverged)

    # ---- parts of the above

    def _keep(self, outcome: Outcome) -> None:
        self._score = max(self._score, float(outcome.score))
        self._phases = max(self._phases, int(outcome.phases))

    def _info(self) -> dict[str, Any]:
        return {
            "score": self._score,
            "phases": self._phases,
            "success": self._phases == len(self.PHASES) and not self._diverged,
            "diverged": self._diverged,
            "seed": self.seed,
            **self._details(),
        }


def check_action(action: np.ndarray, space: spaces.Box) -> np.ndarray:
    """An action as float64, within its box.

    Args:
        action: numbers of the box's shape; past a bound by no more than rounding, which is taken back.
        space: of actions.

    Raises:
        ValueError: a wrong shape, or an entry that is not finite or out of its bounds, with its index.

    Returns:
        A new array of the box's shape.
    """
    checked = np.array(action, dtype=np.float64)
    if checked.shape != space.shape:
        raise ValueError(f"action: expected shape {space.shape}, got {checked.shape}")
    if np.isfinite(checked).all() and (checked >= space.low).all() and (checked <= space.high).all():
        return checked
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    wrong = ~(np.isfinite(checked) & (checked >= low - _slack(low)) & (checked <= high + _slack(high)))
    if wrong.any():
        index = int(np.argmax(wrong))
        raise ValueError(f"action[{index}] must be in [{low[index]:g}, {high[index]:g}], got {checked[index]:g}")
    return checked.clip(low, high)


def _slack(bound: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(bound), ROUNDING * np.maximum(1.0, np.abs(bound)), 0.0)


def _require(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _require_finite(observation: dict[str, np.ndarray]) -> None:
    for key, value in observation.items():
        if value.dtype != np.uint8 and not np.isfinite(value).all():
            index = int(np.argmax(~np.isfinite(value)))
            raise PhysicsError(f"observation {key}[{index}] is {value.flat[index]}")
