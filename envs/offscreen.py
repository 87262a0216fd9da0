"""Pictures of a MuJoCo model without a screen: EGL where it works, else OSMesa."""

import atexit
import ctypes
import functools
import importlib
import os
import platform
import weakref
from typing import Any

import mujoco
import numpy as np

INSTALL = "install libegl1 or libosmesa6 (apt-get install libegl1 libosmesa6), or use observation='state' and no video"
EGL_PLATFORM_DEVICE = 0x313F
MAX_DEVICES = 16


class Offscreen:
    """Draws a model's cameras into arrays; it only reads mjData.

    Args:
        model: whose <visual><global offwidth offheight/> bound the pictures' size.

    Raises:
        ImportError: there is no OpenGL to draw with.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._size = (int(model.vis.global_.offheight), int(model.vis.global_.offwidth))
        name = backend()
        try:
            self._context = _make_context(name, *self._size)
            self._context.make_current()
            self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except Exception as error:  # each OpenGL says in its own way that it is not there
            raise ImportError(f"no picture can be drawn with MUJOCO_GL={name}: {error}; {INSTALL}") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._mjr)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._option = mujoco.MjvOption()
        # Contexts that are still there when Python ends must go before EGL does.
        self._at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def image(self, data: mujoco.MjData, camera: str, height: int, width: int, *, shadows: bool = True) -> np.ndarray:
        """What a camera of the model sees; without shadows, a small picture takes a third of the time.

        Raises:
            ValueError: no such camera, or a picture larger than the model's offscreen buffer.

        Returns:
            [height, width, 3] uint8, upright.
        """
        if height > self._size[0] or width > self._size[1]:
            raise ValueError(f"a picture of {height} x {width} is larger than the model's buffer, {self._size}")
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = self._model.camera(camera).id
        self._context.make_current()
        every = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, view, every, self._scene)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows
        rectangle = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rectangle, self._scene, self._mjr)
        pixels = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, rectangle, self._mjr)
        return pixels[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the context."""
        atexit.unregister(self._at_exit)
        if self._context is not None:
            self._context.make_current()
            self._mjr.free()
            self._context.free()
        self._context = None


def _close(reference: "weakref.ref[Offscreen]") -> None:
    offscreen = reference()
    if offscreen is not None:
        offscreen.close()


def _make_context(name: str, height: int, width: int) -> Any:
    if name in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", name)
        return importlib.import_module(f"mujoco.{name}").GLContext(width, height)
    return mujoco.GLContext(width, height)


@functools.cache
def backend() -> str:
    """Which OpenGL draws: what MUJOCO_GL says, else EGL, else OSMesa (elsewhere than on Linux, the system's own).

    MUJOCO_GL is set to it, for the simulators that read it.

    Raises:
        ImportError: neither is there, with what to install.
    """
    name = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not name and platform.system() == "Linux":
        name = "egl" if _egl_works() else "osmesa" if _library("libOSMesa.so.8", "libOSMesa.so.6") else ""
        if not name:
            raise ImportError(f"no picture can be drawn: neither EGL nor OSMesa works here; {INSTALL}")
        os.environ["MUJOCO_GL"] = name
    return name


def _library(*names: str) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _egl_works() -> bool:
    """Whether EGL has a device that can be initialised, asked before PyOpenGL binds itself to EGL for good."""
    egl = _library("libEGL.so.1")
    if egl is None:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not (query_address and display_address):
        return False
    pointer = ctypes.c_void_p
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer, pointer)(query_address)
    platform_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(display_address)
    devices, count = (pointer * MAX_DEVICES)(), ctypes.c_int()
    if not query_devices(MAX_DEVICES, devices, ctypes.byref(count)):
        return False
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    displays = (platform_display(EGL_PLATFORM_DEVICE, device, None) for device in devices[: count.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)
