"""What the targets pull and push every sample by, given their affinities: Alg. 2, its bias correction, and MMD."""

import torch
from torch import Tensor


def displacement(coefficient: Tensor, x: Tensor, targets: Tensor) -> Tensor:
    """Σ_j coefficient_ij (y_j - x_i), without an intermediate of that size.

    Args:
        coefficient: `[..., N, T]`.
        x: `[..., N, D]`.
        targets: y, `[..., T, D]`.

    Returns:
        `[..., N, D]`.

    >>> displacement(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([[4.0]])).item()
    6.0
    """
    return torch.addcmul(coefficient @ targets, coefficient.sum(-1, keepdim=True), x, value=-1.0)


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
    bias_correction: bool = False,
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
        bias_correction: see `correct_bias`; on either side.

    Returns:
        V, `[..., N, D]`.

    >>> x, targets = torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]])
    >>> weighted_drift(torch.tensor([[0.5, 0.5]]), x, targets, 1).item()
    0.5
    """
    negative, positive = affinity[..., :num_negatives], affinity[..., num_negatives:]
    if negative_weight is not None:  # after the normalisation, so that it acts linearly and 0 removes a sample
        negative = negative * negative_weight[..., None, :]
    if bias_correction:
        negative, positive = correct_bias(negative), correct_bias(positive)
    if cross_weights:
        attract = positive * (attraction * negative.sum(-1, keepdim=True))  # W+ = A+ ΣA-  [..., N, P]
        repel = negative * (-repulsion * positive.sum(-1, keepdim=True))  # -W- = -A- ΣA+  [..., N, M]
    else:
        attract, repel = positive * attraction, negative * -repulsion
    return displacement(torch.cat([repel, attract], -1), x, targets)


def correct_bias(weight: Tensor) -> Tensor:
    """Weights of a centroid without the leading term of the bias that its division by their sum brings.

    The mean of n fresh samples under weights k(x, y) / Σ k(x, y) is off by -Σ w² (y - mean) on average, which is
    O(1/n). w (1 + w - Σ w²), for w of sum 1, leaves O(1/n²) (arXiv 2604.27239), none of them negative.

    Args:
        weight: `[..., K]`, not negative, of any sum.

    Returns:
        `[..., K]`, of the same sum.

    >>> correct_bias(torch.tensor([1.0, 3.0])).tolist()
    [0.625, 3.375]
    """
    share = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return weight * (1.0 + share - share.square().sum(-1, keepdim=True))


def mmd_drift(
    distance: Tensor,
    temperature: float,
    x: Tensor,
    targets: Tensor,
    num_negatives: int,
    *,
    least_distance: Tensor | float,
    negative_weight: Tensor | None = None,
    mask_self: bool = False,
    attraction: float = 1.0,
    repulsion: float = 1.0,
) -> Tensor:
    """V = τ² (E[∇k(x, y+)] - E[∇k(x, y-)]), k the Laplace kernel: -τ² N/2 times the gradient of MMD² to x (C.2).

    The factor τ² makes it a length: every target pulls or pushes by τ k(x, y). Nothing is normalised, so that far
    samples feel next to nothing.

    Args:
        distance: `[..., N, T]`.
        temperature: τ, in the unit of `distance`, > 0.
        x: `[..., N, D]`.
        targets: `[..., T, D]`, the negatives first.
        num_negatives: M, how many of the T targets repel.
        least_distance: that of equal points, between which ∇k is 0.
        negative_weight: `[..., M]`, masses of the negatives in their mean; 1 if absent.
        mask_self: the first N negatives are x itself, and the mean of a sample leaves it out.
        attraction, repulsion: factors on the two means.

    Returns:
        V, `[..., N, D]`.

    >>> x, targets = torch.zeros(1, 1), torch.tensor([[-9.0], [3.0]])
    >>> round(mmd_drift((targets - x).abs().T, 3.0, x, targets, 1, least_distance=0.0).item(), 3)
    1.253
    """
    num_samples = distance.shape[-2]
    # τ² ∇k = τ k (y - x) / |y - x|
    pull = (distance / -temperature).exp() * (temperature / distance)  # [..., N, T]
    pull = pull.masked_fill(distance <= 1.001 * least_distance, 0.0)
    negative, positive = pull[..., :num_negatives], pull[..., num_negatives:]
    mass = negative.new_ones(num_negatives) if negative_weight is None else negative_weight
    mass = mass[..., None, :].expand(*negative.shape)  # [..., N, M]
    if mask_self:
        self_pair = torch.eye(num_samples, num_negatives, dtype=torch.bool, device=mass.device)
        mass = mass.masked_fill(self_pair, 0.0)
    share = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    coefficient = torch.cat([negative * share * -repulsion, positive * (attraction / positive.shape[-1])], -1)
    return displacement(coefficient, x, targets)
