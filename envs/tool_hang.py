"""Put a hook into its stand and hang a tool on it (robosuite's ToolHang)."""

from envs.robosuite_task import RobosuiteTask

_POSE = {"_to_robot0_eef_pos": "xyz", "_to_robot0_eef_quat": "xyzw", "_pos": "xyz", "_quat": "xyzw"}


class ToolHang(RobosuiteTask):
    """Solved while the frame with the hook stands in the stand and the tool hangs on it, let go of.

    The stand (base) is fixed; frame and tool start within 2 cm and 10 degrees of where they lie beside it.
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
