"""Random numbers of a batch that is spread over processes."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Random numbers of some rows of a batch: those that they get where one process draws them for the whole batch.

    So each process draws for all rows and keeps its own, and no number depends on how many processes there are.

    Args:
        generator: where they come from, drawn on its device; None is PyTorch's global one, on the CPU.
        rows: the rows of the batch that are wanted; None: all.
        size: rows of the whole batch; needed with `rows`.

    Raises:
        ValueError: rows that the batch does not have.

    >>> whole, part = (torch.Generator().manual_seed(5) for _ in range(2))
    >>> torch.equal(Draws(part, range(1, 3), 4).normal((2, 3)), Draws(whole).normal((4, 3))[1:3])
    True
    """

    def __init__(self, generator: torch.Generator | None = None, rows: range | None = None, size: int = 0) -> None:
        if rows is not None and not 0 <= rows.start <= rows.stop <= size:
            raise ValueError(f"rows: expected a range within a batch of {size}, found {rows}")
        self.generator, self._rows, self._size = generator, rows, size
        self._device = torch.device("cpu") if generator is None else generator.device

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float32.

        Args:
            shape: (B, ...), B of the rows that are wanted.

        Raises:
            ValueError: B is another number.
        """
        return self._mine(torch.randn(self._whole(shape), generator=self.generator, device=self._device))

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Integers from 0 to high - 1, int64; shape and errors as for `normal`."""
        return self._mine(torch.randint(high, self._whole(shape), generator=self.generator, device=self._device))

    def _whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self._rows is None:
            return tuple(shape)
        if shape[0] != len(self._rows):
            raise ValueError(f"shape: expected {len(self._rows)} rows, found {shape[0]}")
        return (self._size, *shape[1:])

    def _mine(self, numbers: Tensor) -> Tensor:
        return numbers if self._rows is None else numbers[self._rows.start : self._rows.stop]
