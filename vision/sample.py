"""Draw one-step samples from a trained generator: `python -m vision.sample`.

Writes a grid (out=NAME.png), a folder of numbered PNGs (out=FOLDER) or an array (out=NAME.npz: `arr_0` uint8
[N, H, W, C], `labels`). A sample depends on seed, index, class and guidance scale alone, not on its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from driftfield.training import UserError, generator, option, run_program
from vision.config import CONFIG_DIR, Device
from vision.data import to_uint8
from vision.device import choose_device
from vision.generator import ImageGenerator
from vision.pictures import save_grid, save_image

BATCH_SIZE: Final = 250


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


@torch.no_grad()
def sample(
    model: ImageGenerator,
    labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """One-step samples; the i-th depends on (seed, first_index + i), its label and α alone.

    Args:
        model: the generator, on its device.
        labels: class of each sample, `[B]` int64.
        guidance_scale: α >= 1, of all samples.
        seed, first_index: choose noise and style.
        batch_size: how many to make at once.
        progress: called with the size of each finished batch.

    Returns:
        Images in [-1, 1] up to the generator's error, `[B, C, H, W]` float32 on the CPU.
    """
    device = next(model.parameters()).device
    batches = []
    for start in range(0, len(labels), batch_size):
        label = labels[start : start + batch_size]
        indices = range(first_index + start, first_index + start + len(label))
        noise, style = draw_inputs(model, [generator(seed, "sample", index) for index in indices], 1)
        alpha = torch.full((len(label),), guidance_scale)
        images = model(noise.to(device), label.to(device), alpha.to(device), style.to(device))
        batches.append(images.float().cpu())
        progress(len(label))
    return torch.cat(batches)


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
