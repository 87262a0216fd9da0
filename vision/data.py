"""Real images with labels: scikit-learn's digits and Fashion-MNIST, as bytes in memory."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from driftfield.training.errors import UserError
from driftfield.training.visits import sample_ids

DatasetName = Literal["digits", "fashion_mnist"]
Split = Literal["train", "test"]

FASHION_MNIST_VARIABLE = "DRIFTFIELD_FASHION_MNIST"
FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_MNIST_STEMS = {"train": "train", "test": "t10k"}
FASHION_MNIST_PADDING = 2  # black pixels on each side: 28 x 28 -> 32 x 32, a size that halves to 2

DIGITS_LEVELS = 16  # scans are counts 0..16 of black pixels in 4 x 4 cells
DIGITS_TEST_PER_CLASS = 50
DIGITS_SPLIT_SEED = 2602  # of numpy's RandomState, whose stream is frozen for good


class RealSamples(Protocol):
    """Real training samples, in memory or on disk, read by *visit*: epoch * len + position.

    A sample may look different at every visit (mirrored, cropped, drawn from its posterior), as a function of the seed
    and the visit alone.
    """

    @property
    def labels(self) -> Tensor:
        """Class of each sample, `[n]` int64."""
        ...

    def __len__(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str]:
        """One name per class."""
        ...

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one sample."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies everything a training run sees."""
        ...

    def read(self, visits: Tensor, *, seed: int) -> Tensor:
        """Samples of visits `[k]`, float32 `[k, C, H, W]` on the CPU."""
        ...


class DataError(UserError, ValueError):
    """A data set that cannot be used as it is; the message names the place, what was expected and what was found."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images in memory.

    Args:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`, indices into `class_names`.
        class_names: one name per class.
        name: the data set's name.
        split: the part of the data set.

    Raises:
        DataError: if shapes, dtypes or labels do not fit together.

    >>> digits = load("digits", "test")
    >>> tuple(digits.images.shape), digits.counts().tolist()
    ((500, 1, 8, 8), [50, 50, 50, 50, 50, 50, 50, 50, 50, 50])
    """

    images: Tensor  # [N, C, H, W]
    labels: Tensor  # [N]
    class_names: tuple[str, ...]
    name: str
    split: Split

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"{self.title}: images must be uint8 [N, C, H, W], found {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise DataError(
                f"{self.title}: labels must be int64 [N], found {self.labels.dtype} {list(self.labels.shape)}"
            )
        if len(self.images) != len(self.labels):
            raise DataError(
                f"{self.title}: expected one label per image, "
                f"found {len(self.images)} images and {len(self.labels)} labels"
            )
        if len(self.labels) == 0:
            raise DataError(f"{self.title}: expected at least one image, found none")
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0 or highest >= self.num_classes:
            raise DataError(
                f"{self.title}: expected labels from 0 to {self.num_classes - 1}, found {lowest} to {highest}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def title(self) -> str:
        """Name and split in words, for messages."""
        return f"{self.name} ({self.split})"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything a training run sees: shape, classes, labels and pixels."""
        header = repr((self.name, self.split, self.class_names, tuple(self.images.shape)))
        digest = hashlib.sha256(header.encode())
        digest.update(self.labels.contiguous().numpy().astype("<i8").tobytes())
        digest.update(self.images.contiguous().numpy().data)
        return digest.hexdigest()

    def read(self, visits: Tensor, *, seed: int = 0) -> Tensor:
        """Images of visits `[k]`, float32 in [-1, 1] `[k, C, H, W]`; the same at every visit, whatever the seed."""
        return to_float(self.images[sample_ids(visits, len(self))])

    def counts(self) -> Tensor:
        """Number of images of each class, `[classes]`."""
        return torch.bincount(self.labels, minlength=self.num_classes)


def require_per_class(real: RealSamples, minimum: int, *, purpose: str) -> None:
    """Refuse samples of which some class has fewer than `minimum`.

    Args:
        real: the samples.
        minimum: samples needed of every class.
        purpose: what they are needed for, as the message will say it.

    Raises:
        DataError: naming the first class that has too few.
    """
    counts = torch.bincount(real.labels, minlength=len(real.class_names)).tolist()
    for class_name, found in zip(real.class_names, counts, strict=True):
        if found < minimum:
            raise DataError(
                f"data: class {class_name!r} must have at least {minimum} images for {purpose}, found {found}"
            )


def to_float(images: Tensor) -> Tensor:
    """Map bytes 0..255 to float32 in [-1, 1], the range every network here works in.

    >>> to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
    [-1.0, 1.0]
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, found {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map floats to the nearest byte, -1 to 0 and 1 to 255, clipping what lies outside; inverse of `to_float`.

    Raises:
        ValueError: if a value is NaN or infinite, which has no nearest byte.

    >>> to_uint8(torch.tensor([-1.0, 0.999, 7.0])).tolist()
    [0, 255, 255]
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [-1, 1], found {images.dtype}")
    unusable = images.numel() - int(torch.isfinite(images).sum())
    if unusable:
        raise ValueError(f"images must be finite, found {unusable} of {images.numel()} values NaN or infinite")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load(name: DatasetName, split: Split, *, data_dir: str | Path | None = None, download: bool = False) -> ImageSet:
    """Load one split of a data set into memory.

    Args:
        name: "digits" (1,797 scans of 8 x 8, carried by scikit-learn; 1,297 train, 500 test) or "fashion_mnist"
            (60,000 train and 10,000 test images, 28 x 28 padded with black to 32 x 32).
        split: "train" or "test".
        data_dir: folder of Fashion-MNIST's four IDX files, plain or gzipped. Without it, the folder named by the
            environment variable DRIFTFIELD_FASHION_MNIST, then Debian's package, then an earlier download.
        download: fetch Fashion-MNIST into `data_dir` (default: ~/.cache/driftfield) if it is in none of these places.

    Raises:
        DataError: if the files are absent, damaged or contradict each other; the message names the path.

    Returns:
        The images with their labels.

    >>> load("digits", "train").sample_shape
    (1, 8, 8)
    """
    if name not in LOADERS:
        raise DataError(f"dataset name must be one of {', '.join(LOADERS)}, found {name!r}")
    if split not in get_args(Split):
        raise DataError(f"split must be train or test, found {split!r}")
    return LOADERS[name](split, None if data_dir is None else Path(data_dir), download)


def _load_digits(split: Split, data_dir: Path | None, download: bool) -> ImageSet:
    """scikit-learn's digits; count c of 16 becomes byte round(c * 255 / 16), from which c = round(byte * 16 / 255)."""
    from sklearn.datasets import load_digits  # imported here: slow, and no other data set needs it

    if data_dir is not None:
        raise DataError(f"digits come with scikit-learn and are read from no folder, found data_dir={str(data_dir)!r}")
    digits = load_digits()
    ids = _digits_split(digits.target, split)
    images = np.rint(digits.images[ids] * (255 / DIGITS_LEVELS)).astype(np.uint8)
    return ImageSet(
        torch.from_numpy(images).unsqueeze(1),
        torch.from_numpy(digits.target[ids].astype(np.int64)),
        tuple(str(digit) for digit in range(10)),
        "digits",
        split,
    )


def _digits_split(labels: np.ndarray, split: Split) -> np.ndarray:
    """Positions of a split, ascending: the test split is the first 50 of each class in one fixed shuffled order."""
    shuffled = np.random.RandomState(DIGITS_SPLIT_SEED).permutation(len(labels))
    test = np.concatenate([shuffled[labels[shuffled] == digit][:DIGITS_TEST_PER_CLASS] for digit in range(10)])
    return np.sort(test) if split == "test" else np.setdiff1d(np.arange(len(labels)), test)


def _load_fashion_mnist(split: Split, data_dir: Path | None, download: bool) -> ImageSet:
    files = _find_fashion_mnist(split, data_dir, download)
    pixels = _read_idx(files.images, ndim=3)  # [N, 28, 28]
    labels = _read_idx(files.labels, ndim=1)  # [N]
    if pixels.shape[1:] != (28, 28):
        raise DataError(f"{files.images}: expected images of 28 x 28, found {pixels.shape[1]} x {pixels.shape[2]}")
    if len(pixels) != len(labels):
        raise DataError(
            f"{files.labels}: expected {len(pixels)} labels, one for each image of {files.images.name}, "
            f"found {len(labels)}"
        )
    if len(labels) and labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(f"{files.labels}: expected labels from 0 to 9, found {labels.max()}")
    images = functional.pad(torch.from_numpy(pixels).unsqueeze(1), [FASHION_MNIST_PADDING] * 4)  # [N, 1, 32, 32]
    return ImageSet(images, torch.from_numpy(labels).long(), FASHION_MNIST_CLASSES, "fashion_mnist", split)


class _IdxPair(NamedTuple):
    images: Path
    labels: Path


def _find_fashion_mnist(split: Split, data_dir: Path | None, download: bool) -> _IdxPair:
    """The image and label files of a split; a folder that the user named is the only place looked at."""
    cache = Path.home() / ".cache" / "driftfield"
    named = data_dir or (Path(os.environ[FASHION_MNIST_VARIABLE]) if os.environ.get(FASHION_MNIST_VARIABLE) else None)
    places = [named] if named else [FASHION_MNIST_DEBIAN, cache]
    found = [files for folder in places if (files := _fashion_mnist_files(folder, split))]
    if not found and download:
        _download_fashion_mnist(named or cache)
        found = [files for files in [_fashion_mnist_files(named or cache, split)] if files]
    if not found:
        stem = FASHION_MNIST_STEMS[split]
        raise DataError(
            f"fashion_mnist: expected {stem}-images-idx3-ubyte and {stem}-labels-idx1-ubyte (plain or .gz) in "
            f"{' or '.join(map(str, places))}, found {'; '.join(map(_contents, places))}; "
            f"name their folder as data_dir, install Debian's dataset-fashion-mnist, or allow the download"
        )
    return found[0]


def _fashion_mnist_files(folder: Path, split: Split) -> _IdxPair | None:
    """Both files of a split, in a folder or where torchvision puts them below it; gzip first: it has a checksum."""
    stem = FASHION_MNIST_STEMS[split]
    for parent in (folder, folder / "FashionMNIST" / "raw"):
        for ending in (".gz", ""):
            files = _IdxPair(parent / f"{stem}-images-idx3-ubyte{ending}", parent / f"{stem}-labels-idx1-ubyte{ending}")
            if files.images.is_file() and files.labels.is_file():
                return files
    return None


def _contents(folder: Path) -> str:
    """What a folder holds, in a few words."""
    if not folder.exists():
        return f"{folder} does not exist"
    if not folder.is_dir():
        return f"{folder} is not a folder"
    names = sorted(os.listdir(folder))
    listing = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{folder} holds {listing}" if names else f"{folder} is empty"


def _download_fashion_mnist(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST  # imported here: only a download needs it

    try:
        FashionMNIST(str(folder), download=True)
    except (RuntimeError, URLError, OSError) as error:
        raise DataError(f"fashion_mnist: expected a download into {folder}, found an error: {error}") from error


def _read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes: big-endian magic 0x0800 + ndim, then ndim sizes, then the bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable IDX file, found an error: {error}") from error
    header_bytes = 4 * (1 + ndim)
    if len(content) < header_bytes:
        raise DataError(f"{path}: expected a header of {header_bytes} bytes, found a file of {len(content)}")
    magic, *shape = np.frombuffer(content, ">u4", 1 + ndim).tolist()
    if magic != 0x0800 + ndim:
        raise DataError(f"{path}: expected magic number {0x0800 + ndim} (bytes in {ndim} dimensions), found {magic}")
    expected = int(np.prod(shape, dtype=object))
    if len(content) - header_bytes != expected:
        raise DataError(
            f"{path}: expected {expected} bytes of data for shape {shape}, found {len(content) - header_bytes}"
        )
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape).copy()


LOADERS: Mapping[str, Callable[[Split, Path | None, bool], ImageSet]] = {
    "digits": _load_digits,
    "fashion_mnist": _load_fashion_mnist,
}
