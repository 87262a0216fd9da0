"""`python -m policy.import_data`, and how formats are told apart."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from driftfield.training import run_program
from policy.data_error import DataError
from policy.demonstrations import detect_format, load_demonstrations
from policy.import_data import CONFIG_DIR, ImportConfig, main
from policy.replay_buffer import ReplayBuffer
from tests.policy.zarr_v2 import write_store

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> int:
    return run_program(
        main, ImportConfig, config_dir=CONFIG_DIR, config_name="import_data", description="", arguments=arguments
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    data = {"action": random.uniform(-0.1, 0.1, (7, 2)).astype("<f4"), "obs": random.normal(size=(7, 16)).astype("<f4")}
    return write_store(tmp_path / "push.zarr", data, [3, 7])


def test_the_command_converts_demonstrations(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours.zarr"
    command = [sys.executable, "-m", "policy.import_data", f"source={source}", f"out={out}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stderr
    buffer = ReplayBuffer.load(out)
    assert buffer.fingerprint == load_demonstrations(source).fingerprint
    assert buffer.attributes["task"] == "block_push"
    assert "2 episodes, 7 steps" in ended.stdout and buffer.fingerprint in ended.stdout


def test_what_was_converted_is_read_as_ours(source: Path, tmp_path: Path) -> None:
    assert run(f"source={source}", f"out={tmp_path / 'ours.zarr'}") == 0
    assert detect_format(tmp_path / "ours.zarr") == "driftfield" and detect_format(source) == "diffusion_policy"
    ours = load_demonstrations(tmp_path / "ours.zarr", keys=["state"])
    assert ours.fingerprint == load_demonstrations(source, format="diffusion_policy").fingerprint


def test_mistakes_are_told_in_one_sentence(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((f"source={source}", f"out={source}"), "out: expected the name of a folder to be made"),
        ((f"source={tmp_path / 'none'}", f"out={tmp_path / 'a'}"), "there is nothing of that name"),
        ((f"source={tmp_path}", f"out={tmp_path / 'a'}"), "found none of them"),
        ((f"source={source}", f"out={tmp_path / 'a'}", "noise=true"), "diffusion_policy has no option 'noise'"),
        ((f"source={source}", f"out={tmp_path / 'a'}", "observation=image"), "observation: expected 'state'"),
        ((f"source={source}", f"out={tmp_path / 'a'}", "format=zarr"), "format: expected one of"),
        ((f"source={source}", f"out={source / '.zgroup' / 'a'}"), "out: expected a folder that can be written"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
        assert not (tmp_path / "a").exists()


def test_a_format_that_is_none_and_a_library_that_is_missing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DataError, match="format: expected one of .*robomimic.*found 'robomimik'.*did you mean 'robomimic'"
    ):
        load_demonstrations(source, format="robomimik")  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "policy.robomimic_data", raising=False)
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "demo.hdf5").write_bytes(b"")
    with pytest.raises(DataError, match=r"format robomimic need h5py, .*: pip install -e '.\[policy\]'"):
        load_demonstrations(tmp_path / "demo.hdf5")
