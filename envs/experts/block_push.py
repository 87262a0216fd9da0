"""A scripted expert for BlockPush: it pushes one block into one zone, goes back, and pushes the other into the other.

Which block comes first and which zone it gets is drawn per episode, so demonstrations have four modes. The phases,
speeds and distances are those of the script behind the demonstrations of Implicit Behavioral Cloning and Behavior
Transformers.
"""

from typing import ClassVar, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.block_push import CONTROL_DT_S, BlockPush

Phase = Literal["to_pre_contact", "approach", "push", "orient_left", "orient_right", "retreat", "to_start"]
Vector = NDArray[np.float64]

SPEED_M_S: Final[dict[Phase, float]] = {
    "to_pre_contact": 0.30,
    "approach": 0.35,
    "push": 0.35,
    "orient_left": 0.15,
    "orient_right": 0.15,
    "retreat": 0.30,
    "to_start": 0.30,
}
PRE_CONTACT_M: Final = 0.05  # behind the block's centre, seen from its zone
APPROACH_M: Final = 0.03
PUSH_M: Final = 0.01  # inside the block: the rod's target runs ahead of its surface
ORBIT_RADIUS_M: Final = 0.025
ORBIT_STEP_RAD: Final = 0.2
YAW_TOLERANCE_RAD: Final = 0.2
YAW_ALIGNED_RAD: Final = 0.03
DELIVERED_M: Final = 0.04
ARRIVED_M: Final = 0.005  # the original script has 0.001, and waits for ever where executed actions are noisy


class Plan(NamedTuple):
    """Which block, 0 or 1, is pushed first, and into which zone; the other two make the second half."""

    block: int
    target: int


class BlockPushExpert:
    """Push both blocks into different zones; see the module for where it comes from.

    Args:
        task: whose simulator is read, reset just before.
        np_random: draws the plan, one of four with equal odds.
    """

    RECORDS_LAST_OBSERVATION: ClassVar[bool] = True  # as in the published demonstrations

    def __init__(self, task: BlockPush, np_random: np.random.Generator) -> None:
        self._task = task
        plan = int(np_random.integers(4))
        self.plan = Plan(block=plan // 2, target=plan % 2)
        self._block, self._target = self.plan
        self._phase: Phase = "to_pre_contact"
        self._start = task.effector_target()
        self._first_pre_contact = self._behind_block(PRE_CONTACT_M)

    def action(self) -> NDArray[np.float32]:
        """The next target of the rod [2], or its change [2] where that is the task's action."""
        self._advance()
        position = self._task.effector_target()
        step = self._goal() - position  # [2]
        distance = float(np.linalg.norm(step))
        step *= min(1.0, SPEED_M_S[self._phase] * CONTROL_DT_S / max(distance, 1e-9))
        return self._task.action_towards(position + step)

    def _advance(self) -> None:
        """Change to the next phase where the present one is done."""
        if self._block == self.plan.block and self._phase not in ("retreat", "to_start") and self._is_delivered():
            self._phase = "retreat"
        if self._phase == "retreat" and self._is_at(self._first_pre_contact):
            self._phase = "to_start"
        if self._phase == "to_start" and self._is_at(self._start):
            self._block, self._target = 1 - self.plan.block, 1 - self.plan.target
            self._phase = "to_pre_contact"
        error = self._yaw_error()
        if self._phase == "push" and abs(error) > YAW_TOLERANCE_RAD:
            self._phase = "to_pre_contact"
        if (self._phase == "orient_left" and error < YAW_ALIGNED_RAD) or (
            self._phase == "orient_right" and error > -YAW_ALIGNED_RAD
        ):
            self._phase = "to_pre_contact"
        if self._phase == "to_pre_contact" and self._is_at(self._behind_block(PRE_CONTACT_M)):
            self._phase = "approach"
        if self._phase == "approach" and abs(error) > YAW_TOLERANCE_RAD:
            self._phase = "orient_left" if error > 0 else "orient_right"
        if self._phase == "approach" and self._is_at(self._behind_block(APPROACH_M)):
            self._phase = "push"

    def _goal(self) -> Vector:
        if self._phase == "retreat":
            return self._first_pre_contact
        if self._phase == "to_start":
            return self._start
        if self._phase in ("orient_left", "orient_right"):
            return self._further_round(ORBIT_STEP_RAD if self._phase == "orient_left" else -ORBIT_STEP_RAD)
        distances = {"to_pre_contact": PRE_CONTACT_M, "approach": APPROACH_M, "push": PUSH_M}
        return self._behind_block(distances[self._phase])

    def _behind_block(self, distance: float) -> Vector:
        return self._task.block_position(self._block) - distance * self._direction()

    def _direction(self) -> Vector:
        """Unit vector [2] from the block to its zone."""
        way = self._task.target_position(self._target) - self._task.block_position(self._block)
        return way / max(float(np.linalg.norm(way)), 1e-9)

    def _further_round(self, angle: float) -> Vector:
        block = self._task.block_position(self._block)
        radius = self._task.effector_target() - block
        cos, sin = np.cos(angle), np.sin(angle)
        turned = np.array([cos * radius[0] - sin * radius[1], sin * radius[0] + cos * radius[1]])
        return block + turned * (ORBIT_RADIUS_M / max(float(np.linalg.norm(radius)), 1e-9))

    def _yaw_error(self) -> float:
        """Angle from the block's nearest face normal to the pushing direction, in [-pi/4, pi/4)."""
        x, y = self._direction()
        error = np.arctan2(y, x) - self._task.block_yaw(self._block)
        return float((error + np.pi / 4) % (np.pi / 2) - np.pi / 4)

    def _is_at(self, point: Vector) -> bool:
        # The rod's target, not the rod: a lagging rod would make arrival depend on the lag.
        return bool(np.linalg.norm(self._task.effector_target() - point) < ARRIVED_M)

    def _is_delivered(self) -> bool:
        way = self._task.target_position(self._target) - self._task.block_position(self._block)
        return bool(np.linalg.norm(way) < DELIVERED_M)
