"""The field and the loss in float64 NumPy, as loops over groups, samples and targets, written from the paper alone.

Slow on purpose: every sum of the method is a visible loop, distances are taken from differences, and nothing is
shifted, masked in place or broadcast, so that a mistake here and the same mistake in `driftfield` is unlikely.
"""

import math
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
        negative_sum, positive_sum = sum(a[:num_negatives]), sum(a[num_negatives:])
        if over == "x":
            negative_sum = positive_sum = 1.0
        for j in range(num_targets):
            if j < num_negatives:
                drift[i] -= repulsion * a[j] * positive_sum * (targets[j] - x[i])
            else:
                drift[i] += attraction * a[j] * negative_sum * (targets[j] - x[i])
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
) -> Loss:
    """The loss of groups `[B, N, D]` and what it is made of."""
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

    drift = np.zeros(x.shape)
    squared_norm = np.zeros(len(temperatures))
    for t, temperature in enumerate(temperatures):
        force = np.zeros(x.shape)
        for b in range(groups):
            force[b] = field(
                x[b] / coordinate_scale,
                positives[b] / coordinate_scale,
                negatives[b] / coordinate_scale,
                temperature,
                weight=weights[b, : negatives.shape[1]],
                over=over,
                mask_self=True,
                floor=floor,
                attraction=attraction,
                repulsion=repulsion,
                distances=distances[b] / kernel_scale,
            )
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
