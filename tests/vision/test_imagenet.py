"""Folders of images: labels, crops, randomness by visit, and files that are not what they should be."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomResizedCrop

from vision.data import DataError
from vision.imagenet import ImageFolder, center_crop, imagenet_synsets, random_box, read_image


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return load_sample_images().images[0]  # [427, 640, 3]


def write_tree(root: Path, photograph: np.ndarray, names: list[str]) -> Path:
    """One crop of a photograph per name CLASS/FILE, each another part of it."""
    for name in names:
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        left = 40 * (sorted(names).index(name))
        Image.fromarray(photograph[100:190, left : left + 120]).save(path, quality=95)
    return root


NAMES = ["b/z.JPEG", "b/a.png", "a/x.jpg", "a/B.webp", "a/b.bmp"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, photograph: np.ndarray) -> Path:
    return write_tree(tmp_path_factory.mktemp("images"), photograph, NAMES)


# Which images there are


def test_files_are_in_bytewise_order_and_labelled_by_folder(root: Path) -> None:
    images = ImageFolder(root)
    found = [str(images.path(image).relative_to(root / "train")) for image in range(len(images))]
    assert found == ["a/B.webp", "a/b.bmp", "a/x.jpg", "b/a.png", "b/z.JPEG"]
    assert images.labels.tolist() == [0, 0, 0, 1, 1] and images.labels.dtype == torch.int64
    assert (images.class_names, images.num_classes, images.sample_shape) == (("a", "b"), 2, (3, 256, 256))


def test_fingerprint_depends_on_names_sizes_and_labels_alone(
    root: Path, tmp_path: Path, photograph: np.ndarray
) -> None:
    def fingerprint(name: str, change: Callable[[Path], object] = lambda train: None) -> str:
        tree = write_tree(tmp_path / name, photograph, NAMES[::-1])
        change(tree / "train")
        return ImageFolder(tree).fingerprint

    original = ImageFolder(root).fingerprint
    assert fingerprint("same") == original
    assert (
        fingerprint("ignored", lambda train: (train / "a" / "notes.txt").write_text("x", encoding="utf-8")) == original
    )
    assert fingerprint("hidden", lambda train: (train / ".cache").mkdir()) == original
    changed = [
        fingerprint("renamed", lambda train: (train / "a" / "x.jpg").rename(train / "a" / "y.jpg")),
        fingerprint("moved", lambda train: (train / "a" / "x.jpg").rename(train / "b" / "x.jpg")),
        fingerprint("longer", lambda train: os.truncate(train / "a" / "x.jpg", 10**5)),
        fingerprint("class", lambda train: (train / "a").rename(train / "c")),
    ]
    assert len({original, *changed}) == 5


def test_imagenets_classes_are_the_thousand_synsets_in_order(tmp_path: Path) -> None:
    synsets = imagenet_synsets()
    assert len(set(synsets)) == 1000 and list(synsets) == sorted(synsets)
    assert (synsets[0], synsets[207], synsets[999]) == ("n01440764", "n02099601", "n15075141")
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    for name in reversed(synsets):
        (tmp_path / "train" / name).mkdir(parents=True)
        os.link(tmp_path / "one.png", tmp_path / "train" / name / "1.JPEG")
    images = ImageFolder(tmp_path, classes="imagenet")
    assert images.class_names == synsets and images.labels.tolist() == list(range(1000))
    for name in synsets[5:9]:
        (tmp_path / "train" / name).rename(tmp_path / "train" / f"x{name}")
    with pytest.raises(DataError) as error:
        ImageFolder(tmp_path, classes="imagenet")
    first, second, third = synsets[5:8]
    assert f"found 4 ({first}, {second}, {third}, ...) missing" in str(error.value)
    assert f"and 4 (x{first}, x{second}, x{third}, ...) unknown" in str(error.value)


def test_absent_folders_and_classes_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train: expected a folder .* there is no such folder"):
        ImageFolder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="for each class, found no folder"):
        ImageFolder(tmp_path)
    for name in ("a", "b", "c"):
        (tmp_path / "train" / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "b" / "1.png")
    with pytest.raises(DataError, match=r"in every class folder, found 2 \(a, c\) without any"):
        ImageFolder(tmp_path)


def test_empty_files_dangling_links_and_folders_are_named_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    (folder / "2.jpg").touch()
    (folder / "3.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "4.jpg").mkdir()
    with pytest.raises(DataError, match=r"found 3 \(a/2.jpg, a/3.jpg, a/4.jpg\) empty or unreadable"):
        ImageFolder(tmp_path)


# Decoding


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", (77, 0), (77, 77, 77)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_other_modes_become_rgb(tmp_path: Path, mode: str, colour: int | tuple[int, ...], expected: tuple) -> None:
    path = tmp_path / "image.tif"
    Image.new(mode, (5, 7), colour).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.getpixel((2, 3)) == expected


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (200, 0, 100)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").getpixel((0, 0)) == (200, 0, 100)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _html(path: Path) -> None:
    path.write_text("<html>404</html>", encoding="utf-8")


def _sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(path, format="png")


def _line(path: Path) -> None:
    Image.new("RGB", (1000, 2)).save(path)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_truncate, "truncated"),
        (_html, "UnidentifiedImageError"),
        (_sixteen_bits, "found mode I;16"),
        (_line, "found 1000 x 2"),
        (Path.unlink, "FileNotFoundError"),
    ],
)
def test_what_is_not_a_whole_image_is_named(
    tmp_path: Path, photograph: np.ndarray, damage: Callable[[Path], object], found: str
) -> None:
    root = write_tree(tmp_path, photograph, ["a/1.jpg", "a/2.jpg"])
    images = ImageFolder(root)
    damage(root / "train" / "a" / "2.jpg")
    images.read(torch.tensor([0]), seed=0)
    with pytest.raises(DataError, match=r"train/a/2\.jpg: expected") as error:
        images.read(torch.tensor([0, 1]), seed=0)
    assert found in str(error.value)


def test_a_decompression_bomb_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"z\.JPEG: .*DecompressionBombError"):
        read_image(root / "train" / "b" / "z.JPEG")


# Unreadable files among readable ones


EIGHT = [f"{name}/{number}.jpg" for name in ("a", "b") for number in range(4)]


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# Each damaged file beside the one to be read instead: the next of its class, beyond damaged ones, and around its end.
@pytest.mark.parametrize(
    ("damage", "instead"),
    [
        ({"a/1.jpg": _truncate}, {"a/1.jpg": "a/2.jpg"}),
        ({"a/3.jpg": _html, "b/0.jpg": _empty}, {"a/3.jpg": "a/0.jpg", "b/0.jpg": "b/1.jpg"}),
        (
            {"b/2.jpg": _sixteen_bits, "b/3.jpg": _dangling, "b/0.jpg": _line},
            {"b/2.jpg": "b/1.jpg", "b/3.jpg": "b/1.jpg", "b/0.jpg": "b/1.jpg"},
        ),
        ({"a/0.jpg": _folder, "b/3.jpg": _truncate}, {"a/0.jpg": "a/1.jpg", "b/3.jpg": "b/0.jpg"}),
    ],
)
@pytest.mark.parametrize("augmentation", ["flip", "crop"])
def test_in_the_place_of_an_unreadable_file_the_next_of_its_class_is_read(
    tmp_path: Path,
    photograph: np.ndarray,
    caplog: pytest.LogCaptureFixture,
    damage: dict[str, Callable[[Path], object]],
    instead: dict[str, str],
    augmentation: str,
) -> None:
    """As from a tree in which a copy of that file stands there, whatever is read with it, before it or after it."""
    broken, copied = (write_tree(tmp_path / name, photograph, EIGHT) for name in ("broken", "copied"))
    for name, other in instead.items():
        (copied / "train" / name).write_bytes((broken / "train" / other).read_bytes())
        damage[name](broken / "train" / name)
    options = {"augmentation": augmentation, "image_size": 32}
    visits = torch.randperm(24, generator=torch.Generator().manual_seed(0))  # of three epochs
    expected = ImageFolder(copied, **options).read(visits, seed=3)
    assert not torch.equal(expected[visits % 8 == 1], expected[visits % 8 == 5])
    images = ImageFolder(broken, max_unreadable=0.4, workers=3, **options)  # 3 of 8
    assert torch.equal(images.read(visits, seed=3), expected)
    assert torch.equal(images.read(visits.flip(0), seed=3).flip(0), expected)
    for visit in (5, 9, 0, 7):  # in any order, from the beginning, as after a resume
        resumed = ImageFolder(broken, max_unreadable=0.4, workers=1, **options)
        assert torch.equal(resumed.read(torch.tensor([visit]), seed=3)[0], expected[visits == visit][0])
    crops = ImageFolder(copied, image_size=32).center_crops(range(8))
    assert torch.equal(ImageFolder(broken, image_size=32, max_unreadable=0.4).center_crops(range(8)), crops)
    assert images.unreadable == sorted(damage) and images.labels.tolist() == [0] * 4 + [1] * 4
    caplog.clear()
    ImageFolder(broken, max_unreadable=0.4, **options).read(visits, seed=3)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == len(damage) and all(
        any(f"train/{name}: expected" in line for line in warned) for name in damage
    )
    with pytest.raises(DataError, match="max_unreadable=0 allows 0 of 8 files|empty or unreadable"):
        ImageFolder(broken, **options).read(visits, seed=3)


@pytest.mark.parametrize("workers", [1, 4])
def test_more_unreadable_files_than_allowed_are_an_error(tmp_path: Path, photograph: np.ndarray, workers: int) -> None:
    root = write_tree(tmp_path, photograph, EIGHT)
    for name in ("a/1.jpg", "b/0.jpg", "b/2.jpg"):
        _truncate(root / "train" / name)
    images = ImageFolder(root, image_size=32, workers=workers, max_unreadable=0.25)
    for _ in range(3):  # a file counts once, however often it is met
        images.center_crops([0, 1, 1, 4, 4])
    assert images.unreadable == ["a/1.jpg", "b/0.jpg"]
    with pytest.raises(DataError, match=r"b/2\.jpg: expected a whole image.* max_unreadable=0.25 allows 2 of 8 files"):
        images.center_crops([0, 6])


def test_empty_files_count_from_the_start(tmp_path: Path, photograph: np.ndarray) -> None:
    root = write_tree(tmp_path, photograph, EIGHT)
    for name in ("a/1.jpg", "b/0.jpg"):
        _empty(root / "train" / name)
    assert ImageFolder(root, max_unreadable=0.25).unreadable == ["a/1.jpg", "b/0.jpg"]
    with pytest.raises(DataError, match=r"found 2 \(a/1.jpg, b/0.jpg\) empty or unreadable"):
        ImageFolder(root, max_unreadable=0.249)
    _truncate(root / "train" / "b" / "3.jpg")
    with pytest.raises(DataError, match=r"b/3.jpg: expected a whole image.*max_unreadable=0.25 allows 2 of 8 files"):
        ImageFolder(root, max_unreadable=0.25).center_crops(range(8))


def test_a_class_without_a_readable_image_is_named(tmp_path: Path, photograph: np.ndarray) -> None:
    root = write_tree(tmp_path, photograph, EIGHT)
    for number in range(4):
        _html(root / "train" / "b" / f"{number}.jpg")
    images = ImageFolder(root, max_unreadable=1)
    images.center_crops(range(4))
    with pytest.raises(DataError, match="train/b: expected at least one readable image, found none"):
        images.center_crops([6])


def test_any_name_of_an_unreadable_file_can_be_printed_and_written(
    tmp_path: Path, photograph: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_tree(tmp_path, photograph, EIGHT)
    _html(root / "train" / "a" / "1.jpg")
    os.rename(os.fsencode(root / "train" / "a" / "1.jpg"), os.fsencode(root / "train" / "a") + b"/\xff.jpg")
    images = ImageFolder(root, max_unreadable=0.2)
    images.center_crops([3])  # 0, 2, 3 and this
    assert images.unreadable == ["a/\\xff.jpg"]
    assert images.unreadable[0].encode("ascii")
    (warning,) = caplog.messages
    assert "a/\\xff.jpg" in warning and warning.encode("ascii")


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), MemoryError("no room")])
def test_what_the_system_refuses_is_never_replaced(
    root: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """A disk's or a memory's bad moment is none of the file: after a resume it might be read."""

    def fail(*_: object, **__: object) -> None:
        raise failure

    images = ImageFolder(root, max_unreadable=1)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match=r"a/B\.webp: expected a whole image, found: (OSError|MemoryError)"):
        images.read(torch.tensor([0]), seed=0)
    assert images.unreadable == []


# Crops


def test_halving_is_a_mean_of_four_pixels() -> None:
    """A short side of 4 x 256 is halved twice and is then of the right size; only the middle is left to take."""
    pixels = 16 * np.random.default_rng(0).integers(0, 16, (1024, 1300, 3), dtype=np.uint8)  # means stay whole numbers
    expected = pixels.astype(np.int64).reshape(256, 4, 325, 4, 3).mean(axis=(1, 3))[:, 34 : 34 + 256]
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(pixels), 256)), expected)


def resampled(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """An image [H, W, 3] with each new row and column a weighted sum of old ones."""
    return np.einsum("yh,hwc,xw->yxc", rows, values, columns, optimize=True)


def box_matrix(size: int, new_size: int) -> np.ndarray:
    """Rows of weights of the mean over each new pixel's part of the old ones."""
    edges = np.arange(new_size + 1) * size / new_size
    centers = np.arange(size)[None] + 0.5
    weights = ((centers > edges[:-1, None]) & (centers <= edges[1:, None])).astype(np.float64)
    return weights / weights.sum(1, keepdims=True)


def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Rows of weights of Keys' cubic (a = -1/2), widened when it shrinks, as antialiasing has it."""
    scale = size / new_size
    support = max(scale, 1.0)
    centers = (np.arange(new_size)[:, None] + 0.5) * scale
    x = np.abs((np.arange(size)[None] + 0.5 - centers) / support)
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (100, 130), (511, 600), (513, 700), (256, 256), (1, 1), (3, 7)]
)
def test_center_crop_against_a_direct_calculation(photograph: np.ndarray, height: int, width: int) -> None:
    pixels = np.tile(photograph, (2, 2, 1))[:height, :width] // 2 + 64  # mid-tones: no overshoot is clipped
    values, (h, w) = pixels.astype(np.float64), (height, width)
    while min(h, w) >= 512:
        values = resampled(values, box_matrix(h, h // 2), box_matrix(w, w // 2))
        h, w = h // 2, w // 2
    new_h, new_w = round(h * 256 / min(h, w)), round(w * 256 / min(h, w))
    values = resampled(values, bicubic_matrix(h, new_h), bicubic_matrix(w, new_w))
    top, left = (new_h - 256) // 2, (new_w - 256) // 2
    expected = values[top : top + 256, left : left + 256]
    found = np.asarray(center_crop(Image.fromarray(pixels), 256)).astype(np.float64)
    assert np.abs(found - expected).max() <= 1.6  # bytes are rounded between the passes


@pytest.mark.parametrize(("width", "height"), [(500, 375), (256, 256), (40, 1000), (1000, 40), (1, 1), (7, 3)])
def test_random_parts_are_those_of_torchvision(width: int, height: int) -> None:
    image = torch.empty(3, height, width)
    for seed in range(50):
        torch.manual_seed(seed)
        top, left, h, w = RandomResizedCrop.get_params(image, scale=[0.2, 1.0], ratio=[3 / 4, 4 / 3])
        box = random_box(width, height, torch.Generator().manual_seed(seed))
        assert box == (left, top, left + w, top + h)


# Visits


@pytest.mark.parametrize("augmentation", ["flip", "crop"])
def test_a_visit_looks_the_same_whatever_is_read_with_it(root: Path, augmentation: str) -> None:
    visits = torch.tensor([3, 9, 0, 9, 27, 14, 4])
    plain = ImageFolder(root, augmentation=augmentation, image_size=32, workers=3)
    images = plain.read(visits, seed=5)
    assert images.dtype == torch.float32 and images.shape == (7, 3, 32, 32)
    assert torch.equal(images[1], images[3])
    one_worker = ImageFolder(root, augmentation=augmentation, image_size=32, workers=1)
    assert torch.equal(one_worker.read(visits.flip(0), seed=5).flip(0), images)
    assert all(torch.equal(one_worker.read(visits[i : i + 1], seed=5)[0], images[i]) for i in range(7))
    other = torch.stack([plain.read(visits, seed=seed) for seed in range(8)])
    assert (other.flatten(2) != other[:1].flatten(2)).any(2).any(0).all()  # every visit changes with the seed


def test_flips_are_half_of_the_centre_crops(root: Path) -> None:
    images = ImageFolder(root, augmentation="flip", image_size=32)
    crops = ImageFolder(root, augmentation="none", image_size=32).read(torch.arange(5), seed=0)
    visits = torch.arange(400)
    seen, straight = images.read(visits, seed=0), crops[visits % 5]
    is_straight = (seen == straight).flatten(1).all(1)
    is_mirrored = (seen == straight.flip(-1)).flatten(1).all(1)
    assert torch.equal(is_straight, ~is_mirrored)
    assert abs(is_mirrored.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(400)
    assert all(0 < is_mirrored[image::5].sum() < 80 for image in range(5))


def test_centre_crops_span_minus_one_to_one(root: Path) -> None:
    images = ImageFolder(root, augmentation="none", image_size=32)
    crops = images.center_crops([4, 0])
    assert crops.dtype == torch.uint8
    torch.testing.assert_close(images.read(torch.tensor([4, 0]), seed=0), crops / 127.5 - 1)
    expected = np.asarray(center_crop(read_image(root / "train" / "b" / "z.JPEG"), 32)).transpose(2, 0, 1)
    np.testing.assert_array_equal(crops[0].numpy(), expected)


def test_random_crops_are_parts_of_the_image(tmp_path: Path) -> None:
    """On a plane of x and y, a crop is a plane again, with the slopes of its width and height."""
    y, x = np.mgrid[:256, :256]
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)).save(tmp_path / "train" / "a" / "1.png")
    images = ImageFolder(tmp_path, augmentation="crop", image_size=64)
    pixels = (images.read(torch.arange(60), seed=0) + 1) * 127.5  # [60, 3, 64, 64]
    middle = pixels[..., 16:48, 16:48]
    width = (middle[:, 0, :, -1] - middle[:, 0, :, 0]).mean(1) * 64 / 31
    height = (middle[:, 1, -1] - middle[:, 1, 0]).mean(1) * 64 / 31
    area, aspect = width.abs() * height / 256**2, width.abs() / height
    assert 0.19 < area.min() < 0.35 and 0.8 < area.max() < 1.02
    assert 0.73 < aspect.min() < 0.85 and 1.18 < aspect.max() < 1.36
    assert 15 < (width < 0).sum() < 45  # mirrored
    assert (height > 0).all()


def test_memory_keeps_what_was_decoded_and_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []

    def counting(path: Path) -> Image.Image:
        decoded.append(path)
        return read_image(path)

    monkeypatch.setattr("vision.imagenet.read_image", counting)
    room = 3 * 32 * 32 * 4 / 2**30  # of four images
    images = ImageFolder(root, augmentation="crop", image_size=32, memory_gib=room)
    first = images.read(torch.tensor([0, 1, 2, 1]), seed=0)
    assert len(decoded) == 3
    assert torch.equal(images.read(torch.tensor([2, 0, 1, 8]), seed=0)[:3], first[[2, 0, 1]])
    assert len(decoded) == 4
    images.read(torch.tensor([0, 5, 6]), seed=0)  # 2 and 1 are the longest ago
    assert len(decoded) == 6
    assert torch.equal(images.read(torch.tensor([0, 8, 1]), seed=0)[[0, 2]], first[:2])
    assert len(decoded) == 7
    images.read(torch.tensor([0]), seed=1)
    assert len(decoded) == 8


def test_wrong_visits_are_refused(root: Path) -> None:
    images = ImageFolder(root)
    assert images.read(torch.empty(0, dtype=torch.int64), seed=0).shape == (0, 3, 256, 256)
    with pytest.raises(ValueError, match=r"expected int64 \[k\], found torch.float32 \[2\]"):
        images.read(torch.zeros(2), seed=0)
    with pytest.raises(ValueError, match="numbers from 0 on, found -3"):
        images.read(torch.tensor([1, -3]), seed=0)
