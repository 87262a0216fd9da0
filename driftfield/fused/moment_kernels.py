"""Kernels of `patch_moments`: a program takes some channels of one map, and of these a row of patches at a time.

A patch is here 4 x 4 where such patches tile the map, else 2 x 2, else one location, whatever moments are asked for; it
is gone through by its 2 x 2 quarters. In a tile `[I, P, C]`, I is the location in the quarter, P the patch of the row
and C the channel. Where channels lie side by side in memory, a thread holds all I of its patches and channels, and sums
over them need no exchange.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
BYTES = 2048  # of one location of all patches and channels of a tile: 16 for each thread
APART = 256  # patches times channels of a tile where channels lie apart: every location's address takes registers
MAX_PATCHES = 32  # of a tile


def moments(feature_map: Tensor, has_2: bool, has_4: bool, out: Sequence[Tensor], *, floor: float) -> None:
    """Write mean and standard deviation of the patches asked for, then of the whole map, into `out`."""
    if feature_map.numel() == 0:
        return
    constants = _constants(feature_map, has_2, has_4)
    batch, num_channels = feature_map.shape[:2]
    with torch.cuda.device_of(feature_map):
        _moments[batch, triton.cdiv(num_channels, constants["C"])](
            feature_map,
            *_six(out, has_2, has_4),
            *feature_map.shape[1:],
            *feature_map.stride(),
            floor,
            **constants,
        )


def gradient(
    feature_map: Tensor, has_2: bool, has_4: bool, moments: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    """Gradient of the map, from its moments and their gradients."""
    result = torch.empty_like(feature_map)
    if feature_map.numel() == 0:
        return result
    constants = _constants(feature_map, has_2, has_4)
    batch, num_channels, height = feature_map.shape[:3]
    with torch.cuda.device_of(feature_map):
        _gradient[batch * (height // _side(feature_map)), triton.cdiv(num_channels, constants["C"])](
            feature_map,
            result,
            *_six(moments, has_2, has_4),
            *_six([gradient.contiguous() for gradient in gradients], has_2, has_4),
            *feature_map.shape[1:],
            *feature_map.stride(),
            *result.stride(),
            **constants,
        )
    return result


def _side(feature_map: Tensor) -> int:
    """Of the patches that a program goes through."""
    height, width = feature_map.shape[2:]
    return next(side for side in (4, 2, 1) if height % side == 0 and width % side == 0)


def _constants(feature_map: Tensor, has_2: bool, has_4: bool) -> dict[str, Any]:
    side, channels = _side(feature_map), triton.next_power_of_2(feature_map.shape[1])
    patches = min(triton.next_power_of_2(feature_map.shape[3] // side), MAX_PATCHES)
    channels_last = feature_map.stride(1) < feature_map.stride(3)
    tile = BYTES // feature_map.itemsize if channels_last else APART
    return {
        "HAS_2": has_2,
        "HAS_4": has_4,
        "SIDE": side,
        "P": patches,
        "C": min(channels, tile // patches),
        "CHANNELS_LAST": channels_last,
        "num_warps": WARPS,
    }


def _six(tensors: Sequence[Tensor], has_2: bool, has_4: bool) -> list[Tensor]:
    """Mean and standard deviation of patches of 2, of 4, and of the map; the map's stand for what is not asked for."""
    patches, whole = list(tensors[:-2]), tensors[-2:]
    return [*(patches[:2] if has_2 else whole), *(patches[-2:] if has_4 else whole), *whole]


@triton.jit
def _offsets(first, stride_c, stride_h, stride_w, SIDE: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
             CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Offsets of a tile from its row of patches, in the order of memory: [I, P, C] or [C, I, P]."""
    i = tl.arange(0, 1 if SIDE == 1 else 4)
    in_quarter = (i // 2).to(tl.int64) * stride_h + (i % 2).to(tl.int64) * stride_w  # [I]
    of_patch = ((first + tl.arange(0, P)) * SIDE).to(tl.int64) * stride_w  # [P]
    of_channel = (tl.program_id(1) * C + tl.arange(0, C)).to(tl.int64) * stride_c  # [C]
    if CHANNELS_LAST:
        return in_quarter[:, None, None] + of_patch[None, :, None] + of_channel[None, None, :]
    else:
        return of_channel[:, None, None] + in_quarter[None, :, None] + of_patch[None, None, :]


@triton.jit
def _inside(first, channels, patches, P: tl.constexpr, C: tl.constexpr):
    """Which patches and channels of a tile are the map's, [P, C]."""
    p, c = first + tl.arange(0, P), tl.program_id(1) * C + tl.arange(0, C)
    return (p < patches)[:, None] & (c < channels)[None, :]


@triton.jit
def _load(pointers, inside, CHANNELS_LAST: tl.constexpr):
    """A tile [I, P, C] in float32, 0 outside the map."""
    if CHANNELS_LAST:
        return tl.load(pointers, mask=inside[None], other=0.0).to(tl.float32)
    else:
        tile = tl.load(pointers, mask=tl.trans(inside)[:, None], other=0.0)
        return tl.permute(tile, (1, 2, 0)).to(tl.float32)


@triton.jit
def _place(batch, row, column, rows, columns, channels, C: tl.constexpr):
    """Where the moments of the patches [P] in a row of patches lie in [B, rows * columns, channels]: [P, C]."""
    place = batch.to(tl.int64) * (rows * columns) + (row * columns + column)  # [P]
    return place[:, None] * channels + (tl.program_id(1) * C + tl.arange(0, C))[None, :]


@triton.jit
def _moments(feature_map, mean_2, std_2, mean_4, std_4, mean, std, channels, height, width,
             stride_b, stride_c, stride_h, stride_w, floor,
             HAS_2: tl.constexpr, HAS_4: tl.constexpr, SIDE: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
             CHANNELS_LAST: tl.constexpr):  # fmt: skip
    HALVES: tl.constexpr = 2 if SIDE == 4 else 1  # of a side of a patch
    batch, rows, columns = tl.program_id(0), height // SIDE, width // SIDE
    blocks = tl.cdiv(columns, P)
    # Every patch of the tile gathers those above and below it: number, mean, sum of squares about the mean.
    count = tl.zeros([P], tl.float32)
    centre, squares = tl.zeros([P, C], tl.float32), tl.zeros([P, C], tl.float32)
    for step in range(rows * blocks):
        row, first = step // blocks, step % blocks * P
        inside, patch = _inside(first, channels, columns, P, C), first + tl.arange(0, P)
        start = feature_map + batch.to(tl.int64) * stride_b + (row * SIDE).to(tl.int64) * stride_h
        start += _offsets(first, stride_c, stride_h, stride_w, SIDE, P, C, CHANNELS_LAST)
        mean_of_patch, variance_of_patch = tl.zeros([P, C], tl.float32), tl.zeros([P, C], tl.float32)
        for quarter in tl.static_range(HALVES * HALVES):
            down, right = quarter // HALVES, quarter % HALVES
            x = _load(start + (down * 2 * stride_h + right * 2 * stride_w), inside, CHANNELS_LAST)  # [I, P, C]
            of_quarter = tl.sum(x, 0) / x.shape[0]  # [P, C]
            x -= of_quarter[None]
            variance = tl.sum(x * x, 0) / x.shape[0]
            if HAS_2:
                place = _place(batch, row * HALVES + down, patch * HALVES + right, rows * HALVES, columns * HALVES,
                               channels, C)  # fmt: skip
                tl.store(mean_2 + place, of_quarter, mask=inside)
                tl.store(std_2 + place, tl.sqrt(variance + floor), mask=inside)
            away = of_quarter - mean_of_patch
            mean_of_patch += away / (quarter + 1)
            variance_of_patch += variance + away * (of_quarter - mean_of_patch)
        variance_of_patch /= HALVES * HALVES
        if HAS_4:
            place = _place(batch, row, patch, rows, columns, channels, C)
            tl.store(mean_4 + place, mean_of_patch, mask=inside)
            tl.store(std_4 + place, tl.sqrt(variance_of_patch + floor), mask=inside)
        one = (patch < columns).to(tl.float32)
        count += one
        away = mean_of_patch - centre
        centre += away * (one / tl.maximum(count, 1.0))[:, None]
        squares += one[:, None] * (variance_of_patch + away * (mean_of_patch - centre))
    of_map = tl.sum(centre * count[:, None], 0) / (rows * columns)  # [C]
    away = centre - of_map[None]
    variance_of_map = tl.sum(squares + count[:, None] * away * away, 0) / (rows * columns)
    c = tl.program_id(1) * C + tl.arange(0, C)
    tl.store(mean + batch.to(tl.int64) * channels + c, of_map, mask=c < channels)
    tl.store(std + batch.to(tl.int64) * channels + c, tl.sqrt(variance_of_map + floor), mask=c < channels)


@triton.jit
def _pull(mean, std, to_mean, to_std, place, mask, size):
    """The gradient of the locations x of a patch: (1/n) dmean + (x - mean) / (n std) dstd, as its three parts."""
    push = tl.load(to_mean + place, mask=mask, other=0.0) / size
    pull = tl.load(to_std + place, mask=mask, other=0.0) / (tl.load(std + place, mask=mask, other=1.0) * size)
    return push, pull, tl.load(mean + place, mask=mask, other=0.0)


@triton.jit
def _gradient(feature_map, result, mean_2, std_2, mean_4, std_4, mean, std,
              to_mean_2, to_std_2, to_mean_4, to_std_4, to_mean, to_std, channels, height, width,
              stride_b, stride_c, stride_h, stride_w, result_b, result_c, result_h, result_w,
              HAS_2: tl.constexpr, HAS_4: tl.constexpr, SIDE: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
              CHANNELS_LAST: tl.constexpr):  # fmt: skip
    HALVES: tl.constexpr = 2 if SIDE == 4 else 1  # of a side of a patch
    rows, columns = height // SIDE, width // SIDE
    batch, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    c = tl.program_id(1) * C + tl.arange(0, C)
    of_map = batch.to(tl.int64) * channels + c
    push, pull, centre = _pull(mean, std, to_mean, to_std, of_map, c < channels, height * width)  # [C]
    for first in range(0, columns, P):
        inside, patch = _inside(first, channels, columns, P, C), first + tl.arange(0, P)
        start = feature_map + batch.to(tl.int64) * stride_b + (row * SIDE).to(tl.int64) * stride_h
        start += _offsets(first, stride_c, stride_h, stride_w, SIDE, P, C, CHANNELS_LAST)
        end = result + batch.to(tl.int64) * result_b + (row * SIDE).to(tl.int64) * result_h
        end += _offsets(first, result_c, result_h, result_w, SIDE, P, C, CHANNELS_LAST)
        if HAS_4:
            place = _place(batch, row, patch, rows, columns, channels, C)
            push_4, pull_4, centre_4 = _pull(mean_4, std_4, to_mean_4, to_std_4, place, inside, 16)  # [P, C]
        for quarter in tl.static_range(HALVES * HALVES):
            down, right = quarter // HALVES, quarter % HALVES
            x = _load(start + (down * 2 * stride_h + right * 2 * stride_w), inside, CHANNELS_LAST)  # [I, P, C]
            gradient = push[None, None] + pull[None, None] * (x - centre[None, None])
            if HAS_4:
                gradient += push_4[None] + pull_4[None] * (x - centre_4[None])
            if HAS_2:
                place = _place(batch, row * HALVES + down, patch * HALVES + right, rows * HALVES, columns * HALVES,
                               channels, C)  # fmt: skip
                push_2, pull_2, centre_2 = _pull(mean_2, std_2, to_mean_2, to_std_2, place, inside, 4)  # [P, C]
                gradient += push_2[None] + pull_2[None] * (x - centre_2[None])
            gradient = gradient.to(result.dtype.element_ty)
            to = end + (down * 2 * result_h + right * 2 * result_w)
            if CHANNELS_LAST:
                tl.store(to, gradient, mask=inside[None])
            else:
                tl.store(to, tl.permute(gradient, (2, 0, 1)), mask=tl.trans(inside)[:, None])
