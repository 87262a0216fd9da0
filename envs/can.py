"""Put a can into its compartment of the other bin (robosuite's PickPlaceCan)."""

from envs.robosuite_task import RobosuiteTask


class Can(RobosuiteTask):
    """Solved while the can is in its quarter of the right bin and the gripper has let go of it.

    The can starts anywhere in the left bin.

    Observation `state`, float32:

    | index    | meaning                             | unit | XML name                         |
    |----------|-------------------------------------|------|----------------------------------|
    | 0 to 2   | can in the hand's frame: x, y, z    | m    | `Can_main`                       |
    | 3 to 6   | can in the hand's frame: quaternion | 1    | `Can_main`                       |
    | 7 to 9   | can: x, y, z                        | m    | `Can_main`                       |
    | 10 to 13 | can: quaternion                     | 1    | `Can_main`                       |
    | 14 to 16 | gripper: x, y, z                    | m    | `gripper0_right_grip_site`       |
    | 17 to 20 | hand: quaternion                    | 1    | `robot0_right_hand`              |
    | 21 22    | fingers: 0 to 0.04, -0.04 to 0      | m    | `gripper0_right_finger_joint1`/2 |

    With `observation="image"`: `agentview` and `robot0_eye_in_hand`, uint8 [84, 84, 3] each, and entries 14 to 22 as
    `state`. Actions, reward and score are those of every RobosuiteTask.
    """

    MAX_STEPS = 400
    PHASES = ("place",)
    ROBOSUITE_NAME = "PickPlaceCan"
    OBJECT_STATE = {
        "Can_to_robot0_eef_pos": "xyz",
        "Can_to_robot0_eef_quat": "xyzw",
        "Can_pos": "xyz",
        "Can_quat": "xyzw",
    }
    CAMERAS = {"agentview": 84, "robot0_eye_in_hand": 84}
