"""Windows of episodes, as a policy learns from them, and which episodes it learns from (Diffusion Policy's protocol).

With horizon 4, pad_before 1, pad_after 2, an episode of five steps gives the windows

    start -1:  0 0 1 2          steps outside of the episode repeat its first or last one
    start  0:    0 1 2 3
    start  1:      1 2 3 4
    start  2:        2 3 4 4
    start  3:          3 4 4 4

so that in training as in acting a first observation may stand for those before it, and a chunk may reach past the end.
"""

from typing import Any, NamedTuple

import numpy as np


class Windows:
    """The windows of all episodes, by number: episode after episode, in each by their start.

    An episode of L steps has a window for every start from -pad_before to L - horizon + pad_after; one that is too
    short for this has the first of them alone.

    Args:
        episode_ends: int `[E]`, for each episode the row after its last one.
        horizon: steps of a window.
        pad_before: most steps that a window may reach before the episode; horizon - 1 at most counts.
        pad_after: most steps that it may reach past the end, likewise.
        episodes: which episodes, in increasing order; all if not given.

    Raises:
        ValueError: ends that do not increase, a horizon below 1, padding below 0, or no such episodes.

    >>> windows = Windows([5], horizon=4, pad_before=1, pad_after=2)
    >>> len(windows), windows.indices([0, 4]).tolist()
    (5, [[0, 0, 1, 2], [3, 4, 4, 4]])
    """

    def __init__(
        self, episode_ends: Any, *, horizon: int = 16, pad_before: int = 1, pad_after: int = 7, episodes: Any = None
    ) -> None:
        if horizon < 1 or pad_before < 0 or pad_after < 0:
            raise ValueError(
                f"expected horizon >= 1, pad_before >= 0 and pad_after >= 0, found {horizon}, {pad_before}, {pad_after}"
            )
        ends = np.asarray(episode_ends, np.int64)
        lengths = np.diff(ends, prepend=0)  # [E]
        if ends.ndim != 1 or not len(ends) or (lengths <= 0).any():
            raise ValueError(f"episode_ends: expected increasing numbers [E] above 0, found {ends.tolist()[:10]}")
        chosen = np.arange(len(ends)) if episodes is None else _checked_episodes(episodes, len(ends))
        self.horizon = horizon
        self.pad_before, self.pad_after = min(pad_before, horizon - 1), min(pad_after, horizon - 1)
        self._lengths, self._rows = lengths[chosen], (ends - lengths)[chosen]  # [e]: steps, and row of the first one
        starts = self._lengths - horizon + self.pad_after + self.pad_before + 1
        self._ends = np.cumsum(np.maximum(starts, 1))  # [e]: number of the window after the episode's last one

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def first_windows(self) -> np.ndarray:
        """Number of the window at each episode's beginning, int64 `[e]`.

        >>> Windows([5, 9], horizon=4, pad_before=1, pad_after=2).first_windows.tolist()
        [0, 5]
        """
        return np.concatenate([[0], self._ends[:-1]]).astype(np.int64)

    def indices(self, k: Any) -> np.ndarray:
        """Rows of windows.

        Args:
            k: numbers of windows, int `[B]`.

        Raises:
            IndexError: there is no such window.

        Returns:
            int64 `[B, horizon]`.
        """
        k = np.asarray(k)
        if k.ndim != 1 or k.dtype.kind not in "iu" or (len(k) and not 0 <= k.min() <= k.max() < len(self)):
            raise IndexError(
                f"k: expected integers [B] from 0 to {len(self) - 1}, found {k.dtype} {list(k.shape)}"
                + (f" from {k.min()} to {k.max()}" if k.size else "")
            )
        episode = np.searchsorted(self._ends, k, side="right")  # [B]
        before = np.where(episode > 0, self._ends[episode - 1], 0)
        start = k - before - self.pad_before
        steps = start[:, None] + np.arange(self.horizon)  # [B, T]
        rows: np.ndarray = self._rows[episode, None] + steps.clip(0, self._lengths[episode, None] - 1)
        return rows


class Split(NamedTuple):
    """Numbers of episodes, increasing, int64 each."""

    train: np.ndarray
    validation: np.ndarray


def validation_split(num_episodes: int, share: float = 0.02, seed: int = 42) -> Split:
    """Set episodes aside: the share of them, rounded, but at least one; and never all.

    Args:
        num_episodes: in all.
        share: of them; 0 sets none aside.
        seed: of NumPy's default generator.

    Raises:
        ValueError: no episodes, or a share that is none.

    >>> len(validation_split(206).train), len(validation_split(206).validation)
    (202, 4)
    """
    if num_episodes < 1 or not 0 <= share < 1:
        raise ValueError(f"expected num_episodes >= 1 and 0 <= share < 1, found {num_episodes} and {share}")
    count = min(max(1, round(num_episodes * share)), num_episodes - 1) if share else 0
    validation = np.sort(np.random.default_rng(seed).choice(num_episodes, count, replace=False))
    return Split(np.setdiff1d(np.arange(num_episodes), validation), validation.astype(np.int64))


def keep_episodes(train: Any, count: int, seed: int = 42) -> np.ndarray:
    """Choose that many of the episodes; all, if there are no more.

    Args:
        train: numbers of episodes.
        count: how many to keep.
        seed: of NumPy's default generator.

    Raises:
        ValueError: nothing would be kept.

    Returns:
        Numbers of episodes, increasing, int64.

    >>> keep_episodes([3, 5, 9], 90).tolist()
    [3, 5, 9]
    """
    episodes = np.asarray(train, np.int64)
    if count < 1:
        raise ValueError(f"count: expected at least 1, found {count}")
    if len(episodes) <= count:
        return np.sort(episodes)
    return np.sort(episodes[np.random.default_rng(seed).choice(len(episodes), count, replace=False)])


def _checked_episodes(episodes: Any, num_episodes: int) -> np.ndarray:
    chosen = np.asarray(episodes, np.int64)
    if chosen.ndim != 1 or not len(chosen) or (np.diff(chosen, prepend=-1) <= 0).any() or chosen[-1] >= num_episodes:
        raise ValueError(
            f"episodes: expected increasing numbers from 0 to {num_episodes - 1}, found {chosen.tolist()[:10]}"
        )
    return chosen
