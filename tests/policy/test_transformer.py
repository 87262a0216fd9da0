"""The transformer: who sees whom, the published size, what decays."""

from typing import Any

import pytest
import torch
from torch import Tensor

from driftfield.training.optimizer_state import optimizer_state
from policy.transformer import ActionTransformer, parameter_groups


def small(**options: Any) -> ActionTransformer:
    torch.manual_seed(0)
    return ActionTransformer(2, 5, obs_steps=2, horizon=4, **({"width": 16, "depth": 2} | options))


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 4, 2), torch.full((batch,), 7), torch.randn(batch, 2, 5)


def test_an_action_depends_on_earlier_actions_and_on_observations_up_to_its_time() -> None:
    network = small().double()
    with torch.no_grad():  # weights of 0.02 would hide a dependence in rounding
        for parameter in network.parameters():
            parameter.normal_()
    x, step, cond = (part.double() if part.is_floating_point() else part for part in inputs(1))
    x.requires_grad_(), cond.requires_grad_()
    out = network(x, step, cond)
    on_actions = torch.zeros(4, 4, dtype=torch.bool)
    on_observations = torch.zeros(4, 2, dtype=torch.bool)
    for t in range(4):
        by_x, by_cond = torch.autograd.grad(out[0, t].sum(), (x, cond), retain_graph=True, materialize_grads=True)
        on_actions[t] = by_x[0].ne(0).any(1)
        on_observations[t] = by_cond[0].ne(0).any(1)
    assert on_actions.tolist() == [[s <= t for s in range(4)] for t in range(4)]
    # Memory s = 0 is the step; observation o is memory s = o + 1, seen where t >= s - 1 = o.
    assert on_observations.tolist() == [[True, False], [True, True], [True, True], [True, True]]


def test_every_action_sees_the_step() -> None:
    network = small().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    x, step, cond = (part.double() if part.is_floating_point() else part for part in inputs())
    assert (network(x, step + 1, cond) != network(x, step, cond)).any(2).all()


def test_positions_make_equal_actions_differ() -> None:
    out = small()(torch.ones(1, 4, 2), torch.zeros(1), torch.zeros(1, 2, 5))
    assert torch.unique(out[0], dim=0).shape[0] == 4


def test_the_size_is_that_of_diffusion_policy() -> None:
    """PushT's: 8 layers of width 256, each of two attentions (4 n^2 + 4 n), a 4 n layer and three norms."""
    with torch.device("meta"):
        network = ActionTransformer(2, 20, obs_steps=2, horizon=16)
    n = 256
    attention, feed_forward = 4 * n * n + 4 * n, 8 * n * n + 5 * n
    expected = 8 * (2 * attention + feed_forward + 3 * 2 * n)
    expected += (2 + 1) * n + (20 + 1) * n + 16 * n + 3 * n + feed_forward + 2 * n + (n + 1) * 2
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert 8.5e6 < expected < 9.5e6


def test_the_initial_weights_are_as_published() -> None:
    network = small(width=64)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
            assert abs(parameter.mean()) < 0.005, name
        else:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert parameter.eq(expected).all(), name


def test_dropout_acts_while_training_only() -> None:
    network = small(dropout=0.5)
    given = inputs()
    assert not torch.equal(network(*given), network(*given))
    network.eval()
    assert torch.equal(network(*given), network(*given))


def test_the_masks_follow_the_module_but_are_not_saved() -> None:
    assert not {"later", "unseen"} & set(small().state_dict())
    assert small().to("meta").later.device.type == "meta"


def test_matrices_decay_and_nothing_else_does() -> None:
    network = small()
    decayed, kept = parameter_groups(network, weight_decay=0.1)
    names = {name for name, _ in decayed["params"]}, {name for name, _ in kept["params"]}
    assert names[0] | names[1] == {name for name, _ in network.named_parameters()} and not names[0] & names[1]
    assert "layers.0.self_attn.in_proj_weight" in names[0] and "actions.weight" in names[0]
    assert {"action_positions", "memory_positions", "norm.weight", "out.bias"} <= names[1]
    assert all(name.endswith("weight") for name in names[0])
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_in_no_group() -> None:
    network = small()
    network.out.requires_grad_(False)
    names = [name for group in parameter_groups(network, weight_decay=0.1) for name, _ in group["params"]]
    assert not any(name.startswith("out.") for name in names)


def test_the_groups_carry_names_into_a_checkpoint() -> None:
    optimizer = torch.optim.AdamW(parameter_groups(small(), weight_decay=0.1))
    groups = optimizer_state(optimizer).state["groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert "out.weight" in groups[0]["names"] and "out.bias" in groups[1]["names"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 18}, "multiple of heads = 4, got 18"),
        ({"width": 15, "heads": 3}, "even and at least 4, got 15"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_networks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_another_horizon_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be \[batch, 4, 2\].* got \[3, 5, 2\]"):
        small()(torch.zeros(3, 5, 2), torch.zeros(3), torch.zeros(3, 2, 5))
