"""Tasks whose world is a MuJoCo model: loading it, its state, its warnings, its cameras."""

import logging
from pathlib import Path
from typing import Any, ClassVar

import mujoco
import numpy as np

from envs.offscreen import Offscreen
from envs.task import PhysicsError, Task

# What mj_step depends on; the rest of mjData follows from it.
STATE_FIELDS = (
    "time",
    "qpos",
    "qvel",
    "act",
    "ctrl",
    "mocap_pos",
    "mocap_quat",
    "userdata",
    "qfrc_applied",
    "xfrc_applied",
    "eq_active",
    "qacc_warmstart",
)
LARGEST = 1e10  # MuJoCo's own bound on positions and velocities (mjMAXVAL)

# By default MuJoCo appends its warnings to MUJOCO_LOG.TXT in the current directory.
if mujoco.get_mju_user_warning() is None:
    mujoco.set_mju_user_warning(logging.getLogger("mujoco").warning)


def check_physics(data: mujoco.MjData) -> None:
    """Raise PhysicsError if a simulation has diverged.

    MuJoCo itself resets a state with NaN or huge numbers and goes on; it counts that in `data.warning`.
    """
    counters = data.warning.number
    if counters.any():
        kind = int(np.argmax(counters > 0))
        name = mujoco.mjtWarning(kind).name
        raise PhysicsError(f"{name} (entry {data.warning.lastinfo[kind]}) at {data.time:g} s")
    for name in ("qpos", "qvel"):
        values = getattr(data, name)
        if values.size and not np.abs(values).max() < LARGEST:  # NaN compares false
            index = int(np.argmax(~(np.abs(values) < LARGEST)))
            raise PhysicsError(f"{name}[{index}] is {values[index]:g} at {data.time:g} s")


def get_physics(data: mujoco.MjData) -> dict[str, np.ndarray]:
    """Copies of everything the future of a simulation depends on, by mjData's names."""
    return {name: np.array(getattr(data, name)) for name in STATE_FIELDS}


def set_physics(model: mujoco.MjModel, data: mujoco.MjData, state: dict[str, np.ndarray]) -> None:
    """Put a simulation into a state of get_physics, and bring what follows from it up to date."""
    mujoco.mj_resetData(model, data)  # the counters of warnings as well
    data.time = float(state["time"])
    for name in STATE_FIELDS[1:]:
        getattr(data, name)[:] = state[name]
    mujoco.mj_forward(model, data)
    data.qacc_warmstart[:] = state["qacc_warmstart"]  # mj_forward writes its own


class MujocoTask(Task):
    """A task in a MuJoCo model of its own: `self.model` and `self.data`.

    Between control steps all of `data` belongs to the present positions and velocities (`simulate` sees to it), so that
    observations are a function of the state alone. A change of `data.qpos` by hand is followed by `mj_forward`.

    Args:
        model: the MJCF file, a path relative to this folder.
        keywords: of Task.
    """

    RENDER_CAMERA: ClassVar[str] = "overview"  # render()'s
    RENDER_SIZE: ClassVar[tuple[int, int]] = (480, 480)  # height, width

    def __init__(self, model: str | Path, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.model = mujoco.MjModel.from_xml_path(str(Path(__file__).parent / model))
        self.data = mujoco.MjData(self.model)
        self._offscreen: Offscreen | None = None

    def simulate(self, steps: int) -> None:
        """Advance the physics by steps of the model's timestep; raises PhysicsError where it diverges."""
        mujoco.mj_step(self.model, self.data, steps)
        check_physics(self.data)
        self.refresh()

    def refresh(self) -> None:
        """Bring everything that follows from positions and velocities up to date, and change nothing else."""
        warmstart = self.data.qacc_warmstart.copy()
        mujoco.mj_forward(self.model, self.data)
        self.data.qacc_warmstart[:] = warmstart

    def image(self, camera: str, height: int, width: int, *, shadows: bool = True) -> np.ndarray:
        """What a camera sees [height, width, 3] uint8, upright; without shadows it takes less time.

        Raises:
            ImportError: there is no OpenGL to draw with.
        """
        if self._offscreen is None:
            self._offscreen = Offscreen(self.model)
        return self._offscreen.image(self.data, camera, height, width, shadows=shadows)

    def close(self) -> None:
        """Free what drawing needs; the task can be used again."""
        if self._offscreen is not None:
            self._offscreen.close()
        self._offscreen = None

    def _check_physics(self) -> None:
        check_physics(self.data)

    def _render(self) -> np.ndarray:
        return self.image(self.RENDER_CAMERA, *self.RENDER_SIZE)

    def _get_state(self) -> dict[str, np.ndarray]:
        return get_physics(self.data)

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        set_physics(self.model, self.data, state)
