"""A torch optimizer's state as tensors by parameter name plus JSON, for a checkpoint without pickle."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from driftfield.training.sharding import placed_like


class OptimizerState(NamedTuple):
    """An optimizer's state, in the two forms a checkpoint stores."""

    tensors: dict[str, Tensor]  # "exp_avg/layer.weight" -> tensor
    state: dict[str, Any]  # JSON: settings per parameter group, and what is no tensor


def optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Take an optimizer's state apart; the tensors are its own, not copies.

    Args:
        optimizer: built from ``model.named_parameters()``, so that it knows names.

    Raises:
        ValueError: if the optimizer knows no names.

    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer_state(torch.optim.AdamW(layer.named_parameters())).state["groups"][0]["names"]
    ['weight', 'bias']
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in _named(optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else values)[f"{key}/{name}"] = value
    groups = [_settings(group) | {"names": list(group["param_names"])} for group in optimizer.param_groups]
    return OptimizerState(tensors, {"groups": groups, "values": values})


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Give an optimizer the state that `optimizer_state` took; nothing changes unless all of it fits.

    Args:
        optimizer: built like the one that was saved.
        tensors: ``"exp_avg/layer.weight"`` -> tensor.
        state: the JSON beside it.

    Raises:
        ValueError: if the parameters' names, groups or shapes differ, naming the first that does.
    """
    expected = [list(group["param_names"]) for group in optimizer.param_groups]
    found = [group["names"] for group in state["groups"]]
    if found != expected:
        raise ValueError(f"optimizer state: expected parameters {expected}, found {found}")
    named = _named(optimizer)
    index = {name: i for i, name in enumerate(named)}
    values: dict[int, dict[str, Any]] = {}
    for path, value in [*tensors.items(), *state["values"].items()]:
        key, _, name = path.partition("/")
        if name not in named:
            raise ValueError(f"optimizer state: {path} belongs to no parameter")
        if isinstance(value, Tensor) and value.dim() and value.shape != named[name].shape:
            raise ValueError(f"{path}: expected shape {tuple(named[name].shape)}, found {tuple(value.shape)}")
        values.setdefault(index[name], {})[key] = _own(value, named[name])
    pairs = zip(optimizer.param_groups, state["groups"], strict=True)
    groups = [_restored(own, saved) | {"params": [index[name] for name in saved["names"]]} for own, saved in pairs]
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def _own(value: Any, parameter: Tensor) -> Any:
    """A copy for the optimizer; what has the parameter's shape is sharded as it is."""
    if not isinstance(value, Tensor):
        return value
    return (placed_like(value, parameter) if value.dim() else value).clone()


def _restored(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: _like(own[key], saved[key]) for key in _settings(own) if key in saved}
    return _settings(own) | settings | {"param_names": list(saved["names"])}


def _named(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError("optimizer: expected one built from model.named_parameters(), found parameters without names")
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in settings.items()}


def _like(own: Any, saved: Any) -> Any:
    if isinstance(own, Tensor):
        return torch.as_tensor(saved, dtype=own.dtype, device=own.device)
    return tuple(saved) if isinstance(own, tuple) else saved  # JSON has no tuples
