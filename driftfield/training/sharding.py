"""A model spread over the processes (FSDP2): each holds a part of every weight, and of all that goes with it.

Weights, gradients, averages and the optimizer's state are then DTensors; outside of the processes, in files, there are
whole tensors alone, so that a training may go on sharded or not.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from driftfield.training.distributed import is_main, is_sharded, world_size


def shard(model: nn.Module, parts: Iterable[nn.Module], device: torch.device) -> None:
    """Leave of each weight this process's part; alone, leave the model as it is.

    From here on every process must take part in each forward and backward pass. An optimizer and averages are made
    afterwards. Each backward pass leaves the mean of all processes' gradients, where `sum_gradients` expects it.

    Args:
        model: the same in all processes, on `device`.
        parts: modules inside it, such as the blocks of a transformer, whose weights are whole only while they compute.
        device: where this process computes.

    >>> model = nn.Linear(2, 1)
    >>> shard(model, [], torch.device("cpu")); type(model).__name__
    'Linear'
    """
    if world_size() == 1:
        return
    # Together these imports take a second, and hardly a program needs them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (*parts, model):
        # By default the outermost module keeps its whole weights between passes: they would be stale after
        # `EMA.swapped`, which writes the parts.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its parts; every process must ask. Any other tensor is returned as it is.

    >>> whole(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    full: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return full


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors together one by one for the main process to write; every process must ask.

    Args:
        tensors: by name, sharded or not.

    Returns:
        Whole tensors: those that were sharded on the CPU in the main process, and left out in the others.

    >>> gathered({"bias": torch.ones(1)})
    {'bias': tensor([1.])}
    """
    result = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if is_main() or not is_sharded(tensor):
            result[name] = full.cpu() if is_sharded(tensor) else full
    return result


def placed_like(tensor: Tensor, target: Tensor) -> Tensor:
    """Of a whole tensor, this process's part where the target is sharded; every process must ask.

    Args:
        tensor: the same in all processes, in the target's shape.
        target: whose placement it gets; one that is not sharded leaves it as it is.

    >>> placed_like(torch.ones(2), torch.zeros(2)).tolist()
    [1.0, 1.0]
    """
    if not is_sharded(target):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor  # takes a second

    if not isinstance(target, DTensor):
        raise TypeError(f"target: expected a DTensor, found {type(target).__name__}")
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)


def class_name(model: nn.Module) -> str:
    """Name of a model's class, which `shard` puts under another.

    >>> class_name(nn.Linear(2, 1))
    'Linear'
    """
    # FSDP2 makes a class FSDPLinear(FSDPModule, Linear) and gives it to the model.
    kinds = (kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed.fsdp"))
    return next(kinds).__name__
