"""ArmReach: a planar arm reaches behind an obstacle, round its left or its right side."""

import math
from typing import Any, ClassVar

import mujoco
import numpy as np
from gymnasium import spaces

from envs.mujoco_task import MujocoTask
from envs.task import Outcome

BASE = np.array([0.0, -0.25])  # m; the shoulder in the table's plane
LINKS = (0.34, 0.31, 0.20)  # m; shoulder to elbow, elbow to wrist, wrist to tip
OBSTACLE_RADIUS = 0.06  # m
PIN_RADIUS = 0.01  # m
REACHED_WITHIN = 0.02  # m, from the pin's axis to the target
# The targets of the joints move no faster, so that no action is violent.
JOINT_SPEED = 2.0  # rad/s
IMAGE_SIZE = (84, 84)


class ArmReach(MujocoTask):
    """Reach a target behind a round obstacle without touching it; either side is as good as the other.

    The arm moves in a plane above the table. A pin at its end reaches down, and the obstacle stands between the pin's
    start and the target: the straight way, which is also the mean of the two ways round, runs into it. An episode ends
    with success when the pin's axis is within 2 cm of the target, and as a failure when the pin touches the obstacle.

    | | |
    |---|---|
    | id | `driftfield/ArmReach-v0` |
    | control | 10 Hz, 10 physics steps of 0.01 s each |
    | step limit | 80 |
    | reward | 1 when the target is reached, else 0 |
    | score | largest reward: 1 for a success, else 0 |
    | phases | `reached` |
    | info | also `touched` (bool): the pin has touched the obstacle |

    Action [2]: where the pin shall be at the end of the step. Inverse kinematics turns it into angles, with the hand
    pointing away from the shoulder and the elbow to the right; the joints' servos go there in a straight line, at no
    more than 2 rad/s.

    | index | what | min | max | unit | XML name |
    |---|---|---|---|---|---|
    | 0 | tip's target, x (to the right) | -0.3 | 0.3 | m | `tip` |
    | 1 | tip's target, y (away from the shoulder) | 0 | 0.5 | m | `tip` |

    Observation `state` [9]; with `observation="image"` rows 0 to 4 alone, and `overhead` [84, 84, 3] uint8 beside them.

    | index | what | min | max | unit | XML name |
    |---|---|---|---|---|---|
    | 0 | angle of the shoulder | -3.2 | 3.2 | rad | `shoulder` |
    | 1 | angle of the elbow | -3.2 | 3.2 | rad | `elbow` |
    | 2 | angle of the wrist | -3.2 | 3.2 | rad | `wrist` |
    | 3 | tip, x | -1 | 1 | m | `tip` |
    | 4 | tip, y | -1.25 | 1.25 | m | `tip` |
    | 5 | target, x | -1 | 1 | m | `target` |
    | 6 | target, y | -1 | 1 | m | `target` |
    | 7 | obstacle's centre, x | -1 | 1 | m | `obstacle` |
    | 8 | obstacle's centre, y | -1 | 1 | m | `obstacle` |

    Initial state of a seed, drawn from `numpy.random.default_rng(seed)` in this order, all uniformly: tip's x within
    +-0.1 m and y in 0.02 to 0.08 m; target's x within +-0.12 m and y in 0.40 to 0.48 m; the obstacle's centre at 0.45
    to 0.6 of the way from the tip to the target, moved sideways by up to 2 cm to either side. The arm is at rest.

    >>> import envs
    >>> observation, info = envs.make("arm_reach").reset(seed=0)
    >>> observation["state"].shape, info["success"]
    ((9,), False)
    """

    CONTROL_HZ: ClassVar[float] = 10.0
    MAX_STEPS: ClassVar[int] = 80
    PHASES: ClassVar[tuple[str, ...]] = ("reached",)
    RENDER_CAMERA: ClassVar[str] = "overhead"

    def __init__(self, **keywords: Any) -> None:
        super().__init__("arm_reach.xml", **keywords)
        self.action_space = spaces.Box(np.array([-0.3, 0.0], np.float32), np.array([0.3, 0.5], np.float32))
        image = self.observation == "image"
        high = np.array([3.2, 3.2, 3.2, 1.0, 1.25] + [1.0] * (0 if image else 4), np.float32)
        observations: dict[str, spaces.Space[Any]] = {"state": spaces.Box(-high, high)}
        if image:
            observations["overhead"] = spaces.Box(0, 255, (*IMAGE_SIZE, 3), np.uint8)
        self.observation_space = spaces.Dict(observations)
        self._substeps = round(1 / self.CONTROL_HZ / self.model.opt.timestep)
        self._touched = False
        # Views of the simulator's arrays: they follow it.
        self._tip = self.data.site("tip").xpos[:2]
        self._target = self.data.mocap_pos[self.model.body("target").mocapid[0], :2]
        self._obstacle = self.data.mocap_pos[self.model.body("obstacle").mocapid[0], :2]

    @property
    def tip(self) -> np.ndarray:
        """Where the pin's axis is [2], in m."""
        return self._tip.copy()

    @property
    def target(self) -> np.ndarray:
        """Where it shall be [2], in m."""
        return self._target.copy()

    @property
    def obstacle(self) -> np.ndarray:
        """The obstacle's centre [2], in m."""
        return self._obstacle.copy()

    def _reset(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        tip = random.uniform([-0.1, 0.02], [0.1, 0.08])
        target = random.uniform([-0.12, 0.40], [0.12, 0.48])
        along, sideways = random.uniform([0.45, -0.02], [0.6, 0.02])
        way = target - tip
        left = np.array([-way[1], way[0]]) / np.linalg.norm(way)
        mujoco.mj_resetData(self.model, self.data)
        self._target[:] = target
        self._obstacle[:] = tip + along * way + sideways * left
        self.data.qpos[:] = self.data.ctrl[:] = joint_angles(tip)
        mujoco.mj_forward(self.model, self.data)
        self._touched = False

    def _control(self, action: np.ndarray) -> None:
        before = self.data.ctrl.copy()
        most = JOINT_SPEED / self.CONTROL_HZ
        move = np.clip(joint_angles(action) - before, -most, most)
        for step in range(1, self._substeps + 1):
            self.data.ctrl[:] = before + move * (step / self._substeps)
            mujoco.mj_step(self.model, self.data)
            self._touched |= self.data.ncon > 0  # the pin and the obstacle are all that can collide
        self.refresh()
        self._touched |= self.data.ncon > 0

    def _observe(self) -> dict[str, np.ndarray]:
        arm = [self.data.qpos, self._tip]
        if self.observation == "image":
            blank = np.zeros((*IMAGE_SIZE, 3), np.uint8)
            image = self.image("overhead", *IMAGE_SIZE, shadows=False) if self.draws_images else blank
            return {"overhead": image, "state": np.concatenate(arm, dtype=np.float32)}
        return {"state": np.concatenate([*arm, self._target, self._obstacle], dtype=np.float32)}

    def _outcome(self) -> Outcome:
        reached = not self._touched and bool(np.linalg.norm(self._tip - self._target) < REACHED_WITHIN)
        return Outcome(float(reached), float(reached), int(reached), reached or self._touched)

    def _details(self) -> dict[str, Any]:
        return {"touched": self._touched}

    def _get_state(self) -> dict[str, np.ndarray]:
        return {**super()._get_state(), "touched": np.array(self._touched)}

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        super()._set_state(state)
        self._touched = bool(state["touched"])


def joint_angles(tip: np.ndarray) -> np.ndarray:
    """The arm's pose for a position of its tip: the hand points away from the shoulder, the elbow is to the right.

    Args:
        tip: [2] in m, between 0.23 and 0.85 m from the shoulder.

    Returns:
        Angles of shoulder, elbow and wrist [3] in rad, counted to the left; all zero is straight along +y.
    """
    upper, forearm, hand = LINKS
    x, y = float(tip[0] - BASE[0]), float(tip[1] - BASE[1])
    wrist = math.hypot(x, y) - hand  # from the shoulder
    # The triangle of shoulder, elbow and wrist, by the law of cosines.
    at_shoulder = math.acos((upper**2 + wrist**2 - forearm**2) / (2 * upper * wrist))
    at_elbow = math.acos((upper**2 + forearm**2 - wrist**2) / (2 * upper * forearm))
    direction = math.atan2(-x, y)
    shoulder, elbow = direction - at_shoulder, math.pi - at_elbow
    return np.array([shoulder, elbow, direction - shoulder - elbow])
