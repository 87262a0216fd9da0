"""The regression of Eq. 6 in one step equals the one that autograd takes apart."""

import pytest
import torch

from driftfield.drift import regress


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [(), (3,), (2, 3)])
def test_regression_is_the_mean_square_and_its_gradient(dtype: torch.dtype, groups: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*groups, 4, 5, generator=draw).to(dtype).requires_grad_()
    drift = torch.randn(*groups, 4, 5, generator=draw, dtype=torch.float64)
    scale = torch.tensor(1.7, dtype=torch.float64)
    weights = torch.randn(groups, generator=draw, dtype=torch.float64)

    loss = regress(x, drift, scale)
    expected = (x.double() / scale - (x.detach().double() / scale + drift)).square().mean((-2, -1))
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), x)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient)


def test_regression_compiles_without_a_break() -> None:
    x, drift, scale = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 5), torch.tensor(0.5)
    compiled = torch.compile(regress, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, drift, scale), regress(x, drift, scale))
