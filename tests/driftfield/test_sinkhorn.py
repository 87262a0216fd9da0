"""Entropic couplings and the field of their barycentres: float64 loops, optimality, limits, symmetries (2603.12366)."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from driftfield import DriftingLoss, drifting_field
from driftfield.sinkhorn import couplings

from . import oracle

seeds = st.integers(0, 2**32 - 1)


def point_sets(seed: int, *counts: int, dimension: int = 3) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal((count, dimension))) for count in counts]


def distances_and_mass(seed: int, num_samples: int = 6, num_targets: int = 9) -> tuple[Tensor, Tensor]:
    x, targets = point_sets(seed, num_samples, num_targets)
    mass = torch.from_numpy(np.random.default_rng(seed + 1).random(num_targets) + 0.1)
    return torch.cdist(x, targets), mass


def sinkhorn(x: Tensor, positives: Tensor, negatives: Tensor, **options: Any) -> Tensor:
    return drifting_field(x, positives, negatives, **{"temperature": 0.5, "field": "sinkhorn", **options})


# Couplings


@given(seeds, st.sampled_from([0.1, 0.5, 5.0]), st.integers(0, 4))
def test_rows_sum_to_one_after_any_number_of_iterations(seed: int, temperature: float, iterations: int) -> None:
    distance, mass = distances_and_mass(seed)
    (coupling,) = couplings(distance, mass, [temperature], iterations=iterations)
    assert (coupling >= 0).all()
    torch.testing.assert_close(coupling.sum(-1), torch.ones(6, dtype=torch.float64))
    if iterations == 0:
        softmax = (mass.log() - distance / temperature).softmax(-1)
        torch.testing.assert_close(coupling, softmax)


@given(seeds, st.sampled_from([0.2, 0.5]))
def test_columns_come_to_their_masses(seed: int, temperature: float) -> None:
    distance, mass = distances_and_mass(seed)
    errors = []
    for iterations in (0, 3, 10, 300):
        (coupling,) = couplings(distance, mass, [temperature], iterations=iterations)
        errors.append(float((coupling.mean(0) - mass / mass.sum()).abs().sum()))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-3


@given(seeds, st.sampled_from([0.5, 5.0]), st.booleans())
def test_converged_coupling_is_the_one_optimal_one(seed: int, temperature: float, mask_self: bool) -> None:
    """Of all matrices with these marginals only one has logarithms -distance / τ + row + column."""
    distance, mass = distances_and_mass(seed)
    (coupling,) = couplings(distance, mass, [temperature], iterations=400, mask_self=mask_self)
    torch.testing.assert_close(coupling.mean(0), mass / mass.sum(), rtol=0.0, atol=1e-4)
    potentials = coupling.log() + distance / temperature
    if mask_self:
        assert not coupling.diagonal().any()
        potentials.diagonal().fill_(torch.nan)
    # row + column: the mixed second differences vanish
    mixed = potentials[1:, 1:] - potentials[:-1, 1:] - potentials[1:, :-1] + potentials[:-1, :-1]
    known = mixed[mixed.isfinite()]
    assert len(known) > 10
    torch.testing.assert_close(known, torch.zeros_like(known), rtol=0.0, atol=1e-9)


@given(seeds, st.integers(0, 5), st.booleans(), st.permutations([1.0, 0.4, 0.15]))
def test_couplings_are_the_oracles(seed: int, iterations: int, mask_self: bool, temperatures: list[float]) -> None:
    distance, mass = distances_and_mass(seed)
    options: dict[str, Any] = {"iterations": iterations, "mask_self": mask_self}
    found = couplings(distance, mass, temperatures, **options)
    expected = oracle.sinkhorn_couplings(distance.numpy(), mass.numpy(), tuple(temperatures), **options)
    for one, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, reference, rtol=1e-9, atol=1e-12)


def test_larger_temperatures_warm_up_the_smaller() -> None:
    """Few iterations bring the columns nearer to their masses where the potentials of a larger τ come first."""

    def error(seed: int, temperatures: list[float]) -> float:
        distance, mass = distances_and_mass(seed, 32, 32)
        coupling = couplings(distance, mass, temperatures, iterations=5)[-1]
        return float((coupling.mean(0) - mass / mass.sum()).abs().sum())

    cold, warm = (np.mean([error(seed, taus) for seed in range(20)]) for taus in ([0.02], [0.5, 0.2, 0.08, 0.02]))
    assert warm < 0.75 * cold


def test_small_temperatures_assign_one_to_one() -> None:
    for seed in range(5):
        x, targets = point_sets(seed, 12, 12)
        distance = torch.cdist(x, targets)
        found = couplings(distance, torch.ones(12), [1.0, 0.1, 0.02, 0.005, 0.001], iterations=300)
        rows, columns = linear_sum_assignment(distance.numpy())
        shares = [float(coupling[rows, columns].mean()) for coupling in found]
        assert all(smaller > larger for larger, smaller in zip(shares, shares[1:], strict=False))
        assert shares[-1] > 0.99
        assert torch.equal(found[-1].argmax(-1), torch.from_numpy(columns))


def test_float32_survives_where_softmaxes_underflow() -> None:
    """τ = 0.005 in clusters 200 τ and more from their targets: exp(-distance / τ) is 0 for every pair."""
    x, targets = (points.float() for points in point_sets(3, 16, 16))
    distance = torch.cdist(x, targets + 10.0)
    assert not (distance / -0.005).exp().any()
    coupling = couplings(distance, torch.ones(16), [0.05, 0.005], iterations=200)[-1]
    exact = couplings(distance.double(), torch.ones(16).double(), [0.05, 0.005], iterations=200)[-1]
    assert coupling.isfinite().all()
    torch.testing.assert_close(coupling.double(), exact, rtol=0.0, atol=0.02)
    assert (coupling.sum(0) - 1.0).abs().max() < 0.1
    collapsed = (distance / -0.005).softmax(-1)  # over targets alone: few positives have any share
    assert (collapsed.sum(0) < 0.01).sum() > 4


def test_masses_of_zero_remove_targets() -> None:
    distance, mass = distances_and_mass(0)
    mass[[2, 5]] = 0.0
    kept = [j for j in range(len(mass)) if j not in (2, 5)]
    (found,) = couplings(distance, mass, [0.3], iterations=7)
    assert not found[:, [2, 5]].any()
    torch.testing.assert_close(found[:, kept], couplings(distance[:, kept], mass[kept], [0.3], iterations=7)[0])
    assert not couplings(distance, torch.zeros_like(mass), [0.3], iterations=7)[0].any()


def test_a_target_of_mass_two_is_two_targets() -> None:
    distance, _ = distances_and_mass(0, 6, 3)
    mass = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    (found,) = couplings(distance, mass, [0.3], iterations=7)
    (split,) = couplings(distance[:, [0, 1, 1, 2]], torch.ones(4).double(), [0.3], iterations=7)
    torch.testing.assert_close(found, torch.stack([split[:, 0], split[:, 1] + split[:, 2], split[:, 3]], -1))


# The field


@given(
    seeds,
    st.sampled_from([0.2, 0.7, 5.0]),
    st.sampled_from(["self", "masked", "halves"]),
    st.sampled_from([(1.0, 1.0), (1.5, 1.0), (1.0, 2.0), (1.0, 0.0)]),
    st.integers(0, 4),
)
def test_field_is_the_oracles(
    seed: int, temperature: float, coupled: str, factors: tuple[float, float], iterations: int
) -> None:
    x, positives, others = point_sets(seed, 5, 6, 3)
    negatives = torch.cat([x, others])
    weight = torch.linspace(1.0, 3.0, len(negatives), dtype=torch.float64)
    weight[-2] = 0.0
    mask_self, halves = coupled == "masked", coupled == "halves"
    found = sinkhorn(
        x,
        positives,
        negatives,
        temperature=temperature,
        negative_weight=weight,
        mask_self=mask_self,
        second_batch="halves" if halves else "self",
        sinkhorn_iterations=iterations,
        attraction=factors[0],
        repulsion=factors[1],
    )
    (expected,) = oracle.sinkhorn_field(
        *(points.numpy() for points in (x, positives, negatives)),
        (temperature,),
        iterations=iterations,
        halves=halves,
        weight=weight.numpy(),
        mask_self=mask_self,
        attraction=factors[0],
        repulsion=factors[1],
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


@given(seeds, st.sampled_from([0.005, 0.05, 0.5, 5.0]), st.integers(0, 10))
def test_samples_equal_to_the_positives_are_at_rest(seed: int, temperature: float, iterations: int) -> None:
    """One coupling is the other, whatever it is: x with itself, and x with what equals it."""
    (x,) = point_sets(seed, 7)
    options: dict[str, Any] = {"temperature": temperature, "sinkhorn_iterations": iterations}
    assert sinkhorn(x, x, x, **options).abs().max() < 1e-14
    assert sinkhorn(x, x.flip(0), x, **options).abs().max() < 1e-12
    assert sinkhorn(x, x + 0.3, x, **options).abs().max() > 0.1


def test_field_vanishes_for_equal_sets_alone() -> None:
    """Samples that follow the field end on the positives, where the drifting field of so small a τ stops short."""
    x, positives = point_sets(1, 8, 8, dimension=2)
    moving, stuck = 0.1 * x, 0.1 * x
    for _ in range(200):
        moving = moving + 0.2 * sinkhorn(moving, positives, moving, temperature=0.02, sinkhorn_iterations=50)
        stuck = stuck + 0.2 * drifting_field(stuck, positives, stuck, temperature=0.02)
    assert torch.cdist(positives, moving).amin(1).max() < 0.02
    assert torch.cdist(positives, stuck).amin(1).max() > 0.2


@pytest.mark.parametrize("second_batch", ["self", "halves"])
def test_field_of_equal_distributions_is_zero_on_average(second_batch: Any) -> None:
    """Exactly so with halves, where positives and second batch are as many and enter alike; masked, up to a bias."""
    generator = torch.Generator().manual_seed(0)
    x, positives = torch.empty(10_000, 8, 2), torch.empty(10_000, 8, 2)
    x.exponential_(generator=generator)
    positives.exponential_(generator=generator)
    x[:, 0] = 2.0
    if second_batch == "halves":
        positives = positives[:, :4]

    def drift_of_the_first(**options: Any) -> tuple[Tensor, Tensor]:
        drift = sinkhorn(x, positives, x, temperature=1.0, **options)[:, 0]
        return drift.mean(0), drift.std(0) / len(drift) ** 0.5

    mean, error = drift_of_the_first(second_batch=second_batch, mask_self=True)
    biased, _ = drift_of_the_first()  # x beside itself in its own second batch
    bias = 0.25 * biased.abs() if second_batch == "self" else 0.0
    assert (mean.abs() < 4.0 * error + bias).all()
    assert (biased < -20.0 * error).all()  # inwards


@given(seeds, st.sampled_from(["self", "halves"]), st.floats(-100.0, 100.0), st.sampled_from([3.0, 1e4]))
def test_field_follows_translation_rotation_and_scale(
    seed: int, second_batch: Any, offset: float, factor: float
) -> None:
    x, positives = point_sets(seed, 6, 5)

    def field(change: Any, temperature: float = 0.5) -> Tensor:
        return sinkhorn(change(x), change(positives), change(x), temperature=temperature, second_batch=second_batch)

    drift = field(lambda points: points)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    turn = torch.from_numpy(rotation)
    torch.testing.assert_close(field(lambda points: points + offset), drift, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(field(lambda points: points @ turn), drift @ turn, rtol=1e-8, atol=1e-8)
    if second_batch == "halves":  # without a sample beside itself, whose distance 1e-4 does not scale
        scaled = field(lambda points: factor * points, 0.5 * factor)
        torch.testing.assert_close(scaled / factor, drift, rtol=1e-8, atol=1e-8)


@given(seeds)
def test_field_follows_permutations(seed: int) -> None:
    x, p, q = point_sets(seed, 6, 5, 4)
    flipped = sinkhorn(*(points.flip(0) for points in (x, p, q)))
    torch.testing.assert_close(flipped, sinkhorn(x, p, q).flip(0), rtol=1e-9, atol=1e-9)
    halves, swapped = (sinkhorn(y, p, y, second_batch="halves") for y in (x, torch.cat([x[3:], x[:3]])))
    torch.testing.assert_close(swapped, torch.cat([halves[3:], halves[:3]]), rtol=1e-9, atol=1e-9)


def test_small_temperatures_lead_to_the_assigned_positives() -> None:
    x, positives = point_sets(4, 10, 10)
    found = sinkhorn(x, positives, x, temperature=0.001, sinkhorn_iterations=3000)
    rows, columns = linear_sum_assignment(torch.cdist(x, positives).numpy())
    expected = torch.zeros_like(x)
    expected[rows] = positives[columns] - x[rows]  # x beside itself is its own barycentre
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.02)


def test_one_sample_with_something_else_that_repels() -> None:
    x, positives, others = point_sets(0, 1, 5, 3)
    found = sinkhorn(x, positives, torch.cat([x, others]), mask_self=True)
    torch.testing.assert_close(found, (positives.mean(0) - others.mean(0))[None])
    assert DriftingLoss(field="sinkhorn")(x, positives, others).loss.isfinite()


def test_without_mass_nothing_repels() -> None:
    x, positives, others = point_sets(0, 4, 5, 3)
    found = sinkhorn(x, positives, others, negative_weight=torch.zeros(3).double())
    torch.testing.assert_close(found, sinkhorn(x, positives, others, repulsion=0.0))
    # a weight of 0 is no mass beside other masses either
    among = sinkhorn(x, positives, torch.cat([x, others]), negative_weight=torch.tensor([1.0] * 4 + [0.0] * 3).double())
    torch.testing.assert_close(among, sinkhorn(x, positives, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_over": "x"}, "field='sinkhorn' has no affinity to normalise: normalize_over must be left at 'xy'"),
        ({"affinity_floor": 1e-6}, "field='sinkhorn' has no affinity to bound: affinity_floor must be 0, got 1e-06"),
        ({"sinkhorn_iterations": -1}, "sinkhorn_iterations must be >= 0, got -1"),
        ({"second_batch": "third"}, "second_batch must be one of 'self', 'halves', got 'third'"),
        ({"field": "sink"}, "field must be one of 'drifting', 'sinkhorn', 'mmd', got 'sink'"),
        ({"field": "drifting", "second_batch": "halves"}, "second_batch='halves' needs field='sinkhorn', got 'drift"),
    ],
)
def test_unusable_options_are_named(options: dict[str, Any], message: str) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=message):
        sinkhorn(x, x, x, **options)


def test_halves_need_x_twice_among_the_negatives() -> None:
    x, p = torch.randn(4, 2), torch.randn(5, 2)
    with pytest.raises(ValueError, match="second_batch='halves' expects x among the negatives: at least 4 .* got 3"):
        sinkhorn(x, p, x[:3], second_batch="halves")
    with pytest.raises(ValueError, match="needs at least 2 generated samples, got 1"):
        sinkhorn(x[:1], p, x, second_batch="halves")
