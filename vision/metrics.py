"""How close generated images are to real ones, measured on feature vectors.

Every function takes features `[n, F]` and computes in float64, distances in chunks of rows, so that memory stays near
`CHUNK_ELEMENTS` numbers whatever n is.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from driftfield.training.seeding import generator

CHUNK_ELEMENTS = 2**24  # distances held at once: 128 MiB of float64
CANCELLED = 1e-8  # share of |x|^2 + |y|^2 below which a squared distance has lost half of its digits


class Gaussian(NamedTuple):
    """Mean `[F]` and covariance `[F, F]` of features."""

    mean: Tensor
    covariance: Tensor


class PrecisionRecall(NamedTuple):
    """Share of generated features near real ones, and of real features near generated ones."""

    precision: float
    recall: float


class Agreement(NamedTuple):
    """Share of images that a classifier puts in the class that was asked for.

    `per_class` has None for a class that was never asked for.
    """

    total: float
    per_class: tuple[float | None, ...]


class Floor(NamedTuple):
    """What n real training images reach against the reference, as the mean over several draws of them."""

    frechet: float
    coverage: float
    n: int


class EvaluationResult(NamedTuple):
    """What is reported about a generator, with everything needed to say where the figures come from."""

    frechet: float
    frechet_floor: float
    precision: float
    recall: float
    coverage: float
    coverage_real: float
    coverage_pixels: float
    coverage_pixels_real: float
    agreement: float
    agreement_per_class: tuple[float | None, ...]
    n_generated: int
    n_floor: int
    n_reference: int
    feature_space: str
    judge_accuracy: float


def fit_gaussian(features: Tensor) -> Gaussian:
    """Mean and unbiased covariance.

    Args:
        features: `[n, F]`, n >= 2.

    Raises:
        ValueError: if the features are not finite numbers `[n, F]` with n >= 2.

    Returns:
        Both in float64.

    >>> fit_gaussian(torch.tensor([[0.0], [2.0]])).covariance.tolist()
    [[2.0]]
    """
    features = _checked("features", features, at_least=2)
    return Gaussian(features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1]))


def frechet_between(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians (Dowson and Landau 1982; the formula of FID, Heusel et al. 2017).

    ||mean_a - mean_b||^2 + tr(A) + tr(B) - 2 tr((AB)^(1/2)). The last trace is the sum of the singular values of
    A^(1/2) B^(1/2), which stays exact where AB is singular.

    Raises:
        ValueError: if the two differ in dimension.

    >>> narrow, wide = Gaussian(torch.zeros(1), torch.eye(1)), Gaussian(torch.full((1,), 3.0), 4 * torch.eye(1))
    >>> round(frechet_between(narrow, wide), 9)
    10.0
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must have the same dimension, found {len(a.mean)} and {len(b.mean)}")
    difference = a.mean.double() - b.mean.double()  # [F]
    cross = torch.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    total = difference.square().sum() + a.covariance.double().trace() + b.covariance.double().trace() - 2 * cross
    return max(float(total), 0.0)  # rounding can leave a distance of zero just below it


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features `[n, F]` and `[m, F]`.

    Raises:
        ValueError: if the features are not finite numbers of the same dimension, at least two of each.

    >>> round(frechet_distance(torch.eye(3), torch.eye(3) + 1.0), 9)
    3.0
    """
    return frechet_between(fit_gaussian(a), fit_gaussian(b))


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision is the share of generated features inside the ball of at least one real feature, a ball reaching to its
    k-th nearest neighbour among the real ones; recall exchanges the two sets.

    Args:
        real: `[n, F]`.
        generated: `[m, F]`.
        k: which neighbour sets the radius.

    Raises:
        ValueError: if the features are not finite numbers of the same dimension, at least k + 1 of each.

    >>> line = torch.arange(8.0).unsqueeze(1)
    >>> precision_recall(line, torch.full((8, 1), 2.0), k=1)
    PrecisionRecall(precision=1.0, recall=0.125)
    """
    real, generated = _checked_pair(real, generated, at_least=k + 1)
    return PrecisionRecall(
        precision=_share(_inside_any(generated, real, _radii(real, k))),
        recall=_share(_inside_any(real, generated, _radii(generated, k))),
    )


def coverage(real: Tensor, generated: Tensor, *, k: int = 5) -> float:
    """Share of real features whose ball holds at least one generated feature (Naeem et al. 2020, Eq. 9).

    Args:
        real: `[n, F]`; a ball reaches to the k-th nearest neighbour among these.
        generated: `[m, F]`.
        k: which neighbour sets the radius.

    Raises:
        ValueError: if the features are not finite numbers of the same dimension, at least k + 1 real and one generated.

    >>> line = torch.arange(8.0).unsqueeze(1)
    >>> coverage(line, torch.tensor([[0.0], [0.5]]), k=1)
    0.25
    """
    return Coverage(real, k=k)(generated)


class Coverage:
    """`coverage` of the same real features by one generated set after another: their balls are computed once.

    Args:
        real: `[n, F]`.
        k: which neighbour sets the radius.

    Raises:
        ValueError: as `coverage` does.

    >>> covered = Coverage(torch.arange(8.0).unsqueeze(1), k=1)
    >>> covered(torch.tensor([[0.0]])), covered(torch.tensor([[3.5], [6.5]]))
    (0.25, 0.5)
    """

    def __init__(self, real: Tensor, *, k: int = 5) -> None:
        self._real = _checked("real features", real, at_least=k + 1)
        self._radii = _radii(self._real, k)

    def __call__(self, generated: Tensor) -> float:
        """Share of the real features whose ball holds at least one of `[m, F]`."""
        generated = _checked("generated features", generated)
        _check_dimensions(self._real, generated)
        return _share(_nearest(self._real, generated) <= self._radii)


def agreement(logits: Tensor, labels: Tensor) -> Agreement:
    """Share of images whose most likely class is the class that was asked for.

    Args:
        logits: `[n, classes]`.
        labels: `[n]`, the classes asked for.

    Raises:
        ValueError: if shapes do not fit, a label is out of range or a logit is not finite.

    >>> agreement(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 1, 0]))
    Agreement(total=0.6666666666666666, per_class=(0.5, 1.0, None))
    """
    logits = _checked("logits", logits)
    num_classes = logits.shape[1]
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be [{len(logits)}], one for each row of logits, found {list(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must lie in 0 to {num_classes - 1}, found {int(labels.min())} to {int(labels.max())}")
    labels = labels.to(logits.device)
    asked = torch.bincount(labels, minlength=num_classes).tolist()
    correct = torch.bincount(labels[logits.argmax(1) == labels], minlength=num_classes).tolist()
    per_class = tuple(right / count if count else None for right, count in zip(correct, asked, strict=True))
    return Agreement(sum(correct) / len(labels), per_class)


def balanced_subset(labels: Tensor, n: int, *, seed: int, draw: int = 0) -> Tensor:
    """Draw as many samples of every class, without replacement, n in all or as near below as the classes allow.

    Args:
        labels: int64 `[N]`.
        n: how many are wanted.
        seed: of the draw.
        draw: number of the draw.

    Raises:
        ValueError: if n is below the number of classes present.

    Returns:
        Positions in `labels`, ascending.

    >>> labels = torch.tensor([0, 0, 0, 1, 1])
    >>> labels[balanced_subset(labels, 100, seed=0)].tolist()
    [0, 0, 1, 1]
    """
    classes, counts = labels.unique(return_counts=True)
    per_class = min(n // len(classes), int(counts.min()))
    if per_class == 0:
        raise ValueError(f"a balanced subset needs at least one sample of each of {len(classes)} classes, found n={n}")
    shuffled = torch.randperm(len(labels), generator=generator(seed, "balanced subset", draw))
    chosen = [shuffled[labels.cpu()[shuffled] == label][:per_class] for label in classes.tolist()]
    return torch.cat(chosen).sort().values


def real_floor(
    train: Tensor, train_labels: Tensor, reference: Tensor, *, n: int, draws: int = 5, k: int = 5, seed: int = 0
) -> Floor:
    """What as many real training images reach: the measure for a generator that is as good as its data.

    Both figures depend on the number of samples, so training images are drawn class-balanced in the number of the
    generated ones or, where there are fewer, in the largest number that the smallest class allows.

    Args:
        train: features `[N, F]` of training images.
        train_labels: their classes, int64 `[N]`.
        reference: features `[r, F]` of the reference, the test split.
        n: number of generated images.
        draws: number of drawn subsets, whose mean is returned.
        k: of `coverage`.
        seed: of the draws.

    Raises:
        ValueError: as `frechet_distance`, `coverage` and `balanced_subset` do.

    Returns:
        Mean Frechet distance and coverage, and the number drawn.

    >>> real_floor(torch.eye(4), torch.zeros(4, dtype=torch.int64), torch.eye(4), n=9, draws=1, k=1)
    Floor(frechet=0.0, coverage=1.0, n=4)
    """
    if len(train) != len(train_labels):
        raise ValueError(f"train_labels must be [{len(train)}], one for each row of train, found [{len(train_labels)}]")
    subsets = [balanced_subset(train_labels, n, seed=seed, draw=draw).to(train.device) for draw in range(draws)]
    covered = Coverage(reference, k=k)
    return Floor(
        frechet=sum(frechet_distance(train[subset], reference) for subset in subsets) / draws,
        coverage=sum(covered(train[subset]) for subset in subsets) / draws,
        n=len(subsets[0]),
    )


def evaluate_features(
    generated: Tensor,
    generated_logits: Tensor,
    asked_labels: Tensor,
    *,
    train: Tensor,
    train_labels: Tensor,
    reference: Tensor,
    feature_space: str,
    judge_accuracy: float,
    coverage_pixels: float,
    coverage_pixels_real: float,
    seed: int = 0,
) -> EvaluationResult:
    """Every figure of a report, from features in one space.

    Args:
        generated: features `[n, F]` of generated images.
        generated_logits: the judge's logits `[n, classes]` for them.
        asked_labels: the classes they were asked for, int64 `[n]`.
        train: features `[N, F]` of real training images, for the floor.
        train_labels: their classes, int64 `[N]`.
        reference: features `[r, F]` of the real images everything is compared with, the test split.
        feature_space: name of the space, printed beside every figure.
        judge_accuracy: share of the reference that the judge classifies rightly.
        coverage_pixels: coverage (k = 5) in raw pixels, which no judge can be wrong about.
        coverage_pixels_real: that of as many real training images.
        seed: of the draws of `real_floor`.

    Raises:
        ValueError: as the metrics do.

    Returns:
        Frechet distance, precision (k = 3), recall (k = 3), coverage (k = 5), agreement, and the real images' floor.
    """
    floor = real_floor(train, train_labels, reference, n=len(generated), seed=seed)
    near = precision_recall(reference, generated)
    agreed = agreement(generated_logits, asked_labels)
    return EvaluationResult(
        frechet=frechet_distance(generated, reference),
        frechet_floor=floor.frechet,
        precision=near.precision,
        recall=near.recall,
        coverage=coverage(reference, generated),
        coverage_real=floor.coverage,
        coverage_pixels=coverage_pixels,
        coverage_pixels_real=coverage_pixels_real,
        agreement=agreed.total,
        agreement_per_class=agreed.per_class,
        n_generated=len(generated),
        n_floor=floor.n,
        n_reference=len(reference),
        feature_space=feature_space,
        judge_accuracy=judge_accuracy,
    )


def _checked(name: str, features: Tensor, *, at_least: int = 1) -> Tensor:
    """The features in float64, or a sentence about what is wrong with them."""
    if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise ValueError(f"{name} must be floating point [n, F], found {features.dtype} {list(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"{name} must have at least {at_least} rows, found {len(features)}")
    unusable = int((~torch.isfinite(features).all(1)).sum())
    if unusable:
        raise ValueError(f"{name} must be finite, found NaN or infinity in {unusable} of {len(features)} rows")
    return features.double()


def _checked_pair(real: Tensor, generated: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    real = _checked("real features", real, at_least=at_least)
    generated = _checked("generated features", generated, at_least=at_least)
    _check_dimensions(real, generated)
    return real, generated


def _check_dimensions(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features must have the same dimension, found {a.shape[1]} and {b.shape[1]}")


def _square_root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix `[F, F]`."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest neighbour, `[n]`; the nearest of k + 1 is the row itself."""
    return torch.cat([d.topk(k + 1, dim=1, largest=False).values[:, -1] for d in _distances(features, features)])


def _inside_any(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether each point lies in at least one closed ball, `[points]`."""
    return torch.cat([(distances <= radii).any(1) for distances in _distances(points, centres)])


def _nearest(points: Tensor, others: Tensor) -> Tensor:
    """Distance of each point to the nearest of the others, `[points]`."""
    return torch.cat([distances.amin(1) for distances in _distances(points, others)])


def _distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Distances `[chunk, columns]` of successive chunks of rows.

    |x|^2 + |y|^2 - 2 x·y, in which the mean is subtracted first: a matrix product, many times as fast as pair
    after pair. It is computed anew from the coordinates where it is a small difference of large numbers, so that
    every distance keeps half of float64's digits and equal rows are at 0.
    """
    mean = columns.mean(0)
    rows, columns = rows - mean, columns - mean
    norms = columns.square().sum(1)  # [columns]
    for chunk in rows.split(max(1, CHUNK_ELEMENTS // len(columns))):
        largest = chunk.square().sum(1, keepdim=True) + norms  # [chunk, columns]
        squared = largest - 2 * chunk @ columns.T
        lost = (squared <= CANCELLED * largest).nonzero()  # [pairs, 2]
        for row, column in (part.T for part in lost.split(max(1, CHUNK_ELEMENTS // rows.shape[1]))):
            squared[row, column] = (chunk[row] - columns[column]).square().sum(1)
        yield squared.sqrt()


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
