"""The metrics against closed forms, SciPy, torch-fidelity and loops over every pair."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.metric_fid
import torch_fidelity.metric_prc
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision import metrics
from vision.metrics import (
    EvaluationResult,
    Gaussian,
    agreement,
    balanced_subset,
    coverage,
    evaluate_features,
    fit_gaussian,
    frechet_between,
    frechet_distance,
    precision_recall,
    real_floor,
)


def normal(n: int, dimensions: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_covariance(dimensions: int, rank: int, seed: int) -> Tensor:
    root = normal(dimensions, rank, seed)
    return root @ root.T


# --- Fréchet distance ---------------------------------------------------------------------------------------------


def test_gaussian_is_numpys_mean_and_covariance() -> None:
    features = normal(50, 4)
    gaussian = fit_gaussian(features.float())
    assert gaussian.mean.dtype == gaussian.covariance.dtype == torch.float64
    features = features.float().double()
    np.testing.assert_allclose(gaussian.mean, features.numpy().mean(0), atol=1e-14)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features.numpy(), rowvar=False), atol=1e-14)
    np.testing.assert_allclose(fit_gaussian(features[:, :1]).covariance, [[np.var(features[:, 0].numpy(), ddof=1)]])


def test_frechet_of_commuting_gaussians_has_a_closed_form() -> None:
    # In one common eigenbasis the distance is the sum over axes of (difference of means)^2 + (difference of sigmas)^2.
    basis = torch.linalg.qr(normal(3, 3)).Q
    sigma_a, sigma_b = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 2.0, 5.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    a = Gaussian(torch.zeros(3), basis @ sigma_a.square().diag() @ basis.T)
    b = Gaussian(basis @ shift, basis @ sigma_b.square().diag() @ basis.T)
    expected = float((shift.square() + (sigma_a - sigma_b).square()).sum())
    assert frechet_between(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_agrees_with_scipys_matrix_square_root(seed: int) -> None:
    a = Gaussian(normal(6, 1, seed)[:, 0], random_covariance(6, 8, seed + 10))
    b = Gaussian(normal(6, 1, seed + 20)[:, 0], random_covariance(6, 8, seed + 30))
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root).real
    assert frechet_between(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_frechet_agrees_with_torch_fidelity() -> None:
    a, b = normal(200, 16), 1.3 * normal(300, 16, seed=1) + 0.2
    statistics = [torch_fidelity.metric_fid.fid_features_to_statistics(features) for features in (a, b)]
    theirs = torch_fidelity.metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


@pytest.mark.parametrize(("n", "dimensions"), [(40, 5), (10, 30)])  # the second: covariance of rank 9 in 30 dimensions
def test_frechet_of_a_shifted_set_is_the_squared_shift(n: int, dimensions: int) -> None:
    features, shift = normal(n, dimensions), torch.linspace(-1, 1, dimensions).double()
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(features, features.flip(0) + shift) == pytest.approx(float(shift.square().sum()), rel=1e-10)
    assert frechet_distance(features + 1e4, features + 1e4 + shift) == pytest.approx(
        float(shift.square().sum()), rel=1e-6
    )


def test_frechet_of_singular_covariances_is_exact() -> None:
    # Two rank-one Gaussians along axes at angle t: sigma_a^2 + sigma_b^2 - 2 sigma_a sigma_b |cos t|.
    angle = 0.3
    axis_a, axis_b = torch.tensor([1.0, 0, 0]), torch.tensor([np.cos(angle), np.sin(angle), 0])
    a = Gaussian(torch.zeros(3), 4 * torch.outer(axis_a, axis_a).double())
    b = Gaussian(torch.zeros(3), 9 * torch.outer(axis_b, axis_b).double())
    assert frechet_between(a, b) == pytest.approx(4 + 9 - 12 * np.cos(angle), rel=1e-7)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 20), dimensions=st.integers(1, 8))
def test_frechet_is_symmetric_never_negative_and_blind_to_rotation(seed: int, n: int, dimensions: int) -> None:
    a, b = normal(n, dimensions, seed), normal(n + 1, dimensions, seed + 1)
    rotation = torch.linalg.qr(normal(dimensions, dimensions, seed + 2)).Q
    distance = frechet_distance(a, b)
    assert distance >= 0
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-6, abs=1e-9)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(distance, rel=1e-6, abs=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-6, abs=1e-8)


# --- precision, recall, coverage ----------------------------------------------------------------------------------


def in_balls(points: Tensor, centres: Tensor, k: int) -> list[list[bool]]:
    """[point][centre]: whether the point lies in the ball around the centre to its k-th neighbour among the centres."""
    inside = [[False] * len(centres) for _ in points]
    for c, centre in enumerate(centres.tolist()):
        others = [other for o, other in enumerate(centres.tolist()) if o != c]
        radius = sorted(np.linalg.norm(np.subtract(centre, other)) for other in others)[k - 1]
        for p, point in enumerate(points.tolist()):
            inside[p][c] = bool(np.linalg.norm(np.subtract(centre, point)) <= radius)
    return inside


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk_elements", [1, 50, 2**24])
def test_neighbourhoods_agree_with_loops_over_all_pairs(
    k: int, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", chunk_elements)
    real, generated = normal(23, 3), 0.7 * normal(17, 3, seed=1) + 0.4
    in_real, in_generated = in_balls(generated, real, k), in_balls(real, generated, k)
    near = precision_recall(real, generated, k=k)
    assert near.precision == pytest.approx(np.mean([any(row) for row in in_real]))
    assert near.recall == pytest.approx(np.mean([any(row) for row in in_generated]))
    assert coverage(real, generated, k=k) == pytest.approx(np.mean(np.any(in_real, axis=0)))
    assert 0 < near.precision and near.recall < 1 and coverage(real, generated, k=k) < 1


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("chunk_elements", [1, 2**24])
def test_distances_keep_their_digits_from_copies_to_far_apart(
    offset: float, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", chunk_elements)
    columns = normal(9, 6) + offset
    # The same points, and moved by ever larger steps; each step is a power of two, which both offsets represent.
    rows = torch.cat([columns + step * normal(9, 6, seed=1).sign() for step in (0.0, 2**-20, 2**-9, 1.0, 2.0**20)])
    found = torch.cat(list(metrics._distances(rows, columns)))
    exact = (rows[:, None] - columns[None]).square().sum(2).sqrt()
    np.testing.assert_allclose(found, exact, rtol=1e-7)
    assert (found[:9].diagonal() == 0).all()


def test_precision_and_recall_agree_with_torch_fidelity() -> None:
    real, generated = normal(120, 8), 0.8 * normal(90, 8, seed=1) + 0.2
    theirs = torch_fidelity.metric_prc.prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=False, verbose=False
    )
    near = precision_recall(real, generated)
    assert near.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert near.recall == pytest.approx(theirs["recall"], abs=1e-6)


def test_a_set_reaches_itself_and_nothing_far_away() -> None:
    features = normal(30, 4)
    assert precision_recall(features, features.flip(0)) == (1, 1)
    assert coverage(features, features.flip(0)) == 1
    assert precision_recall(features, features + 100) == (0, 0)
    assert coverage(features, features + 100) == 0


def test_collapse_shows_in_recall_and_coverage_but_not_in_precision() -> None:
    real = normal(200, 2)
    collapsed = real[:1].repeat(50, 1)
    near = precision_recall(real, collapsed)
    assert near.precision == 1
    assert near.recall == 1 / 200  # balls of radius 0 hold only the point itself
    assert coverage(real, collapsed) == np.mean(in_balls(real[:1], real, 5)) < 0.1


def test_dropping_a_mode_costs_its_share_of_coverage() -> None:
    mode_a, mode_b = normal(60, 2), normal(40, 2, seed=1) + 50
    assert coverage(torch.cat([mode_a, mode_b]), mode_a) == 0.6
    # One generated outlier makes a ball that holds everything: recall counts it, coverage does not.
    outliers = torch.cat([mode_a, torch.full((1, 2), 300.0)])
    assert precision_recall(torch.cat([mode_a, mode_b]), outliers).recall == 1
    assert coverage(torch.cat([mode_a, mode_b]), outliers) == 0.6


def test_duplicates_far_from_the_origin_are_at_distance_zero() -> None:
    real = (normal(4, 3) + 1e5).repeat_interleave(6, dim=0)  # six of each: with k = 5 every ball has radius 0
    assert coverage(real, real[::6]) == 1
    assert coverage(real, real[:1]) == 0.25
    assert coverage(real, real[::6] + 1e-3) == 0


# --- agreement ----------------------------------------------------------------------------------------------------


def test_agreement_counts_per_class_and_in_all() -> None:
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2], [5, 1, 1], [0, 3, 1]])
    result = agreement(logits, torch.tensor([0, 0, 0, 1]))
    assert result.total == 0.75
    assert result.per_class == (pytest.approx(2 / 3), 1.0, None)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], r"labels must be \[2\], one for each row of logits, found \[3\]"),
        ([0, 3], "must lie in 0 to 2, found 0 to 3"),
        ([-1, 0], "must lie in 0 to 2, found -1 to 0"),
    ],
)
def test_agreement_refuses_labels_that_do_not_fit(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agreement(torch.eye(3)[:2], torch.tensor(labels))


# --- the floor and the whole report -------------------------------------------------------------------------------


def test_balanced_subset_takes_as_many_of_each_class_as_the_smallest_allows() -> None:
    labels = torch.tensor([0] * 7 + [1] * 5 + [3] * 20)
    for n, per_class in [(3, 1), (14, 4), (15, 5), (1000, 5)]:
        subset = balanced_subset(labels, n, seed=0)
        assert labels[subset].tolist() == [0] * per_class + [1] * per_class + [3] * per_class
        assert len(set(subset.tolist())) == 3 * per_class
    assert not torch.equal(balanced_subset(labels, 12, seed=0), balanced_subset(labels, 12, seed=1))
    assert not torch.equal(balanced_subset(labels, 12, seed=0), balanced_subset(labels, 12, seed=0, draw=1))
    assert torch.equal(balanced_subset(labels, 12, seed=5), balanced_subset(labels, 12, seed=5))
    with pytest.raises(ValueError, match="at least one sample of each of 3 classes, found n=2"):
        balanced_subset(labels, 2, seed=0)


def test_floor_is_the_mean_over_draws_of_what_each_reaches() -> None:
    train, labels, reference = normal(100, 3), torch.arange(100) % 2, normal(40, 3, seed=1)
    floor = real_floor(train, labels, reference, n=30, draws=3, k=4, seed=7)
    drawn = [train[balanced_subset(labels, 30, seed=7, draw=draw)] for draw in range(3)]
    assert floor.n == 30
    assert floor.frechet == pytest.approx(np.mean([frechet_distance(features, reference) for features in drawn]))
    assert floor.coverage == pytest.approx(np.mean([coverage(reference, features, k=4) for features in drawn]))


def test_floor_falls_as_samples_grow_so_it_must_be_taken_at_the_same_number() -> None:
    train, labels, reference = normal(4000, 8), torch.zeros(4000, dtype=torch.int64), normal(500, 8, seed=1)
    few, many = (real_floor(train, labels, reference, n=n) for n in (50, 2000))
    assert few.frechet > 3 * many.frechet
    assert few.coverage < many.coverage


def real_features(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes as four Gaussians in eight dimensions."""
    labels = torch.arange(n) % 4
    return normal(n, 8, seed) + 4 * torch.eye(8).double()[labels], labels


def test_samples_from_the_datas_own_distribution_reach_the_floor_and_bad_ones_do_not() -> None:
    train, train_labels = real_features(2000, seed=0)
    reference, _ = real_features(400, seed=1)
    fresh, asked = real_features(600, seed=2)

    def report(generated: Tensor) -> EvaluationResult:
        return evaluate_features(
            generated,
            generated[:, :4],  # the first four features are the logits
            asked,
            train=train,
            train_labels=train_labels,
            reference=reference,
            feature_space="toy",
            judge_accuracy=0.99,
            coverage_pixels=0.5,
            coverage_pixels_real=0.75,
        )

    good = report(fresh)
    assert good.frechet == pytest.approx(good.frechet_floor, rel=0.35)
    assert good.coverage == pytest.approx(good.coverage_real, abs=0.03)
    assert good.agreement > 0.95 and good.precision > 0.8 and good.recall > 0.8
    assert len(good.agreement_per_class) == 4
    assert (good.n_generated, good.n_floor, good.n_reference) == (600, 600, 400)
    assert (good.feature_space, good.judge_accuracy) == ("toy", 0.99)
    assert (good.coverage_pixels, good.coverage_pixels_real) == (0.5, 0.75)

    narrow = report(fresh + 0.7 * (4 * torch.eye(8).double()[asked] - fresh))  # each class shrunk to its middle
    assert narrow.frechet > 5 * good.frechet and narrow.recall < 0.1 * good.recall
    assert narrow.coverage < good.coverage_real - 0.05
    assert narrow.agreement >= good.agreement and narrow.precision >= good.precision
    relabelled = report(fresh.roll(1, 0))  # the right images for the wrong labels
    assert relabelled.agreement < 0.05 and relabelled.frechet == pytest.approx(good.frechet)


# --- bad input ----------------------------------------------------------------------------------------------------

GOOD = normal(8, 3)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "frechet a": lambda bad: frechet_distance(bad, GOOD),
    "frechet b": lambda bad: frechet_distance(GOOD, bad),
    "precision real": lambda bad: precision_recall(bad, GOOD),
    "precision generated": lambda bad: precision_recall(GOOD, bad),
    "coverage real": lambda bad: coverage(bad, GOOD),
    "coverage generated": lambda bad: coverage(GOOD, bad),
    "floor": lambda bad: real_floor(bad, torch.zeros(len(bad), dtype=torch.int64), GOOD, n=8),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD.where(GOOD != GOOD[2, 1], torch.nan), "must be finite, found NaN or infinity in 1 of 8 rows"),
        (GOOD / torch.tensor([1.0, 1.0, 0.0]), "must be finite, found NaN or infinity in 8 of 8 rows"),
        (GOOD[:, 0], r"must be floating point \[n, F\], found torch.float64 \[8\]"),
        (GOOD.long(), r"must be floating point \[n, F\], found torch.int64"),
        (GOOD[:, :0], r"must be floating point \[n, F\], found torch.float64 \[\d, 0\]"),
        (GOOD[:, :2], "must have the same dimension, found [23] and [23]"),
    ],
)
def test_unusable_features_are_named(call: str, bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CALLS[call](bad)


def test_too_few_features_are_counted() -> None:
    with pytest.raises(ValueError, match="features must have at least 2 rows, found 1"):
        frechet_distance(GOOD, GOOD[:1])
    with pytest.raises(ValueError, match="real features must have at least 4 rows, found 3"):
        precision_recall(GOOD[:3], GOOD)
    with pytest.raises(ValueError, match="generated features must have at least 4 rows, found 3"):
        precision_recall(GOOD, GOOD[:3])
    with pytest.raises(ValueError, match="real features must have at least 6 rows, found 5"):
        coverage(GOOD[:5], GOOD)
    with pytest.raises(ValueError, match="generated features must have at least 1 rows, found 0"):
        coverage(GOOD, GOOD[:0])
    assert precision_recall(GOOD[:4], GOOD[:4]) == (1, 1)
    assert coverage(GOOD[:6], GOOD[:1]) > 0


def test_floor_refuses_labels_of_another_number() -> None:
    with pytest.raises(ValueError, match=r"train_labels must be \[8\], one for each row of train, found \[7\]"):
        real_floor(GOOD, torch.zeros(7, dtype=torch.int64), GOOD, n=4)
