"""Tasks whose world is robosuite's: a Panda arm, its gripper and the objects of one robosuite environment.

robosuite builds the world, samples the initial state, turns an action into torques and says what success is. Resets
that depend on the seed alone, complete states, spaces and pictures are made here. Measured with robosuite 1.5.2 and
MuJoCo 3.9; outcomes of contacts differ between versions.
"""

import logging
import os
from typing import Any, ClassVar, Final, Literal, NamedTuple, get_args

import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from envs.mujoco_task import check_physics, get_physics, set_physics
from envs.offscreen import Offscreen
from envs.rotation import axis_angle_from_rotation_6d, rotation_6d_from_matrix
from envs.task import Outcome, Task


def _import_robosuite() -> Any:
    """robosuite without what importing it does besides: log lines, and a choice of OpenGL in MUJOCO_GL."""
    logging.getLogger("robosuite_logs").addFilter(_is_error)
    chosen = os.environ.get("MUJOCO_GL")
    import robosuite

    if chosen is None:
        os.environ.pop("MUJOCO_GL", None)
    else:
        os.environ["MUJOCO_GL"] = chosen
    return robosuite


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


robosuite = _import_robosuite()

ActionKind = Literal["absolute", "delta"]
Float = NDArray[np.float64]

POSITION_STEP_M: Final = 0.05  # a delta action's 1
ROTATION_STEP_RAD: Final = 0.5
POSITION_LOW_M: Final = (-1.0, -1.0, 0.6)  # of absolute actions: wider than the arm's reach
POSITION_HIGH_M: Final = (1.0, 1.0, 2.0)
VISIBLE_GROUP: Final = 1  # robosuite's group of the geoms that are seen
HIDDEN_GROUP: Final = 3  # MuJoCo draws groups 0 to 2

# Observables of the robot itself, after the task's own in the state.
PROPRIOCEPTION: Final = {"robot0_eef_pos": "xyz", "robot0_eef_quat": "xyzw", "robot0_gripper_qpos": "01"}


class Pose(NamedTuple):
    """Where a body is, in the world's frame."""

    position: Float  # [3] in metres
    rotation: Float  # [3, 3]


class RobosuiteTask(Task):
    """A robosuite task for one Panda arm under operational-space control at 20 Hz.

    Action, float32, where the point between the fingers shall go; the world's x points away from the robot, y to its
    left, z up:

    | action     | index | meaning                                         | range    | unit    | XML name         |
    |------------|-------|-------------------------------------------------|----------|---------|------------------|
    | "delta"    | 0 1 2 | x, y, z, from where it is now                   | -1 to 1  | 5 cm    | grip_site        |
    |            | 3 4 5 | turn about x, y, z (axis times angle), from now | -1 to 1  | 0.5 rad | grip_site        |
    |            | 6     | fingers: positive closes, negative opens        | -1 to 1  | 1       | finger_joint1, 2 |
    | "absolute" | 0 1   | x, y                                            | -1 to 1  | m       | grip_site        |
    |            | 2     | z                                               | 0.6 to 2 | m       | grip_site        |
    |            | 3 4 5 | first row of the rotation matrix                | -1 to 1  | 1       | grip_site        |
    |            | 6 7 8 | second row, not parallel to the first           | -1 to 1  | 1       | grip_site        |
    |            | 9     | fingers: positive closes, negative opens        | -1 to 1  | 1       | finger_joint1, 2 |

    The names in the model begin with gripper0_right_. The site's z is the direction of approach, its x the fingers'
    closing direction. The two rows need not be orthonormal; the first one's direction counts.

    Observation, float32: each task has its own table, in the order of STATE_NAMES; with `observation="image"`, `state`
    is its last nine entries, the robot's own. Positions are in the world where nothing else is said, quaternions
    (x, y, z, w), and no entry has bounds. "In the hand's frame" is from the gripper's site, in the axes of the hand's
    body. robosuite computes such entries from the object's pose of the control step before; here all are of now.

    The reward is 1 where the task is solved and 0 elsewhere; no episode ends before its last step, and its score is its
    largest reward.

    Args:
        action: "absolute" or "delta".
        keywords: of Task.
    """

    CONTROL_HZ = 20.0

    ROBOSUITE_NAME: ClassVar[str]
    OBJECT_STATE: ClassVar[dict[str, str]]  # robosuite's observable -> names of its entries, one character each
    CAMERAS: ClassVar[dict[str, int]]  # camera -> height and width of its square image, in pixels
    MODEL_IS_DRAWN: ClassVar[bool] = False  # the seed changes the model itself, not only its initial state
    STATE_NAMES: ClassVar[tuple[str, ...]]
    PROPRIOCEPTION_NAMES: ClassVar[tuple[str, ...]]
    RENDER_CAMERA: ClassVar[str] = "agentview"
    RENDER_SIZE: ClassVar[int] = 480

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.PROPRIOCEPTION_NAMES = _entry_names(PROPRIOCEPTION)
        cls.STATE_NAMES = _entry_names(cls.OBJECT_STATE) + cls.PROPRIOCEPTION_NAMES

    def __init__(self, *, action: ActionKind = "absolute", **keywords: Any) -> None:
        super().__init__(**keywords)
        if action not in get_args(ActionKind):
            raise ValueError(f"action must be one of {get_args(ActionKind)}, got {action!r}")
        self.action_kind = action
        self.action_space = _action_space(action)
        self.observation_space = self._observation_space()
        self._world = robosuite.make(
            self.ROBOSUITE_NAME,
            robots="Panda",
            controller_configs=_controller(action),
            control_freq=self.CONTROL_HZ,
            ignore_done=True,
            reward_shaping=False,
            hard_reset=self.MODEL_IS_DRAWN,
            renderer="mujoco",
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            seed=0,
        )
        self._substeps = round(1 / (self.CONTROL_HZ * self._world.model_timestep))
        self._offscreen: Offscreen | None = None
        self._model_changed()

    @property
    def model(self) -> mujoco.MjModel:
        """MuJoCo's model; of a task whose model is drawn, another one after each reset."""
        return self._world.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        """MuJoCo's data, up to date with its positions."""
        return self._world.sim.data._data

    # ---- for experts and converters

    def gripper_pose(self) -> Pose:
        """Where the point between the fingers is: z is the direction of approach, x the fingers' closing direction."""
        site = self._world.robots[0].eef_site_id["right"]
        return Pose(self.data.site_xpos[site].copy(), self.data.site_xmat[site].reshape(3, 3).copy())

    def solved(self) -> bool:
        """Whether the present state is one that solves the task."""
        return bool(self._world.reward() > 0)

    def absolute_action(self, delta: ArrayLike) -> NDArray[np.float32]:
        """The absolute action [10] that has the effect of a delta action at the present state.

        Args:
            delta: [7], clipped to [-1, 1] as the controller does.

        Raises:
            ValueError: a wrong shape.
        """
        command = np.asarray(delta, np.float64)
        if command.shape != (7,):
            raise ValueError(f"delta: expected shape (7,), got {command.shape}")
        command = command.clip(-1, 1)
        position, rotation = self.gripper_pose()
        position = position + POSITION_STEP_M * command[:3]
        rotation = Rotation.from_rotvec(ROTATION_STEP_RAD * command[3:6]).as_matrix() @ rotation
        return np.concatenate([position, rotation_6d_from_matrix(rotation), command[6:]]).astype(np.float32)

    def action_from_delta(self, delta: ArrayLike) -> NDArray[np.float32]:
        """The action, of the kind that this task takes, that has the effect of a delta action [7] at the present state.

        Raises:
            ValueError: a wrong shape.
        """
        if self.action_kind == "absolute":
            return self.absolute_action(delta)
        return np.asarray(delta, np.float32).clip(-1, 1)

    def set_simulator_state(self, flat_state: ArrayLike) -> None:
        """Go to a state as demonstrations record it: time, positions and velocities, one after the other.

        Nothing is known of what they leave out, so the controller's rest pose and the fingers' command stay as they
        are, and the solver's warm start is zero.

        Raises:
            ValueError: a length that is not this task's.
        """
        state = np.asarray(flat_state, np.float64)
        nq, nv = self.model.nq, self.model.nv
        if state.shape != (1 + nq + nv,):
            raise ValueError(f"flat_state: expected shape ({1 + nq + nv},) = 1 + {nq} + {nv}, got {state.shape}")
        mujoco.mj_resetData(self.model, self.data)
        self.data.time = state[0]
        self.data.qpos[:] = state[1 : 1 + nq]
        self.data.qvel[:] = state[1 + nq :]
        mujoco.mj_fwdPosition(self.model, self.data)
        self._refresh_controllers()

    def observe(self) -> dict[str, np.ndarray]:
        """The observation of the present state, for states that were set rather than stepped to."""
        return self._observe()

    # ---- Task's hooks

    def _reset(self, seed: int) -> None:
        # The samplers of robosuite hold on to the generator itself, so a new one in its place would change nothing.
        self._world.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._world.reset()
        if self.MODEL_IS_DRAWN:
            self._model_changed()
        self._refresh_controllers()

    def _control(self, action: np.ndarray) -> None:
        # As the step of robosuite's environment does, less its observables, which are asked for when they are needed.
        robot, command = self._world.robots[0], self._command(action)
        for substep in range(self._substeps):
            mujoco.mj_step1(self.model, self.data)
            if self.data.warning.number.any():  # before the controller computes with it
                check_physics(self.data)
            robot.control(command, policy_step=substep == 0)
            mujoco.mj_step2(self.model, self.data)
        mujoco.mj_fwdPosition(self.model, self.data)

    def _observe(self) -> dict[str, np.ndarray]:
        robot = PROPRIOCEPTION if self.observation == "image" else self.OBJECT_STATE | PROPRIOCEPTION
        observation = {"state": self._observables(tuple(robot))}
        if self.observation == "image":
            for camera, size in self.CAMERAS.items():
                blank = np.zeros((size, size, 3), np.uint8)
                observation[camera] = self.image(camera, size) if self.draws_images else blank
        return observation

    def _outcome(self) -> Outcome:
        reward = float(self.solved())
        return Outcome(reward=reward, score=reward, phases=int(reward), terminated=False)

    def _check_physics(self) -> None:
        check_physics(self.data)

    def _get_state(self) -> dict[str, np.ndarray]:
        robot = self._world.robots[0]
        return get_physics(self.data) | {
            "rest_joints": robot.part_controllers["right"].initial_joint.copy(),
            "fingers": np.array(np.broadcast_to(robot.gripper["right"].current_action, 2)),
            "model_seed": np.array(self.seed),
        }

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        if self.MODEL_IS_DRAWN and int(state["model_seed"]) != self.seed:
            self._reset(int(state["model_seed"]))
        set_physics(self.model, self.data, state)
        robot = self._world.robots[0]
        robot.part_controllers["right"].initial_joint = state["rest_joints"].copy()
        robot.gripper["right"].current_action = state["fingers"].copy()
        self._refresh_controllers()

    def _render(self) -> np.ndarray:
        return self.image(self.RENDER_CAMERA, self.RENDER_SIZE)

    def image(self, camera: str, size: int) -> np.ndarray:
        """What a camera sees [size, size, 3] uint8, upright.

        Raises:
            ImportError: there is no OpenGL to draw with.
        """
        if self._offscreen is None:
            self._offscreen = Offscreen(self.model)
        return self._offscreen.image(self.data, camera, size, size)

    def close(self) -> None:
        """Free what drawing needs; the task can be used again."""
        if self._offscreen is not None:
            self._offscreen.close()
        self._offscreen = None

    # ---- parts of the above

    def _observation_space(self) -> spaces.Dict:
        names = self.PROPRIOCEPTION_NAMES if self.observation == "image" else self.STATE_NAMES
        parts: dict[str, spaces.Space[Any]] = {"state": spaces.Box(-np.inf, np.inf, (len(names),), np.float32)}
        if self.observation == "image":
            parts |= {camera: spaces.Box(0, 255, (size, size, 3), np.uint8) for camera, size in self.CAMERAS.items()}
        return spaces.Dict(parts)

    def _command(self, action: np.ndarray) -> np.ndarray:
        """What robosuite's controller takes [7]."""
        if self.action_kind == "delta":
            return action
        return np.concatenate([action[:3], axis_angle_from_rotation_6d(action[3:9]), action[9:]])

    def _observables(self, names: tuple[str, ...]) -> np.ndarray:
        cache: dict[str, Any] = {}
        observables = self._world._observables
        # Relative poses last: they are computed from the others' values in the cache.
        absolute = [name for name in names if "_to_" not in name]
        relative = [name for name in names if "_to_" in name]
        frame = [name for name in observables if name == "world_pose_in_gripper"]
        for name in (*absolute, *frame, *relative):
            observables[name].update(timestep=0.0, obs_cache=cache, force=True)
        return np.concatenate([np.atleast_1d(cache[name]) for name in names]).astype(np.float32)

    def _refresh_controllers(self) -> None:
        # After a reset a controller computes its first torques from what it saw while it was built.
        for controller in self._world.robots[0].part_controllers.values():
            controller.new_update = True

    def _model_changed(self) -> None:
        self.close()
        self.model.geom_group[self.model.geom_group < VISIBLE_GROUP] = HIDDEN_GROUP


def _entry_names(observables: dict[str, str]) -> tuple[str, ...]:
    pairs = ((name, entry) for name, entries in observables.items() for entry in entries or [""])
    return tuple(f"{name}_{entry}" if entry else name for name, entry in pairs)


def _action_space(kind: ActionKind) -> spaces.Box:
    one = np.ones(7, np.float32)
    if kind == "delta":
        return spaces.Box(-one, one)
    return spaces.Box(
        np.concatenate([POSITION_LOW_M, -one]).astype(np.float32),
        np.concatenate([POSITION_HIGH_M, one]).astype(np.float32),
    )


def _controller(kind: ActionKind) -> dict[str, Any]:
    """robosuite's own configuration of the Panda's controller, in the world's frame."""
    config = robosuite.load_composite_controller_config(controller="BASIC", robot="Panda")
    # The base's frame, robosuite's default, puts absolute goals a metre off.
    arm = config["body_parts"]["right"] | {"input_type": kind, "input_ref_frame": "world"}
    return config | {"body_parts": {"right": arm}}
