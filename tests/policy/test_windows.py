"""Windows against a loop over the protocol's words, and the episodes that are set aside."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy.windows import Windows, keep_episodes, validation_split


def brute_force(
    lengths: list[int], horizon: int, pad_before: int, pad_after: int, episodes: list[int]
) -> list[list[int]]:
    """For every start of every episode the rows, steps outside of it replaced by its first or last one."""
    windows = []
    for episode in episodes:
        first, length = sum(lengths[:episode]), lengths[episode]
        before, after = min(pad_before, horizon - 1), min(pad_after, horizon - 1)
        starts = list(range(-before, length - horizon + after + 1)) or [-before]
        windows += [[first + max(0, min(start + t, length - 1)) for t in range(horizon)] for start in starts]
    return windows


@given(data=st.data(), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_windows_are_those_of_the_protocol(data: st.DataObject, lengths: list[int]) -> None:
    horizon, before, after = (data.draw(st.integers(low, 20)) for low in (1, 0, 0))
    chosen = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    windows = Windows(np.cumsum(lengths), horizon=horizon, pad_before=before, pad_after=after, episodes=chosen)
    expected = brute_force(lengths, horizon, before, after, chosen)
    assert windows.indices(np.arange(len(windows))).tolist() == expected
    assert len(windows) == len(expected)


def test_the_protocol_of_the_published_results_is_the_default() -> None:
    windows = Windows([40])
    assert len(windows) == 1 + (40 - 16 + 7) + 1  # starts from -1 to 31
    rows = windows.indices([0, 1, len(windows) - 1])
    assert rows.dtype == np.int64 and rows.shape == (3, 16)
    assert rows[0].tolist() == [0, *range(15)] and rows[1].tolist() == list(range(16))
    assert rows[2].tolist() == [*range(31, 40), *[39] * 7]


def test_every_step_is_the_present_of_a_window() -> None:
    """With To = 2 the present is step 1 of a window, and every step of an episode is one: the last one too."""
    windows = Windows([20, 35], horizon=16, pad_before=1, pad_after=15)
    assert sorted(windows.indices(np.arange(len(windows)))[:, 1].tolist()) == [*range(20), 19, *range(20, 35), 34]


def test_an_episode_shorter_than_the_horizon_has_a_window() -> None:
    assert Windows([3]).indices([0]).tolist() == [[0, 0, 1, *[2] * 13]]
    assert len(Windows([3])) == 1 and len(Windows([8])) == 1 and len(Windows([9])) == 2


def test_order_and_kind_of_the_numbers_do_not_matter() -> None:
    windows = Windows(np.array([10, 30], np.int32), horizon=4)
    k = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    everything = windows.indices(np.arange(len(windows)))
    np.testing.assert_array_equal(windows.indices(k), everything[k.numpy()])
    assert windows.indices(np.empty(0, np.int64)).shape == (0, 4)


@pytest.mark.parametrize("k", [[-1], [25], [0.0], [[0]], 0])
def test_windows_that_there_are_not_are_refused(k: object) -> None:
    with pytest.raises(IndexError, match=r"k: expected integers \[B\] from 0 to 24, found"):
        Windows([32], horizon=16).indices(k)


@pytest.mark.parametrize(
    ("ends", "keywords", "message"),
    [
        ([5], {"horizon": 0}, "horizon >= 1"),
        ([5], {"pad_before": -1}, "pad_before >= 0"),
        ([5, 5], {}, "increasing"),
        ([], {}, "increasing"),
        ([0, 3], {}, "increasing"),
        ([5, 8], {"episodes": [1, 0]}, "episodes: expected increasing numbers from 0 to 1"),
        ([5, 8], {"episodes": [2]}, "episodes: expected increasing numbers from 0 to 1"),
        ([5, 8], {"episodes": []}, "episodes: expected increasing numbers from 0 to 1"),
    ],
)
def test_windows_of_nothing_are_refused(ends: list[int], keywords: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Windows(ends, **keywords)  # type: ignore[arg-type]


@given(episodes=st.integers(2, 500), share=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_a_split_is_a_partition(episodes: int, share: float, seed: int) -> None:
    train, validation = validation_split(episodes, share, seed)
    assert sorted([*train, *validation]) == list(range(episodes))
    assert len(validation) == max(1, min(round(share * episodes), episodes - 1)) and len(train) >= 1
    assert list(train) == sorted(train) and list(validation) == sorted(validation)


@pytest.mark.parametrize(("episodes", "count"), [(206, 4), (1000, 20), (200, 4), (566, 11), (25, 1), (2, 1), (1, 0)])
def test_two_percent_are_set_aside(episodes: int, count: int) -> None:
    train, validation = validation_split(episodes)
    assert (len(train), len(validation)) == (episodes - count, count)
    expected = np.random.default_rng(42).choice(episodes, count, replace=False)
    assert set(validation) == set(expected)


def test_push_t_keeps_ninety_episodes() -> None:
    train, _ = validation_split(206)
    kept = keep_episodes(train, 90)
    assert len(kept) == 90 and set(kept) <= set(train) and list(kept) == sorted(kept)
    assert set(kept) == set(train[np.random.default_rng(42).choice(202, 90, replace=False)])
    assert keep_episodes(train, 90, seed=1).tolist() != kept.tolist()
    assert keep_episodes(train, 202).tolist() == train.tolist()


def test_splits_of_nothing_are_refused() -> None:
    assert len(validation_split(10, share=0.0).validation) == 0
    for episodes, share in ((0, 0.02), (5, 1.0), (5, -0.1), (5, float("nan"))):
        with pytest.raises(ValueError, match="num_episodes >= 1"):
            validation_split(episodes, share)
    with pytest.raises(ValueError, match="count: expected at least 1"):
        keep_episodes([1, 2], 0)
