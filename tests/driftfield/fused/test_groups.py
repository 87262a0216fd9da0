"""The kernels for many small groups: against the float64 loops and the readable drift, on every kind of input."""

import inspect
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from driftfield.drift import Drift, DriftingBatch, EagerDrift
from driftfield.field import FieldOptions
from driftfield.fused import group_kernels, groups
from driftfield.fused.groups import GroupDrift, _Sizes, unsupported

from .. import oracle
from ..test_loss import GOLDEN_CASES, golden_case

TOLERANCE = 1e-3  # what is promised of scale, λ², loss and gradient, relative to the float64 oracle
ORDINARY = 2e-5  # what is kept where distances are not many times smaller than the points' spread
OPTIONS = FieldOptions((0.02, 0.05, 0.2), True, 1e-6, "xy", 1.0, 1.0)

# Interpreted kernels compute in NumPy, which warns of what is planned: squares that overflow, NaN.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning"
)


class Result(NamedTuple):
    scale: np.ndarray  # []
    squared_norm: np.ndarray  # [temperatures], λ²
    loss: np.ndarray  # [...]
    gradient: np.ndarray  # [..., N, D], of the mean loss


def run(kind: type, batch: DriftingBatch, options: FieldOptions = OPTIONS, *, normalize_drift: bool = True) -> Result:
    """One call of the loss as driftfield.loss makes it of the stages of a `Drift`."""
    x = batch.x.detach().requires_grad_()
    drift: Drift = kind(batch._replace(x=x), options)
    weighted, weights, varying = drift.scale_sums
    scale = weighted / weights
    sums = drift.force_sums(scale)
    squared_norm = sums[:-1] / sums[-1]
    factor = squared_norm.clamp(min=1e-8).rsqrt() if normalize_drift else torch.ones_like(squared_norm)
    loss = drift.loss(scale, factor.masked_fill(varying == 0, 0.0))
    (gradient,) = torch.autograd.grad(loss.mean(), x)
    assert gradient.dtype == x.dtype and loss.shape == x.shape[:-2]
    return Result(*(value.detach().double().cpu().numpy() for value in (scale, squared_norm, loss, gradient)))


def expected(batch: DriftingBatch, options: FieldOptions = OPTIONS, *, normalize_drift: bool = True) -> Result:
    """The oracle's, of groups in one dimension."""
    arrays = [None if part is None else part.double().cpu().numpy() for part in batch]
    found = oracle.drifting_loss(
        *arrays,
        temperatures=options.temperatures,
        normalize_features=options.normalize_features,
        normalize_drift=normalize_drift,
        floor=options.affinity_floor,
        over=options.normalize_over,
        attraction=options.attraction,
        repulsion=options.repulsion,
    )
    return Result(np.array(found.scale), found.squared_norm, found.loss, found.gradient)


def errors(found: Result, reference: Result) -> dict[str, float]:
    pairs = zip(Result._fields, found, reference, strict=True)
    return {name: oracle.relative_error(a, b) for name, a, b in pairs}


def assert_agree(found: Result, reference: Result, tolerance: float = ORDINARY) -> None:
    difference = errors(found, reference)
    assert max(difference.values()) < tolerance, difference


def batch_of(
    device: torch.device,
    num_x: int,
    num_p: int,
    num_u: int,
    dimension: int,
    *,
    groups: int = 1,
    dtype: Any = torch.float32,
) -> DriftingBatch:
    draw = torch.Generator().manual_seed(0)
    sizes = (num_x, num_p, num_u)
    x, positives, unconditional = (torch.randn(groups, n, dimension, generator=draw).to(device, dtype) for n in sizes)
    weight = 3.0 * torch.rand(groups, num_u, generator=draw).to(device)
    return DriftingBatch(x, positives, unconditional, weight) if num_u else DriftingBatch(x, positives)


# Values


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_cases(name: str, device: torch.device) -> None:
    case = golden_case(name)
    batch = DriftingBatch(*(None if part is None else part[:1].to(device) for part in case.arguments))
    options = OPTIONS._replace(temperatures=case.temperatures)
    # Attraction and repulsion nearly cancel where positives are duplicates: |V|² is the rest of far larger numbers.
    tolerance = 5e-4 if name == "duplicates" else ORDINARY
    assert_agree(run(GroupDrift, batch, options), expected(batch, options), tolerance)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1),  # one of everything
        (1, 3, 0, 5),
        (2, 1, 0, 1),
        (5, 7, 3, 2),
        (16, 16, 16, 16),  # no padding anywhere
        (17, 5, 1, 33),  # one more than a block and than a step over the coordinates
        (3, 18, 17, 70),
    ],
)
def test_sizes(sizes: tuple[int, int, int, int], device: torch.device) -> None:
    batch = batch_of(device, *sizes, groups=2)
    assert_agree(run(GroupDrift, batch), expected(batch))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(64, 64, 16, 256), (64, 128, 32, 96), (50, 100, 50, 40)])
def test_sizes_of_images(sizes: tuple[int, int, int, int], device: torch.device) -> None:
    batch = batch_of(device, *sizes, groups=1)
    assert_agree(run(GroupDrift, batch), run(EagerDrift, DriftingBatch(*(part.double() for part in batch))))


@pytest.mark.parametrize("over", ["xy", "y", "x", "none"])
@pytest.mark.parametrize("changes", [{}, {"affinity_floor": 0.0, "attraction": 1.5, "repulsion": 0.5}])
def test_options(over: Any, changes: dict[str, Any], device: torch.device) -> None:
    batch = batch_of(device, 6, 5, 3, 9)
    options = OPTIONS._replace(normalize_over=over, temperatures=(0.3, 2.0), **changes)
    assert_agree(run(GroupDrift, batch, options), expected(batch, options))


@pytest.mark.parametrize("normalized", [(True, False), (False, True), (False, False)])
def test_without_normalisations(normalized: tuple[bool, bool], device: torch.device) -> None:
    batch = batch_of(device, 6, 5, 3, 9)
    options = FieldOptions((1.0,), normalized[0], 0.0, "xy", 1.0, 0.0)
    found = run(GroupDrift, batch, options, normalize_drift=normalized[1])
    assert_agree(found, expected(batch, options, normalize_drift=normalized[1]))


def test_weight_of_zero_removes_a_sample_but_for_the_softmax(device: torch.device) -> None:
    batch = batch_of(device, 6, 5, 3, 9, groups=2)
    batch = batch._replace(unconditional_weight=torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]], device=device))
    assert_agree(run(GroupDrift, batch), expected(batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_short_numbers(dtype: torch.dtype, offset: float, device: torch.device) -> None:
    batch = batch_of(device, 7, 6, 3, 40)
    x, positives, unconditional = ((points + offset).to(dtype) for points in batch[:3])
    batch = DriftingBatch(x, positives, unconditional, batch.unconditional_weight)
    found, reference = run(GroupDrift, batch), expected(batch)
    assert_agree(found._replace(gradient=reference.gradient), reference, 1e-4)
    assert errors(found, reference)["gradient"] < torch.finfo(dtype).eps / 2  # it is rounded to x's dtype


def test_annealing_compiles_nothing_anew(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a kernel for every new value of its constants."""
    launch, constants = groups._launch, []

    def noted(kernel: Any, *arguments: Any, **of_kernel: Any) -> None:
        constants.append((kernel, of_kernel))
        launch(kernel, *arguments, **of_kernel)

    monkeypatch.setattr(groups, "_launch", noted)
    for factor in (1.0, 1.5):
        run(GroupDrift, batch_of(device, 3, 2, 0, 4), OPTIONS._replace(temperatures=(0.1 * factor, 0.3 * factor)))
    assert constants[: len(constants) // 2] == constants[len(constants) // 2 :]


# Points whose distances are hard to get from products


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_far_from_the_origin(offset: float, device: torch.device) -> None:
    batch = batch_of(device, 8, 7, 3, 48)
    batch = DriftingBatch(*(points + offset for points in batch[:3]), batch.unconditional_weight)
    assert_agree(run(GroupDrift, batch), expected(batch))


def test_an_outlier_is_no_origin(device: torch.device) -> None:
    batch = batch_of(device, 8, 7, 3, 48)
    batch.x[:, 0] += 100.0  # the first of all, from which differences are taken first
    assert_agree(run(GroupDrift, batch), expected(batch), TOLERANCE)


def test_duplicates(device: torch.device) -> None:
    batch = batch_of(device, 8, 7, 3, 48)
    batch.x[:, 1] = batch.x[:, 0]
    batch.positives[:, 2:4] = batch.x[:, 2:3]
    batch.unconditional[:, 1] = batch.positives[:, 0]  # type: ignore[index]
    assert_agree(run(GroupDrift, batch), expected(batch))


@pytest.mark.parametrize("distance, tolerance", [(1e-1, ORDINARY), (1e-2, TOLERANCE)])
def test_near_duplicates(distance: float, tolerance: float, device: torch.device) -> None:
    batch = batch_of(device, 8, 7, 3, 48)
    batch.positives[:] = batch.x[:, :7] + distance * batch.positives
    batch.x[:, 7] = batch.x[:, 0] + distance * batch.x[:, 7]
    assert_agree(run(GroupDrift, batch), expected(batch), tolerance)


def test_equal_points_do_not_drift(device: torch.device) -> None:
    x = torch.randn(2, 1, 12, device=device) + 1e3
    batch = DriftingBatch(x.expand(2, 5, 12), x.expand(2, 4, 12))
    drift = GroupDrift(batch, OPTIONS)
    assert drift.scale_sums.tolist() == pytest.approx([40 * 1e-4 * 2 + 5 * 1e-4 * 2, 90.0, 0.0])
    found = run(GroupDrift, batch)
    assert not found.loss.any() and not found.gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [1, 2])
def test_points_vary_where_count_varying_says_so(units: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.full((2, 5, 12), 3.0, dtype=dtype, device=device)
    rounding = 2.0 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 33 * 3.0 * torch.finfo(dtype).eps
    x[1, 2, 3] += units * rounding
    x[1, 3, 3] -= units * rounding  # the bounds are twice as far apart as either is from the first
    batch = DriftingBatch(x, x[:, :4])
    assert (GroupDrift(batch, OPTIONS).scale_sums[2] > 0) == (EagerDrift(batch, OPTIONS).scale_sums[2] > 0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e18, 1e30])
def test_magnitudes(magnitude: float, device: torch.device) -> None:
    batch = batch_of(device, 6, 5, 0, 9)
    small = batch_of(device, 6, 5, 0, 9)  # one group of the batch is ordinary
    scaled = (torch.cat([magnitude * part, other]) for part, other in zip(batch[:2], small[:2], strict=True))
    batch = DriftingBatch(*scaled)
    assert_agree(run(GroupDrift, batch), expected(batch))


def test_nan_is_not_lost(device: torch.device) -> None:
    batch = batch_of(device, 6, 5, 3, 9, groups=2)
    batch.positives[1, 2, 3] = torch.nan
    found = run(GroupDrift, batch)
    assert all(np.isnan(value).any() for value in found)
    assert GroupDrift(batch, OPTIONS).scale_sums[0].isnan()


# Memory


def test_layouts_as_encoders_leave_them(device: torch.device) -> None:
    labels, samples, locations, channels = 2, 5, 3, 18
    maps = [torch.randn(labels * n, channels, locations, device=device) for n in (samples, 4, 2)]
    x, positives, unconditional = (m.transpose(1, 2).unflatten(0, (labels, -1)).transpose(1, 2) for m in maps)
    weight = torch.rand(labels, 1, 2, device=device)  # of a label, the same at all locations  [labels, 1, M]
    assert not x.is_contiguous() and x.stride(-1) != 1
    batch = DriftingBatch(x, positives, unconditional, weight)
    assert unsupported(batch, OPTIONS) is None
    copies = [part.flatten(0, 1).clone(memory_format=torch.contiguous_format) for part in (x, positives, unconditional)]
    flat = DriftingBatch(*copies, weight.expand(labels, locations, 2).flatten(0, 1))
    found, reference = run(GroupDrift, batch), expected(flat)
    found = found._replace(loss=found.loss.reshape(-1), gradient=found.gradient.reshape(flat.x.shape))
    assert_agree(found, reference)


def test_gradient_has_the_memory_format_of_x(device: torch.device) -> None:
    x = torch.randn(5, 2, 12, device=device).transpose(0, 1).requires_grad_()
    drift = GroupDrift(DriftingBatch(x, torch.randn(2, 4, 12, device=device)), OPTIONS)
    scale = drift.scale_sums[0] / drift.scale_sums[1]
    (gradient,) = torch.autograd.grad(drift.loss(scale, torch.ones(3, device=device)).sum(), x)
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("groups", [(), (1,), (2, 3), (2, 1, 2)])
def test_leading_dimensions(groups: tuple[int, ...], device: torch.device) -> None:
    x, positives = torch.randn(*groups, 4, 6, device=device), torch.randn(*groups, 3, 6, device=device)
    flat = DriftingBatch(x.reshape(-1, 4, 6), positives.reshape(-1, 3, 6))
    found, reference = run(GroupDrift, DriftingBatch(x, positives)), expected(flat)
    found = found._replace(loss=found.loss.reshape(-1), gradient=found.gradient.reshape(-1, 4, 6))
    assert_agree(found, reference)


# Autograd


def test_every_group_has_its_own_gradient_from_above(device: torch.device) -> None:
    batch, upstream = batch_of(device, 5, 4, 0, 6, groups=2), torch.tensor([2.0, -3.0], device=device)
    gradients = []
    for kind in (GroupDrift, EagerDrift):
        x = batch.x.detach().requires_grad_()
        drift = kind(batch._replace(x=x), OPTIONS)
        loss = drift.loss(torch.tensor(2.5, device=device), torch.tensor([1.0, 0.0, 2.0], device=device))
        gradients.append(torch.autograd.grad((loss * upstream).sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_gradient_flows_to_x_alone(device: torch.device) -> None:
    batch = DriftingBatch(*(part.requires_grad_() for part in batch_of(device, 5, 4, 2, 6)))
    drift = GroupDrift(batch, OPTIONS)
    scale = drift.scale_sums[0] / drift.scale_sums[1]
    assert not scale.requires_grad and not drift.force_sums(scale).requires_grad
    drift.loss(scale, torch.ones(3, device=device)).sum().backward()
    assert batch.x.grad is not None
    assert all(part.grad is None for part in batch[1:] if isinstance(part, Tensor))


def test_points_changed_before_backward_are_refused(device: torch.device) -> None:
    batch = batch_of(device, 5, 4, 0, 6)
    drift = GroupDrift(batch._replace(x=batch.x.requires_grad_()), OPTIONS)
    loss = drift.loss(torch.tensor(2.5, device=device), torch.ones(3, device=device))
    batch.positives.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_results_do_not_change_from_call_to_call(device: torch.device) -> None:
    batch = batch_of(device, 9, 8, 3, 20)
    first, second = run(GroupDrift, batch), run(GroupDrift, batch)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiles_without_a_break(device: torch.device) -> None:
    batch = batch_of(device, 5, 4, 2, 6)

    def loss_of(*parts: Tensor) -> Tensor:
        drift = GroupDrift(DriftingBatch(*parts), OPTIONS)
        scale = drift.scale_sums[0] / drift.scale_sums[1]
        return drift.loss(scale, drift.force_sums(scale)[:-1].rsqrt())

    gradients = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        x = batch.x.detach().requires_grad_()
        loss = function(x, *batch[1:])
        gradients.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    torch.testing.assert_close(gradients[1], gradients[0])


# Compiled for GPUs that need not be there

STRIDES = {"outer": "i32", "inner": "i32", "row": "i32", "column": "1"}


def kernels_of(num_x: int, num_u: int, num_p: int, dimension: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """All kernels, as `assert_compiles` takes them."""
    sizes = _Sizes(num_x, num_u, num_p, dimension)
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    points = dict.fromkeys(("x", "unconditional", "positives", "gradient"), pointers[dtype]) | {"states": "*i32"}
    options = {"TEMPERATURES": 3, "FLOOR": 1e-3, "OVER": "xy", "ATTRACTION": 1.0, "REPULSION": 1.0}
    whole = {"D": dimension, "COLUMNS": sizes.columns}
    first = {**whole, "INPUT_EPSILON": torch.finfo(dtype).eps}
    kinds = [("gram", {**first, "AGAIN": False}), ("gram", {**first, "AGAIN": True})]
    kinds += [("forces", options), ("losses", options), ("drift", {**whole, **options})]
    kernels = []
    for name, more in kinds:
        constants = {**sizes.constants(), "WEIGHTED": num_u > 0, **more}
        function = inspect.signature(getattr(group_kernels, name).fn)
        signature = {
            argument: "constexpr"
            if argument in constants
            else STRIDES.get(argument[2:], None)
            or ("i32" if argument == "num_inner" else points.get(argument, "*fp32"))
            for argument in function.parameters
        }
        place = {"module": "driftfield.fused.group_kernels", "kernel": name}
        kernels.append({**place, "signature": signature, "constants": constants, **sizes.launch(name)})
    return kernels


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_small_groups_compile_for_gpus(assert_compiles: Any) -> None:
    assert_compiles(kernels_of(3, 2, 5, 20, torch.float32))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sizes", [(64, 16, 64, 256), (64, 0, 64, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_images_compile_for_gpus(sizes: Any, dtype: torch.dtype, assert_compiles: Any) -> None:
    assert_compiles(kernels_of(*sizes, dtype))


# What they do not serve


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"x": torch.zeros(2, 65, 4)}, "65 generated samples per group, expected at most 64"),
        ({"positives": torch.zeros(2, 129, 4)}, "129 positive samples"),
        ({"unconditional": torch.zeros(2, 65, 4)}, "65 unconditional samples"),
        (
            {"x": torch.zeros(2, 64, 4), "positives": torch.zeros(2, 128, 4), "unconditional": torch.zeros(2, 64, 4)},
            "45056 entries of the Gram matrix",
        ),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.float64)}, "float64"),
        (
            {"x": torch.zeros(4, 3, 2, 5, 4).transpose(0, 2), "positives": torch.zeros(2, 3, 4, 5, 4)},
            "more than two dimensions",
        ),
    ],
)
def test_says_what_it_cannot_serve(changes: dict[str, Any], reason: str) -> None:
    batch = DriftingBatch(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    assert unsupported(batch, OPTIONS) is None
    assert reason in str(unsupported(batch._replace(**changes), OPTIONS))


def test_says_that_temperatures_are_too_many() -> None:
    batch = DriftingBatch(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    assert "9 temperatures" in str(unsupported(batch, OPTIONS._replace(temperatures=(0.1,) * 9)))
