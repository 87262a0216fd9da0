"""Entropic couplings of samples and targets, and the field between their barycentres (arXiv 2603.12366, 2605.11755)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from driftfield.forces import displacement

SecondBatch = Literal["self", "halves"]
NO_MASS = -1e30  # logarithm of a mass of 0: below every other, yet finite, where -inf would make NaN


def couplings(
    distance: Tensor,
    mass: Tensor,
    temperatures: Sequence[float],
    *,
    iterations: int,
    mask_self: bool = False,
) -> list[Tensor]:
    """Entropic couplings of x, all of one mass, and targets of given masses, by Sinkhorn's iterations of logarithms.

    A coupling is exp(-distance / τ) with rows and columns scaled until their sums are the masses. The columns come
    before the rows, which therefore have their masses after any number of iterations; without any it is the softmax
    over targets. The largest τ goes first, and hands on its potentials, which small τ alone would take long to find.

    Args:
        distance: `[..., N, T]`.
        mass: `[..., T]`, not negative, of any sum; 0 removes a target, and of nothing but 0 comes no coupling.
        temperatures: τ, each > 0, in the unit of `distance`.
        iterations: of each τ, >= 0.
        mask_self: the first N targets are x itself, and no sample is coupled with itself.

    Returns:
        For every τ the coupling times N, `[..., N, T]`: rows sum to 1 (to 0 without mass).

    >>> distance, mass = torch.tensor([[1.0, 2.0], [1.5, 4.0]]), torch.ones(2)
    >>> couplings(distance, mass, [0.05], iterations=50)[0].round().tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    num_samples = distance.shape[-2]
    if mask_self and num_samples == 1:  # a column without a row it may be coupled with
        mass, mask_self = torch.cat([torch.zeros_like(mass[..., :1]), mass[..., 1:]], -1), False
    total = mass.sum(-1, keepdim=True)
    log_mass = torch.where(mass > 0, (mass / total).log(), NO_MASS)  # [..., T]
    potential = torch.zeros_like(distance[..., 0, :])  # of the columns, in the unit of `distance`  [..., T]
    found = {}
    for index in sorted(range(len(temperatures)), key=lambda index: -temperatures[index]):
        logits = distance / -temperatures[index]  # [..., N, T]
        if mask_self:
            self_pair = torch.eye(*logits.shape[-2:], dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(self_pair, -math.inf)
        column = potential / temperatures[index]
        for _ in range(iterations):
            row = -(logits + (column + log_mass)[..., None, :]).logsumexp(-1, keepdim=True)  # [..., N, 1]
            column = -(logits + row).logsumexp(-2)  # up to a constant, which the rows take back
        potential = column * temperatures[index]
        coupling = (logits + (column + log_mass)[..., None, :]).softmax(-1)
        found[index] = torch.where(total[..., None] > 0, coupling, 0.0)
    return [found[index] for index in range(len(temperatures))]


def sinkhorn_drift(
    distance: Tensor,
    temperatures: Sequence[float],
    x: Tensor,
    targets: Tensor,
    num_negatives: int,
    *,
    iterations: int,
    second_batch: SecondBatch = "self",
    negative_weight: Tensor | None = None,
    mask_self: bool = False,
    attraction: float = 1.0,
    repulsion: float = 1.0,
) -> list[Tensor]:
    """V = barycentre of y+ coupled with x - barycentre of y- coupled with x, for every τ.

    Args:
        distance: `[..., N, T]`.
        temperatures: τ, each > 0, in the unit of `distance`.
        x: `[..., N, D]`.
        targets: `[..., T, D]`, the negatives first.
        num_negatives: M, how many of the T targets repel.
        iterations: of each τ and coupling, >= 0.
        second_batch: "self": x is coupled with the negatives as they are. "halves": the first N negatives are x; each
            half of x is a batch of its own, coupled with the positives, and with the other half in place of itself.
        negative_weight: `[..., M]`, masses of the negatives; 1 if absent.
        mask_self: see `couplings`; halves need no mask.
        attraction, repulsion: factors on the two barycentres, relative to x.

    Raises:
        ValueError: halves of one sample.

    Returns:
        V of every τ, `[..., N, D]`.

    >>> x, targets = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0], [4.0], [-3.0]])
    >>> distance = (x - targets.T).abs()
    >>> sinkhorn_drift(distance, [0.01], x, targets, 2, iterations=9)[0].flatten().tolist()
    [-3.0, 3.0]
    """
    num_samples = x.shape[-2]
    ones = distance.new_ones(*distance.shape[:-2], distance.shape[-1])
    positive_mass, negative_mass = ones[..., num_negatives:], ones[..., :num_negatives]
    if negative_weight is not None:
        negative_mass = negative_mass * negative_weight
    parts = []
    for rows in _batches(num_samples, second_batch):
        part = distance[..., rows, :]
        mass = negative_mass
        if second_batch == "halves":
            own = torch.zeros(num_negatives, dtype=torch.bool, device=mass.device)
            own[rows] = True
            mass = mass.masked_fill(own, 0.0)
        repel = couplings(
            part[..., :num_negatives],
            mass,
            temperatures,
            iterations=iterations,
            mask_self=mask_self and second_batch == "self",
        )
        attract = couplings(part[..., num_negatives:], positive_mass, temperatures, iterations=iterations)
        pairs = zip(repel, attract, strict=True)
        parts.append([torch.cat([minus * -repulsion, plus * attraction], -1) for minus, plus in pairs])
    coefficients = [torch.cat(halves, -2) for halves in zip(*parts, strict=True)]  # [..., N, T] of every τ
    return [displacement(coefficient, x, targets) for coefficient in coefficients]


def _batches(num_samples: int, second_batch: SecondBatch) -> list[slice]:
    if second_batch == "self":
        return [slice(0, num_samples)]
    if num_samples < 2:
        raise ValueError("second_batch='halves' needs at least 2 generated samples, got 1")
    return [slice(0, num_samples // 2), slice(num_samples // 2, num_samples)]
