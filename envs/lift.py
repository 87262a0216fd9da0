"""Lift a cube off the table (robosuite's Lift)."""

from envs.robosuite_task import RobosuiteTask


class Lift(RobosuiteTask):
    """Solved while the cube's centre is more than 4 cm above the table.

    The cube, 4.0 to 4.4 cm long in each direction, lies within 3 cm of the table's middle, turned in any way.
    """

    MAX_STEPS = 400
    PHASES = ("lift",)
    ROBOSUITE_NAME = "Lift"
    OBJECT_STATE = {"cube_pos": "xyz", "cube_quat": "xyzw", "gripper_to_cube_pos": "xyz"}
    CAMERAS = {"agentview": 84, "robot0_eye_in_hand": 84}
    MODEL_IS_DRAWN = True  # the cube's size
