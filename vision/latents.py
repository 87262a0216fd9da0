"""Cached latents by visit: the image or its mirror, and a sample of the posterior."""

import hashlib
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from driftfield.training import generator, to_plain
from driftfield.training.visits import sample_ids
from vision.data import DataError
from vision.latent_files import (
    COMPLETE,
    MENDING,
    VARIANTS,
    LatentFiles,
    LatentHeader,
    LatentStatistics,
    open_store,
    read_labels,
    read_statistics,
    require_plausible,
)
from vision.tokenizer import Tokenizer

LOOKED_AT: Final = 64  # images whose latents are read, and their spread checked, when a store is opened


class LatentStore:
    """Latents of a data set, read from the disk as they are asked for, or kept in memory.

    Args:
        folder: as `python -m vision.cache_latents` writes it.
        tokenizer: the one that decodes what a generator makes of these latents; the store must be of its weights.
        workers: threads that read.
        memory_gib: read all of the store into memory if it fits into this. Where the disk is local, the system's own
            cache serves all processes of a machine about as fast.

    Raises:
        DataError: no such store, or one that is not complete, lacks files, is damaged, or is of another tokenizer; or
            its latents are not finite or of an implausible standard deviation, as with a wrong scale.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        workers: int = 4,
        memory_gib: float = 0.0,
    ) -> None:
        self.folder = Path(folder)
        group, self.header = open_store(self.folder)
        if tokenizer is not None:
            _require_tokenizer(self.folder, self.header, tokenizer)
        self._files = LatentFiles(self.folder, self.header)
        if COMPLETE not in group.attrs:
            raise DataError(
                f"{self.folder}: expected a complete store of latents, found {len(self._files.missing())} of "
                f"{len(self._files)} files missing and no mark {COMPLETE!r}; {MENDING}"
            )
        self.statistics = read_statistics(self.folder, group, self.header)
        require_plausible(self.folder, self.statistics, self.header)
        self.labels = read_labels(self.folder, group, self.header)
        self._places = self._files.places()  # [n, 2]
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="latents")
        self._memory: np.ndarray | None = None  # [n, 2, bytes]
        if self.num_bytes <= memory_gib * 2**30:
            self._memory = self._read_all()
        self._look_at_some()

    def __len__(self) -> int:
        return self.header.count

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the class folders, in the order of the labels."""
        return self.header.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.header.class_names)

    @property
    def num_bytes(self) -> int:
        """Size of all records."""
        return len(self) * len(VARIANTS) * self.header.record_bytes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of a latent."""
        channels, height, width = self.header.sample_shape
        return channels, height, width

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the latents: tokenizer, images (names, sizes, labels), and their statistics."""
        header = {key: value for key, value in to_plain(self.header).items() if key != "tokenizer"}  # it may have moved
        statistics = {"mean": self.statistics.mean, "std": self.statistics.std}
        digest = hashlib.sha256(json.dumps([header, statistics], sort_keys=True).encode())
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def read(self, visits: Tensor, *, seed: int) -> Tensor:
        """Scaled latents; each depends on (seed, visit) alone, whatever else is read with it.

        Args:
            visits: `[k]` int64, epoch * len + id.
            seed: of the run.

        Raises:
            ValueError: visits of a wrong shape, dtype or sign.
            DataError: a record is damaged or not finite; the message names file and image.

        Returns:
            `[k, c, h, w]` float32 on the CPU.
        """
        ids = sample_ids(visits, len(self)).tolist()
        reads = sorted(map(_Read, ids, range(len(ids)), visits.tolist()))
        records = self._files.empty(len(reads))
        noise = torch.empty(len(reads), *self.sample_shape)
        share = max(1, math.ceil(len(reads) / self._workers))
        parts = [reads[start : start + share] for start in range(0, len(reads), share)]
        list(self._pool.map(lambda part: self._read_part(part, seed, records, noise), parts))
        mean, std = self._files.moments(records).unbind(1)  # [k, c, h, w] each
        latents = noise.mul_(std).add_(mean).mul_(self.header.scale)
        self._files.require_finite(latents, ids)
        return latents

    def _look_at_some(self) -> None:
        """The mark says how the latents were when it was made; this looks at some as they are, spread over all."""
        some = torch.arange(0, len(self), -(-len(self) // LOOKED_AT))
        std, mean = torch.std_mean(self.read(some, seed=0).double(), (0, 2, 3), correction=0)
        found = LatentStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()), std_band=self.statistics.std_band)
        require_plausible(self.folder, found, self.header)

    def _read_all(self) -> np.ndarray:
        memory = self._files.empty(len(self) * len(VARIANTS)).reshape(len(self), len(VARIANTS), -1)

        def read_file(number: int) -> None:
            images = self._files.images(number)
            records = self._files.read_records(number)
            memory[images.start : images.stop] = records.reshape(len(images), len(VARIANTS), -1)

        list(self._pool.map(read_file, range(len(self._files))))
        return memory

    def _read_part(self, reads: "Sequence[_Read]", seed: int, records: np.ndarray, noise: Tensor) -> None:
        variants = []
        for _, position, visit in reads:
            draw = generator(seed, "latent", visit)
            variant = draw.initial_seed() >> 63  # its highest bit; on the CPU the lower 32 make the noise
            torch.randn(noise.shape[1:], generator=draw, out=noise[position])
            variants.append(variant)
        self._read_records(reads, variants, records)

    def _read_records(self, reads: "Sequence[_Read]", variants: Sequence[int], records: np.ndarray) -> None:
        images, positions = [read.image for read in reads], [read.position for read in reads]
        if self._memory is not None:
            records[positions] = self._memory[images, variants]
            return
        looks = zip(images, positions, variants, strict=True)
        for number, looks_at_file in groupby(looks, key=lambda look: look[0] // self.header.chunk_images):
            with self._files.opened(number) as file:
                for image, position, variant in looks_at_file:
                    place = int(self._places[image, variant])
                    self._files.read_record(file, place, records[position], image=image, variant=variant)


class _Read(NamedTuple):
    image: int
    position: int  # in the result
    visit: int


def _require_tokenizer(folder: Path, header: LatentHeader, tokenizer: Tokenizer) -> None:
    expected = {
        "tokenizer_sha256": tokenizer.fingerprint,
        "scale": tokenizer.scale,
        "channels": tokenizer.channels,
        "downsampling": tokenizer.downsampling,
    }
    found = {
        "tokenizer_sha256": header.tokenizer_sha256,
        "scale": header.scale,
        "channels": header.sample_shape[0],
        "downsampling": header.image_size / header.sample_shape[1],
    }
    for name, value in expected.items():
        if found[name] != value:
            raise DataError(
                f"{folder}: these latents are of another tokenizer ({header.tokenizer}): "
                f"{name}: expected {value}, found {found[name]}"
            )
