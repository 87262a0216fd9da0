"""Images as picture files: one alone, many in a grid, grids in sequence."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vision.data import to_uint8

GAP_PIXELS = 2  # between the images of a grid
GAP_GREY = 96  # neither the black of most backgrounds nor white
SMALLEST_SIDE = 64  # pixels that an image of a grid is enlarged to where no scale is given
FRAME_MS = 250
LAST_FRAME_MS = 2000


def save_image(image: Tensor, path: str | Path) -> None:
    """Write one image pixel by pixel as PNG.

    Args:
        image: `[C, H, W]`, C = 1 or 3, uint8 or floating point in [-1, 1].
        path: the file; its folder must exist.

    Raises:
        ValueError: if the image has another shape or kind of number, or is not finite.
        OSError: if the disk refuses; an older file is untouched.
    """
    _write([_to_pillow(_checked(image.unsqueeze(0))[0])], Path(path))


def save_grid(images: Tensor, path: str | Path, *, columns: int, scale: int | None = None) -> None:
    """Write images as a PNG grid, row by row, each pixel enlarged to a square.

    Args:
        images: `[N, C, H, W]`, C = 1 or 3, uint8 or floating point in [-1, 1].
        path: the file; its folder must exist.
        columns: images beside each other.
        scale: side of a pixel's square; if None, the smallest that makes images at least 64 pixels high.

    Raises:
        ValueError: if the images have another shape or kind of number, are none or not finite, or columns or scale < 1.
        OSError: if the disk refuses; an older file is untouched.
    """
    images = _checked(images)
    scale = -(-SMALLEST_SIDE // images.shape[2]) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, found {columns} and {scale}")
    enlarged = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    _write([_to_pillow(_tile(enlarged, columns))], Path(path))


def save_animation(frames: Sequence[str | Path], path: str | Path, *, frame_ms: int = FRAME_MS) -> None:
    """Write pictures as an animation that repeats for ever and rests on its last frame.

    Args:
        frames: files of one size, such as the grids of a training, first to last.
        path: .gif, .webp or .png (animated PNG); its folder must exist.
        frame_ms: milliseconds that a frame is shown.

    Raises:
        ValueError: if there is no frame, or their sizes differ.
        OSError: if a frame cannot be read or the disk refuses.
    """
    if not frames:
        raise ValueError("frames must be at least one file, found none")
    pictures = [Image.open(frame) for frame in frames]
    try:
        for frame, picture in zip(frames, pictures, strict=True):
            if picture.size != pictures[0].size:
                raise ValueError(
                    f"frames must be of size {pictures[0].size} as the first, found {frame} of {picture.size}"
                )
        _write(pictures, Path(path), durations_ms=[frame_ms] * (len(pictures) - 1) + [LAST_FRAME_MS])
    finally:
        for picture in pictures:
            picture.close()


def _checked(images: Tensor) -> Tensor:
    """The images as bytes on the CPU, `[N, C, H, W]`."""
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [N, C, H, W] with N >= 1 and C = 1 or 3, found {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point in [-1, 1], found {images.dtype}")
    images = images.detach().cpu()
    return images if images.dtype == torch.uint8 else to_uint8(images)


def _tile(images: Tensor, columns: int) -> Tensor:
    """One image `[C, height, width]` of images `[N, C, H, W]` side by side with gaps around them."""
    rows = -(-len(images) // columns)
    channels = images.shape[1]
    absent = rows * columns - len(images)
    tiles = functional.pad(images, (0, GAP_PIXELS, 0, GAP_PIXELS), value=GAP_GREY)  # [N, C, H + gap, W + gap]
    tiles = functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, absent), value=GAP_GREY)  # [rows * columns, C, ...]
    tiles = tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)  # [C, rows, H + gap, columns, W + gap]
    picture = tiles.reshape(channels, rows * tiles.shape[2], columns * tiles.shape[4])
    return functional.pad(picture, (GAP_PIXELS, 0, GAP_PIXELS, 0), value=GAP_GREY)


def _to_pillow(image: Tensor) -> Image.Image:
    """Pillow's image of bytes `[C, H, W]`."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def _write(pictures: Sequence[Image.Image], path: Path, *, durations_ms: Sequence[int] = ()) -> None:
    """Write beside the path, then rename, so that a reader sees the old file or the new one."""
    aside = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
    animation: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "duration": durations_ms, "loop": 0}
    try:
        pictures[0].save(aside, **(animation if durations_ms else {}))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
