"""Encode a folder of images once, for training on latents: `python -m vision.cache_latents data=FOLDER out=STORE`.

Of every image and of its mirror it keeps the posterior's mean and standard deviation, from which each epoch draws
anew. To resume after a stop or a kill, run the same command again: files that are whole stay, damaged and missing ones
are made. Several processes share the work under torchrun, or each with shard=I num_shards=N; whichever ends last
checks the whole store and marks it complete. With max_unreadable=0.001 up to a thousandth of the images may be
unreadable: the store has the next of their class in their place, and says so in STORE/runs.
"""

import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from driftfield.training import Progress, RunFolder, StopRequest, UserError, fault_point, option, run_program, to_plain
from driftfield.training.atomic_file import parse_json, write_json
from driftfield.training.device import Device, choose_device
from vision.config import CONFIG_DIR
from vision.data import DataError, to_float
from vision.imagenet import Classes, ImageFolder
from vision.latent_files import (
    COMPLETE,
    VERSION,
    LatentDtype,
    LatentFiles,
    LatentHeader,
    LatentStatistics,
    create_store,
    mark_complete,
    open_store,
    read_statistics,
    require_plausible,
)
from vision.tokenizer import Tokenizer

BATCHES_AHEAD: Final = 2  # decoded while the device encodes
RUNS: Final = "runs"  # folder of the notes of who wrote the store
UNREADABLE: Final = "unreadable.json"  # names of images in whose place others are, among a share's notes
Batch = tuple[int, range]  # number of a file, ids of some of its images


@dataclass(kw_only=True)
class CacheLatentsConfig:
    """Keys of `python -m vision.cache_latents`."""

    data: Path = option("folder with a folder for each split, in it one folder of images per class")
    split: str = option("such as train or val")
    classes: Classes = option("imagenet: the 1000 synsets in their order; folders: whatever folders there are, by name")
    out: Path = option("folder of the store")
    tokenizer: str = option("folder of diffusers' AutoencoderKL, or its hub id")
    revision: str | None = option("commit, tag or branch of the hub id; null: the pinned one of Stable Diffusion's VAE")
    image_size: int = option("side of the centre crops, in pixels", min=1)
    dtype: LatentDtype = option("of the moments; float16 rounds them by at most 1/2048 of their value")
    bfloat16: bool = option("encode in bfloat16, faster and coarser")
    std_band: tuple[float, float] = option(
        "lowest and highest plausible standard deviation of all scaled latents, which the scale makes about 1", min=0
    )
    batch_size: int = option("images to encode at once", min=1)
    chunk_images: int = option("images per file of the store; a kill loses at most the work on one", min=1)
    workers: int = option("threads that decode images", min=1)
    max_unreadable: float = option(
        "share of the files that may be damaged, each replaced by the next of its class", min=0, max=1
    )
    num_shards: int | None = option("processes that share the work; null: torchrun's, else 1", min=1)
    shard: int | None = option("which of them this is, from 0; null: torchrun's rank, else 0", min=0)
    device: Device = option("where to compute")

    def __post_init__(self) -> None:
        if self.std_band[0] >= self.std_band[1]:
            raise ValueError(f"std_band: expected the lowest before the highest, found {list(self.std_band)}")


class Share(NamedTuple):
    """This process among those that share the work."""

    shard: int
    num_shards: int

    def of(self, files: LatentFiles) -> range:
        """Numbers of the files that this process writes."""
        return range(self.shard, len(files), self.num_shards)


def main(config: CacheLatentsConfig) -> int:
    """Encode this process's share, and mark the store complete if nothing is left."""
    share = _share(config)
    images = ImageFolder(
        config.data,
        split=config.split,
        classes=config.classes,
        image_size=config.image_size,
        workers=config.workers,
        max_unreadable=config.max_unreadable,
    )
    device = choose_device(config.device)
    tokenizer = _load_tokenizer(config).to(device)
    header = make_header(config, images, tokenizer)
    try:
        _open_or_create(config.out, header, images.labels)
        run_dir = config.out / RUNS / f"shard-{share.shard}-of-{share.num_shards}"
        every_key = [field.name for field in fields(config)]  # the header says which of them make another store
        with RunFolder(run_dir, config, may_change=every_key), StopRequest() as stop:
            files = LatentFiles(config.out, header)
            _write_missing(files, share, images, tokenizer, config, stop, run_dir / UNREADABLE)
            if stop.requested:
                print(f"stopped; the same command goes on from here ({config.out})")
                return stop.exit_code
            _finish(config.out, files, config.std_band)
    except OSError as error:
        raise UserError(f"out: expected a place that can be written, found {config.out}: {error.strerror}") from error
    return 0


def make_header(config: CacheLatentsConfig, images: ImageFolder, tokenizer: Tokenizer) -> LatentHeader:
    """What the store will say of itself.

    Raises:
        UserError: the images' size is not a multiple of the tokenizer's factor.
    """
    side, rest = divmod(config.image_size, tokenizer.downsampling)
    if rest:
        raise UserError(f"image_size: expected a multiple of {tokenizer.downsampling}, found {config.image_size}")
    return LatentHeader(
        version=VERSION,
        tokenizer=config.tokenizer,
        tokenizer_sha256=tokenizer.fingerprint,
        bfloat16=config.bfloat16,
        scale=tokenizer.scale,
        sample_shape=(tokenizer.channels, side, side),
        dtype=config.dtype,
        image_size=config.image_size,
        images_sha256=images.fingerprint,
        class_names=images.class_names,
        count=len(images),
        chunk_images=config.chunk_images,
    )


def _share(config: CacheLatentsConfig) -> Share:
    shard, num_shards = config.shard, config.num_shards
    if (shard is None) != (num_shards is None):
        raise UserError(f"expected both shard and num_shards or neither, found shard={shard} num_shards={num_shards}")
    if shard is None or num_shards is None:
        shard, num_shards = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if shard >= num_shards:
        raise UserError(f"shard: expected less than num_shards = {num_shards}, found {shard}")
    return Share(shard, num_shards)


def _load_tokenizer(config: CacheLatentsConfig) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(
            config.tokenizer, revision=config.revision, bfloat16=config.bfloat16, microbatch=config.batch_size
        )
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"tokenizer: {error}") from error


def _open_or_create(folder: Path, header: LatentHeader, labels: Tensor) -> None:
    """Make the store, or see to it that the one that is there is of the same images, tokenizer and settings."""
    create_store(folder, header, labels)
    _, found = open_store(folder)
    expected = to_plain(header)
    differing = [
        f"{key} (there {_short(value)}, now {_short(expected[key])})"
        for key, value in to_plain(found).items()
        if value != expected[key] and key != "tokenizer"  # its SHA-256 counts, not where it lies
    ]
    if differing:
        raise UserError(f"{folder} is a store of other latents: {', '.join(differing)}; choose out=OTHER or delete it")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _write_missing(
    files: LatentFiles,
    share: Share,
    images: ImageFolder,
    tokenizer: Tokenizer,
    config: CacheLatentsConfig,
    stop: StopRequest,
    unreadable: Path,
) -> None:
    """Encode the images of those of this process's files that are missing or damaged; return early on a stop."""
    present = sum(files.path(number).is_file() for number in share.of(files))
    if present:
        print(f"checking the {present} files that are there")
    missing = [number for number in share.of(files) if not stop.requested and not _is_whole(files, number)]
    total = sum(len(files.images(number)) for number in share.of(files))
    left = sum(len(files.images(number)) for number in missing)
    if left < total:
        print(f"{total - left} of {total} images are encoded already")
    _require_space(files, missing)
    batches = [
        (number, files.images(number)[start : start + config.batch_size])
        for number in missing
        for start in range(0, len(files.images(number)), config.batch_size)
    ]
    parts: list[Tensor] = []
    with Progress(total, initial=total - left) as progress:
        for (number, ids), pixels in zip(batches, _decoded_ahead(images, batches), strict=True):
            if stop.requested:
                return
            parts.append(_encode(tokenizer, pixels, ids, images, config.dtype))
            if ids[-1] == files.images(number)[-1]:
                if images.unreadable:  # first: a kill leaves no file that holds others in their place unsaid
                    write_json(unreadable, sorted({*_read_names(unreadable), *images.unreadable}))
                fault_point(f"cache_latents.write.{number}")
                files.write(number, torch.cat(parts))
                parts.clear()
                if number == missing[0]:  # a wrong scale shows at once
                    require_plausible(config.out, _statistics(files, [number], config.std_band), files.header)
            progress.update(len(ids))


def _read_names(file: Path) -> list[str]:
    """Unreadable images that a share met, at any of its starts."""
    try:
        return [str(name) for name in parse_json(file.read_bytes())] if file.exists() else []
    except ValueError as error:
        raise UserError(f"{file}: expected a list of names, found: {error}; delete it") from error


def _is_whole(files: LatentFiles, number: int) -> bool:
    if not files.path(number).exists():
        return False
    try:
        files.read(number)
    except DataError as error:
        print(f"made again: {error}")
        return False
    return True


def _require_space(files: LatentFiles, missing: Sequence[int]) -> None:
    needed = sum(map(files.num_bytes, missing))
    free = shutil.disk_usage(files.folder).free
    if needed > free:
        raise UserError(
            f"out: expected {needed / 2**30:.3g} GiB free for what is left, "
            f"found {free / 2**30:.3g} GiB where {files.folder} is"
        )


def _encode(tokenizer: Tokenizer, pixels: Tensor, ids: range, images: ImageFolder, dtype: LatentDtype) -> Tensor:
    """Moments of images and mirrors, `[b, 2, 2, c, h, w]` on the CPU.

    Raises:
        DataError: a value that `dtype` can't hold; the message names the image.
    """
    x = to_float(pixels.to(tokenizer.device))  # [b, 3, H, W]
    variants = [torch.stack(tokenizer.encode(variant), dim=1) for variant in (x, x.flip(-1))]
    moments = torch.stack(variants, dim=1).to(getattr(torch, dtype)).cpu()
    finite = moments.isfinite().flatten(1).all(1)  # [b]
    if not finite.all():
        path = images.path(ids[int(finite.int().argmin())])
        raise DataError(f"{path}: expected finite {dtype} latents, found NaN or infinity")
    return moments


def _decoded_ahead(images: ImageFolder, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Centre crops of each batch, the next ones decoded by other threads while the last is used."""
    pending: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for _, ids in batches:
            pending.append(thread.submit(images.center_crops, ids))
            if len(pending) > BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _finish(folder: Path, files: LatentFiles, std_band: tuple[float, float]) -> None:
    """Check every record and mark the store complete, unless other processes still have files to write."""
    missing = len(files.missing())
    if missing:
        print(f"this share is done; {missing} of {len(files)} files are left to the other shards")
        return
    group, header = open_store(folder)
    marked = read_statistics(folder, group, header) if COMPLETE in group.attrs else None
    statistics = replace(marked, std_band=std_band) if marked else _statistics(files, range(len(files)), std_band)
    require_plausible(folder, statistics, header)
    if statistics != marked:
        fault_point("cache_latents.complete")
        mark_complete(folder, statistics)
    print(f"{folder}: latents of {header.count} images and their mirrors, whole and checked ({header.dtype})")
    if names := sorted({name for file in (folder / RUNS).glob(f"*/{UNREADABLE}") for name in _read_names(file)}):
        print(f"of {len(names)} unreadable images, named in {RUNS}/*/{UNREADABLE}, the next of their class")
    for channel, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True)):
        print(f"channel {channel}: mean {mean:+.3f}, standard deviation {std:.3f}")


def _statistics(files: LatentFiles, numbers: Sequence[int], std_band: tuple[float, float]) -> LatentStatistics:
    """Mean and standard deviation of each channel over all latents of some files, every record read and checked.

    The variance of a sample is that of the means plus the mean of the variances.
    """
    header, count = files.header, 0
    mean = torch.zeros(header.sample_shape[0], dtype=torch.float64)
    square = torch.zeros_like(mean)
    for number in numbers:
        means, stds = (files.read(number).double() * header.scale).unbind(2)  # [m, 2, c, h, w] each
        mean += means.sum((0, 1, 3, 4))
        square += (means.square() + stds.square()).sum((0, 1, 3, 4))
        count += means[:, :, 0].numel()
    mean, square = mean / count, square / count
    std = (square - mean.square()).clamp(min=0).sqrt()
    return LatentStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()), std_band=std_band)


if __name__ == "__main__":
    raise SystemExit(
        run_program(
            main, CacheLatentsConfig, config_dir=CONFIG_DIR, config_name="cache_latents", description=__doc__ or ""
        )
    )
