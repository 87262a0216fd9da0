"""The drift of one batch in the stages between which its processes exchange scalars: distances, forces, regression."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from driftfield.checks import working_dtype
from driftfield.field import FieldOptions, compute_forces
from driftfield.kernel import SQUARED_DISTANCE_FLOOR, centre, distances
from driftfield.normalization import count_varying, distance_sums, force_sums

SCALE_FLOOR = 1e-3  # the release's lower bound of the feature scale


class DriftingBatch(NamedTuple):
    """The arguments of one call of `DriftingLoss`."""

    x: Tensor  # [..., N, D]
    positives: Tensor  # [..., P, D]
    unconditional: Tensor | None = None  # [..., M, D]
    unconditional_weight: Tensor | None = None  # [..., M]


class Drift(Protocol):
    """The drift of one batch; frozen, but for the gradient of `loss` to x.

    Made from a `DriftingBatch` and `FieldOptions`. There is one such class for each way to compute it.
    """

    scale_sums: Tensor  # [3]: numerator and denominator of s (Eq. 21), and how many coordinates vary in their group

    def __init__(self, batch: DriftingBatch, options: FieldOptions) -> None: ...

    def force_sums(self, scale: Tensor) -> Tensor:
        """Numerators, one per temperature, and the denominator of λ² = mean(F²) (Eq. 25), `[temperatures + 1]`."""
        ...

    def loss(self, scale: Tensor, factor: Tensor) -> Tensor:
        """Eq. 6 in coordinates divided by c (Eq. 21), for V = Σ_τ factor_τ F_τ (Eq. 26).

        Args:
            scale: s, `[]`.
            factor: `[temperatures]`, 1/λ_τ under Eq. 25.

        Returns:
            mean over N and D of (x/c - stopgrad(x/c + V))², `[...]`, one per group.
        """
        ...


class EagerDrift:
    """`Drift` by the formulas as they stand, whole matrices at a time."""

    def __init__(self, batch: DriftingBatch, options: FieldOptions) -> None:
        x, positives, unconditional, unconditional_weight = batch
        self._x, self._options = x, options
        dtype = working_dtype(x)
        negatives = [x] if unconditional is None else [x, unconditional]
        centred = centre(torch.cat([*negatives, positives], -2).detach().to(dtype))
        self._targets, self._unit = centred.points, centred.unit  # [x, unconditional, positives]  [..., N+M+P, D]
        self._num_negatives = self._targets.shape[-2] - positives.shape[-2]  # N+M
        weight = target_weight(batch, dtype)  # [..., N+M+P]
        self._negative_weight = None if unconditional_weight is None else weight[..., : self._num_negatives]
        self._distance = distances(self._targets[..., : x.shape[-2], :], self._targets, self._unit)  # [..., N, N+M+P]
        sums = distance_sums(self._distance, weight)
        self.scale_sums = torch.cat([sums, count_varying(centred, x.dtype)[None]])
        self._forces: list[Tensor] = []

    def force_sums(self, scale: Tensor) -> Tensor:
        """See `Drift`."""
        self._forces = self._compute_forces(scale)
        return force_sums(self._forces)

    def loss(self, scale: Tensor, factor: Tensor) -> Tensor:
        """See `Drift`."""
        forces = self._forces or self._compute_forces(scale)
        drift = forces[0] * factor[0]  # V  [..., N, D]
        for i in range(1, len(forces)):
            drift = torch.addcmul(drift, forces[i], factor[i])
        # Eq. 6: || x - stopgrad(x + V) ||². x - stopgrad(x) is taken first: it is 0, whatever x rounds to.
        moved = (self._x - self._x.detach()).to(drift.dtype) / coordinate_scale(scale, drift.shape[-1], self._options)
        return (moved - drift).square().mean((-2, -1))

    def _compute_forces(self, scale: Tensor) -> list[Tensor]:
        """F of every temperature in normalised coordinates, `[..., N, D]` each."""
        options, distance = self._options, self._distance
        kernel_scale = scale.clamp(min=SCALE_FLOOR) if options.normalize_features else torch.ones_like(scale)
        targets = self._targets * (self._unit / coordinate_scale(scale, self._targets.shape[-1], options))
        return compute_forces(
            distance / kernel_scale,  # τ multiplies the mean distance (Eq. 22)
            targets[..., : distance.shape[-2], :],
            targets,
            self._num_negatives,
            options,
            least_distance=SQUARED_DISTANCE_FLOOR**0.5 / kernel_scale,
            negative_weight=self._negative_weight,
            mask_self=True,
        )


def coordinate_scale(scale: Tensor, dimension: int, options: FieldOptions) -> Tensor:
    """c, by which coordinates are divided: then features have mean distance √D (Eq. 21)."""
    return (scale / dimension**0.5).clamp(min=SCALE_FLOOR) if options.normalize_features else torch.ones_like(scale)


def target_weight(batch: DriftingBatch, dtype: torch.dtype) -> Tensor:
    """w of the targets [x, unconditional, positives]: 1 but for the unconditional ones (A.7), `[..., N+M+P]`."""
    x, positives, unconditional, unconditional_weight = batch
    num_samples, num_positives = x.shape[-2], positives.shape[-2]
    num_unconditional = 0 if unconditional is None else unconditional.shape[-2]
    num_targets = num_samples + num_unconditional + num_positives
    weight = torch.ones(*x.shape[:-2], num_targets, dtype=dtype, device=x.device)
    if unconditional_weight is None:
        return weight
    given = unconditional_weight.detach().to(dtype).expand(*x.shape[:-2], num_unconditional)
    return torch.cat([weight[..., :num_samples], given, weight[..., num_samples + num_unconditional :]], -1)


class _Regression(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drift: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(drift, scale)
        ctx.dtype = x.dtype
        return drift.square().mean((-2, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        drift, scale = ctx.saved_tensors
        factor = gradients[0] * (-2.0 / (drift.shape[-2] * drift.shape[-1])) / scale
        return (factor[..., None, None] * drift).to(ctx.dtype), None, None


def regress(x: Tensor, drift: Tensor, coordinate_scale: Tensor) -> Tensor:
    """Eq. 6, value and first gradient, without the steps in between: those would each read all of x and V again.

    Args:
        x: `[..., N, D]`.
        drift: V, `[..., N, D]`, frozen.
        coordinate_scale: c, `[]`, by which the coordinates of V were divided.

    Returns:
        mean over N and D of (x/c - stopgrad(x/c + V))², `[...]`.

    >>> x = torch.zeros(2, 1, requires_grad=True)
    >>> regress(x, torch.tensor([[1.0], [3.0]]), torch.tensor(2.0)).backward()
    >>> x.grad.flatten().tolist()
    [-0.5, -1.5]
    """
    loss: Tensor = _Regression.apply(x, drift, coordinate_scale)
    return loss
