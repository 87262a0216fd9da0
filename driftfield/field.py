"""The drifting field V = V+ - V- of a generated distribution q towards the data p (Eq. 8-12, Alg. 2)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from driftfield.checks import check_choice, check_points, check_weight, working_dtype
from driftfield.forces import mmd_drift, weighted_drift
from driftfield.kernel import SQUARED_DISTANCE_FLOOR, NormalizeOver, affinity, centre, distances
from driftfield.sinkhorn import SecondBatch, sinkhorn_drift

SINKHORN_ITERATIONS = 10

Field = Literal["drifting", "sinkhorn", "mmd"]


class FieldOptions(NamedTuple):
    """What the formula of the field depends on, as the keywords of `DriftingLoss`."""

    temperatures: tuple[float, ...]
    normalize_features: bool
    affinity_floor: float
    normalize_over: NormalizeOver
    attraction: float
    repulsion: float
    # fields beyond the paper
    field: Field = "drifting"
    bias_correction: bool = False
    sinkhorn_iterations: int = SINKHORN_ITERATIONS
    second_batch: SecondBatch = "self"


def check_options(options: FieldOptions) -> None:
    """Refuse options out of range, and those without meaning for the chosen field.

    Raises:
        ValueError: one is.

    >>> check_options(FieldOptions((0.2,), True, 0.0, "y", 1.0, 1.0, field="mmd"))
    Traceback (most recent call last):
    ...
    ValueError: field='mmd' has no affinity to normalise: normalize_over must be left at 'xy', got 'y'
    """
    check_choice("normalize_over", options.normalize_over, NormalizeOver)
    check_choice("field", options.field, Field)
    check_choice("second_batch", options.second_batch, SecondBatch)
    if not options.temperatures or not all(temperature > 0 for temperature in options.temperatures):
        raise ValueError(f"temperatures must be one or more numbers > 0, got {options.temperatures}")
    if not options.affinity_floor >= 0:
        raise ValueError(f"affinity_floor must be >= 0, got {options.affinity_floor}")
    if not options.sinkhorn_iterations >= 0:
        raise ValueError(f"sinkhorn_iterations must be >= 0, got {options.sinkhorn_iterations}")
    if options.field != "drifting":
        nothing = f"field={options.field!r} has no affinity to"
        if options.normalize_over != "xy":
            raise ValueError(
                f"{nothing} normalise: normalize_over must be left at 'xy', got {options.normalize_over!r}"
            )
        if options.affinity_floor:
            raise ValueError(f"{nothing} bound: affinity_floor must be 0, got {options.affinity_floor}")
    if options.bias_correction and (options.field != "drifting" or options.normalize_over not in ("xy", "y")):
        raise ValueError(
            "bias_correction is for centroids under weights that a softmax over targets divides by their sum: it needs "
            f"field='drifting' and normalize_over 'xy' or 'y', got {options.field!r} and {options.normalize_over!r}"
        )
    if options.field != "sinkhorn":
        if options.sinkhorn_iterations != SINKHORN_ITERATIONS:
            raise ValueError(f"sinkhorn_iterations needs field='sinkhorn', got {options.field!r}")
        if options.second_batch != "self":
            raise ValueError(f"second_batch={options.second_batch!r} needs field='sinkhorn', got {options.field!r}")


def check_repulsion(num_generated: int, num_unconditional: int, options: FieldOptions) -> None:
    """Refuse groups of one sample that nothing repels.

    Raises:
        ValueError: so they are.

    >>> check_repulsion(1, 0, FieldOptions((0.2,), True, 1e-6, "xy", 1.0, 1.0))  # the floor gives it affinity to itself
    """
    if num_generated == 1 and num_unconditional == 0 and options.affinity_floor == 0 and options.repulsion:
        raise ValueError("a group of one generated sample has nothing that repels it: give 2 or unconditional ones")


def compute_forces(
    distance: Tensor,
    x: Tensor,
    targets: Tensor,
    num_negatives: int,
    options: FieldOptions,
    *,
    least_distance: Tensor | float,
    negative_weight: Tensor | None = None,
    mask_self: bool = False,
) -> list[Tensor]:
    """The field that the options choose.

    Args:
        distance: `[..., N, T]`.
        x: `[..., N, D]`.
        targets: `[..., T, D]`, the negatives first.
        num_negatives: M, how many of the T targets repel.
        options: `normalize_features` is for whoever made `distance`.
        least_distance: that of equal points.
        negative_weight: `[..., M]`; 1 if absent.
        mask_self: the first N targets are x itself, and a sample does not count itself.

    Returns:
        V of every temperature, `[..., N, D]`.

    >>> x, targets = torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]])
    >>> options = FieldOptions((1.0,), False, 0.0, "y", 1.0, 1.0)
    >>> compute_forces((targets - x).abs().T, x, targets, 1, options, least_distance=0.0)[0].item()
    0.5
    """
    if options.field == "sinkhorn":
        return sinkhorn_drift(
            distance,
            options.temperatures,
            x,
            targets,
            num_negatives,
            iterations=options.sinkhorn_iterations,
            second_batch=options.second_batch,
            negative_weight=negative_weight,
            mask_self=mask_self,
            attraction=options.attraction,
            repulsion=options.repulsion,
        )
    forces = []
    for temperature in options.temperatures:
        if options.field == "mmd":
            force = mmd_drift(
                distance,
                temperature,
                x,
                targets,
                num_negatives,
                least_distance=least_distance,
                negative_weight=negative_weight,
                mask_self=mask_self,
                attraction=options.attraction,
                repulsion=options.repulsion,
            )
        else:
            weights = affinity(
                distance,
                temperature,
                normalize_over=options.normalize_over,
                mask_self=mask_self,
                floor=options.affinity_floor,
            )  # [..., N, T]
            force = weighted_drift(
                weights,
                x,
                targets,
                num_negatives,
                negative_weight=negative_weight,
                cross_weights=options.normalize_over != "x",
                bias_correction=options.bias_correction,
                attraction=options.attraction,
                repulsion=options.repulsion,
            )
        forces.append(force)
    return forces


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
    field: Field = "drifting",
    bias_correction: bool = False,
    sinkhorn_iterations: int = SINKHORN_ITERATIONS,
    second_batch: SecondBatch = "self",
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
        field: "drifting" is the paper's. "sinkhorn" (arXiv 2603.12366, 2605.11755): the barycentre of the positives
            under the entropic coupling with x, minus that of the negatives, both couplings with equal masses at every
            x, and on the targets (`negative_weight` for the negatives); then V = 0 means equal distributions, and small
            τ pairs x with positives one to one. "mmd": the direction in which the squared maximum mean discrepancy
            falls (C.2), with means in which `negative_weight` are the masses. Its kernel has no normalisation: at τ far
            below the distances next to nothing is left of it.
        bias_correction: removes the leading term of the bias that softmax weights of few samples bring to either
            centroid (arXiv 2604.27239); for negatives of two distributions, as under guidance, only in part.
        sinkhorn_iterations: of each coupling; none leaves softmaxes over targets.
        second_batch: of `field="sinkhorn"`. "self": x is coupled with all negatives. "halves": `negatives[..., :N, :]`
            is x itself, and each half of x is a batch of its own, coupled with the positives, and with the other half
            in place of itself, which is independent of it (2605.11755).

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
    options = FieldOptions(
        temperatures=(temperature,),
        normalize_features=False,
        affinity_floor=affinity_floor,
        normalize_over=normalize_over,
        attraction=attraction,
        repulsion=repulsion,
        field=field,
        bias_correction=bias_correction,
        sinkhorn_iterations=sinkhorn_iterations,
        second_batch=second_batch,
    )
    check_options(options)
    expects_x = "mask_self" if mask_self else "second_batch='halves'" if second_batch == "halves" else None
    if expects_x and num_negatives < num_samples:
        raise ValueError(
            f"{expects_x} expects x among the negatives: at least {num_samples} negatives, got {num_negatives}"
        )
    if mask_self and num_negatives == 1 and affinity_floor == 0 and repulsion != 0:
        raise ValueError("mask_self leaves no negative: with one sample give another negative, or an affinity_floor")
    dtype = working_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        points, unit, *_ = centre(torch.cat([x, negatives, positives], -2).detach().to(dtype))
        x_centred, targets = points[..., :num_samples, :], points[..., num_samples:, :]
        (drift,) = compute_forces(
            distances(x_centred, targets, unit),
            x_centred,
            targets,
            num_negatives,
            options,
            least_distance=SQUARED_DISTANCE_FLOOR**0.5,
            negative_weight=None if negative_weight is None else negative_weight.detach().to(dtype),
            mask_self=mask_self,
        )
        return (drift * unit).to(x.dtype)
