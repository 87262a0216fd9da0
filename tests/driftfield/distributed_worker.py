"""One process of test_loss_distributed: its share of a fixed batch through the loss, results written to a folder.

Usage: python distributed_worker.py RANK FOLDER, started for RANK 0 to 3.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from driftfield import DriftingBatch, DriftingLoss, DriftingOutput

GROUPS = 8
UNEVEN = {1: (8,), 2: (5, 3), 4: (1, 4, 2, 1)}  # groups of each rank, per world size
NO_REDUCTION = "no reduction"


def whole_batch() -> list[Tensor]:
    """x, positives, unconditional and weight of groups that differ in spread, so that local scalars are wrong ones."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-0.5, 0.5, GROUPS)[:, None, None]
    sets = [spread * torch.randn(GROUPS, num, 5, generator=generator) for num in (7, 6, 3)]
    return [*sets, torch.rand(GROUPS, 3, generator=generator)]


def local(arguments: list[Tensor], sizes: tuple[int, ...], rank: int) -> list[Tensor]:
    return [argument.split(sizes)[rank].clone() for argument in arguments]


def as_arrays(output: DriftingOutput, **more: Tensor) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in {**output._asdict(), **more}.items()}


def one_call(world: int, rank: int) -> dict[str, np.ndarray]:
    """The share of an uneven division; the gradient is that of the mean over all groups."""
    arguments = local(whole_batch(), UNEVEN[world], rank)
    x = arguments[0].requires_grad_()
    output = DriftingLoss()(*arguments)
    (output.loss.sum() / GROUPS).backward()
    assert x.grad is not None
    return as_arrays(output, gradient=x.grad)


def exact_accumulation(world: int, rank: int) -> dict[str, np.ndarray]:
    """Group by group: the processes take different numbers of microbatches."""
    arguments, loss_fn = local(whole_batch(), UNEVEN[world], rank), DriftingLoss()
    parts = [DriftingBatch(*(argument[i : i + 1] for argument in arguments)) for i in range(len(arguments[0]))]
    statistics = loss_fn.statistics(parts)
    losses = torch.cat([loss_fn(*part, statistics=statistics).loss for part in parts])
    return as_arrays(DriftingOutput(losses, statistics.drift_norm, statistics.feature_scale, statistics.degenerate))


def data_parallel_network(world: int, rank: int) -> dict[str, np.ndarray]:
    """Gradient of a generator's weights: of the local mean loss, averaged over processes as data parallelism does."""
    noise, *others = local(whole_batch(), (GROUPS // world,) * world, rank)
    torch.manual_seed(0)
    network = torch.nn.Linear(5, 5)
    output = DriftingLoss()(network(noise), *others)
    output.loss.mean().backward()
    assert network.weight.grad is not None
    gradient = network.weight.grad / world
    if world > 1:
        dist.all_reduce(gradient)
    return as_arrays(output, gradient=gradient)


def constant_on_rank_zero(world: int, rank: int) -> dict[str, np.ndarray]:
    x, positives, *_ = local(whole_batch(), UNEVEN[world], rank)
    constant = rank == 0
    return as_arrays(
        DriftingLoss()(torch.ones_like(x) if constant else x, torch.ones_like(positives) if constant else positives)
    )


def without_reduction(world: int, rank: int) -> dict[str, np.ndarray]:
    all_reduce, dist.all_reduce = dist.all_reduce, lambda tensor: None
    try:
        return one_call(world, rank)
    finally:
        dist.all_reduce = all_reduce


SCENARIOS: list[Callable[[int, int], dict[str, np.ndarray]]] = [
    one_call,
    exact_accumulation,
    data_parallel_network,
    constant_on_rank_zero,
    without_reduction,
]


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for world in (4, 2):
        if rank < world:
            dist.init_process_group("gloo", f"file://{folder}/store-{world}", rank=rank, world_size=world)
            for scenario in SCENARIOS:
                np.savez(folder / f"{scenario.__name__}-{world}-{rank}.npz", **scenario(world, rank))
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
