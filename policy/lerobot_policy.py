"""Our policies behind the interface that LeRobot's programs call; LeRobot itself is not needed.

    policy = LeRobotPolicy.from_pretrained("runs/policy/arm_reach/model")
    action = policy.select_action({"observation.state": state})  # state [B, D], action [B, A]

A batch has "observation.state" and, of each camera, "observation.images.NAME" (or "observation.NAME"), float RGB in
[0, 1] with the channels first. LeRobot's own processors must leave all numbers as they are: the policy normalises.
Where a program asks for LeRobot's base class, `PreTrainedPolicy.register(LeRobotPolicy)` answers.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple, Self

import torch
from torch import Tensor, nn

from policy.draws import Draws
from policy.lerobot_data import IMAGE_PREFIXES, STATE_FEATURE
from policy.methods import load_policy
from policy.policy import Batch, Policy
from policy.replay_buffer import ACTION, STATE

LARGEST_SEED: Final = 2**63 - 1


class Feature(NamedTuple):
    """An input or output, as LeRobot describes it."""

    type: str  # "STATE", "VISUAL" or "ACTION"
    shape: tuple[int, ...]  # of a camera (3, height, width)


class LeRobotConfig:
    """What LeRobot's programs ask about a policy, by LeRobot's names.

    Args:
        policy: that it is about.

    >>> from policy.regression_policy import RegressionPolicy
    >>> parts = {"state": [{"size": 2}], "action": [{"size": 2}]}
    >>> network, shapes = {"name": "mlp", "width": 8}, {"state": (2,)}
    >>> config = LeRobotConfig(
    ...     RegressionPolicy(shapes=shapes, action_dim=2, network=network, normalizer={"parts": parts})
    ... )
    >>> config.observation_delta_indices, len(config.action_delta_indices), config.action_delta_indices[0]
    ([-1, 0], 16, -1)
    """

    type: Final = "driftfield"
    use_amp: Final = False
    use_peft: Final = False

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.n_obs_steps, self.horizon, self.n_action_steps = policy.obs_steps, policy.horizon, policy.action_steps
        self.input_features = {_name(key): _feature(shape) for key, shape in policy.config["shapes"].items()}
        self.output_features = {ACTION: Feature("ACTION", (policy.action_dim,))}
        self.normalization_mapping = dict.fromkeys(("STATE", "VISUAL", "ACTION"), "IDENTITY")

    @property
    def device(self) -> str:
        """Where the policy is."""
        return str(next(self._policy.parameters()).device)

    @property
    def image_features(self) -> dict[str, Feature]:
        """Cameras by name."""
        return {name: feature for name, feature in self.input_features.items() if feature.type == "VISUAL"}

    @property
    def robot_state_feature(self) -> Feature | None:
        """The state, if there is one."""
        return self.input_features.get(STATE_FEATURE)

    @property
    def action_feature(self) -> Feature:
        """The action."""
        return self.output_features[ACTION]

    @property
    def observation_delta_indices(self) -> list[int]:
        """Frames of a training batch's observations, counted from the present one."""
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        """Frames of its actions: a chunk begins with the oldest observation."""
        return list(range(1 - self.n_obs_steps, 1 - self.n_obs_steps + self.horizon))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards are asked for."""
        return None


class LeRobotPolicy(nn.Module):
    """A policy of ours with the methods of LeRobot's policies.

    As LeRobot's, it draws random numbers from PyTorch's global generator, so LeRobot's seed decides on them: in
    `forward` directly, in an episode through a generator of each row.

    Args:
        policy: any of `policy.methods`.

    Raises:
        ValueError: it observes numbers under another key than "state".

    >>> from policy.regression_policy import RegressionPolicy
    >>> parts = {"state": [{"size": 2}], "action": [{"size": 2}]}
    >>> network, shapes = {"name": "mlp", "width": 8}, {"state": (2,)}
    >>> ours = RegressionPolicy(shapes=shapes, action_dim=2, network=network, normalizer={"parts": parts})
    >>> _ = ours.normalizer.fit({key: torch.tensor([[-1.0, 0.0], [1.0, 9.0]]).numpy() for key in parts})
    >>> LeRobotPolicy(ours).select_action({"observation.state": torch.zeros(1, 2)}).shape
    torch.Size([1, 2])
    """

    name: Final = "driftfield"
    config_class: Final = LeRobotConfig

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        others = [key for key, shape in policy.config["shapes"].items() if len(shape) == 1 and key != STATE]
        if others:
            raise ValueError(f"policy: expected numbers under the key {STATE!r} alone, found {', '.join(others)}")
        self.policy = policy
        self.config = LeRobotConfig(policy)
        self.reset()

    def reset(self) -> None:
        """An episode begins: forget observations, planned actions and the rows' generators."""
        self.policy.reset()
        self._generators: list[torch.Generator] = []

    @torch.no_grad()
    def select_action(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The next action `[B, A]` at the present observation `[B, ...]` of each key, by receding horizon.

        Raises:
            ValueError: an observation is missing, or does not have the policy's shape; an image not within [0, 1].
        """
        observation = self._observation(batch)
        return self.policy.select_action(observation, self._draw(observation))

    @torch.no_grad()
    def predict_action_chunk(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The next n_action_steps actions `[B, Ta, A]`.

        Args:
            batch: the present observation `[B, ...]` of each key, taken in after those before it, or the last To of
                them `[B, To, ...]`, which leave no trace.

        Raises:
            ValueError: as for `select_action`.
        """
        observation = self._observation(batch)
        if not self._has_time(observation):
            observation = self.policy.window(observation)
        return self.policy.predict(observation, self._draw(observation))

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of a training batch, and what to log.

        Args:
            batch: observations `[B, To, ...]` and "action" `[B, T, A]`, of the frames that the config's delta indices
                name; frames beyond an episode repeat its first or last one.

        Raises:
            ValueError: as for `select_action`; no actions, or of another shape.
        """
        if ACTION not in batch:
            raise ValueError(f"batch must have 'action', got {sorted(batch)}")
        actions, wanted = batch[ACTION], (self.config.horizon, *self.config.action_feature.shape)
        if actions.ndim != 3 or tuple(actions.shape[1:]) != wanted:
            raise ValueError(f"'action' must be [batch, {wanted[0]}, {wanted[1]}], got {list(actions.shape)}")
        output = self.policy.loss(Batch(self._observation(batch), actions.unsqueeze(1)), Draws())
        return output.loss.mean(), {name: value.item() for name, value in output.values.items()}

    def get_optim_params(self) -> Iterator[nn.Parameter]:
        """What LeRobot's optimizer trains: all parameters."""
        return self.parameters()

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the policy as `Policy.save_pretrained` does; this class adds nothing to it."""
        self.policy.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | os.PathLike[str]) -> Self:
        """The policy of a folder, on the CPU, in eval mode; errors are those of `load_policy`."""
        return cls(load_policy(pretrained_name_or_path)).eval()

    def _observation(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our keys and values of a batch of LeRobot's."""
        observation = {}
        for key, shape in self.policy.config["shapes"].items():
            names = [_name(key)] if len(shape) == 1 else [prefix + key for prefix in IMAGE_PREFIXES]
            found = [name for name in names if name in batch]
            if not found:
                raise ValueError(f"batch must have {names[0]!r}, got {sorted(batch)}")
            observation[key] = batch[found[0]] if len(shape) == 1 else _bytes(found[0], batch[found[0]])
        return observation

    def _has_time(self, observation: Mapping[str, Tensor]) -> bool:
        key, shape = next(iter(self.policy.config["shapes"].items()))
        return observation[key].ndim == len(shape) + 2

    def _draw(self, observation: Mapping[str, Tensor]) -> list[torch.Generator]:
        """A generator of each row, the same ones until the next reset."""
        first = next(iter(observation.values()))
        if len(self._generators) != len(first):
            seeds = torch.randint(LARGEST_SEED, (len(first),)).tolist()
            self._generators = [torch.Generator(first.device).manual_seed(seed) for seed in seeds]
        return self._generators


def _name(key: str) -> str:
    return STATE_FEATURE if key == STATE else IMAGE_PREFIXES[0] + key


def _feature(shape: tuple[int, ...]) -> Feature:
    if len(shape) == 1:
        return Feature("STATE", tuple(shape))
    height, width, channels = shape
    return Feature("VISUAL", (channels, height, width))


def _bytes(name: str, images: Tensor) -> Tensor:
    """uint8 images `[..., H, W, 3]` of floats in [0, 1] `[..., 3, H, W]`."""
    if not images.is_floating_point() or images.ndim < 4:
        raise ValueError(f"{name!r} must be floats [batch, ..., 3, H, W], got {images.dtype} {list(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name!r} must lie within [0, 1], as it is before normalisation, got {low:.4g} to {high:.4g}")
    return (255 * images).round().to(torch.uint8).movedim(-3, -1)
