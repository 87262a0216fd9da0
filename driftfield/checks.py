"""What the public functions refuse, with the values in the message."""

from typing import Any, get_args

import torch
from torch import Tensor


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for anything narrower: a bfloat16 softmax at τ = 0.02 underflows."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a value that is none of a Literal's.

    Raises:
        ValueError: it is not.

    >>> from driftfield.kernel import NormalizeOver
    >>> check_choice("normalize_over", "z", NormalizeOver)
    Traceback (most recent call last):
    ...
    ValueError: normalize_over must be one of 'xy', 'y', 'x', 'none', got 'z'
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_points(**sets: Tensor) -> None:
    """Refuse sample sets that are not `[groups..., samples, dimensions]` of one dtype, device, group and dimension.

    Raises:
        TypeError: not a floating-point tensor, or dtypes differ.
        ValueError: fewer than 2 dimensions, an empty dimension, or groups, dimensions or devices that differ.

    >>> check_points(x=torch.zeros(4, 2), positives=torch.zeros(5, 3))
    Traceback (most recent call last):
    ...
    ValueError: positives [5, 3] does not fit x [4, 2]: expected [*, 2], the same groups and dimension
    """
    (first_name, first), *_ = sets.items()
    for name, points in sets.items():
        if not isinstance(points, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(points).__name__}")
        if not points.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {points.dtype}")
        if points.dtype != first.dtype:
            raise TypeError(f"{name} is {points.dtype} but {first_name} is {first.dtype}: expected one dtype")
        if points.device != first.device:
            raise ValueError(f"{name} is on {points.device} but {first_name} is on {first.device}: expected one device")
        shape = list(points.shape)
        if points.ndim < 2 or 0 in shape:
            raise ValueError(f"{name} must be [..., samples, dimensions], none of them empty, got {shape}")
        if points.shape[:-2] != first.shape[:-2] or points.shape[-1] != first.shape[-1]:
            expected = ", ".join(str(size) for size in [*first.shape[:-2], "*", first.shape[-1]])
            raise ValueError(
                f"{name} {shape} does not fit {first_name} {list(first.shape)}: "
                f"expected [{expected}], the same groups and dimension"
            )


def check_weight(name: str, weight: Tensor | None, points_name: str, points: Tensor | None) -> None:
    """Refuse a weight that is not one number per sample, `[..., M]` (a size of 1 repeats).

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: there are no samples to weigh, or the shape or device does not fit.
    """
    if weight is None:
        return
    if points is None:
        raise ValueError(f"{name} given without {points_name}")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {found}")
    expected = points.shape[:-1]
    fits = weight.ndim == len(expected) and all(w in (1, e) for w, e in zip(weight.shape, expected, strict=True))
    if not fits:
        raise ValueError(f"{name} must have one entry per sample, {list(expected)}, got {list(weight.shape)}")
    if weight.device != points.device:
        raise ValueError(f"{name} is on {weight.device} but {points_name} is on {points.device}: expected one device")


class NotFiniteError(ValueError):
    """A tensor that holds NaN or infinity."""


def check_finite(**tensors: Tensor | None) -> None:
    """Refuse NaN and infinity, naming the tensor, the first index and the count. Waits for the device.

    Raises:
        NotFiniteError: some entry is not finite.

    >>> check_finite(x=torch.tensor([1.0, float("nan")]))
    Traceback (most recent call last):
    ...
    driftfield.checks.NotFiniteError: x has 1 of 2 entries that are not finite, the first at index [1]: nan
    """
    for name, tensor in tensors.items():
        if tensor is None or bool(torch.isfinite(tensor).all()):
            continue
        bad = (~torch.isfinite(tensor)).nonzero()
        first = bad[0].tolist()
        raise NotFiniteError(
            f"{name} has {len(bad)} of {tensor.numel()} entries that are not finite, the first at index {first}: "
            f"{tensor[tuple(first)].item()}"
        )
