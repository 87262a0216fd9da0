"""The store of latents: reads by visit, and everything that can be wrong with its files."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from tests.vision.tiny_models import autoencoder
from vision.data import DataError
from vision.latent_files import (
    STD_BAND,
    VERSION,
    LatentFiles,
    LatentHeader,
    LatentStatistics,
    create_store,
    mark_complete,
    require_plausible,
)
from vision.latents import LatentStore
from vision.tokenizer import Tokenizer

HEADER = LatentHeader(
    version=VERSION,
    tokenizer="a/vae",
    tokenizer_sha256="5" * 64,
    bfloat16=False,
    scale=0.18215,
    sample_shape=(4, 2, 3),
    dtype="float16",
    image_size=4,
    images_sha256="6" * 64,
    class_names=("cat", "dog"),
    count=7,
    chunk_images=3,
)
LABELS = torch.tensor([0, 0, 1, 0, 1, 1, 1])
STATISTICS = LatentStatistics(mean=(0.0,) * 4, std=(0.4,) * 4, std_band=(0.1, 2.0))


def moments(header: LatentHeader = HEADER) -> torch.Tensor:
    """[n, 2, 2, c, h, w]: means of any sign, positive standard deviations."""
    values = torch.randn(header.count, 2, *header.record_shape, generator=torch.Generator().manual_seed(0))
    values[:, :, 1] = values[:, :, 1].exp()
    return values.to(getattr(torch, header.dtype))


def write_store(folder: Path, values: torch.Tensor, header: LatentHeader = HEADER, *, complete: bool = True) -> Path:
    create_store(folder, header, LABELS[: header.count])
    files = LatentFiles(folder, header)
    for number in range(len(files)):
        files.write(number, values[files.images(number).start : files.images(number).stop])
    if complete:
        mark_complete(folder, STATISTICS)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("latents") / "store", moments())


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def file_of(folder: Path, number: int) -> Path:
    return LatentFiles(folder, HEADER).path(number)


# What is read


def test_a_store_says_what_it_holds(original: Path) -> None:
    store = LatentStore(original)
    assert len(store) == 7 and torch.equal(store.labels, LABELS) and store.labels.dtype == torch.int64
    assert (store.num_classes, store.class_names, store.sample_shape) == (2, ("cat", "dog"), (4, 2, 3))
    assert store.header == HEADER


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_zarr_reads_the_same_moments(tmp_path: Path, dtype: str) -> None:
    header = replace(HEADER, dtype=dtype)
    values = moments(header)
    folder = write_store(tmp_path / "store", values, header)
    array: Any = zarr.open_array(folder / "moments", mode="r")
    np.testing.assert_array_equal(array[...], values.numpy())
    files = LatentFiles(folder, header)
    assert torch.equal(torch.cat([files.read(number) for number in range(len(files))]), values)
    np.testing.assert_array_equal(zarr.open_array(folder / "labels", mode="r")[...], LABELS.numpy())
    assert all(files.path(number).stat().st_size == files.num_bytes(number) for number in range(len(files)))


def test_zeros_are_values_like_others(tmp_path: Path) -> None:
    """zarr leaves out what equals its fill value."""
    header = replace(HEADER, class_names=("cat",))
    folder = tmp_path / "store"
    create_store(folder, header, torch.zeros(7, dtype=torch.int64))
    files = LatentFiles(folder, header)
    for number in range(len(files)):
        files.write(number, torch.zeros(len(files.images(number)), 2, *header.record_shape, dtype=torch.float16))
    mark_complete(folder, LatentStatistics(mean=(0.0,) * 4, std=(0.0,) * 4, std_band=(0.0, 1.0)))
    store = LatentStore(folder)
    assert not store.labels.any() and not store.read(torch.arange(14), seed=0).any()


@pytest.mark.parametrize("memory_gib", [0.0, 1.0])
def test_without_spread_a_read_is_the_scaled_mean_of_image_or_mirror(tmp_path: Path, memory_gib: float) -> None:
    values = moments()
    values[:, :, 1] = 0
    store = LatentStore(write_store(tmp_path / "store", values), memory_gib=memory_gib)
    visits = torch.arange(700)
    read, means = store.read(visits, seed=0), 0.18215 * values[visits % 7, :, 0].float()
    mirrored = torch.isclose(read, means[:, 1]).flatten(1).all(1)
    assert torch.equal(mirrored, ~torch.isclose(read, means[:, 0]).flatten(1).all(1))
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(700)
    assert all(0 < mirrored[image::7].sum() < 100 for image in range(7))


def test_reads_have_the_stored_mean_and_standard_deviation(tmp_path: Path) -> None:
    values = moments()
    values[:, 1] = values[:, 0]  # the mirror as the image, so that every read of an image has one distribution
    store = LatentStore(write_store(tmp_path / "store", values))
    count = 3000
    samples = store.read(torch.arange(7 * count), seed=1).unflatten(0, (count, 7)).double()  # [count, 7, c, h, w]
    mean, std = (0.18215 * values[:, 0].double()).unbind(1)
    z = (samples.mean(0) - mean) / (std / math.sqrt(count))
    assert z.abs().max() < 5 and 0.7 < z.std() < 1.3  # 168 means, each a standard normal number
    ratio = samples.std(0) / std
    assert (ratio - 1).abs().max() < 5 / math.sqrt(2 * count)
    noise = ((samples - mean) / std).flatten(2)  # [count, 7, 24]
    between_visits = (noise[1:] * noise[:-1]).mean()
    between_images = (noise[:, 1:] * noise[:, :-1]).mean()
    between_values = (noise[..., 1:] * noise[..., :-1]).mean()
    for correlation in (between_visits, between_images, between_values):
        assert abs(correlation) < 5 / math.sqrt(count * 7 * 20)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_visit_reads_the_same_whatever_is_read_with_it(original: Path, workers: int) -> None:
    visits = torch.tensor([3, 10**12 + 1, 0, 10, 3, 27, 6])
    store = LatentStore(original, workers=workers)
    read = store.read(visits, seed=5)
    assert read.dtype == torch.float32 and read.shape == (7, 4, 2, 3)
    assert torch.equal(read[0], read[4])
    assert torch.equal(LatentStore(original, workers=2).read(visits.flip(0), seed=5).flip(0), read)
    assert torch.equal(LatentStore(original, memory_gib=1).read(visits, seed=5), read)
    assert all(torch.equal(store.read(visits[i : i + 1], seed=5)[0], read[i]) for i in range(7))
    assert not (store.read(visits, seed=6) == read).any()
    assert not (read[0] == read[3]).any()  # the same image an epoch later
    assert store.read(visits[:0], seed=5).shape == (0, 4, 2, 3)


def test_memory_is_used_where_the_store_fits(original: Path, folder: Path) -> None:
    size = 7 * 2 * (2 * 24 * 2 + 4)
    stores = [LatentStore(folder, memory_gib=gib) for gib in ((size - 1) / 2**30, size / 2**30)]
    expected = LatentStore(original).read(torch.arange(7), seed=0)
    shutil.rmtree(folder / "moments")
    with pytest.raises(DataError, match="No such file"):
        stores[0].read(torch.arange(7), seed=0)
    assert torch.equal(stores[1].read(torch.arange(7), seed=0), expected)


def test_wrong_visits_are_refused(original: Path) -> None:
    with pytest.raises(ValueError, match=r"expected int64 \[k\], found torch.int32 \[2\]"):
        LatentStore(original).read(torch.zeros(2, dtype=torch.int32), seed=0)


def test_fingerprint_follows_what_is_read(original: Path, tmp_path: Path) -> None:
    def fingerprint(name: str, **changes: Any) -> str:
        return LatentStore(write_store(tmp_path / name, moments(), replace(HEADER, **changes))).fingerprint

    expected = LatentStore(original).fingerprint
    assert fingerprint("same") == expected and fingerprint("moved", tokenizer="elsewhere/vae") == expected
    changes: list[dict[str, Any]] = [
        {"tokenizer_sha256": "7" * 64},
        {"images_sha256": "7" * 64},
        {"scale": 0.2},
        {"class_names": ("cat", "cow")},
    ]
    found = {fingerprint(f"store{i}", **change) for i, change in enumerate(changes)}
    assert len(found | {expected}) == 5


# What is refused


def set_header(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "zarr.json"
        group = json.loads(file.read_text(encoding="utf-8"))
        group["attributes"]["driftfield_latents"][key] = value
        file.write_text(json.dumps(group), encoding="utf-8")

    return change


def set_mark(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "zarr.json"
        group = json.loads(file.read_text(encoding="utf-8"))
        group["attributes"]["complete"] |= changes
        file.write_text(json.dumps(group), encoding="utf-8")

    return change


def set_metadata(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "moments" / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 30)


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_header("version", 2), "version: expected 1, found 2"),
        (set_header("scale", 0), "scale: expected a number > 0, found 0"),
        (set_header("scale", "big"), "scale: expected a number"),
        (set_header("scale", 1.0), r"standard deviation 0.1 to 2, found 2\.\d+ with scale 1 \(tokenizer a/vae\)"),
        (
            set_header("scale", 0.18215**2),
            r"standard deviation 0.1 to 2, found 0\.0\d+ with scale 0.0331786 .*std_band=",
        ),
        (set_mark(std=[2.1] * 4), "standard deviation 0.1 to 2, found 2.1 with scale 0.18215"),
        (set_mark(std=[0.05] * 4), "standard deviation 0.1 to 2, found 0.05 with"),
        (set_mark(mean=[-3.0, 3.0, 3.0, -3.0]), "standard deviation 0.1 to 2, found 3.03 with"),
        (set_mark(std_band=[0.6, 2.0]), "standard deviation 0.6 to 2, found 0.4 with"),
        (set_mark(std=[1.0] * 3), "mean and std of 4 channels, found 4 and 3"),
        (set_mark(std=[1.0, 1.0, 1.0, float("nan")]), r"mark complete: std\[3\]: expected a number >= 0, found nan"),
        (set_mark(mean=None), "mark complete: mean: expected a list"),
        (set_header("dtype", "float32"), "data_type: expected float32 as the header says, found float16"),
        (set_header("sample_shape", [4, 2]), "sample_shape: expected c, h, w"),
        (set_header("sample_shape", [4, 3, 2]), "shape: expected"),
        (set_header("count", 8), "shape: expected"),
        (set_header("chunk_images", 4), "chunk_grid: expected"),
        (set_header("class_names", ["cat"]), "labels from 0 to 0, found 0 to 1"),
        (set_header("colour", "red"), "colour"),
        (set_metadata("shape", [7, 2, 2, 4, 3, 2]), "shape: expected"),
        (set_metadata("data_type", "int16"), "moments|store"),
        (set_metadata("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]), "codecs: expected"),
        (cut("zarr.json"), "expected a zarr store"),
        (cut("moments/zarr.json"), "expected a zarr store"),
        (delete("zarr.json"), "expected a zarr store"),
        (delete("moments/zarr.json"), "expected a zarr store"),
        (delete("labels/zarr.json"), "labels: expected the labels"),
        (delete("labels/c/0"), "labels: expected the labels, found no file of them"),
        (cut("labels/c/0"), "labels: expected the labels"),
        (delete("moments/c/1/0/0/0/0/0"), r"moments/c/1/0.* expected a file of latents, found none; 1 of 3"),
        (cut("moments/c/1/0/0/0/0/0"), r"moments/c/1/0.* cut short"),
    ],
)
def test_what_is_wrong_is_found_when_the_store_is_opened(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    LatentStore(folder)
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        LatentStore(folder)
    assert str(folder) in str(error.value)


def test_no_folder_and_an_older_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        LatentStore(tmp_path / "nowhere")
    zarr.create_group(tmp_path / "old", zarr_format=2)
    with pytest.raises(DataError, match=r"expected a zarr store \(format 3\)"):
        LatentStore(tmp_path / "old")


def test_a_store_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store", moments(), complete=False)
    with pytest.raises(DataError, match=r"found 0 of 3 files missing and no mark 'complete'; python -m vision.cache"):
        LatentStore(folder)
    file_of(folder, 1).unlink()
    with pytest.raises(DataError, match="found 1 of 3 files missing"):
        LatentStore(folder)


def test_a_record_never_written_is_refused(folder: Path) -> None:
    """zarr itself would read it as its fill value."""
    file_of(folder, 1).unlink()
    array: Any = zarr.open_array(folder / "moments", mode="r+")
    array[3] = moments()[3].numpy()
    assert np.isnan(array[4]).all()
    with pytest.raises(DataError, match=r"records of images 3 to 5, found 4 of 6 missing"):
        LatentStore(folder)


def test_every_flipped_bit_is_found(folder: Path) -> None:
    """A file is records, each with its CRC, and a table with a CRC: no byte of it is without one."""
    file = file_of(folder, 1)
    content = file.read_bytes()
    draws = np.random.default_rng(0)
    for position, bit in zip(draws.permutation(len(content))[:300], draws.integers(0, 8, 300), strict=True):
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"moments/c/1/0/0/0/0/0"):
            LatentFiles(folder, HEADER).read(1)


# Raw mean and standard deviation of each channel of ImageNet's latents, as EDM2 (Karras et al. 2024) publishes them.
RAW_MEAN, RAW_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)


@pytest.mark.parametrize(("factor", "plausible"), [(0.18215, True), (1.0, False), (0.18215**2, False)])
def test_stable_diffusions_latents_of_imagenet_are_plausible_with_their_scale_alone(
    factor: float, plausible: bool
) -> None:
    mean, std = (tuple(factor * value for value in raw) for raw in (RAW_MEAN, RAW_STD))
    statistics = LatentStatistics(mean=mean, std=std)
    assert statistics.std_band == STD_BAND
    draws = np.random.default_rng(0).normal(mean, std, (100_000, 4))
    assert statistics.overall_std == pytest.approx(draws.std(), rel=1e-2)
    if plausible:
        require_plausible(Path("store"), statistics, HEADER)
        return
    with pytest.raises(DataError, match=r"standard deviation 0.5 to 2, found (5|0\.166) with scale"):
        require_plausible(Path("store"), statistics, HEADER)


def test_a_mark_without_a_band_has_the_usual_one(folder: Path) -> None:
    set_mark(std=[1.0] * 4)(folder)
    file = folder / "zarr.json"
    group = json.loads(file.read_text(encoding="utf-8"))
    del group["attributes"]["complete"]["std_band"]
    group["attributes"]["driftfield_latents"]["scale"] = 0.3
    file.write_text(json.dumps(group), encoding="utf-8")
    assert LatentStore(folder).statistics.std_band == STD_BAND


@pytest.mark.parametrize("memory_gib", [0.0, 1.0])
@pytest.mark.parametrize(("value", "moment"), [(float("nan"), 0), (float("inf"), 0), (float("-inf"), 1)])
def test_latents_that_are_not_finite_are_named(tmp_path: Path, memory_gib: float, value: float, moment: int) -> None:
    """Their CRC is right: this is what was written."""
    values = moments()
    values[4, :, moment, 2, 1, 1] = value
    folder = write_store(tmp_path / "store", values)
    message = r"moments/c/1/0.*: expected finite latents, found NaN or infinity in those of image 4; python -m vision"
    with pytest.raises(DataError, match=message):
        LatentStore(folder, memory_gib=memory_gib)
    with pytest.raises(DataError, match=message):
        LatentFiles(folder, HEADER).read(1)


def test_latents_that_are_not_finite_are_named_when_they_are_read(folder: Path) -> None:
    store = LatentStore(folder)
    values = moments()[3:6]
    values[1, 1, 0, 0, 0, 0] = float("nan")  # image 4's mirror
    LatentFiles(folder, HEADER).write(1, values)
    others = torch.tensor([0, 1, 2, 3, 5, 6])
    store.read(torch.cat([others + 7 * epoch for epoch in range(9)]), seed=0)
    with pytest.raises(DataError, match="found NaN or infinity in those of image 4"):
        store.read(torch.cat([others, 4 + 7 * torch.arange(20)]), seed=0)


@pytest.mark.parametrize("memory_gib", [0.0, 1.0])
def test_a_damaged_record_is_named_when_it_is_read(folder: Path, memory_gib: float) -> None:
    place = int(LatentFiles(folder, HEADER).places()[4, 1])
    content = bytearray(file_of(folder, 1).read_bytes())
    content[place + 10] ^= 4
    file_of(folder, 1).write_bytes(content)
    with pytest.raises(DataError, match=r"moments/c/1/0.* the record of image 4 \(mirror\) is damaged"):
        store = LatentStore(folder, memory_gib=memory_gib)
        others = torch.tensor([0, 1, 2, 3, 5, 6])
        store.read(torch.cat([others + 7 * epoch for epoch in range(9)]), seed=0)
        store.read(4 + 7 * torch.arange(20), seed=0)


def test_labels_have_a_checksum(folder: Path) -> None:
    file = folder / "labels" / "c" / "0"
    content = bytearray(file.read_bytes())
    content[8] ^= 1  # another valid label
    file.write_bytes(content)
    with pytest.raises(DataError, match="labels: expected the labels, found: ValueError: .*checksum"):
        LatentStore(folder)


def test_latents_of_another_tokenizer_are_refused(original: Path) -> None:
    def tokenizer(sha256: str = HEADER.tokenizer_sha256, scale: float = 0.18215) -> Tokenizer:
        vae = autoencoder()
        vae.register_to_config(scaling_factor=scale)
        return Tokenizer(vae, fingerprint=sha256)

    LatentStore(original, tokenizer=tokenizer())
    with pytest.raises(DataError, match=r"another tokenizer \(a/vae\): tokenizer_sha256: expected 9"):
        LatentStore(original, tokenizer=tokenizer(sha256="9" * 64))
    with pytest.raises(DataError, match=r"scale: expected 1.0, found 0.18215"):
        LatentStore(original, tokenizer=tokenizer(scale=1.0))


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(DataError, match=r"expected an empty folder or a store of latents, found thesis.txt"):
        create_store(tmp_path, HEADER, LABELS)
    assert (tmp_path / "thesis.txt").exists() and not (tmp_path / "zarr.json").exists()


def test_a_creation_killed_at_any_of_its_files_is_done_again(original: Path, tmp_path: Path) -> None:
    """zarr writes each file aside, NAME.HEX.partial, and renames it: the group's file is the last."""
    for remains in ([], ["moments"], ["moments", "labels"]):
        folder = tmp_path / f"{len(remains)}"
        folder.mkdir()
        for name in remains:
            shutil.copytree(original / name, folder / name)
        (folder / "zarr.5f5f.partial").write_text("{", encoding="utf-8")
        create_store(folder, HEADER, LABELS)
        assert (folder / "zarr.json").exists() and not (folder / "moments" / "c").exists()


def test_creating_again_changes_nothing(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    create_store(folder, HEADER, LABELS)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
