"""Kitchen's expert: four of five things in a random order, by way-points of the hand and inverse kinematics."""

from collections.abc import Callable
from typing import Final, NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.kitchen import CONTROL_DT_S, HIGH, LOW, START_QPOS, Kitchen
from envs.task import Task

Vector = NDArray[np.float64]

ARM_JOINTS: Final = 7
SITE: Final = "end_effector"  # its z axis points forward, its y axis along the fingers' opening
FORWARD: Final = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # the hand looks along the world's y
OPEN_M: Final = 0.04
ELEMENTS_PER_EPISODE: Final = 4

# Inverse kinematics.
STEP_M: Final = 0.02  # between solutions along a straight line
LEVER_M: Final = 0.15  # a turn of 1 rad takes as long as a way of this length
STEP_RAD: Final = 0.1  # between points of a way in the joints' space
NEAR_ITERATIONS: Final = 6
FAR_ITERATIONS: Final = 60
DAMPING: Final = 1e-3
LARGEST_UPDATE_RAD: Final = 0.2
TURN_WEIGHTS_M: Final = np.array([0.05, 0.05, 0.2])  # up, sideways, forward axis: the hand may tilt, but not roll
REST_GAIN: Final = 0.03
RANGE_MARGIN_RAD: Final = 0.02

# What a motor's force leaves for speed (a joint's damping takes it all at 0.65 to 1.2 rad/s).
EFFORT: Final = (0.75, 0.88)
SPEED_M: Final = (0.045, 0.06)  # per step of 80 ms, at most


class Waypoint(NamedTuple):
    """Where the hand's site goes on a straight line, and how."""

    position: tuple[float, float, float]
    pitch: float = 0.0  # rad, about the world's x: below zero the hand looks down
    yaw: float = 0.0  # rad, about the vertical
    fingers: float = 0.0  # m, how far each is opened
    speed: float = 1.0  # m per step, at most
    hold: int = 0  # steps of rest at the end


Primitive = Callable[[Kitchen, np.random.Generator], list[Waypoint]]


def push_kettle(task: Kitchen, np_random: np.random.Generator) -> list[Waypoint]:
    """Push the kettle's body over to the far burner with closed fingers."""
    x, y = task.data.body("kettle").xpos[:2] + np_random.uniform([-0.025, 0.0], [-0.005, 0.0])
    end = np_random.uniform(0.42, 0.47)
    return [
        Waypoint((x, min(y - 0.20, 0.18), 1.75), pitch=-0.4),
        Waypoint((x, 0.30, 1.75), pitch=-0.5),
        Waypoint((x, end, 1.75), pitch=-0.6),
        Waypoint((x, 0.32, 1.80), pitch=-0.5),
    ]


def turn_burner(task: Kitchen, np_random: np.random.Generator) -> list[Waypoint]:
    """Push the upper end of the bottom knob's blade to the right."""
    x, _, z = task.data.xanchor[task.model.joint("knob_Joint_2").id]
    y, above = np_random.uniform(0.593, 0.605), np_random.uniform(0.038, 0.042)
    left = x - np_random.uniform(0.045, 0.06)
    return [
        Waypoint((left, 0.45, z + above)),
        Waypoint((left, y, z + above)),
        Waypoint((x + 0.12, y, z + above), speed=0.02, hold=3),
        Waypoint((x + 0.016, 0.45, z + 0.04)),
    ]


def flip_switch(task: Kitchen, np_random: np.random.Generator) -> list[Waypoint]:
    """Push the light's switch to the left."""
    x, _, z = task.data.body("lightswitchroot").xpos + task.model.site("light_site").pos  # of the switch turned off
    y, above = np_random.uniform(0.58, 0.59), np_random.uniform(0.008, 0.015)
    return [
        Waypoint((x + 0.095, 0.45, z + above)),
        Waypoint((x + 0.095, y, z + above)),
        Waypoint((x - np_random.uniform(0.08, 0.10), y, z + above)),
        Waypoint((x - 0.07, 0.45, z + above)),
    ]


def slide_cabinet(task: Kitchen, np_random: np.random.Generator) -> list[Waypoint]:
    """Push the handle of the sliding door to the right."""
    x, _, z = task.data.site("slide_site").xpos
    y, height = np_random.uniform(0.595, 0.605), z + np_random.uniform(-0.05, 0.02)
    end = x + np_random.uniform(0.10, 0.18)
    return [
        Waypoint((x - 0.11, 0.45, height)),
        Waypoint((x - 0.11, y, height)),
        Waypoint((end, y, height)),
        Waypoint((end - 0.03, 0.45, height)),
    ]


def open_microwave(task: Kitchen, np_random: np.random.Generator) -> list[Waypoint]:
    """Grasp the handle of the microwave and pull it along its arc."""
    hinge = task.data.xanchor[task.model.joint("microwave").id]
    handle = task.data.site("microhandle_site").xpos - hinge
    yaw, pitch = np_random.uniform(0.0, 0.4), np_random.uniform(-0.6, -0.4)
    forward = np.array([-np.sin(yaw), np.cos(yaw), 0.0])

    def at(angle: float, distance: float) -> tuple[float, float, float]:
        """In front of the handle, when the door has been turned by an angle."""
        cosine, sine = np.cos(angle), np.sin(angle)
        turned = np.array([cosine * handle[0] - sine * handle[1], sine * handle[0] + cosine * handle[1], 0.068])
        x, y, z = hinge + turned - distance * forward
        return x, y, z

    end = np_random.uniform(-0.68, -0.60)
    grasp = 0.01
    return [
        Waypoint(at(0.0, 0.13), pitch, yaw, OPEN_M),
        Waypoint(at(0.0, grasp), pitch, yaw, OPEN_M),
        Waypoint(at(0.0, grasp), pitch, yaw, hold=4),
        *(Waypoint(at(angle, grasp), pitch, yaw, speed=0.02) for angle in np.linspace(0.0, end, 9)[1:]),
        Waypoint(at(end, grasp), pitch, yaw, OPEN_M, hold=2),
        Waypoint(at(end, 0.11), pitch, yaw, OPEN_M),
    ]


PRIMITIVES: Final[dict[str, Primitive]] = {
    "kettle": push_kettle,
    "bottom burner": turn_burner,
    "light switch": flip_switch,
    "slide cabinet": slide_cabinet,
    "microwave": open_microwave,
}


class KitchenExpert:
    """Completes four elements, one after the other; an element that was missed is tried again at the end.

    The plan is the order, drawn from the orders of four of PRIMITIVES, with its speed and details of the way-points.
    An element's way becomes joint targets when it is begun: damped least squares along straight lines, timed by what
    the motors can do, and ahead of the joints by what gravity and damping take.

    Args:
        task: a Kitchen, after its reset.
        np_random: the plan is drawn from it.
        order: the elements to complete instead of a drawn order.

    Raises:
        TypeError: the task is no Kitchen.
    """

    def __init__(self, task: Task, np_random: np.random.Generator, *, order: list[str] | None = None) -> None:
        if not isinstance(task, Kitchen):
            raise TypeError(f"the kitchen's expert needs a Kitchen, got {task}")
        self._task, self._np_random = task, np_random
        drawn = np_random.permutation(list(PRIMITIVES))[:ELEMENTS_PER_EPISODE]
        self.order = list(order) if order is not None else [str(name) for name in drawn]
        self._effort = np_random.uniform(*EFFORT)
        self._speed = np_random.uniform(*SPEED_M)
        self._arm = _Arm(task)
        self._waiting: list[str] = list(self.order)
        self._targets: list[Vector] = []
        self._last = np.clip(task.data.qpos[:9], LOW, HIGH)

    def action(self) -> Vector:
        """Targets of the joints [9] now; the last ones again when nothing is left to do."""
        if not self._targets:
            self._begin_next()
        if self._targets:
            self._last = self._targets.pop(0)
        return self._last.copy()

    def _begin_next(self) -> None:
        completed = self._task.completed()
        self._waiting = [name for name in self._waiting or self.order if name not in completed]
        if not self._waiting:
            return
        first, *rest = PRIMITIVES[self._waiting.pop(0)](self._task, self._np_random)
        self._targets += self._arm.approach(first, self._effort)
        for waypoint in rest:
            self._targets += self._arm.move(waypoint, self._effort, min(self._speed, waypoint.speed))


class _Arm:
    """The arm's reference motion: positions its joints should have, in a second simulation used for kinematics."""

    def __init__(self, task: Kitchen) -> None:
        self._model = task.model
        self._data = mujoco.MjData(task.model)
        self._data.qpos[:] = task.data.qpos
        self._site = self._model.site(SITE).id
        self._low = self._model.jnt_range[:ARM_JOINTS, 0] + RANGE_MARGIN_RAD
        self._high = self._model.jnt_range[:ARM_JOINTS, 1] - RANGE_MARGIN_RAD
        self._gain = self._model.actuator_gainprm[:ARM_JOINTS, 0]
        self._force = self._model.actuator_forcerange[:ARM_JOINTS, 1]
        self._damping = self._model.dof_damping[:ARM_JOINTS]
        self._rest = np.clip(START_QPOS[:ARM_JOINTS], self._low, self._high)
        self.joints = np.clip(task.data.qpos[:ARM_JOINTS], self._low, self._high)
        self._place(self.joints)
        self._position = self._data.site_xpos[self._site].copy()
        self._turn = np.zeros(2)  # pitch, yaw

    def approach(self, waypoint: Waypoint, effort: float) -> list[Vector]:
        """Targets [9] for the control steps to a way-point, straight in the joints' space, to one posture for all."""
        self._position, self._turn = np.array(waypoint.position), np.array([waypoint.pitch, waypoint.yaw])
        goal = self._solve(self._rest, self._position, _orientation(*self._turn), FAR_ITERATIONS)
        count = max(1, int(np.ceil(np.abs(goal - self.joints).max() / STEP_RAD)))
        joints = np.linspace(self.joints, goal, count + 1)
        self.joints = goal
        durations = [self._duration(old, new, effort) for old, new in zip(joints[:-1], joints[1:], strict=True)]
        return self._targets(joints, durations, waypoint)

    def move(self, waypoint: Waypoint, effort: float, speed: float) -> list[Vector]:
        """Targets [9] for the control steps to a way-point, along a straight line of the hand."""
        from_position, from_turn = self._position, self._turn
        self._position, self._turn = np.array(waypoint.position), np.array([waypoint.pitch, waypoint.yaw])
        way, turn = self._position - from_position, self._turn - from_turn
        length = max(float(np.linalg.norm(way)), LEVER_M * float(np.abs(turn).max()))
        count = max(1, int(np.ceil(length / STEP_M)))
        joints, durations = [self.joints], []
        for part in np.linspace(0.0, 1.0, count + 1)[1:]:
            orientation = _orientation(*(from_turn + part * turn))
            joints.append(self._solve(joints[-1], from_position + part * way, orientation, NEAR_ITERATIONS))
            durations.append(max(self._duration(joints[-2], joints[-1], effort), length / count / speed))
        self.joints = joints[-1]
        return self._targets(np.stack(joints), durations, waypoint)

    def _duration(self, old: Vector, new: Vector, effort: float) -> float:
        """Control steps from some joints to others at the speed that a part of the motors' force allows."""
        fastest = effort * (self._force - np.abs(self._gravity(new))) / self._damping * CONTROL_DT_S
        return float((np.abs(new - old) / fastest).max())

    def _targets(self, joints: Vector, durations: list[float], waypoint: Waypoint) -> list[Vector]:
        """Targets [9] for the control steps along joints [N + 1, 7], whose ways take durations [N], and the rest."""
        times = np.concatenate([[0.0], np.cumsum(durations)])
        moments = np.linspace(0.0, times[-1], max(1, int(np.ceil(times[-1]))) + 1)[1:]
        path = np.stack([np.interp(moments, times, column) for column in joints.T], axis=1)  # [steps, 7]
        path = np.concatenate([path, np.repeat(path[-1:], waypoint.hold, axis=0)])
        speeds = np.diff(path, axis=0, prepend=joints[:1]) / CONTROL_DT_S
        arm = [place + self._lead(place, speed) for place, speed in zip(path, speeds, strict=True)]
        return [np.clip([*target, waypoint.fingers, waypoint.fingers], LOW, HIGH) for target in arm]

    def _lead(self, joints: Vector, speeds: Vector) -> Vector:
        """How far a position motor's target is ahead of its joint to hold gravity and damping: force / gain."""
        return (self._gravity(joints) + self._damping * speeds) / self._gain

    def _solve(self, start: Vector, position: Vector, orientation: Vector, iterations: int) -> Vector:
        """Joints [7] near others that bring the site to a pose; damped least squares."""
        joints = start
        jacobian = np.zeros((6, self._model.nv))
        for _ in range(iterations):
            self._place(joints)
            mujoco.mj_jacSite(self._model, self._data, jacobian[:3], jacobian[3:], self._site)
            turn = _rotation_vector(orientation @ self._data.site_xmat[self._site].reshape(3, 3).T)
            error = np.concatenate(
                [position - self._data.site_xpos[self._site], TURN_WEIGHTS_M * (orientation.T @ turn)]
            )
            rows = np.concatenate([jacobian[:3], TURN_WEIGHTS_M[:, None] * (orientation.T @ jacobian[3:])])
            rows = rows[:, :ARM_JOINTS]
            inverse = rows.T @ np.linalg.inv(rows @ rows.T + DAMPING * np.eye(6))
            rest = REST_GAIN * (self._rest - joints)
            update = inverse @ error + rest - inverse @ (rows @ rest)
            joints = np.clip(joints + np.clip(update, -LARGEST_UPDATE_RAD, LARGEST_UPDATE_RAD), self._low, self._high)
        return joints

    def _gravity(self, joints: Vector) -> Vector:
        """Torques [7] that gravity asks of the motors."""
        self._place(joints)
        torques = np.zeros(self._model.nv)
        mujoco.mj_rne(self._model, self._data, 0, torques)
        return torques[:ARM_JOINTS]

    def _place(self, joints: Vector) -> None:
        self._data.qpos[:ARM_JOINTS] = joints
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)


def _orientation(pitch: float, yaw: float) -> Vector:
    c, s = np.cos(pitch), np.sin(pitch)
    about_x = np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
    c, s = np.cos(yaw), np.sin(yaw)
    about_z = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    rotation: Vector = about_z @ about_x @ FORWARD
    return rotation


def _rotation_vector(rotation: Vector) -> Vector:
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, rotation.flatten())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector
