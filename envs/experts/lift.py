"""A scripted expert for Lift: above the cube, down to it, close the fingers, up."""

from typing import Final

import numpy as np

from envs.experts.gripper_script import CLOSE, OPEN, GripperScript, Moves, from_above
from envs.robosuite_task import Pose

ABOVE_M: Final = 0.08
LIFTED_M: Final = 0.15
CLOSING_STEPS: Final = 6
LOST_M: Final = 0.03  # between gripper and cube: it has slipped out


class LiftExpert(GripperScript):
    """Grasp the cube by one of its two pairs of faces, each with equal odds, off its middle, at a speed of its own."""

    def _draw(self, np_random: np.random.Generator) -> None:
        self.faces = int(np_random.integers(2))  # closes along the cube's x or y axis
        self._along_m = np_random.uniform(-0.008, 0.008)  # off the middle, along the faces that are grasped
        self._height_m = np_random.uniform(-0.006, 0.006)
        self._above_m = ABOVE_M + np_random.uniform(-0.02, 0.03)
        self._speed = np_random.uniform(0.5, 1.0)

    def _script(self) -> Moves:
        while True:
            yield from self._reach(lambda: self._grasp(self._above_m), OPEN, speed=self._speed)
            yield from self._reach(lambda: self._grasp(0.0), OPEN, speed=self._speed, within_m=0.006)
            yield from self._hold(CLOSING_STEPS, CLOSE)
            goal = self._raised()
            while not self._is_lost():
                yield self._towards(goal, CLOSE, self._speed)

    def _cube(self) -> Pose:
        cube = self.task.data.body("cube_main")
        return Pose(cube.xpos.copy(), cube.xmat.reshape(3, 3).copy())

    def _grasp(self, above_m: float) -> Pose:
        """The gripper's pose at, or above, the point where it grasps."""
        cube, gripper = self._cube(), self.task.gripper_pose()
        closing, along = cube.rotation[:, self.faces], cube.rotation[:, 1 - self.faces]
        shift = along * self._along_m + np.array([0.0, 0.0, self._height_m + above_m])
        return Pose(cube.position + shift, from_above(closing, gripper.rotation))

    def _raised(self) -> Pose:
        position, rotation = self.task.gripper_pose()
        return Pose(position + np.array([0.0, 0.0, LIFTED_M]), rotation)

    def _is_lost(self) -> bool:
        return bool(np.linalg.norm(self._cube().position - self.task.gripper_pose().position) > LOST_M)
