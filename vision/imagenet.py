"""Images in folders, one per class, as ImageNet comes: decoded when they are looked at, by several threads."""

import hashlib
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from driftfield.training import generator
from driftfield.training.visits import sample_ids
from vision.data import DataError, to_float

Classes = Literal["imagenet", "folders"]
Augmentation = Literal["none", "flip", "crop"]

IMAGE_SIZE: Final = 256
RANDOM_CROP_AREA: Final = (0.2, 1.0)  # share of the image
RANDOM_CROP_ASPECT: Final = (3 / 4, 4 / 3)
RANDOM_CROP_TRIES: Final = 10
MAX_ASPECT: Final = 64  # of an image: its short side is scaled to 256 before the crop, and the long one with it
# What Pillow converts to RGB without loss of range: grey is repeated, alpha dropped, CMYK inverted and multiplied.
MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_log = logging.getLogger(__name__)


class UnreadableImageError(DataError):
    """A file that is no usable image, whoever reads it when and where."""


class ImageFolder:
    """The images of `root/split/CLASS/*`, cropped to squares.

    Args:
        root: folder with a folder for each split.
        split: such as "train" or "val".
        classes: "imagenet" expects ImageNet's 1000 synsets, whose order gives the labels; "folders" takes what folders
            there are, sorted bytewise by name.
        augmentation: "none" is ADM's centre crop, "flip" mirrors half of these, "crop" takes random parts (20 to 100 %
            of the area, 3:4 to 4:3) instead and mirrors half of them.
        image_size: side of the crops, in pixels.
        workers: threads that decode.
        memory_gib: memory for decoded crops, so that visits read again soon are not decoded again.
        max_unreadable: share of the files that may be empty, damaged or no image. In the place of each, at every visit,
            the next readable one of its class is read, by name and after the last the first: what an id shows depends
            on the files alone. 0: the first such file is an error. What the system refuses to read always is.

    Raises:
        DataError: folders are missing or unknown, or without images, or files can't be images.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        classes: Classes = "folders",
        augmentation: Augmentation = "flip",
        image_size: int = IMAGE_SIZE,
        workers: int = 8,
        memory_gib: float = 0.0,
        max_unreadable: float = 0.0,
    ) -> None:
        self.folder = Path(root) / split
        self.class_names = _class_names(self.folder, classes)
        self._augmentation, self._image_size = augmentation, image_size
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
        self._recent = _Recent(int(memory_gib * 2**30) // (3 * image_size**2))
        files = list(self._pool.map(lambda name: _list_images(self.folder / name), self.class_names))
        self._unreadable = _Unreadable(max_unreadable, sum(map(len, files)))
        _require_images(self.folder, dict(zip(self.class_names, files, strict=True)), self._unreadable.allowed)
        counts = torch.tensor([len(of_class) for of_class in files])
        self.labels = torch.arange(len(files)).repeat_interleave(counts)  # [n]
        self._ends = counts.cumsum(0).tolist()  # of each class's ids
        self._names = [file.name for of_class in files for file in of_class]
        self.fingerprint = _fingerprint(self.class_names, files)
        for image, file in enumerate(chain.from_iterable(files)):
            if not file.bytes:
                self._unreadable.add(image, f"{self.path(image)}: expected an image file, found it empty or unreadable")

    def __len__(self) -> int:
        return len(self._names)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a crop."""
        return 3, self._image_size, self._image_size

    @property
    def unreadable(self) -> list[str]:
        """Files CLASS/NAME in whose place others are read, as far as they were met."""
        names = [self.path(image).relative_to(self.folder) for image in sorted(self._unreadable.images)]
        return [_printable(name) for name in names]

    def path(self, image: int) -> Path:
        """File of an image, by its id."""
        return self.folder / self.class_names[int(self.labels[image])] / self._names[image]

    def read(self, visits: Tensor, *, seed: int) -> Tensor:
        """Crops; each depends on (seed, visit) alone, whatever else is read with it.

        Args:
            visits: `[k]` int64, epoch * len + id.
            seed: of the run.

        Raises:
            ValueError: visits of a wrong shape, dtype or sign.
            DataError: a file is not a readable image; the message names it.

        Returns:
            `[k, 3, H, W]` float32 in [-1, 1] on the CPU.
        """
        return to_float(self.read_bytes(visits, seed=seed))

    def read_bytes(self, visits: Tensor, *, seed: int) -> Tensor:
        """The same as uint8, a quarter of the memory: a GPU makes floats of them faster than a CPU."""
        sample_ids(visits, len(self))
        looks = [(seed, visit) for visit in visits.tolist()]
        pixels = self._recent.get(looks, lambda absent: self._pool.map(self._look, absent))
        return torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, *self.sample_shape).byte()

    def center_crops(self, images: Sequence[int]) -> Tensor:
        """Centre crops by id, not mirrored, uint8 `[k, 3, H, W]`.

        Raises:
            DataError: a file is not a readable image; the message names it.
        """
        return torch.from_numpy(np.stack(list(self._pool.map(lambda image: self._center(self._open(image)), images))))

    def _look(self, look: tuple[int, int]) -> np.ndarray:
        """The crop of a visit, uint8 `[3, H, W]`."""
        seed, visit = look
        draw = generator(seed, "image", visit)
        mirrored = bool(torch.randint(2, (), generator=draw)) and self._augmentation != "none"
        image = self._open(visit % len(self))
        pixels = self._random(image, draw) if self._augmentation == "crop" else self._center(image)
        return np.ascontiguousarray(pixels[..., ::-1]) if mirrored else pixels

    def _open(self, image: int) -> Image.Image:
        """The image of an id, or in its place the next readable one of its class."""
        for other in self._from(image):
            if other in self._unreadable.images:
                continue
            try:
                return read_image(self.path(other))
            except UnreadableImageError as error:
                self._unreadable.add(other, error)
        raise DataError(f"{self.path(image).parent}: expected at least one readable image, found none")

    def _from(self, image: int) -> Iterator[int]:
        """The ids of an image's class, from its own on, and after the last from the first on."""
        label = int(self.labels[image])
        start, end = self._ends[label - 1] if label else 0, self._ends[label]
        yield from range(image, end)
        yield from range(start, image)

    def _center(self, image: Image.Image) -> np.ndarray:
        return _pixels(center_crop(image, self._image_size))

    def _random(self, image: Image.Image, draw: torch.Generator) -> np.ndarray:
        box = random_box(image.width, image.height, draw)
        square = (self._image_size, self._image_size)
        return _pixels(image.crop(box).resize(square, Image.Resampling.BICUBIC))


def read_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UnreadableImageError: it is no whole image, or has more than 8 bits a channel, or is extremely long or large.
        DataError: the system does not let it be read.
    """
    try:
        with Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
            rgb = image.convert("RGB") if mode in MODES else None
    except Exception as error:  # decoders of foreign files raise anything
        of_system = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        kind = DataError if of_system else UnreadableImageError
        raise kind(f"{path}: expected a whole image, found: {type(error).__name__}: {error}") from error
    if rgb is None:
        raise UnreadableImageError(
            f"{path}: expected an image of 8 bits a channel ({', '.join(MODES)}), found mode {mode}"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImageError(f"{path}: expected sides of at most {MAX_ASPECT}:1, found {width} x {height}")
    return rgb


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of ADM: halve with a box filter while the short side is at least 2 * size, scale it to size, crop.

    Args:
        image: of any size.
        size: side of the square, in pixels.

    Returns:
        The square in the middle; where the rest is odd, the smaller part is left of it and above.

    >>> center_crop(Image.new("RGB", (500, 375)), 256).size
    (256, 256)
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_box(width: int, height: int, draw: torch.Generator) -> tuple[int, int, int, int]:
    """Part of an image that a random-resized-crop takes: area and log aspect uniform, tried until the part fits.

    Args:
        width, height: of the image, in pixels.
        draw: source of randomness.

    Returns:
        Left, top, right, bottom; after ten misfits the largest part in the middle whose aspect is allowed.
    """
    log_aspects = [math.log(aspect) for aspect in RANDOM_CROP_ASPECT]
    for _ in range(RANDOM_CROP_TRIES):
        area = width * height * torch.empty(1).uniform_(*RANDOM_CROP_AREA, generator=draw).item()
        aspect = torch.empty(1).uniform_(*log_aspects, generator=draw).exp().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (), generator=draw))
            left = int(torch.randint(width - w + 1, (), generator=draw))
            return left, top, left + w, top + h
    narrowest, widest = RANDOM_CROP_ASPECT
    w, h = min(width, max(1, round(height * widest))), min(height, max(1, round(width / narrowest)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def imagenet_synsets() -> tuple[str, ...]:
    """WordNet ids of ImageNet's 1000 classes in the order of their labels.

    >>> imagenet_synsets()[:2]
    ('n01440764', 'n01443537')
    """
    from timm.data.imagenet_info import ImageNetInfo  # takes seconds to import, and only ImageNet needs it

    return tuple(ImageNetInfo("imagenet-1k").label_names())


class _File(NamedTuple):
    name: str
    bytes: int


class _Recent:
    """The decoded images looked at last, as many as there is room for; threads may ask at the same time."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._pixels: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = Lock()

    def get(
        self,
        looks: Sequence[tuple[int, int]],
        decode: Callable[[Sequence[tuple[int, int]]], Iterable[np.ndarray]],
    ) -> list[np.ndarray]:
        """The images of all looks; those not in memory are decoded, each once."""
        with self._lock:
            absent = list(dict.fromkeys(look for look in looks if look not in self._pixels))
            self._pixels.update(zip(absent, decode(absent), strict=True))
            pixels = [self._pixels[look] for look in looks]
            for look in looks:
                self._pixels.move_to_end(look)
            while len(self._pixels) > self._room:
                self._pixels.popitem(last=False)
        return pixels


class _Unreadable:
    """Ids of the unreadable files met so far, of which there may be a share; threads may add at the same time."""

    def __init__(self, share: float, num: int) -> None:
        self.images: set[int] = set()
        self.allowed = int(share * num)
        self._limit = f"max_unreadable={share:g} allows {self.allowed} of {num} files"
        self._lock = Lock()

    def add(self, image: int, reason: object) -> None:
        """Take in an id, and say so once.

        Raises:
            DataError: it is one too many.
        """
        with self._lock:
            if image in self.images:
                return
            if len(self.images) == self.allowed:
                raise DataError(f"{_printable(reason)}; {self._limit}")
            self.images.add(image)
            _log.warning("%s; the next image of its class is read instead; %s", _printable(reason), self._limit)


def _printable(text: object) -> str:
    """Without the halves of characters that stand for bytes of file names that are no UTF-8."""
    return os.fsencode(str(text)).decode(errors="backslashreplace")


def _class_names(folder: Path, classes: Classes) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with a folder of images for each class; there is no such folder")
    found = sorted((entry.name for entry in folder.iterdir() if _is_class(entry)), key=os.fsencode)
    if classes == "folders":
        if not found:
            raise DataError(f"{folder}: expected a folder of images for each class, found no folder")
        return tuple(found)
    synsets = imagenet_synsets()
    missing, unknown = sorted(set(synsets) - set(found)), sorted(set(found) - set(synsets))
    if missing or unknown:
        raise DataError(
            f"{folder}: expected a folder for each of ImageNet's {len(synsets)} synsets, "
            f"found {_some(missing)} missing and {_some(unknown)} unknown; classes=folders takes any folders"
        )
    return synsets


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _list_images(folder: Path) -> list[_File]:
    """Images of a class, in bytewise order of their names, which no file system or language changes."""
    with os.scandir(folder) as entries:
        images = [entry for entry in entries if entry.name.lower().endswith(IMG_EXTENSIONS)]
    return [_File(entry.name, _bytes(entry)) for entry in sorted(images, key=lambda entry: os.fsencode(entry.name))]


def _bytes(entry: os.DirEntry[str]) -> int:
    """Size of a file; 0 for what can't be read: a folder or a link to nothing."""
    try:
        return entry.stat().st_size if entry.is_file() else 0
    except OSError:
        return 0


def _require_images(folder: Path, files: dict[str, list[_File]], max_empty: int) -> None:
    empty = [name for name, of_class in files.items() if not of_class]
    if empty:
        raise DataError(
            f"{folder}: expected images ({' '.join(IMG_EXTENSIONS)}) in every class folder, "
            f"found {_some(empty)} without any"
        )
    unreadable = [f"{name}/{file.name}" for name, of_class in files.items() for file in of_class if not file.bytes]
    if len(unreadable) > max_empty:
        raise DataError(f"{folder}: expected image files, found {_some(unreadable)} empty or unreadable")


def _fingerprint(class_names: Sequence[str], files: Sequence[Sequence[_File]]) -> str:
    """SHA-256 of labels, class names, file names and sizes; no byte of a name can be a zero."""
    digest = hashlib.sha256()
    for label, (class_name, of_class) in enumerate(zip(class_names, files, strict=True)):
        for file in of_class:
            for part in (str(label), class_name, file.name, str(file.bytes)):
                digest.update(os.fsencode(part) + b"\0")
    return digest.hexdigest()


def _some(names: Sequence[str]) -> str:
    """The number of names and the first few."""
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _pixels(image: Image.Image) -> np.ndarray:
    """Bytes of an RGB image, uint8 `[3, H, W]`."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
