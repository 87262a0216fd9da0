"""Where samples go: what is written is what was given, in order, and a refusing disk is heard of."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vision import sample_files
from vision.sample_files import Grid, NpzFile, PngFolder, open_sample_files


def pictures(count: int, channels: int = 3) -> Tensor:
    return torch.randint(256, (count, channels, 8, 6), dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_numpy_would_write_from_all_at_once(channels: int, tmp_path: Path) -> None:
    images, labels = pictures(10, channels), torch.arange(10) % 4
    with NpzFile(tmp_path / "new" / "a.npz", labels) as file:
        for batch in images.split(4):
            file.write(batch)
    with np.load(tmp_path / "new" / "a.npz", allow_pickle=False) as found:
        assert found.files == ["arr_0", "labels"]
        assert found["arr_0"].dtype == np.uint8 and found["labels"].dtype == np.int64
        assert np.array_equal(found["arr_0"], images.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(found["labels"], labels.numpy())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]


def test_npz_that_fails_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"older")
    with pytest.raises(KeyError), NpzFile(path, torch.zeros(9, dtype=torch.int64)) as file:
        file.write(pictures(4))
        raise KeyError
    with pytest.raises(ValueError, match="expected 9 images, 5 are missing"), NpzFile(path, torch.zeros(9)) as file:
        file.write(pictures(4))
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_a_batch_of_the_npz_is_on_disk_before_the_next_is_there(tmp_path: Path) -> None:
    batch = torch.zeros((64, 3, 64, 64), dtype=torch.uint8)
    with NpzFile(tmp_path / "a.npz", torch.zeros(64 * 3, dtype=torch.int64)) as file:
        for written in (1, 2, 3):
            file.write(batch)
            [aside] = tmp_path.iterdir()
            assert aside.stat().st_size >= written * batch.numel() - 2**16


def test_folder_numbers_images_in_order(tmp_path: Path) -> None:
    images = pictures(30)
    with PngFolder(tmp_path / "new", first_index=5) as folder:
        for batch in images.split(7):
            folder.write(batch)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == [f"{index:06d}.png" for index in range(5, 35)]
    for name, image in zip(names, images, strict=True):
        with Image.open(tmp_path / "new" / name) as found:
            assert np.array_equal(np.asarray(found), image.permute(1, 2, 0).numpy())


def test_folder_tells_of_a_write_that_failed(tmp_path: Path) -> None:
    (tmp_path / "000001.png").mkdir()  # no file can take its place
    with pytest.raises(OSError), PngFolder(tmp_path) as folder:
        folder.write(pictures(3))


def test_folder_tells_of_it_while_further_images_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_files, "WAITING_IMAGES", 2)
    (tmp_path / "000000.png").mkdir()
    with PngFolder(tmp_path) as folder, pytest.raises(OSError):
        folder.write(pictures(20))


def test_folder_lets_the_caller_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = 4
    disk_is_free = threading.Event()
    monkeypatch.setattr(sample_files, "WAITING_IMAGES", waiting)
    monkeypatch.setattr(sample_files, "save_image", lambda image, path: disk_is_free.wait(10))
    taken = []

    def write() -> None:
        with PngFolder(tmp_path) as folder:
            for image in pictures(waiting + 3).split(1):
                folder.write(image)
                taken.append(image)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        writer.join(0.3)
        assert writer.is_alive() and len(taken) == waiting
    finally:
        disk_is_free.set()
        writer.join(10)
    assert len(taken) == waiting + 3


def test_interrupted_folder_does_not_write_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    may_write = threading.Event()

    def save(image: Tensor, path: Path) -> None:
        may_write.wait(10)
        written.append(path)

    monkeypatch.setattr(sample_files, "save_image", save)
    with pytest.raises(KeyboardInterrupt), PngFolder(tmp_path) as folder:
        folder.write(pictures(200))
        threading.Timer(0.1, may_write.set).start()
        raise KeyboardInterrupt
    assert len(written) <= sample_files.WRITING_THREADS


def test_the_ending_chooses(tmp_path: Path) -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    kinds = {"a.png": Grid, "a.npz": NpzFile, "a": PngFolder}
    for name, kind in kinds.items():
        with open_sample_files(tmp_path / name, labels, columns=1) as files:
            assert type(files) is kind
            files.write(pictures(1))
    assert {path.name for path in tmp_path.iterdir()} == kinds.keys()
