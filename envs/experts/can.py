"""A scripted expert for Can: grasp the can from above, carry it over the edge between the bins, put it down, let go."""

from typing import Final

import numpy as np

from envs.experts.gripper_script import CLOSE, OPEN, GripperScript, Moves, fixed, from_above
from envs.robosuite_task import Pose

ABOVE_M: Final = 0.12
GRASP_HEIGHT_M: Final = 0.01  # above the can's middle
CLOSING_STEPS: Final = 8
OPENING_STEPS: Final = 4
CARRIED_Z_M: Final = 1.12  # over the bins' walls
RELEASED_Z_M: Final = 0.95
COMPARTMENT_M: Final = (0.15, 0.345)  # nearer than its middle, which an upright hand does not reach
LOST_M: Final = 0.06  # between gripper and can: it has slipped out
RETREAT_M: Final = 0.1  # more than the 4.2 cm from which the can counts as let go


class CanExpert(GripperScript):
    """Grasp along a direction of its own, put down off the middle, at a speed of its own; try again where it slips."""

    def _draw(self, np_random: np.random.Generator) -> None:
        yaw = np_random.uniform(-np.pi / 3, np.pi / 3)
        across = np_random.integers(2) * np.pi / 2  # a round can is grasped along any direction: two ranges of them
        self._closing = np.array([np.cos(yaw + across), np.sin(yaw + across)])
        self._goal = np.array(COMPARTMENT_M) + np_random.uniform(-0.02, 0.02, 2)
        self._height_m = GRASP_HEIGHT_M + np_random.uniform(-0.01, 0.015)
        self._carried_z_m = CARRIED_Z_M + np_random.uniform(-0.02, 0.05)
        self._speed = np_random.uniform(0.7, 1.0)

    def _script(self) -> Moves:
        self._rotation = from_above(self._closing, self.task.gripper_pose().rotation)
        while True:
            yield from self._reach(lambda: self._over_can(ABOVE_M), OPEN, speed=self._speed, within_m=0.02)
            yield from self._reach(lambda: self._over_can(self._height_m), OPEN, speed=self._speed, within_m=0.008)
            yield from self._hold(CLOSING_STEPS, CLOSE)
            yield from self._carry()
            if self._is_lost():
                continue
            yield from self._hold(OPENING_STEPS, OPEN)
            yield from self._reach(lambda: self._at(RELEASED_Z_M + RETREAT_M), OPEN, speed=self._speed)
            while self.task.solved():
                yield from self._hold(1, OPEN)

    def _carry(self) -> Moves:
        """Up, over and down again, as long as the can is between the fingers."""
        x, y = self.task.gripper_pose().position[:2]
        up = Pose(np.array([x, y, self._carried_z_m]), self._rotation)
        for goal in (up, self._at(self._carried_z_m), self._at(RELEASED_Z_M)):
            for move in self._reach(fixed(goal), CLOSE, speed=self._speed, within_m=0.025, within_rad=0.3):
                if self._is_lost():
                    return
                yield move

    def _can(self) -> np.ndarray:
        return self.task.data.body("Can_main").xpos.copy()

    def _over_can(self, above_m: float) -> Pose:
        return Pose(self._can() + np.array([0.0, 0.0, above_m]), self._rotation)

    def _at(self, z_m: float) -> Pose:
        return Pose(np.array([*self._goal, z_m]), self._rotation)

    def _is_lost(self) -> bool:
        return bool(np.linalg.norm(self._can() - self.task.gripper_pose().position) > LOST_M)
