"""Pictures hold the pixels they were given, in order, and are written whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision import pictures
from vision.data import to_float
from vision.pictures import save_animation, save_grid, save_image

GAP = pictures.GAP_PIXELS


def bytes_like(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("as_float", [False, True])
def test_an_image_alone_keeps_every_pixel(tmp_path: Path, channels: int, as_float: bool) -> None:
    image = bytes_like(channels, 5, 7)
    save_image(to_float(image) if as_float else image, tmp_path / "image.png")
    expected = image[0] if channels == 1 else image.permute(1, 2, 0)
    assert np.array_equal(pixels(tmp_path / "image.png"), expected.numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_the_images_row_by_row_and_grey_elsewhere(tmp_path: Path, channels: int) -> None:
    images, scale, columns = bytes_like(5, channels, 4, 6), 3, 2
    save_grid(images, tmp_path / "grid.png", columns=columns, scale=scale)
    grid = pixels(tmp_path / "grid.png").copy()
    grid = grid[..., None] if channels == 1 else grid
    height, width = 4 * scale, 6 * scale
    assert grid.shape == (3 * (height + GAP) + GAP, 2 * (width + GAP) + GAP, channels)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        for y in range(height):
            for x in range(width):
                assert grid[top + y, left + x].tolist() == image[:, y // scale, x // scale].tolist()
        grid[top : top + height, left : left + width] = pictures.GAP_GREY
    assert (grid == pictures.GAP_GREY).all()


@pytest.mark.parametrize(("side", "scale"), [(8, 8), (32, 2), (60, 2), (64, 1), (256, 1)])
def test_small_images_are_enlarged_to_be_seen(tmp_path: Path, side: int, scale: int) -> None:
    save_grid(bytes_like(1, 1, side, side), tmp_path / "grid.png", columns=1)
    assert pixels(tmp_path / "grid.png").shape == (side * scale + 2 * GAP, side * scale + 2 * GAP)


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_an_animation_shows_every_frame_and_rests_on_the_last(tmp_path: Path, ending: str) -> None:
    frames = [tmp_path / f"{level}.png" for level in (0, 128, 255)]
    for frame in frames:
        save_grid(torch.full((1, 1, 8, 8), int(frame.stem), dtype=torch.uint8), frame, columns=1)
    path = tmp_path / f"animation.{ending}"
    save_animation(frames, path, frame_ms=100)
    with Image.open(path) as animation:
        assert animation.n_frames == 3 and animation.info["loop"] == 0
        for index, expected in enumerate((0, 128, 255)):
            animation.seek(index)
            centre = animation.convert("L").getpixel((30, 30))
            assert abs(centre - expected) <= 3  # lossy WebP
            if ending != "webp":  # Pillow tells the duration of these two
                assert animation.info["duration"] == (pictures.LAST_FRAME_MS if index == 2 else 100)


def test_one_frame_makes_an_animation(tmp_path: Path) -> None:
    save_grid(bytes_like(1, 1, 8, 8), tmp_path / "0.png", columns=1)
    save_animation([tmp_path / "0.png"], tmp_path / "animation.gif")
    assert pixels(tmp_path / "animation.gif").shape == pixels(tmp_path / "0.png").shape


def test_frames_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one file, found none"):
        save_animation([], tmp_path / "animation.gif")
    for side in (8, 16):
        save_image(bytes_like(1, side, side), tmp_path / f"{side}.png")
    with pytest.raises(ValueError, match=r"must be of size \(8, 8\) as the first, found .*16.png of \(16, 16\)"):
        save_animation([tmp_path / "8.png", tmp_path / "16.png"], tmp_path / "animation.gif")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 2, 8, 8), r"C = 1 or 3, found \[1, 2, 8, 8\]"),
        (torch.zeros(0, 1, 8, 8), r"N >= 1 .* found \[0, 1, 8, 8\]"),
        (torch.zeros(1, 8, 8), r"must be \[N, C, H, W\] .* found \[1, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), "uint8 or floating point .* found torch.int64"),
        (torch.full((1, 1, 8, 8), float("nan")), "found 64 of 64 values NaN or infinite"),
    ],
)
def test_unusable_images_are_refused(tmp_path: Path, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_grid(images, tmp_path / "grid.png", columns=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("columns", "scale"), [(0, 1), (1, 0)])
def test_columns_and_scale_are_at_least_one(tmp_path: Path, columns: int, scale: int) -> None:
    with pytest.raises(ValueError, match=f"must be at least 1, found {columns} and {scale}"):
        save_grid(bytes_like(1, 1, 8, 8), tmp_path / "grid.png", columns=columns, scale=scale)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_grid(bytes_like(1, 1, 8, 8), path, columns=1)
    before = path.read_bytes()

    def half_written(self: Image.Image, file: Path, **_: object) -> None:
        file.write_bytes(before[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(OSError, match="No space left"):
        save_grid(bytes_like(2, 1, 8, 8), path, columns=1)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
