"""The files of a store of latents: their header, and records that are checked whenever they are read.

    STORE/zarr.json         zarr (format 3) group; its attributes: the header, and at the very end the mark `complete`
    STORE/labels            int64 [n]
    STORE/moments           float16 or float32 [n, 2, 2, c, h, w]: image or mirror; mean or standard deviation, unscaled
    STORE/moments/c/I/...   one file for each `chunk_images` images; each image's and mirror's record has a CRC-32C

zarr writes the store and reads its metadata. Records are read straight from the files, whose layout zarr's format
fixes ("sharding_indexed": records with their CRC, then a table of their places): zarr itself gives a missing record as
its fill value, and takes far longer for single records.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import google_crc32c
import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from driftfield.training import ConfigError, from_plain, option, to_plain
from vision.data import DataError

VERSION: Final = 1
HEADER, COMPLETE = "driftfield_latents", "complete"  # attributes of the group
MOMENTS, LABELS = "moments", "labels"  # its arrays
VARIANTS: Final = ("image", "mirror")
MENDING: Final = "python -m vision.cache_latents with the same keys mends it"
# Of all latents: a scale is there to make it 1 (Rombach et al. 2022, Appendix G). With Stable Diffusion's ImageNet has
# 0.91, by EDM2's published statistics of its channels; without the scale 5.0, scaled twice 0.17.
STD_BAND: Final = (0.5, 2.0)
LatentDtype = Literal["float16", "float32"]

_GROUP, _CREATE_LOCK = "zarr.json", "create.lock"
_CRC_BYTES: Final = 4
_PLACE_BYTES: Final = 16  # of a record in the table: offset and length, uint64 each


@dataclass(frozen=True, kw_only=True)
class LatentHeader:
    """What the latents of a store are made of."""

    version: int = option("version of this layout")
    tokenizer: str = option("hub id or folder of the autoencoder")
    tokenizer_sha256: str = option("SHA-256 of its weights")
    bfloat16: bool = option("whether it computed in bfloat16")
    scale: float = option("factor from a sample of the posterior to a latent", above=0)
    sample_shape: tuple[int, ...] = option("c, h, w", min=1)
    dtype: LatentDtype = option("of the moments")
    image_size: int = option("side of the centre crop, in pixels", min=1)
    images_sha256: str = option("fingerprint of the folder of images")
    class_names: tuple[str, ...] = option("class folders, in the order of the labels")
    count: int = option("images", min=1)
    chunk_images: int = option("images per file", min=1)

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"version: expected {VERSION}, found {self.version}")
        if len(self.sample_shape) != 3:
            raise ValueError(f"sample_shape: expected c, h, w, found {self.sample_shape}")

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Mean and standard deviation of one variant of an image, (2, c, h, w)."""
        return (2, *self.sample_shape)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, its CRC included."""
        return int(np.prod(self.record_shape)) * np.dtype(self.dtype).itemsize + _CRC_BYTES


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """What the mark of a complete store says: moments of each channel over all scaled latents."""

    mean: tuple[float, ...] = option("of each channel")
    std: tuple[float, ...] = option("of each channel", min=0)
    std_band: tuple[float, float] = option("lowest and highest plausible standard deviation of all", STD_BAND, min=0)

    @property
    def overall_std(self) -> float:
        """Standard deviation of all latents, whatever their channel.

        >>> LatentStatistics(mean=(-3.0, 3.0), std=(4.0, 4.0)).overall_std
        5.0
        """
        mean, std = np.array(self.mean), np.array(self.std)
        return float(np.sqrt((std**2).mean() + mean.var()))


def create_store(folder: Path, header: LatentHeader, labels: Tensor) -> None:
    """Write everything but the moments, or do nothing where that is done; processes may do so at the same time.

    Args:
        folder: of the store.
        header: of the store.
        labels: `[n]` int64.

    Raises:
        DataError: the folder holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _require_own(folder)  # before anything is written
    with open(folder / _CREATE_LOCK, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _GROUP).exists():
            return
        zarr.create_array(
            folder / MOMENTS,
            shape=(header.count, len(VARIANTS), *header.record_shape),
            shards=(header.chunk_images, len(VARIANTS), *header.record_shape),
            chunks=(1, 1, *header.record_shape),
            dtype=header.dtype,
            compressors=[Crc32cCodec()],
            fill_value=float("nan"),  # what other readers see of a record that is missing
            overwrite=True,
        )
        values = labels.numpy().astype("<i8")
        zarr.create_array(
            folder / LABELS,
            data=values,
            chunks=values.shape,
            compressors=[Crc32cCodec()],
            fill_value=-1,  # no label: zarr leaves out a file that holds nothing else than this
            overwrite=True,
        )
        zarr.create_group(folder, attributes={HEADER: to_plain(header)})  # last: it says that the rest is there


def _require_own(folder: Path) -> None:
    """Leave a folder alone that holds neither a store nor only what one is made of, by others now or until a kill."""
    own = (MOMENTS, LABELS, _CREATE_LOCK)
    others = [entry.name for entry in folder.iterdir() if entry.name not in own and entry.suffix != ".partial"]
    if others and not (folder / _GROUP).exists():
        raise DataError(
            f"{folder}: expected an empty folder or a store of latents, found {', '.join(sorted(others)[:3])}"
        )


def mark_complete(folder: Path, statistics: LatentStatistics) -> None:
    """Say that every file is there and whole."""
    zarr.open_group(folder, mode="r+", zarr_format=3).attrs[COMPLETE] = to_plain(statistics)


def read_statistics(folder: Path, group: Any, header: LatentHeader) -> LatentStatistics:
    """What the mark of a complete store says.

    Raises:
        DataError: it is damaged, or does not fit the header.
    """
    try:
        statistics = from_plain(LatentStatistics, group.attrs[COMPLETE])
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: mark {COMPLETE}: {error}") from error
    if not len(statistics.mean) == len(statistics.std) == header.sample_shape[0]:
        raise DataError(
            f"{folder}: mark {COMPLETE}: expected mean and std of {header.sample_shape[0]} channels, "
            f"found {len(statistics.mean)} and {len(statistics.std)}"
        )
    return statistics


def require_plausible(folder: Path, statistics: LatentStatistics, header: LatentHeader) -> None:
    """Refuse latents that are scaled wrongly, or not at all.

    Raises:
        DataError: their standard deviation lies outside the band.
    """
    low, high = statistics.std_band
    if not low <= statistics.overall_std <= high:  # also for NaN
        raise DataError(
            f"{folder}: expected scaled latents of standard deviation {low:g} to {high:g}, found "
            f"{statistics.overall_std:.3g} with scale {header.scale:g} (tokenizer {header.tokenizer}); if that is "
            "right, declare it by std_band=[LOW,HIGH] of python -m vision.cache_latents"
        )


def open_store(folder: Path) -> tuple[Any, LatentHeader]:
    """The group of a store, for reading, and its header.

    Raises:
        DataError: there is no store, or its metadata are damaged or not what this project writes.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a store of latents; there is no such folder")
    try:
        group = zarr.open_group(folder, mode="r", zarr_format=3)
        attributes: Any = group.attrs.asdict()
        moments = group[MOMENTS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: expected a zarr store (format 3) as python -m vision.cache_latents writes it: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        header = from_plain(LatentHeader, attributes.get(HEADER, {}))
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: header {HEADER}: {error}") from error
    _require_layout(folder, moments, header)
    return group, header


def read_labels(folder: Path, group: Any, header: LatentHeader) -> Tensor:
    """Label of every image, `[n]` int64.

    Raises:
        DataError: they are damaged, or do not fit the header.
    """
    try:
        array: Any = group[LABELS]
        missing = array.nchunks - array.nchunks_initialized
        labels = np.asarray(array[...])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{folder / LABELS}: expected the labels, found: {type(error).__name__}: {error}") from error
    if missing:
        raise DataError(f"{folder / LABELS}: expected the labels, found no file of them")
    if labels.dtype != np.int64 or labels.shape != (header.count,):
        raise DataError(
            f"{folder / LABELS}: expected int64 [{header.count}], found {labels.dtype} {list(labels.shape)}"
        )
    highest = len(header.class_names) - 1
    if labels.min() < 0 or labels.max() > highest:
        raise DataError(
            f"{folder / LABELS}: expected labels from 0 to {highest}, found {labels.min()} to {labels.max()}"
        )
    return torch.from_numpy(labels)


class LatentFiles:
    """The files of the moments, by number.

    Args:
        folder: of the store.
        header: of the store.
    """

    def __init__(self, folder: Path, header: LatentHeader) -> None:
        self.folder, self.header = folder, header
        self._records = header.chunk_images * len(VARIANTS)  # places in the table of each file
        self._dtype = np.dtype(header.dtype).newbyteorder("<")

    def __len__(self) -> int:
        return -(-self.header.count // self.header.chunk_images)

    def path(self, number: int) -> Path:
        """Where a file is."""
        return self.folder.joinpath(MOMENTS, "c", str(number), *"00000")

    def images(self, number: int) -> range:
        """Ids of the images of a file."""
        start = number * self.header.chunk_images
        return range(start, min(start + self.header.chunk_images, self.header.count))

    def num_bytes(self, number: int) -> int:
        """Size of a file."""
        records = len(self.images(number)) * len(VARIANTS)
        return records * self.header.record_bytes + self._records * _PLACE_BYTES + _CRC_BYTES

    def missing(self) -> list[int]:
        """Numbers of the files that are not there."""
        return [number for number in range(len(self)) if not self.path(number).is_file()]

    def places(self) -> np.ndarray:
        """Offset of every record in its file, int64 `[n, 2]`.

        Raises:
            DataError: files are missing, too short, or their table is damaged.
        """
        missing = self.missing()
        if missing:
            raise DataError(
                f"{self.path(missing[0])}: expected a file of latents, found none; {len(missing)} of {len(self)} files "
                f"are missing; {MENDING}"
            )
        tables = []
        for number in range(len(self)):
            with self.opened(number) as file:
                tables.append(self._table(number, file))
        return np.concatenate(tables)

    @contextmanager
    def opened(self, number: int) -> Iterator[int]:
        """Descriptor of a file, for `read_record`."""
        try:
            file = os.open(self.path(number), os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.path(number)}: expected a file of latents, found: {error.strerror}") from error
        try:
            yield file
        finally:
            os.close(file)

    def empty(self, count: int) -> np.ndarray:
        """Room for that many records, uint8 `[count, bytes]`."""
        return np.empty((count, self.header.record_bytes), np.uint8)

    def read_record(self, file: int, offset: int, into: np.ndarray, *, image: int, variant: int) -> None:
        """Read one record and check its CRC.

        Args:
            file: descriptor of the image's file.
            offset: of the record, as in `places`.
            into: uint8, a row of `empty`.
            image, variant: whose record it is, for the message.

        Raises:
            DataError: the record is cut short or damaged.
        """
        read = os.preadv(file, [into.data], offset)
        if read < len(into) or _crc(into[:-_CRC_BYTES]) != into[-_CRC_BYTES:].tobytes():
            number = image // self.header.chunk_images
            raise DataError(
                f"{self.path(number)}: the record of image {image} ({VARIANTS[variant]}) is damaged: "
                f"its CRC-32C is not the one stored; {MENDING}"
            )

    def moments(self, records: np.ndarray) -> Tensor:
        """What the bytes of records hold, `[k, 2, c, h, w]`: mean and standard deviation."""
        values = np.ascontiguousarray(records[:, :-_CRC_BYTES]).view(self._dtype)
        return torch.from_numpy(values.reshape(-1, *self.header.record_shape))

    def read_records(self, number: int) -> np.ndarray:
        """All records of a file, each checked, uint8 `[m * 2, bytes]`.

        Raises:
            DataError: it is missing or damaged.
        """
        images = self.images(number)
        records = self.empty(len(images) * len(VARIANTS))
        with self.opened(number) as file:
            for row, ((index, variant), place) in enumerate(np.ndenumerate(self._table(number, file))):
                self.read_record(file, int(place), records[row], image=images[index], variant=variant)
        return records

    def read(self, number: int) -> Tensor:
        """All moments of a file, `[m, 2, 2, c, h, w]`, as `read_records` reads them.

        Raises:
            DataError: it is missing or damaged, or not all of them are finite.
        """
        moments = self.moments(self.read_records(number)).unflatten(0, (-1, len(VARIANTS)))
        self.require_finite(moments, self.images(number))
        return moments

    def require_finite(self, values: Tensor, images: Sequence[int]) -> None:
        """Refuse values `[k, ...]` that are not finite; the message names the first such image's file."""
        if values.sum(dtype=torch.float32).isfinite():  # many times faster than to look at each
            return
        finite = values.isfinite().flatten(1).all(1)  # [k]
        if not finite.all():
            image = images[int(finite.int().argmin())]
            raise DataError(
                f"{self.path(image // self.header.chunk_images)}: expected finite latents, "
                f"found NaN or infinity in those of image {image}; {MENDING}"
            )

    def write(self, number: int, moments: Tensor) -> None:
        """Write a file, whole or not at all.

        Args:
            number: of the file.
            moments: `[m, 2, 2, c, h, w]`, of the store's dtype.

        Raises:
            OSError: if the disk refuses.
        """
        images = self.images(number)
        for leftover in (self.path(number), *self.path(number).parent.glob("*.partial")):
            leftover.unlink(missing_ok=True)  # zarr would read it to change it
        array: Any = zarr.open_array(self.folder / MOMENTS, mode="r+", zarr_format=3)
        array[images.start : images.stop] = moments.numpy()

    def _table(self, number: int, file: int) -> np.ndarray:
        """Offsets of the records of a file, int64 `[m, 2]`."""
        table_bytes = self._records * _PLACE_BYTES + _CRC_BYTES
        end = os.fstat(file).st_size - table_bytes
        content = os.pread(file, table_bytes, end) if end >= 0 else b""
        table, crc = content[:-_CRC_BYTES], content[-_CRC_BYTES:]
        if len(content) < table_bytes or _crc(table) != crc:
            raise DataError(f"{self.path(number)}: the file is cut short, or its table of records damaged; {MENDING}")
        images = self.images(number)
        places = np.frombuffer(table, "<u8").reshape(-1, len(VARIANTS), 2)[: len(images)]
        offset, length = places[..., 0], places[..., 1]
        wrong = (length != self.header.record_bytes) | (offset > np.uint64(max(end - self.header.record_bytes, 0)))
        if wrong.any():
            raise DataError(
                f"{self.path(number)}: expected the records of images {images.start} to {images.stop - 1}, "
                f"found {int(wrong.sum())} of {wrong.size} missing; {MENDING}"
            )
        return offset.astype(np.int64)


def _crc(content: Any) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(_CRC_BYTES, "little")


def _require_layout(folder: Path, moments: Any, header: LatentHeader) -> None:
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": (1, 1, *header.record_shape),
        "codecs": codecs,
        "index_codecs": codecs,
        "index_location": "end",
    }
    expected = {
        "shape": (header.count, len(VARIANTS), *header.record_shape),
        "data_type": header.dtype,
        "chunk_grid": (header.chunk_images, len(VARIANTS), *header.record_shape),
        "codecs": ({"name": "sharding_indexed", "configuration": sharding},),
    }
    found = moments.metadata.to_dict()
    found["chunk_grid"] = found["chunk_grid"]["configuration"]["chunk_shape"]
    for name, value in expected.items():
        if to_plain(found[name]) != to_plain(value):
            raise DataError(f"{folder / MOMENTS}: {name}: expected {value} as the header says, found {found[name]}")
