"""A scripted expert for ToolHang: stand the frame up in its stand, then put the tool's ring over the hook's lip.

The arm steers the grasped object, not itself: an object that turns between the fingers is corrected on the way.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from scipy.spatial.transform import Rotation

from envs.experts.gripper_script import CLOSE, OPEN, Float, GripperScript, Moves, fixed, from_above, is_near
from envs.robosuite_task import Pose

DROP_STEPS: Final = 6  # objects start a little above the table
CLOSING_STEPS: Final = 10
OPENING_STEPS: Final = 14
FRAME_GRIP_M: Final = (0.04375, 0.0, 0.0525)  # the middle of its foam, in the frame's frame
TIP_M: Final = (0.04375, 0.0, -0.1344)  # the rod's lower end
HOLE_M: Final = (0.0, 0.045, 0.08)  # the middle of its upper end, in the stand's frame
STANDING_Z_M: Final = 0.815  # of the frame's tip: earlier, letting go pulls the frame out again
LOWER_M: Final = 0.012  # of the frame, per step
ABOVE_TOOL_Z_M: Final = 1.1
LIP_M: Final = (-0.04375, 0.0, 0.102)  # the middle of its upper end, in the frame's frame
RING_M: Final = (-0.0935, 0.0, 0.0)  # the middle of the larger ring, in the tool's frame
# The tool's handle, seen from the ring over the lip, points away from the stand, so far aside and so far down. Of some
# tens of tools let go of like this, most hang, as do 8 of 10 at 30 degrees aside and 20 down; at 0, 45, 60 or 90 aside,
# or 10 or 25 down, hardly any does.
BEARING_DEG: Final = 15.0
TILT_DEG: Final = 20.0
LOWERED_M: Final = 0.006  # of the ring's middle below the lip's upper end, where the tool is let go of; and per step
SERVO_GAIN: Final = 2.0
MOST_TURN_RAD: Final = 0.5  # at once: the shift that keeps a point in its place is of this turn


class ToolHangExpert(GripperScript):
    """Assemble and hang; the episodes that fail lose the tool when they let go of it."""

    def _draw(self, np_random: np.random.Generator) -> None:
        self._speed = np_random.uniform(0.8, 1.0)
        self._frame_grip_m = np_random.uniform(-0.008, 0.008)  # along the grip, from its middle
        self._tool_grip_m = np_random.uniform(-0.01, 0.01)
        self._home = self.task.gripper_pose()
        self._bearing_deg = BEARING_DEG + np_random.uniform(-3, 3)
        self._tilt_deg = TILT_DEG + np_random.uniform(-2, 2)

    def _script(self) -> Moves:
        yield from self._hold(DROP_STEPS, OPEN)
        yield from self._stand_up_frame()
        yield from self._fetch_tool()
        yield from self._hang_tool()

    # ---- the frame

    def _stand_up_frame(self) -> Moves:
        grip = np.array(FRAME_GRIP_M) + [0, 0, self._frame_grip_m]
        yield from self._grasp("frame_root", grip, across=0)
        yield from self._lift(0.22)
        hole = self._point("stand_root", HOLE_M)
        upright = np.eye(3)  # the arm of the hook, at the frame's -x, points to the robot
        tip = np.array(TIP_M)
        yield from self._carry("frame_root", tip, lambda: hole + [0, 0, 0.10], upright, within_m=0.03, within_rad=0.15)
        yield from self._carry("frame_root", tip, lambda: hole + [0, 0, 0.03], upright, within_m=0.003, within_rad=0.05)
        for _ in range(60):
            at = self._point("frame_root", tip)
            if at[2] < STANDING_Z_M:
                break
            yield self._steer("frame_root", tip, np.array([hole[0], hole[1], at[2] - LOWER_M]), upright)
        yield from self._hold(OPENING_STEPS, OPEN)
        yield from self._back_off(0.06, 0.3)

    # ---- the tool

    def _fetch_tool(self) -> Moves:
        yield from self._back_off(0.06, 0.6)
        # High over the tool, out of the frame's way, with the wrist as in the beginning: else it ends in a bad branch.
        x, y, _ = self._point("tool_root", (0.0, 0.0, 0.0))
        above = Pose(np.array([x, y, ABOVE_TOOL_Z_M]), self._home.rotation)
        yield from self._reach(fixed(above), OPEN, speed=self._speed, within_m=0.05, within_rad=0.15)
        yield from self._grasp("tool_root", np.array([self._tool_grip_m, 0.0, 0.0]), across=1)
        yield from self._lift(0.25)

    def _hang_tool(self) -> Moves:
        ring = np.array(RING_M)
        arm = -self._rotation("frame_root")[:, 0]
        bearing = np.arctan2(arm[1], arm[0]) + np.radians(self._bearing_deg)
        handle = np.array([np.cos(bearing), np.sin(bearing), 0.0])  # from the ring
        flat = np.stack([handle, np.cross([0.0, 0.0, 1.0], handle), [0.0, 0.0, 1.0]], axis=1)
        tilt = Rotation.from_rotvec(np.radians(self._tilt_deg) * np.cross(handle, [0, 0, -1.0])).as_matrix()
        hanging = tilt @ flat

        def over_lip(above_m: float) -> Callable[[], Float]:
            return lambda: self._point("frame_root", LIP_M) + [0, 0, above_m]

        yield from self._carry("tool_root", ring, over_lip(0.06), hanging, within_m=0.02, within_rad=0.15)
        yield from self._carry("tool_root", ring, over_lip(0.02), hanging, within_m=0.003, within_rad=0.06)
        for _ in range(40):
            lip, at = self._point("frame_root", LIP_M), self._point("tool_root", ring)
            if at[2] < lip[2] - LOWERED_M:
                break
            yield self._steer("tool_root", ring, np.array([lip[0], lip[1], at[2] - LOWERED_M]), hanging)
        yield from self._hold(OPENING_STEPS, OPEN)
        yield from self._back_off(0.08, 0.3)

    # ---- moves with an object

    def _grasp(self, body: str, point: Float, across: int) -> Moves:
        """Grasp an object that lies on the table at a point of it, closing along one of its axes."""

        def goal(above_m: float) -> Pose:
            closing = self._rotation(body)[:, across]
            rotation = from_above(closing, self.task.gripper_pose().rotation)
            return Pose(self._point(body, point) + [0, 0, above_m], rotation)

        yield from self._reach(lambda: goal(0.10), OPEN, speed=self._speed, within_m=0.015, within_rad=0.08)
        yield from self._reach(lambda: goal(0.0), OPEN, speed=self._speed, within_m=0.005, within_rad=0.08)
        yield from self._hold(CLOSING_STEPS, CLOSE)

    def _lift(self, height_m: float) -> Moves:
        position, rotation = self.task.gripper_pose()
        goal = Pose(position + [0, 0, height_m], rotation)
        yield from self._reach(fixed(goal), CLOSE, speed=self._speed, within_m=0.03, within_rad=0.3)

    def _carry(
        self,
        body: str,
        point: Float,
        target: Callable[[], Float],
        rotation: Float,
        *,
        within_m: float,
        within_rad: float,
        most_steps: int = 100,
    ) -> Moves:
        """Bring a point of the grasped object to a place, and the object to a rotation."""
        for _ in range(most_steps):
            now = Pose(self._point(body, point), self._rotation(body))
            if is_near(now, Pose(target(), rotation), within_m, within_rad):
                return
            yield self._steer(body, point, target(), rotation)

    def _steer(self, body: str, point: Float, target: Float, rotation: Float) -> Float:
        """The delta action [7] that brings a point of the grasped object to a place."""
        gripper = self.task.gripper_pose()
        at = self._point(body, point)
        turn = Rotation.from_matrix(rotation @ self._rotation(body).T)
        turn_now = Rotation.from_rotvec(turn.as_rotvec() * min(1.0, MOST_TURN_RAD / max(turn.magnitude(), 1e-9)))
        # Around the point, at the rate at which the gripper turns now.
        shift = target - at + turn_now.apply(gripper.position - at) - (gripper.position - at)
        goal = Pose(gripper.position + SERVO_GAIN * shift, (turn_now**SERVO_GAIN).as_matrix() @ gripper.rotation)
        return self._towards(goal, CLOSE, self._speed, turning=0.5)

    def _back_off(self, distance_m: float, speed: float) -> Moves:
        """Draw the open hand back, against its direction of approach."""
        position, rotation = self.task.gripper_pose()
        goal = Pose(position - distance_m * rotation[:, 2], rotation)
        yield from self._reach(fixed(goal), OPEN, speed=speed, within_m=0.01, within_rad=0.3)

    # ---- where things are

    def _rotation(self, body: str) -> Float:
        return self.task.data.body(body).xmat.reshape(3, 3).copy()

    def _point(self, body: str, point: tuple[float, ...] | Float) -> Float:
        """Where a point of a body is in the world."""
        return self.task.data.body(body).xpos + self._rotation(body) @ np.asarray(point)
