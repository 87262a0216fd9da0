"""The step embedding and the plain network: values, shapes, what each output depends on."""

import math

import pytest
import torch

from policy.mlp import ActionMLP, ActionNetwork, ObservationTrunk, sinusoidal_embedding


def test_the_embedding_is_sines_then_cosines_of_the_stated_frequencies() -> None:
    embedded = sinusoidal_embedding(torch.tensor([0, 7, 99]), 8)
    assert embedded.dtype == torch.float32
    for row, step in zip(embedded, (0, 7, 99), strict=True):
        frequencies = [math.exp(-k * math.log(10_000) / 3) for k in range(4)]
        expected = [math.sin(step * f) for f in frequencies] + [math.cos(step * f) for f in frequencies]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sinusoidal_embedding(torch.tensor([0.0, 7.0, 99.0]), 8), embedded, rtol=0, atol=0)


def test_all_100_steps_have_different_embeddings() -> None:
    embedded = sinusoidal_embedding(torch.arange(100), 32)
    distances = torch.cdist(embedded, embedded) + 10 * torch.eye(100)
    assert distances.min() > 0.1


@pytest.mark.parametrize("dim", [2, 7])
def test_an_embedding_of_impossible_length_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"even and at least 4, got {dim}"):
        sinusoidal_embedding(torch.zeros(1), dim)


def test_the_output_depends_on_noise_step_and_every_observation() -> None:
    torch.manual_seed(0)
    network = ActionMLP(2, 5, obs_steps=2, horizon=8)
    x, step, cond = torch.randn(3, 8, 2, requires_grad=True), torch.zeros(3), torch.randn(3, 2, 5, requires_grad=True)
    out = network(x, step, cond)
    assert out.shape == (3, 8, 2)
    by_x, by_cond = torch.autograd.grad(out[0].sum(), (x, cond))
    assert (by_x[0] != 0).all() and (by_cond[0] != 0).all()
    assert not by_x[1:].any() and not by_cond[1:].any()  # rows do not mix
    assert not torch.equal(network(x, step + 50, cond), out)


def test_width_and_depth_are_those_of_the_hidden_layers() -> None:
    network = ActionMLP(2, 5, obs_steps=2, horizon=8, width=64, depth=2)
    inputs = 8 * 2 + 2 * 5 + 32
    expected = (inputs + 1) * 64 + (64 + 1) * 64 + (64 + 1) * 16
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_a_trunk_sees_every_observation_of_its_row_alone() -> None:
    torch.manual_seed(0)
    trunk = ObservationTrunk(5, 2, [16, 6])
    cond = torch.randn(3, 2, 5, requires_grad=True)
    out = trunk(cond)
    assert out.shape == (3, trunk.obs_steps, trunk.dim) == (3, 1, 6)
    (by_cond,) = torch.autograd.grad(out[0].sum(), cond)
    assert (by_cond[0] != 0).all() and not by_cond[1:].any()
    assert sum(parameter.numel() for parameter in trunk.parameters()) == (10 + 1) * 16 + (16 + 1) * 6


def test_a_trunk_without_layers_lets_observations_through() -> None:
    trunk = ObservationTrunk(5, 2, [])
    cond = torch.randn(3, 2, 5)
    assert trunk(cond) is cond and (trunk.obs_steps, trunk.dim) == (2, 5) and not list(trunk.parameters())


@pytest.mark.parametrize("widths", [[0], [8, 0]])
def test_a_trunk_of_no_channels_is_refused(widths: list[int]) -> None:
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ObservationTrunk(5, 2, widths)


@pytest.mark.parametrize(
    ("x", "step", "cond", "message"),
    [
        ((3, 7, 2), (3,), (3, 2, 5), r"x must be \[batch, 8, 2\] .* got \[3, 7, 2\]"),
        ((3, 8, 3), (3,), (3, 2, 5), r"x must be \[batch, 8, 2\] .* got \[3, 8, 3\]"),
        ((8, 2), (3,), (3, 2, 5), r"x must be .* got \[8, 2\]"),
        ((3, 8, 2), (), (3, 2, 5), r"step must be \[3\], .* got \[\]"),
        ((3, 8, 2), (1,), (3, 2, 5), r"step must be \[3\], .* got \[1\]"),
        ((3, 8, 2), (3,), (3, 1, 5), r"cond must be \[3, 2, 5\] .* got \[3, 1, 5\]"),
        ((3, 8, 2), (3,), (1, 2, 5), r"cond must be \[3, 2, 5\] .* got \[1, 2, 5\]"),
        ((3, 8, 2), (3,), (3, 10), r"cond must be \[3, 2, 5\] .* got \[3, 10\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    x: tuple[int, ...], step: tuple[int, ...], cond: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ActionMLP(2, 5, obs_steps=2, horizon=8)(torch.zeros(x), torch.zeros(step), torch.zeros(cond))


def test_a_network_without_a_horizon_takes_any_length() -> None:
    network = ActionNetwork(2, 5, obs_steps=2)
    for horizon in (1, 9):
        network.check(torch.zeros(3, horizon, 2), torch.zeros(3), torch.zeros(3, 2, 5))


@pytest.mark.parametrize("size", ["action_dim", "cond_dim", "obs_steps", "horizon", "width", "depth"])
def test_sizes_below_one_are_refused(size: str) -> None:
    sizes = {"action_dim": 2, "cond_dim": 5, "obs_steps": 2, "horizon": 8, size: 0}
    with pytest.raises(ValueError, match=f"{size} must be at least 1, got 0"):
        ActionMLP(**sizes)
