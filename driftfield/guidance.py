"""Guidance at training time: the guidance scale α as a weight of unconditional negatives (Eq. 15-16, A.7)."""

from typing import overload

import torch
from torch import Tensor


@overload
def unconditional_weight(alpha: float, num_generated: int, num_unconditional: int) -> float: ...
@overload
def unconditional_weight(alpha: Tensor, num_generated: int, num_unconditional: int) -> Tensor: ...
def unconditional_weight(alpha: float | Tensor, num_generated: int, num_unconditional: int) -> float | Tensor:
    """Weight w of each unconditional negative such that the negatives hold a share γ of them, α = 1/(1-γ)  (A.7).

    A generated sample has N - 1 others of weight 1 and M unconditional ones of weight w, so γ = M w / (N - 1 + M w)
    and w = (α - 1)(N - 1)/M.

    Args:
        alpha: guidance scale, >= 1; a number or a tensor of any shape.
        num_generated: N, samples in a group.
        num_unconditional: M >= 1.

    Raises:
        ValueError: M < 1, N < 1, or a number alpha < 1 (a tensor's values are not looked at, they may be on a device).

    Returns:
        w, like `alpha`.

    >>> unconditional_weight(2.0, num_generated=65, num_unconditional=16)
    4.0
    """
    if num_generated < 1 or num_unconditional < 1:
        raise ValueError(
            f"expected at least 1 generated and 1 unconditional sample, got {num_generated} and {num_unconditional}"
        )
    if not isinstance(alpha, Tensor) and not alpha >= 1.0:
        raise ValueError(f"alpha must be >= 1, got {alpha}")
    return (alpha - 1.0) * (num_generated - 1) / num_unconditional


def sample_guidance_scale(
    num: int,
    *,
    exponent: float,
    low: float = 1.0,
    high: float = 4.0,
    share_at_one: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw α with density proportional to α^-exponent on [low, high] (A.7, Table 8).

    Args:
        num: how many.
        exponent: k; 1 is log-uniform, 0 uniform.
        low, high: bounds, 1 <= low <= high.
        share_at_one: probability of α = 1 instead (latent L: 0.5).
        generator: source of randomness, on the CPU.

    Raises:
        ValueError: bounds or share out of range.

    Returns:
        α, `[num]` float32 on the CPU.

    >>> alpha = sample_guidance_scale(1000, exponent=3.0, generator=torch.Generator().manual_seed(0))
    >>> bool((alpha >= 1).all() and (alpha <= 4).all() and alpha.median() < 1.6)
    True
    """
    if not 1.0 <= low <= high:
        raise ValueError(f"expected 1 <= low <= high, got low {low} and high {high}")
    if not 0.0 <= share_at_one <= 1.0:
        raise ValueError(f"share_at_one must lie in [0, 1], got {share_at_one}")
    at_one, uniform = torch.rand(2, num, generator=generator, dtype=torch.float64)
    if exponent == 1.0:
        alpha = low * (high / low) ** uniform
    else:  # inverse of the distribution function
        power = 1.0 - exponent
        alpha = (low**power + uniform * (high**power - low**power)) ** (1.0 / power)
    return torch.where(at_one < share_at_one, 1.0, alpha).clamp(1.0, high).to(torch.float32)
