"""How fast cached latents are read, beside what disk and memory give: `python -m benchmarks.latents`.

A store of random moments of ImageNet's shape is made and read by random visits as a training step reads it: the
ablation's step takes 64 labels of 64 positives and 16 unconditional images, 5,120 reads, which is the default. Floors,
measured in the same run with as many threads: the same records fetched with no CRC, no noise and no arithmetic, from a
disk whose cache was dropped, from the system's cache, and from memory; and the noise alone, drawn at once. Dropping
needs a local disk; a virtual machine's host may still hold the data in its own cache.
"""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from driftfield.training import option, run_program
from driftfield.training.atomic_file import write_json
from vision.latent_files import (
    VARIANTS,
    VERSION,
    LatentFiles,
    LatentHeader,
    LatentStatistics,
    create_store,
    mark_complete,
)
from vision.latents import LatentStore

CONFIG_DIR: Final = Path(__file__).parents[1] / "configs" / "benchmarks"
SHAPE: Final = (4, 32, 32)  # of ImageNet 256's latents


@dataclass(kw_only=True)
class LatentsBenchmarkConfig:
    """Keys of `python -m benchmarks.latents`."""

    folder: Path | None = option("where to make the store, 32 KiB an image; null: the system's folder for such things")
    images: int = option("images in the store", min=1)
    workers: tuple[int, ...] = option("numbers of threads to read with", min=1)
    reads: int = option("reads at once", min=1)
    repeats: int = option("of which the fastest counts", min=1)
    out: Path = option("JSON file of the figures")


def make_store(folder: Path, count: int) -> LatentFiles:
    """A store of random moments, its pages written out so that the system can forget them."""
    header = LatentHeader(
        version=VERSION,
        tokenizer="random",
        tokenizer_sha256="",
        bfloat16=False,
        scale=1.0,
        sample_shape=SHAPE,
        dtype="float16",
        image_size=256,
        images_sha256="",
        class_names=("all",),
        count=count,
        chunk_images=512,
    )
    create_store(folder, header, torch.zeros(count, dtype=torch.int64))
    files = LatentFiles(folder, header)
    moments = torch.randn(header.chunk_images, len(VARIANTS), *header.record_shape).abs().half()
    for number in range(len(files)):
        files.write(number, moments[: len(files.images(number))])
    mark_complete(folder, LatentStatistics(mean=(0.0,) * 4, std=(1.0,) * 4))
    os.sync()
    return files


def forget(files: LatentFiles) -> None:
    """Drop the store from the system's cache."""
    for number in range(len(files)):
        with files.opened(number) as file:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def fastest(function: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> float:
    """Seconds of the fastest of some calls; what comes before a call is not counted."""
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def fetch(files: LatentFiles, places: np.ndarray, images: Sequence[int], workers: int) -> None:
    """Read one record of each image, in the order of the disk, and do nothing with it."""
    header = files.header

    def fetch_part(part: Sequence[int]) -> None:
        buffer = files.empty(1)[0]
        number, file = -1, -1
        for image in part:
            if image // header.chunk_images != number:
                if file >= 0:
                    os.close(file)
                number = image // header.chunk_images
                file = os.open(files.path(number), os.O_RDONLY)
            os.preadv(file, [buffer.data], int(places[image, 0]))
        os.close(file)

    ordered = sorted(images)
    share = -(-len(ordered) // workers)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fetch_part, [ordered[start : start + share] for start in range(0, len(ordered), share)]))


def measure(config: LatentsBenchmarkConfig, folder: Path) -> list[dict[str, str | int | float]]:
    """Rows of the table: what was read from where, with its time and its floor's."""
    files = make_store(folder, config.images)
    visits = torch.randint(100 * config.images, (config.reads,), generator=torch.Generator().manual_seed(0))
    images = (visits % config.images).tolist()
    places = files.places()
    memory = np.concatenate([files.read_records(number) for number in range(len(files))])
    rows: list[dict[str, str | int | float]] = []
    for workers in config.workers:
        store = LatentStore(folder, workers=workers)
        in_memory = LatentStore(folder, workers=workers, memory_gib=2**20)

        def read(store: LatentStore) -> float:
            return fastest(lambda: store.read(visits, seed=0), config.repeats)

        def read_cold(store: LatentStore) -> float:
            return fastest(lambda: store.read(visits, seed=0), config.repeats, before=lambda: forget(files))

        def floor(workers: int, before: Callable[[], object] = lambda: None) -> float:
            return fastest(lambda: fetch(files, places, images, workers), config.repeats, before)

        copying = fastest(lambda: memory[[2 * image for image in images]], config.repeats)
        for source, seconds, floor_s in (
            ("disk", read_cold(store), floor(workers, before=lambda: forget(files))),
            ("system's cache", read(store), floor(workers)),
            ("memory", read(in_memory), copying),
        ):
            rows.append({"source": source, "workers": workers, "seconds": seconds, "floor_s": floor_s})
    return rows


def main(config: LatentsBenchmarkConfig) -> int:
    """Measure, print the table and write the figures."""
    noise = torch.empty(config.reads, *SHAPE)
    noise_s = fastest(lambda: torch.randn(noise.shape, out=noise), config.repeats)
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        needed, free = config.images * 2**15, shutil.disk_usage(folder).free
        if needed > free:
            raise SystemExit(f"error: expected {needed / 2**30:.2g} GiB free in {folder}, found {free / 2**30:.2g} GiB")
        rows = measure(config, Path(folder) / "store")
    print(f"{config.reads} reads of {config.images} images; {os.cpu_count()} cores, {platform.machine()}")
    print(f"noise alone: {config.reads / noise_s:,.0f} latents/s with {torch.get_num_threads()} threads")
    print(f"{'from':<16} threads  latents/s   MB/s  of the floor  {config.reads} reads")
    for row in rows:
        seconds, floor_s = float(row["seconds"]), float(row["floor_s"])
        rate, megabytes = config.reads / seconds, config.reads * 2**14 / seconds / 1e6
        print(
            f"{row['source']:<16} {row['workers']:>7} {rate:>10,.0f} {megabytes:>6,.0f} {floor_s / seconds:>12.0%} "
            f"{1000 * seconds:>8,.0f} ms"
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.out, {"reads": config.reads, "images": config.images, "noise_s": noise_s, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(
            main, LatentsBenchmarkConfig, config_dir=CONFIG_DIR, config_name="latents", description=__doc__ or ""
        )
    )
