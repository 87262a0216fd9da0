"""Lift a cube off the table (robosuite's Lift)."""

from envs.robosuite_task import RobosuiteTask


class Lift(RobosuiteTask):
    """Solved while the cube's centre is more than 4 cm above the table.

    The cube, 4.0 to 4.4 cm long in each direction, lies within 3 cm of the table's middle, turned in any way.

    Observation `state`, float32:

    | index    | meaning                                           | unit | XML name                         |
    |----------|---------------------------------------------------|------|----------------------------------|
    | 0 to 2   | cube: x, y, z                                     | m    | `cube_main`                      |
    | 3 to 6   | cube: quaternion                                  | 1    | `cube_main`                      |
    | 7 to 9   | from gripper to cube: x, y, z in the world's axes | m    | both                             |
    | 10 to 12 | gripper: x, y, z                                  | m    | `gripper0_right_grip_site`       |
    | 13 to 16 | hand: quaternion                                  | 1    | `robot0_right_hand`              |
    | 17 18    | fingers: 0 to 0.04, -0.04 to 0                    | m    | `gripper0_right_finger_joint1`/2 |

    With `observation="image"`: `agentview` and `robot0_eye_in_hand`, uint8 [84, 84, 3] each, and entries 10 to 18 as
    `state`. Actions, reward and score are those of every RobosuiteTask.
    """

    MAX_STEPS = 400
    PHASES = ("lift",)
    ROBOSUITE_NAME = "Lift"
    OBJECT_STATE = {"cube_pos": "xyz", "cube_quat": "xyzw", "gripper_to_cube_pos": "xyz"}
    CAMERAS = {"agentview": 84, "robot0_eye_in_hand": 84}
    MODEL_IS_DRAWN = True  # the cube's size
