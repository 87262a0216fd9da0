"""Randomness as a function of its purpose alone: the same on any rank, after any resume, in any order."""

import itertools
import random
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from driftfield.training import derive_seed, generator, seed_everything

SLOTS = 16


def noise_of_step(seed: int, step: int, world_size: int) -> Tensor:
    """Noise of a global batch whose slots are dealt out over ranks, gathered in the order of the slots."""

    def draw(slot: int) -> Tensor:
        return torch.randn(3, generator=generator(seed, "noise", step, slot))

    shares = [{slot: draw(slot) for slot in range(rank, SLOTS, world_size)} for rank in range(world_size)]
    gathered = {slot: noise for share in shares for slot, noise in share.items()}
    return torch.stack([gathered[slot] for slot in range(SLOTS)])


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_the_number_of_ranks_does_not_matter(world_size: int) -> None:
    assert torch.equal(noise_of_step(0, 5, world_size), noise_of_step(0, 5, 1))
    assert not torch.equal(noise_of_step(0, 6, world_size), noise_of_step(0, 5, world_size))
    assert not torch.equal(noise_of_step(1, 5, world_size), noise_of_step(0, 5, world_size))


def test_purposes_do_not_collide() -> None:
    parts: list[int | str] = [0, 1, -1, 10, 2**40, "", "0", "1", "a", "b", "ab", "a,b", '"', '","', "ä", "noise"]
    paths = [path for length in range(4) for path in itertools.product(parts, repeat=length)]
    seeds = {derive_seed(seed, *path) for path in paths for seed in (0, 1)}
    assert len(seeds) == 2 * len(paths)


def test_a_seed_is_64_evenly_used_bits() -> None:
    seeds = [derive_seed(0, "bits", i) for i in range(4000)]
    assert all(0 <= seed < 2**64 for seed in seeds)
    for bit in range(64):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - 2000) < 5 * 4000**0.5 / 2, f"bit {bit}"  # five standard deviations


def test_streams_of_neighbouring_purposes_are_uncorrelated() -> None:
    noise = torch.stack([torch.randn(512, generator=generator(0, "noise", 0, slot)) for slot in range(200)])
    correlation = torch.corrcoef(noise) - torch.eye(200)  # of standard deviation 512^-1/2
    assert correlation.abs().max() < 6 * 512**-0.5
    assert abs(correlation.pow(2).mean() * 512 - 1) < 0.05


def test_the_seed_is_the_hash_that_the_docstring_names() -> None:
    """BLAKE2b of 8 bytes over the JSON list, little-endian, as `b2sum -l 64` prints it for [0, "noise", 3]."""
    printed = "cbe497c23f33f8bb"
    assert derive_seed(0, "noise", 3) == int.from_bytes(bytes.fromhex(printed), "little")


@pytest.mark.parametrize("part", [1.0, True, None, ("a",), np.int64(1), torch.tensor(1)])
def test_other_parts_of_a_path_are_refused(part: object) -> None:
    with pytest.raises(TypeError, match="expected int or str, found"):
        derive_seed(0, part)  # type: ignore[arg-type]


def global_draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002 - what is tested


def test_every_global_generator_is_seeded_by_seed_rank_and_step() -> None:
    def draws(*arguments: int) -> list[float]:
        seed_everything(*arguments)
        return global_draws()

    first = draws(0, 0, 0)
    global_draws()
    assert draws(0, 0, 0) == first
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert all(a != b for a, b in zip(draws(*other), first, strict=True)), other


def test_without_numpy_the_others_are_seeded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(0, 0, 0)
    python, _, pytorch = global_draws()
    monkeypatch.delitem(sys.modules, "numpy")
    seed_everything(0, 0, 0)
    assert "numpy" not in sys.modules
    assert (random.random(), float(torch.rand(()))) == (python, pytorch)
