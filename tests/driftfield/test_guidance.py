"""Guidance: the weight that γ and α = 1/(1-γ) define, and the distribution of α (Eq. 15-16, A.7, Table 8)."""

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given

from driftfield import sample_guidance_scale, unconditional_weight

NUM = 20_000


def draw(seed: int = 0, **options: Any) -> torch.Tensor:
    return sample_guidance_scale(NUM, generator=torch.Generator().manual_seed(seed), **options)


@given(st.floats(0.0, 0.99), st.integers(2, 1000), st.integers(1, 1000))
def test_weight_gives_the_unconditional_samples_their_share(share: float, num_generated: int, num: int) -> None:
    """γ is the share of the unconditional samples in the negatives of one sample, α = 1/(1-γ)  (Eq. 16)."""
    weight = unconditional_weight(1.0 / (1.0 - share), num_generated, num)
    assert math.isclose(num * weight / (num_generated - 1 + num * weight), share, rel_tol=1e-9, abs_tol=1e-9)


def test_weight_of_the_ablation_and_of_no_guidance() -> None:
    assert unconditional_weight(3.0, 64, 16) == 2.0 * 63 / 16
    assert unconditional_weight(1.0, 64, 16) == 0.0
    alpha = torch.tensor([[1.0, 2.0], [2.5, 4.0]])
    weight = unconditional_weight(alpha, num_generated=9, num_unconditional=2)
    assert torch.equal(weight, torch.tensor([[0.0, 4.0], [6.0, 12.0]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2.0, 0, 16), "at least 1 generated and 1 unconditional sample, got 0 and 16"),
        ((2.0, 64, 0), "got 64 and 0"),
        ((0.5, 64, 16), "alpha must be >= 1, got 0.5"),
        ((float("nan"), 64, 16), "alpha must be >= 1, got nan"),
    ],
)
def test_weight_refuses(arguments: tuple[float, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unconditional_weight(*arguments)


def distribution_function(alpha: np.ndarray, exponent: float, low: float, high: float) -> np.ndarray:
    """P(α' <= α) for a density proportional to α'^-exponent on [low, high]."""
    if exponent == 1.0:
        return np.log(alpha / low) / math.log(high / low)
    power = 1.0 - exponent
    return (alpha**power - low**power) / (high**power - low**power)


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (1.5, 2.5), (1.0, 1.001)])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.001, 3.0, 5.0])
def test_distribution_is_the_power_law(exponent: float, low: float, high: float) -> None:
    alpha = draw(exponent=exponent, low=low, high=high)
    assert alpha.dtype == torch.float32
    assert low <= alpha.min()
    assert alpha.max() <= np.float32(high)
    test = scipy.stats.kstest(alpha.double().numpy(), lambda a: distribution_function(a, exponent, low, high))
    assert test.pvalue > 0.01


def test_the_comparison_tells_neighbouring_exponents_apart() -> None:
    alpha = draw(exponent=3.0).double().numpy()
    assert scipy.stats.kstest(alpha, lambda a: distribution_function(a, 2.7, 1.0, 4.0)).pvalue < 1e-6


def test_exponent_one_is_log_uniform_and_near_it_nothing_jumps() -> None:
    logarithm = draw(exponent=1.0).log() / math.log(4.0)
    assert scipy.stats.kstest(logarithm.double().numpy(), "uniform").pvalue > 0.01
    torch.testing.assert_close(draw(exponent=1.0 + 1e-9), draw(exponent=1.0), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_share_at_one(share: float) -> None:
    alpha = draw(exponent=3.0, share_at_one=share)
    at_one = (alpha == 1.0).sum().item()
    assert abs(at_one - share * NUM) <= 4.0 * (share * (1.0 - share) * NUM) ** 0.5 + 3.0  # 3: draws that round to 1
    others = alpha[alpha > 1.0].double().numpy()
    if len(others):
        assert scipy.stats.kstest(others, lambda a: distribution_function(a, 3.0, 1.0, 4.0)).pvalue > 0.01


def test_share_at_one_holds_where_the_bounds_exclude_it() -> None:
    alpha = draw(exponent=3.0, low=2.0, share_at_one=0.5)
    assert set((alpha[alpha < 2.0]).tolist()) == {1.0}


def test_generator_decides() -> None:
    assert torch.equal(draw(exponent=3.0), draw(exponent=3.0))
    assert not torch.equal(draw(exponent=3.0), draw(exponent=3.0, seed=1))
    assert torch.equal(draw(exponent=3.0, low=2.0, high=2.0), torch.full((NUM,), 2.0))
    assert sample_guidance_scale(0, exponent=3.0).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.5}, "expected 1 <= low <= high, got low 0.5 and high 4.0"),
        ({"low": 3.0, "high": 2.0}, "expected 1 <= low <= high, got low 3.0 and high 2.0"),
        ({"high": float("nan")}, "expected 1 <= low <= high"),
        ({"share_at_one": 1.5}, r"share_at_one must lie in \[0, 1\], got 1.5"),
    ],
)
def test_sampling_refuses(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_guidance_scale(3, exponent=3.0, **options)
