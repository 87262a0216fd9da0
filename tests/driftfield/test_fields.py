"""The fields beyond the paper inside the loss: float64 loops, factor of the temperatures, PyTorch's transforms."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from driftfield import (
    DriftingBatch,
    DriftingLoss,
    FeatureBatch,
    drifting_field,
    feature_statistics,
    sum_over_features,
)

from . import oracle

FIELDS: dict[str, dict[str, Any]] = {
    "bias correction": {"bias_correction": True},
    "sinkhorn": {"field": "sinkhorn", "sinkhorn_iterations": 4},
    "halves": {"field": "sinkhorn", "sinkhorn_iterations": 3, "second_batch": "halves"},
    "mmd": {"field": "mmd"},
}
TEMPERATURES = (0.05, 0.7, 0.2)
every_field = pytest.mark.parametrize("name", FIELDS)


def batch(dtype: torch.dtype = torch.float32, groups: int = 2) -> list[Tensor]:
    shapes = (groups, 8, 4), (groups, 6, 4), (groups, 3, 4), (groups, 3)
    return [(torch.rand(shape, dtype=torch.float64) * 3.0).to(dtype) for shape in shapes]


def loss_and_gradient(loss_fn: Any, x: Tensor, *others: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = loss_fn(x, *others, **options).loss
    loss.mean().backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def reference(name: str, arguments: list[Tensor], temperatures: tuple[float, ...] = TEMPERATURES) -> oracle.Loss:
    def forces(x: Any, positives: Any, negatives: Any, weight: Any, distances: Any) -> list[Any]:
        if name == "mmd":
            return [
                oracle.mmd_field(x, positives, negatives, tau, weight=weight, mask_self=True, distances=distances)
                for tau in temperatures
            ]
        if name == "bias correction":
            options: dict[str, Any] = {"floor": 1e-6, "mask_self": True, "bias_correction": True}
            return [
                oracle.field(x, positives, negatives, tau, weight=weight, distances=distances, **options)
                for tau in temperatures
            ]
        return oracle.sinkhorn_field(
            x,
            positives,
            negatives,
            temperatures,
            iterations=FIELDS[name]["sinkhorn_iterations"],
            halves=name == "halves",
            weight=weight,
            mask_self=True,
            distances=distances,
        )

    arrays = [argument.double().numpy() for argument in arguments]
    return oracle.drifting_loss(*arrays, temperatures=temperatures, forces=forces)


@every_field
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_the_oracles(name: str, dtype: torch.dtype) -> None:
    arguments, loss_fn = batch(dtype), DriftingLoss(TEMPERATURES, **FIELDS[name])
    loss, gradient = loss_and_gradient(loss_fn, *arguments)
    expected = reference(name, arguments)
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 1e-2)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert oracle.relative_error(loss.numpy(), expected.loss) < min(tolerance, 1e-4)
    assert oracle.relative_error(gradient.double().numpy(), expected.gradient) < tolerance
    squared_norm = loss_fn(*arguments).drift_norm.square()
    assert oracle.relative_error(squared_norm.numpy(), expected.squared_norm) < min(tolerance, 1e-4)


@every_field
def test_weight_zero_is_no_unconditional_sample_at_all_but_for_the_softmax(name: str) -> None:
    x, positives, unconditional, weight = batch(torch.float64)
    loss_fn = DriftingLoss([0.5], **FIELDS[name])
    without, _ = loss_and_gradient(loss_fn, x, positives)
    zeroed, _ = loss_and_gradient(loss_fn, x, positives, unconditional, torch.zeros_like(weight))
    if name == "bias correction":
        assert not torch.allclose(zeroed, without)
    else:
        torch.testing.assert_close(zeroed, without)


@every_field
def test_exact_accumulation_is_the_whole_batch(name: str) -> None:
    loss_fn, parts = DriftingLoss(**FIELDS[name]), [DriftingBatch(*batch()) for _ in range(3)]
    parts[1] = parts[1]._replace(x=3.0 * parts[1].x)
    whole = [torch.cat([getattr(part, field) for part in parts]) for field in DriftingBatch._fields]
    statistics = loss_fn.statistics(parts, temperature_factor=1.3)
    losses = [loss_fn(*part, statistics=statistics, temperature_factor=1.3).loss for part in parts]
    torch.testing.assert_close(torch.cat(losses), loss_fn(*whole, temperature_factor=1.3).loss, rtol=1e-5, atol=1e-6)


# The factor of the temperatures


@pytest.mark.parametrize("name", ["none", *FIELDS])
def test_temperature_factor_is_other_temperatures(name: str) -> None:
    arguments, options = batch(torch.float64), FIELDS.get(name, {})
    found = DriftingLoss((0.1, 0.4), **options)(*arguments, temperature_factor=0.5)
    expected = DriftingLoss((0.05, 0.2), **options)(*arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(found.loss, DriftingLoss((0.1, 0.4), **options)(*arguments).loss)


def test_temperature_factor_reaches_every_feature_and_both_passes() -> None:
    x, positives, unconditional, weight = batch(torch.float64)
    features = FeatureBatch(
        {"a": x, "b": x[..., :2]}, {"a": positives, "b": positives[..., :2]},
        {"a": unconditional, "b": unconditional[..., :2]}, weight,
    )  # fmt: skip
    wide, narrow = DriftingLoss((0.1, 0.4)), DriftingLoss((0.05, 0.2))
    expected = sum_over_features(narrow, *features)
    found = sum_over_features(wide, *features, temperature_factor=0.5)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.drift_norm, expected.drift_norm)
    statistics = feature_statistics(wide, [features], temperature_factor=0.5)
    for row, name in enumerate(features.x):
        torch.testing.assert_close(statistics[name].drift_norm, expected.drift_norm[row])
    exact = sum_over_features(wide, *features, statistics=statistics, temperature_factor=0.5)
    torch.testing.assert_close(exact.loss, expected.loss)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_temperature_factor_must_be_positive(factor: float) -> None:
    with pytest.raises(ValueError, match=f"temperature_factor must be > 0, got {factor}"):
        DriftingLoss()(*batch(), temperature_factor=factor)


# PyTorch


@every_field
def test_autocast_changes_nothing(name: str) -> None:
    arguments, loss_fn = batch(torch.bfloat16), DriftingLoss(**FIELDS[name])
    plain = loss_and_gradient(loss_fn, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_and_gradient(loss_fn, *arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize(
    "name", ["halves", "mmd", *(pytest.param(n, marks=pytest.mark.slow) for n in list(FIELDS)[:2])]
)
def test_compiles_without_a_break(name: str) -> None:
    torch._dynamo.reset()
    loss_fn = DriftingLoss(**FIELDS[name])
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # the compiler's own
            warnings.simplefilter("ignore", category)
        compiled = torch.compile(loss_fn, backend="eager", fullgraph=True)
        for groups in (2, 5):
            arguments = batch(groups=groups)
            found, expected = loss_and_gradient(compiled, *arguments), loss_and_gradient(loss_fn, *arguments)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@every_field
def test_vmap_is_a_loop_over_batches(name: str) -> None:
    loss_fn = DriftingLoss(**FIELDS[name])
    arguments = [torch.stack([a, 2.0 * b]) for a, b in zip(batch(), batch(), strict=True)]
    mapped = torch.vmap(lambda *batch: tuple(loss_fn(*batch)))(*arguments)
    for i in range(2):
        for found, alone in zip(mapped, loss_fn(*(argument[i] for argument in arguments)), strict=True):
            torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)


@every_field
def test_groups_are_alone_and_arguments_left_as_they_are(name: str) -> None:
    x, positives, unconditional, weight = arguments = batch(torch.float64)
    before = [argument.clone() for argument in arguments]
    negatives = torch.cat([x, unconditional], 1)
    options: dict[str, Any] = {"temperature": 0.5, "mask_self": True, **FIELDS[name]}
    masses = torch.cat([torch.ones(2, 8, dtype=torch.float64), weight], 1)
    together = drifting_field(x, positives, negatives, negative_weight=masses, **options)
    for b in range(2):
        alone = drifting_field(x[b], positives[b], negatives[b], negative_weight=masses[b], **options)
        torch.testing.assert_close(together[b], alone)
    DriftingLoss(**FIELDS[name])(*arguments)
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, before, strict=True))


@every_field
def test_equal_points_do_not_drift(name: str) -> None:
    points = torch.full((2, 8, 5), 3.7)
    output = DriftingLoss(**FIELDS[name])(points, points)
    assert output.degenerate and not output.loss.any()
    assert not drifting_field(points, points, points, temperature=0.05, **FIELDS[name]).any()


@every_field
def test_one_bad_entry_spreads(name: str) -> None:
    arguments = batch()
    arguments[1][1, 2, 0] = np.nan
    loss, gradient = loss_and_gradient(DriftingLoss(**FIELDS[name]), *arguments)
    assert not loss.isfinite().any() and not gradient.isfinite().any()
