"""The drifting field against the float64 loops, and its symmetries (Eq. 8-12, Alg. 2, Tables 1 and 11)."""

import math
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from driftfield import drifting_field
from driftfield.kernel import NormalizeOver

from . import oracle

OVER = get_args(NormalizeOver)
TIGHT = 1e-10  # float64 against float64
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 6)
overs = st.sampled_from(OVER)


@st.composite
def point_sets(draw: st.DrawFn, num_sets: int = 3) -> list[torch.Tensor]:
    """Float64 sets `[K, D]` of one D: scattered, on a coarse grid (many equal points and ties), clustered, or far."""
    rng = np.random.default_rng(draw(seeds))
    dimension, kind = draw(st.integers(1, 4)), draw(st.sampled_from(["scattered", "grid", "clustered", "far"]))
    sets = []
    for _ in range(num_sets):
        shape = (draw(sizes), dimension)
        points = rng.standard_normal(shape)
        if kind == "grid":
            points = rng.integers(-1, 2, shape).astype(float)
        elif kind == "clustered":
            points = np.sign(points) + 0.01 * rng.standard_normal(shape)
        elif kind == "far":
            points = points + 1e3
        sets.append(torch.from_numpy(points))
    return sets


def assert_close(found: torch.Tensor, expected: torch.Tensor | np.ndarray, tolerance: float = TIGHT) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


@given(
    point_sets(),
    overs,
    st.booleans(),
    st.sampled_from([0.0, 1e-6, 0.01]),
    st.sampled_from([0.1, 0.7, 5.0]),
    st.sampled_from([(1.0, 1.0), (1.5, 1.0), (1.0, 2.0), (1.0, 0.0)]),
    st.booleans(),
)
def test_field_is_the_oracles(
    sets: list[torch.Tensor],
    over: NormalizeOver,
    mask_self: bool,
    floor: float,
    temperature: float,
    factors: tuple[float, float],
    weighted: bool,
) -> None:
    x, positives, others = sets
    negatives = torch.cat([x, others])
    weight = torch.linspace(0.0, 3.0, len(negatives), dtype=torch.float64) if weighted else None
    found = drifting_field(
        x,
        positives,
        negatives,
        temperature=temperature,
        negative_weight=weight,
        mask_self=mask_self,
        normalize_over=over,
        affinity_floor=floor,
        attraction=factors[0],
        repulsion=factors[1],
    )
    expected = oracle.field(
        x.numpy(),
        positives.numpy(),
        negatives.numpy(),
        temperature,
        weight=None if weight is None else weight.numpy(),
        over=over,
        mask_self=mask_self,
        floor=floor,
        attraction=factors[0],
        repulsion=factors[1],
    )
    assert_close(found, expected)


@pytest.mark.parametrize("over", OVER)
def test_float32_field_is_the_oracles(over: NormalizeOver) -> None:
    x, positives, others = torch.randn(9, 5), torch.randn(12, 5), torch.randn(3, 5)
    negatives = torch.cat([x, others])
    found = drifting_field(x, positives, negatives, temperature=0.5, mask_self=True, normalize_over=over)
    expected = oracle.field(x.numpy(), positives.numpy(), negatives.numpy(), 0.5, over=over, mask_self=True)
    assert found.dtype == torch.float32
    assert oracle.relative_error(found.numpy(), expected) < 5e-6


@given(point_sets(), overs)
def test_field_is_antisymmetric(sets: list[torch.Tensor], over: NormalizeOver) -> None:
    x, p, q = sets
    forth = drifting_field(x, p, q, temperature=0.5, normalize_over=over)
    back = drifting_field(x, q, p, temperature=0.5, normalize_over=over)
    assert_close(forth, -back)


@given(point_sets(2), overs)
def test_equal_sets_are_an_equilibrium(sets: list[torch.Tensor], over: NormalizeOver) -> None:
    x, p = sets
    assert_close(drifting_field(x, p, p, temperature=0.5, normalize_over=over), torch.zeros_like(x))
    assert_close(drifting_field(x, p.flip(0), p, temperature=0.5, normalize_over=over), torch.zeros_like(x))


def mean_field(over: NormalizeOver, *, mask_self: bool, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over 20,000 groups, with its standard error, of V at one fixed sample; all others are fresh draws."""
    generator = torch.Generator().manual_seed(0)
    x, positives = torch.empty(20_000, 8, 2), torch.empty(20_000, 11, 2)
    x.exponential_(generator=generator)  # not symmetric: the mean is not 0 for a trivial reason
    positives.exponential_(generator=generator)
    x[:, 0] = 2.0
    drift = drifting_field(x, positives + shift, x, temperature=1.0, mask_self=mask_self, normalize_over=over)[:, 0]
    return drift.mean(0), drift.std(0) / len(drift) ** 0.5


@pytest.mark.parametrize("over", ["xy", "y", "none"])
def test_equilibrium_in_expectation_needs_the_mask(over: NormalizeOver) -> None:
    mean, error = mean_field(over, mask_self=True)
    biased, _ = mean_field(over, mask_self=False)
    # Others and positives are drawn alike and enter "y" and "none" alike. In "xy" the softmax over x has one entry
    # less for a masked column, which leaves a small bias.
    bias = 0.03 * biased.abs() if over == "xy" else 0.0
    assert (mean.abs() < 4.0 * error + bias).all()
    assert (biased.abs() > 20.0 * error).all()
    shifted, error = mean_field(over, mask_self=True, shift=0.2)
    assert (shifted > 10.0 * error).all()


@given(point_sets(), overs, st.floats(-100.0, 100.0))
def test_field_ignores_a_translation(sets: list[torch.Tensor], over: NormalizeOver, offset: float) -> None:
    moved = [points + offset for points in sets]
    assert_close(
        drifting_field(*moved, temperature=0.5, normalize_over=over),
        drifting_field(*sets, temperature=0.5, normalize_over=over),
        1e-8,  # rounding of the moved inputs
    )


@given(point_sets(), overs, seeds)
def test_field_turns_with_a_rotation_or_reflection(sets: list[torch.Tensor], over: NormalizeOver, seed: int) -> None:
    dimension = sets[0].shape[1]
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((dimension, dimension)))
    turn = torch.from_numpy(rotation)
    assert_close(
        drifting_field(*(points @ turn for points in sets), temperature=0.5, normalize_over=over),
        drifting_field(*sets, temperature=0.5, normalize_over=over) @ turn,
        1e-8,
    )


@given(point_sets(), overs, seeds)
def test_field_follows_permutations(sets: list[torch.Tensor], over: NormalizeOver, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(points), generator=generator) for points in sets]
    permuted = [points[order] for points, order in zip(sets, orders, strict=True)]
    assert_close(
        drifting_field(*permuted, temperature=0.5, normalize_over=over),
        drifting_field(*sets, temperature=0.5, normalize_over=over)[orders[0]],
    )


@given(seeds, st.integers(1, 4), overs, st.sampled_from([0.01, 3.0, 1e4]))
def test_field_scales_with_points_and_temperature(
    seed: int, dimension: int, over: NormalizeOver, factor: float
) -> None:
    x, p, q = 1e3 * np.random.default_rng(seed).standard_normal((3, 5, dimension))  # far above the floor 1e-4
    points = [torch.from_numpy(points) for points in (x, p, q)]
    assert_close(
        drifting_field(*(factor * s for s in points), temperature=500.0 * factor, normalize_over=over) / factor,
        drifting_field(*points, temperature=500.0, normalize_over=over),
        1e-8,
    )


@given(point_sets(), overs, seeds)
def test_weights_act_linearly(sets: list[torch.Tensor], over: NormalizeOver, seed: int) -> None:
    x, p, q = sets
    first, second = torch.rand(2, len(q), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def drift(weight: torch.Tensor | None) -> torch.Tensor:
        return drifting_field(x, p, q, temperature=0.5, normalize_over=over, negative_weight=weight)

    without = drift(torch.zeros_like(first))  # "x" is attracted by the positives all the same
    assert over == "x" or not without.any()
    assert_close(
        drift(2.0 * first + 3.0 * second) - without, 2.0 * (drift(first) - without) + 3.0 * (drift(second) - without)
    )
    assert_close(drift(torch.ones_like(first)), drift(None))


@given(point_sets(), overs)
def test_weight_zero_leaves_a_negative_to_the_softmax_alone(sets: list[torch.Tensor], over: NormalizeOver) -> None:
    """w = 0 removes a sample from the sums, but it has taken its share of the softmax over targets.

    Leaving the samples out altogether therefore gives the same direction at every x, and a length larger by the
    inverse of the share of the softmax (over targets) that the kept samples had: squared for "y", where A is that
    softmax, and not for "xy", where A is its root; V is quadratic in A. The bare kernel has no share to lose.
    """
    x, p, q = sets
    extra = q + 0.3
    weight = torch.cat([torch.ones(len(q)), torch.zeros(len(extra))]).double()
    zeroed = drifting_field(x, p, torch.cat([q, extra]), temperature=0.5, normalize_over=over, negative_weight=weight)
    left_out = drifting_field(x, p, q, temperature=0.5, normalize_over=over)
    everything = torch.cat([p, q, extra])
    kernel = torch.tensor(
        [[math.exp(-oracle.distance(a, b) / 0.5) for b in everything.numpy()] for a in x.numpy()], dtype=torch.float64
    )
    share = kernel[:, : len(p) + len(q)].sum(1, keepdim=True) / kernel.sum(1, keepdim=True)
    one = torch.ones_like(share)
    factor = {"xy": share, "y": share.square(), "x": one, "none": one}[over]
    assert_close(zeroed, factor * left_out)


@given(point_sets(), overs)
def test_repeated_positives_are_one_point_counted_often(sets: list[torch.Tensor], over: NormalizeOver) -> None:
    x, p, q = sets
    found = drifting_field(x, p.repeat_interleave(32, 0), q, temperature=0.5, normalize_over=over)
    expected = oracle.field(x.numpy(), p.numpy(), q.numpy(), 0.5, over=over, positive_copies=np.full(len(p), 32.0))
    assert_close(found, expected)


def test_over_x_without_repulsion_is_a_step_of_em() -> None:
    """x + V / Σ_p A is the mean of the positives in the share of x, and V = 0 where x is that mean already."""
    x, p = torch.randn(6, 2, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    for _ in range(2_000):
        share = torch.softmax(-torch.cdist(x, p) / 0.3, 0)  # [6, 40]
        mean = share @ p / share.sum(1, keepdim=True)
        drift = drifting_field(x, p, x, temperature=0.3, normalize_over="x", repulsion=0.0)
        assert_close(x + drift / share.sum(1, keepdim=True), mean)
        x = mean
    assert drift.norm() < 1e-6 < torch.cdist(x, x).fill_diagonal_(1.0).min()  # at rest, and not all in one point


def test_over_x_tells_which_sample_is_nearest_to_a_single_positive() -> None:
    """With one positive the product of Alg. 2 pulls all samples alike once they are close together; "x" does not."""
    x = torch.tensor([[0.000, 0.0], [0.001, 0.0]])
    positive = torch.tensor([[1.0, 0.0]])
    near = drifting_field(x, positive, x, temperature=1e-4, normalize_over="x", repulsion=0.0)[:, 0]
    assert near[1] > 1000 * near[0] > 0
    alike = drifting_field(x, positive, x, temperature=1e-4, mask_self=True, affinity_floor=1e-6)[:, 0]
    assert abs(alike[1] / alike[0] - 1) < 0.01


@given(point_sets(), overs)
def test_a_batch_merged_with_its_copy(sets: list[torch.Tensor], over: NormalizeOver) -> None:
    """Doubling all three sets halves A of "xy", "y" and "x" and doubles every sum; the bare kernel grows with them."""
    x, p, q = sets
    merged = drifting_field(*(torch.cat([s, s]) for s in sets), temperature=0.5, normalize_over=over)
    alone = drifting_field(x, p, q, temperature=0.5, normalize_over=over)
    assert_close(merged, torch.cat([alone, alone]) * (4.0 if over == "none" else 1.0))


@pytest.mark.parametrize("over", OVER)
def test_factors_scale_attraction_and_repulsion(over: NormalizeOver) -> None:
    x, p = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)

    def drift(attraction: float, repulsion: float) -> torch.Tensor:
        return drifting_field(x, p, x, temperature=0.5, normalize_over=over, attraction=attraction, repulsion=repulsion)

    assert_close(drift(1.0, 1.0), drift(1.0, 0.0) + drift(0.0, 1.0))  # V = V+ - V-  (Eq. 10)
    assert_close(drift(1.5, 2.0), 1.5 * drift(1.0, 0.0) + 2.0 * drift(0.0, 1.0))


def test_groups_are_independent() -> None:
    x, p, q = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    together = drifting_field(x, p, q, temperature=0.5)
    for i in range(2):
        for j in range(3):
            alone = drifting_field(x[i, j], p[i, j], q[i, j], temperature=0.5)
            torch.testing.assert_close(together[i, j], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, p = torch.randn(8, 4).to(dtype), torch.randn(9, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = drifting_field(x, p, x, temperature=0.02, mask_self=True)
    assert found.dtype == dtype
    assert torch.equal(
        found, drifting_field(x.float(), p.float(), x.float(), temperature=0.02, mask_self=True).to(dtype)
    )


def test_field_carries_no_gradient() -> None:
    x, p = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    assert not drifting_field(x, p, x, temperature=0.5).requires_grad


@pytest.mark.parametrize("constant", [0.0, 1.0, 3.7, 100.0, 1e4])
def test_equal_points_do_not_drift(constant: float) -> None:
    points = torch.full((3, 8, 5), constant)
    assert not drifting_field(points, points, points, temperature=0.05).any()


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    ({"temperature": float("nan")}, "temperature must be > 0, got nan"),
    ({"affinity_floor": -1.0}, "affinity_floor must be >= 0, got -1.0"),
    ({"normalize_over": "z"}, "normalize_over must be one of 'xy', 'y', 'x', 'none', got 'z'"),
    ({"negative_weight": torch.ones(3)}, r"negative_weight must have one entry per sample, \[4\], got \[3\]"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=message):
        drifting_field(x, x, x, **{"temperature": 0.5, **options})


def test_mask_self_needs_x_among_the_negatives_and_something_that_repels() -> None:
    x, p = torch.randn(4, 2), torch.randn(5, 2)
    with pytest.raises(ValueError, match="at least 4 negatives, got 3"):
        drifting_field(x, p, x[:3], temperature=0.5, mask_self=True)
    with pytest.raises(ValueError, match="mask_self leaves no negative"):
        drifting_field(x[:1], p, x[:1], temperature=0.5, mask_self=True)
    assert drifting_field(x[:1], p, x[:1], temperature=0.5, mask_self=True, affinity_floor=1e-6).isfinite().all()
