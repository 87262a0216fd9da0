"""PushT: a disc pushes a T-shaped block onto its goal; as measured in pymunk, simulated in MuJoCo.

Lengths are pixels of a table of 512 x 512, x right and y down; a positive angle turns x towards y. A pose is the
position of the block's origin, the middle of the bar's outer edge, and its angle.
"""

import math
from typing import Any, ClassVar, Final

import mujoco
import numpy as np
import shapely
from gymnasium import spaces

from envs.mujoco_task import MujocoTask
from envs.push_t_drawing import TABLE_SIZE, draw_table, resize
from envs.task import Outcome

# The block in its own frame.
BAR: Final = np.array([(-60, 0), (60, 0), (60, 30), (-60, 30)], np.float64)
STEM: Final = np.array([(-15, 30), (15, 30), (15, 120), (-15, 120)], np.float64)
OUTLINE: Final = np.array(
    [(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], np.float64
)
CENTRE_OF_GRAVITY: Final = np.array([0.0, 45.0])  # the mean of bar's and stem's, whatever their areas
MOMENT_OF_INERTIA: Final = 3000.0  # px^2 times the block's mass: twice the bar's
# What the state shows of the block: drawn once by farthest-point sampling of the T, with generator seed 0.
KEY_POINTS: Final = np.array(
    [
        (9.269787, 90.040974),
        (-60.983472, -1.18673),
        (60.912756, -1.393364),
        (-0.270503, 25.543625),
        (-14.064928, 122.815854),
        (39.002739, 32.857404),
        (-39.966414, 32.729655),
        (-16.824344, 62.863179),
        (23.541461, -1.700288),
    ]
)

GOAL: Final = np.array([256.0, 256.0, math.pi / 4])  # a pose
SUCCESS_COVERAGE: Final = 0.95

STIFFNESS: Final = 100.0  # 1/s^2, from the agent to its target
DAMPING: Final = 20.0  # 1/s: critical
TIMESTEP: Final = 0.01  # s, of physics and of the agent's controller
SUBSTEPS: Final = 10  # timesteps in a control step

IMAGE_SIZE: Final = 96


def rotation(angle: float) -> np.ndarray:
    """The matrix `[2, 2]` that turns columns from x towards y."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([(cosine, -sine), (sine, cosine)])


def on_table(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Points `[..., 2]` of the block's frame, on the table, for a pose `[3]`."""
    return points @ rotation(pose[2]).T + pose[:2]


def coverage(pose: np.ndarray) -> float:
    """The part of the goal's area that the block covers at a pose `[3]`.

    >>> round(coverage(GOAL), 6), coverage(GOAL + [200, 0, 0])
    (1.0, 0.0)
    """
    covered = shapely.intersection(shapely.Polygon(on_table(OUTLINE, pose)), _GOAL_POLYGON)
    return float(covered.area / _GOAL_POLYGON.area)


def initial_state(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where an episode begins, by the rule of published evaluations.

    There the block's position is set before its angle, and setting the angle turns it about its centre of gravity.

    Args:
        seed: of numpy's RandomState, from 0 to 2^32 - 1.

    Returns:
        Position of the agent `[2]` and pose of the block `[3]`.
    """
    random = np.random.RandomState(seed)  # noqa: NPY002 - the published seeds are its
    agent = np.array([random.randint(50, 450), random.randint(50, 450)], np.float64)
    sampled = np.array([random.randint(100, 400), random.randint(100, 400)], np.float64)
    angle = random.randn() * 2 * math.pi - math.pi
    origin = sampled + CENTRE_OF_GRAVITY - rotation(angle) @ CENTRE_OF_GRAVITY
    return agent, np.append(origin, angle)


class PushT(MujocoTask):
    """A disc, the agent, pushes a T-shaped block onto its goal.

    The block moves quasi-statically and without friction: it stands still unless touched, and then moves just out of
    the way. The agent moves like a damped spring towards its target, whatever is in its way; behind a target that moves
    it stays by 0.2 s times the speed.

    | | |
    |---|---|
    | id | `driftfield/PushT-v0` |
    | control | 10 Hz, 10 physics steps of 0.01 s each |
    | step limit | 300 |
    | reward | the part of the goal's area that the block covers, over 0.95, at most 1 |
    | score | largest reward |
    | phases | `covered`: more than 0.95 of the goal, which ends the episode |

    Action [2]: where the agent shall go.

    | index | what | min | max | unit | XML name |
    |---|---|---|---|---|---|
    | 0 | agent's target, x (to the right) | 0 | 512 | px | `agent` |
    | 1 | agent's target, y (down) | 0 | 512 | px | `agent` |

    Observation `state` [20]; with `observation="image"` rows 18 and 19 alone, beside `image` [96, 96, 3] uint8.

    | index | what | min | max | unit | XML name |
    |---|---|---|---|---|---|
    | 0 to 17 | 9 key points of the block (`KEY_POINTS`): x0, y0, x1, ..., y8 | -inf | inf | px | `block` |
    | 18 | agent, x | -inf | inf | px | `agent` |
    | 19 | agent, y | -inf | inf | px | `agent` |

    Initial state of a seed: `initial_state`, then one physics step. The agent is at rest.

    >>> import envs
    >>> observation, info = envs.make("push_t").reset(seed=0)
    >>> observation["state"].shape, info["success"]
    ((20,), False)
    """

    CONTROL_HZ: ClassVar[float] = 10.0
    MAX_STEPS: ClassVar[int] = 300
    PHASES: ClassVar[tuple[str, ...]] = ("covered",)

    def __init__(self, **keywords: Any) -> None:
        super().__init__("push_t.xml", **keywords)
        self.action_space = spaces.Box(0, TABLE_SIZE, (2,), np.float32)
        numbers = 2 * len(KEY_POINTS) + 2 if self.observation == "state" else 2
        observations: dict[str, spaces.Space[Any]] = {"state": spaces.Box(-np.inf, np.inf, (numbers,), np.float32)}
        if self.observation == "image":
            observations["image"] = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.observation_space = spaces.Dict(observations)

    @property
    def agent(self) -> np.ndarray:
        """Position of the agent's centre `[2]`."""
        return self.data.qpos[:2].copy()

    @property
    def agent_velocity(self) -> np.ndarray:
        """The agent's velocity `[2]`, px/s."""
        return self.data.qvel[:2].copy()

    @property
    def pose(self) -> np.ndarray:
        """The block's pose `[3]`."""
        x, y, angle = self.data.qpos[2:]
        return np.append([x, y] - rotation(angle) @ CENTRE_OF_GRAVITY, angle)

    def place(self, agent: np.ndarray, pose: np.ndarray) -> None:
        """Put the agent at a position `[2]`, at rest, and the block into a pose `[3]`."""
        self.data.qpos[:2] = agent
        self.data.qpos[2:4] = on_table(CENTRE_OF_GRAVITY, pose)
        self.data.qpos[4] = pose[2]
        self.data.qvel[:] = 0
        mujoco.mj_forward(self.model, self.data)

    def _reset(self, seed: int) -> None:
        mujoco.mj_resetData(self.model, self.data)
        agent, pose = initial_state(seed)
        self.place(agent, pose)
        self._advance()  # as in the published environment: a block in a wall or on the agent begins to leave it
        self.refresh()

    def _control(self, action: np.ndarray) -> None:
        position, velocity = self.agent, self.agent_velocity
        for _ in range(SUBSTEPS):
            velocity += (STIFFNESS * (action - position) - DAMPING * velocity) * TIMESTEP
            self.data.qpos[:2], self.data.qvel[:2] = position, velocity
            self._advance()
            position += velocity * TIMESTEP
        self.data.qpos[:2], self.data.qvel[:2] = position, velocity
        self.refresh()

    def _advance(self) -> None:
        """One step of physics; a block keeps no velocity from one step to the next."""
        self.data.qvel[2:] = 0
        mujoco.mj_step(self.model, self.data)

    def _observe(self) -> dict[str, np.ndarray]:
        agent = self.agent.astype(np.float32)
        if self.observation == "image":
            blank = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            return {"state": agent, "image": resize(self._render(), IMAGE_SIZE) if self.draws_images else blank}
        key_points = on_table(KEY_POINTS, self.pose).astype(np.float32)
        return {"state": np.concatenate([key_points.ravel(), agent])}

    def _outcome(self) -> Outcome:
        covered = coverage(self.pose)
        reward, success = min(covered / SUCCESS_COVERAGE, 1.0), covered > SUCCESS_COVERAGE
        return Outcome(reward=reward, score=reward, phases=int(success), terminated=success)

    def _render(self) -> np.ndarray:
        block = [on_table(polygon, self.pose) for polygon in (BAR, STEM)]
        return draw_table(self.agent, block, [on_table(polygon, GOAL) for polygon in (BAR, STEM)])


_GOAL_POLYGON: Final = shapely.Polygon(on_table(OUTLINE, GOAL))
