"""The field and the loss in float64 NumPy, as loops over groups, samples and targets, written from the paper alone.

Slow on purpose: every sum of the method is a visible loop, distances are taken from differences, and nothing is
shifted, masked in place or broadcast, so that a mistake here and the same mistake in `driftfield` is unlikely.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def distance(a: Array, b: Array) -> float:
    return math.sqrt(max(float(((a - b) ** 2).sum()), 1e-8))


def kernel(distances: Array, temperature: float, *, over: str, masked: set[tuple[int, int]], copies: Array) -> Array:
    """The affinity A of Alg. 2 before floor and weights; target j stands for `copies[j]` equal points."""
    num_samples, num_targets = distances.shape
    logits = np.full(distances.shape, -math.inf)
    for i in range(num_samples):
        for j in range(num_targets):
            if (i, j) not in masked:
                logits[i, j] = -distances[i, j] / temperature
    result = np.zeros(distances.shape)
    for i in range(num_samples):
        for j in range(num_targets):
            if over == "none":
                result[i, j] = math.exp(logits[i, j])
                continue
            top = logits[:, j].max()
            if top == -math.inf:  # the only pair of this target is masked: a softmax over one entry
                over_x = 1.0 / num_samples
            else:
                over_x = math.exp(logits[i, j] - top) / sum(math.exp(logits[k, j] - top) for k in range(num_samples))
            if over == "x":
                result[i, j] = over_x
                continue
            row = sum(copies[k] * math.exp(logits[i, k] - logits[i].max()) for k in range(num_targets))
            over_targets = math.exp(logits[i, j] - logits[i].max()) / row
            result[i, j] = over_targets if over == "y" else math.sqrt(over_targets * over_x)
    return result


def field(
    x: Array,
    positives: Array,
    negatives: Array,
    temperature: float,
    *,
    weight: Array | None = None,
    over: str = "xy",
    mask_self: bool = False,
    floor: float = 0.0,
    attraction: float = 1.0,
    repulsion: float = 1.0,
    positive_copies: Array | None = None,
    distances: Array | None = None,
    bias_correction: bool = False,
) -> Array:
    """V of one group, `[N, D]`; targets are the negatives, then the positives."""
    targets = np.concatenate([negatives, positives]).astype(np.float64)
    num_samples, num_targets, num_negatives = len(x), len(targets), len(negatives)
    copies = np.ones(num_targets)
    if positive_copies is not None:
        copies[num_negatives:] = positive_copies
    w = np.ones(num_targets)
    if weight is not None:
        w[:num_negatives] = weight
    if distances is None:
        distances = np.array([[distance(a, b) for b in targets] for a in x])
    masked = {(i, i) for i in range(num_samples)} if mask_self else set()
    affinity = kernel(distances, temperature, over=over, masked=masked, copies=copies)
    drift = np.zeros(x.shape)
    for i in range(num_samples):
        a = [max(affinity[i, j], math.sqrt(floor)) * w[j] * copies[j] for j in range(num_targets)]
        if bias_correction:
            a = corrected(a[:num_negatives]) + corrected(a[num_negatives:])
        negative_sum, positive_sum = sum(a[:num_negatives]), sum(a[num_negatives:])
        if over == "x":
            negative_sum = positive_sum = 1.0
        for j in range(num_targets):
            if j < num_negatives:
                drift[i] -= repulsion * a[j] * positive_sum * (targets[j] - x[i])
            else:
                drift[i] += attraction * a[j] * negative_sum * (targets[j] - x[i])
    return drift


def corrected(weights: list[float]) -> list[float]:
    """Weights of one centroid without the first-order bias of self-normalisation, of the sum they had."""
    total = sum(weights)
    if total == 0:
        return weights
    shares = [weight / total for weight in weights]
    squares = sum(share**2 for share in shares)
    return [total * share * (1 + share - squares) for share in shares]


def sinkhorn_couplings(
    distances: Array, mass: Array, temperatures: tuple[float, ...], *, iterations: int, mask_self: bool = False
) -> list[Array]:
    """Couplings times N by the plain scalings u K v, from the largest τ to the smallest, the rows last."""
    num_samples, num_targets = distances.shape
    shares = [float(m) / float(mass.sum()) for m in mass]
    v = [1.0] * num_targets
    last = max(temperatures)
    found = {}
    for temperature in sorted(temperatures, reverse=True):
        v = [v_j ** (last / temperature) for v_j in v]  # v = exp(potential / τ)
        kernel = np.zeros(distances.shape)
        for i in range(num_samples):
            for j in range(num_targets):
                kernel[i, j] = 0.0 if mask_self and i == j else math.exp(-distances[i, j] / temperature)
        for _ in range(iterations):
            u = [1.0 / sum(kernel[i, j] * v[j] * shares[j] for j in range(num_targets)) for i in range(num_samples)]
            v = [num_samples / sum(kernel[i, j] * u[i] for i in range(num_samples)) for j in range(num_targets)]
        coupling = np.zeros(distances.shape)
        for i in range(num_samples):
            row = sum(kernel[i, j] * v[j] * shares[j] for j in range(num_targets))
            for j in range(num_targets):
                coupling[i, j] = kernel[i, j] * v[j] * shares[j] / row
        found[temperature] = coupling
        last = temperature
    return [found[temperature] for temperature in temperatures]


def sinkhorn_field(
    x: Array,
    positives: Array,
    negatives: Array,
    temperatures: tuple[float, ...],
    *,
    iterations: int,
    halves: bool = False,
    weight: Array | None = None,
    mask_self: bool = False,
    attraction: float = 1.0,
    repulsion: float = 1.0,
    distances: Array | None = None,
) -> list[Array]:
    """V of one group, `[N, D]` for every τ: barycentre of the positives minus barycentre of the negatives."""
    num_samples, num_negatives = len(x), len(negatives)
    if distances is None:
        distances = np.array([[distance(a, b) for b in (*negatives, *positives)] for a in x])
    mass = np.ones(num_negatives) if weight is None else np.array(weight)
    batches = [list(range(num_samples))]
    if halves:
        batches = [list(range(num_samples // 2)), list(range(num_samples // 2, num_samples))]
    drifts = [np.zeros(x.shape) for _ in temperatures]
    for rows in batches:
        kept = [j for j in range(num_negatives) if mass[j] > 0 and not (halves and j in rows)]
        if mask_self and not halves:
            assert kept[:num_samples] == rows  # the mask below is that of the diagonal
        repelled = sinkhorn_couplings(
            distances[np.ix_(rows, kept)],
            mass[kept],
            temperatures,
            iterations=iterations,
            mask_self=mask_self and not halves,
        )
        attracted = sinkhorn_couplings(
            distances[rows, num_negatives:], np.ones(len(positives)), temperatures, iterations=iterations
        )
        for drift, minus, plus in zip(drifts, repelled, attracted, strict=True):
            for place, i in enumerate(rows):
                for j in range(len(positives)):
                    drift[i] += attraction * plus[place, j] * (positives[j] - x[i])
                for k, j in enumerate(kept):
                    drift[i] -= repulsion * minus[place, k] * (negatives[j] - x[i])
    return drifts


def mmd_field(
    x: Array,
    positives: Array,
    negatives: Array,
    temperature: float,
    *,
    weight: Array | None = None,
    mask_self: bool = False,
    attraction: float = 1.0,
    repulsion: float = 1.0,
    distances: Array | None = None,
) -> Array:
    """V of one group, `[N, D]`: τ² times the mean gradient of the kernel to x, positives minus negatives."""
    num_negatives = len(negatives)
    w = np.ones(num_negatives) if weight is None else weight
    drift = np.zeros(x.shape)
    for i in range(len(x)):

        def pull(target: Array, j: int, i: int = i) -> Array:
            d = distance(x[i], target) if distances is None else distances[i, j]
            return temperature * math.exp(-d / temperature) * (target - x[i]) / d

        others = [j for j in range(num_negatives) if not (mask_self and i == j)]
        total = sum(w[j] for j in others)
        for j in others:
            if total > 0:
                drift[i] -= repulsion * w[j] / total * pull(negatives[j], j)
        for j, positive in enumerate(positives):
            drift[i] += attraction * pull(positive, num_negatives + j) / len(positives)
    return drift


class Loss(NamedTuple):
    loss: Array  # [B]
    gradient: Array  # [B, N, D], of the mean loss
    drift: Array  # [B, N, D], normalised
    squared_norm: Array  # [temperatures], λ²
    scale: float


def drifting_loss(
    x: Array,
    positives: Array,
    unconditional: Array | None = None,
    weight: Array | None = None,
    *,
    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2),
    normalize_features: bool = True,
    normalize_drift: bool = True,
    floor: float = 1e-6,
    over: str = "xy",
    attraction: float = 1.0,
    repulsion: float = 1.0,
    forces: Callable[..., list[Array]] | None = None,
) -> Loss:
    """The loss of groups `[B, N, D]` and what it is made of.

    `forces` may replace the field: of one normalised group and its kernel distances, one array for every τ.
    """
    x, positives = x.astype(np.float64), positives.astype(np.float64)
    groups, num_samples, dimension = x.shape
    if unconditional is None:
        unconditional = np.zeros((groups, 0, dimension))
    if weight is None:
        weight = np.ones(unconditional.shape[:2])
    negatives = np.concatenate([x, unconditional.astype(np.float64)], 1)
    targets = np.concatenate([negatives, positives], 1)
    weights = np.ones(targets.shape[:2])
    weights[:, num_samples : negatives.shape[1]] = weight

    distances = np.zeros((groups, num_samples, targets.shape[1]))
    weighted_distance = weight_sum = 0.0
    for b in range(groups):
        for i in range(num_samples):
            for j in range(targets.shape[1]):
                distances[b, i, j] = distance(x[b, i], targets[b, j])
                weighted_distance += distances[b, i, j] * weights[b, j]
                weight_sum += weights[b, j]
    scale = weighted_distance / weight_sum
    kernel_scale = max(scale, 1e-3) if normalize_features else 1.0
    coordinate_scale = max(scale / math.sqrt(dimension), 1e-3) if normalize_features else 1.0

    def drifting(x: Array, positives: Array, negatives: Array, weight: Array, distances: Array) -> list[Array]:
        return [
            field(
                x,
                positives,
                negatives,
                temperature,
                weight=weight,
                over=over,
                mask_self=True,
                floor=floor,
                attraction=attraction,
                repulsion=repulsion,
                distances=distances,
            )
            for temperature in temperatures
        ]

    of_groups = [
        (forces or drifting)(
            x[b] / coordinate_scale,
            positives[b] / coordinate_scale,
            negatives[b] / coordinate_scale,
            weights[b, : negatives.shape[1]],
            distances[b] / kernel_scale,
        )
        for b in range(groups)
    ]
    drift = np.zeros(x.shape)
    squared_norm = np.zeros(len(temperatures))
    for t in range(len(temperatures)):
        force = np.array([group[t] for group in of_groups])
        squared_norm[t] = (force**2).mean()
        drift += force / math.sqrt(max(squared_norm[t], 1e-8)) if normalize_drift else force
    return Loss(
        loss=(drift**2).mean((1, 2)),
        gradient=-2.0 * drift / (drift.size * coordinate_scale),
        drift=drift,
        squared_norm=squared_norm,
        scale=scale,
    )


def relative_error(found: Array, expected: Array) -> float:
    """Norm of the difference over the norm of the expected (0 where both are 0)."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    difference = float(np.linalg.norm(found - expected))
    return difference / float(np.linalg.norm(expected)) if difference else 0.0
