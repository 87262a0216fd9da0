"""The noise process: its closed form, exact removal of known noise, both modes of a toy recovered."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from driftfield.training.seeding import generator
from policy.diffusion import DiffusionProcess, Sampler, row_noise
from policy.draws import Draws
from policy.mlp import ActionMLP

SAMPLERS: list[tuple[Sampler, int]] = [("ddpm", 100), ("ddim", 16)]


def remaining(step: int, steps: int = 100) -> float:
    """The signal's share a_t: the product of 1 - beta, beta_i = 1 - f(i+1)/f(i) <= 0.999, f a squared cosine."""

    def f(i: int) -> float:
        return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return math.prod(1 - min(1 - f(i + 1) / f(i), 0.999) for i in range(step + 1))


class Exact:
    """The network that knows the datum: the noise in x is (x - sqrt(a) datum) / sqrt(1 - a)."""

    def __init__(self, datum: Tensor) -> None:
        self.datum = datum
        self.steps: list[list[int]] = []

    def __call__(self, x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        self.steps.append(step.tolist())
        a = torch.tensor([remaining(t) for t in step.tolist()], dtype=x.dtype).view(-1, 1, 1)
        return (x - a.sqrt() * self.datum) / (1 - a).sqrt()


def test_noise_is_added_in_closed_form() -> None:
    actions, noise = torch.randn(2, 100, 4, 2, generator=generator(0)).double()
    step = torch.arange(100)
    a = torch.tensor([remaining(t) for t in range(100)], dtype=torch.float64).view(-1, 1, 1)
    noisy = DiffusionProcess().add_noise(actions, noise, step)
    torch.testing.assert_close(noisy, a.sqrt() * actions + (1 - a).sqrt() * noise, rtol=0, atol=1e-4)
    assert remaining(0) > 0.999 and remaining(99) < 1e-5


@pytest.mark.parametrize(("sampler", "steps"), SAMPLERS)
def test_the_exact_noise_leads_back_to_the_datum(sampler: Sampler, steps: int) -> None:
    datum = torch.rand(5, 8, 2, generator=generator(1)).double() * 2 - 1
    exact = Exact(datum)
    generators = [generator(0, row) for row in range(5)]
    made = DiffusionProcess(sampler=sampler, steps=steps).sample(
        exact, (5, 8, 2), torch.zeros(5, 2, 3).double(), generators
    )
    torch.testing.assert_close(made, datum, rtol=0, atol=1e-3)
    assert made.dtype == torch.float64
    assert len(exact.steps) == steps and all(len(set(row)) == 1 for row in exact.steps)
    assert [row[0] for row in exact.steps] == list(range(0, 100, 100 // steps))[:steps][::-1]


@pytest.mark.parametrize(("sampler", "steps"), SAMPLERS)
def test_samples_stay_within_the_data_range(sampler: Sampler, steps: int) -> None:
    def wild(x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        return -5 * x

    made = DiffusionProcess(sampler=sampler, steps=steps).sample(
        wild, (3, 8, 2), torch.zeros(3, 1, 1), [generator(0, row) for row in range(3)]
    )
    assert made.abs().max() <= 1 + 1e-6


def test_the_loss_is_the_squared_error_of_the_predicted_noise_for_each_row() -> None:
    process = DiffusionProcess()
    actions, cond = torch.zeros(400, 8, 2), torch.zeros(400, 2, 3)
    loss = process.loss(lambda x, step, cond: torch.zeros_like(x), actions, cond, Draws(generator(0)))
    assert loss.shape == (400,)
    # A mean of 16 squared normals has mean 1 and variance 2/16.
    assert loss.mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 16 / 400))
    assert loss.var().item() == pytest.approx(2 / 16, rel=0.4)
    datum = torch.rand(400, 8, 2, generator=generator(1)) * 2 - 1
    exact = Exact(datum)
    assert process.loss(exact, datum, cond, Draws(generator(0))).max() < 1e-4
    counts = torch.tensor(exact.steps[0]).bincount(minlength=100)
    assert len(counts) == 100 and counts.count_nonzero() > 90  # every step is trained


def test_loss_and_samples_are_functions_of_the_generators() -> None:
    process = DiffusionProcess()
    network = _network()
    actions, cond = torch.randn(3, 2, 2), torch.randn(3, 1, 4)
    first, again, other = (process.loss(network, actions, cond, Draws(generator(seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("sampler", "steps"), SAMPLERS)
def test_a_row_does_not_depend_on_the_batch(sampler: Sampler, steps: int) -> None:
    process = DiffusionProcess(sampler=sampler, steps=steps)
    network = _network()
    cond = torch.randn(4, 1, 4)
    together = process.sample(network, (4, 2, 2), cond, [generator(0, row) for row in range(4)])
    for row in range(4):
        alone = process.sample(network, (1, 2, 2), cond[row : row + 1], [generator(0, row)])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)
    assert not torch.equal(together[0], together[1])


def test_sampling_leaves_no_gradient_behind() -> None:
    made = DiffusionProcess(sampler="ddim", steps=2).sample(_network(), (1, 2, 2), torch.zeros(1, 1, 4), [generator(0)])
    assert not made.requires_grad


@pytest.mark.parametrize(("sampler", "steps"), SAMPLERS)
def test_both_modes_of_a_toy_are_recovered(sampler: Sampler, steps: int, trained: ActionMLP) -> None:
    """Targets are +m or -m with equal odds, m = 0.4 or 0.8 told by the condition."""
    size = torch.tensor([0.4, 0.8]).repeat(200).view(-1, 1, 1)
    generators = [generator(3, row) for row in range(400)]
    made = DiffusionProcess(sampler=sampler, steps=steps).sample(trained, (400, 1, 1), size, generators)
    for which in size[:2, 0, 0]:
        values = made[size == which]
        assert ((values.abs() - which).abs() < 0.15).float().mean() > 0.85
        assert 0.38 < (values > 0).float().mean() < 0.62  # 200 tosses: 3.4 standard deviations


@pytest.fixture(scope="module")
def trained() -> ActionMLP:
    torch.manual_seed(0)
    network = ActionMLP(1, 1, obs_steps=1, horizon=1, width=64, depth=2)
    process = DiffusionProcess()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    rng = generator(0, "toy")
    for _ in range(1000):
        size = torch.where(torch.rand(256, 1, 1, generator=rng) < 0.5, 0.4, 0.8)
        sign = torch.where(torch.rand(256, 1, 1, generator=rng) < 0.5, -1.0, 1.0)
        optimizer.zero_grad()
        process.loss(network, size * sign, size, Draws(rng)).mean().backward()
        optimizer.step()
        schedule.step()
    return network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of 'ddpm', 'ddim', got 'euler'"),
        ({"steps": 0}, "steps must be 1 to train_steps = 100, got 0"),
        ({"train_steps": 50}, "steps must be 1 to train_steps = 50, got 100"),
    ],
)
def test_impossible_processes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionProcess(**options)


def test_one_generator_per_row_is_expected() -> None:
    with pytest.raises(ValueError, match="one generator per row, 2, got 1"):
        row_noise((2, 3), [generator(0)])
    with pytest.raises(ValueError, match="one generator per row, 2, got 3"):
        DiffusionProcess().sample(_network(), (2, 2, 2), torch.zeros(2, 1, 4), [generator(0, i) for i in range(3)])


def _network() -> ActionMLP:
    torch.manual_seed(0)
    return ActionMLP(2, 4, obs_steps=1, horizon=2, width=16, depth=1)
