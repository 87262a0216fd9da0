"""Distances and the kernel exp(-distance / temperature) with its normalisations (Eq. 12, Table 11)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

SQUARED_DISTANCE_FLOOR = 1e-8  # the release's; keeps coinciding points at distance 1e-4

NormalizeOver = Literal["xy", "y", "x", "none"]


class CentredPoints(NamedTuple):
    """Points relative to the centre of their group, divided by `unit`: same field, no cancellation, no overflow."""

    points: Tensor  # [..., K, D]
    unit: Tensor  # [..., 1, 1], a power of two, at least 1
    lowest: Tensor  # [..., 1, D], the bounds of each coordinate before centring
    highest: Tensor  # [..., 1, D]


def centre(points: Tensor) -> CentredPoints:
    """Move every group to its mean, and shrink values whose squares would overflow.

    |x|² + |y|² - 2 x·y cancels when points lie far from the origin, so the origin moves to the points. Division by a
    power of two is exact.

    Args:
        points: `[..., K, D]`, float32 or float64.

    Returns:
        The same points as `CentredPoints`.

    >>> centre(torch.tensor([[100.0], [101.0]])).points.flatten().tolist()
    [-0.5, 0.5]
    """
    mean = points.mean(-2, keepdim=True)
    return centre_at(points, mean, points.amin(-2, keepdim=True), points.amax(-2, keepdim=True))


def centre_at(points: Tensor, mean: Tensor, lowest: Tensor, highest: Tensor) -> CentredPoints:
    """As `centre`, for points that are a part of their group.

    Args:
        points: `[..., K, D]`, float32 or float64.
        mean, lowest, highest: of each coordinate over the whole group, `[..., 1, D]`.

    Returns:
        The same points as `CentredPoints`.

    >>> whole = torch.tensor([[100.0], [101.0]])
    >>> centre_at(whole[1:], whole.mean(0, keepdim=True), whole[:1], whole[1:]).points.item()
    0.5
    """
    # Rounding may put the mean of equal points beside them; between the bounds it is they, and they become exactly 0.
    mean = mean.clamp(lowest, highest)
    extent = (highest - lowest).amax(-1, keepdim=True)
    unit = torch.exp2(torch.ceil(torch.log2(extent.clamp(min=1.0))))
    return CentredPoints((points - mean).div_(unit), unit, lowest, highest)


def distances(x: Tensor, targets: Tensor, unit: Tensor) -> Tensor:
    """Euclidean distances from each x to each target of its group, never below 1e-4 (0 where points spread over 1e19).

    Args:
        x: `[..., N, D]`, some of the points that `centre` returned.
        targets: `[..., T, D]`, likewise.
        unit: theirs, `[..., 1, 1]`.

    Returns:
        `[..., N, T]`, in the unit of the points before `centre`.

    >>> points, unit, *_ = centre(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    >>> [round(distance, 3) for distance in distances(points[:1], points, unit).flatten().tolist()]
    [0.0, 5.0]
    """
    x_norm, target_norm = (torch.linalg.vector_norm(points, dim=-1).square() for points in (x, targets))
    x_norm, target_norm = x_norm[..., :, None], target_norm[..., None, :]
    squared = torch.sub(x_norm + target_norm, x @ targets.mT, alpha=2.0)  # [..., N, T]
    # Equal points (a sample and itself, a real sample given twice) have equal norms to the bit, and what is left of
    # their distance is rounding, some 1e-3 of the norm in float32: too much beside τ = 0.02.
    rounding = (8.0 + x.shape[-1] ** 0.5) * torch.finfo(x.dtype).eps
    coincide = (x_norm == target_norm) & (squared <= rounding * x_norm)
    squared = squared.masked_fill(coincide, 0.0)
    return squared.clamp(min=SQUARED_DISTANCE_FLOOR / unit.square()).sqrt() * unit


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
            targets; "x": softmax over x; "none": the bare kernel.
        mask_self: the first N targets are x itself; a sample has no affinity to itself.
        floor: lower bound of the squared affinity (the release: 1e-6).

    Returns:
        `[..., N, T]`, not negative.

    >>> affinity(torch.tensor([[1.0, 1.0]]), 0.5, normalize_over="y").tolist()
    [[0.5, 0.5]]
    """
    logits = distance / -temperature  # [..., N, T]
    if mask_self:
        self_pair = torch.eye(*logits.shape[-2:], dtype=torch.bool, device=logits.device)
        # finite, so that a column of nothing but masked pairs (N = 1) still has a softmax
        logits = logits.masked_fill(self_pair, torch.finfo(logits.dtype).min)
    if normalize_over == "xy":
        return (logits.softmax(-1) * logits.softmax(-2)).clamp(min=floor).sqrt()
    kernel = logits.exp() if normalize_over == "none" else logits.softmax(-1 if normalize_over == "y" else -2)
    return kernel.clamp(min=floor**0.5)
