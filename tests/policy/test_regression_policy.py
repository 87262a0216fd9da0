"""The control: it reaches the conditional mean, and hears no noise."""

import torch

from policy.draws import Draws
from policy.policy import Batch
from tests.policy.tiny_policies import draws_of, gradients, tiny, tiny_batch


def test_loss_is_the_squared_error_of_an_observations_own_chunk() -> None:
    policy = tiny("regression")
    batch = tiny_batch(policy, positives=3)
    output = policy.loss(batch, Draws(draws_of(0)[0]))
    own = policy.normalizer.normalize("action", batch.actions[:, 0])
    predicted = policy.network(torch.zeros(5, 6, 2), torch.zeros(5), policy.encode(batch.observation))
    expected = (predicted - own).square().mean((1, 2))
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.values["mean_error"], expected.mean().sqrt())
    for mine, theirs in zip(gradients(policy, output.loss.sum()), gradients(policy, expected.sum()), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_noise_changes_nothing() -> None:
    policy = tiny("regression")
    observation = tiny_batch(policy).observation
    one, other = (policy.predict(observation, draws_of(*range(seed, seed + 5))) for seed in (0, 10))
    assert torch.equal(one, other)


def test_it_reaches_the_mean_of_what_was_demonstrated() -> None:
    """Of one observation a quarter of the demonstrations goes to +1 and the rest to 0; of the other all to -1."""
    policy = tiny("regression", obs_steps=1, horizon=4)
    policy.normalizer.fit({"state": -torch.eye(3).numpy(), "action": torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).numpy()})
    state = torch.tensor([0.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0]).view(8, 1, 1).expand(8, 1, 3)
    chunks = torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0]).view(8, 1, 1, 1).expand(8, 1, 4, 2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        policy.loss(Batch({"state": state}, chunks), Draws(draws_of(0)[0])).loss.mean().backward()
        optimizer.step()
    predicted = policy.predict({"state": state[3:5]}, draws_of(0, 1))
    torch.testing.assert_close(predicted[0], torch.full((4, 2), 0.25), rtol=0, atol=0.02)
    torch.testing.assert_close(predicted[1], torch.full((4, 2), -1.0), rtol=0, atol=0.02)
