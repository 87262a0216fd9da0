"""Arrays in npz files of any size: looked at by their headers alone, read in parts."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, cast

import numpy as np

HEADERS: Final = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArrayInfo(NamedTuple):
    """Shape and kind of numbers of an array in a file, and whether it is stored by columns."""

    shape: tuple[int, ...]
    dtype: np.dtype
    by_columns: bool


def npz_arrays(path: Path) -> dict[str, ArrayInfo]:
    """The arrays of an npz file by name, from their headers alone.

    Raises:
        ValueError: not a whole npz file, or one of its arrays holds Python objects.
        OSError: it cannot be read.
    """
    found = {}
    with _opened(path) as archive:
        for name in (file.removesuffix(".npy") for file in archive.namelist() if file.endswith(".npy")):
            with _member(archive, name) as member:
                found[name] = _header(member, name)
    return found


def read_npz_array(path: Path, name: str) -> np.ndarray:
    """An array of an npz file, whole.

    Raises:
        ValueError: not a whole npz file, there is no such array or it holds Python objects.
        OSError: it cannot be read.
    """
    with _opened(path) as archive, _member(archive, name) as file:
        return np.lib.format.read_array(cast(BinaryIO, file), allow_pickle=False)


def read_npz_rows(path: Path, name: str, *, rows: range, at_once: int) -> Iterator[np.ndarray]:
    """Rows of an array in parts, without holding the array.

    Args:
        path: the npz file.
        name: of the array.
        rows: which of its rows, a range of step 1.
        at_once: rows of a part.

    Raises:
        ValueError: not a whole npz file, there is no such array or it has no such rows.
        OSError: it cannot be read.

    Returns:
        Iterator over arrays `[at_once, ...]`, the last one smaller if need be.
    """
    with _opened(path) as archive, _member(archive, name) as file:
        info = _header(file, name)
        if info.by_columns:
            raise ValueError(f"array {name} is stored by columns")
        if rows.stop > info.shape[0]:
            raise ValueError(f"array {name} has {info.shape[0]} rows, expected at least {rows.stop}")
        row_bytes = info.dtype.itemsize * int(np.prod(info.shape[1:], dtype=np.int64))
        file.seek(row_bytes * rows.start, os.SEEK_CUR)
        for start in range(rows.start, rows.stop, at_once):
            count = min(at_once, rows.stop - start)
            content = file.read(count * row_bytes)
            if len(content) < count * row_bytes:
                raise ValueError(f"array {name} ends early")
            yield np.frombuffer(content, info.dtype).reshape(count, *info.shape[1:])


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole npz file, found: {error}") from error


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipExtFile:
    return cast(zipfile.ZipExtFile, archive.open(f"{name}.npy"))


def _header(file: zipfile.ZipExtFile, name: str) -> ArrayInfo:
    """Read an array's header; the file then stands at its first row."""
    version = np.lib.format.read_magic(cast(BinaryIO, file))
    if version not in HEADERS:
        raise ValueError(f"array {name} is of npy version {version}")
    shape, by_columns, dtype = HEADERS[version](cast(BinaryIO, file))
    if dtype.hasobject:
        raise ValueError(f"array {name} holds Python objects")
    return ArrayInfo(shape, dtype, by_columns and len(shape) > 1)
