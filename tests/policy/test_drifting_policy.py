"""The one-step policy: its loss is the drifting loss of chunks, one group per observation; signals; two modes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from driftfield import DriftingLoss
from policy.draws import Draws
from policy.drifting_policy import DriftingPolicy, signals
from policy.policy import Batch
from tests.policy.tiny_policies import draws_of, gradients, tiny, tiny_batch

GROUP = 4
FIELD: dict[str, Any] = {"temperatures": (0.3,), "normalize_over": "x", "repulsion": 0.0}


def drifting(**options: Any) -> DriftingPolicy:
    policy = tiny("drifting", **({"generated": GROUP} | options))
    assert isinstance(policy, DriftingPolicy)
    return policy


def by_hand(policy: DriftingPolicy, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """Generated chunks `[B, G, T, A]`, a group at a time, and normalised demonstrations `[B, K, T, A]`."""
    size = len(batch.actions)
    noise = torch.randn(size, policy.generated, 6, 2, generator=draws_of(seed)[0])
    cond = policy.encode(batch.observation)  # [B, To, C]
    groups = [
        policy.network(noise[row], torch.zeros(policy.generated), cond[row].expand(policy.generated, -1, -1))
        for row in range(size)
    ]
    return torch.stack(groups) + policy.noise_skip * noise, policy.normalizer.normalize("action", batch.actions)


@pytest.mark.parametrize("positives", [1, 3])
@pytest.mark.parametrize("field", [{}, {"temperatures": [0.1, 0.3], "repulsion": 1.0}], ids=["default", "given"])
def test_loss_is_the_drifting_loss_of_whole_chunks(positives: int, field: dict[str, Any]) -> None:
    policy = drifting(noise_skip=0.5, loss=field)
    batch = tiny_batch(policy, positives=positives)
    output = policy.loss(batch, Draws(draws_of(3)[0]))
    x, demonstrated = by_hand(policy, batch, 3)
    expected = DriftingLoss(**(FIELD | field))(x.reshape(5, GROUP, 12), demonstrated.reshape(5, positives, 12))
    torch.testing.assert_close(output.loss, expected.loss)
    for mine, theirs in zip(gradients(policy, output.loss.sum()), gradients(policy, expected.loss.sum()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    logged = torch.stack([output.values[f"lambda/{temperature:g}"] for temperature in field.get("temperatures", [0.3])])
    torch.testing.assert_close(logged, expected.drift_norm)
    assert not logged.requires_grad and logged.min() > 0


@pytest.mark.parametrize("loss_over", ["chunk", "step"])
def test_a_factor_of_the_temperatures_is_as_good_as_other_temperatures(loss_over: str) -> None:
    policy, warm = (drifting(loss_over=loss_over, loss={"temperatures": [tau]}) for tau in (0.1, 0.4))
    batch = tiny_batch(policy)
    factored = policy.loss(batch, Draws(draws_of(3)[0]), temperature_factor=4.0)
    expected = warm.loss(batch, Draws(draws_of(3)[0]))
    torch.testing.assert_close(factored.values["lambda/0.1"], expected.values["lambda/0.4"])
    plain = policy.loss(batch, Draws(draws_of(3)[0]))
    assert not torch.allclose(plain.values["lambda/0.1"], expected.values["lambda/0.4"], rtol=1e-2)


def test_loss_by_step_is_the_mean_of_the_losses_of_the_steps() -> None:
    policy = drifting(loss_over="step")
    batch = tiny_batch(policy, positives=2)
    output = policy.loss(batch, Draws(draws_of(3)[0]))
    x, demonstrated = by_hand(policy, batch, 3)
    steps = [DriftingLoss(**FIELD)(x[:, :, t], demonstrated[:, :, t]) for t in range(6)]
    torch.testing.assert_close(output.loss, sum(step.loss for step in steps) / 6)
    torch.testing.assert_close(output.values["lambda/0.3"], sum(step.drift_norm for step in steps)[0] / 6)
    expected = gradients(policy, sum(step.loss.sum() for step in steps) / 6)
    for mine, theirs in zip(gradients(policy, output.loss.sum()), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    whole = drifting().loss(batch, Draws(draws_of(3)[0]))
    assert whole.values["lambda/0.3"] != output.values["lambda/0.3"]


def test_noise_is_added_times_sigma() -> None:
    plain, skipping = drifting(), drifting(noise_skip=0.75)
    noise, cond = torch.randn(5, 6, 2), torch.randn(5, 2, 3)
    with torch.no_grad():
        assert torch.equal(skipping.generate(cond, noise), plain.generate(cond, noise) + 0.75 * noise)
        for parameter in skipping.network.out.parameters():
            parameter.zero_()
        assert torch.equal(skipping.generate(cond, noise), 0.75 * noise)


def test_a_chunk_is_one_evaluation_from_noise_at_step_0(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, calls = drifting(), []
    forward = policy.network.forward

    def counted(x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        calls.append((x, step))
        return forward(x, step, cond)

    monkeypatch.setattr(policy.network, "forward", counted)
    policy.predict(tiny_batch(policy, size=2).observation, draws_of(0, 1))
    ((noise, step),) = calls
    expected = torch.stack([torch.randn(6, 2, generator=draw) for draw in draws_of(0, 1)])
    assert torch.equal(noise, expected) and step.tolist() == [0, 0]


@pytest.mark.parametrize(("options", "words"), [({"generated": 0}, "0 and 'chunk'"), ({"loss_over": "x"}, "4 and 'x'")])
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^expected generated >= 1 and loss_over chunk or step, found {words}$"):
        drifting(**options)
    with pytest.raises(ValueError, match="normalize_over"):
        drifting(loss={"normalize_over": "z"})


# ---- signals


def around(centre: Tensor, deviation: float) -> Tensor:
    """Groups of 8 chunks, half of them above and half below a centre `[B, 1, 1, 1]`: `[B, 8, 4, 2]`."""
    return (centre + deviation * torch.tensor([1.0, -1.0]).repeat(4).view(1, 8, 1, 1)).expand(-1, -1, 4, 2)


POSITIVES = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 2)  # they deviate from their mean by 1


@pytest.mark.parametrize(("deviation", "collapsed"), [(0.0, 1.0), (0.04, 1.0), (0.06, 0.0), (1.0, 0.0), (2.0, 0.0)])
def test_spread_is_that_of_a_group_as_a_part_of_the_data(deviation: float, collapsed: float) -> None:
    found = signals(around(torch.randn(2, 1, 1, 1), deviation), POSITIVES)
    assert found["spread"].item() == pytest.approx(deviation, abs=1e-6)
    assert found["collapsed"].item() == collapsed


@pytest.mark.parametrize(("deviation", "collapsed"), [(0.0, 1.0), (0.04, 1.0), (0.5, 0.0)])
def test_spread_is_the_deviation_itself_where_demonstrations_are_equal(deviation: float, collapsed: float) -> None:
    found = signals(around(torch.randn(2, 1, 1, 1), deviation), torch.full((2, 1, 4, 2), 0.3))
    assert found["spread"].item() == pytest.approx(deviation, abs=1e-6)
    assert found["collapsed"].item() == collapsed


def test_collapsed_is_a_share_of_the_groups() -> None:
    x = torch.cat([around(torch.zeros(1, 1, 1, 1), deviation) for deviation in (0.0, 1.0)])
    assert signals(x, POSITIVES)["collapsed"].item() == 0.5


def test_errors_are_those_of_the_nearest_chunk_and_of_all() -> None:
    errors = torch.tensor([0.5, -2.0, 1.0, 3.0])
    x = POSITIVES + errors.view(1, 4, 1, 1)
    found = signals(x, POSITIVES)
    assert found["nearest_error"].item() == pytest.approx(0.5)
    assert found["mean_error"].item() == pytest.approx(errors.square().mean().sqrt().item())
    both = torch.cat([POSITIVES, POSITIVES + 3.0], 1)  # K = 2: the second is met exactly
    assert signals(x, both)["nearest_error"].item() == pytest.approx((0.5**2 / 2) ** 0.5, abs=1e-5)


# ---- two modes


PATH = torch.stack([torch.linspace(0.2, 1.0, 4), torch.linspace(1.0, 0.5, 4)], -1)  # [4, 2]


def learn_two_ways(method: str, steps: int, **options: Any) -> Tensor:
    """200 chunks `[200, 4, 2]` of one observation after training on a path or its mirror image, one at a time."""
    policy = tiny(method, network={"name": "mlp", "width": 64, "depth": 2}, obs_steps=1, horizon=4, **options)
    policy.normalizer.fit({"state": -torch.eye(3).numpy(), "action": torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).numpy()})
    draws, rate = torch.Generator().manual_seed(1), 1e-2
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)
    state = torch.zeros(16, 1, 3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        side = torch.randint(2, (16, 1, 1, 1), generator=draws) * 2 - 1
        loss = policy.loss(Batch({"state": state}, side * PATH), Draws(draws)).loss
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return policy.predict({"state": torch.zeros(200, 1, 3)}, draws_of(*range(200)))


def shares(chunks: Tensor) -> tuple[float, float, float]:
    """Of chunks near a mode, near the mean, and of the first mode; near is within a quarter of a mode's length."""
    distance = torch.stack([(chunks - other * PATH).flatten(1).norm(dim=1) / PATH.norm() for other in (1, -1, 0)])
    near = (distance < 0.25).float().mean(1)
    return (near[0] + near[1]).item(), near[2].item(), (distance[0] < distance[1]).float().mean().item()


def test_two_ways_are_kept_from_one_demonstration_at_a_time() -> None:
    near, mean, first = shares(learn_two_ways("drifting", 300, generated=8))
    assert near > 0.7 and mean < 0.15 and 0.3 < first < 0.7


@pytest.mark.filterwarnings("ignore:one positive and 8 generated samples")
def test_the_papers_field_averages_the_two_ways() -> None:
    field = {"temperatures": (0.02, 0.05, 0.2), "normalize_over": "xy", "repulsion": 1.0}
    near, mean, _ = shares(learn_two_ways("drifting", 300, generated=8, loss=field))
    assert near == 0 and mean > 0.95


def test_regression_averages_the_two_ways() -> None:
    near, mean, _ = shares(learn_two_ways("regression", 300))
    assert near == 0 and mean == 1
