"""Where samples go, batch after batch: a picture of all, a folder of pictures, or an array that is never held whole."""

import os
import uuid
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import numpy as np
import torch
from torch import Tensor

from driftfield.training.atomic_file import TEMPORARY_PREFIX, sync
from vision.pictures import save_grid, save_image

WRITING_THREADS: Final = min(16, os.cpu_count() or 1)  # Pillow compresses without holding Python's lock
WAITING_IMAGES: Final = 1024  # of 3 x 256 x 256 bytes: 192 MiB


class SampleFiles(ABC):
    """A place for images; whole once its `with` block ends without an error."""

    @abstractmethod
    def write(self, images: Tensor) -> None:
        """Take the next images, uint8 `[b, C, H, W]` on the CPU.

        Raises:
            OSError: if the disk refuses these or earlier ones.
        """

    @abstractmethod
    def close(self, *, complete: bool) -> None:
        """Finish what was written, or, if not complete, stop without leaving a file that is not whole."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(complete=kind is None)


class PngFolder(SampleFiles):
    """Numbered PNGs, compressed and written by threads while the caller goes on.

    A write that the disk refuses is raised by a later `write` or at the end; the caller waits where more than
    `WAITING_IMAGES` images are not yet on disk.

    Args:
        folder: made if it does not exist.
        first_index: number of the first image.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, *, first_index: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._index = folder, first_index
        self._pool = ThreadPoolExecutor(WRITING_THREADS)
        self._waiting: deque[Future[None]] = deque()

    def write(self, images: Tensor) -> None:
        for image in images:
            if len(self._waiting) == WAITING_IMAGES:
                self._waiting.popleft().result()
            self._waiting.append(self._pool.submit(save_image, image, self._folder / f"{self._index:06d}.png"))
            self._index += 1

    def close(self, *, complete: bool) -> None:
        try:
            while complete and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


class NpzFile(SampleFiles):
    """`arr_0` uint8 `[N, H, W, C]` and `labels` int64 `[N]` in a .npz, the form that ADM's evaluator reads.

    Args:
        path: the file; folders above it are made; an older file stays until the new one is whole.
        labels: class of each image, `[N]`; as many images are to be written.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: Path, labels: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._labels, self._missing = path, labels, len(labels)
        self._aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex}")
        self._archive = zipfile.ZipFile(self._aside, "w", zipfile.ZIP_STORED)
        self._images: IO[bytes] | None = None

    def write(self, images: Tensor) -> None:
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()  # [b, H, W, C]
        if self._images is None:
            shape = (len(self._labels), *pixels.shape[1:])
            header = {"descr": np.lib.format.dtype_to_descr(pixels.dtype), "fortran_order": False, "shape": shape}
            self._images = self._archive.open("arr_0.npy", "w", force_zip64=True)
            np.lib.format.write_array_header_1_0(self._images, header)
        self._images.write(pixels.data)
        self._missing -= len(pixels)

    def close(self, *, complete: bool) -> None:
        try:
            if self._images is not None:
                self._images.close()
            if complete:
                if self._missing:
                    raise ValueError(f"{self._path}: expected {len(self._labels)} images, {self._missing} are missing")
                with self._archive.open("labels.npy", "w") as member:
                    np.lib.format.write_array(member, self._labels.numpy(), allow_pickle=False)
            self._archive.close()
            if complete:
                sync(self._aside)
                os.replace(self._aside, self._path)
        finally:
            self._archive.close()
            self._aside.unlink(missing_ok=True)


class Grid(SampleFiles):
    """One PNG with all images row by row, held until the last is there.

    Args:
        path: the file; folders above it are made.
        columns: images beside each other.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(self, path: Path, *, columns: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._columns = path, columns
        self._batches: list[Tensor] = []

    def write(self, images: Tensor) -> None:
        self._batches.append(images)

    def close(self, *, complete: bool) -> None:
        if complete:
            save_grid(torch.cat(self._batches), self._path, columns=self._columns)


def open_sample_files(out: Path, labels: Tensor, *, columns: int, first_index: int = 0) -> SampleFiles:
    """The place that a path names by its ending: .png is a grid, .npz an array, anything else a folder of PNGs.

    Args:
        out: where to write.
        labels: class of each image, `[N]`.
        columns: of a grid.
        first_index: number of the first PNG in a folder.

    Raises:
        OSError: if the place cannot be written.
    """
    if out.suffix == ".png":
        return Grid(out, columns=columns)
    if out.suffix == ".npz":
        return NpzFile(out, labels)
    return PngFolder(out, first_index=first_index)
