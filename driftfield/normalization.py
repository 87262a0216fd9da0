"""Batch-wide scalars: the scale of the features (Eq. 21) and the norm of the drift (Eq. 25).

Each is a mean over all groups of all processes, so that the loss does not depend on how a batch is divided. Sums and
counts are therefore kept apart until everything is added up.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from driftfield.kernel import CentredPoints


def sum_over_processes(total: Tensor) -> Tensor:
    """Sum of `total` over all processes; `total` itself where there is only one.

    >>> sum_over_processes(torch.tensor([3.0])).tolist()
    [3.0]
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total = total.clone()
        dist.all_reduce(total)
    return total


def distance_sums(distance: Tensor, weight: Tensor) -> Tensor:
    """Numerator and denominator of the feature scale s = mean(distance · w) / mean(w)  (Eq. 21).

    Args:
        distance: `[..., N, T]`.
        weight: w, `[..., T]`.

    Returns:
        `[2]`; s is the first over the second.
    """
    return torch.stack([(distance * weight[..., None, :]).sum(), distance.shape[-2] * weight.sum()])


def force_sums(forces: list[Tensor]) -> Tensor:
    """Numerators, one per temperature, and the denominator of λ² = mean(F²)  (Eq. 25).

    Args:
        forces: one `[..., N, D]` per temperature.

    Returns:
        `[temperatures + 1]`; λ² is the first ones over the last.
    """
    squares = [torch.linalg.vector_norm(force, dim=-1).square().sum() for force in forces]
    return torch.stack([*squares, forces[0].new_full((), forces[0].numel())])


def count_varying(points: CentredPoints, dtype: torch.dtype) -> Tensor:
    """How many coordinates differ between the points of their group by more than rounding.

    Rounding is one unit in the last place of `dtype`, and what a product with a matrix of some hundred columns adds
    in float32: up to 13 units of the points' mean magnitude were seen, and 64 are allowed. Features whose every
    coordinate spreads by less than 8e-6 of their magnitude (float32) carry no usable signal either way.

    Args:
        points: of all groups, float32 or float64.
        dtype: of the points as they were given.

    Returns:
        `[]`, in the dtype of the points.
    """
    spread = points.highest - points.lowest  # [..., 1, D]
    magnitude = torch.maximum(points.highest.abs(), points.lowest.abs())
    typical = magnitude.mean(-1, keepdim=True)  # [..., 1, 1]
    rounding = torch.finfo(dtype).eps * magnitude + 64.0 * torch.finfo(spread.dtype).eps * typical
    return (~(spread <= rounding)).sum().to(spread.dtype)  # NaN differs
