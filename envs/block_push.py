"""BlockPush: a rod pushes two cubes into two square zones, in either order and either way round."""

from typing import Any, ClassVar, Final, Literal

import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.mujoco_task import MujocoTask
from envs.task import Outcome

Vector = NDArray[np.float64]

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
TARGETS: Final = ("target", "target2")


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

    def effector_target(self) -> Vector:
        """Where the rod is going, [2], in metres."""
        return self.data.ctrl.copy()

    def block_position(self, index: int) -> Vector:
        """Centre of block 0 or 1 on the table, [2], in metres."""
        return self.data.body(BLOCKS[index]).xpos[:2].copy()

    def block_yaw(self, index: int) -> float:
        """Angle of block 0 or 1 about the vertical, in [0, pi)."""
        return _yaw(self.data.body(BLOCKS[index]).xquat)

    def target_position(self, index: int) -> Vector:
        """Centre of zone 0 or 1 on the table, [2], in metres."""
        return self.data.mocap_pos[index, :2].copy()
