"""What the loss does with hopeless, extreme and wrong input: it refuses, stays exact, or says that nothing is there."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from driftfield import DriftingLoss
from driftfield.drift import SCALE_FLOOR

from . import oracle

ARGUMENTS = ("x", "positives", "unconditional", "unconditional_weight")
REGRESSION = pytest.mark.filterwarnings("ignore:one (generated sample|positive)")


def batch() -> list[torch.Tensor]:
    return [torch.randn(2, 8, 4), torch.randn(2, 6, 4), torch.randn(2, 3, 4), torch.rand(2, 3)]


def loss_and_gradient(loss_fn: DriftingLoss, x: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, torch.Tensor]:
    x = x.detach().requires_grad_()
    output = loss_fn(x, *others)
    output.loss.mean().backward()
    assert x.grad is not None
    return output, x.grad


# NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("argument", range(4))
def test_one_bad_entry_is_refused_or_spreads(argument: int, value: float) -> None:
    arguments = batch()
    arguments[argument][1, 2] = value
    bad = 4 if argument < 3 else 1
    where = r"\[1, 2, 0\]" if argument < 3 else r"\[1, 2\]"
    message = f"{ARGUMENTS[argument]} has {bad} of {arguments[argument].numel()} entries .* index {where}: {value}"
    with pytest.raises(ValueError, match=message):
        DriftingLoss(check_finite=True)(*arguments)
    output, gradient = loss_and_gradient(DriftingLoss(), *arguments)
    assert not output.loss.isfinite().any()
    assert not gradient.isfinite().any()


@pytest.mark.parametrize("argument", [0, 1])
def test_nan_is_not_taken_for_rounding(argument: int) -> None:
    arguments = [torch.ones(1, 2, 1), torch.ones(1, 2, 1)]  # a degenerate batch but for the one entry
    arguments[argument][0, 0, 0] = float("nan")
    output = DriftingLoss()(*arguments)
    assert output.loss.isnan().all()
    assert not output.degenerate


def test_check_finite_names_an_overflow() -> None:
    x = torch.full((64, 8, 2), 2e37) * torch.tensor([1.0, -1.0] * 4)[:, None]
    with pytest.raises(ValueError, match="feature_scale has 1 of 1 entries that are not finite"):
        DriftingLoss(check_finite=True)(x, x)


# Equal samples, and nearly equal ones


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 1.0, 3.7, 100.0, 1e4])
@pytest.mark.parametrize("recipe", ["official", "paper"])
def test_a_batch_of_equal_samples_does_not_drift(recipe: Any, constant: float, dtype: torch.dtype) -> None:
    x, positives, unconditional = (torch.full((3, n, 5), constant, dtype=dtype) for n in (8, 7, 2))
    output, gradient = loss_and_gradient(DriftingLoss(recipe=recipe), x, positives, unconditional)
    assert output.degenerate
    assert not output.loss.any()
    assert not gradient.any()


def test_groups_of_equal_samples_may_differ_from_each_other() -> None:
    x = torch.tensor([0.1, 3.7, -50.0])[:, None, None].expand(3, 8, 5)
    output = DriftingLoss()(x, x)
    assert output.degenerate
    assert not output.loss.any()


@pytest.mark.parametrize("columns", [16, 512, 2048])
@pytest.mark.parametrize("constant", [1.0, 3.7, 100.0, 1e4])
def test_equal_samples_behind_a_linear_layer_do_not_drift(constant: float, columns: int) -> None:
    """Batches of another size take another route through the matrix product, and add up in another order."""
    layer, order = torch.nn.Linear(columns, 256), torch.randperm(columns)
    with torch.no_grad():
        x = layer(torch.full((16, columns), constant))
        layer.weight.copy_(layer.weight[:, order])
        positives = layer(torch.full((16, columns), constant))
    assert not torch.equal(x, positives)
    output = DriftingLoss()(x, positives)
    assert output.degenerate
    assert not output.loss.any()


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 0.5), (torch.float16, 0.0625)])
def test_one_unit_in_the_last_place_of_a_narrow_dtype_is_rounding(dtype: torch.dtype, step: float) -> None:
    up = torch.rand(2, 8, 5) < 0.5
    assert torch.tensor(100.0, dtype=dtype).nextafter(torch.tensor(200.0, dtype=dtype)) == 100.0 + step
    for units, degenerate in ((1, True), (2, False)):
        x = (100.0 + units * step * up).to(dtype)
        assert DriftingLoss()(x, x.flip(1)).degenerate == degenerate


@pytest.mark.parametrize("offset_in_spreads", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ordinary_batches_are_not_degenerate(dtype: torch.dtype, offset_in_spreads: float) -> None:
    x, positives = ((torch.randn(4, 16, 32) + offset_in_spreads).to(dtype) for _ in range(2))
    output = DriftingLoss()(x, positives)
    assert not output.degenerate
    assert output.loss.mean() > 1.0


def test_one_coordinate_with_a_spread_is_enough() -> None:
    """One huge constant channel, as encoders have, must not drown the others' spread."""
    for dtype in (torch.bfloat16, torch.float32):
        x, positives = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
        x[..., 0] = positives[..., 0] = 1e5
        assert not DriftingLoss()(x.to(dtype), positives.to(dtype)).degenerate


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_nearly_equal_samples_agree_with_the_oracle(spread: float, offset: float) -> None:
    x, positives = (offset + spread * torch.randn(2, n, 9) for n in (8, 7))
    output, gradient = loss_and_gradient(DriftingLoss(), x, positives)
    if output.degenerate:
        assert offset / spread > 1e5  # no more than 8e-6 of the magnitude
        return
    reference = oracle.drifting_loss(x.numpy(), positives.numpy())
    assert oracle.relative_error(output.loss.detach().numpy(), reference.loss) < 1e-4
    assert oracle.relative_error(gradient.numpy(), reference.gradient) < 1e-4


def test_collapse_leaves_the_loss_and_raises_the_gradient_up_to_the_floor() -> None:
    x, positives = torch.randn(2, 8, 9), torch.randn(2, 7, 9)
    losses, gradients, scales = [], [], []
    for spread in 2.0 ** -np.arange(0, 28):
        output, gradient = loss_and_gradient(DriftingLoss(), float(spread) * x, float(spread) * positives)
        losses.append(output.loss.mean().item())
        gradients.append(gradient.norm().item())
        scales.append(output.feature_scale.item())
    free = [loss for loss, scale in zip(losses, scales, strict=True) if scale > 2.0 * SCALE_FLOOR]
    assert len(free) > 8
    assert max(free) / min(free) < 1.02
    above = gradients[: len(free)]
    assert above == sorted(above)
    # |gradient| = 2 |V| / (numel · scale), |V|² <= numel · 9, scale >= the floor
    assert max(gradients) < 1.00001 * 2.0 * (9.0 / x.numel()) ** 0.5 / SCALE_FLOOR


# Few samples


def expected_outcome(num_x: int, num_positives: int, num_unconditional: int | None, recipe: str) -> str:
    if 0 in (num_x, num_positives, num_unconditional):
        return "refused: empty"
    if num_x == 1 and num_unconditional is None and recipe == "paper":
        return "refused: nothing repels"
    return "the oracle's number"


@REGRESSION
@pytest.mark.parametrize("recipe", ["official", "paper"])
@pytest.mark.parametrize(
    ("num_x", "num_positives", "num_unconditional"), list(product((0, 1, 2), (0, 1, 2), (None, 0, 1, 2)))
)
def test_few_samples(num_x: int, num_positives: int, num_unconditional: int | None, recipe: Any) -> None:
    x, positives = torch.randn(2, num_x, 3), torch.randn(2, num_positives, 3)
    unconditional = None if num_unconditional is None else torch.randn(2, num_unconditional, 3)
    loss_fn = DriftingLoss(recipe=recipe)
    outcome = expected_outcome(num_x, num_positives, num_unconditional, recipe)
    if outcome == "refused: empty":
        with pytest.raises(
            ValueError, match=r"must be \[..., samples, dimensions\], none of them empty, got \[2, 0, 3\]"
        ):
            loss_fn(x, positives, unconditional)
    elif outcome == "refused: nothing repels":
        with pytest.raises(ValueError, match="nothing that repels it"):
            loss_fn(x, positives, unconditional)
    else:
        official = recipe == "official"
        reference = oracle.drifting_loss(
            x.double().numpy(),
            positives.double().numpy(),
            None if unconditional is None else unconditional.double().numpy(),
            normalize_features=official,
            normalize_drift=official,
            floor=1e-6 if official else 0.0,
        )
        found = loss_fn(*(None if t is None else t.double() for t in (x, positives, unconditional))).loss
        np.testing.assert_allclose(found.numpy(), reference.loss, rtol=1e-8, atol=1e-30)


@REGRESSION
def test_one_sample_and_one_positive_is_regression_of_loss_nine() -> None:
    output = DriftingLoss()(torch.randn(3, 1, 5), torch.randn(3, 1, 5))
    assert abs(output.loss.mean() - 9.0) < 1e-4


# Magnitudes


@pytest.mark.parametrize("power", [*range(0, 61, 6), 99])
def test_loss_ignores_a_rescaling_by_a_power_of_two(power: int) -> None:
    arguments = batch()
    reference, gradient = loss_and_gradient(DriftingLoss(), *arguments)
    scaled = [argument * 2.0**power if i < 3 else argument for i, argument in enumerate(arguments)]
    output, scaled_gradient = loss_and_gradient(DriftingLoss(), *scaled)
    torch.testing.assert_close(output.loss, reference.loss, rtol=1e-5, atol=0.0)
    # 2e-5: the distance 1e-4 of a sample to itself is left behind
    torch.testing.assert_close(scaled_gradient * 2.0**power, gradient, rtol=2e-5, atol=1e-6)
    if power >= 30:  # where that distance has vanished beside the others, every operation is exact
        far = [argument * 2.0**30 if i < 3 else argument for i, argument in enumerate(arguments)]
        assert torch.equal(output.loss, DriftingLoss()(*far).loss)


@pytest.mark.parametrize("magnitude", [1e18, 1e25, 1e30])
def test_huge_values_agree_with_the_oracle(magnitude: float) -> None:
    x, positives = magnitude * torch.randn(2, 8, 4), magnitude * torch.randn(2, 6, 4)
    output, gradient = loss_and_gradient(DriftingLoss(), x, positives)
    reference = oracle.drifting_loss(x.numpy(), positives.numpy())
    assert oracle.relative_error(output.loss.detach().numpy(), reference.loss) < 1e-5
    assert oracle.relative_error(gradient.double().numpy(), reference.gradient) < 1e-5


@pytest.mark.parametrize("magnitude", [1e-10, 1e-30, 1e-40])
def test_values_far_below_the_floors_do_not_drift(magnitude: float) -> None:
    output, gradient = loss_and_gradient(
        DriftingLoss(), magnitude * torch.randn(2, 8, 4), magnitude * torch.randn(2, 6, 4)
    )
    assert output.loss.mean() < 1e-6
    assert gradient.isfinite().all()


def test_magnitudes_mixed_in_one_batch() -> None:
    x, positives = torch.randn(4, 8, 4), torch.randn(4, 6, 4)
    factor = torch.tensor([1e30, 1.0, 1e-30, 1e-40])[:, None, None]
    output, gradient = loss_and_gradient(DriftingLoss(), factor * x, factor * positives)
    reference = oracle.drifting_loss((factor * x).numpy(), (factor * positives).numpy())
    assert oracle.relative_error(output.loss.detach().numpy(), reference.loss) < 1e-5
    assert gradient.isfinite().all()


@pytest.mark.parametrize("offset", [1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("dimension", [2, 64])
def test_features_far_from_the_origin(dimension: int, offset: float) -> None:
    x, positives, unconditional = (torch.randn(2, n, dimension) + offset for n in (8, 7, 3))
    output, gradient = loss_and_gradient(DriftingLoss(), x, positives, unconditional)
    reference = oracle.drifting_loss(x.numpy(), positives.numpy(), unconditional.numpy())
    assert oracle.relative_error(output.loss.detach().numpy(), reference.loss) < 1e-4
    assert oracle.relative_error(gradient.numpy(), reference.gradient) < 1e-4


# Equal samples among others


@pytest.mark.parametrize("dimension", [2, 16, 256])
def test_duplicates_agree_with_the_oracle(dimension: int) -> None:
    x, positives = torch.randn(2, 12, dimension), torch.randn(2, 6, dimension)
    cases = {
        "positives equal x": (x, x.clone()),
        "one positive, 16 times": (x, positives[:, :1].repeat(1, 16, 1)),
        "x in pairs": (x[:, :6].repeat(1, 2, 1), positives),
        "positives hold some x": (x, torch.cat([x[:, :3], positives], 1)),
        "ties": (x.round(), positives.round()),
    }
    for name, (samples, real) in cases.items():
        output, gradient = loss_and_gradient(DriftingLoss(), samples, real)
        reference = oracle.drifting_loss(samples.numpy(), real.numpy())
        assert oracle.relative_error(output.loss.detach().numpy(), reference.loss) < 1e-5, name
        assert oracle.relative_error(gradient.numpy(), reference.gradient) < 1e-5, name


# Wrong types and shapes


def wrong_calls() -> dict[str, tuple[list[Any], type[Exception], str]]:
    x, positives, unconditional, weight = batch()
    other_device = torch.empty(2, 6, 4, device="meta")
    return {
        "list": ([x.tolist(), positives], TypeError, "x must be a torch.Tensor, got list"),
        "numpy": ([x, positives.numpy()], TypeError, "positives must be a torch.Tensor, got ndarray"),
        "integers": ([x.long(), positives.long()], TypeError, "x must be floating point, got torch.int64"),
        "complex": ([x, positives.cfloat()], TypeError, "positives must be floating point, got torch.complex64"),
        "mixed dtypes": (
            [x, positives.double()],
            TypeError,
            "positives is torch.float64 but x is torch.float32: expected one dtype",
        ),
        "mixed dtypes, narrow": (
            [x, positives, unconditional.half()],
            TypeError,
            "unconditional is torch.float16 but x is",
        ),
        "other device": ([x, other_device], ValueError, "positives is on meta but x is on cpu: expected one device"),
        "one dimension": ([x[0, 0], positives], ValueError, r"x must be \[..., samples, dimensions\].* got \[4\]"),
        "other number of dimensions": ([x, positives[0]], ValueError, r"positives \[6, 4\] does not fit x \[2, 8, 4\]"),
        "other dimension": (
            [x, positives[..., :3]],
            ValueError,
            r"positives \[2, 6, 3\] does not fit x \[2, 8, 4\]: expected \[2, \*, 4\]",
        ),
        "other groups": ([x, positives, unconditional[:1]], ValueError, r"unconditional \[1, 3, 4\] does not fit x"),
        "no coordinates": ([x[..., :0], positives[..., :0]], ValueError, r"none of them empty, got \[2, 8, 0\]"),
        "no groups": ([x[:0], positives[:0]], ValueError, r"none of them empty, got \[0, 8, 4\]"),
        "weight too short": (
            [x, positives, unconditional, weight[:, :2]],
            ValueError,
            r"per sample, \[2, 3\], got \[2, 2\]",
        ),
        "weight per group": (
            [x, positives, unconditional, weight[:, 0]],
            ValueError,
            r"per sample, \[2, 3\], got \[2\]",
        ),
        "integer weight": (
            [x, positives, unconditional, weight.long()],
            TypeError,
            "floating-point tensor, got torch.int64",
        ),
        "weight as a list": (
            [x, positives, unconditional, weight.tolist()],
            TypeError,
            "floating-point tensor, got list",
        ),
        "weight without samples": (
            [x, positives, None, weight],
            ValueError,
            "unconditional_weight given without unconditional",
        ),
        "weight elsewhere": (
            [x, positives, unconditional, weight.to("meta")],
            ValueError,
            "unconditional_weight is on meta",
        ),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_wrong_arguments_are_named(name: str) -> None:
    arguments, error, message = wrong_calls()[name]
    with pytest.raises(error, match=message):
        DriftingLoss()(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": ()}, r"temperatures must be one or more numbers > 0, got \(\)"),
        ({"temperatures": (0.1, 0.0)}, r"temperatures must be one or more numbers > 0, got \(0.1, 0.0\)"),
        ({"temperatures": (float("nan"),)}, r"temperatures must be one or more numbers > 0, got \(nan,\)"),
        ({"recipe": "offical"}, "recipe must be one of 'official', 'paper', got 'offical'"),
        ({"normalize_over": "z"}, "normalize_over must be one of 'xy', 'y', 'x', 'none', got 'z'"),
        ({"affinity_floor": -1e-6}, "affinity_floor must be >= 0, got -1e-06"),
        ({"affinity_floor": float("nan")}, "affinity_floor must be >= 0, got nan"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DriftingLoss(**options)


def test_float64_stays_float64() -> None:
    x, positives, unconditional, weight = (argument.double() for argument in batch())
    output, gradient = loss_and_gradient(DriftingLoss(), x, positives, unconditional, weight)
    assert {t.dtype for t in (output.loss, output.drift_norm, output.feature_scale, gradient)} == {torch.float64}
