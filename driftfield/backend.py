"""Which of the ways to compute the drift serves a batch: the formulas as they stand, in strips, or fused kernels."""

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from driftfield.checks import working_dtype
from driftfield.drift import Drift, DriftingBatch, EagerDrift
from driftfield.field import FieldOptions
from driftfield.tiled import TiledDrift
from driftfield.tiled import unsupported as unsupported_by_tiles

PAIR_MATRICES = 6  # of every sample and target, which EagerDrift holds at once: distances, two softmaxes ...
TOLERANCE = 1e-3  # of the fused kernels, relative to eager

Backend = Literal["auto", "eager", "fused"]
log = logging.getLogger("driftfield")


def choose_drift(batch: DriftingBatch, options: FieldOptions, *, backend: Backend, memory_mib: float | None) -> Drift:
    """The drift of a batch, computed as `backend` says.

    "auto" takes the fused kernels on a GPU that can serve the batch by them and where they agree with eager (tried once
    per process and dtype, on a small batch), and says at level DEBUG of the logger "driftfield" why where it does not.

    Args:
        batch: checked.
        options: of the field.
        backend: "eager", "fused" or "auto".
        memory_mib: eager works in strips where its matrices of pairs would need more.

    Raises:
        ValueError: "fused" cannot serve the batch, or no way keeps within `memory_mib`.
    """
    if backend == "eager" or (backend == "auto" and not _kernels_are_worth_a_look(batch.x)):
        return _eager(batch, options, memory_mib)
    from driftfield import fused  # here alone: it imports Triton

    reason = fused.unsupported(batch, options)
    if backend == "fused" and reason is not None:
        raise ValueError(f"backend='fused' cannot serve this batch: {reason}")
    if reason is None:
        kernels = fused.kernels_for(batch, options)
        if backend == "auto":
            reason = _disagreement(kernels, batch.x.device, batch.x.dtype)
        if reason is None:
            return kernels(batch, options)
    log.debug("backend='auto' takes eager for x %s %s: %s", list(batch.x.shape), batch.x.dtype, reason)
    return _eager(batch, options, memory_mib)


def pair_mib(batch: DriftingBatch) -> float:
    """About the memory of the matrices of pairs that `EagerDrift` holds at once, in MiB."""
    x, positives, unconditional, _ = batch
    num_targets = x.shape[-2] + positives.shape[-2] + (0 if unconditional is None else unconditional.shape[-2])
    pairs = x.shape[:-2].numel() * x.shape[-2] * num_targets
    return PAIR_MATRICES * pairs * working_dtype(x).itemsize / 2**20


def _kernels_are_worth_a_look(x: Tensor) -> bool:
    return x.device.type == "cuda" and not torch.compiler.is_compiling()


def _eager(batch: DriftingBatch, options: FieldOptions, memory_mib: float | None) -> Drift:
    if memory_mib is None or pair_mib(batch) <= memory_mib:
        return EagerDrift(batch, options)
    reason = unsupported_by_tiles(batch, options)
    if reason is not None:
        raise ValueError(
            f"memory_mib={memory_mib:g}: eager needs {pair_mib(batch):.0f} MiB, and strips cannot: {reason}"
        )
    return TiledDrift(batch, options, memory_mib=memory_mib)


@cache
@torch.inference_mode(False)  # what is asked in it would find no gradient, and be remembered
def _disagreement(kernels: type[Drift], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why not to trust these kernels on this device, after one small batch; None: they agree with eager."""
    from driftfield.fused.trial import disagreement

    draw = torch.Generator(device).manual_seed(0)
    points = [torch.randn(2, number, 32, generator=draw, device=device).to(dtype) for number in (16, 16, 4)]
    batch = DriftingBatch(*points)
    return disagreement(
        f"the kernels of {kernels.__name__}",
        device,
        eager=lambda: _outcome(EagerDrift, batch),
        fused=lambda: _outcome(kernels, batch),
        tolerance=TOLERANCE + torch.finfo(dtype).eps,  # the gradient is rounded to the dtype of x
    )


@torch.enable_grad()
def _outcome(kind: type[Drift], batch: DriftingBatch) -> list[Tensor]:
    """s, the sums of λ², the losses and their gradient."""
    x = batch.x.detach().requires_grad_()
    drift = kind(batch._replace(x=x), FieldOptions((0.05, 0.2), True, 1e-6, "xy", 1.0, 1.0))
    scale = drift.scale_sums[0] / drift.scale_sums[1]
    sums = drift.force_sums(scale)
    loss = drift.loss(scale, (sums[-1] / sums[:-1]).sqrt())
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return [scale, *sums, loss.detach(), gradient]
