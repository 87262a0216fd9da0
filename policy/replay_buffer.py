"""Demonstrations: the arrays of all episodes one after another in time, and where each episode ends.

On the disk, a zarr (format 3) folder; every chunk has a CRC-32C:

    FOLDER/zarr.json            attributes, under "driftfield_demonstrations"
    FOLDER/data/KEY             [N, ...]: "action", "state", images by the name of their camera
    FOLDER/meta/episode_ends    int64 [E]
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from driftfield.training.atomic_file import TEMPORARY_PREFIX, sync, to_json
from policy.data_error import DataError, available, naming
from policy.zarr_arrays import ZarrStore

VERSION: Final = 1
HEADER: Final = "driftfield_demonstrations"  # attribute of the group
EPISODES: Final = "episodes"  # attribute: what is known of each episode, such as its seed
DATA, EPISODE_ENDS = "data", "meta/episode_ends"
ACTION, STATE = "action", "state"

_CHUNK_BYTES: Final = 2_000_000
_DTYPES: Final = ("float32", "uint8", "int64", "bool")


class ReplayBuffer:
    """Episodes in memory.

    Args:
        arrays: by key, `[N, ...]` each: all episodes one after another; the observation at t is from before action t.
            "action" `[N, A]` float32 is required, "state" `[N, D]` is float32, images are uint8 `[N, H, W, 3]`.
        episode_ends: `[E]`, for each episode the row after its last one.
        attributes: JSON: task, kind of action, names of the state's entries, versions, ... and under "episodes" a list
            with an object for each episode (its seed, say).

    Raises:
        ValueError: arrays of wrong dtype, shape or length, ends that do not increase or do not end at N, NaN or
            infinity (naming episode and step), or attributes that are no JSON.

    >>> buffer = ReplayBuffer({"action": np.zeros((5, 2), np.float32)}, [3, 5])
    >>> len(buffer), buffer.num_steps, buffer.episode(1)["action"].shape
    (2, 5, (2, 2))
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        episode_ends: np.ndarray | Sequence[int],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self.arrays = dict(arrays)
        self.episode_ends = _checked_ends(episode_ends)  # [E]
        self.attributes: dict[str, Any] = json.loads(to_json(dict(attributes or {})))
        _check_arrays(self.arrays, self.num_steps)
        for key, array in self.arrays.items():
            if array.dtype.kind == "f":
                self._check_finite(key, array)
        episodes = self.attributes.get(EPISODES)
        if episodes is not None and len(episodes) != len(self):
            raise ValueError(f"attributes[{EPISODES!r}]: expected one for each of {len(self)}, found {len(episodes)}")

    @classmethod
    def from_episodes(
        cls, episodes: Iterable[Mapping[str, np.ndarray]], attributes: Mapping[str, Any] | None = None
    ) -> Self:
        """Join episodes.

        Args:
            episodes: the arrays of each, all with the same keys.
            attributes: as for the constructor.

        Raises:
            ValueError: no episode, keys or lengths that differ, or what the constructor refuses.
        """
        parts = list(episodes)
        if not parts:
            raise ValueError("episodes: expected at least one, found none")
        ends = np.cumsum([_episode_length(part, number) for number, part in enumerate(parts)])
        for number, part in enumerate(parts):
            if part.keys() != parts[0].keys():
                raise ValueError(f"episode {number}: expected the keys {sorted(parts[0])}, found {sorted(part)}")
            for key, array in part.items():
                first = parts[0][key]
                if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
                    raise ValueError(
                        f"episode {number}: {key}: expected {first.dtype} {_shape(first)} as in episode 0, "
                        f"found {array.dtype} {_shape(array)}"
                    )
        return cls({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, ends, attributes)

    def __len__(self) -> int:
        return len(self.episode_ends)

    @property
    def num_steps(self) -> int:
        """Steps of all episodes, N."""
        return int(self.episode_ends[-1])

    @property
    def episode_starts(self) -> np.ndarray:
        """First row of each episode, int64 `[E]`."""
        return np.concatenate([[0], self.episode_ends[:-1]]).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the arrays (name, dtype, shape, values) and of the ends of the episodes."""
        digest = hashlib.sha256()
        for key, array in sorted({**self.arrays, EPISODE_ENDS: self.episode_ends}.items()):
            digest.update(json.dumps([key, str(array.dtype), array.shape]).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def episode(self, i: int) -> dict[str, np.ndarray]:
        """The arrays of one episode, as views.

        Raises:
            IndexError: there is no such episode.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"episode {i}: expected a number from 0 to {len(self) - 1}")
        rows = slice(int(self.episode_starts[i]), int(self.episode_ends[i]))
        return {key: array[rows] for key, array in self.arrays.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the episodes into a new folder, whole or not at all.

        Raises:
            DataError: there is something of that name already.
            OSError: if the disk refuses; nothing is left behind.
        """
        path = Path(path)
        if path.exists():
            raise DataError(f"{path}: expected the name of a folder to be made, found that it exists")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex}")
        try:
            self._write(aside)
            for written in aside.rglob("*"):
                sync(written)
            os.rename(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync(path.parent)

    @classmethod
    def load(cls, path: str | os.PathLike[str], keys: Iterable[str] | None = None) -> Self:
        """Read the episodes of a folder that `save` wrote.

        Args:
            path: the folder.
            keys: which arrays, besides "action"; all if not given.

        Raises:
            DataError: it is missing, damaged (naming array and chunk), or not what `save` writes.
        """
        path = Path(path)
        with ZarrStore(path) as store:
            header, ends = _read_header(store)
            names = [name.removeprefix(f"{DATA}/") for name in store.names if name.startswith(f"{DATA}/")]
            wanted = names if keys is None else [ACTION, *(key for key in keys if key != ACTION)]
            for key in wanted:
                if key not in names:
                    raise DataError(f"{path}: expected data/{key}, {available(key, names)}")
            arrays = {key: store.read(f"{DATA}/{key}") for key in wanted}
        with naming(path):
            return cls(arrays, ends, header)

    def _write(self, path: Path) -> None:
        group: Any = zarr.open_group(path, mode="w", zarr_format=3)
        for key, array in self.arrays.items():
            _write_array(group, f"{DATA}/{key}", array, chunk=_chunk_steps(array))
        _write_array(group, EPISODE_ENDS, self.episode_ends, chunk=len(self))
        group.attrs[HEADER] = {"version": VERSION, **self.attributes}

    def _check_finite(self, key: str, array: np.ndarray) -> None:
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)  # [N]
        if finite.all():
            return
        row = int(np.argmin(finite))
        episode = int(np.searchsorted(self.episode_ends, row, side="right"))
        step = row - int(self.episode_starts[episode])
        entry = np.argwhere(~np.isfinite(array[row]))[0].tolist()
        raise ValueError(
            f"{key}: expected finite numbers, found {array[row][tuple(entry)]} in episode {episode} at step {step}, "
            f"entry {entry}; {int((~finite).sum())} of {len(array)} steps are not finite"
        )


def _write_array(group: Any, name: str, array: np.ndarray, *, chunk: int) -> None:
    created = group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(chunk, *array.shape[1:]),
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},  # a chunk left out would look like one that is lost
    )
    created[...] = array


def _read_header(store: ZarrStore) -> tuple[dict[str, Any], np.ndarray]:
    """Attributes, and ends of the episodes `[E]`."""
    header = store.attributes.get(HEADER)
    if not isinstance(header, dict):
        raise DataError(
            f"{store.path}: expected demonstrations of driftfield's own form (attribute {HEADER!r}), "
            f"{available(HEADER, store.attributes)}; python -m policy.import_data converts other forms"
        )
    if header.get("version") != VERSION:
        raise DataError(f"{store.path}: version: expected {VERSION}, found {header.get('version')!r}")
    with naming(store.path):
        ends = _checked_ends(store.read(EPISODE_ENDS))
    return {name: value for name, value in header.items() if name != "version"}, ends


def _checked_ends(episode_ends: np.ndarray | Sequence[int]) -> np.ndarray:
    ends = np.asarray(episode_ends)
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or not len(ends):
        raise ValueError(f"episode_ends: expected integers [E], at least one, found {ends.dtype} {list(ends.shape)}")
    ends = ends.astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any():
        episode = int(np.argmax(lengths <= 0))
        before = int(ends[episode - 1]) if episode else 0
        raise ValueError(
            f"episode_ends: expected increasing numbers, found {int(ends[episode])} after {before} (episode {episode})"
        )
    return ends


def _check_arrays(arrays: Mapping[str, np.ndarray], num_steps: int) -> None:
    if ACTION not in arrays:
        raise ValueError(f"arrays: expected the key {ACTION!r}, {available(ACTION, arrays)}")
    for key, array in arrays.items():
        if not key or "/" in key or not isinstance(array, np.ndarray):
            raise ValueError(
                f"arrays: expected names without '/' and NumPy arrays, found {key!r}: {type(array).__name__}"
            )
        if key in (ACTION, STATE) and (array.dtype != np.float32 or array.ndim != 2):
            raise ValueError(f"{key}: expected float32 [N, D], found {array.dtype} {list(array.shape)}")
        if str(array.dtype) not in _DTYPES or array.ndim < 1:
            raise ValueError(
                f"{key}: expected one of {', '.join(_DTYPES)} [N, ...], found {array.dtype} {list(array.shape)}"
            )
        if 0 in array.shape[1:]:
            raise ValueError(f"{key}: expected entries in every step, found shape {list(array.shape)}")
        if len(array) != num_steps:
            raise ValueError(f"{key}: expected {num_steps} steps, where the last episode ends, found {len(array)}")


def _episode_length(episode: Mapping[str, np.ndarray], number: int) -> int:
    lengths = {key: len(array) for key, array in episode.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"episode {number}: expected arrays of one length, found {lengths}")
    return next(iter(lengths.values()))


def _chunk_steps(array: np.ndarray) -> int:
    step_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    return max(1, _CHUNK_BYTES // step_bytes)


def _shape(array: Any) -> str:
    return str(["N", *array.shape[1:]]).replace("'", "")
