"""Rows A3, A5-A8, A13, A14, E5, G5: a checkpoint is there whole or not at all, and a damaged one is never believed."""

import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killing import numbered_tensors, run_to_end, save_with_fault
from safetensors.torch import save_file
from torch import Tensor

from driftfield.training import Checkpoint, CheckpointError, Loaded, checkpoint, checkpoint_steps, read_checkpoint
from driftfield.training.faults import VARIABLE

FILES = ["MANIFEST.json", "ema.safetensors", "model.safetensors", "rank-00000.safetensors", "state.json"]


def save(directory: Path, *steps: int, keep_last: int = 2) -> Checkpoint:
    checkpoints = Checkpoint(directory, keep_last)
    for step in steps:
        checkpoints.save(step, numbered_tensors(step), {"step": step})
    return checkpoints


def assert_is_step(loaded: Loaded | None, step: int) -> None:
    assert loaded is not None and loaded.step == step and loaded.state == {"step": step}
    assert_same_bits(loaded.tensors, numbered_tensors(step))


def assert_same_bits(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for group, named in expected.items():
        assert found[group].keys() == named.keys()
        for name, tensor in named.items():
            assert found[group][name].dtype == tensor.dtype
            assert torch.equal(found[group][name], tensor)


def write_manifest(folder: Path, step: int, **changes: Any) -> None:
    """The manifest as the module's description gives it, independently of the code."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "MANIFEST.json"
    }
    manifest = {"format": 1, "step": step, "files": files | changes.pop("files", {})} | changes
    (folder / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "model": {
            "float64": torch.randn(3, 4, dtype=torch.float64),
            "bfloat16": torch.randn(5, dtype=torch.bfloat16),
            "transposed": torch.randn(4, 6).T,
            "part": torch.arange(10)[2:7],
            "scalar": torch.tensor(7),
            "empty": torch.zeros(0, 3),
            "not finite": torch.tensor([float("nan"), float("inf"), -0.0]).view(torch.int32),
            "bytes": torch.randint(0, 256, (9,), dtype=torch.uint8),
            "gradient": torch.nn.Parameter(torch.randn(2)),
        },
        "optim": {},
    }
    state = {"samples_seen": 2**60, "lr": 0.1, "names": ["a", None, True], "text": "Füße, ✓"}
    Checkpoint(tmp_path).save(0, tensors, state)
    loaded = read_checkpoint(tmp_path)
    assert loaded is not None and loaded.state == state
    assert_same_bits(loaded.tensors, tensors)


def test_the_format_is_what_the_module_says(tmp_path: Path) -> None:
    """A checkpoint of format 1 made by hand: what later versions must go on reading."""
    folder = tmp_path / "step-12"
    folder.mkdir()
    save_file({"weight": torch.arange(4.0)}, folder / "model.safetensors")
    (folder / "state.json").write_text('{"samples_seen": 768}', encoding="utf-8")
    write_manifest(folder, 12)
    loaded = read_checkpoint(tmp_path)
    assert loaded is not None and (loaded.step, loaded.state) == (12, {"samples_seen": 768})
    assert loaded.tensors["model"]["weight"].tolist() == [0, 1, 2, 3]


def test_changing_loaded_tensors_does_not_change_the_file(tmp_path: Path) -> None:
    save(tmp_path, 1)
    loaded = read_checkpoint(tmp_path)
    assert loaded is not None
    loaded.tensors["model"]["weight"].add_(1)
    assert_is_step(read_checkpoint(tmp_path), 1)


def test_files_are_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "step-1").iterdir()}
    assert modes == dict.fromkeys(FILES, 0o640)


def test_the_newest_is_by_number_not_by_time_or_spelling(tmp_path: Path) -> None:
    save(tmp_path, 9, 10)
    os.utime(tmp_path / "step-10", (0, 0))
    assert checkpoint_steps(tmp_path) == [9, 10]
    assert_is_step(read_checkpoint(tmp_path), 10)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "absent") is None
    assert Checkpoint(tmp_path).load() is None


def test_an_explicit_step_that_is_missing(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .* steps \[1, 2\]"):
        read_checkpoint(tmp_path, 7)


@pytest.mark.parametrize(
    ("step", "group", "state", "message"),
    [
        (-1, "model", {}, "step: expected 0 or more, found -1"),
        (1, "../model", {}, "found '../model'"),
        (1, "a/b", {}, "found 'a/b'"),
        (1, "", {}, "found ''"),
        (1, "model", {"loss": float("nan")}, "not JSON compliant"),
    ],
)
def test_what_can_not_be_saved(tmp_path: Path, step: int, group: str, state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path).save(step, {group: {}}, state)
    assert list(tmp_path.iterdir()) == []


# A3: killed at every stage of a save


def points_of_a_save(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    points: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "fault_point", points.append)
        save(directory, 1, 2, 3, 3)
    return list(dict.fromkeys(points))


def test_killed_at_any_stage_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = points_of_a_save(tmp_path / "listing", monkeypatch)
    assert {f"checkpoint.after_file.{Path(name).stem}" for name in FILES} <= set(points)
    for point in points:
        directory = tmp_path / point
        save(directory, 1, 2)
        old = 2 if point != "checkpoint.after_set_aside" else 3
        if old == 3:
            save(directory, 3)  # only a step saved again is set aside
        assert run_to_end(save_with_fault, directory, 3, f"{point}:exit") == 9, point
        published = point in ("checkpoint.after_rename", "checkpoint.before_delete")
        assert_is_step(Checkpoint(directory).load(), 3 if published else old)
        assert all(path.name.startswith("step-") for path in directory.iterdir()), point
        assert_is_step(save(directory, 4).load(), 4)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1)
    checkpoints.save(1, {"model": {"weight": torch.ones(1)}}, {"again": True})
    loaded = checkpoints.load()
    assert loaded is not None and loaded.state == {"again": True}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_reading_leaves_another_process_s_unfinished_save_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-2-x").mkdir()
    assert_is_step(read_checkpoint(tmp_path), 1)
    assert (tmp_path / ".tmp-step-2-x").exists()


# A5: no space


def assert_refused_for_space(directory: Path, message: str) -> None:
    assert "No space left" in message and str(directory / "step-2") in message
    assert "need" in message and "free" in message
    assert [path.name for path in directory.iterdir()] == ["step-1"]
    assert_is_step(read_checkpoint(directory), 1)


@pytest.mark.parametrize("point", ["after_file.model", "after_file.MANIFEST", "before_rename"])
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    checkpoints = save(tmp_path, 1)
    monkeypatch.setenv(VARIABLE, f"checkpoint.{point}:enospc")
    with pytest.raises(CheckpointError) as refused:
        checkpoints.save(2, numbered_tensors(2), {"step": 2})
    assert_refused_for_space(tmp_path, str(refused.value))
    monkeypatch.delenv(VARIABLE)
    checkpoints.save(2, numbered_tensors(2), {"step": 2})
    assert_is_step(checkpoints.load(), 2)


def test_a_file_limit_of_the_system(tmp_path: Path) -> None:
    """The kernel refuses in the middle of safetensors' own writing, which reports it as text."""
    directory = tmp_path / "checkpoints"
    save(directory, 1)
    assert run_to_end(save_with_fault, directory, 2, "", file_limit=400) == 0
    assert_refused_for_space(directory, (tmp_path / "refusal.txt").read_text(encoding="utf-8"))


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: NamedTuple("Usage", [("free", int)])(free=100))
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: pytest.fail("began to write"))
    with pytest.raises(CheckpointError) as refused:
        checkpoints.save(2, numbered_tensors(2), {"step": 2})
    assert_refused_for_space(tmp_path, str(refused.value))


def test_an_error_amid_a_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save(tmp_path, 1)
    monkeypatch.setenv(VARIABLE, "checkpoint.after_file.ema:raise")
    with pytest.raises(RuntimeError, match="after_file.ema"):
        checkpoints.save(2, numbered_tensors(2), {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


# A6: damaged files


def flip_a_bit(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


@pytest.mark.parametrize(("damage", "times"), [(cut, 60), (flip_a_bit, 200)])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, name: str, damage: Callable[[bytes, random.Random], bytes], times: int
) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-1" / name
    whole = path.read_bytes()
    draw = random.Random(name)
    for _ in range(times):
        path.write_bytes(damage(whole, draw))
        with pytest.raises(CheckpointError, match="step-1/" + ("" if name == "MANIFEST.json" else name)):
            read_checkpoint(tmp_path, 1)
    path.write_bytes(whole)
    assert_is_step(read_checkpoint(tmp_path, 1), 1)


def test_the_refusal_gives_the_hash_expected_and_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-1" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    expected, found = (hashlib.sha256(data).hexdigest() for data in (whole, path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"model.safetensors: expected SHA-256 {expected}, found {found}"):
        read_checkpoint(tmp_path, 1)


def test_swapped_and_missing_files_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "step-1"
    (folder / "model.safetensors").rename(folder / "aside")
    with pytest.raises(CheckpointError, match="model.safetensors: expected a file, found none"):
        read_checkpoint(tmp_path, 1)
    (folder / "ema.safetensors").rename(folder / "model.safetensors")
    (folder / "aside").rename(folder / "ema.safetensors")
    with pytest.raises(CheckpointError, match="ema.safetensors: expected"):
        read_checkpoint(tmp_path, 1)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-1").rename(tmp_path / "step-5")
    with pytest.raises(CheckpointError, match="expected step 5, found 1"):
        read_checkpoint(tmp_path, 5)


def test_the_newest_valid_one_is_taken_and_the_rejected_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = save(tmp_path, 1, 2, 3, keep_last=3)
    (tmp_path / "step-3" / "MANIFEST.json").unlink()
    (tmp_path / "step-2" / "state.json").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert_is_step(checkpoints.load(), 1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "step-3/MANIFEST.json" in caplog.text and "step-2/state.json" in caplog.text
    with pytest.raises(CheckpointError, match="step-3"):
        checkpoints.load(3)  # an explicit step never falls back


def test_only_damaged_ones_do_not_mean_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1)
    (tmp_path / "step-1" / "state.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the checkpoints .* is valid"):
        checkpoints.load()


# A7, A8, E5: hostile files


class Marker:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", [*FILES, "data.pkl", ".metadata"])
def test_a_pickle_in_any_place_is_not_executed(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "executed"
    folder = tmp_path / "checkpoints" / "step-1"
    save(folder.parent, 1)
    (folder / name).write_bytes(pickle.dumps(Marker(marker)))
    if name in FILES:
        if name != "MANIFEST.json":
            write_manifest(folder, 1)  # a forger makes the hashes right
        with pytest.raises(CheckpointError, match="step-1"):
            read_checkpoint(folder.parent, 1)
    else:
        assert_is_step(read_checkpoint(folder.parent, 1), 1)
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists(), "the pickle would have done nothing anyway"


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "a/b.json", "..", "", "model.pkl", ".hidden.json"])
def test_a_manifest_can_not_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "secret.json").write_text("{}", encoding="utf-8")
    write_manifest(tmp_path / "step-1", 1, files={name: {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}})
    with pytest.raises(CheckpointError, match="expected plain names"):
        read_checkpoint(tmp_path, 1)


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-1" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: expected a file, found a symbolic link"):
        read_checkpoint(tmp_path, 1)


def test_a_link_in_place_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere", 1)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "step-1").symlink_to(tmp_path / "elsewhere" / "step-1")
    with pytest.raises(CheckpointError, match="expected a folder, found a link"):
        read_checkpoint(tmp_path / "here", 1)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 99 * 2**20) + b"{",
        struct.pack("<Q", 66) + b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}',
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}     ' + bytes(4),
        b"",
    ],
    ids=["header of an exabyte", "header beyond the end", "data beyond the end", "data before the start", "nothing"],
)
def test_a_forged_tensor_file_ends_in_a_clean_error(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-1" / "model.safetensors").write_bytes(content)
    write_manifest(tmp_path / "step-1", 1)  # a forger makes the hashes right
    with pytest.raises(CheckpointError, match="step-1"):
        read_checkpoint(tmp_path, 1)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json"])
@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"null", b'{"step": 1, "step": 1}', b'{"a": NaN}', b"\xff\xfe", b"{"],
)
def test_forged_json_ends_in_a_clean_error(tmp_path: Path, name: str, content: bytes) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-1" / name).write_bytes(content)
    if name == "state.json":
        write_manifest(tmp_path / "step-1", 1)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path, 1)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "model.safetensors"])
@given(content=st.binary(max_size=300) | st.binary(max_size=60).map(lambda tail: struct.pack("<Q", 40) + b"{" + tail))
def test_random_bytes_end_in_a_clean_error_or_in_data(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "step-1"
        save(folder.parent, 1)
        (folder / name).write_bytes(content)
        if name != "MANIFEST.json":
            write_manifest(folder, 1)
        try:
            read_checkpoint(folder.parent, 1)
        except CheckpointError as error:
            assert "step-1" in str(error)


def test_a_huge_json_is_refused_unread(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.truncate(tmp_path / "step-1" / "MANIFEST.json", 2**40)  # sparse: takes no space
    with pytest.raises(CheckpointError, match="MANIFEST.json: expected at most"):
        read_checkpoint(tmp_path, 1)


@pytest.mark.parametrize("changes", [{"format": 2}, {"format": None}, {"files": None}, {"step": "1"}])
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "step-1" / "MANIFEST.json"
    content = json.loads(manifest.read_text(encoding="utf-8")) | changes
    manifest.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"MANIFEST.json: expected .*{next(iter(changes))}"):
        read_checkpoint(tmp_path, 1)


# A13: which ones are kept


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_the_last_ones_are_kept(tmp_path: Path, keep_last: int) -> None:
    steps = [3, 1000, 20, 100]
    checkpoints = save(tmp_path, *sorted(steps), keep_last=keep_last)
    assert checkpoints.steps() == sorted(steps)[-keep_last:]


def test_the_one_just_written_stays_beside_a_later_damaged_one(tmp_path: Path) -> None:
    """After a fall back, the later damaged checkpoint must not push out the only valid one."""
    save(tmp_path, 1, 9)
    (tmp_path / "step-9" / "state.json").write_bytes(b"")
    checkpoints = Checkpoint(tmp_path, keep_last=1)
    assert_is_step(checkpoints.load(), 1)
    checkpoints.save(2, numbered_tensors(2), {"step": 2})
    assert_is_step(checkpoints.load(), 2)
    checkpoints.save(9, numbered_tensors(9), {"step": 9})
    assert checkpoints.steps() == [9]
    assert_is_step(checkpoints.load(), 9)


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_a_deletion_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    def refuse(path: object, *_: object, **options: object) -> None:
        if not options.get("ignore_errors") and ("delete" in str(path) or str(path).endswith("step-1")):
            raise PermissionError(13, "Permission denied")
        real(path, *_, **options)

    checkpoints = save(tmp_path, 1, keep_last=1)
    owner = os if call == "rename" else shutil
    real = getattr(owner, call)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(owner, call, refuse)
        checkpoints.save(2, numbered_tensors(2), {"step": 2})
    assert "can't delete" in caplog.text and "Permission denied" in caplog.text
    assert_is_step(checkpoints.load(), 2)


def test_keep_last_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_last: expected 1 or more, found 0"):
        Checkpoint(tmp_path, keep_last=0)
