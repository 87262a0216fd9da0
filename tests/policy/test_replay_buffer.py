"""Demonstrations in memory and on the disk: what fits, what comes back, and what can be wrong with the files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from policy.data_error import DataError
from policy.replay_buffer import HEADER, ReplayBuffer

LENGTHS = (3, 5, 1)
ATTRIBUTES = {"task": "push_t", "action": "absolute"}


def arrays(steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "action": random.normal(size=(steps, 2)).astype(np.float32),
        "state": random.normal(size=(steps, 4)).astype(np.float32),
        "image": random.integers(0, 256, (steps, 6, 8, 3)).astype(np.uint8),
    }


def buffer(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> ReplayBuffer:
    episodes = [{"seed": 100 * seed + number} for number in range(len(lengths))]
    return ReplayBuffer(arrays(sum(lengths), seed), np.cumsum(lengths), {**ATTRIBUTES, "episodes": episodes})


def is_same(first: ReplayBuffer, second: ReplayBuffer) -> bool:
    return first.fingerprint == second.fingerprint and first.attributes == second.attributes


def joined(*buffers: ReplayBuffer) -> ReplayBuffer:
    episodes = [part.episode(i) for part in buffers for i in range(len(part))]
    known = [entry for part in buffers for entry in part.attributes["episodes"]]
    return ReplayBuffer.from_episodes(episodes, {**ATTRIBUTES, "episodes": known})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demonstrations") / "original.zarr"
    buffer().save(path)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store.zarr"))


# In memory


def test_episodes_are_the_rows_between_their_ends() -> None:
    whole, all_arrays = buffer(), arrays(9)
    assert (len(whole), whole.num_steps) == (3, 9)
    assert whole.episode_starts.tolist() == [0, 3, 8] and whole.episode_ends.tolist() == [3, 8, 9]
    assert whole.episode_ends.dtype == whole.episode_starts.dtype == np.int64
    for key, array in all_arrays.items():
        np.testing.assert_array_equal(whole.episode(1)[key], array[3:8])
    with pytest.raises(IndexError, match="episode 3: expected a number from 0 to 2"):
        whole.episode(3)
    with pytest.raises(IndexError, match="episode -1"):
        whole.episode(-1)


def test_the_fingerprint_is_of_names_values_shapes_and_ends() -> None:
    data = arrays(9)
    changed = {key: array.copy() for key, array in data.items()}
    changed["image"][4, 5, 6, 2] ^= 1
    others = [
        ReplayBuffer(data, [3, 8, 9]),
        ReplayBuffer(changed, [3, 8, 9]),
        ReplayBuffer(data, [4, 8, 9]),
        ReplayBuffer({**data, "image": data["image"].reshape(9, 8, 6, 3)}, [3, 8, 9]),
        ReplayBuffer({"action": data["action"], "state": data["state"], "camera": data["image"]}, [3, 8, 9]),
    ]
    assert len({other.fingerprint for other in others}) == len(others)
    reordered = ReplayBuffer(dict(reversed(data.items())), [3, 8, 9], {"task": "other"})
    assert reordered.fingerprint == others[0].fingerprint
    assert len(others[0].fingerprint) == 64 and int(others[0].fingerprint, 16) >= 0


@pytest.mark.parametrize(
    ("change", "ends", "message"),
    [
        ({"action": None}, [9], "arrays: expected the key 'action', found image, state"),
        ({"action": np.zeros((9, 2))}, [9], r"action: expected float32 \[N, D\], found float64 \[9, 2\]"),
        ({"action": np.zeros(9, np.float32)}, [9], r"action: expected float32 \[N, D\], found float32 \[9\]"),
        ({"state": np.zeros((9, 0), np.float32)}, [9], r"state: expected entries in every step, found shape \[9, 0\]"),
        ({"state": np.zeros((8, 4), np.float32)}, [9], "state: expected 9 steps, where the last episode ends, found 8"),
        ({"image": np.zeros((9, 2, 2, 3))}, [9], "image: expected one of float32, uint8, .* found float64"),
        ({"a/b": np.zeros(9, np.uint8)}, [9], "expected names without '/'"),
        ({}, [3, 8], "expected 8 steps, where the last episode ends, found 9"),
        ({}, [3, 3, 9], r"increasing numbers, found 3 after 3 \(episode 1\)"),
        ({}, [5, 3, 9], r"increasing numbers, found 3 after 5 \(episode 1\)"),
        ({}, [0, 9], r"increasing numbers, found 0 after 0 \(episode 0\)"),
        ({}, [], "at least one"),
        ({}, [9.0], "expected integers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], ends: list[int], message: str) -> None:
    data = {key: array for key, array in (arrays(9) | change).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        ReplayBuffer(data, ends)


@pytest.mark.parametrize(("key", "value"), [("action", np.nan), ("state", np.inf), ("state", -np.inf)])
def test_numbers_that_are_not_finite_are_refused_with_episode_and_step(key: str, value: float) -> None:
    data = arrays(9)
    data[key][7, 1] = value
    with pytest.raises(ValueError, match=rf"{key}: .*{value} in episode 1 at step 4, entry \[1\]; 1 of 9 steps"):
        ReplayBuffer(data, [3, 8, 9])


def test_attributes_are_json_and_episodes_have_one_entry_each() -> None:
    with pytest.raises(ValueError, match=r"attributes\['episodes'\]: expected one for each of 3, found 2"):
        ReplayBuffer(arrays(9), [3, 8, 9], {"episodes": [{}, {}]})
    with pytest.raises(ValueError, match="JSON"):
        ReplayBuffer(arrays(9), [9], {"dt": float("nan")})
    with pytest.raises(TypeError, match="JSON"):
        ReplayBuffer(arrays(9), [9], {"dt": np.zeros(2)})


def test_episodes_of_other_kinds_are_not_joined() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ReplayBuffer.from_episodes([])
    with pytest.raises(ValueError, match=r"episode 1: expected the keys \['action', 'image', 'state'\], found"):
        ReplayBuffer.from_episodes([arrays(3), {"action": arrays(3)["action"]}])
    with pytest.raises(ValueError, match=r"episode 1: state: expected float32 \[N, 4\] .* found float32 \[N, 5\]"):
        ReplayBuffer.from_episodes([arrays(3), {**arrays(3), "state": np.zeros((3, 5), np.float32)}])
    with pytest.raises(ValueError, match="episode 0: expected arrays of one length, found .*'state': 2"):
        ReplayBuffer.from_episodes([{**arrays(3), "state": np.zeros((2, 4), np.float32)}])


# On the disk


def test_what_is_saved_comes_back(original: Path) -> None:
    loaded = ReplayBuffer.load(original)
    assert is_same(loaded, buffer())
    assert {key: array.dtype for key, array in loaded.arrays.items()} == {
        "action": np.float32, "state": np.float32, "image": np.uint8
    }  # fmt: skip


def write_v3(folder: Path, array: np.ndarray, rows: int) -> None:
    """An array of zarr's format 3 by the words of its specification, without zarr."""
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": str(array.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": (rows, *array.shape[1:])}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text(json.dumps(metadata), encoding="utf-8")
    for number in range(-(-len(array) // rows)):
        full = np.zeros((rows, *array.shape[1:]), array.dtype)  # a chunk at the end is stored whole
        part = array[number * rows : (number + 1) * rows]
        full[: len(part)] = part
        path = folder.joinpath("c", str(number), *"0" * (array.ndim - 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(full.tobytes() + google_crc32c.value(full.tobytes()).to_bytes(4, "little"))


def test_the_form_on_the_disk_is_that_of_the_specification(tmp_path: Path) -> None:
    """What was written once stays readable, whatever a later version of zarr writes."""
    expected = buffer()
    for name, array in expected.arrays.items():
        write_v3(tmp_path / "data" / name, array, 4)
    write_v3(tmp_path / "meta/episode_ends", expected.episode_ends, 3)
    for group, attributes in (("", {HEADER: {"version": 1, **expected.attributes}}), ("data", {}), ("meta", {})):
        metadata = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        (tmp_path / group / "zarr.json").write_text(json.dumps(metadata), encoding="utf-8")
    assert is_same(ReplayBuffer.load(tmp_path), expected)


def test_chunks_of_zeros_are_written_and_come_back(tmp_path: Path) -> None:
    zeros = ReplayBuffer({"action": np.zeros((4, 2), np.float32), "image": np.zeros((4, 5, 5, 3), np.uint8)}, [4])
    zeros.save(tmp_path / "zeros.zarr")
    assert is_same(ReplayBuffer.load(tmp_path / "zeros.zarr"), zeros)


def test_arrays_of_many_chunks_come_back(tmp_path: Path) -> None:
    steps = 2_500  # of 1 KiB: chunks of 2 MB hold 1953
    many = ReplayBuffer({"action": np.arange(steps * 256, dtype=np.float32).reshape(steps, 256)}, [1_000, steps])
    many.save(tmp_path / "many.zarr")
    assert len([path for path in (tmp_path / "many.zarr/data/action/c").rglob("*") if path.is_file()]) == 2
    assert is_same(ReplayBuffer.load(tmp_path / "many.zarr"), many)


def test_keys_choose_what_is_read(folder: Path) -> None:
    shutil.rmtree(folder / "data/image/c")  # not looked at
    loaded = ReplayBuffer.load(folder, keys=["state"])
    assert sorted(loaded.arrays) == ["action", "state"]
    assert sorted(ReplayBuffer.load(folder, keys=[]).arrays) == ["action"]
    with pytest.raises(DataError, match="expected data/stat, found action, image, state; did you mean 'state'?"):
        ReplayBuffer.load(folder, keys=["stat"])


def test_saving_replaces_nothing(folder: Path) -> None:
    with pytest.raises(DataError, match="found that it exists"):
        buffer((2,)).save(folder)
    assert is_same(ReplayBuffer.load(folder), buffer())


def test_saving_leaves_nothing_behind_where_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="No space left"):
        buffer().save(tmp_path / "store.zarr")
    assert list(tmp_path.iterdir()) == []


# Damage


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_missing_chunk_is_named(folder: Path) -> None:
    (folder / "data/state/c/0/0").unlink()
    with pytest.raises(DataError, match=r"store.zarr: array data/state: expected 1 chunks, .* chunk c/0/0 is missing"):
        ReplayBuffer.load(folder)


def test_a_bit_flip_in_a_chunk_is_named(folder: Path) -> None:
    path = folder / "data/image/c/0/0/0/0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"array data/image: chunk c/0/0/0/0 is damaged: .*checksum"):
        ReplayBuffer.load(folder)


def test_no_bit_flip_changes_what_is_read(original: Path, tmp_path: Path) -> None:
    random, expected = np.random.default_rng(0), buffer().fingerprint
    refused = 0
    for name in (path.relative_to(original) for path in files(original)):
        for _ in range(6):
            shutil.rmtree(tmp_path / "flipped", ignore_errors=True)
            path = Path(shutil.copytree(original, tmp_path / "flipped")) / name
            content = bytearray(path.read_bytes())
            content[random.integers(len(content))] ^= 1 << random.integers(8)
            path.write_bytes(content)
            try:
                assert ReplayBuffer.load(tmp_path / "flipped").fingerprint == expected, name
            except DataError as error:
                refused += 1
                assert "flipped" in str(error)
    assert refused > 25


@pytest.mark.parametrize("keep", [0, 1, 20])
def test_files_that_are_cut_short_are_refused(original: Path, tmp_path: Path, keep: int) -> None:
    for name in (path.relative_to(original) for path in files(original)):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        path = Path(shutil.copytree(original, tmp_path / "cut")) / name
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match="cut"):
            ReplayBuffer.load(tmp_path / "cut")


def change_header(folder: Path, **changes: Any) -> None:
    metadata = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
    metadata["attributes"][HEADER] |= changes
    (folder / "zarr.json").write_text(json.dumps(metadata), encoding="utf-8")


def test_another_version_or_store_is_refused(folder: Path, tmp_path: Path) -> None:
    change_header(folder, version=2)
    with pytest.raises(DataError, match="version: expected 1, found 2"):
        ReplayBuffer.load(folder)
    metadata = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
    (folder / "zarr.json").write_text(json.dumps(metadata | {"attributes": {}}), encoding="utf-8")
    with pytest.raises(DataError, match="python -m policy.import_data converts other forms"):
        ReplayBuffer.load(folder)
    with pytest.raises(DataError, match="there is nothing of that name"):
        ReplayBuffer.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a zarr group"):
        ReplayBuffer.load(tmp_path / "empty")


def test_metadata_that_promise_billions_of_chunks_are_refused_at_once(folder: Path) -> None:
    metadata = json.loads((folder / "meta/episode_ends/zarr.json").read_text(encoding="utf-8"))
    metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"] = [10**15], [1]
    (folder / "meta/episode_ends/zarr.json").write_text(json.dumps(metadata), encoding="utf-8")
    with pytest.raises(DataError, match="meta/episode_ends"):
        ReplayBuffer.load(folder)


def test_arrays_shorter_than_the_episodes_are_refused(folder: Path) -> None:
    metadata = json.loads((folder / "data/state/zarr.json").read_text(encoding="utf-8"))
    metadata["shape"] = [5, 4]
    (folder / "data/state/zarr.json").write_text(json.dumps(metadata), encoding="utf-8")
    with pytest.raises(DataError, match=r"state: expected 9 steps, where the last episode ends, found 5"):
        ReplayBuffer.load(folder)
