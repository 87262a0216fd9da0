"""What the scripts of an arm with a gripper are written in: moves that look at the present state at every step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from envs.robosuite_task import POSITION_STEP_M, ROTATION_STEP_RAD, Pose, RobosuiteTask

Float = NDArray[np.float64]
Moves = Iterator[Float]  # of delta actions [7], one per control step

OPEN: Final = -1.0
CLOSE: Final = 1.0


class GripperScript(ABC):
    """An expert whose plan is a generator of delta actions; once it ends, the arm holds still.

    Args:
        task: whose simulator is read, reset just before.
        np_random: draws the plan.
    """

    def __init__(self, task: RobosuiteTask, np_random: np.random.Generator) -> None:
        self.task = task
        self._np_random = np_random
        self._draw(np_random)
        self._moves = self._script()
        self._last = np.zeros(7)

    def action(self) -> NDArray[np.float32]:
        """The next action, of the kind that the task takes."""
        still = np.concatenate([np.zeros(6), self._last[6:]])
        self._last = next(self._moves, still)
        return self.task.action_from_delta(self._last)

    @abstractmethod
    def _draw(self, np_random: np.random.Generator) -> None:
        """Draw this episode's plan."""

    @abstractmethod
    def _script(self) -> Moves:
        """The moves of the plan; each is computed when it is asked for."""

    # ---- moves

    def _towards(self, goal: Pose, fingers: float, speed: float = 1.0, turning: float = 1.0) -> Float:
        """The delta action [7] towards a pose of the gripper, no faster than these parts of the largest action."""
        position, rotation = self.task.gripper_pose()
        shift = (goal.position - position) / POSITION_STEP_M
        turn = Rotation.from_matrix(goal.rotation @ rotation.T).as_rotvec() / ROTATION_STEP_RAD
        return np.concatenate([_at_most(shift, speed), _at_most(turn, turning), [fingers]])

    def _reach(
        self,
        goal: Callable[[], Pose],
        fingers: float,
        *,
        speed: float = 1.0,
        turning: float = 1.0,
        within_m: float = 0.01,
        within_rad: float = 0.1,
        most_steps: int = 80,
    ) -> Moves:
        """Go to a pose, which may move, until it is near enough or the steps are used up."""
        for _ in range(most_steps):
            if is_near(self.task.gripper_pose(), goal(), within_m, within_rad):
                return
            yield self._towards(goal(), fingers, speed, turning)

    def _hold(self, steps: int, fingers: float) -> Moves:
        """Move the fingers alone."""
        for _ in range(steps):
            yield np.concatenate([np.zeros(6), [fingers]])


def fixed(pose: Pose) -> Callable[[], Pose]:
    """A goal that does not move."""
    return lambda: pose


def is_near(pose: Pose, goal: Pose, within_m: float, within_rad: float) -> bool:
    """Whether two poses are no further apart than this."""
    turn = Rotation.from_matrix(goal.rotation @ pose.rotation.T).magnitude()
    return bool(np.linalg.norm(goal.position - pose.position) <= within_m and turn <= within_rad)


def from_above(closing: Float, present: Float) -> Float:
    """The rotation [3, 3] of a gripper that points down and closes along a horizontal direction.

    Args:
        closing: the direction [>= 2], of any length; its opposite closes the fingers just as well.
        present: the gripper's rotation now: of the two, the nearer one is taken.
    """
    x = np.array([closing[0], closing[1], 0.0]) / np.hypot(closing[0], closing[1])
    x = x if x @ present[:, 0] >= 0 else -x
    z = np.array([0.0, 0.0, -1.0])
    return np.stack([x, np.cross(z, x), z], axis=1)


def _at_most(vector: Float, length: float) -> Float:
    return vector * min(1.0, length / max(float(np.linalg.norm(vector)), 1e-9))
