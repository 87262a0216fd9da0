"""Episodes in npy files, [episodes, longest, ...] each, with a mask of the steps that exist."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from policy.data_error import DataError


def read_npy(path: Path) -> np.ndarray:
    """The numbers of an npy file.

    Raises:
        DataError: it is missing, cut short, or holds something else.
    """
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: expected an npy file of numbers, found {type(error).__name__}: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise DataError(
            f"{path}: expected an npy file of numbers, found {getattr(array, 'dtype', type(array).__name__)}"
        )
    return array


def read_episodes(
    folder: str | os.PathLike[str], files: Mapping[str, str], mask_file: str
) -> list[dict[str, np.ndarray]]:
    """The steps of every episode that exist.

    Args:
        folder: of the files.
        files: for each key its file, `[E, T, D]`.
        mask_file: `[E, T]`, 1 for the steps that exist: in every episode the first ones.

    Raises:
        DataError: a file is missing or damaged, or their shapes do not agree.

    Returns:
        Arrays by key for each episode, `[L, D]` float32.
    """
    folder = Path(folder)
    mask = read_npy(folder / mask_file)
    if mask.ndim != 2:
        raise DataError(f"{folder / mask_file}: expected shape [episodes, steps], found {list(mask.shape)}")
    exists = mask != 0
    for episode in np.flatnonzero((np.diff(exists.astype(np.int8), axis=1) > 0).any(axis=1) | ~exists[:, 0]):
        raise DataError(f"{folder / mask_file}: episode {episode}: expected ones and then zeros, found {mask[episode]}")
    arrays = {key: read_npy(folder / name) for key, name in files.items()}
    for key, array in arrays.items():
        if array.ndim != 3 or array.shape[:2] != mask.shape:
            raise DataError(
                f"{folder / files[key]}: expected shape [{mask.shape[0]}, {mask.shape[1]}, D] as {mask_file} has it, "
                f"found {list(array.shape)}"
            )
    return [
        {key: array[episode, :length].astype(np.float32) for key, array in arrays.items()}
        for episode, length in enumerate(exists.sum(axis=1))
    ]
