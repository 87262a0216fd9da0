"""Put a can into its compartment of the other bin (robosuite's PickPlaceCan)."""

from envs.robosuite_task import RobosuiteTask


class Can(RobosuiteTask):
    """Solved while the can is in its quarter of the right bin and the gripper has let go of it.

    The can starts anywhere in the left bin.
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
