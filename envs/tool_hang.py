"""Put a hook into its stand and hang a tool on it (robosuite's ToolHang)."""

from envs.robosuite_task import RobosuiteTask

_POSE = {"_to_robot0_eef_pos": "xyz", "_to_robot0_eef_quat": "xyzw", "_pos": "xyz", "_quat": "xyzw"}


class ToolHang(RobosuiteTask):
    """Solved while the frame with the hook stands in the stand and the tool hangs on it, let go of.

    The stand (base) is fixed; frame and tool start within 2 cm and 10 degrees of where they lie beside it.

    Observation `state`, float32:

    | index    | meaning                                             | unit | XML name                         |
    |----------|-----------------------------------------------------|------|----------------------------------|
    | 0 to 2   | foot of the stand in the hand's frame: x, y, z      | m    | `stand_base`                     |
    | 3 to 6   | foot of the stand in the hand's frame: quaternion   | 1    | `stand_base`                     |
    | 7 to 9   | foot of the stand: x, y, z                          | m    | `stand_base`                     |
    | 10 to 13 | foot of the stand: quaternion                       | 1    | `stand_base`                     |
    | 14 to 16 | corner of the frame in the hand's frame: x, y, z    | m    | `frame_intersection_site`        |
    | 17 to 20 | corner of the frame in the hand's frame: quaternion | 1    | `frame_intersection_site`        |
    | 21 to 23 | corner of the frame: x, y, z                        | m    | `frame_intersection_site`        |
    | 24 to 27 | corner of the frame: quaternion                     | 1    | `frame_intersection_site`        |
    | 28 to 30 | tool in the hand's frame: x, y, z                   | m    | `tool_root`                      |
    | 31 to 34 | tool in the hand's frame: quaternion                | 1    | `tool_root`                      |
    | 35 to 37 | tool: x, y, z                                       | m    | `tool_root`                      |
    | 38 to 41 | tool: quaternion                                    | 1    | `tool_root`                      |
    | 42       | 1 where the frame stands in the stand, else 0       |      |                                  |
    | 43       | 1 where the tool hangs on the frame, else 0         |      |                                  |
    | 44 to 46 | gripper: x, y, z                                    | m    | `gripper0_right_grip_site`       |
    | 47 to 50 | hand: quaternion                                    | 1    | `robot0_right_hand`              |
    | 51 52    | fingers: 0 to 0.04, -0.04 to 0                      | m    | `gripper0_right_finger_joint1`/2 |

    With `observation="image"`: `sideview` and `robot0_eye_in_hand`, uint8 [240, 240, 3] each, and entries 44 to 52 as
    `state`. Actions, reward and score are those of every RobosuiteTask.
    """

    MAX_STEPS = 700
    PHASES = ("hang",)
    ROBOSUITE_NAME = "ToolHang"
    OBJECT_STATE = {body + entry: names for body in ("base", "frame", "tool") for entry, names in _POSE.items()} | {
        "frame_is_assembled": "",
        "tool_on_frame": "",
    }
    CAMERAS = {"sideview": 240, "robot0_eye_in_hand": 240}
    RENDER_CAMERA = "sideview"
