"""The drifting loss as Triton kernels: `groups` for many small groups, `tiles` for few large ones."""

import importlib.util
import os

import torch

from driftfield.drift import Drift, DriftingBatch
from driftfield.field import FieldOptions

CAPABILITY = (8, 0)  # of the device: TF32 and bfloat16 products


def unsupported(batch: DriftingBatch, options: FieldOptions) -> str | None:
    """Why the fused kernels cannot serve a batch; None: they can."""
    reason = _unsupported_device(batch.x)
    if reason is not None:
        return reason
    from driftfield.fused import groups, tiles

    small = groups.unsupported(batch, options)
    if small is None:
        return None
    large = tiles.unsupported(batch, options)
    return None if large is None else f"as many small groups: {small}; as few large groups: {large}"


def kernels_for(batch: DriftingBatch, options: FieldOptions) -> type[Drift]:
    """What computes the drift of a batch that `unsupported` has no objection to."""
    from driftfield.fused import groups, tiles

    return groups.GroupDrift if groups.unsupported(batch, options) is None else tiles.TileDrift


def _unsupported_device(x: torch.Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "x is inside a transformation of torch.func"
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's own variable: kernels run in Python, on any tensor
        return None
    if x.device.type != "cuda":
        return f"x is on {x.device}, expected a CUDA device"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < CAPABILITY:
        return f"{x.device} has compute capability {capability}, expected {CAPABILITY} or higher"
    return None
