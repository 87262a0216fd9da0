"""Rows G3, G4, A10, E7: one run and one process per folder, and nothing in it that should not be there."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from killing import hold, kill_when, open_without_permission, run_to_end, start, wait_until

from driftfield.training import RunFolder, RunFolderError, read_config
from driftfield.training.atomic_file import write_json

CONFIG: dict[str, Any] = {"seed": 0, "steps": 100, "generator": {"depth": 3, "sizes": [1, 2]}, "data_dir": None}


def refusal(folder: Path, config: dict[str, Any] = CONFIG, **options: Any) -> str:
    with pytest.raises(RunFolderError) as refused:
        RunFolder(folder, config, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_new_folder_then_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with RunFolder(folder, CONFIG) as run:
        assert not run.resumed and run.path == folder
        assert read_config(folder / "config.yaml") == CONFIG
    with RunFolder(folder, CONFIG) as run:
        assert run.resumed
    starts = json.loads((folder / "run.json").read_text(encoding="utf-8"))["starts"]
    assert len(starts) == 2
    assert starts[0]["time"].endswith("+00:00") and starts[0]["versions"]["torch"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if commit.returncode == 0:
        assert starts[0]["git_commit"].removesuffix("-dirty") == commit.stdout.strip()


def test_another_run_s_folder_is_refused_with_every_differing_key(tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG).close()
    before = (tmp_path / "config.yaml").read_bytes()
    other = {"seed": 1, "steps": 100, "generator": {"depth": 4, "sizes": [1, 3]}, "new": "x"}
    said = refusal(tmp_path, other)
    for words in (
        "seed (was 0, now 1)",
        "generator.depth (was 3, now 4)",
        "generator.sizes (was [1, 2], now [1, 3])",
        "data_dir (was None, now absent)",
        "new (was absent, now x)",
        "choose run_dir=OTHER or delete it",
    ):
        assert words in said
    assert "steps" not in said
    assert (tmp_path / "config.yaml").read_bytes() == before
    RunFolder(tmp_path, CONFIG).close()  # the refusal holds no lock


def test_keys_that_may_change(tmp_path: Path) -> None:
    RunFolder(tmp_path, CONFIG).close()
    with RunFolder(tmp_path, CONFIG | {"steps": 200}, may_change=("steps",)) as run:
        assert run.resumed
    assert read_config(tmp_path / "config.yaml")["steps"] == 200
    assert "seed (was 0, now 1)" in refusal(tmp_path, CONFIG | {"steps": 200, "seed": 1}, may_change=("steps",))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    said = refusal(tmp_path)
    assert "thesis.tex" in said and "run_dir=OTHER" in said
    assert not (tmp_path / "config.yaml").exists()
    assert (tmp_path / "thesis.tex").exists()


def test_a_configuration_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [", encoding="utf-8")
    assert "config.yaml: expected YAML" in refusal(tmp_path)


def test_a_damaged_run_json_is_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunFolder(tmp_path, CONFIG).close()
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    RunFolder(tmp_path, CONFIG).close()
    assert "run.json can't be read" in caplog.text
    assert len(json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["starts"]) == 1


# G3: folders that can't be used


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(tmp_path / "file" / "run")
    assert "a file of that name exists" in refusal(tmp_path / "file")
    assert "Not a directory" in refusal(Path("/dev/null/run"))


def test_a_disk_without_space_is_seen_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refusal(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_without_permission(tmp_path: Path) -> None:
    """Root may write anywhere, so it becomes nobody first."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o555)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    assert run_to_end(open_without_permission, folder) == 0
    assert "Permission denied" in (tmp_path / "refusal.txt").read_text(encoding="utf-8")
    assert list(folder.iterdir()) == []


# G4: two processes


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(hold, folder)
    wait_until(process, (tmp_path / "held").exists)
    said = refusal(folder, {})
    assert f"in use by process {process.pid} on {os.uname().nodename}, started 20" in said
    assert kill_when(process, lambda: True) == -signal.SIGKILL
    with RunFolder(folder, {}) as run:  # what the killed one leaves is no lock
        assert run.resumed
        assert f"process {os.getpid()}" in refusal(folder, {})
    RunFolder(folder, {}).close()


def test_a_worker_that_outlives_a_killed_run_holds_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(hold, folder, fork=True)
    assert kill_when(process, (tmp_path / "held").exists) == -signal.SIGKILL
    child = int((tmp_path / "child.txt").read_text(encoding="utf-8"))
    try:
        os.kill(child, 0)  # it lives
        RunFolder(folder, {}).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_refused_second_start_leaves_the_first_one_s_files_alone(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG):
        being_written = tmp_path / ".tmp-results.json-x"
        being_written.touch()
        refusal(tmp_path)
        assert being_written.exists()


def test_a_kill_at_any_point_of_opening_leaves_a_folder_that_opens(tmp_path: Path) -> None:
    """The folder's states after each system call that changes it, in order."""
    whole = tmp_path / "whole"
    RunFolder(whole, CONFIG).close()
    for present in ([], ["run.lock"], ["run.lock", "config.yaml"], ["run.lock", "config.yaml", "run.json"]):
        folder = tmp_path / f"after {len(present)}"
        folder.mkdir()
        (folder / ".tmp-config.yaml-killed").write_text("seed", encoding="utf-8")
        for name in present:
            shutil.copy(whole / name, folder)
        with RunFolder(folder, CONFIG) as run:
            assert run.resumed == ("config.yaml" in present)
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "run.json", "run.lock"]


# E7: secrets


def test_no_secret_and_no_home_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIFTFIELD_CANARY", "canary-environment")
    monkeypatch.setenv("HOME", "/home/canary-user")
    words = [
        "hf_token=canary-1",
        "--api-key=canary-2",
        "wandb.password=canary-3=x\ny",
        "data=/home/canary-user/data",
    ]
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "vision.train", *words, "tokenizer=sd-vae"])
    RunFolder(tmp_path, CONFIG).close()
    for path in tmp_path.iterdir():
        assert "canary" not in path.read_text(encoding="utf-8"), path
    command = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["starts"][0]["command"]
    secrets = ["hf_token=***", "--api-key=***", "wandb.password=***"]
    assert command == ["python3", "-m", "vision.train", *secrets, "data=~/data", "tokenizer=sd-vae"]


# Small files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"loss": 1})
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            write_json(path, {"loss": 2})
        assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 1}
        assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 1}
