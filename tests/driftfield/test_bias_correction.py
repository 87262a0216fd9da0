"""The bias correction of centroids: the formula, and that it takes away the bias of first order (arXiv 2604.27239)."""

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from driftfield import DriftingLoss, drifting_field
from driftfield.forces import correct_bias

from . import oracle

TIGHT = 1e-10
seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, 7), st.floats(1e-3, 1e3))
def test_weights_keep_their_sum_and_sign(seed: int, count: int, total: float) -> None:
    rng = np.random.default_rng(seed)
    weight = total * rng.random((3, count)) ** 4 * (rng.random((3, count)) < 0.8)
    found = correct_bias(torch.from_numpy(weight))
    expected = torch.tensor([oracle.corrected(list(row)) for row in weight])
    torch.testing.assert_close(found, expected, rtol=TIGHT, atol=0.0)
    torch.testing.assert_close(found.sum(-1), torch.from_numpy(weight.sum(-1)), rtol=TIGHT, atol=0.0)
    assert (found >= 0).all()


def test_equal_weights_are_unbiased_as_they_are() -> None:
    weight = torch.full((5,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(correct_bias(weight), weight)
    torch.testing.assert_close(correct_bias(weight[:1]), weight[:1])
    assert not correct_bias(torch.zeros(2, 4)).any()


@given(
    seeds,
    st.sampled_from(["xy", "y"]),
    st.booleans(),
    st.sampled_from([0.0, 1e-6, 0.01]),
    st.sampled_from([0.1, 0.7, 5.0]),
    st.sampled_from([(1.0, 1.0), (1.5, 1.0), (1.0, 0.0)]),
)
def test_field_is_the_oracles(
    seed: int, over: Any, mask_self: bool, floor: float, temperature: float, factors: tuple[float, float]
) -> None:
    rng = np.random.default_rng(seed)
    x, positives, others = (rng.standard_normal((rng.integers(2, 6), 3)) for _ in range(3))
    negatives = np.concatenate([x, others])
    weight = np.linspace(0.0, 3.0, len(negatives))
    options: dict[str, Any] = {"mask_self": mask_self, "attraction": factors[0], "repulsion": factors[1]}
    found = drifting_field(
        *(torch.from_numpy(points) for points in (x, positives, negatives)),
        temperature=temperature,
        negative_weight=torch.from_numpy(weight),
        normalize_over=over,
        affinity_floor=floor,
        bias_correction=True,
        **options,
    )
    expected = oracle.field(
        x, positives, negatives, temperature, weight=weight, over=over, floor=floor, bias_correction=True, **options
    )
    np.testing.assert_allclose(found, expected, rtol=TIGHT, atol=TIGHT)


@given(seeds, st.sampled_from(["xy", "y"]))
def test_corrected_field_is_antisymmetric_and_at_rest_between_equal_sets(seed: int, over: Any) -> None:
    x, p, q = (torch.from_numpy(points) for points in np.random.default_rng(seed).standard_normal((3, 5, 2)))
    options: dict[str, Any] = {"temperature": 0.5, "normalize_over": over, "bias_correction": True}
    torch.testing.assert_close(drifting_field(x, p, q, **options), -drifting_field(x, q, p, **options))
    assert drifting_field(x, p, p.flip(0), **options).abs().max() < 1e-12


def test_one_sample_a_side_has_nothing_to_correct() -> None:
    x, p, q = torch.randn(4, 2), torch.randn(1, 2), torch.randn(1, 2)
    plain, corrected = (drifting_field(x, p, q, temperature=0.5, bias_correction=flag) for flag in (False, True))
    torch.testing.assert_close(corrected, plain)


X, TEMPERATURE = 1.5, 0.5


def centroid_of_the_distribution() -> float:
    """∫ k(X, y) y p(y) dy / ∫ k(X, y) p(y) dy of a normal p, by the trapezoid rule."""
    y = torch.linspace(-12.0, 12.0, 240_001, dtype=torch.float64)
    weight = (-(y - X).abs() / TEMPERATURE - y.square() / 2).exp()
    return float((weight * y).sum() / weight.sum())


def bias(count: int, *, bias_correction: bool) -> tuple[float, float]:
    """Bias of the centroid of `count` fresh samples, with its standard error, of 400,000 draws."""
    generator = torch.Generator().manual_seed(count)
    means = []
    for _ in range(4):
        y = torch.randn(100_000, count, generator=generator, dtype=torch.float64)
        weight = (-(y - X).abs() / TEMPERATURE).softmax(-1)
        means.append(((correct_bias(weight) if bias_correction else weight) * y).sum(-1))
    centroid = torch.cat(means)
    return float(centroid.mean()) - centroid_of_the_distribution(), float(centroid.std()) / math.sqrt(len(centroid))


def test_bias_falls_from_first_order_to_second() -> None:
    plain = {count: bias(count, bias_correction=False) for count in (8, 32)}
    corrected = {count: bias(count, bias_correction=True) for count in (8, 32)}
    for found, error in plain.values():
        assert abs(found) > 50.0 * error
    # O(1/n): four times the samples, a quarter of the bias
    assert plain[8][0] / plain[32][0] == pytest.approx(4.0, rel=0.25)
    # O(1/n²): a sixteenth, as far as can be told
    assert abs(corrected[32][0]) < abs(corrected[8][0]) / 8 + 3.0 * corrected[32][1]
    assert abs(corrected[8][0]) < 0.5 * abs(plain[8][0])
    assert abs(corrected[32][0]) < 0.15 * abs(plain[32][0])


def test_field_of_few_samples_is_nearer_to_that_of_the_distributions() -> None:
    """Where one fresh sample of each distribution is far off, the mean field of corrected centroids is less so."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(100_000, 8, 1, generator=generator, dtype=torch.float64)
    x = torch.full((100_000, 1, 1), X, dtype=torch.float64)
    options: dict[str, Any] = {"temperature": TEMPERATURE, "normalize_over": "y"}
    one_negative = torch.full((100_000, 1, 1), X + 50.0 * TEMPERATURE, dtype=torch.float64)  # k ≈ 0 beside the others

    def offset(flag: bool) -> float:
        """Of the centroid that the direction of V tells: V = ΣA+ ΣA- (centroid - negative)."""
        drift = drifting_field(x, y, one_negative, bias_correction=flag, **options)
        kernel = (-(torch.cat([one_negative, y], 1) - x).abs() / TEMPERATURE).squeeze(-1).softmax(-1)
        mass = kernel[:, :1] * kernel[:, 1:].sum(-1, keepdim=True)
        centroid = drift.squeeze(-1) / mass + one_negative.squeeze(-1)
        return float(centroid.mean()) - centroid_of_the_distribution()

    assert offset(False) == pytest.approx(bias(8, bias_correction=False)[0], rel=0.1)
    assert offset(True) == pytest.approx(bias(8, bias_correction=True)[0], abs=0.1 * abs(offset(False)))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"normalize_over": "x"}, "'drifting' and 'x'"),
        ({"normalize_over": "none"}, "'drifting' and 'none'"),
        ({"field": "sinkhorn"}, "'sinkhorn' and 'xy'"),
        ({"field": "mmd"}, "'mmd' and 'xy'"),
    ],
)
def test_it_is_refused_where_nothing_is_divided_by_its_sum(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"it needs field='drifting' and normalize_over 'xy' or 'y', got {found}"):
        DriftingLoss(bias_correction=True, **options)
