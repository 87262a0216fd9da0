"""LeRobot's data sets, version 3: tables and videos of many episodes each, and what can be wrong with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from policy.data_error import DataError
from policy.demonstrations import load_demonstrations
from policy.lerobot_data import load_lerobot
from tests.policy.lerobot_v3 import CAMERA, gray, write_data_set

LENGTHS = [4, 6, 3, 5]
STEPS = sum(LENGTHS)
DATA = {
    "action": np.random.default_rng(0).normal(size=(STEPS, 2)).astype(np.float32),
    "observation.state": np.random.default_rng(1).normal(size=(STEPS, 3)).astype(np.float32),
    "pictures": np.random.default_rng(2).integers(0, 256, (STEPS, 6, 9, 3)).astype(np.uint8),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("lerobot") / "data", LENGTHS, DATA, files=[0, 0, 1, 1])


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def test_numbers_are_read_from_the_tables(original: Path) -> None:
    buffer = load_demonstrations(original)
    assert buffer.episode_ends.tolist() == [4, 10, 13, 18] and sorted(buffer.arrays) == ["action", "state"]
    np.testing.assert_array_equal(buffer.arrays["action"], DATA["action"])
    np.testing.assert_array_equal(buffer.arrays["state"], DATA["observation.state"])
    assert buffer.attributes["feature_names"]["action"] == {"motors": ["x", "y"]}
    assert buffer.attributes["control_hz"] == 10


def test_the_state_may_be_several_features(original: Path) -> None:
    state = load_lerobot(original, state_features=("observation.effort", "observation.state")).arrays["state"]
    np.testing.assert_array_equal(state[:, 0], np.arange(STEPS))  # a single number, not a list
    np.testing.assert_array_equal(state[:, 1:], DATA["observation.state"])


def test_every_frame_has_its_own_picture(original: Path) -> None:
    buffer = load_lerobot(original, observation="image")
    assert sorted(buffer.arrays) == ["action", "image", "state", "top"]
    np.testing.assert_array_equal(buffer.arrays["image"], DATA["pictures"])  # png, in the table
    top = buffer.arrays["top"]
    assert top.dtype == np.uint8 and top.shape == (STEPS, 32, 48, 3)
    np.testing.assert_allclose(top.mean(axis=(1, 2, 3)), gray(STEPS).mean(axis=(1, 2, 3)), atol=2)  # 5 apart


def test_files_need_not_be_in_the_order_of_the_episodes(tmp_path: Path) -> None:
    folder = write_data_set(tmp_path / "data", LENGTHS, DATA, files=[1, 0, 1, 0])
    buffer = load_lerobot(folder, observation="image")
    np.testing.assert_array_equal(buffer.arrays["action"], DATA["action"])
    np.testing.assert_array_equal(buffer.arrays["image"], DATA["pictures"])
    top = buffer.arrays["top"].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(top, gray(STEPS).mean(axis=(1, 2, 3)), atol=2)


def change_info(folder: Path, **changes: Any) -> None:
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebase_version": "v2.1"}, r"codebase_version: expected v3\.\*, found v2.1"),
        ({"data_path": "{chunk_index:09d}"}, "data_path: expected data/chunk-"),
        ({"total_episodes": 5}, "expected 5 episodes of 18 frames in all, as meta/info.json says, found 4 of 18"),
        ({"features": {"action": {"dtype": "float32"}}}, "expected a feature observation.state, found action"),
        ({"features": {"action": 3}}, "expected LeRobot's description"),
        ({"features": 3}, "expected LeRobot's description"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    change_info(folder, **change)
    with pytest.raises(DataError, match=message):
        load_lerobot(folder)


def rewrite(path: Path, change: Any) -> None:
    pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(path)), path)


FRAMES = "data/chunk-000/file-001.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (FRAMES, lambda table: table.slice(1), "expected the frames 0 to 17 of 4 episodes .* found 17 frames"),
        (FRAMES, lambda table: table.drop_columns(["action"]), "file-001.parquet: expected a column action, found"),
        (
            FRAMES,
            lambda table: table.set_column(
                table.column_names.index("episode_index"), "episode_index", [[2] * 4 + [3] * 4]
            ),
            "or of other episodes",
        ),
        (
            FRAMES,
            lambda table: table.set_column(0, "action", pyarrow.array([[1.0]] * 8, pyarrow.list_(pyarrow.float32()))),
            "column action: expected numbers, as many in each frame",
        ),
        (EPISODES, lambda table: table.slice(0, 3), "expected 4 episodes of 18 frames .* found 3 of 13"),
        (EPISODES, lambda table: table.slice(1), "expected episode 0 from frame 0 on, found episode 1 from frame 4"),
    ],
)
def test_tables_that_do_not_agree_are_refused(folder: Path, file: str, change: Any, message: str) -> None:
    rewrite(folder / file, change)
    with pytest.raises(DataError, match=message):
        load_lerobot(folder)


@pytest.mark.parametrize("file", [FRAMES, EPISODES, "meta/info.json"])
def test_files_that_are_cut_short_or_missing_are_named(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=Path(file).name):
        load_lerobot(folder)
    path.unlink()
    with pytest.raises(DataError, match="expected"):
        load_lerobot(folder)


def test_a_video_that_is_missing_damaged_or_too_short_is_named(folder: Path) -> None:
    path = folder / f"videos/{CAMERA}/chunk-000/file-001.mp4"
    path.write_bytes((folder / f"videos/{CAMERA}/chunk-000/file-000.mp4").read_bytes())
    assert load_lerobot(folder, observation="image").num_steps == STEPS  # 10 frames where 8 are needed
    other = folder / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    shutil.copy(folder / f"videos/{CAMERA}/chunk-000/file-001.mp4", folder / "ten.mp4")
    other.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DataError, match="file-000.mp4: expected a whole video, ffmpeg says: "):
        load_lerobot(folder, observation="image")
    shutil.copy(folder / "ten.mp4", other)
    path.unlink()
    with pytest.raises(DataError, match="file-001.mp4: expected a video; there is no such file"):
        load_lerobot(folder, observation="image")
    assert load_lerobot(folder).num_steps == STEPS  # videos are not looked at


def test_a_video_with_too_few_frames_is_refused(tmp_path: Path) -> None:
    folder = write_data_set(tmp_path / "data", LENGTHS, DATA, files=[0, 1, 1, 1])
    videos = folder / f"videos/{CAMERA}/chunk-000"
    shutil.copy(videos / "file-000.mp4", videos / "file-001.mp4")  # 4 frames where 14 are needed
    with pytest.raises(DataError, match="file-001.mp4: expected frames up to 13, found 10 of them missing"):
        load_lerobot(folder, observation="image")


def test_without_ffmpeg_the_states_can_still_be_read(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_ffmpeg() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", no_ffmpeg)
    with pytest.raises(DataError, match="file-000.mp4: expected ffmpeg to decode it, found none"):
        load_lerobot(original, observation="image")
    assert load_lerobot(original).num_steps == STEPS


def test_a_picture_of_another_size_than_said_is_refused(folder: Path) -> None:
    info = json.loads((folder / "meta/info.json").read_text(encoding="utf-8"))
    info["features"][CAMERA]["shape"] = [3, 64, 48]
    change_info(folder, **info)
    with pytest.raises(DataError, match=r"expected frames of \(64, 48\) \(height, width\), found \(32, 48\)"):
        load_lerobot(folder, observation="image")
