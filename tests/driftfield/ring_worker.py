"""One process of test_ring: its part of the samples of every group through the loss, results written to a folder.

Usage: python ring_worker.py RANK FOLDER, started for RANK 0 to 2.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from driftfield import DriftingBatch, DriftingLoss

Arrays = dict[str, np.ndarray]
PARTS = {  # N, P, M of each rank, per world size
    1: [(7, 6, 3)],
    2: [(5, 2, 3), (2, 4, 0)],
    3: [(1, 3, 1), (4, 1, 0), (2, 2, 2)],
}


def whole_batch() -> DriftingBatch:
    """Groups `[2, 3]` that differ in spread, and parts that differ in place: local results are wrong ones."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-0.5, 0.5, 6).view(2, 3, 1, 1)
    x, positives, unconditional = (
        spread * (torch.randn(2, 3, num, 5, generator=generator) + torch.linspace(0, 2, num)[:, None] + 3)
        for num in PARTS[1][0]
    )
    return DriftingBatch(x, positives, unconditional, torch.rand(2, 3, 3, generator=generator) + 0.5)


def with_duplicates() -> DriftingBatch:
    """Far from the origin, and samples that several processes have: their distance must be exactly 0."""
    x, positives, unconditional, weight = (part.clone() for part in whole_batch())
    x, positives, unconditional = (part + 1000 for part in (x, positives, unconditional))
    x[..., 6, :] = x[..., 0, :]
    positives[..., 0, :] = x[..., 5, :]
    positives[..., 5, :] = x[..., 2, :]
    return DriftingBatch(x, positives, unconditional, weight)


def with_equal_samples() -> DriftingBatch:
    """Every group is one point given many times."""
    return DriftingBatch(*(torch.full_like(part, 0.3) for part in whole_batch()[:3]))


def part_of(batch: DriftingBatch, world: int, rank: int) -> DriftingBatch:
    def own(samples: Tensor, kind: int, dim: int) -> Tensor:
        return samples.split([counts[kind] for counts in PARTS[world]], dim)[rank].contiguous()

    x, positives, unconditional, weight = batch
    assert unconditional is not None
    kept = PARTS[world][rank][2] > 0
    return DriftingBatch(
        own(x, 0, -2),
        own(positives, 1, -2),
        own(unconditional, 2, -2) if kept else None,
        own(weight, 2, -1) if kept and weight is not None else None,
    )


def compute(loss_fn: DriftingLoss, batch: DriftingBatch, **keywords: Any) -> Arrays:
    """The loss and the gradient of its sum."""
    batch = batch._replace(x=batch.x.clone().requires_grad_())
    output = loss_fn(*batch, **keywords)
    output.loss.sum().backward()
    assert batch.x.grad is not None
    arrays = {name: value.detach().numpy() for name, value in output._asdict().items()}
    return {**arrays, "gradient": batch.x.grad.float().numpy()}


def own_part(
    world: int,
    rank: int,
    *,
    batch: Callable[[], DriftingBatch] = whole_batch,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Arrays:
    """What one process finds; alone, what the plain loss of the whole batch is."""
    loss_fn = DriftingLoss(**options, share_groups=world > 1)
    part = part_of(batch(), world, rank)
    part = DriftingBatch(*(None if tensor is None else tensor.to(dtype) for tensor in part))
    return compute(loss_fn, part)


def exact_accumulation(world: int, rank: int) -> Arrays:
    """Groups one after another, after a pass for the scalars of all of them."""
    loss_fn = DriftingLoss(share_groups=world > 1)
    whole = part_of(whole_batch(), world, rank)
    parts = [DriftingBatch(*(None if tensor is None else tensor[i] for tensor in whole)) for i in range(2)]
    statistics = loss_fn.statistics(parts)
    results = [compute(loss_fn, part, statistics=statistics) for part in parts]
    return {name: np.stack([result[name] for result in results]) for name in results[0]}


def without_sharing(world: int, rank: int) -> Arrays:
    return compute(DriftingLoss(), part_of(whole_batch(), world, rank))


def disagreement(world: int, rank: int) -> Arrays:
    """The last process has other groups, another dtype, another dimension, other options."""
    last = rank == world - 1
    x = torch.randn(2, 4, 3)
    messages = []
    for batch, options in (
        (x[:1] if last else x, {}),
        (x.double() if last else x, {}),
        (x[..., :2] if last else x, {}),
        (x, {"temperatures": (0.1,) if last else (0.2,)}),
    ):
        try:
            DriftingLoss(**options, share_groups=True)(batch, batch)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return {"messages": np.array(messages)}


EQUAL: dict[str, Callable[[int, int], Arrays]] = {
    **{f"over {over}": partial(own_part, normalize_over=over) for over in ("xy", "y", "x", "none")},
    "small tiles": partial(own_part, memory_mib=1e-4),
    "attraction": partial(own_part, attraction=1.5, repulsion=0.5),
    "no repulsion over x": partial(own_part, normalize_over="x", repulsion=0.0),
    "paper": partial(own_part, recipe="paper", temperatures=(1.0, 3.0)),
    "duplicates": partial(own_part, batch=with_duplicates),
    "equal samples": partial(own_part, batch=with_equal_samples),
    "float64": partial(own_part, dtype=torch.float64),
    "bfloat16": partial(own_part, dtype=torch.bfloat16),
    "exact accumulation": exact_accumulation,
}
SCENARIOS = {**EQUAL, "without sharing": without_sharing, "disagreement": disagreement}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            dist.init_process_group("gloo", f"file://{folder}/store-{world}", rank=rank, world_size=world)
            for name, scenario in SCENARIOS.items():
                np.savez(folder / f"{name}-{world}-{rank}.npz", **scenario(world, rank))
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
