"""Whether kernels are to be trusted on a device: one small case, beside the same by the plain formulas."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def disagreement(
    name: str,
    device: torch.device,
    *,
    eager: Callable[[], Sequence[Tensor]],
    fused: Callable[[], Sequence[Tensor]],
    tolerance: float,
) -> str | None:
    """Why not to trust kernels, which is also warned of; None: they agree.

    Args:
        name: of the kernels, for the warning.
        device: that they run on.
        eager: computes what they should give, tensors of any shapes.
        fused: computes the same by the kernels.
        tolerance: for the norm of a tensor's error over that of the tensor.

    Returns:
        One line.

    >>> one = lambda: [torch.ones(3)]
    >>> disagreement("kernels", torch.device("cpu"), eager=one, fused=one, tolerance=1e-3)
    """
    try:
        errors = [_relative_error(found, right) for found, right in zip(fused(), eager(), strict=True)]
        wrong = [error for error in errors if not error <= tolerance]  # NaN is wrong
        reason = f"differ from eager by {wrong[0]:.1g}" if wrong else None
    except Exception as exception:  # whatever a compiler or a driver may raise: eager serves
        reason = f"{type(exception).__name__}: {exception}".splitlines()[0]
    if reason is not None:
        warnings.warn(f"{name} are not used on {device}: {reason}", stacklevel=3)
    return reason


def _relative_error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())
