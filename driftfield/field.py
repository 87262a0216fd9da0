"""The drifting field V = V+ - V- of a generated distribution q towards the data p (Eq. 8-12, Alg. 2)."""

import torch
from torch import Tensor

from driftfield.checks import check_points, check_weight, working_dtype
from driftfield.kernel import NormalizeOver, affinity, centre, distances


def weighted_drift(
    affinity: Tensor, x: Tensor, targets: Tensor, num_negatives: int, *, attraction: float = 1.0, repulsion: float = 1.0
) -> Tensor:
    """V = W+ y+ - W- y-, every target taken relative to x (Eq. 10-11, Alg. 2).

    Args:
        affinity: A, `[..., N, T]`, weights included.
        x: `[..., N, D]`.
        targets: `[..., T, D]`, the negatives first.
        num_negatives: how many of the T targets repel.
        attraction, repulsion: factors on V+ and V- (Table 1).

    Returns:
        V, `[..., N, D]`.

    >>> x, targets = torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]])
    >>> weighted_drift(torch.tensor([[0.5, 0.5]]), x, targets, 1).item()
    0.5
    """
    negative, positive = affinity[..., :num_negatives], affinity[..., num_negatives:]
    attract = attraction * positive * negative.sum(-1, keepdim=True)  # W+ = A+ ΣA-  [..., N, P]
    repel = repulsion * negative * positive.sum(-1, keepdim=True)  # W- = A- ΣA+  [..., N, M]
    coefficient = torch.cat([-repel, attract], -1)  # [..., N, T]
    return coefficient @ targets - coefficient.sum(-1, keepdim=True) * x


@torch.no_grad()
def drifting_field(
    x: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    negative_weight: Tensor | None = None,
    mask_self: bool = False,
    normalize_over: NormalizeOver = "xy",
    affinity_floor: float = 0.0,
    attraction: float = 1.0,
    repulsion: float = 1.0,
) -> Tensor:
    """The drifting field V of Alg. 2 at every x: towards the positives, away from the negatives (Eq. 8-12).

    V is anti-symmetric: exchanging positives and negatives flips its sign (without `mask_self`), so V = 0 when both
    are the same set. Leading dimensions are independent groups. Computed in float32 (float64 for float64 input)
    without gradient.

    Args:
        x: `[..., N, D]` generated samples.
        positives: `[..., P, D]` real samples.
        negatives: `[..., M, D]`, usually x itself, followed by unconditional real samples under guidance.
        temperature: τ > 0, in the unit of the distances between samples.
        negative_weight: `[..., M]`, >= 0, acts linearly, after the normalisation (A.7).
        mask_self: `negatives[..., :N, :]` is x itself, and a sample does not repel itself. Anti-symmetry then holds
            in expectation only.
        normalize_over: "xy", "y" or "none" (Table 11).
        affinity_floor: lower bound of the squared affinity; the release's loss has 1e-6.
        attraction, repulsion: factors on V+ and V- (Table 1).

    Raises:
        TypeError: a dtype is not floating, or dtypes differ.
        ValueError: shapes or devices do not fit, an option is out of range, or nothing could repel.

    Returns:
        V, the shape and dtype of x.

    >>> x, real = torch.tensor([[0.0], [0.1]]), torch.tensor([[1.0], [1.1]])
    >>> drifting_field(x, real, x, temperature=1.0).sign().flatten().tolist()
    [1.0, 1.0]
    >>> drifting_field(x, x, x, temperature=1.0).abs().max().item() < 1e-7
    True
    """
    check_points(x=x, positives=positives, negatives=negatives)
    check_weight("negative_weight", negative_weight, "negatives", negatives)
    num_samples, num_negatives = x.shape[-2], negatives.shape[-2]
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if mask_self and num_negatives < num_samples:
        raise ValueError(
            f"mask_self expects x among the negatives: at least {num_samples} negatives, got {num_negatives}"
        )
    if mask_self and num_negatives == 1 and affinity_floor == 0:
        raise ValueError("mask_self leaves no negative: with one sample give another negative, or an affinity_floor")
    dtype = working_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        points = centre(x.to(dtype), torch.cat([negatives, positives], -2).to(dtype))
        weights = affinity(
            distances(points) * points.unit,
            temperature,
            normalize_over=normalize_over,
            mask_self=mask_self,
            floor=affinity_floor,
        )  # [..., N, M+P]
        if negative_weight is not None:
            weights = torch.cat(
                [weights[..., :num_negatives] * negative_weight[..., None, :].to(dtype), weights[..., num_negatives:]],
                -1,
            )
        drift = weighted_drift(
            weights, points.x, points.targets, num_negatives, attraction=attraction, repulsion=repulsion
        )
        return (drift * points.unit).to(x.dtype)
