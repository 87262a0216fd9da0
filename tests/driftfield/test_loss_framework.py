"""The loss inside PyTorch: dtypes and autocast, strides, autograd, compile, function transforms, determinism."""

import copy
import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from driftfield import DriftingBatch, DriftingLoss, drifting_field

from . import oracle

REPOSITORY = Path(__file__).parents[2]


def batch(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (2, 8, 4), (2, 6, 4), (2, 3, 4), (2, 3)
    return [torch.rand(shape).to(dtype) * 3.0 for shape in shapes]


def loss_and_gradient(loss_fn: Callable[..., Any], x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = loss_fn(x, *others).loss
    loss.mean().backward()
    assert x.grad is not None
    return loss.detach(), x.grad


# Dtypes and autocast


@pytest.mark.parametrize(
    ("dtype", "gradient_error"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)]
)
def test_narrow_input_is_computed_in_float32(dtype: torch.dtype, gradient_error: float) -> None:
    arguments = batch(dtype)
    loss, gradient = loss_and_gradient(DriftingLoss(), *arguments)
    reference = oracle.drifting_loss(*(argument.double().numpy() for argument in arguments))
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert oracle.relative_error(loss.numpy(), reference.loss) < 1e-5
    assert oracle.relative_error(gradient.double().numpy(), reference.gradient) < gradient_error  # its own rounding


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", ["official", "paper"])
def test_autocast_changes_nothing(recipe: Any, dtype: torch.dtype, autocast: torch.dtype) -> None:
    arguments, loss_fn = batch(dtype), DriftingLoss(recipe=recipe)
    plain_loss, plain_gradient = loss_and_gradient(loss_fn, *arguments)
    with torch.autocast("cpu", dtype=autocast):
        loss, gradient = loss_and_gradient(loss_fn, *arguments)
        statistics = loss_fn.statistics([DriftingBatch(*arguments)])
    assert torch.equal(loss, plain_loss)
    assert torch.equal(gradient, plain_gradient)
    output = loss_fn(*arguments)
    assert torch.equal(statistics.feature_scale, output.feature_scale)
    assert torch.equal(statistics.drift_norm, output.drift_norm)


# Strides and side effects


def strided_copies(points: Tensor) -> dict[str, Tensor]:
    return {
        "transposed": points.mT.contiguous().mT,
        "groups last": points.movedim(0, -1).contiguous().movedim(-1, 0),
        "every second": points.repeat_interleave(2, -1)[..., ::2],
        "an inner slice": torch.nn.functional.pad(points, (1, 2, 3, 1))[:, 3:-1, 1:-2],
    }


@pytest.mark.parametrize("layout", strided_copies(torch.zeros(1, 1, 1)))
def test_strides_do_not_matter(layout: str) -> None:
    x, positives, unconditional, weight = batch()
    loss, gradient = loss_and_gradient(DriftingLoss(), x, positives, unconditional, weight)
    strided = [strided_copies(points)[layout] for points in (x, positives, unconditional)]
    assert all(torch.equal(a, b) for a, b in zip(strided, (x, positives, unconditional), strict=True))
    found, found_gradient = loss_and_gradient(DriftingLoss(), *strided, weight)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=1e-7)


def test_expanded_arguments() -> None:
    x, positives, _, _ = batch()
    shared = positives[:1].expand(2, -1, -1)
    loss, _ = loss_and_gradient(DriftingLoss(), x, shared, shared[:, :3], torch.tensor(0.5).expand(2, 3))
    plain, _ = loss_and_gradient(DriftingLoss(), x, shared.clone(), shared[:, :3].clone(), torch.full((2, 3), 0.5))
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0.0)


def test_arguments_are_left_as_they_are() -> None:
    arguments = [argument.requires_grad_() for argument in batch()]
    before = [(argument._version, argument.detach().clone()) for argument in arguments]
    DriftingLoss()(*arguments).loss.mean().backward()
    drifting_field(*arguments[:3], temperature=0.5)
    for argument, (version, values) in zip(arguments, before, strict=True):
        assert argument._version == version
        assert torch.equal(argument.detach(), values)


# Autograd


def test_gradient_flows_to_x_alone() -> None:
    x, *others = (argument.requires_grad_() for argument in batch())
    output = DriftingLoss()(x, *others)
    assert [tensor.requires_grad for tensor in output] == [True, False, False, False]
    output.loss.mean().backward()
    assert x.grad is not None
    assert [other.grad for other in others] == [None, None, None]


def test_without_gradient_and_twice_and_behind_a_frozen_encoder() -> None:
    x, *others = batch()
    with torch.no_grad():
        assert not DriftingLoss()(x.requires_grad_(), *others).loss.requires_grad
    loss = DriftingLoss()(x, *others).loss.mean()
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, x)
    assert torch.equal(once, twice)
    encoder = torch.nn.Linear(4, 5).requires_grad_(False)
    (through,) = torch.autograd.grad(DriftingLoss()(encoder(x), encoder(others[0])).loss.mean(), x)
    assert through.abs().max() > 0
    assert encoder.weight.grad is None


@pytest.mark.parametrize("recipe", ["official", "paper"])
def test_derivatives_of_both_orders_are_those_of_the_frozen_target(recipe: Any) -> None:
    """With the target x + V written down as a constant, finite differences see what autograd is to return."""
    arguments = batch(torch.float64)
    x, loss_fn = arguments[0], DriftingLoss(recipe=recipe)
    output = loss_fn(*arguments)
    scale = output.feature_scale / 2.0 if recipe == "official" else torch.tensor(1.0)  # s / √D
    _, gradient = loss_and_gradient(loss_fn, *arguments)
    target = x / scale - gradient * x.numel() * scale / 2.0

    def frozen(point: Tensor) -> Tensor:
        return (point / scale - target).square().mean()

    assert torch.autograd.gradcheck(frozen, x.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(frozen, x.clone().requires_grad_())
    torch.testing.assert_close(frozen(x), output.loss.mean())
    torch.testing.assert_close(torch.func.grad(frozen)(x), gradient)
    expected = torch.autograd.functional.hessian(frozen, x)
    found = torch.autograd.functional.hessian(lambda point: loss_fn(point, *arguments[1:]).loss.mean(), x)
    torch.testing.assert_close(found, expected)


# torch.compile


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # the compiler's own
            warnings.simplefilter("ignore", category)
        yield
    torch._dynamo.reset()


def sizes_of_a_run() -> list[tuple[int, int, int, int]]:
    """Groups, generated, positive and unconditional samples of five batches."""
    return [(2, 8, 6, 3), (3, 9, 7, 4), (3, 8, 6, 3), (5, 16, 16, 2), (4, 12, 5, 6)]


def assert_compiled_loss_is_the_eager_one(
    compiled: Callable[..., Any], loss_fn: DriftingLoss, tolerance: float
) -> None:
    for groups, num_x, num_positives, num_unconditional in sizes_of_a_run():
        shapes = (groups, num_x, 4), (groups, num_positives, 4), (groups, num_unconditional, 4)
        arguments = *(torch.randn(shape) for shape in shapes), torch.rand(groups, num_unconditional)
        loss, gradient = loss_and_gradient(loss_fn, *arguments)
        compiled_loss, compiled_gradient = loss_and_gradient(compiled, *arguments)
        torch.testing.assert_close(compiled_loss, loss, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(compiled_gradient, gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("recipe", ["official", "paper"])
def test_compiles_to_two_graphs_without_a_break(fresh_compiler: None, recipe: Any) -> None:
    from torch._dynamo.testing import CompileCounter

    loss_fn, counter = DriftingLoss(recipe=recipe), CompileCounter()
    compiled = torch.compile(loss_fn, backend=counter, fullgraph=True)
    assert_compiled_loss_is_the_eager_one(compiled, loss_fn, 1e-6)
    assert counter.frame_count <= 2  # the first sizes, and one for all sizes


def test_compiles_with_its_backward(fresh_compiler: None) -> None:
    loss_fn = DriftingLoss()
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_compiled_loss_is_the_eager_one(compiled, loss_fn, 1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiles_to_native_code(fresh_compiler: None) -> None:
    loss_fn = DriftingLoss()
    compiled = torch.compile(loss_fn, fullgraph=True)
    assert_compiled_loss_is_the_eager_one(compiled, loss_fn, 1e-5)


def test_compiled_loss_still_refuses_bad_input(fresh_compiler: None) -> None:
    x, positives, *_ = batch()
    compiled = torch.compile(DriftingLoss(check_finite=True), backend="eager")
    assert compiled(x, positives).loss.isfinite().all()
    positives[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"positives has 1 of 48 entries .* index \[1, 2, 3\]: nan"):
        compiled(x, positives)
    with pytest.raises(ValueError, match="does not fit"):
        compiled(x, positives[:1])


# Function transforms


def test_vmap_is_a_loop_over_batches() -> None:
    arguments = [torch.stack([a, 2.0 * b, c]) for a, b, c in zip(batch(), batch(), batch(), strict=True)]
    mapped = torch.vmap(lambda *batch: tuple(DriftingLoss()(*batch)))(*arguments)
    for i in range(3):
        for found, alone in zip(mapped, DriftingLoss()(*(argument[i] for argument in arguments)), strict=True):
            torch.testing.assert_close(found[i], alone, rtol=1e-5, atol=1e-6)
    fields = torch.vmap(lambda x, p, q: drifting_field(x, p, q, temperature=0.5))(*arguments[:3])
    alone = drifting_field(*(argument[1] for argument in arguments[:3]), temperature=0.5)
    torch.testing.assert_close(fields[1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # the loading of forward mode
def test_transforms_agree_with_autograd() -> None:
    x, *others = batch()
    _, gradient = loss_and_gradient(DriftingLoss(), x, *others)

    def mean_loss(x: Tensor, *others: Tensor) -> Tensor:
        return DriftingLoss()(x, *others).loss.mean()

    assert torch.equal(torch.func.grad(mean_loss)(x, *others), gradient)
    assert not torch.func.grad(mean_loss, argnums=1)(x, *others).any()
    torch.testing.assert_close(torch.func.jacrev(mean_loss)(x, *others), gradient)
    tangent = torch.randn_like(x)
    _, directional = torch.func.jvp(lambda x: mean_loss(x, *others), (x,), (tangent,))
    torch.testing.assert_close(directional, (gradient * tangent).sum())
    per_group = torch.func.jacrev(lambda x: DriftingLoss()(x, *others).loss)(x)
    torch.testing.assert_close(per_group.mean(0), gradient)
    called = torch.func.functional_call(DriftingLoss(), {}, (x, *others))
    assert torch.equal(called.loss, DriftingLoss()(x, *others).loss)


def test_loss_is_a_module_without_state() -> None:
    loss_fn = DriftingLoss([0.1])
    assert loss_fn.state_dict() == {}
    assert not list(loss_fn.parameters())
    x, *others = batch()
    assert torch.equal(copy.deepcopy(loss_fn)(x, *others).loss, loss_fn(x, *others).loss)


# Determinism

HASH_OF_A_LOSS = """
import hashlib, torch
from driftfield import DriftingLoss
torch.manual_seed(0)
x = torch.randn(4, 33, 70, requires_grad=True)
output = DriftingLoss()(x, torch.randn(4, 40, 70), torch.randn(4, 9, 70), torch.rand(4, 9))
output.loss.mean().backward()
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in (*output, x.grad))).hexdigest())
"""


def test_two_processes_agree_to_the_bit() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen([sys.executable, "-c", HASH_OF_A_LOSS], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    first, second = (process.communicate(timeout=100)[0].strip() for process in processes)
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert first == second


def test_two_calls_agree_to_the_bit_in_deterministic_mode() -> None:
    arguments = batch()
    first = loss_and_gradient(DriftingLoss(), *arguments)
    torch.use_deterministic_algorithms(True)
    second = loss_and_gradient(DriftingLoss(), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
