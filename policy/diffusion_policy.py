"""The baseline: Diffusion Policy, the same network evaluated 100 times (DDPM) or 16 times (DDIM) per chunk."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from policy.diffusion import DiffusionProcess, Sampler
from policy.draws import Draws
from policy.policy import Batch, Policy, PolicyLoss


class DiffusionPolicy(Policy):
    """Chunks by removing noise step by step (Chi et al., Diffusion Policy).

    Args:
        train_steps: steps of the noise process.
        sampler: "ddpm" or "ddim".
        steps: evaluations per chunk.
        policy: as for `Policy`.

    Raises:
        ValueError: sizes or options that do not fit.

    >>> policy = DiffusionPolicy(
    ...     shapes={"state": (3,)}, action_dim=2, network={"name": "mlp", "width": 8}, steps=5,
    ...     normalizer={"parts": {"state": [{"size": 3}], "action": [{"size": 2}]}},
    ... )
    >>> policy.sample(torch.zeros(1, 2, 3), [torch.Generator()]).shape
    torch.Size([1, 16, 2])
    """

    def __init__(self, *, train_steps: int = 100, sampler: Sampler = "ddpm", steps: int = 100, **policy: Any) -> None:
        super().__init__(**policy)
        self.config |= {"train_steps": train_steps, "sampler": sampler, "steps": steps}
        self.process = DiffusionProcess(train_steps, sampler=sampler, steps=steps)

    def loss(self, batch: Batch, draws: Draws) -> PolicyLoss:
        """Squared error of the predicted noise, of each observation."""
        cond = self.encode(batch.observation, draws)
        loss = self.process.loss(self.network, self._normalized(batch.actions[:, 0]), cond, draws)
        return PolicyLoss(loss, {})

    def sample(self, cond: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """As many evaluations as the sampler has steps."""
        return self.process.sample(self.network, (len(cond), self.horizon, self.action_dim), cond, generators)
