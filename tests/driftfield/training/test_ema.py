"""Row A12: the averages follow their closed form, survive a resume bit for bit, and never stay in the model."""

import pytest
import torch
from torch import nn

from driftfield.training import EMA, Checkpoint


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        for buffer in model.buffers():
            buffer.add_(1)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("warmup", [False, True])
def test_closed_form(warmup: bool) -> None:
    """ema_T = sum over t of w_t prod_{u>t} d_u (1 - d_t), with w the weights after each step, in float64."""
    model, decays, steps = make_model(), (0.5, 0.99, 0.9999), 20
    ema = EMA(model, decays, warmup=warmup)
    history = [model[0].weight.detach().double().clone()]
    for _ in range(steps):
        change(model)
        ema.update()
        history.append(model[0].weight.detach().double().clone())
    for decay in decays:
        d = [min(decay, (1 + t) / (10 + t)) if warmup else decay for t in range(steps)]
        factors = [1.0] + [1 - d[t] for t in range(steps)]
        for t in range(steps):
            factors = [factor * d[t] if i <= t else factor for i, factor in enumerate(factors)]
        assert sum(factors) == pytest.approx(1)
        expected = sum(factor * weights for factor, weights in zip(factors, history, strict=True))
        torch.testing.assert_close(ema.weights(decay)["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_constant_weights_are_their_own_average() -> None:
    model = make_model()
    before = bits(model)
    ema = EMA(model, (0.9, 0.999))
    for _ in range(50):
        ema.update()
    assert_equal(ema.weights(0.999), before)


def test_buffers_are_copied() -> None:
    model = make_model()
    ema = EMA(model)
    change(model)
    ema.update()
    weights = ema.weights()
    assert torch.equal(weights["1.running_mean"], model[1].running_mean)
    assert weights["1.num_batches_tracked"].dtype == torch.int64 and weights["1.num_batches_tracked"] == 1
    assert weights.keys() == model.state_dict().keys()


def test_a_bfloat16_model_has_float32_averages() -> None:
    model = make_model(torch.bfloat16)
    ema = EMA(model, (0.9999,))
    start = ema.weights()["0.weight"]
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update()
    moved = ema.weights()["0.weight"] - start
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=0.02, atol=0)  # bfloat16 would round it away


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_holds_the_average_and_gives_the_weights_back(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    ema = EMA(model, (0.5, 0.9))
    change(model)
    ema.update()
    change(model)
    before = bits(model)
    with ema.swapped(0.9):
        assert torch.equal(model[2].bias, ema.weights(0.9)["2.bias"].to(dtype))
        assert torch.equal(model[1].running_var, ema.weights(0.9)["1.running_var"])
        model(torch.randn(8, 3, dtype=dtype))  # in training mode this moves the statistics
    assert_equal(bits(model), before)


def test_an_error_inside_swapped_gives_the_weights_back() -> None:
    model = make_model()
    ema = EMA(model)
    change(model)
    before, average = bits(model), ema.weights()
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        assert not torch.equal(model[0].weight, before["0.weight"])
        raise KeyboardInterrupt
    assert_equal(bits(model), before)
    assert_equal(ema.weights(), average)


def test_swapped_with_an_unknown_decay_changes_nothing() -> None:
    model = make_model()
    before = bits(model)
    with pytest.raises(ValueError, match=r"expected one of \(0.999,\), found 0.9"), EMA(model).swapped(0.9):
        pass
    assert_equal(bits(model), before)


def test_the_gradient_and_the_optimizer_still_see_the_same_parameters() -> None:
    model = make_model()
    ema = EMA(model)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with ema.swapped():
        pass
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bit_equal_after_a_resume(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = make_model()
    ema = EMA(model, (0.9, 0.9999), warmup=True)
    for step in range(9):
        change(model)
        ema.update()
        if step == 4:
            Checkpoint(str(tmp_path)).save(5, {"ema": ema.state_dict(), "model": model.state_dict()}, {})
            random_state = torch.get_rng_state()
    straight = ema.state_dict()

    loaded = Checkpoint(str(tmp_path)).load()
    assert loaded is not None
    model = make_model()
    ema = EMA(model, (0.9, 0.9999), warmup=True)
    model.load_state_dict(loaded.tensors["model"])
    ema.load_state_dict(loaded.tensors["ema"])
    torch.set_rng_state(random_state)
    for _ in range(4):
        change(model)
        ema.update()
    assert_equal(ema.state_dict(), straight)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    ema = EMA(make_model(), (0.9,))
    before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    other = EMA(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (0.9,)).state_dict()
    with pytest.raises(ValueError) as refused:
        ema.load_state_dict(other)
    assert "0.9/0.weight: expected shape (4, 3), found (4, 5)" in str(refused.value)
    assert "0.9/2.weight is missing" in str(refused.value)
    assert_equal(ema.state_dict(), before)


@pytest.mark.parametrize("decays", [(), (0.9, 0.9), (1.0,), (-0.1,), (float("nan"),)])
def test_decays_that_make_no_sense(decays: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="decays: expected"):
        EMA(make_model(), decays)
