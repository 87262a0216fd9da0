"""Diffusion Policy's zarr stores, PushT's and BlockPush's, and what can be wrong with them."""

import json
from pathlib import Path

import numpy as np
import pytest

from policy.data_error import DataError
from policy.demonstrations import load_demonstrations
from policy.diffusion_policy_data import load_diffusion_policy
from tests.policy.zarr_v2 import write_store, zipped

ENDS = [4, 11]


def push_t() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "action": random.uniform(0, 512, (11, 2)).astype("<f4"),
        "img": random.integers(0, 256, (11, 8, 8, 3)).astype("<f4"),
        "keypoint": random.uniform(0, 512, (11, 9, 2)).astype("<f4"),
        "n_contacts": np.zeros((11, 1), "<f4"),
        "state": random.uniform(0, 512, (11, 5)).astype("<f4"),
    }


def block_push(largest: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    action = random.uniform(-largest, largest, (11, 2)).astype("<f4")
    return {"action": action, "obs": random.normal(size=(11, 16)).astype("<f4")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_store(tmp_path / "pusht.zarr", push_t(), ENDS)


def test_push_t_is_key_points_and_agent(folder: Path) -> None:
    data, buffer = push_t(), load_diffusion_policy(folder)
    assert buffer.attributes["task"] == "push_t" and buffer.attributes["action"] == "absolute"
    assert buffer.episode_ends.tolist() == ENDS and sorted(buffer.arrays) == ["action", "state"]
    np.testing.assert_array_equal(buffer.arrays["action"], data["action"])
    state = buffer.arrays["state"]
    assert state.dtype == np.float32 and state.shape == (11, 20)
    for point in range(9):
        np.testing.assert_array_equal(state[:, 2 * point : 2 * point + 2], data["keypoint"][:, point])
    np.testing.assert_array_equal(state[:, 18:], data["state"][:, :2])


def test_push_t_from_images_is_the_image_and_the_agent(folder: Path) -> None:
    data, buffer = push_t(), load_diffusion_policy(folder, observation="image")
    assert buffer.arrays["image"].dtype == np.uint8
    np.testing.assert_array_equal(buffer.arrays["image"], data["img"])
    np.testing.assert_array_equal(buffer.arrays["state"], data["state"][:, :2])


@pytest.mark.parametrize(("largest", "kind"), [(0.03, "delta"), (0.1, "delta"), (0.6, "absolute")])
def test_block_push_is_its_observation(tmp_path: Path, largest: float, kind: str) -> None:
    data = block_push(largest)
    buffer = load_diffusion_policy(write_store(tmp_path / "push.zarr", data, ENDS))
    assert (buffer.attributes["task"], buffer.attributes["action"]) == ("block_push", kind)
    np.testing.assert_array_equal(buffer.arrays["state"], data["obs"])
    np.testing.assert_array_equal(buffer.arrays["action"], data["action"])


def test_a_zip_file_is_the_same(folder: Path) -> None:
    assert load_demonstrations(zipped(folder)).fingerprint == load_demonstrations(folder).fingerprint


def test_a_chunk_that_is_missing_is_refused_unless_it_is_known_to_be_left_out(folder: Path) -> None:
    (folder / "data/keypoint/1.0.0").unlink()
    with pytest.raises(DataError, match="array data/keypoint: expected 3 chunks, found that chunk 1.0.0 is missing"):
        load_diffusion_policy(folder)
    with pytest.raises(DataError, match="chunk 1.0.0 is missing"):
        load_diffusion_policy(zipped(folder))
    state = load_diffusion_policy(folder, allow_missing_chunks=True).arrays["state"]
    assert (state[4:8, :18] == 0).all() and (state[:4] != 0).all() and (state[8:] != 0).all()


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("action", "2.0"), ("keypoint", "0.0.0"), ("state", "1.0")],  # lz4, none, zstd
)
def test_a_chunk_that_is_cut_short_is_named(folder: Path, name: str, chunk: str) -> None:
    path = folder / "data" / name / chunk
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=rf"pusht.zarr: array data/{name}: chunk {chunk} is damaged"):
        load_diffusion_policy(folder)


def test_arrays_that_are_missing_are_listed(folder: Path, tmp_path: Path) -> None:
    data = push_t()
    del data["keypoint"]
    other = write_store(tmp_path / "other.zarr", data, ENDS)
    with pytest.raises(DataError, match=r"expected data/keypoint .* or data/obs .*, found data/action, data/img"):
        load_diffusion_policy(other)
    ends = folder / "meta/episode_ends"
    ends.rename(folder / "meta/episode_end")
    with pytest.raises(DataError, match="expected an array meta/episode_ends, .*did you mean 'meta/episode_end'"):
        load_diffusion_policy(folder)


@pytest.mark.parametrize(
    ("change", "ends", "message"),
    [
        ({"action": np.zeros((9, 2), "<f4")}, ENDS, "action: expected 11 steps, .*found 9"),
        ({"state": np.zeros((9, 5), "<f4")}, ENDS, r"data/keypoint: expected \[9, 9, 2\], found \[11, 9, 2\]"),
        ({"keypoint": np.zeros((11, 9, 3), "<f4")}, ENDS, r"data/keypoint: expected \[11, 9, 2\]"),
        ({"keypoint": np.full((11, 9, 2), np.nan, "<f4")}, ENDS, "state: .*nan in episode 0 at step 0"),
        ({}, [4, 10], "expected 10 steps, .*found 11"),
        ({}, [4, 4, 11], "increasing"),
    ],
)
def test_arrays_that_do_not_agree_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray], ends: list[int], message: str
) -> None:
    folder = write_store(tmp_path / "bad.zarr", push_t() | change, ends)
    with pytest.raises(DataError, match=rf"bad.zarr: .*{message}"):
        load_diffusion_policy(folder)


@pytest.mark.parametrize("value", [-1.0, 256.0, np.nan])
def test_pixels_that_are_none_are_refused(tmp_path: Path, value: float) -> None:
    data = push_t()
    data["img"][3, 2, 1, 0] = value
    with pytest.raises(DataError, match="data/img: expected values from 0 to 255"):
        load_diffusion_policy(write_store(tmp_path / "bad.zarr", data, ENDS), observation="image")
    with pytest.raises(DataError, match="data/img: expected values from 0 to 255, found 0.0 to 0.99"):
        data["img"] = push_t()["img"] / np.float32(256)
        load_diffusion_policy(write_store(tmp_path / "dark.zarr", data, ENDS), observation="image")


def test_objects_and_damaged_metadata_are_refused(folder: Path) -> None:
    path = folder / "data/action/.zarray"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(metadata | {"dtype": "|O", "filters": [{"id": "pickle"}]}), encoding="utf-8")
    with pytest.raises(DataError, match="pusht.zarr"):
        load_diffusion_policy(folder)
    path.write_text(json.dumps(metadata)[:-9], encoding="utf-8")
    with pytest.raises(DataError, match="pusht.zarr"):
        load_diffusion_policy(folder)


def test_a_zip_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.zarr.zip").write_bytes(b"no zip file")
    with pytest.raises(DataError, match="bad.zarr.zip: expected a zarr group"):
        load_demonstrations(tmp_path / "bad.zarr.zip")


def test_block_push_has_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="observation: expected 'state'"):
        load_diffusion_policy(write_store(tmp_path / "push.zarr", block_push(0.1), ENDS), observation="image")
