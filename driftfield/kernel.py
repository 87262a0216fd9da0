"""Distances and the kernel exp(-distance / temperature) with its normalisations (Eq. 12, Table 11)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

SQUARED_DISTANCE_FLOOR = 1e-8  # the release's; keeps coinciding points at distance 1e-4

NormalizeOver = Literal["xy", "y", "none"]


class CentredPoints(NamedTuple):
    """Points of a group, moved to their common centre and divided by `unit`: same field, no cancellation."""

    x: Tensor  # [..., N, D]
    targets: Tensor  # [..., T, D]
    unit: Tensor  # [], a power of two, at least 1


def centre(x: Tensor, targets: Tensor) -> CentredPoints:
    """Move every group to its centre, and shrink values whose squares would overflow.

    |x|² + |y|² - 2 x·y cancels when points lie far from the origin, so the origin moves to the points. The first
    target goes there before the mean does: its subtraction is exact for equal points, so that a batch of equal points
    becomes exactly zero instead of rounding noise. Division by a power of two is exact.

    Args:
        x: `[..., N, D]`, float32 or float64.
        targets: `[..., T, D]`, T >= 1.

    Returns:
        The same points as `CentredPoints(x, targets, unit)`.

    >>> points = centre(torch.tensor([[100.0], [102.0]]), torch.tensor([[100.0], [102.0]]))
    >>> points.targets.flatten().tolist()
    [-1.0, 1.0]
    """
    anchor = targets[..., :1, :]
    mean = (targets - anchor).mean(-2, keepdim=True)
    x, targets = (x - anchor) - mean, (targets - anchor) - mean
    largest = torch.maximum(x.abs().amax(), targets.abs().amax())
    unit = torch.exp2(torch.ceil(torch.log2(largest.clamp(min=1.0))))
    return CentredPoints(x / unit, targets / unit, unit)


def distances(points: CentredPoints) -> Tensor:
    """Euclidean distances from each x to each target of its group, never below 1e-4.

    Args:
        points: as `centre` returns them.

    Returns:
        `[..., N, T]` in units of `points.unit`.

    >>> points = centre(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> [round(distance, 3) for distance in (distances(points) * points.unit).flatten().tolist()]
    [5.0, 0.0]
    """
    x, targets, unit = points
    squared = x.square().sum(-1)[..., :, None] + targets.square().sum(-1)[..., None, :]  # [..., N, T]
    squared = squared - 2.0 * x @ targets.mT
    return squared.clamp(min=SQUARED_DISTANCE_FLOOR / unit.square()).sqrt()


def affinity(
    distance: Tensor,
    temperature: float,
    *,
    normalize_over: NormalizeOver = "xy",
    mask_self: bool = False,
    floor: float = 0.0,
) -> Tensor:
    """Kernel k(x, y) = exp(-distance / temperature), normalised as Table 11 names it (Eq. 12, Alg. 2).

    Args:
        distance: `[..., N, T]`.
        temperature: in the unit of `distance`, > 0.
        normalize_over: "xy": geometric mean of the softmax over targets and the softmax over x; "y": softmax over
            targets; "none": the bare kernel.
        mask_self: the first N targets are x itself; a sample has no affinity to itself.
        floor: lower bound of the squared affinity (the release: 1e-6).

    Returns:
        `[..., N, T]`, not negative.

    >>> affinity(torch.tensor([[1.0, 1.0]]), 0.5, normalize_over="y").tolist()
    [[0.5, 0.5]]
    """
    logits = -distance / temperature  # [..., N, T]
    if mask_self:
        self_pair = torch.eye(*logits.shape[-2:], dtype=torch.bool, device=logits.device)
        # finite, so that a column of nothing but masked pairs (N = 1) still has a softmax
        logits = logits.masked_fill(self_pair, torch.finfo(logits.dtype).min)
    if normalize_over == "xy":
        return (logits.softmax(-1) * logits.softmax(-2)).clamp(min=floor).sqrt()
    kernel = logits.softmax(-1) if normalize_over == "y" else logits.exp()
    return kernel.clamp(min=floor**0.5)
