"""The field of the squared maximum mean discrepancy: autograd's gradient, the float64 loops, symmetries (C.2)."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from driftfield import drifting_field

from . import oracle

TIGHT = 1e-10
seeds = st.integers(0, 2**32 - 1)


def mmd(x: Tensor, positives: Tensor, negatives: Tensor, **options: Any) -> Tensor:
    return drifting_field(x, positives, negatives, **{"temperature": 0.7, "field": "mmd", **options})


def point_sets(seed: int, *counts: int, dimension: int = 3) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal((count, dimension))) for count in counts]


def squared_mmd(x: Tensor, positives: Tensor, temperature: float, *, unbiased: bool) -> Tensor:
    """MMD² without its part of positives alone; unbiased: pairs of different samples only."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-(a - b).norm() / temperature).exp()

    count, pairs = len(x), [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    within = sum(kernel(x[i], x[j]) for i, j in pairs) / (len(pairs) if unbiased else count**2)
    across = sum(kernel(a, b) for a in x for b in positives) / (count * len(positives))
    assert isinstance(within, Tensor) and isinstance(across, Tensor)
    return within - 2.0 * across


@given(seeds, st.integers(2, 5), st.integers(1, 5), st.sampled_from([0.2, 0.7, 5.0]), st.booleans())
def test_field_points_down_the_squared_discrepancy(
    seed: int, count: int, num_positives: int, temperature: float, unbiased: bool
) -> None:
    x, positives = point_sets(seed, count, num_positives)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(squared_mmd(x, positives, temperature, unbiased=unbiased), x)
    found = mmd(x, positives, x, temperature=temperature, mask_self=unbiased)
    torch.testing.assert_close(found, -(temperature**2) * count / 2 * gradient, rtol=1e-8, atol=1e-10)


def test_small_steps_along_the_field_shrink_the_discrepancy() -> None:
    x, positives = point_sets(0, 6, 6)
    x, seen = x + 1.0, []
    for _ in range(40):
        seen.append(float(squared_mmd(x, positives, 2.0, unbiased=False)))
        x = x + 0.1 * mmd(x, positives, x, temperature=2.0)
    assert all(later < earlier for earlier, later in zip(seen, seen[1:], strict=False))
    assert (x.mean(0) - positives.mean(0)).abs().max() < 0.3


@given(
    seeds,
    st.booleans(),
    st.sampled_from([0.1, 0.7, 5.0]),
    st.sampled_from([(1.0, 1.0), (1.5, 1.0), (1.0, 2.0), (1.0, 0.0)]),
    st.booleans(),
)
def test_field_is_the_oracles(
    seed: int, mask_self: bool, temperature: float, factors: tuple[float, float], duplicates: bool
) -> None:
    x, positives, others = point_sets(seed, 4, 5, 3)
    if duplicates:
        positives[1:3] = x[:1]
    negatives = torch.cat([x, others])
    weight = torch.linspace(0.0, 3.0, len(negatives), dtype=torch.float64)
    options: dict[str, Any] = {"mask_self": mask_self, "attraction": factors[0], "repulsion": factors[1]}
    found = mmd(x, positives, negatives, temperature=temperature, negative_weight=weight, **options)
    arrays = [points.numpy() for points in (x, positives, negatives)]
    expected = oracle.mmd_field(*arrays, temperature, weight=weight.numpy(), **options)
    np.testing.assert_allclose(found, expected, rtol=TIGHT, atol=TIGHT)


def test_float32_field_is_the_oracles_even_where_samples_coincide() -> None:
    x, positives, others = (points.float() for points in point_sets(1, 9, 12, 3, dimension=5))
    positives[0] = x[0]
    negatives = torch.cat([x, others])
    for mask_self in (False, True):
        found = mmd(x + 100.0, positives + 100.0, negatives + 100.0, mask_self=mask_self)
        arrays = [(points + 100.0).double().numpy() for points in (x, positives, negatives)]
        assert oracle.relative_error(found.numpy(), oracle.mmd_field(*arrays, 0.7, mask_self=mask_self)) < 5e-6


@given(seeds)
def test_field_is_antisymmetric_and_at_rest_between_equal_sets(seed: int) -> None:
    x, p, q = point_sets(seed, 4, 5, 3)
    torch.testing.assert_close(mmd(x, p, q), -mmd(x, q, p))
    assert mmd(x, p, p.flip(0)).abs().max() < 1e-12
    assert mmd(p, p, p).abs().max() < 1e-12


def test_field_of_equal_distributions_is_zero_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    x, positives = torch.empty(20_000, 8, 2), torch.empty(20_000, 11, 2)
    x.exponential_(generator=generator)
    positives.exponential_(generator=generator)
    x[:, 0] = 2.0
    drift = mmd(x, positives, x, mask_self=True)[:, 0]
    error = drift.std(0) / len(drift) ** 0.5
    assert (drift.mean(0).abs() < 4.0 * error).all()
    shifted = mmd(x, positives + 0.2, x, mask_self=True)[:, 0]
    assert (shifted.mean(0).abs() > 10.0 * error).all()


@given(seeds, st.floats(-100.0, 100.0), st.sampled_from([3.0, 1e4]))
def test_field_follows_translation_rotation_permutation_and_scale(seed: int, offset: float, factor: float) -> None:
    sets = point_sets(seed, 4, 5, 3)
    field = mmd(*sets)
    torch.testing.assert_close(mmd(*(points + offset for points in sets)), field, rtol=1e-8, atol=1e-8)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    turn = torch.from_numpy(rotation)
    torch.testing.assert_close(mmd(*(points @ turn for points in sets)), field @ turn, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(mmd(*(points.flip(0) for points in sets)), field.flip(0), rtol=1e-9, atol=1e-9)
    scaled = mmd(*(factor * points for points in sets), temperature=0.7 * factor)
    torch.testing.assert_close(scaled / factor, field, rtol=1e-8, atol=1e-8)


@given(seeds)
def test_weights_are_masses(seed: int) -> None:
    """A negative of weight 2 is two negatives, and one of weight 0 is none."""
    x, p, q = point_sets(seed, 4, 5, 3)
    weight = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    found = mmd(x, p, q, negative_weight=weight)
    torch.testing.assert_close(found, mmd(x, p, q[[0, 1, 1]]))
    torch.testing.assert_close(mmd(x, p, q, negative_weight=3.0 * weight), found)
    without = mmd(x, p, q, negative_weight=torch.zeros_like(weight))
    torch.testing.assert_close(without, mmd(x, p, q, repulsion=0.0))


def test_far_samples_hardly_feel_the_field() -> None:
    """The kernel is not normalised: what sets the drifting field apart from it (C.2)."""
    x, p, q = torch.tensor([[0.0], [20.0]]), torch.tensor([[1.0]]), torch.tensor([[0.5]])
    near, far = mmd(x, p, q, temperature=1.0).abs().flatten().tolist()
    assert far < 1e-6 * near
    near, far = drifting_field(x, p, q, temperature=1.0, normalize_over="y").abs().flatten().tolist()
    assert far > 0.1 * near


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_over": "y"}, "field='mmd' has no affinity to normalise: normalize_over must be left at 'xy'"),
        ({"affinity_floor": 1e-6}, "field='mmd' has no affinity to bound: affinity_floor must be 0, got 1e-06"),
        ({"sinkhorn_iterations": 3}, "sinkhorn_iterations needs field='sinkhorn', got 'mmd'"),
        ({"second_batch": "halves"}, "second_batch='halves' needs field='sinkhorn', got 'mmd'"),
    ],
)
def test_options_of_other_fields_are_refused(options: dict[str, Any], message: str) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=message):
        mmd(x, x, x, **options)
