"""Kitchen: a Franka arm among seven things to move, four of them in any order; gymnasium-robotics' model."""

import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.mujoco_task import MujocoTask
from envs.task import Observation, Outcome

Vector = NDArray[np.float64]

PACKAGE: Final = "gymnasium_robotics"
MODEL: Final = "envs/assets/kitchen_franka/kitchen_assets/kitchen_env_model.xml"
PHYSICS_STEPS: Final = 40  # of 2 ms per action
CONTROL_DT_S: Final = 0.08
ROBOT_JOINTS: Final = 9
COORDINATES: Final = 30
GOAL_ENTRIES: Final = 30  # zeros: the goal that relay policy learning has there is masked
LOW: Final = np.array([-2.9, -1.8, -2.9, -3.1, -2.9, 0.0, -2.9, 0.0, 0.0])
HIGH: Final = np.array([2.9, 1.8, 2.9, 0.0, 2.9, 3.8, 2.9, 0.04, 0.04])
LARGEST_SPEED: Final = 10.0  # rad/s and m/s
NOISE_RATIO: Final = 0.1
NOISE_AMPLITUDES: Final = np.array(
    [0.1] * 9 + [0.005] * 2 + [0.0005] * 6 + [0.005] * 3 + [0.1] * 3 + [0.005] * 3 + [0.1] * 3 + [0.005]
)
COMPLETION_DISTANCE: Final = 0.3
# The camera sees the whole kitchen from behind the robot's left shoulder.
CAMERA: Final = "left_cap"
CAMERA_POSITION_M: Final = (-0.95, -1.0, 2.75)
CAMERA_QUATERNION: Final = (0.807, 0.5585, -0.1091, -0.1577)
CAMERA_FIELD_DEG: Final = 48.0
PICTURE_SIZE: Final = 640  # largest
# fmt: off
START_QPOS: Final = np.array([
    1.48388023e-01, -1.76848573e00, 1.84390296e00, -2.47685760e00, 2.60252026e-01, 7.12533105e-01, 1.59515394e00,
    4.79267505e-02, 3.71350919e-02, -2.66279850e-04, -5.18043486e-05, 3.12877220e-05, -4.51199853e-05, -3.90842156e-06,
    -4.22629655e-05, 6.28065475e-05, 4.04984708e-05, 4.62730939e-04, -2.26906415e-04, -4.65501369e-04, -6.44129196e-03,
    -1.77048263e-03, 1.08009684e-03, -2.69397440e-01, 3.50383255e-01, 1.61944683e00, 1.00618764e00, 4.06395120e-03,
    -6.62095997e-03, -2.68278933e-04,
])
# fmt: on


class Element(NamedTuple):
    """A thing to move: complete when its coordinates are within 0.3 (Euclidean) of the goal."""

    name: str
    coordinates: slice  # of qpos
    goal: tuple[float, ...]


ELEMENTS: Final = (
    Element("bottom burner", slice(11, 13), (-0.88, -0.01)),
    Element("top burner", slice(15, 17), (-0.92, -0.01)),
    Element("light switch", slice(17, 19), (-0.69, -0.05)),
    Element("slide cabinet", slice(19, 20), (0.37,)),
    Element("hinge cabinet", slice(20, 22), (0.0, 1.45)),
    Element("microwave", slice(22, 23), (-0.75,)),
    Element("kettle", slice(23, 30), (-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06)),
)


class Kitchen(MujocoTask):
    """Move four of seven things in a kitchen with a Franka arm, 12.5 actions per second, up to 280 of them.

    The kitchen of relay policy learning, which is gymnasium-robotics' model, with diffusion policy's observation,
    noise and absolute actions.

    Action, float32 [9], targets of the joints:

    | index | meaning                   | range        | unit | actuator                             |
    |-------|---------------------------|--------------|------|--------------------------------------|
    | 0     | first joint of the arm    | -2.9 to 2.9  | rad  | panda0_joint1                        |
    | 1     | second joint              | -1.8 to 1.8  | rad  | panda0_joint2                        |
    | 2     | third joint               | -2.9 to 2.9  | rad  | panda0_joint3                        |
    | 3     | fourth joint              | -3.1 to 0    | rad  | panda0_joint4                        |
    | 4     | fifth joint               | -2.9 to 2.9  | rad  | panda0_joint5                        |
    | 5     | sixth joint               | 0 to 3.8     | rad  | panda0_joint6                        |
    | 6     | seventh joint             | -2.9 to 2.9  | rad  | panda0_joint7                        |
    | 7 8   | how far each finger opens | 0 to 0.04    | m    | r_, l_gripper_finger_joint           |

    A target further than 10 rad/s x 0.08 s from the last reading of its joint is brought that near, as the original's
    robot does; this is part of the physics, not of the action's range.

    Observation, float32; every reading has uniform noise, 0.1 x +-0.1 for the robot's joints, 0.1 x +-0.0005 to 0.1
    for the objects, a function of the seed and the step alone:

    | observation | index        | meaning                                        | unit   | XML name              |
    |-------------|--------------|------------------------------------------------|--------|-----------------------|
    | "state"     | 0 to 6       | joints of the arm                              | rad    | robot:panda0_joint1-7 |
    |             | 7 8          | fingers                                        | m      | robot:panda0_finger_* |
    |             | 9 11 13 15   | knobs of burners: bottom right, left; top      | rad    | knob_Joint_1-4        |
    |             | 10 12 14 16  | the burners, which follow                      | m      | *_burner              |
    |             | 17 18        | light switch, light                            | rad, m | light_switch, _joint  |
    |             | 19           | slide cabinet                                  | m      | slide_cabinet         |
    |             | 20 21        | hinge cabinet: left and right door             | rad    | *_hinge_cabinet       |
    |             | 22           | door of the microwave                          | rad    | microwave             |
    |             | 23 to 29     | kettle: position, quaternion (w first)         | m, 1   | kettle                |
    |             | 30 to 59     | zeros (a masked goal)                          |        |                       |
    | "image"     | `image`      | uint8 [96, 96, 3], the whole kitchen           |        | left_cap              |
    |             | `state`      | entries 0 to 8                                 |        |                       |

    Reward: the number of things completed by this step, each once, read with noise. Score: completed / 7. Phases p1
    to p4: one to four things completed, in any order, so that success means four; `phases` stops at four, and the
    info's `completed` names all of them in their order. The episode ends when all seven are complete.

    The initial state is the same for every seed, which says the noise; `reset(options={"qpos": [30], "qvel": [29]})`
    begins elsewhere, such as where a demonstration begins (`qvel` is zero if left out).

    Args:
        observation, render_mode, on_divergence: as for every `envs.task.Task`.

    Raises:
        ModuleNotFoundError: gymnasium-robotics is not installed.
    """

    CONTROL_HZ: ClassVar[float] = 1 / CONTROL_DT_S
    MAX_STEPS: ClassVar[int] = 280
    PHASES: ClassVar[tuple[str, ...]] = ("p1", "p2", "p3", "p4")
    RENDER_CAMERA: ClassVar[str] = CAMERA
    IMAGE_SIZE: ClassVar[tuple[int, int]] = (96, 96)
    PROPRIOCEPTION_NAMES: ClassVar[tuple[str, ...]] = (
        *(f"arm_joint_{number}" for number in range(1, 8)),
        "finger_1",
        "finger_2",
    )
    STATE_NAMES: ClassVar[tuple[str, ...]] = (
        *PROPRIOCEPTION_NAMES,
        *("bottom_right_knob", "bottom_right_burner", "bottom_left_knob", "bottom_left_burner"),
        *("top_right_knob", "top_right_burner", "top_left_knob", "top_left_burner"),
        *("light_switch", "light", "slide_cabinet", "left_hinge_cabinet", "right_hinge_cabinet", "microwave"),
        *(f"kettle_{coordinate}" for coordinate in ("x", "y", "z", "quat_w", "quat_x", "quat_y", "quat_z")),
        *(f"masked_goal_{index}" for index in range(GOAL_ENTRIES)),
    )

    def __init__(self, *, observation: Observation = "state", **keywords: Any) -> None:
        super().__init__(model_path(), observation=observation, **keywords)
        self.action_space = spaces.Box(LOW.astype(np.float32), HIGH.astype(np.float32))
        names = self.STATE_NAMES if observation == "state" else self.PROPRIOCEPTION_NAMES
        readings = spaces.Box(-np.inf, np.inf, (len(names),), np.float32)
        if observation == "state":
            self.observation_space = spaces.Dict({"state": readings})
        else:
            image = spaces.Box(0, 255, (*self.IMAGE_SIZE, 3), np.uint8)
            self.observation_space = spaces.Dict({"image": image, "state": readings})
        _prepare_view(self.model)
        self._start_qpos, self._start_qvel = START_QPOS, np.zeros(self.model.nv)
        self._reading = START_QPOS.copy()  # last one of qpos, with its noise
        self._completed: list[int] = []  # indices of ELEMENTS, in their order
        self._new = 0  # completed by the last step

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: says the noise of the readings; without it, one is drawn from `np_random`.
            options: `qpos` [30] and `qvel` [29] of the initial state, instead of the usual one.

        Raises:
            ValueError: another option, or one of a wrong shape or not finite.
            PhysicsError: the simulation diverges before it begins.

        Returns:
            Observation and info.
        """
        start = dict(options or {})
        self._start_qpos = _vector("qpos", start.pop("qpos", START_QPOS), self.model.nq)
        self._start_qvel = _vector("qvel", start.pop("qvel", np.zeros(self.model.nv)), self.model.nv)
        return super().reset(seed=seed, options=start)

    def _reset(self, seed: int) -> None:
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = self._start_qpos, self._start_qvel
        mujoco.mj_forward(self.model, self.data)
        self._completed, self._new = [], 0
        self._read(seed, 0)

    def _control(self, action: np.ndarray) -> None:
        self.data.ctrl[:] = feasible_target(action, self._reading[:ROBOT_JOINTS])
        self.simulate(PHYSICS_STEPS)
        self._read(self.seed, self.steps + 1)
        new = [
            index
            for index, element in enumerate(ELEMENTS)
            if index not in self._completed and is_complete(element, self._reading)
        ]
        self._completed += new
        self._new = len(new)

    def _read(self, seed: int, step: int) -> None:
        noise = np.random.default_rng((seed, step)).uniform(-1.0, 1.0, COORDINATES)
        self._reading = self.data.qpos + NOISE_RATIO * NOISE_AMPLITUDES * noise

    def _observe(self) -> dict[str, np.ndarray]:
        if self.observation == "state":
            return {"state": np.concatenate([self._reading, np.zeros(GOAL_ENTRIES)]).astype(np.float32)}
        blank = np.zeros((*self.IMAGE_SIZE, 3), np.uint8)
        image = self.image(self.RENDER_CAMERA, *self.IMAGE_SIZE) if self.draws_images else blank
        return {"image": image, "state": self._reading[:ROBOT_JOINTS].astype(np.float32)}

    def _outcome(self) -> Outcome:
        completed = len(self._completed)
        return Outcome(
            reward=self._new,
            score=completed / len(ELEMENTS),
            phases=min(completed, len(self.PHASES)),
            terminated=completed == len(ELEMENTS),
        )

    def _details(self) -> dict[str, Any]:
        return {"completed": self.completed()}

    def completed(self) -> list[str]:
        """Names of the elements completed so far, in their order."""
        return [ELEMENTS[index].name for index in self._completed]

    def _get_state(self) -> dict[str, np.ndarray]:
        return {
            **super()._get_state(),
            "reading": self._reading.copy(),
            "completed": np.array(self._completed, np.int64),
        }

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        super()._set_state(state)
        self._reading = np.array(state["reading"])
        self._completed, self._new = [int(index) for index in state["completed"]], 0


def is_complete(element: Element, qpos: Vector) -> bool:
    """Whether an element is within 0.3 of its goal."""
    return float(np.linalg.norm(qpos[element.coordinates] - np.array(element.goal))) < COMPLETION_DISTANCE


def feasible_target(action: Vector, joints: Vector) -> Vector:
    """Joint targets [9] that respect the largest speed from the joints' last reading [9], and then the ranges."""
    speed = np.clip((action - joints) / CONTROL_DT_S, -LARGEST_SPEED, LARGEST_SPEED)
    return np.clip(joints + speed * CONTROL_DT_S, LOW, HIGH)


def model_path() -> Path:
    """gymnasium-robotics' MJCF of the kitchen; the package is looked for, not imported.

    Raises:
        ModuleNotFoundError: gymnasium-robotics is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        message = f"the kitchen needs {PACKAGE}, which is not installed: pip install -e '.[simulators]'"
        raise ModuleNotFoundError(message, name=PACKAGE)
    return Path(found.origin).parent / MODEL


def _prepare_view(model: mujoco.MjModel) -> None:
    """Move the file's camera; leave out shadows and reflections, which cost a CPU 1 s per picture."""
    camera = model.camera(CAMERA)
    camera.pos[:], camera.quat[:], camera.fovy[:] = CAMERA_POSITION_M, CAMERA_QUATERNION, CAMERA_FIELD_DEG
    model.vis.global_.offwidth = model.vis.global_.offheight = PICTURE_SIZE
    model.vis.quality.offsamples = 4
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0


def _vector(name: str, values: Any, size: int) -> Vector:
    vector = np.array(values, np.float64)
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise ValueError(f"{name} must be {size} finite numbers, got {values}")
    return vector
