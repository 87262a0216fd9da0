"""Distances and the kernel: accuracy against float64 differences, equal points, independence of groups, Table 11."""

import math
from typing import get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from driftfield.kernel import SQUARED_DISTANCE_FLOOR, NormalizeOver, affinity, centre, distances

from . import oracle

SMALLEST_DISTANCE = math.sqrt(SQUARED_DISTANCE_FLOOR)


def all_distances(points: torch.Tensor, num_x: int) -> torch.Tensor:
    centred = centre(points)
    return distances(centred.points[..., :num_x, :], centred.points, centred.unit)


def exact_distances(points: torch.Tensor, num_x: int) -> torch.Tensor:
    difference = points[..., :num_x, None, :].double() - points[..., None, :, :].double()
    return difference.square().sum(-1).sqrt().clamp(min=SMALLEST_DISTANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("dimension", [1, 2, 16, 300])
def test_distances_are_those_of_the_differences(dimension: int, offset: float, dtype: torch.dtype) -> None:
    points = (torch.randn(3, 20, dimension) + offset).to(dtype)
    # A distance d carries the rounding of |x|², eps |x|²/d; random points are closer than 1e-3 |x| in one dimension.
    tolerance = 2e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        all_distances(points, 8).double(), exact_distances(points, 8), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dimension", [1, 2, 3, 7, 64, 257, 4096])
def test_equal_points_are_at_the_smallest_distance_and_others_are_not(dimension: int) -> None:
    points = torch.randn(2, 12, dimension) * torch.logspace(-2, 2, dimension)
    points = torch.cat([points, points.flip(-2)], -2)  # every point twice
    found, exact = all_distances(points, 24), exact_distances(points, 24)
    equal = exact == SMALLEST_DISTANCE
    assert equal.sum() == 2 * 24 * 2
    torch.testing.assert_close(found[equal], torch.full_like(found[equal], SMALLEST_DISTANCE), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found[~equal].double(), exact[~equal], rtol=1e-3, atol=0.0)


def test_points_of_equal_norm_are_not_taken_for_equal() -> None:
    pairs = torch.tensor([[1.0, 0.01], [1.0, -0.01], [-1.0, 0.01], [-1.0, -0.01]])  # close, and the mean is 0
    torch.testing.assert_close(all_distances(pairs, 4).double(), exact_distances(pairs, 4), rtol=1e-3, atol=0.0)
    angle = torch.arange(64) * (2 * math.pi / 64)
    circle = torch.stack([angle.cos(), angle.sin()], -1)  # centred already, all norms 1 up to the last bit
    torch.testing.assert_close(all_distances(circle, 64).double(), exact_distances(circle, 64), rtol=1e-4, atol=1e-6)


@given(constant=st.floats(-(2.0**100), 2.0**100, width=32), count=st.integers(1, 200), dimension=st.integers(1, 5))
def test_equal_points_become_exactly_zero(constant: float, count: int, dimension: int) -> None:
    assert not centre(torch.full((count, dimension), constant)).points.any()


def test_a_group_does_not_depend_on_its_neighbours() -> None:
    near, huge = torch.randn(9, 3), 1e30 * torch.randn(9, 3)
    together = all_distances(torch.stack([near, huge]), 4)
    assert torch.equal(together[0], all_distances(near, 4))
    torch.testing.assert_close(together[1].double(), exact_distances(huge, 4), rtol=1e-3, atol=SMALLEST_DISTANCE)


@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.04])
@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("over", get_args(NormalizeOver))
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (4, 4), (4, 9)])
def test_affinity_is_the_oracles(shape: tuple[int, int], over: NormalizeOver, mask_self: bool, floor: float) -> None:
    distance = torch.rand(shape, dtype=torch.float64)
    masked = {(i, i) for i in range(shape[0])} if mask_self else set()
    if shape == (1, 1) and mask_self and over != "none":
        expected = np.ones(shape)  # the softmax over a single pair, masked or not
    else:
        expected = oracle.kernel(distance.numpy(), 0.3, over=over, masked=masked, copies=np.ones(shape[1]))
    found = affinity(distance, 0.3, normalize_over=over, mask_self=mask_self, floor=floor)
    np.testing.assert_allclose(found.numpy(), np.maximum(expected, math.sqrt(floor)), rtol=1e-12)


def test_affinity_normalisations_of_table_11() -> None:
    distance = torch.rand(2, 5, 7, dtype=torch.float64)
    over_y, over_xy, bare = (affinity(distance, 0.2, normalize_over=over) for over in ("y", "xy", "none"))
    torch.testing.assert_close(over_y.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(bare, (-distance / 0.2).exp())
    over_x = bare / bare.sum(-2, keepdim=True)
    torch.testing.assert_close(over_xy, (over_y * over_x).sqrt())


@pytest.mark.parametrize("over", ["y", "x", "xy"])
def test_a_normalised_kernel_survives_the_lowest_temperature(over: NormalizeOver) -> None:
    distance = torch.full((6, 9), 50.0)  # exp(-50 / 0.001) is 0
    value = {"y": 1 / 9, "x": 1 / 6, "xy": (1 / 9 / 6) ** 0.5}[over]
    torch.testing.assert_close(affinity(distance, 1e-3, normalize_over=over), torch.full((6, 9), value))
