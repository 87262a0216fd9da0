"""Batch-wide scalars: the scale of the features (Eq. 21) and the norm of the drift (Eq. 25).

Each is a mean over all groups of all processes, so that the loss does not depend on how a batch is divided. Sums and
counts are therefore kept apart until everything is added up.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(total: Tensor) -> Tensor:
    """Sum of `total` over all processes; `total` itself where there is only one.

    >>> sum_over_processes(torch.tensor([3.0])).tolist()
    [3.0]
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total = total.clone()
        dist.all_reduce(total)
    return total


def distance_sums(distance: Tensor, weight: Tensor, unit: Tensor) -> Tensor:
    """Numerator and denominator of the feature scale s = mean(distance · w) / mean(w)  (Eq. 21).

    Args:
        distance: `[..., N, T]` in units of `unit`.
        weight: w, `[..., T]`.

    Returns:
        `[2]`; s is the first over the second.
    """
    weighted = (distance * weight[..., None, :]).sum() * unit
    return torch.stack([weighted, distance.shape[-2] * weight.sum()])


def force_sums(forces: list[Tensor]) -> Tensor:
    """Numerators, one per temperature, and the denominator of λ² = mean(F²)  (Eq. 25).

    Args:
        forces: one `[..., N, D]` per temperature.

    Returns:
        `[temperatures + 1]`; λ² is the first ones over the last.
    """
    squares = [force.square().sum() for force in forces]
    return torch.stack([*squares, squares[0].new_tensor(forces[0].numel())])
