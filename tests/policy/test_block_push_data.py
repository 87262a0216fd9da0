"""BlockPush's npy files."""

from pathlib import Path

import numpy as np
import pytest

from policy.block_push_data import load_block_push
from policy.data_error import DataError
from policy.demonstrations import load_demonstrations

LENGTHS = (5, 3, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    np.save(tmp_path / "multimodal_push_observations.npy", random.normal(size=(3, 6, 16)))
    np.save(tmp_path / "multimodal_push_actions.npy", random.normal(size=(3, 6, 2)))
    np.save(tmp_path / "multimodal_push_masks.npy", np.array([[t < n for t in range(6)] for n in LENGTHS], float))
    return tmp_path


def test_episodes_are_the_steps_of_the_mask(folder: Path) -> None:
    buffer = load_demonstrations(folder)
    observations = np.load(folder / "multimodal_push_observations.npy").astype(np.float32)
    actions = np.load(folder / "multimodal_push_actions.npy").astype(np.float32)
    assert buffer.episode_ends.tolist() == [5, 8, 14]
    assert (buffer.attributes["task"], buffer.attributes["action"]) == ("block_push", "delta")
    for episode, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(buffer.episode(episode)["state"], observations[episode, :length])
        np.testing.assert_array_equal(buffer.episode(episode)["action"], actions[episode, :length])


def test_an_absolute_action_is_the_target_of_the_state_and_the_change(folder: Path) -> None:
    delta, absolute = load_block_push(folder), load_block_push(folder, action="absolute")
    expected = delta.arrays["state"][:, 8:10] + delta.arrays["action"]
    np.testing.assert_array_equal(absolute.arrays["action"], expected)
    assert absolute.attributes["action"] == "absolute"


def test_files_that_do_not_agree_are_refused(folder: Path) -> None:
    mask = np.load(folder / "multimodal_push_masks.npy")
    for bad, message in (
        (mask[:2], r"observations.npy: expected shape \[2, 6, D\] as .*masks.npy has it, found \[3, 6, 16\]"),
        (mask[0], "masks.npy: expected shape"),
        (np.where(np.arange(6) == 2, 0, mask), "masks.npy: episode 0: expected ones and then zeros"),
        (mask * np.array([[1], [0], [1]]), "masks.npy: episode 1: expected ones"),
    ):
        np.save(folder / "multimodal_push_masks.npy", bad)
        with pytest.raises(DataError, match=message):
            load_block_push(folder)


def test_files_that_are_missing_damaged_or_pickled_are_refused(folder: Path) -> None:
    path = folder / "multimodal_push_actions.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(DataError, match="push_actions.npy: expected an npy file"):
        load_block_push(folder)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="push_actions.npy: expected an npy file"):
        load_block_push(folder)
    path.unlink()
    with pytest.raises(DataError, match="push_actions.npy: expected an npy file .*No such file"):
        load_block_push(folder)


def test_numbers_that_are_not_finite_are_refused(folder: Path) -> None:
    path = folder / "multimodal_push_actions.npy"
    actions = np.load(path)
    actions[1, 2, 0] = np.nan
    np.save(path, actions)
    with pytest.raises(DataError, match="action: .*nan in episode 1 at step 2"):
        load_block_push(folder)
