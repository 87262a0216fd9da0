"""Nearest windows: a window itself, then the others by distance, however many are equal."""

import pytest
import torch

from policy.neighbours import nearest_windows


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_a_window_comes_first_then_the_others_by_distance(count: int) -> None:
    observations = torch.randn(60, 3, dtype=torch.float64)
    found = nearest_windows(observations, count)
    assert found.shape == (60, count) and found.dtype == torch.int64
    assert torch.equal(found, torch.cdist(observations, observations).argsort(1)[:, :count])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_among_equal_observations_a_window_is_still_its_own_first(count: int) -> None:
    observations = torch.tensor([[0.0], [5.0], [0.0], [0.0], [5.1], [0.0], [0.0], [0.0]])  # six that are equal
    found = nearest_windows(observations, count)
    assert found[:, 0].tolist() == list(range(8))
    assert all(len(set(row)) == count for row in found.tolist())
    distance = (observations[found] - observations[:, None]).abs().squeeze(-1)  # [8, count]
    everything = (observations - observations.T).abs().sort(1).values
    torch.testing.assert_close(distance, everything[:, :count])


@pytest.mark.parametrize("count", [0, 4])
def test_more_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^count: expected 1 to 3, the number of observations, found {count}$"):
        nearest_windows(torch.zeros(3, 2), count)
