"""LeRobot's interface: batches in LeRobot's form give what the policy itself gives on its own form of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from policy.draws import Draws
from policy.lerobot_policy import LeRobotPolicy
from policy.methods import METHODS, load_policy
from policy.policy import Batch, Policy
from policy.windows import Windows
from tests.policy.tiny_policies import STATE_DIM, draws_of, tiny, tiny_batch

SIDE = 36
FRAMES, B = 11, 3


def with_camera(method: str, **options: Any) -> Policy:
    """A policy that sees numbers and a camera "top"."""
    torch.manual_seed(0)
    policy = METHODS[method](
        shapes={"state": (STATE_DIM,), "top": (SIDE, SIDE, 3)},
        action_dim=2,
        normalizer={"parts": {"state": [{"size": STATE_DIM}], "action": [{"size": 2}]}},
        network={"name": "mlp", "width": 16, "depth": 1},
        obs_steps=2,
        horizon=6,
        action_steps=4,
        **options,
    )
    arrays = episode()
    policy.normalizer.fit({key: arrays[key] for key in ("state", "action")})
    return policy.eval()


def episode() -> dict[str, np.ndarray]:
    """Frames of an episode in our form."""
    draws = np.random.default_rng(0)
    return {
        "state": draws.normal(size=(FRAMES, STATE_DIM)).astype(np.float32),
        "action": draws.normal(size=(FRAMES, 2)).astype(np.float32),
        "top": draws.integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8),
    }


def lerobot_frames(arrays: dict[str, np.ndarray], frames: np.ndarray) -> dict[str, Tensor]:
    """Some frames in LeRobot's form, the shape of `frames` leading; beyond the episode the first or last one."""
    chosen = frames.clip(0, FRAMES - 1)
    images = torch.from_numpy(arrays["top"][chosen]).movedim(-1, -3).float() / 255
    return {
        "observation.state": torch.from_numpy(arrays["state"][chosen]),
        "observation.images.top": images,
        "action": torch.from_numpy(arrays["action"][chosen]),
        "index": torch.from_numpy(chosen),
    }


def lerobot_batch(policy: LeRobotPolicy, arrays: dict[str, np.ndarray], present: np.ndarray) -> dict[str, Tensor]:
    """A training batch as a data set of LeRobot makes it, by the config's delta indices."""
    config = policy.config
    observed = lerobot_frames(arrays, present[:, None] + np.array(config.observation_delta_indices))
    chunks = lerobot_frames(arrays, present[:, None] + np.array(config.action_delta_indices))
    padded = present[:, None] + np.array(config.action_delta_indices) >= FRAMES
    return {
        **{key: value for key, value in observed.items() if key.startswith("observation")},
        "action": chunks["action"],
        "action_is_pad": torch.from_numpy(padded),
    }


@pytest.mark.parametrize("method", METHODS)
def test_actions_of_an_episode_are_those_of_the_policy_itself(method: str) -> None:
    policy, arrays = with_camera(method), episode()
    adapter = LeRobotPolicy(policy)
    for _ in range(2):  # episodes
        torch.manual_seed(5)
        adapter.reset()
        made = [adapter.select_action(lerobot_frames(arrays, np.array([time, FRAMES - time]))) for time in range(6)]
        torch.manual_seed(5)
        generators = draws_of(*torch.randint(2**63 - 1, (2,)).tolist())
        policy.reset()
        for time, action in enumerate(made):
            rows = np.array([time, FRAMES - time]).clip(0, FRAMES - 1)
            observation = {key: torch.from_numpy(arrays[key][rows]) for key in ("state", "top")}
            assert torch.equal(action, policy.select_action(observation, generators))
            assert action.shape == (2, 2) and not action.requires_grad


def test_every_byte_of_an_image_survives() -> None:
    policy = with_camera("regression")
    image = torch.arange(256, dtype=torch.uint8).repeat(3 * SIDE * SIDE // 256 + 1)[: 3 * SIDE * SIDE]
    image = image.view(1, SIDE, SIDE, 3)
    batch = {"observation.state": torch.zeros(1, STATE_DIM), "observation.top": image.permute(0, 3, 1, 2).float() / 255}
    found = LeRobotPolicy(policy)._observation(batch)["top"]
    assert torch.equal(found, image)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_policy_s_on_the_windows_that_the_delta_indices_name(method: str) -> None:
    policy, arrays = with_camera(method), episode()
    adapter = LeRobotPolicy(policy)
    present = np.array([0, 4, FRAMES - 1])
    torch.manual_seed(3)
    loss, values = adapter.forward(lerobot_batch(adapter, arrays, present))
    windows = Windows([FRAMES], horizon=6, pad_before=1, pad_after=4)
    rows = torch.from_numpy(windows.indices(present))  # the k-th window's present frame is the k-th
    observation = {key: torch.from_numpy(arrays[key])[rows[:, :2]] for key in ("state", "top")}
    torch.manual_seed(3)
    expected = policy.loss(Batch(observation, torch.from_numpy(arrays["action"])[rows][:, None]), Draws())
    assert torch.equal(loss, expected.loss.mean())
    assert values == {name: value.item() for name, value in expected.values.items()}
    loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.get_optim_params())


def test_a_chunk_follows_from_a_window_or_from_what_was_seen_before() -> None:
    policy, arrays = with_camera("drifting"), episode()
    adapter = LeRobotPolicy(policy)
    torch.manual_seed(1)
    for time in (3, 4):
        online = adapter.predict_action_chunk(lerobot_frames(arrays, np.array([time])))
    adapter.reset()
    torch.manual_seed(1)
    adapter._draw({"state": torch.zeros(1, 3)})
    adapter.predict_action_chunk(lerobot_frames(arrays, np.array([[3, 3]])))  # the generator's first numbers
    offline = adapter.predict_action_chunk(lerobot_frames(arrays, np.array([[3, 4]])))
    assert online.shape == (1, 4, 2) and torch.equal(online, offline)
    assert not adapter.policy._seen


def test_the_config_has_lerobot_s_names() -> None:
    config = LeRobotPolicy(with_camera("drifting")).config
    assert (config.n_obs_steps, config.horizon, config.n_action_steps, config.type) == (2, 6, 4, "driftfield")
    assert config.input_features == {
        "observation.state": ("STATE", (3,)), "observation.images.top": ("VISUAL", (3, SIDE, SIDE)),
    }  # fmt: skip
    assert config.output_features == {"action": ("ACTION", (2,))} and config.action_feature.shape == (2,)
    assert list(config.image_features) == ["observation.images.top"] and config.robot_state_feature is not None
    assert config.observation_delta_indices == [-1, 0] and config.action_delta_indices == [-1, 0, 1, 2, 3, 4]
    assert config.reward_delta_indices is None and config.device == "cpu"
    assert config.normalization_mapping == {"STATE": "IDENTITY", "VISUAL": "IDENTITY", "ACTION": "IDENTITY"}


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_is_one_of_the_policy_itself(method: str, tmp_path: Path) -> None:
    policy = tiny(method)
    LeRobotPolicy(policy).save_pretrained(tmp_path)
    loaded, plain = LeRobotPolicy.from_pretrained(tmp_path), load_policy(tmp_path)
    assert not loaded.training and type(plain) is type(policy)
    for each in (loaded.policy.state_dict(), plain.state_dict()):
        assert all(torch.equal(each[name], value) for name, value in policy.state_dict().items())


def test_what_does_not_fit_is_refused() -> None:
    adapter, arrays = LeRobotPolicy(with_camera("drifting")), episode()
    batch = lerobot_frames(arrays, np.arange(B))
    with pytest.raises(ValueError, match=r"^batch must have 'observation.images.top', got \['observation.state'\]$"):
        adapter.select_action({"observation.state": batch["observation.state"]})
    with pytest.raises(ValueError, match=r"'observation.images.top' must lie within \[0, 1\].*, got -3 to -2$"):
        adapter.select_action(batch | {"observation.images.top": batch["observation.images.top"] - 3})
    with pytest.raises(ValueError, match=r"must be floats \[batch, ..., 3, H, W\], got torch.uint8"):
        adapter.select_action(batch | {"observation.images.top": batch["observation.images.top"].byte()})
    training = lerobot_batch(adapter, arrays, np.arange(B))
    with pytest.raises(ValueError, match=r"^'action' must be \[batch, 6, 2\], got \[3, 5, 2\]$"):
        adapter.forward(training | {"action": training["action"][:, 1:]})
    with pytest.raises(ValueError, match="^batch must have 'action'"):
        adapter.forward({key: value for key, value in training.items() if key != "action"})
    policy = tiny("regression")
    policy.config["shapes"] = {"goal": [3]}
    with pytest.raises(ValueError, match="^policy: expected numbers under the key 'state' alone, found goal$"):
        LeRobotPolicy(policy)


def test_a_policy_of_numbers_alone_takes_batches_with_more_keys() -> None:
    policy = tiny("drifting", generated=4)
    batch = tiny_batch(policy)
    given = {"observation.state": batch.observation["state"], "action": batch.actions[:, 0], "task": ["reach"] * 5}
    loss, values = LeRobotPolicy(policy).forward(given)  # type: ignore[arg-type]
    assert loss.isfinite() and "nearest_error" in values
