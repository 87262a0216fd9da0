"""Demonstrations as robomimic publishes them: an HDF5 file, data/demo_K/{actions, states, obs/KEY}.

Absolute actions are position, rotation as six numbers, and gripper; a file has them with the rotation as axis times
angle (Diffusion Policy's *_abs.hdf5), or they are computed from its delta actions in the simulator.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import h5py
import numpy as np

import envs
from driftfield.training.atomic_file import parse_json
from envs.rotation import rotation_6d_from_axis_angle
from policy.data_error import DataError, available, naming
from policy.replay_buffer import ACTION, EPISODES, STATE, ReplayBuffer

ActionKind = Literal["absolute", "delta"]
Observation = Literal["state", "image"]

TASKS: Final = {"Lift": "lift", "PickPlaceCan": "can", "ToolHang": "tool_hang"}  # robosuite's name -> ours
PROPRIOCEPTION: Final = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
OBJECT: Final = "object"
CAMERAS: Final = {
    "lift": ("agentview", "robot0_eye_in_hand"),
    "can": ("agentview", "robot0_eye_in_hand"),
    "tool_hang": ("sideview", "robot0_eye_in_hand"),
}
ROBOSUITE: Final = "1.5"  # whose order of the object's entries the environments have
ACTION_SIZE: Final = 7  # position or its change, rotation or its change as axis times angle, gripper
LARGEST_POSITION_ERROR_M: Final = 1e-3


def load_robomimic(
    path: str | os.PathLike[str],
    *,
    observation: Observation = "state",
    action: ActionKind = "absolute",
    stored_action: ActionKind = "delta",
    mask: str | None = None,
) -> ReplayBuffer:
    """Read a file of robomimic's demonstrations of Lift, PickPlaceCan or ToolHang.

    Args:
        path: the HDF5 file.
        observation: "state" is the object's entries and the proprioception; "image" the cameras and the proprioception.
        action: kind of the actions wanted.
        stored_action: kind of the actions in the file, which does not say it. Delta ones become absolute in the
            simulator, a state at a time.
        mask: name of a list of demonstrations in the file, such as "train"; all if not given.

    Raises:
        DataError: it is missing or damaged; a key is missing (listing those there are); lengths differ; numbers are not
            finite (naming the episode).
        ModuleNotFoundError: the simulator is needed and not installed.
    """
    path = Path(path)
    if stored_action == "absolute" and action == "delta":
        raise DataError(f"{path}: action: expected 'absolute' as the file has it, found 'delta'")
    with _opened(path) as file, naming(path):
        task, version = _task(path, file)
        names = _demos(path, file, mask)
        keys = _keys(task, observation)
        _check(path, file, names, keys, states=action != stored_action)
        arrays = {key: _concatenated(file, names, sources) for key, sources in keys.items()}
        lengths = [len(file[f"data/{name}/actions"]) for name in names]
        actions = _concatenated(file, names, ["actions"])
        _check_actions(path, actions, stored_action)
        if stored_action == "absolute":
            arrays[ACTION] = absolute_actions_6d(actions)
        elif action == "delta":
            arrays[ACTION] = actions.astype(np.float32)
        else:
            hands = _concatenated(file, names, ["obs/robot0_eef_pos"])
            arrays[ACTION] = _simulated(task, _concatenated(file, names, ["states"]), actions, hands, path)
        attributes: dict[str, Any] = {"task": task, "action": action, "source": "robomimic", "observation": observation}
        attributes |= {"versions": {"robosuite": version}, EPISODES: [{"demo": name} for name in names]}
        sizes = {source[4:]: _width(file, names[0], source) for source in keys[STATE]}
        attributes["state_names"] = [f"{key}[{entry}]" for key, size in sizes.items() for entry in range(size)]
        return ReplayBuffer(arrays, np.cumsum(lengths), attributes)


def absolute_actions_6d(actions: np.ndarray) -> np.ndarray:
    """Absolute actions with the rotation as six numbers.

    Args:
        actions: `[N, 7]`: position, axis times angle, gripper.

    Returns:
        `[N, 10]` float32: position, rotation 6D, gripper.

    >>> absolute_actions_6d(np.array([[0.1, 0.2, 0.9, 0, 0, 0, -1]])).tolist()[0][3:9]
    [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    """
    parts = [actions[:, :3], rotation_6d_from_axis_angle(actions[:, 3:6]), actions[:, 6:]]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _simulated(task: str, states: np.ndarray, actions: np.ndarray, hands: np.ndarray, path: Path) -> np.ndarray:
    """Absolute actions [N, 10] that have the effect of delta actions [N, 7] at the simulator's states [N, D]."""
    simulator: Any = envs.make(task, action="delta").unwrapped
    result = np.empty((len(actions), 10), np.float32)
    try:
        simulator.reset(seed=0)
        for step, (state, action, hand) in enumerate(zip(states, actions, hands, strict=True)):
            simulator.set_simulator_state(state)
            error = float(np.linalg.norm(simulator.gripper_pose().position - hand))
            if not error < LARGEST_POSITION_ERROR_M:
                raise DataError(
                    f"{path}: expected states of the simulator installed here, found that at step {step} of all its "
                    f"hand is {error:.3g} m from where the file says"
                )
            result[step] = simulator.absolute_action(action)
    finally:
        simulator.close()
    return result


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DataError:
        raise
    except (OSError, RuntimeError, KeyError) as error:  # of the library, also while it reads
        raise DataError(f"{path}: expected a whole HDF5 file, found {type(error).__name__}: {error}") from error


def _task(path: Path, file: h5py.File) -> tuple[str, str]:
    """Name of the task, and version of robosuite."""
    if not isinstance(file.get("data"), h5py.Group):
        raise DataError(f"{path}: expected a group data, {available('data', file)}")
    attributes = file["data"].attrs
    if "env_args" not in attributes:
        raise DataError(f"{path}: expected an attribute env_args of data, {available('env_args', attributes)}")
    arguments = parse_json(str(attributes["env_args"]))
    name = arguments.get("env_name") if isinstance(arguments, dict) else None
    if name not in TASKS:
        raise DataError(f"{path}: env_name: expected one of {', '.join(TASKS)}, found {name!r}")
    version = str(arguments.get("env_version", "unknown"))
    if not version.startswith(ROBOSUITE):
        warnings.warn(
            f"{path}: recorded with robosuite {version}: the entries of {OBJECT!r} are in another order than those of "
            f"the environments here (robosuite {ROBOSUITE})",
            stacklevel=4,
        )
    return TASKS[name], version


def _demos(path: Path, file: h5py.File, mask: str | None) -> list[str]:
    """Names of the demonstrations, by number."""
    there = [name for name in file["data"] if name.startswith("demo_") and name[5:].isdecimal()]
    if mask is not None:
        masks = file.get("mask", {})
        if mask not in masks:
            raise DataError(f"{path}: expected mask/{mask}, {available(mask, masks)}")
        wanted = [name.decode() for name in masks[mask][()]]
        missing = sorted(set(wanted) - set(there))
        if missing:
            raise DataError(f"{path}: mask/{mask}: expected demonstrations that there are, found {missing[0]}")
        there = wanted
    if not there:
        raise DataError(f"{path}: expected data/demo_0, data/demo_1 ..., {available('demo_0', file['data'])}")
    return sorted(there, key=lambda name: int(name[5:]))


def _keys(task: str, observation: Observation) -> dict[str, list[str]]:
    """Our keys, and of what datasets each is made."""
    if observation == "state":
        return {STATE: [f"obs/{key}" for key in (OBJECT, *PROPRIOCEPTION)]}
    images = {camera: [f"obs/{camera}_image"] for camera in CAMERAS[task]}
    return {STATE: [f"obs/{key}" for key in PROPRIOCEPTION], **images}


def _check(path: Path, file: h5py.File, names: list[str], keys: dict[str, list[str]], *, states: bool) -> None:
    """Look at every demonstration before any is read."""
    wanted = ["actions", *(["states", "obs/robot0_eef_pos"] if states else []), *sum(keys.values(), [])]
    for name in names:
        demo = file["data"][name]
        there = [*(key for key in demo if key != "obs"), *(f"obs/{key}" for key in demo.get("obs", {}))]
        for key in wanted:
            if key not in there:
                raise DataError(f"{path}: data/{name}: expected {key}, {available(key, there)}")
        expected = int(demo.attrs.get("num_samples", len(demo["actions"])))
        for key in wanted:
            shape, first = demo[key].shape, file["data"][names[0]][key].shape
            if shape[:1] != (expected,):
                raise DataError(f"{path}: data/{name}/{key}: expected {expected} steps, found shape {list(shape)}")
            if shape[1:] != first[1:]:
                raise DataError(f"{path}: data/{name}/{key}: expected [T, *{list(first[1:])}], found {list(shape)}")
        if demo["actions"].shape[1:] != (ACTION_SIZE,):
            raise DataError(f"{path}: data/{name}/actions: expected [T, 7], found {list(demo['actions'].shape)}")


def _concatenated(file: h5py.File, names: list[str], sources: list[str]) -> np.ndarray:
    """Datasets side by side, all demonstrations one after another; images as they are, numbers of a key as float32."""
    if len(sources) == 1:
        return np.concatenate([file[f"data/{name}/{sources[0]}"][()] for name in names])
    columns = [
        [
            np.asarray(file[f"data/{name}/{source}"][()], np.float32).reshape(-1, _width(file, name, source))
            for source in sources
        ]
        for name in names
    ]
    return np.concatenate([np.concatenate(parts, axis=1) for parts in columns])


def _width(file: h5py.File, name: str, source: str) -> int:
    return int(np.prod(file[f"data/{name}/{source}"].shape[1:], dtype=np.int64))


def _check_actions(path: Path, actions: np.ndarray, kind: ActionKind) -> None:
    if not np.isfinite(actions).all():
        return  # the buffer says which
    if kind == "delta" and np.abs(actions).max() > 1 + 1e-6:
        raise DataError(
            f"{path}: expected delta actions, from -1 to 1, found {np.abs(actions).max():.4g}; "
            "if they are absolute, say stored_action=absolute"
        )
