"""Draw one-step samples from a trained generator: `python -m vision.sample`.

Writes a grid (out=NAME.png), a folder of numbered PNGs (out=FOLDER) or an array (out=NAME.npz: `arr_0` uint8
[N, H, W, C], `labels`). A sample depends on seed, index, class and guidance scale alone, not on its batch. A generator
of latents needs tokenizer=stabilityai/sd-vae-ft-mse, or the smaller tiny_decoder=madebyollin/taesd.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from driftfield.training import Progress, UserError, option, run_program
from driftfield.training import generator as seeded_generator
from driftfield.training.device import Device, choose_device
from vision.class_names import class_names, label_ids
from vision.config import CONFIG_DIR
from vision.generator import ImageGenerator
from vision.sample_files import open_sample_files
from vision.tiny_decoder import TinyDecoder
from vision.tokenizer import SD_VAE, Tokenizer

Rounding = Literal["nearest", "down"]

BATCH_SIZE: Final = 250
DRAWING_THREADS: Final = 8  # drawing 3 x 256 x 256 normal numbers takes one thread a millisecond
IMAGE_CHANNELS: Final = (1, 3)  # a generator of any other number makes latents
VAE_FOLDER: Final = "vae"  # of a model's folder: its tokenizer, where none is named
MOST_COLUMNS: Final = 20  # of a grid with a column per class


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

    model: str = option("folder with config.json and model.safetensors, hub id, or hf://NAME of the release")
    tokenizer: str | None = option("autoencoder that decodes latents: folder or hub id; null: MODEL/vae, if there")
    tiny_decoder: str | None = option("AutoencoderTiny that decodes in the tokenizer's place: folder or hub id")
    out: Path = option("where to write: a .png (grid), a .npz, or a folder of PNGs")
    labels: tuple[int, ...] = option("classes, repeated in this order", min=0)
    classes: tuple[str, ...] = option("more of them by name, such as [golden retriever]; no class at all: every class")
    num: int = option("how many samples", min=1)
    first_index: int = option("index of the first one", min=0)
    guidance_scale: float = option("α", min=1)
    seed: int = option("seed of noise and style", min=0)
    batch_size: int = option("samples computed at once", min=1)
    device: Device = option("where to compute")
    bfloat16: bool = option("activations in bfloat16")
    compile: bool = option("compile generator and decoder at the first batch")


def draw_inputs(model: ImageGenerator, draws: Sequence[torch.Generator], count: int) -> tuple[Tensor, Tensor]:
    """Noise and style of `count` images from each source of randomness.

    Args:
        model: whose inputs they are.
        draws: generators, all on one device; on another kind of device they draw other numbers.
        count: images per generator.

    Returns:
        Standard normal noise `[len(draws) * count, C, H, W]` and style entries `[len(draws) * count, S]`, on theirs.
    """
    image, styles = (count, model.channels, model.image_size, model.image_size), (count, model.num_styles)
    noise = [torch.randn(image, generator=draw, device=draw.device) for draw in draws]
    style = [torch.randint(model.num_style_entries, styles, generator=draw, device=draw.device) for draw in draws]
    return torch.cat(noise), torch.cat(style)


def inputs_in_batches(model: ImageGenerator, seed: int, batches: Sequence[range]) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise and style of samples, drawn one batch ahead by threads.

    Args:
        model: whose inputs they are.
        seed: chooses them, with each sample's index.
        batches: indices of the samples of each batch; at least one batch.

    Yields:
        As `draw_inputs` returns them, for each batch.
    """

    def draw(index: int) -> tuple[Tensor, Tensor]:
        return draw_inputs(model, [seeded_generator(seed, "sample", index)], 1)

    pool = ThreadPoolExecutor(max_workers=DRAWING_THREADS)
    try:
        following = pool.map(draw, batches[0])  # a map starts at once
        for indices in [*batches[1:], range(0)]:
            drawn, following = following, pool.map(draw, indices)
            noise, style = zip(*drawn, strict=True)
            yield torch.cat(noise), torch.cat(style)
    finally:
        pool.shutdown(cancel_futures=True)


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
        bfloat16: the generator's activations in bfloat16.
        rounding: of a level from 0 to 255; "down" is what published Fréchet distances are computed from.

    Raises:
        ValueError: labels, α or batch_size are not as stated, generator and tokenizer do not fit each other; from the
            iterator, if an image is not finite.

    Returns:
        Iterator over uint8 `[b, C, H, W]` on the CPU, in order of index; b = batch_size but for the last.
    """
    _check_request(generator, labels, guidance_scale, batch_size)
    require_decoder(generator, tokenizer)
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
    tokenizer: Decoder | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """The samples of `images_in_batches` all at once and before they are rounded to bytes.

    Args:
        model: the generator, on its device.
        labels: class of each sample, `[n]` int64.
        guidance_scale: α >= 1, of all samples.
        seed, first_index: choose noise and style.
        batch_size: how many to make at once.
        tokenizer: turns latents into images; without one latents are returned as they are.
        bfloat16: the generator's activations in bfloat16.

    Raises:
        ValueError: labels, α or batch_size are not as stated.

    Returns:
        Images in [-1, 1] up to the networks' error, or latents, `[n, C, H, W]` float32 on the CPU.
    """
    _check_request(model, labels, guidance_scale, batch_size)
    batches = _batches(
        model,
        labels,
        guidance_scale=guidance_scale,
        seed=seed,
        first_index=first_index,
        batch_size=batch_size,
        decode=None if tokenizer is None else tokenizer.decode,
        bfloat16=bfloat16,
    )
    return torch.cat([batch.float().cpu() for batch in batches])


def require_decoder(model: ImageGenerator, tokenizer: Decoder | None) -> None:
    """Refuse a generator of latents without what decodes them, or with what decodes others.

    Raises:
        ValueError: naming both numbers of channels.
    """
    if tokenizer is None and model.channels not in IMAGE_CHANNELS:
        raise ValueError(
            f"tokenizer: the generator makes latents of {model.channels} channels, so expected the autoencoder that "
            f"decodes them, such as {SD_VAE}, found none"
        )
    if tokenizer is not None and tokenizer.channels != model.channels:
        raise ValueError(
            f"tokenizer: expected one of the generator's {model.channels} channels, found {tokenizer.channels}"
        )


def compile_networks(model: ImageGenerator, decoder: Tokenizer | TinyDecoder | None) -> None:
    """Compile the networks in place, at their first pass, for the one batch size that they see.

    Args:
        model: the generator.
        decoder: of its latents; None for pixels.
    """
    model.compile(dynamic=False)
    if decoder is not None:
        (decoder.vae.decoder if isinstance(decoder, Tokenizer) else decoder.decoder).compile(dynamic=False)


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
    for start, (noise, style) in zip(starts, inputs_in_batches(model, seed, indices), strict=True):
        label = labels[start : start + batch_size]
        count = len(label)
        label = torch.cat((label, label[-1:].expand(batch_size - count)))  # the last batch, filled up
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            images = model(_to(noise, device), _to(label, device), alpha, _to(style, device))
        images = images if decode is None else decode(images.float())
        yield images[:count]


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


def main(config: SampleConfig) -> int:
    """Draw and write the samples."""
    device = choose_device(config.device)
    try:
        model = ImageGenerator.from_pretrained(config.model).to(device)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise UserError(f"model: {error}") from error
    decoder = _decoder(config, device)
    try:
        require_decoder(model, decoder)
    except ValueError as error:
        raise UserError(str(error)) from error
    classes = _classes(config, model.num_classes)
    if config.compile:
        compile_networks(model, decoder)
    speed = _write(config, model, decoder, classes)
    print(f"{config.num} samples in {config.out}, {speed:.3g} images/s")
    return 0


def _decoder(config: SampleConfig, device: torch.device) -> Tokenizer | TinyDecoder | None:
    """What decodes latents: the tiny decoder before the tokenizer, and that before what lies beside the model."""
    beside = Path(config.model) / VAE_FOLDER
    tokenizer = config.tokenizer or (beside if beside.is_dir() else None)
    try:
        if config.tiny_decoder is not None:
            return TinyDecoder.from_pretrained(config.tiny_decoder, bfloat16=config.bfloat16).to(device)
        if tokenizer is not None:
            return Tokenizer.from_pretrained(tokenizer, bfloat16=config.bfloat16).to(device)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise UserError(f"{'tokenizer' if config.tiny_decoder is None else 'tiny_decoder'}: {error}") from error
    return None


def _classes(config: SampleConfig, num_classes: int) -> list[int]:
    """The classes asked for, by number and by name; all of them if none is."""
    classes = list(config.labels)
    if config.classes:
        try:
            names = class_names(config.model, num_classes)
            if names is None:
                raise ValueError(f"the names of the model's {num_classes} classes are not known: use labels=[...]")
            classes += label_ids(names, config.classes)
        except ValueError as error:
            raise UserError(f"classes: {error}") from error
    if max(classes, default=0) >= num_classes:
        raise UserError(f"labels: expected classes below {num_classes}, found {max(classes)}")
    return classes or list(range(num_classes))


def _write(
    config: SampleConfig, model: ImageGenerator, decoder: Tokenizer | TinyDecoder | None, classes: Sequence[int]
) -> float:
    """Write all samples; images per second, where there are several batches without the first, which compiles."""
    labels = torch.tensor(classes)[(config.first_index + torch.arange(config.num)) % len(classes)]
    columns = len(classes) if 1 < len(classes) <= MOST_COLUMNS else math.ceil(math.sqrt(config.num))
    batches = images_in_batches(
        model,
        labels,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        first_index=config.first_index,
        batch_size=config.batch_size,
        tokenizer=decoder,
        bfloat16=config.bfloat16,
    )
    start, timed = time.perf_counter(), config.num
    try:
        with (
            open_sample_files(config.out, labels, columns=columns, first_index=config.first_index) as files,
            Progress(config.num) as progress,
        ):
            for images in batches:
                files.write(images)
                progress.update(len(images))
                if timed == config.num > len(images):
                    start, timed = time.perf_counter(), config.num - len(images)
    except OSError as error:
        raise UserError(
            f"out: expected a place that can be written, found {config.out}: {error.strerror or error}"
        ) from error
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    return timed / (time.perf_counter() - start)


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, SampleConfig, config_dir=CONFIG_DIR, config_name="sample", description=__doc__ or "")
    )
