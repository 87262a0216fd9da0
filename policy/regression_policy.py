"""The control: plain regression onto the demonstrated chunk. Where it does as well, a task has one mode."""

from collections.abc import Sequence

import torch
from torch import Tensor

from policy.draws import Draws
from policy.policy import Batch, Policy, PolicyLoss


class RegressionPolicy(Policy):
    """Mean of the demonstrated chunks; the network sees zeros in the place of noise.

    >>> policy = RegressionPolicy(
    ...     shapes={"state": (3,)}, action_dim=2, network={"name": "mlp", "width": 8},
    ...     normalizer={"parts": {"state": [{"size": 3}], "action": [{"size": 2}]}},
    ... )
    >>> policy.sample(torch.zeros(1, 2, 3), [torch.Generator()]).shape
    torch.Size([1, 16, 2])
    """

    def loss(self, batch: Batch, draws: Draws) -> PolicyLoss:
        """Squared error per number, of each observation."""
        predicted = self._predict(self.encode(batch.observation, draws))
        loss = (predicted - self._normalized(batch.actions[:, 0])).square().mean((1, 2))
        return PolicyLoss(loss, {"mean_error": loss.detach().mean().sqrt()})

    def sample(self, cond: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One evaluation."""
        return self._predict(cond)

    def _predict(self, cond: Tensor) -> Tensor:
        zeros = cond.new_zeros(len(cond), self.horizon, self.action_dim)
        return self.network(zeros, zeros.new_zeros(len(cond)), cond)
