"""Visits of images: the n-th look at an image has a number of its own, on which all its randomness depends."""

import torch
from torch import Tensor


def image_ids(visits: Tensor, count: int) -> Tensor:
    """The image that each visit looks at: visit = epoch * count + id.

    Args:
        visits: `[k]` int64.
        count: images in all.

    Raises:
        ValueError: a wrong shape or dtype, or a negative visit.

    Returns:
        Ids in 0 .. count - 1, `[k]` int64.

    >>> image_ids(torch.tensor([3, 13, 29]), 10).tolist()
    [3, 3, 9]
    """
    if visits.dtype != torch.int64 or visits.ndim != 1:
        raise ValueError(f"visits: expected int64 [k], found {visits.dtype} {list(visits.shape)}")
    if len(visits) and int(visits.min()) < 0:
        raise ValueError(f"visits: expected numbers from 0 on, found {int(visits.min())}")
    return visits % count
