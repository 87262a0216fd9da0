"""An expert for ArmReach: round the obstacle's left or right side, by chance."""

import numpy as np

from envs.arm_reach import OBSTACLE_RADIUS, PIN_RADIUS, ArmReach
from envs.task import Task

CLEARANCE = (0.02, 0.045)  # m, between the pin and the obstacle at their closest
LEAD = (0.022, 0.038)  # m; how far ahead on its way the pin is sent, which sets its speed
POINTS = 201  # of the way
WIDTHS = np.linspace(0.0, 0.3, 151)  # m; how far a way can leave the straight line


class ArmReachExpert:
    """Follows a half wave from the tip's start to the target; side, clearance and speed are drawn once.

    Args:
        task: an ArmReach at the beginning of an episode.
        np_random: the plan is drawn from it.
    """

    def __init__(self, task: Task, np_random: np.random.Generator) -> None:
        if not isinstance(task, ArmReach):
            raise TypeError(f"ArmReachExpert needs an ArmReach, got {task}")
        self.task = task
        self.side = 1 if np_random.random() < 0.5 else -1  # 1: to the left
        clearance = np_random.uniform(*CLEARANCE)
        self.lead = np_random.uniform(*LEAD)
        self.way = way_round(
            task.tip, task.target, task.obstacle, self.side, OBSTACLE_RADIUS + PIN_RADIUS + clearance
        )  # [POINTS, 2]

    def action(self) -> np.ndarray:
        """The point of the way that lies `lead` ahead of the one nearest to the tip [2], in m."""
        nearest = int(np.argmin(np.linalg.norm(self.way - self.task.tip, axis=1)))
        steps = np.linalg.norm(np.diff(self.way[nearest:], axis=0), axis=1)
        ahead = int(np.searchsorted(np.cumsum(steps), self.lead))
        return self.way[min(nearest + ahead + 1, POINTS - 1)].astype(np.float32)


def way_round(start: np.ndarray, end: np.ndarray, centre: np.ndarray, side: int, distance: float) -> np.ndarray:
    """The narrowest half wave from start to end that keeps a distance from a centre.

    Args:
        start, end, centre: [2] in m.
        side: 1 to pass on the left, -1 on the right.
        distance: m, of every point of the way from the centre.

    Raises:
        ValueError: no half wave of the widths tried keeps that distance.

    Returns:
        [POINTS, 2] in m.
    """
    s = np.linspace(0.0, 1.0, POINTS)[:, None]
    left = np.array([start[1] - end[1], end[0] - start[0]]) / np.linalg.norm(end - start)
    straight = start + s * (end - start)  # [POINTS, 2]
    wave = side * np.sin(np.pi * s) * left  # [POINTS, 2]
    ways = straight + WIDTHS[:, None, None] * wave  # [widths, POINTS, 2]
    nearest_squared = ((ways - centre) ** 2).sum(axis=-1).min(axis=-1)  # [widths]
    # Beyond the last width that is too narrow on this side: a narrower one may pass on the other side.
    beyond = int(np.max(np.nonzero(nearest_squared < distance**2)[0], initial=-1)) + 1
    if beyond == len(WIDTHS):
        raise ValueError(f"no way from {start} to {end} keeps {distance:g} m from {centre}")
    return ways[beyond]
