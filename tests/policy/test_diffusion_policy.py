"""The baseline: the error of the predicted noise on an observation's own demonstration, and its many evaluations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from policy.diffusion_policy import DiffusionPolicy
from policy.draws import Draws
from tests.policy.tiny_policies import draws_of, tiny, tiny_batch


def diffusion(**options: Any) -> DiffusionPolicy:
    policy = tiny("diffusion", **({"train_steps": 7, "steps": 5} | options))
    assert isinstance(policy, DiffusionPolicy)
    return policy


def test_loss_is_the_squared_error_of_the_noise_in_the_normalised_chunk() -> None:
    policy = diffusion()
    batch = tiny_batch(policy, positives=3)
    output = policy.loss(batch, Draws(draws_of(3)[0]))
    draws = draws_of(3)[0]
    step, noise = torch.randint(7, (5,), generator=draws), torch.randn(5, 6, 2, generator=draws)
    clean = policy.normalizer.normalize("action", batch.actions[:, 0])  # the other two are of other observations
    predicted = policy.network(policy.process.add_noise(clean, noise, step), step, policy.encode(batch.observation))
    torch.testing.assert_close(output.loss, (predicted - noise).square().mean((1, 2)))
    assert output.loss.requires_grad and output.values == {}


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 7), ("ddim", 3)])
def test_a_chunk_takes_as_many_evaluations_as_the_sampler_has_steps(
    sampler: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, times = diffusion(sampler=sampler, steps=steps), []
    forward = policy.network.forward

    def counted(x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        times.append(step.tolist())
        return forward(x, step, cond)

    monkeypatch.setattr(policy.network, "forward", counted)
    policy.predict(tiny_batch(policy, size=2).observation, draws_of(0, 1))
    assert len(times) == steps and all(first == second for first, second in times)
    assert [first for first, _ in times] == sorted({first for first, _ in times}, reverse=True)
    assert times[-1] == [0, 0]


@pytest.mark.parametrize("options", [{"steps": 8}, {"steps": 0}, {"sampler": "euler"}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        diffusion(**options)
