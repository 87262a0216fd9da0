"""An optimizer goes on after its state went through files as if it had not."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from driftfield.training import Checkpoint, load_optimizer, optimizer_state


def make(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    if kind == "two groups":
        decayed = [(name, parameter) for name, parameter in named if parameter.dim() > 1]
        plain = [(name, parameter) for name, parameter in named if parameter.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 3e-3}]
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    if kind == "amsgrad":
        return torch.optim.AdamW(named, lr=1e-2, amsgrad=True)
    return torch.optim.SGD(named, lr=1e-2, momentum=0.9, nesterov=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("kind", ["two groups", "amsgrad", "sgd"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    straight = make_model()
    train(straight, make(kind, straight), range(10))

    model = make_model()
    optimizer = make(kind, model)
    train(model, optimizer, range(6))
    tensors, state = optimizer_state(optimizer)
    Checkpoint(tmp_path).save(6, {"model": model.state_dict(), "optim": tensors}, {"optim": state})

    loaded = Checkpoint(tmp_path).load()
    assert loaded is not None
    model = make_model()
    optimizer = make(kind, model)
    model.load_state_dict(loaded.tensors["model"])
    load_optimizer(optimizer, loaded.tensors["optim"], loaded.state["optim"])
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 6
    train(model, optimizer, range(6, 10))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_settings_come_back_as_they_were() -> None:
    model = make_model()
    optimizer = make("two groups", model)
    state = json.loads(json.dumps(optimizer_state(optimizer).state))
    other = make("two groups", model)
    other.param_groups[0]["betas"] = (0.5, 0.5)
    load_optimizer(other, {}, state)
    assert other.state_dict() == optimizer.state_dict()


def test_tensors_are_named_by_parameter() -> None:
    model = make_model()
    optimizer = make("amsgrad", model)
    train(model, optimizer, range(1))
    tensors, _ = optimizer_state(optimizer)
    keys = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert tensors.keys() == {f"{key}/{name}" for key in keys for name, _ in model.named_parameters()}


def test_loading_does_not_share_memory_with_what_was_loaded() -> None:
    model = make_model()
    optimizer = make("amsgrad", model)
    train(model, optimizer, range(1))
    tensors, state = optimizer_state(optimizer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other_model = make_model()
    other = make("amsgrad", other_model)
    load_optimizer(other, kept, state)
    train(other_model, other, range(3))
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("change", ["names", "shape", "stranger", "groups"])
def test_a_state_that_does_not_fit_changes_nothing(change: str) -> None:
    model = make_model()
    optimizer = make("amsgrad", model)
    train(model, optimizer, range(2))
    before = optimizer_state(optimizer).tensors["exp_avg/0.weight"].clone()
    tensors = {name: torch.zeros_like(tensor) for name, tensor in optimizer_state(optimizer).tensors.items()}
    state = optimizer_state(optimizer).state
    if change == "names":
        state["groups"][0]["names"][0] = "0.kernel"
    elif change == "shape":
        tensors["exp_avg/0.bias"] = torch.zeros(5)
    elif change == "stranger":
        tensors["exp_avg/7.bias"] = torch.zeros(5)
    else:
        state["groups"].append(state["groups"][0])
    with pytest.raises(ValueError, match="expected|belongs to no parameter"):
        load_optimizer(optimizer, tensors, state)
    assert torch.equal(optimizer_state(optimizer).tensors["exp_avg/0.weight"], before)


def test_parameters_without_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.named_parameters\(\), found parameters without names"):
        optimizer_state(torch.optim.AdamW(make_model().parameters()))
