"""Means and standard deviations of the patches of a feature map, and of the whole map, from one pass over it (A.5)."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from driftfield.checks import check_choice, working_dtype
from driftfield.fused.trial import disagreement

VARIANCE_FLOOR: Final = 1e-6  # inside each square root: its gradient stays finite where a map is constant
FUSED_PATCH_SIZES: Final = (2, 4)  # the kernels know these, and the paper has no others
FUSED_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE: Final = 1e-3  # of the kernels, relative to eager
TRITON_IS_INSTALLED: Final = importlib.util.find_spec("triton") is not None

Backend = Literal["auto", "eager", "fused"]


class Moments(NamedTuple):
    """Of every patch of one size, in row order: both `[B, patches, C]`, float32 (float64 for a float64 map)."""

    mean: Tensor
    std: Tensor  # sqrt(population variance + 1e-6)


class MapMoments(NamedTuple):
    """What `patch_moments` returns."""

    patches: tuple[Moments, ...]  # one for each patch size
    whole: Moments  # of the whole map, [B, 1, C] both


def patch_moments(feature_map: Tensor, patch_sizes: Sequence[int] = (2, 4), *, backend: Backend = "auto") -> MapMoments:
    """Moments of the square patches of each size, and of the whole map.

    Source: paper A.5, families (b) to (d). The spread is measured from the patch's own mean: the difference
    E[x²] - E[x]² would drown a small one in rounding.

    Args:
        feature_map: `[B, C, H, W]`, of any strides.
        patch_sizes: sides of the patches, each a multiple of the one before; every one tiles the map.
        backend: "eager" reads the map once for each moment; "fused" once for all of them, and once more on the way
            back, by kernels for GPUs, maps of at most 32 bits and patches of 2 and 4; "auto" is "fused" where it can be
            and, tried once, agrees with "eager".

    Raises:
        ValueError: not a map, patches that do not tile it or each other, an unknown backend, or what "fused" can't do.

    Returns:
        `MapMoments`, differentiable with respect to the map.

    >>> moments = patch_moments(torch.arange(16.0).reshape(1, 1, 4, 4), (2,))
    >>> moments.patches[0].mean.flatten().tolist(), moments.whole.mean.item()
    ([2.5, 4.5, 10.5, 12.5], 7.5)
    """
    check_choice("backend", backend, Backend)
    sizes = tuple(patch_sizes)
    _check(feature_map, sizes)
    fused = backend == "fused" or (backend == "auto" and feature_map.is_cuda)
    reason = _why_not_fused(feature_map, sizes) if fused else None
    if backend == "auto" and fused and reason is None:
        reason = _why_not_trusted(feature_map.device, feature_map.dtype)
    if backend == "fused" and reason:
        raise ValueError(f"backend 'fused': {reason}")
    tensors = _fused(feature_map, 2 in sizes, 4 in sizes) if fused and not reason else _eager(feature_map, sizes)
    *patches, whole = (Moments(mean, std) for mean, std in zip(tensors[::2], tensors[1::2], strict=True))
    return MapMoments(tuple(patches), whole)


def _check(feature_map: Tensor, sizes: tuple[int, ...]) -> None:
    if feature_map.ndim != 4 or 0 in feature_map.shape[2:]:
        raise ValueError(f"feature_map: expected [B, C, H, W] with locations, found {list(feature_map.shape)}")
    height, width = feature_map.shape[2:]
    if any(size < 1 or height % size or width % size for size in sizes):
        raise ValueError(f"patch_sizes: expected sides that tile a map of {height} x {width}, found {list(sizes)}")
    if any(larger == smaller or larger % smaller for smaller, larger in pairwise(sizes)):
        raise ValueError(f"patch_sizes: expected each a larger multiple of the one before, found {list(sizes)}")


def _why_not_fused(feature_map: Tensor, sizes: tuple[int, ...]) -> str | None:
    if feature_map.dtype not in FUSED_DTYPES:
        return f"expected a map of float16, bfloat16 or float32, found {feature_map.dtype}"
    if not set(sizes) <= set(FUSED_PATCH_SIZES):
        return f"expected patches of {FUSED_PATCH_SIZES}, found {list(sizes)}"
    if not TRITON_IS_INSTALLED:
        return "Triton is not installed"
    if not feature_map.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":  # Triton's: kernels as Python
        return f"expected a map on a GPU, found one on {feature_map.device}"
    return None


def _why_not_trusted(device: torch.device, dtype: torch.dtype) -> str | None:
    return _disagreement(device, dtype)


# Asked while torch.compile traces: what torch.compiler.assume_constant_result marks, but for its import of the
# compiler, which every program would wait for.
_why_not_trusted._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
@torch.inference_mode(False)  # what is asked in it would find no gradient, and be remembered
def _disagreement(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why not to trust the kernels on this device, after one small map; None: they agree with eager."""
    draw = torch.Generator(device).manual_seed(0)
    noise = torch.randn(2, 24, 8, 8, generator=draw, device=device)
    feature_map = noise.to(dtype, memory_format=torch.channels_last)

    @torch.enable_grad()
    def outcome(moments_of: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        x = feature_map.detach().requires_grad_()
        moments = moments_of(x)
        gradient = torch.autograd.grad([part.square().sum() for part in moments], x)
        return [part.detach() for part in (*moments, *gradient)]

    return disagreement(
        "the kernels of patch_moments",
        device,
        eager=lambda: outcome(lambda x: _eager(x, (2, 4))),
        fused=lambda: outcome(lambda x: _fused(x, True, True)),
        tolerance=TOLERANCE + torch.finfo(dtype).eps,
    )


def _eager(feature_map: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Mean and standard deviation [B, L, C] of patches of each size, then of the whole map."""
    mean = feature_map.to(working_dtype(feature_map))
    variance: Tensor | None = None  # a patch of one pixel has none
    moments = []
    for size in [(side, side) for side in sizes] + [tuple(feature_map.shape[2:])]:
        inner = feature_map.shape[2] // mean.shape[2], feature_map.shape[3] // mean.shape[3]
        mean, variance = _coarser(mean, variance, (size[0] // inner[0], size[1] // inner[1]))
        moments += [_as_vectors(mean), _as_vectors((variance + VARIANCE_FLOOR).sqrt())]
    return moments


def _coarser(mean: Tensor, variance: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Moments of patches of `size` patches: variance = variance of the means + mean of the variances."""
    coarse = F.avg_pool2d(mean, size)
    spread = (mean - F.interpolate(coarse, size=mean.shape[2:])).square()
    return coarse, F.avg_pool2d(spread if variance is None else spread + variance, size)


def _as_vectors(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(2).transpose(1, 2)  # [B, H * W, C]


# An operator rather than an autograd.Function: torch.compile calls it as it is, and takes its shapes from `_empty`.
@torch.library.custom_op("driftfield::patch_moments", mutates_args=())
def _fused(feature_map: Tensor, has_2: bool, has_4: bool) -> list[Tensor]:
    from driftfield.fused import moment_kernels

    moments = _empty(feature_map, has_2, has_4)
    moment_kernels.moments(feature_map, has_2, has_4, moments, floor=VARIANCE_FLOOR)
    return moments


@torch.library.custom_op("driftfield::patch_moments_backward", mutates_args=())
def _fused_backward(
    feature_map: Tensor, has_2: bool, has_4: bool, moments: list[Tensor], gradients: list[Tensor]
) -> Tensor:
    from driftfield.fused import moment_kernels

    return moment_kernels.gradient(feature_map, has_2, has_4, moments, gradients)


def _empty(feature_map: Tensor, has_2: bool, has_4: bool) -> list[Tensor]:
    batch, channels, height, width = feature_map.shape
    patches = [size * size for size, wanted in ((2, has_2), (4, has_4)) if wanted]
    counts = [height * width // size for size in patches] + [1]
    return [feature_map.new_empty(batch, count, channels, dtype=torch.float32) for count in counts for _ in range(2)]


def _save(ctx: Any, inputs: tuple[Tensor, bool, bool], output: list[Tensor]) -> None:
    feature_map, ctx.has_2, ctx.has_4 = inputs
    ctx.save_for_backward(feature_map, *output)


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor, None, None]:
    feature_map, *moments = ctx.saved_tensors
    return _fused_backward(feature_map, ctx.has_2, ctx.has_4, moments, list(gradients)), None, None


_fused.register_fake(_empty)
_fused.register_autograd(_differentiate, setup_context=_save)
_fused_backward.register_fake(lambda feature_map, *_: torch.empty_like(feature_map))
