"""The drifting loss: regression of generated samples onto their own drifted, frozen selves (Eq. 6, 13-14, 18-26)."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from driftfield.checks import check_finite, check_points, check_weight, working_dtype
from driftfield.field import weighted_drift
from driftfield.kernel import CentredPoints, NormalizeOver, affinity, centre, distances
from driftfield.normalization import distance_sums, force_sums, sum_over_processes

SCALE_FLOOR = 1e-3  # the release's lower bound of the feature scale
SQUARED_DRIFT_NORM_FLOOR = 1e-8  # the release's lower bound of λ²

Recipe = Literal["official", "paper"]


class DriftingOutput(NamedTuple):
    """What `DriftingLoss` returns. The loss is flat by construction under `official`: watch `drift_norm`."""

    loss: Tensor  # [...], one per group; its mean is what to minimise
    drift_norm: Tensor  # [temperatures], λ before normalisation: this is the curve that shows progress
    feature_scale: Tensor  # [], s: mean distance of a generated sample to its targets
    degenerate: Tensor  # [] bool: all samples of the batch agree within rounding, the drift is 0


class DriftStatistics(NamedTuple):
    """The scalars that couple all groups of a batch; `DriftingLoss.statistics` computes them over microbatches."""

    feature_scale: Tensor  # []
    drift_norm: Tensor  # [temperatures]
    degenerate: Tensor  # [] bool


class DriftingBatch(NamedTuple):
    """The arguments of one call of `DriftingLoss`."""

    x: Tensor  # [..., N, D]
    positives: Tensor  # [..., P, D]
    unconditional: Tensor | None = None  # [..., M, D]
    unconditional_weight: Tensor | None = None  # [..., M]


class _Pairs(NamedTuple):
    points: CentredPoints  # targets are [x, unconditional, positives]
    weight: Tensor  # [..., N+M+P]
    distance: Tensor  # [..., N, N+M+P]
    num_negatives: int  # N+M
    spread_sums: Tensor  # [1], how many entries differ from their group's centre by more than rounding


class DriftingLoss(nn.Module):
    """Loss whose gradient moves generated samples along the drifting field (Eq. 6, 18-26).

    `official` is the loss of the authors' release, on which the published results rest: features are divided by their
    mean distance (Eq. 21), the drift of each temperature by its own norm (Eq. 25), the drifts are added (Eq. 26).
    Because of Eq. 25 **its value is flat**: exactly 1 with one temperature, up to 9 with three. `drift_norm` falls
    instead. `paper` is Eq. 6 with the plain field of Alg. 2; its value mean ‖V‖² does fall.

    The scale and the drift norms are means over all groups given in one call and over all processes of the default
    process group. Under gradient accumulation a call per microbatch uses that microbatch's own scalars
    (*per-microbatch* mode); to reproduce the whole batch exactly, collect `statistics` over all microbatches first
    and pass them to every call (*exact* mode).

    Args:
        temperatures: τ, each > 0; multiples of the mean distance under `official`.
        recipe: names the defaults of the three options below.
        normalize_features: divide features by their scale (Eq. 21). official: True; paper: False.
        normalize_drift: divide the drift of each τ by its norm λ (Eq. 25). official: True; paper: False.
        affinity_floor: lower bound of the squared affinity. official: 1e-6; paper: 0.
        normalize_over: "xy", "y" or "none" (Table 11).
        attraction, repulsion: factors on V+ and V- (Table 1).
        check_finite: refuse NaN and infinity in any argument; waits for the device at every call.

    Raises:
        ValueError: an option is out of range.

    >>> x = torch.randn(10, 64, 32, requires_grad=True)  # 10 groups of 64 generated samples
    >>> output = DriftingLoss()(x, torch.randn(10, 64, 32))
    >>> output.loss.mean().backward()
    """

    def __init__(
        self,
        temperatures: Sequence[float] = (0.02, 0.05, 0.2),
        *,
        recipe: Recipe = "official",
        normalize_features: bool | None = None,
        normalize_drift: bool | None = None,
        affinity_floor: float | None = None,
        normalize_over: NormalizeOver = "xy",
        attraction: float = 1.0,
        repulsion: float = 1.0,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        if not temperatures or not all(temperature > 0 for temperature in temperatures):
            raise ValueError(f"temperatures must be one or more numbers > 0, got {temperatures}")
        if recipe not in ("official", "paper"):
            raise ValueError(f"recipe must be 'official' or 'paper', got {recipe!r}")
        if normalize_over not in ("xy", "y", "none"):
            raise ValueError(f"normalize_over must be 'xy', 'y' or 'none', got {normalize_over!r}")
        official = recipe == "official"
        self.temperatures = tuple(temperatures)
        self.normalize_features = official if normalize_features is None else normalize_features
        self.normalize_drift = official if normalize_drift is None else normalize_drift
        self.affinity_floor = (1e-6 if official else 0.0) if affinity_floor is None else affinity_floor
        self.normalize_over: NormalizeOver = normalize_over
        self.attraction = attraction
        self.repulsion = repulsion
        self.check_finite = check_finite
        if self.affinity_floor < 0:
            raise ValueError(f"affinity_floor must be >= 0, got {affinity_floor}")

    def forward(
        self,
        x: Tensor,
        positives: Tensor,
        unconditional: Tensor | None = None,
        unconditional_weight: Tensor | None = None,
        *,
        statistics: DriftStatistics | None = None,
    ) -> DriftingOutput:
        """Loss per group; gradients flow to `x` alone.

        Args:
            x: `[..., N, D]` generated samples or their features; leading dimensions are independent groups.
            positives: `[..., P, D]` real samples of each group.
            unconditional: `[..., M, D]` real samples of any class, which repel (A.7).
            unconditional_weight: `[..., M]`, see `driftfield.unconditional_weight`; 1 if absent.
            statistics: batch-wide scalars to use instead of this call's own.

        Raises:
            TypeError: not floating-point tensors of one dtype.
            ValueError: shapes, groups or devices that do not fit, an empty dimension, nothing that could repel, or
                (with `check_finite`) entries that are not finite.

        Returns:
            `DriftingOutput`; `loss` has the leading dimensions of x, float32 (float64 for float64 input).
        """
        batch = DriftingBatch(x, positives, unconditional, unconditional_weight)
        self._check(batch)
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                pairs = _pairs(batch)
                if statistics is None:
                    scale, degenerate = _scale_and_degenerate(_scale_sums(pairs))
                    forces = self._forces(pairs, scale)  # one [..., N, D] per temperature
                    drift_norm = _drift_norm(force_sums(forces))
                else:
                    scale, drift_norm, degenerate = statistics
                    forces = self._forces(pairs, scale)
                drift = self._total_drift(forces, drift_norm).masked_fill(degenerate, 0.0)  # V  [..., N, D]
                coordinate_scale = self._coordinate_scale(scale, x.shape[-1])
            # Eq. 6: || x - stopgrad(x + V) ||². x - stopgrad(x) is taken first: it is 0, whatever x rounds to.
            moved = (x - x.detach()).to(drift.dtype) / coordinate_scale
            loss = (moved - drift).square().mean((-2, -1))
        return DriftingOutput(loss, drift_norm, scale, degenerate)

    @torch.no_grad()
    def statistics(self, microbatches: Iterable[DriftingBatch]) -> DriftStatistics:
        """Scalars of the batch that the microbatches make up: the first pass of exact gradient accumulation.

        Args:
            microbatches: the whole batch in pieces along the groups; iterated over twice.

        Returns:
            What to pass as `statistics` to every call of the second pass.

        >>> loss_fn, x, real = DriftingLoss(), torch.randn(4, 8, 3), torch.randn(4, 8, 3)
        >>> parts = [DriftingBatch(x[:2], real[:2]), DriftingBatch(x[2:], real[2:])]
        >>> exact = torch.cat([loss_fn(*part, statistics=loss_fn.statistics(parts)).loss for part in parts])
        >>> torch.allclose(exact, loss_fn(x, real).loss)
        True
        """
        parts = list(microbatches)
        if not parts:
            raise ValueError("microbatches is empty, expected at least one DriftingBatch")
        for part in parts:
            self._check(part)
        with torch.autocast(parts[0].x.device.type, enabled=False):
            scale, degenerate = _scale_and_degenerate(_total(_scale_sums(_pairs(part)) for part in parts))
            sums = _total(force_sums(self._forces(_pairs(part), scale)) for part in parts)
            return DriftStatistics(scale, _drift_norm(sums), degenerate)

    def _coordinate_scale(self, scale: Tensor, dimension: int) -> Tensor:
        # Eq. 21: features have mean distance √D
        return (scale / dimension**0.5).clamp(min=SCALE_FLOOR) if self.normalize_features else torch.ones_like(scale)

    def _forces(self, pairs: _Pairs, scale: Tensor) -> list[Tensor]:
        """V of every temperature before its normalisation, in normalised coordinates, `[..., N, D]` each."""
        (x, targets, unit), distance = pairs.points, pairs.distance
        kernel_scale = scale.clamp(min=SCALE_FLOOR) if self.normalize_features else torch.ones_like(scale)
        distance = distance * (unit / kernel_scale)  # τ multiplies the mean distance (Eq. 22)
        coordinate = unit / self._coordinate_scale(scale, x.shape[-1])
        x, targets = x * coordinate, targets * coordinate
        forces = []
        for temperature in self.temperatures:
            weights = affinity(
                distance,
                temperature,
                normalize_over=self.normalize_over,
                mask_self=True,
                floor=self.affinity_floor,
            )  # [..., N, N+M+P]
            weights = weights * pairs.weight[..., None, :]  # after both softmaxes: w acts linearly, and w = 0 is exact
            forces.append(
                weighted_drift(
                    weights, x, targets, pairs.num_negatives, attraction=self.attraction, repulsion=self.repulsion
                )
            )
        return forces

    def _total_drift(self, forces: list[Tensor], drift_norm: Tensor) -> Tensor:
        """V = Σ_τ V_τ/λ_τ (Eq. 25-26), or Σ_τ V_τ."""
        if not self.normalize_drift:
            return torch.stack(forces).sum(0)
        divisor = drift_norm.clamp(min=SQUARED_DRIFT_NORM_FLOOR**0.5)  # [temperatures]
        return torch.stack([force / divisor[i] for i, force in enumerate(forces)]).sum(0)

    def _check(self, batch: DriftingBatch) -> None:
        x, positives, unconditional, weight = batch
        check_points(x=x, positives=positives, **({} if unconditional is None else {"unconditional": unconditional}))
        check_weight("unconditional_weight", weight, "unconditional", unconditional)
        samples, alone = x.shape[-2], x.shape[-2] == 1 and unconditional is None
        if alone and self.affinity_floor == 0:
            raise ValueError("a group of one generated sample has nothing that repels it: give 2 or unconditional ones")
        if torch.compiler.is_compiling():
            return
        if self.check_finite:
            check_finite(x=x, positives=positives, unconditional=unconditional, unconditional_weight=weight)
        if self.normalize_drift and self.normalize_features:
            _warn_of_regression(samples, positives.shape[-2], alone)


def sum_over_features(
    loss_fn: DriftingLoss,
    x: Mapping[str, Tensor],
    positives: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None = None,
    unconditional_weight: Tensor | None = None,
) -> DriftingOutput:
    """Loss Σ_j over features φ_j, each with its own scale and drift norms (Eq. 13-14, A.5).

    Dimensions between the first and the samples are locations of a feature map: further groups, which share the
    scalars of their map and over which its loss is averaged.

    Args:
        loss_fn: the loss of one feature.
        x: feature name to `[B, ..., N, D]`.
        positives: the same names to `[B, ..., P, D]`.
        unconditional: the same names to `[B, ..., M, D]`.
        unconditional_weight: `[B, M]`, the same for all features and locations.

    Raises:
        ValueError: no features, names differ, or as `DriftingLoss` raises, with the name of the feature.

    Returns:
        `DriftingOutput`: loss `[B]`, drift_norm `[features, temperatures]`, feature_scale and degenerate `[features]`,
        rows in the order of `x`.

    >>> features = {"pixels": torch.randn(2, 8, 3), "map": torch.randn(2, 16, 8, 5)}
    >>> [list(part.shape) for part in sum_over_features(DriftingLoss(), features, features)]
    [[2], [2, 3], [2], [2]]
    """
    if not x:
        raise ValueError("x has no features, expected at least one")
    for other_name, other in {"positives": positives, "unconditional": unconditional}.items():
        if other is not None and other.keys() != x.keys():
            raise ValueError(f"{other_name} has features {sorted(other)}, expected those of x: {sorted(x)}")
    outputs = []
    for name, feature in x.items():
        weight = unconditional_weight
        if weight is not None:
            locations = feature.ndim - 3
            weight = weight.reshape(len(weight), *[1] * locations, -1)  # [B, ..., M]
        try:
            output = loss_fn(feature, positives[name], unconditional[name] if unconditional else None, weight)
        except (TypeError, ValueError) as error:
            raise type(error)(f"feature {name!r}: {error}") from error
        outputs.append(output._replace(loss=output.loss.flatten(1).mean(1) if output.loss.ndim > 1 else output.loss))
    loss, drift_norm, feature_scale, degenerate = (torch.stack(parts) for parts in zip(*outputs, strict=True))
    return DriftingOutput(loss.sum(0), drift_norm, feature_scale, degenerate)


def _pairs(batch: DriftingBatch) -> _Pairs:
    """Targets [x, unconditional, positives] of every x, their weights and distances."""
    x, positives, unconditional, unconditional_weight = batch
    dtype = working_dtype(x)
    x = x.detach()
    negatives = [x] if unconditional is None else [x, unconditional]
    targets = torch.cat([*negatives, positives], -2).detach()  # [..., N+M+P, D]
    weight = torch.ones(targets.shape[:-1], dtype=dtype, device=x.device)
    num_negatives = targets.shape[-2] - positives.shape[-2]
    if unconditional_weight is not None:
        given = unconditional_weight.detach().to(dtype).expand(*x.shape[:-2], num_negatives - x.shape[-2])
        weight = torch.cat([weight[..., : x.shape[-2]], given, weight[..., num_negatives:]], -1)
    points = centre(x.to(dtype), targets.to(dtype))
    differs = (points.targets * points.unit).abs() > torch.finfo(x.dtype).eps * targets.to(dtype).abs()
    return _Pairs(points, weight, distances(points), num_negatives, differs.sum().to(dtype)[None])


def _scale_sums(pairs: _Pairs) -> Tensor:
    return torch.cat([distance_sums(pairs.distance, pairs.weight, pairs.points.unit), pairs.spread_sums])  # [3]


def _scale_and_degenerate(sums: Tensor) -> tuple[Tensor, Tensor]:
    weighted, weights, spread = sum_over_processes(sums)
    return weighted / weights, spread == 0


def _drift_norm(sums: Tensor) -> Tensor:
    sums = sum_over_processes(sums)
    return (sums[:-1] / sums[-1]).sqrt()  # λ, [temperatures]


def _total(sums: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(sums)).sum(0)


def _warn_of_regression(num_generated: int, num_positives: int, alone: bool) -> None:
    if alone:
        warnings.warn(
            "one generated sample per group has nothing to repel it: the loss is normalised regression (its value is "
            "exactly the number of temperatures squared). Give at least 2 generated samples per group.",
            stacklevel=4,
        )
    elif num_positives == 1 and num_generated >= 4:
        warnings.warn(
            f"one positive and {num_generated} generated samples per group: all samples drift to the same point, which "
            "is regression to the conditional mean. Give several positives per group.",
            stacklevel=4,
        )
