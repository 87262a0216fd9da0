"""Caching latents: what is written, and that kills, stops, damage and company change none of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from driftfield.training import RunFolder, UserError, load_config
from tests.vision.tiny_models import autoencoder
from vision.cache_latents import CacheLatentsConfig, main
from vision.config import CONFIG_DIR
from vision.data import DataError, to_float
from vision.imagenet import ImageFolder
from vision.latent_files import LatentFiles
from vision.latents import LatentStore
from vision.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A sum's order depends on the number of threads, and files are compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, the parts of two photographs: 8 and 6 images."""
    root = tmp_path_factory.mktemp("photographs")
    for name, photograph, count in zip(("china", "flower"), load_sample_images().images, (8, 6), strict=True):
        (root / "train" / name).mkdir(parents=True)
        for i in range(count):
            pixels = photograph[30 * i : 30 * i + 70 + i, 40 * i : 40 * i + 80]
            Image.fromarray(pixels).save(root / "train" / name / f"{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    autoencoder().save_pretrained(folder)
    return folder


def arguments(data: Path, vae: Path, out: Path, **changes: object) -> list[str]:
    keys = {
        "data": data, "out": out, "tokenizer": vae, "classes": "folders", "device": "cpu", "workers": 2,
        "image_size": 16, "batch_size": 3, "chunk_images": 4, "std_band": "[0.1,1.0]",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (keys | changes).items()]


def cache(data: Path, vae: Path, out: Path, **changes: object) -> int:
    overrides = arguments(data, vae, out, **changes)
    config = load_config(CacheLatentsConfig, config_dir=CONFIG_DIR, config_name="cache_latents", overrides=overrides)
    return main(config)


@pytest.fixture(scope="module")
def straight(data: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A store written in one go."""
    out = tmp_path_factory.mktemp("straight") / "store"
    assert cache(data, vae, out) == 0
    return out


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store but the notes of who wrote it."""
    files = {str(path.relative_to(store)): path for path in store.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("runs/")}


def files_of(store: Path) -> LatentFiles:
    return LatentFiles(store, LatentStore(store).header)


# What is written


def test_the_store_holds_the_moments_of_centre_crops_and_their_mirrors(data: Path, vae: Path, straight: Path) -> None:
    images, tokenizer, store = ImageFolder(data, image_size=16), Tokenizer.from_pretrained(vae), LatentStore(straight)
    crops = to_float(images.center_crops(range(14)))
    files = files_of(straight)
    stored = torch.cat([files.read(number) for number in range(len(files))]).float()  # [14, 2, 2, 4, 8, 8]
    for variant, expected in enumerate((tokenizer.encode(crops), tokenizer.encode(crops.flip(-1)))):
        for moment, exact in enumerate(expected):
            error = (stored[:, variant, moment] - exact).abs()
            # float16's 11 bits round by half a unit in the last place; below 2^-14 it has steps of 2^-24
            assert (error <= exact.abs() * 2**-11 + 2**-25 + 1e-6).all()
    assert (stored[:, 0] - stored[:, 1].flip(-1)).abs().max() > 1e-3  # the mirror's moments are not mirrored moments
    assert torch.equal(store.labels, torch.tensor([0] * 8 + [1] * 6)) and store.class_names == ("china", "flower")
    assert store.header.images_sha256 == images.fingerprint
    assert store.header.tokenizer_sha256 == tokenizer.fingerprint
    LatentStore(straight, tokenizer=tokenizer)


def test_float32_is_exact(data: Path, vae: Path, straight: Path, tmp_path: Path) -> None:
    cache(data, vae, tmp_path / "store", dtype="float32")
    files, half = files_of(tmp_path / "store"), files_of(straight)
    assert files.read(0).dtype == torch.float32
    assert torch.equal(files.read(0).half(), half.read(0))


def test_statistics_are_those_of_the_reads(straight: Path) -> None:
    store = LatentStore(straight)
    read = store.read(torch.arange(14 * 400), seed=0).double()  # [k, 4, 8, 8]
    statistics = store.statistics
    torch.testing.assert_close(torch.tensor(statistics.mean).double(), read.mean((0, 2, 3)), atol=2e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(statistics.std).double(), read.std((0, 2, 3)), atol=0, rtol=1e-2)
    assert statistics.overall_std == pytest.approx(float(read.std()), rel=1e-2)


# Interruptions


def test_a_kill_loses_one_file_and_changes_no_bit(data: Path, vae: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    killed = subprocess.run(
        [sys.executable, "-m", "vision.cache_latents", *arguments(data, vae, out)],
        env={**os.environ, "DRIFTFIELD_FAULT": "cache_latents.write.2:exit", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert killed.returncode == 9, killed.stderr
    with pytest.raises(DataError, match="found 2 of 4 files missing"):
        LatentStore(out)
    files = LatentFiles(out, LatentStore(straight).header)
    written = files.path(0).stat().st_mtime_ns
    leftover = files.path(2).with_name("0.5f.partial")  # as zarr leaves it when it is killed while it writes
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half a file")
    assert cache(data, vae, out) == 0
    assert files.path(0).stat().st_mtime_ns == written
    assert contents(out) == contents(straight)


def test_a_failure_before_the_mark_leaves_a_store_that_is_refused(
    data: Path, vae: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    monkeypatch.setenv("DRIFTFIELD_FAULT", "cache_latents.complete:raise")
    with pytest.raises(RuntimeError):
        cache(data, vae, out)
    with pytest.raises(DataError, match="found 0 of 4 files missing and no mark"):
        LatentStore(out)
    monkeypatch.delenv("DRIFTFIELD_FAULT")
    cache(data, vae, out)
    assert contents(out) == contents(straight)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_cleanly(
    data: Path, vae: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int
) -> None:
    out, encode, calls = tmp_path / "store", Tokenizer.encode, []

    def signalling(self: Tokenizer, images: torch.Tensor) -> object:
        calls.append(len(images))
        if len(calls) == 5:  # of two calls a batch, two batches a file: in the second file
            os.kill(os.getpid(), number)
        return encode(self, images)

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode", signalling)
        assert cache(data, vae, out) == exit_code
    assert len(calls) == 6
    with pytest.raises(DataError, match="found 3 of 4 files missing"):
        LatentStore(out)
    assert cache(data, vae, out) == 0
    assert contents(out) == contents(straight)


def test_damaged_and_missing_files_are_made_again(
    data: Path, vae: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(straight, tmp_path / "store"))
    files = files_of(out)
    content = bytearray(files.path(1).read_bytes())
    content[100] ^= 1
    files.path(1).write_bytes(content)
    os.truncate(files.path(2), 50)
    files.path(3).unlink()
    assert cache(data, vae, out) == 0
    output = capsys.readouterr().out
    assert output.count("made again") == 2 and "4 of 14 images are encoded already" in output
    assert contents(out) == contents(straight)


# Company


def test_two_shards_write_what_one_writes(
    data: Path, vae: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store"
    assert cache(data, vae, out, shard=1, num_shards=2) == 0
    assert "this share is done; 2 of 4 files are left to the other shards" in capsys.readouterr().out
    files = LatentFiles(out, LatentStore(straight).header)
    assert files.missing() == [0, 2]
    with pytest.raises(DataError, match="found 2 of 4 files missing"):
        LatentStore(out)
    assert cache(data, vae, out, shard=0, num_shards=2) == 0
    assert contents(out) == contents(straight)


def test_torchrun_shares_the_work(
    data: Path, vae: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, missing in ((0, [1, 2]), (2, [1])):
        monkeypatch.setenv("RANK", str(rank))
        assert cache(data, vae, out) == 0
        assert LatentFiles(out, LatentStore(straight).header).missing() == missing
    monkeypatch.setenv("RANK", "1")
    assert cache(data, vae, out) == 0
    assert contents(out) == contents(straight)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_at_once_and_a_kill_write_what_one_writes(
    data: Path, vae: Path, straight: Path, tmp_path: Path
) -> None:
    """Both make the store, each its files; one is killed and started again."""
    out = tmp_path / "store"

    def start(shard: int, fault: str = "") -> subprocess.Popen[str]:
        words = arguments(data, vae, out, shard=shard, num_shards=2)
        environment = {**os.environ, "DRIFTFIELD_FAULT": fault, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "vision.cache_latents", *words]
        return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stderr=subprocess.PIPE)

    processes = [start(0, "cache_latents.write.2:exit"), start(1)]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [9, 0], errors
    with pytest.raises(DataError, match="found 1 of 4 files missing"):
        LatentStore(out)
    again = start(0)
    error = again.communicate(timeout=100)[1]
    assert again.returncode == 0, error
    assert contents(out) == contents(straight)


def test_a_second_process_with_the_same_share_is_refused(data: Path, vae: Path, straight: Path) -> None:
    with (
        RunFolder(straight / "runs" / "shard-0-of-1", {}, may_change=list(CacheLatentsConfig.__annotations__)),
        pytest.raises(UserError, match="is in use by process"),
    ):
        cache(data, vae, straight)


# What is refused


def test_a_store_of_something_else_is_left_alone(data: Path, vae: Path, straight: Path, tmp_path: Path) -> None:
    before = contents(straight)
    other = autoencoder()
    other.decoder.conv_out.bias.data.add_(1)
    other.save_pretrained(tmp_path / "vae")
    more = Path(shutil.copytree(data, tmp_path / "more"))
    shutil.copy(more / "train" / "china" / "0.JPEG", more / "train" / "china" / "9.JPEG")
    for folder, tokenizer, changes, key in (
        (data, vae, {"dtype": "float32"}, "dtype (there float16, now float32)"),
        (data, vae, {"chunk_images": 5}, "chunk_images (there 4, now 5)"),
        (data, vae, {"image_size": 32}, "sample_shape (there [4, 8, 8], now [4, 16, 16])"),
        (data, vae, {"bfloat16": True}, "bfloat16 (there False, now True)"),
        (data, tmp_path / "vae", {}, "tokenizer_sha256"),
        (more, vae, {}, "count (there 14, now 15)"),
    ):
        with pytest.raises(UserError, match="is a store of other latents") as error:
            cache(folder, tokenizer, straight, **changes)
        assert key in str(error.value)
    assert contents(straight) == before


def test_the_same_weights_elsewhere_and_another_pace_are_the_same_store(
    data: Path, vae: Path, straight: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(vae, tmp_path / "vae")
    before = contents(straight)
    assert cache(data, moved, straight, batch_size=1, workers=1) == 0
    assert contents(straight) == before


def test_an_image_that_cannot_be_read_is_named(data: Path, vae: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    path = broken / "train" / "china" / "5.JPEG"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"china/5\.JPEG: expected a whole image"):
        cache(broken, vae, tmp_path / "store")


def test_an_unreadable_image_is_the_next_of_its_class_and_named(
    data: Path, vae: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after it was met, too: the start that finishes the store still names it."""
    broken, out = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "store"
    for name in ("china/1.JPEG", "flower/5.JPEG"):  # in the first file of the store, and in the last
        path = broken / "train" / name
        path.write_bytes(b"<html>".ljust(path.stat().st_size))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DRIFTFIELD_FAULT", "cache_latents.write.2:raise")
        with pytest.raises(RuntimeError):
            cache(broken, vae, out, max_unreadable=0.2)
    assert cache(broken, vae, out, max_unreadable=0.2) == 0
    assert "of 2 unreadable images, named in runs/*/unreadable.json, the next of their class" in capsys.readouterr().out
    noted = json.loads((out / "runs" / "shard-0-of-1" / "unreadable.json").read_text(encoding="utf-8"))
    assert noted == ["china/1.JPEG", "flower/5.JPEG"]
    expected, found = (
        torch.cat([files_of(store).read(number) for number in range(4)]) for store in (straight, out)
    )  # [14, 2, 2, 4, 8, 8] each
    instead = torch.arange(14)
    instead[[1, 13]] = torch.tensor([2, 8])
    torch.testing.assert_close(found, expected[instead], atol=2e-3, rtol=2e-3)  # a batch's size changes the last digits
    assert (found[instead != torch.arange(14)] - expected[[1, 13]]).abs().amax((1, 2, 3, 4, 5)).min() > 0.1


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_float16_cannot_hold_is_refused(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encode, calls = Tokenizer.encode, []

    def spoiling(self: Tokenizer, images: torch.Tensor) -> object:
        calls.append(len(images))
        moments = encode(self, images)
        if len(calls) == 4:  # the mirrors of the second batch, which is image 3 alone
            moments.mean[-1, 0, 0, 0] = value
        return moments

    monkeypatch.setattr(Tokenizer, "encode", spoiling)
    with pytest.raises(DataError, match=r"china/3\.JPEG: expected finite float16 latents, found NaN or infinity"):
        cache(data, vae, tmp_path / "store")


def test_an_implausible_scale_shows_after_the_first_file_and_can_be_declared(
    data: Path, vae: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The random autoencoder's latents are far from unit variance, as those of one whose scale was forgotten."""
    out = tmp_path / "store"
    with pytest.raises(DataError, match=r"standard deviation 0\.5 to 2, found 0\.1\d* with scale 0\.18215") as error:
        cache(data, vae, out, std_band="[0.5,2.0]")
    assert str(vae) in str(error.value) and "std_band=[LOW,HIGH]" in str(error.value)
    with pytest.raises(DataError, match="found 3 of 4 files missing"):
        LatentStore(out)
    capsys.readouterr()
    assert cache(data, vae, out) == 0
    assert "4 of 14 images are encoded already" in capsys.readouterr().out
    assert contents(out) == contents(straight)


def test_the_band_of_a_whole_store_is_declared_anew_by_the_same_command(
    data: Path, vae: Path, straight: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(straight, tmp_path / "store"))
    before = LatentStore(out)
    with pytest.raises(DataError, match=r"standard deviation 0\.5 to 2, found 0\.1"):
        cache(data, vae, out, std_band="[0.5,2.0]")
    assert contents(out) == contents(straight)
    assert cache(data, vae, out, std_band="[0.01,3.0]") == 0
    assert LatentStore(out).statistics == replace(before.statistics, std_band=(0.01, 3.0))
    assert LatentStore(out).fingerprint == before.fingerprint  # a run on these latents may go on
    with pytest.raises(UserError, match="std_band: expected the lowest before the highest, found"):
        cache(data, vae, out, std_band="[2.0,0.5]")


def test_a_file_of_latents_that_are_not_finite_is_made_again(
    data: Path, vae: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(straight, tmp_path / "store"))
    files = files_of(out)
    moments = files.read(2)
    moments[1, 0, 1, 3] = float("inf")
    files.write(2, moments)
    assert cache(data, vae, out) == 0
    assert "made again" in capsys.readouterr().out and contents(out) == contents(straight)


def test_a_disk_too_small_is_noticed_before_the_work(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(UserError, match=r"out: expected .* GiB free for what is left, found 9.31e-10 GiB"):
        cache(data, vae, tmp_path / "store")


def test_a_full_disk_is_one_sentence(
    data: Path, vae: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIFTFIELD_FAULT", "cache_latents.write.1:enospc")
    with pytest.raises(UserError, match=r"out: .*No space left on device"):
        cache(data, vae, tmp_path / "store")
    monkeypatch.delenv("DRIFTFIELD_FAULT")
    cache(data, vae, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(straight)


def test_keys_that_contradict_each_other_are_named(data: Path, vae: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"shard": 1}, "expected both shard and num_shards or neither, found shard=1 num_shards=None"),
        ({"shard": 2, "num_shards": 2}, "shard: expected less than num_shards = 2, found 2"),
        ({"image_size": 15}, "image_size: expected a multiple of 2, found 15"),
        ({"tokenizer": tmp_path}, "tokenizer: .* found no config.json"),
        ({"split": "test"}, "test: expected a folder"),
        ({"classes": "imagenet"}, "ImageNet's 1000 synsets, found 1000 .* missing and 2 .* unknown"),
    ):
        with pytest.raises(UserError, match=message):
            cache(data, vae, tmp_path / "store", **changes)
    assert not (tmp_path / "store").exists()


def test_reading_every_epoch_gives_new_latents_near_the_same_image(data: Path, vae: Path, straight: Path) -> None:
    """Folder to latents to images: the decoder takes what the store gives."""
    tokenizer = Tokenizer.from_pretrained(vae)
    store = LatentStore(straight, tokenizer=tokenizer)
    visits = torch.tensor([3, 3 + 14, 3 + 28])
    latents = store.read(visits, seed=0)
    assert len(np.unique(latents.numpy()[:, 0, 0, 0])) == 3
    assert tokenizer.decode(latents).shape == (3, 3, 16, 16)
