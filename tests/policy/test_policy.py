"""What every policy promises: rows by themselves, the executed slice, the demonstrations' range, a folder."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policy.draws import Draws
from policy.drifting_policy import DriftingPolicy
from policy.methods import METHODS, load_policy
from policy.policy import build_network
from policy.regression_policy import RegressionPolicy
from tests.policy.tiny_policies import HIGH, LOW, MLP, draws_of, tiny, tiny_batch

UNET: dict[str, Any] = {"name": "unet1d", "channels": [8, 16], "step_dim": 8}
TRANSFORMER: dict[str, Any] = {"name": "transformer", "width": 16, "depth": 1, "heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "drifting": {"generated": 4, "noise_skip": 0.7, "loss_over": "step", "loss": {"temperatures": [0.1, 0.3]}},
    "diffusion": {"train_steps": 7, "sampler": "ddim", "steps": 5},
    "regression": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_row_does_not_depend_on_the_others(method: str) -> None:
    policy = tiny(method, **OPTIONS[method])
    observation = tiny_batch(policy).observation["state"]
    together = policy.predict({"state": observation}, draws_of(0, 1, 2, 3, 4))
    for row in range(5):
        alone = policy.predict({"state": observation[row : row + 1]}, draws_of(row))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)
    if method != "regression":
        other = policy.predict({"state": observation}, draws_of(5, 1, 2, 3, 4))
        assert not torch.allclose(other[0], together[0], atol=1e-3)
        torch.testing.assert_close(other[1:], together[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("obs_steps", "action_steps"), [(1, 6), (2, 4), (2, 5), (3, 1)])
def test_executed_are_the_steps_from_the_last_observation_on(obs_steps: int, action_steps: int) -> None:
    policy = tiny("drifting", obs_steps=obs_steps, action_steps=action_steps)
    observation = tiny_batch(policy).observation
    chunk = policy.predict_chunk(observation, draws_of(0, 1, 2, 3, 4))  # [5, 6, 2]
    actions = policy.predict(observation, draws_of(0, 1, 2, 3, 4))
    expected = [obs_steps - 1 + step for step in range(action_steps)]
    assert chunk.shape == (5, 6, 2) and torch.equal(actions, chunk[:, expected])


@pytest.mark.parametrize(("obs_steps", "action_steps"), [(2, 6), (2, 0), (7, 1)])
def test_chunks_too_short_for_what_is_executed_are_refused(obs_steps: int, action_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"^action_steps: expected 1 to .* = {7 - obs_steps}, found {action_steps}$"):
        tiny("regression", obs_steps=obs_steps, action_steps=action_steps)


@pytest.mark.parametrize("method", METHODS)
def test_predictions_stay_in_the_range_of_the_demonstrations(method: str) -> None:
    policy = tiny(method, **OPTIONS[method])
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.mul_(20)
    observation = tiny_batch(policy).observation
    chunk = policy.predict_chunk(observation, draws_of(0, 1, 2, 3, 4))
    assert (chunk >= LOW).all() and (chunk <= HIGH).all()
    with torch.no_grad():
        raw = policy.sample(policy.encode(observation), draws_of(0, 1, 2, 3, 4))
    inside = raw.abs() < 1
    assert (chunk == LOW).any() and (chunk == HIGH).any()
    torch.testing.assert_close(chunk[inside], (LOW + (raw + 1) / 2 * (HIGH - LOW))[inside])


class Recorded(RegressionPolicy):
    """Numbers its predictions and remembers what they were asked of."""

    asked: list[Tensor]

    def predict(self, observation: Mapping[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        self.asked.append(observation["state"])
        number = torch.arange(self.action_steps) + 100.0 * len(self.asked)
        return number[None, :, None].expand(len(generators), -1, 2)


def test_actions_are_handed_out_one_by_one_then_predicted_anew() -> None:
    policy = tiny("regression", obs_steps=3, action_steps=2)
    policy.__class__, policy.asked = Recorded, []
    states = [torch.full((1, 3), float(time)) for time in range(5)]
    actions = [policy.select_action({"state": state}, draws_of(0)).tolist() for state in states]
    assert [action[0][0] for action in actions] == [100, 101, 200, 201, 300]
    assert [asked[0, :, 0].tolist() for asked in policy.asked] == [[0, 0, 0], [0, 1, 2], [2, 3, 4]]
    policy.reset()
    assert policy.select_action({"state": states[4]}, draws_of(0)).tolist() == [[400, 400]]
    assert policy.asked[-1][0, :, 0].tolist() == [4, 4, 4]


def test_observations_reach_the_network_normalised() -> None:
    policy = tiny("regression")
    least, most = torch.tensor([-2.0, 0.0, 5.0]), torch.tensor([2.0, 1.0, 9.0])
    features = policy.encode({"state": torch.stack([least, most])[None]})  # [1, 2, 3]
    torch.testing.assert_close(features, torch.tensor([[[-1.0] * 3, [1.0] * 3]]))


def test_differences_of_positions_follow_the_normalised_numbers(tmp_path: Path) -> None:
    policy = tiny("regression", differences=[[2, 0]], frequencies=1)  # from -2 to 9 together
    state = torch.tensor([[[0.0, 0.5, 5.5], [1.0, 0.0, 4.5]]])
    numbers = torch.tensor([[[0.0, 0.0, -0.75, 0.5], [0.5, -1.0, -1.25, 3.5 / 11]]])
    features = torch.cat((numbers, (torch.pi / 2 * numbers).sin(), (torch.pi / 2 * numbers).cos()), -1)
    torch.testing.assert_close(policy.encode({"state": state}), features)
    policy.save_pretrained(tmp_path)
    torch.testing.assert_close(load_policy(tmp_path).encode({"state": state}), features)


@pytest.mark.parametrize("group", [[0], [], [0, 3], [-1, 1], [1, 1]])
def test_differences_of_no_two_entries_of_the_state_are_refused(group: list[int]) -> None:
    message = rf"differences: expected .* two different entries of the 3 of 'state', found {re.escape(str(group))}"
    with pytest.raises(ValueError, match=message):
        tiny("regression", differences=[[0, 1], group])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", [MLP, UNET, TRANSFORMER], ids=lambda network: network["name"])
def test_a_trunk_runs_once_for_all_chunks_and_evaluations(method: str, network: dict[str, Any]) -> None:
    policy = tiny(method, network=network, horizon=8, trunk=[12, 7], **OPTIONS[method])
    runs: list[int] = []
    policy.trunk.register_forward_hook(lambda *seen: runs.append(len(seen[2])))
    batch = tiny_batch(policy)
    loss = policy.loss(batch, Draws()).loss
    assert loss.shape == (5,) and runs == [5]
    (by_trunk,) = torch.autograd.grad(loss.sum(), policy.trunk.layers[0].weight)
    assert by_trunk.any()
    assert policy.predict_chunk(batch.observation, draws_of(0, 1, 2, 3, 4)).shape == (5, 8, 2) and runs == [5, 5]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", [UNET, TRANSFORMER], ids=lambda network: network["name"])
def test_a_folder_gives_the_policy_back_bit_by_bit(method: str, network: dict[str, Any], tmp_path: Path) -> None:
    policy = tiny(method, network=network, horizon=8, task="arm_reach", task_options={"action": "x"}, **OPTIONS[method])
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(std=0.1)
    policy.train().save_pretrained(tmp_path / "a" / "model")
    for loaded in (METHODS[method].from_pretrained(tmp_path / "a" / "model"), load_policy(tmp_path / "a" / "model")):
        assert type(loaded) is type(policy) and not loaded.training and loaded.config == policy.config
        assert (loaded.task, loaded.task_options) == ("arm_reach", {"action": "x"})
        state = policy.state_dict()
        assert loaded.state_dict().keys() == state.keys() and any("normalizer" in name for name in state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        observation = tiny_batch(policy).observation
        predicted = policy.eval().predict_chunk(observation, draws_of(0, 1, 2, 3, 4))
        assert torch.equal(loaded.predict_chunk(observation, draws_of(0, 1, 2, 3, 4)), predicted)
        assert predicted.std() > 0


def test_folders_of_something_else_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected config\.json, found none"):
        load_policy(tmp_path)
    tiny("regression").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: expected the config of DriftingPolicy, found that of Regr"):
        DriftingPolicy.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))

    def rewrite(model: str = config["model"], **arguments: Any) -> None:
        changed = {"model": model, "arguments": config["arguments"] | arguments}
        (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")

    rewrite(model="ImageGenerator")
    with pytest.raises(ValueError, match="DriftingPolicy, DiffusionPolicy, RegressionPolicy, found that of ImageGen"):
        load_policy(tmp_path)
    rewrite(horizon=7)
    with pytest.raises(ValueError, match=r"model\.safetensors: the weights do not fit the model of config\.json"):
        load_policy(tmp_path)
    rewrite(action_steps=9)
    with pytest.raises(ValueError, match=r"config\.json: action_steps: expected 1 to .* found 9"):
        load_policy(tmp_path)
    rewrite(hours=7)
    with pytest.raises(ValueError, match=r"config\.json: .*'hours'"):
        load_policy(tmp_path)
    rewrite()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors, found none"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"name": "perceptron"}, "network: expected the name mlp, unet1d or transformer, found 'perceptron'"),
        ({}, "network: expected the name mlp, unet1d or transformer, found None"),
        ({"name": "mlp", "heads": 3}, "network: .*'heads'"),
        ({"name": "mlp", "width": 0}, "width must be at least 1, got 0"),
    ],
)
def test_a_network_that_is_none_is_refused(network: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_network(network, 2, 3, 2, 16)
