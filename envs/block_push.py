"""BlockPush: a rod pushes two cubes into two square zones, in either order and either way round."""

from typing import Any, ClassVar, Final, Literal, NamedTuple, get_args

import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.mujoco_task import MujocoTask
from envs.task import Outcome

Vector = NDArray[np.float64]
ActionKind = Literal["absolute", "delta"]
Pose = tuple[float, float, float]  # x and y in metres, yaw

CONTROL_DT_S: Final = 0.1
PHYSICS_STEPS: Final = 24  # of 1/240 s per action
SETTLING_STEPS: Final = 100
WORKSPACE_LOW_M: Final = np.array([0.15, -0.5])
WORKSPACE_HIGH_M: Final = np.array([0.70, 0.5])
LARGEST_DELTA_M: Final = 0.1
START_M: Final = np.array([0.3, -0.4])
BLOCK_HEIGHT_M: Final = 0.02  # of its centre
GOAL_TOLERANCE_M: Final = 0.05
ENTRY_REWARD: Final = 0.49  # a block is in a zone for the first time
END_REWARD: Final = 0.51  # the blocks are in different zones
PHASE_SCORES: Final = (0.4, 0.9)  # p1 and p2 are done above these
BLOCKS: Final = ("block", "block2")
REWARDS: Final = (ENTRY_REWARD, 2 * ENTRY_REWARD, END_REWARD)  # all that a step can give, but 0
CENTRE_X_M: Final = 0.4
TARGET_OFFSET_M: Final = 0.12
LEAST_BLOCK_DISTANCE_M: Final = 0.1  # along x, as the next
LEAST_TARGET_DISTANCE_M: Final = 0.12
IMAGE_SIZE: Final = 96


class InitialState(NamedTuple):
    """Where an episode begins."""

    blocks: tuple[Pose, Pose]
    targets: tuple[Pose, Pose]


class BlockPush(MujocoTask):
    """Push two cubes of 4 cm into two zones with a vertical rod, 10 actions per second, up to 350 of them.

    The multimodal block pushing of Behavior Transformers, with its geometry, resets, rewards and observation.

    Action, float32 [2], the position of the rod's target on the table; the rod goes 92 % of the way in 0.1 s:

    | action     | index | meaning                   | range        | unit | actuator   |
    |------------|-------|---------------------------|--------------|------|------------|
    | "absolute" | 0     | new target, x             | 0.15 to 0.70 | m    | effector_x |
    |            | 1     | new target, y             | -0.5 to 0.5  | m    | effector_y |
    | "delta"    | 0, 1  | change of the target x, y | -0.1 to 0.1  | m    | the same   |

    A delta that leaves the table's range stops at its edge.

    Observation "state", float32:

    | observation | index      | meaning                                  | unit   | XML name           |
    |-------------|------------|------------------------------------------|--------|--------------------|
    | "state"     | 0 1 2      | first block: x, y, yaw modulo pi         | m, rad | block              |
    |             | 3 4 5      | second block: x, y, yaw modulo pi        | m, rad | block2             |
    |             | 6 7        | rod: x, y                                | m      | effector           |
    |             | 8 9        | the rod's target: x, y                   | m      | actuators' control |
    |             | 10 11 12   | first zone: x, y, yaw modulo pi          | m, rad | target             |
    |             | 13 14 15   | second zone: x, y, yaw modulo pi         | m, rad | target2            |
    | "image"     | `overview` | uint8 [96, 96, 3] from above             |        | overview           |
    |             | `state`    | entries 6 to 9                           | m      |                    |

    Reward: 0.49 at the first step with a certain block within 5 cm of a certain zone; 0.51, and the end, as soon as
    the blocks are within 5 cm of different zones. Score: sum of the distinct rewards so far, at most 1. Phases: p1 is
    a score above 0.4, p2 above 0.9.

    Args:
        action: "absolute" or "delta".
        observation, render_mode, on_divergence: as for every `envs.task.Task`.

    Raises:
        ValueError: an option has another value.
    """

    CONTROL_HZ: ClassVar[float] = 1 / CONTROL_DT_S
    MAX_STEPS: ClassVar[int] = 350
    PHASES: ClassVar[tuple[str, ...]] = ("p1", "p2")
    PROPRIOCEPTION_NAMES: ClassVar[tuple[str, ...]] = (
        "effector_x",
        "effector_y",
        "effector_target_x",
        "effector_target_y",
    )
    STATE_NAMES: ClassVar[tuple[str, ...]] = (
        *("block_x", "block_y", "block_yaw", "block2_x", "block2_y", "block2_yaw"),
        *PROPRIOCEPTION_NAMES,
        *("target_x", "target_y", "target_yaw", "target2_x", "target2_y", "target2_yaw"),
    )

    def __init__(self, *, action: ActionKind = "absolute", **keywords: Any) -> None:
        super().__init__("block_push.xml", **keywords)
        if action not in get_args(ActionKind):
            raise ValueError(f"action must be one of {', '.join(map(repr, get_args(ActionKind)))}, got {action!r}")
        self.action_kind = action
        low = WORKSPACE_LOW_M if action == "absolute" else np.full(2, -LARGEST_DELTA_M)
        high = WORKSPACE_HIGH_M if action == "absolute" else np.full(2, LARGEST_DELTA_M)
        self.action_space = self._box = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        names = self.STATE_NAMES if self.observation == "state" else self.PROPRIOCEPTION_NAMES
        parts: dict[str, spaces.Space[Any]] = {"state": spaces.Box(-np.inf, np.inf, (len(names),), np.float32)}
        if self.observation == "image":
            parts = {"overview": spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), **parts}
        self.observation_space = spaces.Dict(parts)
        self._blocks = [self.model.body(name).id for name in BLOCKS]
        self._effector = self.model.body("effector").id
        self._entered = np.zeros((2, 2), bool)  # [block, zone], since the reset
        self._reward = 0.0
        self._rewards: set[float] = set()  # distinct ones since the reset

    def effector_target(self) -> Vector:
        """Where the rod is going, [2], in metres."""
        return np.array(self.data.ctrl)

    def block_position(self, index: int) -> Vector:
        """Centre of block 0 or 1 on the table, [2], in metres."""
        return np.array(self.data.xpos[self._blocks[index], :2])

    def block_yaw(self, index: int) -> float:
        """Angle of block 0 or 1 about the vertical, in (-pi, pi]."""
        return _yaw(self.data.xquat[self._blocks[index]])

    def target_position(self, index: int) -> Vector:
        """Centre of zone 0 or 1 on the table, [2], in metres."""
        return np.array(self.data.mocap_pos[index, :2])

    def action_towards(self, position: Vector) -> NDArray[np.float32]:
        """The action [2] that makes a position on the table [2], in metres, the rod's target, as far as it may."""
        action = position if self.action_kind == "absolute" else position - self.effector_target()
        return np.clip(action, self._box.low, self._box.high).astype(np.float32)

    def _reset(self, seed: int) -> None:
        start = initial_state(seed)
        mujoco.mj_resetData(self.model, self.data)
        for name, (x, y, yaw) in zip(BLOCKS, start.blocks, strict=True):
            self.data.joint(name).qpos = [x, y, BLOCK_HEIGHT_M, *_quaternion(yaw)]
        for index, (x, y, yaw) in enumerate(start.targets):
            self.data.mocap_pos[index] = [x, y, 0.0]
            self.data.mocap_quat[index] = _quaternion(yaw)
        for name, position in zip(("effector_x", "effector_y"), START_M, strict=True):
            self.data.joint(name).qpos = position
        self.data.ctrl[:] = START_M
        self._entered[:], self._reward, self._rewards = False, 0.0, set()
        self.simulate(SETTLING_STEPS)

    def _control(self, action: NDArray[np.float64]) -> None:
        target = action if self.action_kind == "absolute" else self.effector_target() + action
        self.data.ctrl[:] = np.clip(target, WORKSPACE_LOW_M, WORKSPACE_HIGH_M)
        self.simulate(PHYSICS_STEPS)
        self._reward = self._note_entries()
        if self._reward:
            self._rewards.add(self._reward)

    def _note_entries(self) -> float:
        """The step's reward; a block counts as entering a zone once."""
        blocks = np.stack([self.block_position(0), self.block_position(1)])  # [2, 2]
        distance = np.linalg.norm(blocks[:, None] - self.data.mocap_pos[:, :2], axis=-1)  # [block, zone]
        inside = distance < GOAL_TOLERANCE_M
        nearest = distance.argmin(axis=1)  # [block]
        first = inside & ~self._entered
        self._entered |= inside
        if inside.any(axis=1).all() and nearest[0] != nearest[1]:
            return END_REWARD
        return ENTRY_REWARD * int(first.sum())

    def _outcome(self) -> Outcome:
        total = sum(self._rewards)
        phases = sum(total > score for score in PHASE_SCORES)
        return Outcome(self._reward, min(1.0, total), phases, terminated=self._reward == END_REWARD)

    def _observe(self) -> dict[str, np.ndarray]:
        effector = [*self.data.xpos[self._effector, :2], *self.data.ctrl]
        if self.observation == "image":
            blank = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            picture = self.image("overview", IMAGE_SIZE, IMAGE_SIZE) if self.draws_images else blank
            return {"overview": picture, "state": np.array(effector, np.float32)}
        blocks = [(*self.block_position(index), self.block_yaw(index) % np.pi) for index in (0, 1)]
        targets = [(*self.data.mocap_pos[index, :2], _yaw(self.data.mocap_quat[index]) % np.pi) for index in (0, 1)]
        return {"state": np.array([*blocks[0], *blocks[1], *effector, *targets[0], *targets[1]], np.float32)}

    def _get_state(self) -> dict[str, np.ndarray]:
        rewards = np.array([value in self._rewards for value in REWARDS])
        return {**super()._get_state(), "entered": self._entered.copy(), "rewards": rewards}

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        super()._set_state(state)
        self._entered = np.array(state["entered"], bool)
        self._rewards = {value for value, seen in zip(REWARDS, state["rewards"], strict=True) if seen}


def initial_state(seed: int) -> InitialState:
    """Where an episode begins, by the original environment's draws from `numpy.random.RandomState(seed)`.

    Args:
        seed: at least 0, below 2**32.
    """
    random = np.random.RandomState(seed)

    def block() -> tuple[float, float]:
        return CENTRE_X_M + random.uniform(-0.1, 0.1), -0.2 + random.uniform(-0.15, 0.15)

    def block_yaw() -> float:
        # The original calls uniform(pi), whose upper end is then 1: yaws in (1, pi].
        return np.pi + (1 - np.pi) * random.random_sample()

    def target(offset: float) -> tuple[float, float]:
        return CENTRE_X_M + offset + random.uniform(-0.005, 0.005), 0.2 + random.uniform(-0.0075, 0.0075)

    def target_yaw() -> float:
        return np.pi + random.uniform(-np.pi / 30, np.pi / 30)

    first = (*block(), block_yaw())
    position = block()
    while abs(position[0] - first[0]) <= LEAST_BLOCK_DISTANCE_M:
        position = block()
    second = (*position, block_yaw())
    offset = TARGET_OFFSET_M * random.choice([-1, 1])
    first_target = (*target(offset), target_yaw())
    position = target(-offset)
    while abs(position[0] - first_target[0]) <= LEAST_TARGET_DISTANCE_M:
        position = target(-offset)
    return InitialState((first, second), (first_target, (*position, target_yaw())))


def _yaw(quaternion: Vector) -> float:
    w, x, y, z = quaternion
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def _quaternion(yaw: float) -> list[float]:
    return [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))]
