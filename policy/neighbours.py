"""Observations that are near each other: their demonstrations are further positives of one another."""

import torch
from torch import Tensor


def nearest_windows(observations: Tensor, count: int) -> Tensor:
    """For each observation itself and the nearest others.

    Args:
        observations: `[W, D]`, normalised.
        count: how many, itself included; at most W.

    Raises:
        ValueError: there are not that many.

    Returns:
        int64 `[W, count]`, itself first, then by distance.

    >>> nearest_windows(torch.tensor([[0.0], [1.0], [5.0]]), 2).tolist()
    [[0, 1], [1, 0], [2, 1]]
    """
    from scipy.spatial import KDTree

    if not 1 <= count <= len(observations):
        raise ValueError(f"count: expected 1 to {len(observations)}, the number of observations, found {count}")
    points = observations.numpy()
    _, found = KDTree(points).query(points, k=[*range(1, count + 1)])
    nearest = torch.from_numpy(found).long()
    own = torch.arange(len(nearest))[:, None]
    # Equal observations may stand before a point itself: it is moved to the front, or takes the last one's place.
    order = (nearest != own).long().argsort(dim=1, stable=True)
    nearest = nearest.gather(1, order)
    missing = nearest[:, :1] != own
    return torch.where(missing, torch.cat([own, nearest[:, :-1]], 1), nearest)
