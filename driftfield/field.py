"""The drifting field V = V+ - V- of a generated distribution q towards the data p (Eq. 8-12, Alg. 2)."""

import torch
from torch import Tensor

from driftfield.checks import check_choice, check_points, check_weight, working_dtype
from driftfield.kernel import NormalizeOver, affinity, centre, distances


def weighted_drift(
    affinity: Tensor,
    x: Tensor,
    targets: Tensor,
    num_negatives: int,
    *,
    negative_weight: Tensor | None = None,
    attraction: float = 1.0,
    repulsion: float = 1.0,
    cross_weights: bool = True,
) -> Tensor:
    """V = W+ y+ - W- y-, every target taken relative to x (Eq. 10-11, Alg. 2).

    Args:
        affinity: A, `[..., N, T]`.
        x: `[..., N, D]`.
        targets: `[..., T, D]`, the negatives first.
        num_negatives: M, how many of the T targets repel.
        negative_weight: `[..., M]`; 1 if absent.
        attraction, repulsion: factors on V+ and V- (Table 1).
        cross_weights: multiply the affinity to each side by the sum of that to the other (Eq. 11).

    Returns:
        V, `[..., N, D]`.

    >>> x, targets = torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]])
    >>> weighted_drift(torch.tensor([[0.5, 0.5]]), x, targets, 1).item()
    0.5
    """
    negative, positive = affinity[..., :num_negatives], affinity[..., num_negatives:]
    if negative_weight is not None:  # after the normalisation, so that it acts linearly and 0 removes a sample
        negative = negative * negative_weight[..., None, :]
    if cross_weights:
        attract = positive * (attraction * negative.sum(-1, keepdim=True))  # W+ = A+ ΣA-  [..., N, P]
        repel = negative * (-repulsion * positive.sum(-1, keepdim=True))  # -W- = -A- ΣA+  [..., N, M]
    else:
        attract, repel = positive * attraction, negative * -repulsion
    coefficient = torch.cat([repel, attract], -1)  # [..., N, T]
    # Σ coefficient (y - x), without an intermediate of that size
    return torch.addcmul(coefficient @ targets, coefficient.sum(-1, keepdim=True), x, value=-1.0)


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

    V is anti-symmetric: exchanging positives and negatives flips its sign, so V = 0 when both are the same set (exactly
    so without `mask_self`). Leading dimensions are independent groups. Computed in float32 (float64 for float64 input)
    without gradient.

    Args:
        x: `[..., N, D]` generated samples.
        positives: `[..., P, D]` real samples.
        negatives: `[..., M, D]`, usually x itself, followed by unconditional real samples under guidance.
        temperature: τ > 0, in the unit of the distances between samples.
        negative_weight: `[..., M]`, >= 0, acts linearly, after the normalisation (A.7).
        mask_self: `negatives[..., :N, :]` is x itself, and a sample does not count itself. This is what makes V vanish
            on average where the other samples and the positives are fresh draws of one distribution (with "xy" up to a
            small bias, as masked columns have one entry less); without it every sample is drawn inwards.
        normalize_over: "xy", "y" or "none" (Table 11); or "x", which is not the paper's: a softmax over x alone, and
            no product with the other side's sum. Every positive then shares one unit of pull among the samples, the
            nearest first, so that one positive per group does not pull all of them alike. With repulsion, as many
            negatives as positives keep the balance. With `repulsion=0` it is a step of EM for the likelihood of the
            positives under a mixture of kernels centred at x: V vanishes where every sample is the mean of the
            positives in its share.
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
    if not affinity_floor >= 0:
        raise ValueError(f"affinity_floor must be >= 0, got {affinity_floor}")
    check_choice("normalize_over", normalize_over, NormalizeOver)
    if mask_self and num_negatives < num_samples:
        raise ValueError(
            f"mask_self expects x among the negatives: at least {num_samples} negatives, got {num_negatives}"
        )
    if mask_self and num_negatives == 1 and affinity_floor == 0 and repulsion != 0:
        raise ValueError("mask_self leaves no negative: with one sample give another negative, or an affinity_floor")
    dtype = working_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        points, unit, *_ = centre(torch.cat([x, negatives, positives], -2).detach().to(dtype))
        x_centred, targets = points[..., :num_samples, :], points[..., num_samples:, :]
        weights = affinity(
            distances(x_centred, targets, unit),
            temperature,
            normalize_over=normalize_over,
            mask_self=mask_self,
            floor=affinity_floor,
        )  # [..., N, M+P]
        drift = weighted_drift(
            weights,
            x_centred,
            targets,
            num_negatives,
            negative_weight=None if negative_weight is None else negative_weight.detach().to(dtype),
            attraction=attraction,
            repulsion=repulsion,
            cross_weights=normalize_over != "x",
        )
        return (drift * unit).to(x.dtype)
