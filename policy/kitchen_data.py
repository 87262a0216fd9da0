"""Kitchen's demonstrations: three npy files, or the raw logs (.mjl) of the teleoperated robot."""

import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from envs.kitchen import COORDINATES, GOAL_ENTRIES, NOISE_AMPLITUDES, NOISE_RATIO, PHYSICS_STEPS, ROBOT_JOINTS
from policy.data_error import DataError, naming
from policy.npy_episodes import read_episodes
from policy.replay_buffer import ACTION, EPISODES, STATE, ReplayBuffer

FILES: Final = {STATE: "observations_seq.npy", ACTION: "actions_seq.npy"}
MASK_FILE: Final = "existence_mask.npy"
LOGS: Final = "*/*.mjl"
_HEADER: Final = struct.Struct("<7i")  # nq, nv, nu, nmocap, nsensordata, nuserdata, length of the name


class Log(NamedTuple):
    """What is kept of a log, at every record: positions `[R, nq]` and commands `[R, nu]`, float32."""

    qpos: np.ndarray
    ctrl: np.ndarray


def load_kitchen(
    folder: str | os.PathLike[str],
    *,
    noise: bool = True,
    seed: int = 42,
    skip_damaged: bool = False,
) -> ReplayBuffer:
    """Read observations_seq.npy, actions_seq.npy and existence_mask.npy of a folder, or its logs */*.mjl.

    Logs have a record for each step of the physics; every 40th is one of the robot's. Their actions are absolute, those
    of the npy files velocities.

    Args:
        folder: of the npy files, or of the folders of logs, which are taken in the order of their names.
        noise: add to the states of logs the noise that the environment's readings have; npy files have it already.
        seed: of the noise.
        skip_damaged: leave out logs that can't be read, with a warning that counts them.

    Raises:
        DataError: there are no such files, they are damaged or do not agree.
    """
    folder = Path(folder)
    attributes = {"task": "kitchen", "source": "kitchen"}
    with naming(folder):
        if (folder / MASK_FILE).exists():
            return ReplayBuffer.from_episodes(
                read_episodes(folder, FILES, MASK_FILE), attributes | {"action": "velocity"}
            )
        paths = sorted(folder.glob(LOGS))
        logs = dict(_read_logs(paths, skip_damaged=skip_damaged))
        if not logs:
            raise DataError(f"{folder}: expected {MASK_FILE} or logs {LOGS}, found {len(paths)} logs to be used")
        generator = np.random.default_rng(seed)
        episodes = [_episode(log, generator if noise else None) for log in logs.values()]
        names = [{"log": str(path.relative_to(folder))} for path in logs]
        return ReplayBuffer.from_episodes(episodes, {**attributes, "action": "absolute", EPISODES: names})


def read_log(path: str | os.PathLike[str], *, every: int = PHYSICS_STEPS) -> Log:
    """Read a log of MuJoCo's teleoperation (.mjl).

    Args:
        path: the file.
        every: which of its records to keep: the first, and each that is so many later.

    Raises:
        DataError: it is cut short, or no log.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a log, found: {error.strerror}") from error
    if len(content) < _HEADER.size:
        raise DataError(f"{path}: expected a header of {_HEADER.size} bytes, found {len(content)} bytes")
    sizes = _HEADER.unpack_from(content)
    nq, nv, nu, nmocap, nsensordata, nuserdata, name_length = sizes
    numbers = 1 + nq + nv + nu + 7 * nmocap + nsensordata + nuserdata  # of a record; the first is the time
    start = _HEADER.size + name_length
    if min(sizes) < 0 or len(content) <= start or (len(content) - start) % (4 * numbers):
        raise DataError(
            f"{path}: expected records of {numbers} float32 from byte {start} on, as its header {sizes} says, "
            f"found {len(content)} bytes"
        )
    records = np.frombuffer(content, "<f4", offset=start).reshape(-1, numbers)[::every]
    return Log(records[:, 1 : 1 + nq].copy(), records[:, 1 + nq + nv : 1 + nq + nv + nu].copy())


def _read_logs(paths: list[Path], *, skip_damaged: bool) -> Iterator[tuple[Path, Log]]:
    damaged = []
    for path in paths:
        try:
            log = read_log(path)
            if log.qpos.shape[1] < COORDINATES or log.ctrl.shape[1] != ROBOT_JOINTS:
                raise DataError(
                    f"{path}: expected at least {COORDINATES} positions and {ROBOT_JOINTS} commands, "
                    f"found {log.qpos.shape[1]} and {log.ctrl.shape[1]}"
                )
            if not (np.isfinite(log.qpos).all() and np.isfinite(log.ctrl).all()):
                raise DataError(f"{path}: expected finite numbers, found others")
        except DataError as error:
            if not skip_damaged:
                raise
            damaged.append(error)
        else:
            yield path, log
    if damaged:
        warnings.warn(f"{len(damaged)} of {len(paths)} logs left out; the first: {damaged[0]}", stacklevel=3)


def _episode(log: Log, generator: np.random.Generator | None) -> dict[str, np.ndarray]:
    objects = COORDINATES - ROBOT_JOINTS
    readings = np.concatenate([log.qpos[:, :ROBOT_JOINTS], log.qpos[:, -objects:]], axis=1)  # [T, 30]
    if generator is not None:
        readings = readings + NOISE_RATIO * NOISE_AMPLITUDES * generator.uniform(-1.0, 1.0, readings.shape)
    goal = np.zeros((len(readings), GOAL_ENTRIES))
    return {STATE: np.concatenate([readings, goal], axis=1).astype(np.float32), ACTION: log.ctrl}
