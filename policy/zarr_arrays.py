"""Arrays of zarr stores, of format 2 or 3, in a folder or a zip file, read whole and with suspicion.

zarr gives the values of a chunk that is not there as the fill value and says nothing; here every chunk has to be there.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import zarr
from numcodecs import Blosc
from zarr.codecs import BloscCodec
from zarr.storage import ZipStore

from policy.data_error import DataError, available

# What zarr and its codecs raise on damaged files; a codec's own error is a RuntimeError or a ValueError.
ZARR_ERRORS: Final = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, zlib.error)
_BLOSC_HEADER: Final = 16  # bytes; the last four are the size of all
_BLOSC_SIZE: Final = slice(12, 16)
METADATA: Final = ("zarr.json", ".zarray")  # of an array; the first also of a group


class ZarrStore:
    """A zarr group, its arrays by name ("data/action"), for a `with` statement.

    Args:
        path: folder or zip file.
        allow_missing_chunks: read a chunk that is not there as the array's fill value, for stores whose writer is
            known to leave out such chunks.

    Raises:
        DataError: there is no zarr group, or its metadata are damaged.
    """

    def __init__(self, path: Path, *, allow_missing_chunks: bool = False) -> None:
        self.path, self._allow_missing_chunks = path, allow_missing_chunks
        if not path.exists():
            raise DataError(f"{path}: expected a zarr store; there is nothing of that name")
        self._archive: zipfile.ZipFile | None = None
        self._zip_store: Any = None
        try:
            if path.is_file():
                self._archive, self._zip_store = zipfile.ZipFile(path), ZipStore(path)
            self._files = _files_of(path) if self._archive is None else frozenset(self._archive.namelist())
            self._group: Any = zarr.open_group(self._zip_store or path, mode="r")
            self.attributes: dict[str, Any] = dict(self._group.attrs.asdict())
            self._arrays: dict[str, Any] = dict(self._find_arrays())
        except (*ZARR_ERRORS, zipfile.BadZipFile) as error:
            self.close()
            raise DataError(f"{path}: expected a zarr group, found {type(error).__name__}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the zip file, if it is one."""
        if self._archive is not None:
            self._archive.close()
            self._zip_store.close()

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return sorted(self._arrays)

    def read(self, name: str) -> np.ndarray:
        """An array.

        Args:
            name: as in `names`.

        Raises:
            DataError: there is no such array, or chunks of it are missing or damaged (naming the first).
        """
        if name not in self._arrays:
            raise DataError(f"{self.path}: expected an array {name}, {available(name, self.names)}")
        array = self._arrays[name]
        if array.dtype.hasobject or array.dtype.kind not in "biuf":
            raise DataError(f"{self.path}: array {name}: expected numbers, found dtype {array.dtype}")
        self._require_chunks(name, array)
        try:
            return np.asarray(array[...])
        except ZARR_ERRORS as error:
            raise DataError(f"{self.path}: array {name}: {_damage(array, error)}") from error

    def _find_arrays(self) -> Iterator[tuple[str, Any]]:
        """Every array; zarr's own search leaves out those whose metadata are damaged."""
        for folder, _, name in (file.rpartition("/") for file in self._files):
            if folder and name in METADATA:
                member = self._group[folder]
                if isinstance(member, zarr.Array):
                    yield folder, member

    def _require_chunks(self, name: str, array: Any) -> None:
        grid, is_blosc = _grid(array), _ends_with_blosc(array)
        for chunk in _chunks(grid):
            key = array.metadata.encode_chunk_key(chunk)
            if f"{name}/{key}" not in self._files:
                if self._allow_missing_chunks:
                    continue
                raise DataError(
                    f"{self.path}: array {name}: expected {math.prod(grid)} chunks, found that chunk {key} is missing"
                )
            if is_blosc:
                head, size = self._head(f"{name}/{key}")
                if int.from_bytes(head[_BLOSC_SIZE], "little") != size:
                    raise DataError(
                        f"{self.path}: array {name}: chunk {key} is damaged: expected "
                        f"{int.from_bytes(head[_BLOSC_SIZE], 'little')} bytes, as its Blosc header says, found {size}"
                    )

    def _head(self, file: str) -> tuple[bytes, int]:
        """The first bytes of a file, and its size."""
        if self._archive is None:
            with open(self.path / file, "rb") as opened:
                return opened.read(_BLOSC_HEADER), os.fstat(opened.fileno()).st_size
        with self._archive.open(file) as member:
            return member.read(_BLOSC_HEADER), self._archive.getinfo(file).file_size


def _files_of(path: Path) -> frozenset[str]:
    """Names of all files under a folder, with '/' between folders."""
    found = ((Path(folder).relative_to(path), names) for folder, _, names in os.walk(path))
    return frozenset((folder / name).as_posix() for folder, names in found for name in names)


def _ends_with_blosc(array: Any) -> bool:
    """Whether a chunk is a Blosc buffer: its decoder trusts the size in the header and reads behind a shorter file."""
    return bool(array.compressors) and isinstance(array.compressors[-1], (Blosc, BloscCodec)) and not array.shards


def _grid(array: Any) -> tuple[int, ...]:
    """Number of chunks (of files, where chunks share one) along each axis of an array."""
    return tuple(-(-length // size) for length, size in zip(array.shape, array.shards or array.chunks, strict=True))


def _chunks(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Coordinates of the chunks of a grid, one by one: damaged metadata may promise more than the memory holds."""
    for number in range(math.prod(grid)):
        chunk = []
        for length in reversed(grid):
            number, coordinate = divmod(number, length)
            chunk.append(coordinate)
        yield tuple(reversed(chunk))


def _damage(array: Any, error: Exception) -> str:
    """Which chunk it is that cannot be read, and why."""
    sizes = array.shards or array.chunks
    for chunk in _chunks(_grid(array)):
        try:
            array[tuple(slice(i * size, (i + 1) * size) for i, size in zip(chunk, sizes, strict=True))]
        except ZARR_ERRORS as reason:
            key = array.metadata.encode_chunk_key(chunk)
            return f"chunk {key} is damaged: {type(reason).__name__}: {reason}"
    return f"{type(error).__name__}: {error}"  # now it can be read
