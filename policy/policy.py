"""What every policy has: observation encoder, action network, normaliser; prediction of the actions to execute."""

import os
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from driftfield.training.pretrained import read_arguments, read_weights, write_model
from policy.draws import Draws
from policy.ensembling import TemporalEnsemble
from policy.mlp import ActionMLP, ActionNetwork, ObservationTrunk
from policy.normalizer import Normalizer
from policy.observation import ObservationEncoder
from policy.replay_buffer import ACTION, STATE
from policy.transformer import ActionTransformer
from policy.unet1d import ConditionalUnet1D

MODEL = "model"  # of a run's folder: the finished policy
SNAPSHOTS = "snapshots"  # of a run's folder: those evaluated on the way


class Batch(NamedTuple):
    """What a training step learns from, in the units of the data."""

    observation: Mapping[str, Tensor]  # per key [B, To, ...]: uint8 images, float numbers
    actions: Tensor  # [B, K, T, A]: K demonstrated chunks of each observation, its own first


class PolicyLoss(NamedTuple):
    """What to minimise, and what to log."""

    loss: Tensor  # [B], one per observation
    values: Mapping[str, Tensor]  # by name, [] each


class Policy(nn.Module):
    """From the last To observations and noise to a chunk of T actions, of which Ta are executed.

    The first To - 1 actions of a chunk belong to the older observations, so steps To-1 ... To-1+Ta-1 are executed.

    Args:
        shapes: per observation key the shape of one observation: (H, W, 3) of a camera, (D,) of numbers.
        action_dim: A.
        normalizer: what `Normalizer.config` gives, for "action" and every key of numbers.
        network: "name" ("mlp", "unet1d" or "transformer"), and the keywords of that network.
        obs_steps: To.
        horizon: T.
        action_steps: Ta.
        crop: side of the crop of images, in pixels.
        frequencies: sines and cosines beside each number of an observation, as for `ObservationEncoder`.
        differences: for each axis the entries of "state" that are positions along it, in the data's unit: their
            pairwise differences are numbers of the observation too.
        trunk: channels of hidden layers between the observations and the network, as for `ObservationTrunk`.
        task: name of the task in `envs.TASKS`, for whoever rolls the policy out.
        task_options: keywords of `envs.make`.

    Raises:
        ValueError: sizes that do not fit.

    >>> from policy.regression_policy import RegressionPolicy
    >>> limits = torch.tensor([[-1.0, 0.0], [1.0, 9.0]]).numpy()
    >>> policy = RegressionPolicy(
    ...     shapes={"state": (2,)}, action_dim=2, network={"name": "mlp", "width": 8},
    ...     normalizer={"parts": {"state": [{"size": 2}], "action": [{"size": 2}]}},
    ... )
    >>> _ = policy.normalizer.fit({"state": limits, "action": limits})
    >>> policy.predict({"state": torch.zeros(1, 2, 2)}, [torch.Generator()]).shape  # 8 of 16 actions are executed
    torch.Size([1, 8, 2])
    """

    def __init__(
        self,
        *,
        shapes: Mapping[str, Sequence[int]],
        action_dim: int,
        normalizer: Mapping[str, Any],
        network: Mapping[str, Any],
        obs_steps: int = 2,
        horizon: int = 16,
        action_steps: int = 8,
        crop: int | None = None,
        frequencies: int = 0,
        differences: Sequence[Sequence[int]] = (),
        trunk: Sequence[int] = (),
        task: str = "",
        task_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= action_steps <= horizon - obs_steps + 1:
            raise ValueError(
                f"action_steps: expected 1 to horizon - obs_steps + 1 = {horizon - obs_steps + 1}, found {action_steps}"
            )
        self.config: dict[str, Any] = {
            "shapes": {key: list(shape) for key, shape in shapes.items()}, "action_dim": action_dim,
            "normalizer": dict(normalizer), "network": dict(network), "obs_steps": obs_steps, "horizon": horizon,
            "action_steps": action_steps, "crop": crop, "frequencies": frequencies,
            "differences": [list(group) for group in differences], "trunk": list(trunk), "task": task,
            "task_options": dict(task_options or {}),
        }  # fmt: skip
        self.action_dim, self.horizon = action_dim, horizon
        self.obs_steps, self.action_steps = obs_steps, action_steps
        self.task, self.task_options = task, dict(task_options or {})
        self.normalizer = Normalizer(**normalizer)
        self.differences = _checked_groups(differences, shapes)
        seen = {key: tuple(shape) for key, shape in shapes.items()}
        if self.differences:
            pairs = sum(comb(len(group), 2) for group in self.differences)
            seen[STATE] = (seen[STATE][0] + pairs,)
        self.encoder = ObservationEncoder(seen, crop=crop, frequencies=frequencies)
        self.trunk = ObservationTrunk(self.encoder.dim, obs_steps, trunk)
        self.network = build_network(network, action_dim, self.trunk.dim, self.trunk.obs_steps, horizon)
        self.reset()

    @abstractmethod
    def loss(self, batch: Batch, draws: Draws) -> PolicyLoss:
        """Loss of each observation.

        Args:
            batch: demonstrated chunks.
            draws: of the noise, and of the crops.
        """

    def errors(self, batch: Batch, draws: Draws) -> Mapping[str, Tensor]:
        """How well a batch is learned, by name; unlike `loss`, a process among several may ask for it alone."""
        output = self.loss(batch, draws)
        return {"loss": output.loss.mean(), **output.values}

    @abstractmethod
    def sample(self, cond: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Normalised chunks `[B, T, A]` for features `[B, To, C]`; row i draws from generator i alone."""

    def encode(self, observation: Mapping[str, Tensor], draws: Draws | None = None) -> Tensor:
        """Features `[B, To, C]` of observations `[B, To, ...]` in the units of the data; `[B, 1, C]` behind a trunk."""
        numbers = {key: self.normalizer.normalize(key, observation[key].float()) for key in self.encoder.numbers}
        if self.differences:
            differences = self.normalizer.differences(STATE, observation[STATE], self.differences)
            numbers[STATE] = torch.cat((numbers[STATE], differences), -1)
        features: Tensor = self.trunk(self.encoder({**observation, **numbers}, draws=draws))
        return features

    @torch.no_grad()
    def predict_chunk(self, observation: Mapping[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        """Whole chunks `[B, T, A]` in the units of the data, kept to the range of the demonstrations."""
        chunk = self.sample(self.encode(observation), generators)
        return self.normalizer.clamp(ACTION, self.normalizer.unnormalize(ACTION, chunk))

    def predict(self, observation: Mapping[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        """The actions to execute next.

        Args:
            observation: per key the last To observations `[B, To, ...]`, in the units of the data.
            generators: one per row, so that a row does not depend on the others.

        Returns:
            `[B, Ta, A]` in the units of the data.
        """
        first = self.obs_steps - 1
        return self.predict_chunk(observation, generators)[:, first : first + self.action_steps]

    def compile(self, *arguments: Any, **keywords: Any) -> None:
        """Compile the action network in place at its next call, which then takes minutes; what it computes stays.

        Args:
            arguments, keywords: as for `torch.compile`; mode="reduce-overhead" spares a GPU the launch of each kernel.
        """
        self.network.compile(*arguments, **keywords)

    def reset(self) -> None:
        """Forget the observations and actions of `select_action`: a new episode begins."""
        self._seen: deque[Mapping[str, Tensor]] = deque(maxlen=self.obs_steps)
        self._planned: deque[Tensor] = deque()

    def select_action(
        self,
        observation: Mapping[str, Tensor],
        generators: Sequence[torch.Generator],
        *,
        ensemble: TemporalEnsemble | None = None,
    ) -> Tensor:
        """The next action of a receding horizon: predicts a chunk, hands out Ta of its actions, predicts anew.

        Args:
            observation: per key the present observation `[B, ...]`.
            generators: one per row.
            ensemble: predict at every step instead, and average what all chunks say of it; reset it with the episode.

        Returns:
            `[B, A]`.
        """
        window = self.window(observation)
        if ensemble is not None:
            chunk = self.predict_chunk(window, generators)[:, self.obs_steps - 1 :]
            ensemble.add(chunk.cpu().numpy())
            return torch.from_numpy(ensemble.action()).to(chunk)
        if not self._planned:
            self._planned.extend(self.predict(window, generators).unbind(1))
        return self._planned.popleft()

    def window(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take in the present observation `[B, ...]`; the last To since `reset`, `[B, To, ...]`, the first repeated."""
        while len(self._seen) < self.obs_steps:
            self._seen.append(observation)
        self._seen.append(observation)
        return {key: torch.stack([seen[key] for seen in self._seen], dim=1) for key in observation}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors (normaliser included) into a folder.

        Raises:
            OSError: if the disk refuses; a file is then as it was.
        """
        write_model(Path(folder), self, type(self).__name__, self.config)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Build the policy from a folder of `save_pretrained`, on the CPU, in eval mode.

        Raises:
            FileNotFoundError: a file is absent.
            ValueError: config.json is another policy's, or the weights do not fit.
        """
        return read_weights(Path(folder), lambda: cls(**read_arguments(Path(folder), cls.__name__)))

    def _normalized(self, actions: Tensor) -> Tensor:
        return self.normalizer.normalize(ACTION, actions.float())


def _checked_groups(
    differences: Sequence[Sequence[int]], shapes: Mapping[str, Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    size = shapes[STATE][0] if len(shapes.get(STATE, ())) == 1 else 0
    for group in differences:
        if len(set(group)) != len(group) or len(group) < 2 or not 0 <= min(group) <= max(group) < size:
            raise ValueError(
                f"differences: expected groups of at least two different entries of the {size} of {STATE!r}, "
                f"found {list(group)}"
            )
    return tuple(tuple(group) for group in differences)


def build_network(
    network: Mapping[str, Any], action_dim: int, cond_dim: int, obs_steps: int, horizon: int
) -> ActionNetwork:
    """An action network by its name.

    Raises:
        ValueError: an unknown name, keywords that it does not take, or a horizon that it cannot halve at each level.

    >>> type(build_network({"name": "mlp", "width": 8}, 2, 3, 2, 16)).__name__
    'ActionMLP'
    """
    keywords = {key: value for key, value in network.items() if key != "name"}
    try:
        match network.get("name"):
            case "mlp":
                return ActionMLP(action_dim, cond_dim, obs_steps, horizon, **keywords)
            case "unet1d":
                unet = ConditionalUnet1D(action_dim, cond_dim, obs_steps, **keywords)
                if horizon % unet.length_unit:
                    raise ValueError(f"horizon: expected a multiple of {unet.length_unit}, found {horizon}")
                return unet
            case "transformer":
                return ActionTransformer(action_dim, cond_dim, obs_steps, horizon, **keywords)
    except TypeError as error:
        raise ValueError(f"network: {error}") from error
    raise ValueError(f"network: expected the name mlp, unet1d or transformer, found {network.get('name')!r}")
