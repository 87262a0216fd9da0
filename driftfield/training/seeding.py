"""Randomness as a function of what it is for, never of what was drawn before.

A draw that depends on (seed, purpose, step, sample slot) alone is the same after a resume, on any number of ranks and
with any number of loader workers, so there is no random state to save.
"""

import hashlib
import json
import random
import sys

import torch


def derive_seed(seed: int, *path: int | str) -> int:
    """Hash a seed and a path to 64 bits (BLAKE2).

    Args:
        seed: the run's seed.
        path: what the randomness is for, such as ``"noise", step, slot``. ``1`` and ``"1"`` differ.

    Raises:
        TypeError: if a part is neither int nor str.

    Returns:
        An integer in [0, 2**64).

    >>> derive_seed(0, "noise", 1, 2) == derive_seed(0, "noise", 1, 2), derive_seed(0, 12) == derive_seed(0, 1, 2)
    (True, False)
    """
    for part in (seed, *path):
        if type(part) not in (int, str):
            raise TypeError(f"path of a seed: expected int or str, found {type(part).__name__} {part!r}")
    text = json.dumps([seed, *path])  # quotes and commas keep ("ab", "c") apart from ("a", "bc")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator for one purpose, such as ``generator(seed, "noise", step, slot)``.

    PyTorch's generator on the CPU keeps the lower 32 bits of its seed, so among 65,000 purposes two draw the same
    numbers with probability 1/2: harmless for noise, not for secrets.

    Args:
        seed: the run's seed.
        path: what the randomness is for; never the rank, or the draw would depend on the number of ranks.
        device: where the generator lives.

    Raises:
        TypeError: if a part of the path is neither int nor str.

    Returns:
        A freshly seeded generator.

    >>> first, again = (torch.randn(3, generator=generator(0, "noise", 1)) for _ in range(2))
    >>> torch.equal(first, again)
    True
    """
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *path))


def seed_everything(seed: int, rank: int, step: int) -> None:
    """Seed the global generators of Python, NumPy (if imported) and PyTorch for one step.

    Args:
        seed: the run's seed.
        rank: this process's rank, so that ranks draw differently.
        step: the step about to run, so that a resumed step draws as the uninterrupted one.

    >>> seed_everything(0, rank=0, step=7)
    """
    random.seed(derive_seed(seed, "python", rank, step))
    torch.manual_seed(derive_seed(seed, "torch", rank, step))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(derive_seed(seed, "numpy", rank, step) % 2**32)
