"""Temporal ensembling: smoother actions from chunks that overlap (Zhao et al. 2023, Action Chunking, section IV-A)."""

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class TemporalEnsemble:
    """The mean of what all chunks so far say about the present step, weighted exp(-decay i), i = 0 for the oldest.

    It smooths the seams between chunks, at the price of a prediction for every step (or every few). Where a policy
    draws each chunk from several modes, the mean of two chunks of different modes lies between them, where no
    demonstration is: averaging undoes multimodality. Then execute Ta steps of each chunk instead. The same holds for
    actions that can't be averaged, such as rotations as axis and angle (the 6 numbers of two rows can).

    Args:
        decay: 0 weighs all chunks alike, more prefers older chunks (the source's 0.01: almost alike), less newer ones.

    Raises:
        ValueError: the decay is not finite.

    >>> ensemble = TemporalEnsemble(decay=0.0)
    >>> ensemble.add(np.array([[[1.0], [2.0]]]))
    >>> ensemble.add(np.array([[[3.0], [4.0]]]))
    >>> ensemble.action().tolist(), ensemble.action().tolist()
    ([[2.0]], [[3.0]])
    """

    def __init__(self, decay: float = 0.01) -> None:
        if not math.isfinite(decay):
            raise ValueError(f"decay: expected a finite number, found {decay}")
        self.decay = decay
        self._chunks: deque[Array] = deque()  # oldest first, [B, T', A] each: what is left from the present step on

    def reset(self) -> None:
        """Forget all chunks: a new episode begins."""
        self._chunks.clear()

    def add(self, chunk: NDArray[np.floating]) -> None:
        """Take in a prediction.

        Args:
            chunk: actions `[B, T, A]`, the first for the present step; of a policy with To observations, steps
                To - 1 and later of the whole chunk.

        Raises:
            ValueError: an empty chunk, one that is not finite, or of other rows or actions than those before.
        """
        actions: Array = np.array(chunk, np.float64)
        if actions.ndim != 3 or not actions.size:
            raise ValueError(f"chunk: expected actions [B, T, A], found shape {actions.shape}")
        if not np.isfinite(actions).all():
            raise ValueError("chunk: expected finite actions, found NaN or infinity")
        if self._chunks and self._chunks[-1][:, 0].shape != actions[:, 0].shape:
            rows, size = self._chunks[-1][:, 0].shape
            raise ValueError(f"chunk: expected [{rows}, T, {size}] as before, found shape {actions.shape}")
        self._chunks.append(actions)

    def action(self) -> Array:
        """Actions `[B, A]` for the present step; the next one is the present one from then on.

        Raises:
            ValueError: no chunk reaches this far.
        """
        if not self._chunks:
            raise ValueError("no chunk reaches the present step: add one first")
        exponents = -self.decay * np.arange(len(self._chunks))
        weights = np.exp(exponents - exponents.max())
        mean: Array = np.einsum("n,nba->ba", weights / weights.sum(), [chunk[:, 0] for chunk in self._chunks])
        self._chunks = deque(chunk[:, 1:] for chunk in self._chunks if chunk.shape[1] > 1)
        return mean
