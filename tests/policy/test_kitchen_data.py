"""The kitchen's logs and npy files."""

import struct
from pathlib import Path

import numpy as np
import pytest

from policy.data_error import DataError
from policy.demonstrations import load_demonstrations
from policy.kitchen_data import load_kitchen, read_log

NQ, NV, NU, NMOCAP, NSENSOR, NUSER = 30, 29, 9, 1, 2, 3
RECORD = 1 + NQ + NV + NU + 7 * NMOCAP + NSENSOR + NUSER
NOISE = [0.1] * 9 + [0.005] * 2 + [0.0005] * 6 + [0.005] * 3 + [0.1] * 3 + [0.005] * 3 + [0.1] * 3 + [0.005]


def records(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, RECORD)).astype("<f4")


def write_log(path: Path, values: np.ndarray, name: bytes = b"kitchen\0") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<7i", NQ, NV, NU, NMOCAP, NSENSOR, NUSER, len(name))
    path.write_bytes(header + name + values.tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_log(tmp_path / "b_task/0.mjl", records(41, seed=2), name=b"odd")  # records need not be aligned
    write_log(tmp_path / "a_task/1.mjl", records(120, seed=1))
    return tmp_path


def test_a_log_is_its_positions_and_commands_at_every_fortieth_record(folder: Path) -> None:
    log, values = read_log(folder / "a_task/1.mjl"), records(120, seed=1)[::40]
    assert len(values) == 3
    np.testing.assert_array_equal(log.qpos, values[:, 1:31])
    np.testing.assert_array_equal(log.ctrl, values[:, 60:69])
    assert len(read_log(folder / "b_task/0.mjl").qpos) == 2  # records 0 and 40


def test_logs_are_read_in_the_order_of_their_names(folder: Path) -> None:
    buffer = load_kitchen(folder, noise=False)
    assert buffer.attributes["episodes"] == [{"log": "a_task/1.mjl"}, {"log": "b_task/0.mjl"}]
    assert (buffer.attributes["task"], buffer.attributes["action"]) == ("kitchen", "absolute")
    for episode, (seed, count) in enumerate(((1, 120), (2, 41))):
        values, found = records(count, seed)[::40], buffer.episode(episode)
        np.testing.assert_array_equal(found["state"][:, :30], values[:, 1:31])
        np.testing.assert_array_equal(found["state"][:, 30:], 0)
        np.testing.assert_array_equal(found["action"], values[:, 60:69])


def test_states_get_the_noise_of_the_readings_once(folder: Path) -> None:
    plain, noisy = load_kitchen(folder, noise=False), load_demonstrations(folder)
    random = np.random.default_rng(42)
    noise = np.concatenate([0.1 * np.array(NOISE) * random.uniform(-1, 1, (length, 30)) for length in (3, 2)])
    np.testing.assert_allclose(noisy.arrays["state"][:, :30], plain.arrays["state"][:, :30] + noise, atol=1e-6)
    np.testing.assert_array_equal(noisy.arrays["state"][:, 30:], 0)
    np.testing.assert_array_equal(noisy.arrays["action"], plain.arrays["action"])
    assert load_demonstrations(folder).fingerprint == noisy.fingerprint


def test_logs_that_are_damaged_are_refused_or_counted(folder: Path) -> None:
    cut = folder / "c_task/0.mjl"
    write_log(cut, records(80))
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"c_task/0.mjl: expected records of 81 float32 from byte 36 on"):
        load_kitchen(folder)
    (folder / "d_task").mkdir()
    (folder / "d_task/0.mjl").write_bytes(b"\0" * 12)
    with pytest.warns(UserWarning, match=r"2 of 4 logs left out; the first: .*c_task/0.mjl"):
        assert len(load_kitchen(folder, skip_damaged=True)) == 2


@pytest.mark.parametrize("header", [(-1, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, -28), (2**30, 0, 0, 0, 0, 0, 0)])
def test_headers_that_are_none_are_refused(tmp_path: Path, header: tuple[int, ...]) -> None:
    (tmp_path / "bad.mjl").write_bytes(struct.pack("<7i", *header) + b"\0" * 100)
    with pytest.raises(DataError, match="bad.mjl: expected records"):
        read_log(tmp_path / "bad.mjl")


def test_logs_of_another_robot_or_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    values = records(41)
    values[40, 5] = np.nan
    write_log(folder / "c_task/0.mjl", values)
    with pytest.raises(DataError, match="c_task/0.mjl: expected finite numbers"):
        load_kitchen(folder)
    (folder / "c_task/0.mjl").write_bytes(struct.pack("<7i", 2, 2, 2, 0, 0, 0, 0) + b"\0" * 28 * 3)
    with pytest.raises(DataError, match="expected at least 30 positions and 9 commands, found 2 and 2"):
        load_kitchen(folder)
    with pytest.raises(DataError, match="none.mjl: expected a log, found: No such file"):
        read_log(folder / "none.mjl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected existence_mask.npy or logs"):
        load_kitchen(tmp_path / "empty")


def test_npy_files_are_read_without_more_noise(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    observations, actions = random.normal(size=(2, 4, 60)), random.normal(size=(2, 4, 9))
    np.save(tmp_path / "observations_seq.npy", observations)
    np.save(tmp_path / "actions_seq.npy", actions)
    np.save(tmp_path / "existence_mask.npy", np.array([[1, 1, 0, 0], [1, 1, 1, 1]]))
    buffer = load_demonstrations(tmp_path)
    assert buffer.episode_ends.tolist() == [2, 6] and buffer.attributes["action"] == "velocity"
    np.testing.assert_array_equal(buffer.episode(1)["state"], observations[1].astype(np.float32))
    np.testing.assert_array_equal(buffer.episode(0)["action"], actions[0, :2].astype(np.float32))
