"""Several processes as one training, started by torchrun: who each is, and what all must agree on.

Every decision (stop, save, reject a step) is taken by all together: a process that decides alone leaves the others
waiting.
"""

import hashlib
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from driftfield.training.errors import UserError

TIMEOUT_S = 600.0  # of a collective: far above a step, far below the 30 minutes after which nobody looks any more


@contextmanager
def process_group(device: torch.device, *, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Join the group of processes that torchrun started; alone, do nothing.

    An error in one of several processes ends it at once, so that torchrun ends the others.

    Args:
        device: where this process computes: NCCL between GPUs, gloo otherwise.
        timeout_s: how long to wait for the others before giving up.

    >>> with process_group(torch.device("cpu")):
    ...     rank(), world_size()
    (0, 1)
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    except BaseException as error:
        _leave(error)
    dist.destroy_process_group()


def _leave(error: BaseException) -> NoReturn:
    """Say what happened and leave at once: the others wait in a collective, and so would an orderly end."""
    if isinstance(error, UserError):
        print(f"error: process {dist.get_rank()}: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1)


def rank() -> int:
    """Number of this process, 0 where there is only one."""
    return dist.get_rank() if _is_up() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _is_up() else 1


def is_main() -> bool:
    """Whether this is the process that writes, logs and talks."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if _is_up():
        dist.barrier()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must ask.

    >>> any_process(False)
    False
    """
    if not _is_up():
        return flag
    total = torch.tensor(float(flag), device=_device())
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return bool(total.item())


def share(count: int, name: str = "") -> slice:
    """The part of `count` things that belongs to this process; all parts are equally large.

    Args:
        count: things in all.
        name: the option that says how many, for the message.

    Raises:
        UserError: they can't be divided evenly.

    >>> list(range(8))[share(8)]
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    each, rest = divmod(count, world_size())
    if rest:
        what = f"{name}: expected" if name else "expected"
        raise UserError(f"{what} a number that {world_size()} processes can share evenly, found {count}")
    return slice(rank() * each, (rank() + 1) * each)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over the processes and this is one's part of it (`driftfield.training.sharding`).

    >>> is_sharded(torch.ones(2))
    False
    """
    return hasattr(tensor, "full_tensor")  # a DTensor, without the second that importing it takes


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up each gradient over all processes, in place, many to a message.

    Args:
        parameters: the same in every process, all of them sharded or none; one without a gradient here must have none
            anywhere.
    """
    if not _is_up():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if any(is_sharded(gradient) for gradient in gradients):
        torch._foreach_mul_(gradients, world_size())  # the backward pass left their mean
        return
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in same])
        dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in same])
        torch._foreach_copy_(same, [part.view_as(gradient) for part, gradient in zip(parts, same, strict=True)])


def require_equal(**texts: str) -> None:
    """Refuse to start where the processes do not agree: on the configuration, the data, the step resumed from.

    Args:
        texts: what must be equal, by name.

    Raises:
        UserError: naming what differs and the processes that differ from process 0.

    >>> require_equal(config="seed: 0")
    """
    if not _is_up():
        return
    for name, text in texts.items():
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        mine = torch.tensor([digest], dtype=torch.int64, device=_device())
        everyone = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(everyone, mine)
        other = [number for number, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
        if other:
            raise UserError(f"{name}: expected the same in all processes, found another in {other} than in 0")


def _is_up() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
