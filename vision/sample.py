"""Draw one-step samples from a trained generator: `python -m vision.sample`.

Writes a grid (out=NAME.png), a folder of numbered PNGs (out=FOLDER) or an array (out=NAME.npz: `arr_0` uint8
[N, H, W, C], `labels`). A sample depends on seed, index, class and guidance scale alone, not on its batch.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from driftfield.training import UserError, option, run_program
from driftfield.training import generator as seeded_generator
from vision.config import CONFIG_DIR, Device
from vision.data import to_uint8
from vision.device import choose_device
from vision.generator import ImageGenerator
from vision.pictures import save_grid, save_image

Rounding = Literal["nearest", "down"]

BATCH_SIZE: Final = 250
DRAWING_THREADS: Final = 8  # drawing 3 x 256 x 256 normal numbers takes one thread a millisecond
IMAGE_CHANNELS: Final = (1, 3)  # a generator of any other number makes latents


class Decoder(Protocol):
    """What turns latents into images: a `vision.tokenizer.Tokenizer`, or a smaller stand-in for its decoder."""

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of scaled latents `[B, channels, h, w]`."""
        ...


@dataclass(kw_only=True)
class SampleConfig:
    """Keys of `python -m vision.sample`."""

    model: str = option("folder with config.json and model.safetensors, or a hub id")
    out: Path = option("where to write: a .png (grid), a .npz, or a folder of PNGs")
    labels: tuple[int, ...] = option("classes, repeated in this order; empty: all of them", min=0)
    num: int = option("how many samples", min=1)
    first_index: int = option("index of the first one", min=0)
    guidance_scale: float = option("α", min=1)
    seed: int = option("seed of noise and style", min=0)
    device: Device = option("where to compute")


def draw_inputs(model: ImageGenerator, draws: Sequence[torch.Generator], count: int) -> tuple[Tensor, Tensor]:
    """Noise and style of `count` images from each source of randomness.

    Args:
        model: whose inputs they are.
        draws: generators on the CPU.
        count: images per generator.

    Returns:
        Standard normal noise `[len(draws) * count, C, H, W]` and style entries `[len(draws) * count, S]`, on the CPU.
    """
    shape = (count, model.channels, model.image_size, model.image_size)
    noise = [torch.randn(shape, generator=draw) for draw in draws]
    style = [torch.randint(model.num_style_entries, (count, model.num_styles), generator=draw) for draw in draws]
    return torch.cat(noise), torch.cat(style)


def images_in_batches(
    generator: ImageGenerator,
    labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = BATCH_SIZE,
    tokenizer: Decoder | None = None,
    bfloat16: bool = False,
    rounding: Rounding = "nearest",
) -> Iterator[Tensor]:
    """One-step samples as bytes, batch after batch; the i-th depends on (seed, first_index + i), its label and α alone.

    While one batch is handed out a GPU computes the next, and threads draw the noise of the one after it.

    Args:
        generator: on its device.
        labels: class of each sample, `[n]` int64.
        guidance_scale: α >= 1, of all samples.
        seed, first_index: choose noise and style.
        batch_size: how many to make at once.
        tokenizer: turns the generator's latents into images, on the same device; None where it makes pixels.
        bfloat16: activations in bfloat16.
        rounding: of a level from 0 to 255; "down" is what published Fréchet distances are computed from.

    Raises:
        ValueError: labels, α or batch_size are not as stated, generator and tokenizer do not fit each other; from the
            iterator, if an image is not finite.

    Returns:
        Iterator over uint8 `[b, C, H, W]` on the CPU, in order of index; b = batch_size but for the last.
    """
    _check_request(generator, labels, guidance_scale, batch_size)
    _check_decoder(generator, tokenizer)
    batches = _batches(
        generator,
        labels,
        guidance_scale=guidance_scale,
        seed=seed,
        first_index=first_index,
        batch_size=batch_size,
        decode=None if tokenizer is None else tokenizer.decode,
        bfloat16=bfloat16,
    )
    return _one_behind(_Bytes(images, rounding) for images in batches)


def sample(
    model: ImageGenerator,
    labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """What the generator makes, all at once and not rounded: the samples of `images_in_batches` before any decoder.

    Args:
        model: the generator, on its device.
        labels: class of each sample, `[n]` int64.
        guidance_scale: α >= 1, of all samples.
        seed, first_index: choose noise and style.
        batch_size: how many to make at once.

    Raises:
        ValueError: labels, α or batch_size are not as stated.

    Returns:
        Images in [-1, 1] up to the generator's error, or latents, `[n, C, H, W]` float32 on the CPU.
    """
    _check_request(model, labels, guidance_scale, batch_size)
    batches = _batches(
        model, labels, guidance_scale=guidance_scale, seed=seed, first_index=first_index, batch_size=batch_size
    )
    return torch.cat([batch.float().cpu() for batch in batches])


@torch.no_grad()
def _batches(
    model: ImageGenerator,
    labels: Tensor,
    *,
    guidance_scale: float,
    seed: int,
    first_index: int,
    batch_size: int,
    decode: Callable[[Tensor], Tensor] | None = None,
    bfloat16: bool = False,
) -> Iterator[Tensor]:
    """Samples on the device, without waiting for it; every batch is computed at one size, so it compiles once."""
    device = next(model.parameters()).device
    batch_size = min(batch_size, len(labels))
    starts = range(0, len(labels), batch_size)
    indices = [range(first_index + start, first_index + start + batch_size) for start in starts]
    alpha = torch.full((batch_size,), guidance_scale, device=device)
    for start, (noise, style) in zip(starts, _inputs(model, seed, indices), strict=True):
        label = labels[start : start + batch_size]
        count = len(label)
        label = torch.cat((label, label[-1:].expand(batch_size - count)))  # the last batch, filled up
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            images = model(_to(noise, device), _to(label, device), alpha, _to(style, device))
            images = images if decode is None else decode(images)
        yield images[:count]


def _inputs(model: ImageGenerator, seed: int, batches: Sequence[range]) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise and style of each batch of indices, drawn one batch ahead by threads."""

    def draw(index: int) -> tuple[Tensor, Tensor]:
        return draw_inputs(model, [seeded_generator(seed, "sample", index)], 1)

    pool = ThreadPoolExecutor(max_workers=DRAWING_THREADS)
    try:
        drawn = deque([pool.map(draw, batches[0])])  # a map starts at once
        for following in [*batches[1:], range(0)]:
            drawn.append(pool.map(draw, following))
            noise, style = zip(*drawn.popleft(), strict=True)
            yield torch.cat(noise), torch.cat(style)
    finally:
        pool.shutdown(cancel_futures=True)


class _Bytes:
    """Images on their way from the device to the CPU as bytes.

    Args:
        images: `[b, C, H, W]` in [-1, 1], clipped.
        rounding: of a level from 0 to 255.
    """

    def __init__(self, images: Tensor, rounding: Rounding) -> None:
        levels = (images.float().clamp(-1, 1) + 1) * 127.5
        levels = levels.round() if rounding == "nearest" else levels.floor()
        finite = images.isfinite().flatten(1).all(dim=1)  # [b]
        self._images, self._finite = _to(levels.to(torch.uint8), "cpu"), _to(finite, "cpu")
        self._copied = torch.cuda.Event() if images.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def result(self) -> Tensor:
        """The bytes `[b, C, H, W]`, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        if not self._finite.all():
            raise ValueError(f"{int((~self._finite).sum())} of {len(self._finite)} images are not finite")
        return self._images


def _one_behind(batches: Iterator[_Bytes]) -> Iterator[Tensor]:
    """The bytes of each batch after the next one was launched, so that the device computes while they are used."""
    waiting: _Bytes | None = None
    for launched in batches:
        if waiting is not None:
            yield waiting.result()
        waiting = launched
    if waiting is not None:
        yield waiting.result()


def _to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor elsewhere; between CPU and GPU through pinned memory, so that nobody waits."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    if tensor.is_cuda and torch.device(device).type == "cpu":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device)


def _check_request(model: ImageGenerator, labels: Tensor, guidance_scale: float, batch_size: int) -> None:
    if labels.dtype != torch.int64 or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels: expected int64 [n] with n >= 1, found {labels.dtype} {list(labels.shape)}")
    lowest, highest = (int(value) for value in labels.aminmax())
    if lowest < 0 or highest >= model.num_classes:
        raise ValueError(f"labels: expected classes in [0, {model.num_classes}), found {lowest} to {highest}")
    if not guidance_scale >= 1:
        raise ValueError(f"guidance_scale: expected α >= 1, found {guidance_scale}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")


def _check_decoder(model: ImageGenerator, tokenizer: Decoder | None) -> None:
    if tokenizer is None and model.channels not in IMAGE_CHANNELS:
        raise ValueError(
            f"tokenizer: the generator makes latents of {model.channels} channels, so expected the autoencoder that "
            f"decodes them, found none"
        )
    if tokenizer is not None and tokenizer.channels != model.channels:
        raise ValueError(
            f"tokenizer: expected one of the generator's {model.channels} channels, found {tokenizer.channels}"
        )


def main(config: SampleConfig) -> int:
    """Draw and write the samples."""
    try:
        model = ImageGenerator.from_pretrained(config.model).to(choose_device(config.device))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"model: {error}") from error
    classes = torch.tensor(config.labels or range(model.num_classes))
    if int(classes.max()) >= model.num_classes:
        raise UserError(f"labels: expected classes below {model.num_classes}, found {int(classes.max())}")
    labels = classes[(config.first_index + torch.arange(config.num)) % len(classes)]
    images = sample(
        model, labels, guidance_scale=config.guidance_scale, seed=config.seed, first_index=config.first_index
    )
    _write(images, labels, config.out, columns=len(classes), first_index=config.first_index)
    print(f"{config.num} samples in {config.out}")
    return 0


def _write(images: Tensor, labels: Tensor, out: Path, *, columns: int, first_index: int) -> None:
    try:
        if out.suffix == ".png":
            out.parent.mkdir(parents=True, exist_ok=True)
            save_grid(images, out, columns=columns)
        elif out.suffix == ".npz":
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(out, "wb") as file:
                np.savez(file, arr_0=to_uint8(images).permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
        else:
            out.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images, start=first_index):
                save_image(image, out / f"{index:06d}.png")
    except OSError as error:
        raise UserError(f"out: expected a place that can be written, found {out}: {error.strerror}") from error


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, SampleConfig, config_dir=CONFIG_DIR, config_name="sample", description=__doc__ or "")
    )
