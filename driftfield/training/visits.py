"""Visits of samples: the n-th look at a sample has a number of its own, on which all its randomness depends."""

import torch
from torch import Tensor

from driftfield.training.seeding import generator


def sample_ids(visits: Tensor, count: int) -> Tensor:
    """The sample that each visit looks at: visit = epoch * count + id.

    Args:
        visits: `[k]` int64.
        count: samples in all.

    Raises:
        ValueError: a wrong shape or dtype, or a negative visit.

    Returns:
        Ids in 0 .. count - 1, `[k]` int64.

    >>> sample_ids(torch.tensor([3, 13, 29]), 10).tolist()
    [3, 3, 9]
    """
    if visits.dtype != torch.int64 or visits.ndim != 1:
        raise ValueError(f"visits: expected int64 [k], found {visits.dtype} {list(visits.shape)}")
    if len(visits) and int(visits.min()) < 0:
        raise ValueError(f"visits: expected numbers from 0 on, found {int(visits.min())}")
    return visits % count


class Epochs:
    """The endless sequence of visits: every epoch each sample once, in an order of its own.

    Args:
        num: samples of an epoch.
        seed: of the orders.

    >>> epochs = Epochs(5, seed=0)
    >>> sorted(epochs(0, 5).tolist()), sorted(epochs(5, 5).tolist())
    ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    """

    def __init__(self, num: int, *, seed: int) -> None:
        self._num, self._seed = num, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # the epoch last asked for, and its order

    def __call__(self, start: int, count: int) -> Tensor:
        """Visits `start` to `start + count` of the sequence, `[count]` int64."""
        parts = []
        while count:
            epoch, offset = divmod(start, self._num)
            if self._order[0] != epoch:
                self._order = (epoch, torch.randperm(self._num, generator=generator(self._seed, "order", epoch)))
            part = self._order[1][offset : offset + count]
            parts.append(epoch * self._num + part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)
