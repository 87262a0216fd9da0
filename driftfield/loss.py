"""The drifting loss: regression of generated samples onto their own drifted, frozen selves (Eq. 6, 13-14, 18-26)."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from driftfield.backend import Backend, choose_drift
from driftfield.checks import check_choice, check_finite, check_points, check_weight
from driftfield.drift import Drift, DriftingBatch
from driftfield.field import SINKHORN_ITERATIONS, Field, FieldOptions, check_options, check_repulsion
from driftfield.kernel import NormalizeOver
from driftfield.normalization import sum_over_processes
from driftfield.ring import RingDrift
from driftfield.sinkhorn import SecondBatch

SQUARED_DRIFT_NORM_FLOOR = 1e-8  # the release's lower bound of λ²
CALLER_OF_MODULE = 5  # frames from a warning in a helper of forward to who called the nn.Module

Recipe = Literal["official", "paper"]
T = TypeVar("T")


class DriftingOutput(NamedTuple):
    """What `DriftingLoss` returns. The loss is flat by construction under `official`: watch `drift_norm`."""

    loss: Tensor  # [...], one per group; its mean is what to minimise
    drift_norm: Tensor  # [temperatures], λ before normalisation: this is the curve that shows progress
    feature_scale: Tensor  # [], s: mean distance of a generated sample to its targets
    degenerate: Tensor  # [] bool: within every group all samples agree up to rounding, and the drift is 0


class DriftStatistics(NamedTuple):
    """The scalars that couple all groups of a batch; `DriftingLoss.statistics` computes them over microbatches."""

    feature_scale: Tensor  # []
    drift_norm: Tensor  # [temperatures]
    degenerate: Tensor  # [] bool


class FeatureBatch(NamedTuple):
    """The arguments of one call of `sum_over_features`, by name of the feature."""

    x: Mapping[str, Tensor]  # [B, ..., N, D] each
    positives: Mapping[str, Tensor]  # [B, ..., P, D] each
    unconditional: Mapping[str, Tensor] | None = None  # [B, ..., M, D] each
    unconditional_weight: Tensor | None = None  # [B, M]


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
        affinity_floor: lower bound of the squared affinity. official: 1e-6, but 0 with "x" and for other fields than
            "drifting"; paper: 0.
        normalize_over: "xy", "y" or "none" (Table 11), or "x", see `drifting_field`: with one positive per group, "x"
            and `repulsion=0` keep the modes that the others average.
        attraction, repulsion: factors on V+ and V- (Table 1).
        field, bias_correction, sinkhorn_iterations, second_batch: beyond the paper, see `drifting_field`.
        backend: "eager" computes by the formulas as they stand, "fused" by Triton kernels on a GPU, with a relative
            error of at most 1e-3 in loss, gradient and λ; "auto" takes "fused" where it serves, see
            `driftfield.backend.choose_drift`.
        memory_mib: "eager" works in strips where its matrices of pairs would need more; None: never.
        share_groups: every process holds a part of the samples of every group, and the loss is that of the groups put
            together, see `driftfield.ring.RingDrift`. Otherwise processes hold different groups.
        check_finite: refuse NaN and infinity in any argument; waits for the device at every call.

    Raises:
        ValueError: an option is out of range, or without meaning for the chosen field.

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
        field: Field = "drifting",
        bias_correction: bool = False,
        sinkhorn_iterations: int = SINKHORN_ITERATIONS,
        second_batch: SecondBatch = "self",
        backend: Backend = "auto",
        memory_mib: float | None = None,
        share_groups: bool = False,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        check_choice("recipe", recipe, Recipe)
        official = recipe == "official"
        floor = 1e-6 if official and normalize_over != "x" and field == "drifting" else 0.0
        self.options = FieldOptions(
            temperatures=tuple(temperatures),
            normalize_features=official if normalize_features is None else normalize_features,
            affinity_floor=floor if affinity_floor is None else affinity_floor,
            normalize_over=normalize_over,
            attraction=attraction,
            repulsion=repulsion,
            field=field,
            bias_correction=bias_correction,
            sinkhorn_iterations=sinkhorn_iterations,
            second_batch=second_batch,
        )
        check_options(self.options)
        check_choice("backend", backend, Backend)
        if memory_mib is not None and not memory_mib > 0:
            raise ValueError(f"memory_mib must be > 0, got {memory_mib}")
        if share_groups and backend == "fused":
            raise ValueError("share_groups works without kernels: backend must be 'auto' or 'eager', got 'fused'")
        self.backend: Backend = backend
        self.memory_mib, self.share_groups = memory_mib, share_groups
        self.normalize_drift = official if normalize_drift is None else normalize_drift
        self.check_finite = check_finite

    def forward(
        self,
        x: Tensor,
        positives: Tensor,
        unconditional: Tensor | None = None,
        unconditional_weight: Tensor | None = None,
        *,
        statistics: DriftStatistics | None = None,
        temperature_factor: float = 1.0,
    ) -> DriftingOutput:
        """Loss per group; gradients flow to `x` alone.

        Args:
            x: `[..., N, D]` generated samples or their features; leading dimensions are independent groups.
            positives: `[..., P, D]` real samples of each group.
            unconditional: `[..., M, D]` real samples of any class, which repel (A.7).
            unconditional_weight: `[..., M]`, see `driftfield.unconditional_weight`; 1 if absent.
            statistics: batch-wide scalars to use instead of this call's own.
            temperature_factor: multiplies every τ of this call, > 0, so that training can anneal them.

        Raises:
            TypeError: not floating-point tensors of one dtype.
            ValueError: shapes, groups or devices that do not fit, an empty dimension, nothing that could repel, or
                (with `check_finite`) entries that are not finite.

        Returns:
            `DriftingOutput`; `loss` has the leading dimensions of x, float32 (float64 for float64 input).
        """
        batch = DriftingBatch(x, positives, unconditional, unconditional_weight)
        self._check(batch)
        normalized = self.options.normalize_features and self.normalize_drift
        if normalized and not self.share_groups and not torch.compiler.is_compiling():
            _warn_of_regression(x.shape[-2], positives.shape[-2], unconditional is None, self.options.normalize_over)
        with torch.autocast(x.device.type, enabled=False):
            drift = self._drift(batch, temperature_factor)
            if statistics is None:
                scale, degenerate = _scale_and_degenerate(drift.scale_sums)
                drift_norm = _drift_norm(drift.force_sums(scale))
            else:
                scale, drift_norm, degenerate = statistics
            if self.check_finite:
                check_finite(feature_scale=scale, drift_norm=drift_norm)
            loss = drift.loss(scale, self._factor(drift_norm, degenerate))
        return DriftingOutput(loss, drift_norm, scale, degenerate)

    def statistics(self, microbatches: Iterable[DriftingBatch], *, temperature_factor: float = 1.0) -> DriftStatistics:
        """Scalars of the batch that the microbatches make up: the first pass of exact gradient accumulation.

        Args:
            microbatches: the whole batch in pieces along the groups; gone through twice, so a container, or an object
                whose iteration makes every piece anew.
            temperature_factor: as for the calls of the second pass.

        Raises:
            TypeError, ValueError: there are none, or as `forward` raises.

        Returns:
            What to pass as `statistics` to every call of the second pass.

        >>> loss_fn, x, real = DriftingLoss(), torch.randn(4, 8, 3), torch.randn(4, 8, 3)
        >>> parts = [DriftingBatch(x[:2], real[:2]), DriftingBatch(x[2:], real[2:])]
        >>> exact = torch.cat([loss_fn(*part, statistics=loss_fn.statistics(parts)).loss for part in parts])
        >>> torch.allclose(exact, loss_fn(x, real).loss)
        True
        """
        return _statistics(self, microbatches, lambda part: [("", DriftingBatch(*part))], temperature_factor)[""]

    @torch.no_grad()
    def _scale_sums(self, batch: DriftingBatch, temperature_factor: float) -> Tensor:
        self._check(batch)
        with torch.autocast(batch.x.device.type, enabled=False):
            return self._drift(batch, temperature_factor).scale_sums

    @torch.no_grad()
    def _force_sums(self, batch: DriftingBatch, scale: Tensor, temperature_factor: float) -> Tensor:
        with torch.autocast(batch.x.device.type, enabled=False):
            return self._drift(batch, temperature_factor).force_sums(scale)

    def _drift(self, batch: DriftingBatch, temperature_factor: float) -> Drift:
        options = self._options(temperature_factor)
        if self.share_groups:
            return RingDrift(batch, options, memory_mib=self.memory_mib)
        return choose_drift(batch, options, backend=self.backend, memory_mib=self.memory_mib)

    def _options(self, temperature_factor: float) -> FieldOptions:
        if temperature_factor == 1.0:
            return self.options
        if not temperature_factor > 0:
            raise ValueError(f"temperature_factor must be > 0, got {temperature_factor}")
        return self.options._replace(temperatures=tuple(temperature_factor * t for t in self.options.temperatures))

    def _factor(self, drift_norm: Tensor, degenerate: Tensor) -> Tensor:
        """1/λ of every temperature (Eq. 25), or 1; 0 where there is nothing but rounding to normalise."""
        factor = torch.ones_like(drift_norm)  # [temperatures]
        if self.normalize_drift:
            factor = 1.0 / drift_norm.clamp(min=SQUARED_DRIFT_NORM_FLOOR**0.5)
        return factor.masked_fill(degenerate, 0.0)

    def _check(self, batch: DriftingBatch) -> None:
        x, positives, unconditional, weight = batch
        check_points(x=x, positives=positives, **({} if unconditional is None else {"unconditional": unconditional}))
        check_weight("unconditional_weight", weight, "unconditional", unconditional)
        if not self.share_groups:  # else the others may have what repels the only sample here
            check_repulsion(x.shape[-2], 0 if unconditional is None else unconditional.shape[-2], self.options)
        if self.check_finite:
            check_finite(x=x, positives=positives, unconditional=unconditional, unconditional_weight=weight)


def sum_over_features(
    loss_fn: DriftingLoss,
    x: Mapping[str, Tensor],
    positives: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None = None,
    unconditional_weight: Tensor | None = None,
    *,
    statistics: Mapping[str, DriftStatistics] | None = None,
    temperature_factor: float = 1.0,
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
        statistics: what `feature_statistics` returned (exact gradient accumulation).
        temperature_factor: multiplies every τ of this call, > 0.

    Raises:
        TypeError: as `DriftingLoss` raises, with the name of the feature.
        ValueError: no features, names differ, or as `DriftingLoss` raises, with the name of the feature.

    Returns:
        `DriftingOutput`: loss `[B]`, drift_norm `[features, temperatures]`, feature_scale and degenerate `[features]`,
        rows in the order of `x`.

    >>> features = {"pixels": torch.randn(2, 8, 3), "map": torch.randn(2, 16, 8, 5)}
    >>> [list(part.shape) for part in sum_over_features(DriftingLoss(), features, features)]
    [[2], [2, 3], [2], [2]]
    """
    if statistics is not None and statistics.keys() != x.keys():
        raise ValueError(f"statistics has features {sorted(statistics)}, expected those of x: {sorted(x)}")
    outputs = []
    for name, batch in _by_feature(FeatureBatch(x, positives, unconditional, unconditional_weight)):
        with _naming(name):
            output = loss_fn(
                *batch,
                statistics=None if statistics is None else statistics[name],
                temperature_factor=temperature_factor,
            )
        outputs.append(output._replace(loss=output.loss.reshape(batch.x.shape[0], -1).mean(1)))  # [B]
    loss, drift_norm, feature_scale, degenerate = (torch.stack(parts) for parts in zip(*outputs, strict=True))
    return DriftingOutput(loss.sum(0), drift_norm, feature_scale, degenerate)


def feature_statistics(
    loss_fn: DriftingLoss, microbatches: Iterable[FeatureBatch], *, temperature_factor: float = 1.0
) -> dict[str, DriftStatistics]:
    """Scalars of every feature over the batch that the microbatches make up, for exact gradient accumulation.

    Args:
        loss_fn: the loss of one feature.
        microbatches: the whole batch in pieces along the groups; gone through twice, so a container, or an object
            whose iteration computes every piece anew and so needs memory for one piece alone.
        temperature_factor: as for the calls of `sum_over_features`.

    Raises:
        TypeError, ValueError: there are none, or as `sum_over_features` raises.

    Returns:
        What to pass as `statistics` to `sum_over_features` for every microbatch.

    >>> loss_fn, x = DriftingLoss(), {"pixels": torch.randn(4, 8, 3)}
    >>> statistics = feature_statistics(loss_fn, [FeatureBatch(x, x)])
    >>> torch.allclose(statistics["pixels"].drift_norm, sum_over_features(loss_fn, x, x).drift_norm)
    True
    """
    return _statistics(loss_fn, microbatches, _by_feature, temperature_factor)


def _statistics(
    loss_fn: DriftingLoss,
    microbatches: Iterable[T],
    by_feature: Callable[[T], Iterable[tuple[str, DriftingBatch]]],
    temperature_factor: float,
) -> dict[str, DriftStatistics]:
    """Two passes over the microbatches, since the drift is that of normalised features."""

    def add_up(sums_of: Callable[[str, DriftingBatch], Tensor]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for part in microbatches:
            for name, batch in by_feature(part):
                with _naming(name):
                    sums = sums_of(name, batch)
                totals[name] = totals[name] + sums if name in totals else sums
        if not totals:
            raise ValueError("microbatches is empty, expected one or more pieces, to be gone through twice")
        return totals

    scale_sums = add_up(lambda _, batch: loss_fn._scale_sums(batch, temperature_factor))
    scales = {name: _scale_and_degenerate(sums) for name, sums in scale_sums.items()}
    sums = add_up(lambda name, batch: loss_fn._force_sums(batch, scales[name][0], temperature_factor))
    return {
        name: DriftStatistics(scale, _drift_norm(sums[name]), degenerate)
        for name, (scale, degenerate) in scales.items()
    }


def _by_feature(batch: FeatureBatch) -> Iterator[tuple[str, DriftingBatch]]:
    """The arguments of the loss of each feature, after a look at what only concerns all of them."""
    x, positives, unconditional, unconditional_weight = batch
    if not x:
        raise ValueError("x has no features, expected at least one")
    for other_name, other in {"positives": positives, "unconditional": unconditional}.items():
        if other is not None and other.keys() != x.keys():
            raise ValueError(f"{other_name} has features {sorted(other)}, expected those of x: {sorted(x)}")
    for name, feature in x.items():
        weight = unconditional_weight
        with _naming(name):
            check_points(x=feature)
            if feature.ndim < 3:
                raise ValueError(f"x must be [B, ..., N, D], got {list(feature.shape)}")
        if isinstance(weight, Tensor) and weight.ndim == 2 and feature.ndim > 3:
            weight = weight.reshape(weight.shape[0], *[1] * (feature.ndim - 3), weight.shape[1])  # [B, ..., M]
        yield (
            name,
            DriftingBatch(feature, positives[name], None if unconditional is None else unconditional[name], weight),
        )


@contextmanager
def _naming(feature: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"feature {feature!r}: {error}" if feature else str(error)) from error


def _scale_and_degenerate(sums: Tensor) -> tuple[Tensor, Tensor]:
    weighted, weights, varying = sum_over_processes(sums)
    return weighted / weights, varying == 0


def _drift_norm(sums: Tensor) -> Tensor:
    sums = sum_over_processes(sums)
    return (sums[:-1] / sums[-1]).sqrt()  # λ, [temperatures]


def _warn_of_regression(
    num_generated: int, num_positives: int, without_unconditional: bool, normalize_over: NormalizeOver
) -> None:
    if num_generated == 1 and without_unconditional:
        warnings.warn(
            "one generated sample per group has nothing to repel it: the loss is regression onto a mean of the "
            "positives. Give at least 2 generated samples per group.",
            stacklevel=CALLER_OF_MODULE,
        )
    elif num_positives == 1 and num_generated >= 4 and normalize_over != "x":
        warnings.warn(
            f"one positive and {num_generated} generated samples per group: all samples drift to the same point, which "
            "is regression to the conditional mean. Give several positives per group, or normalize_over='x' with "
            "repulsion=0.",
            stacklevel=CALLER_OF_MODULE,
        )
