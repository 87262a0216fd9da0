"""A small policy of each kind, fitted to a few made-up numbers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.methods import METHODS
from policy.policy import Batch, Policy

STATE_DIM, ACTION_DIM = 3, 2
LOW, HIGH = torch.tensor([-1.0, 10.0]), torch.tensor([3.0, 20.0])  # of the demonstrated actions
MLP: dict[str, Any] = {"name": "mlp", "width": 16, "depth": 2}


def tiny(method: str, *, network: dict[str, Any] = MLP, **options: Any) -> Policy:
    """Chunks of 6 actions, the same weights at every call, in eval mode."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"obs_steps": 2, "horizon": 6, "action_steps": 4} | options
    policy = METHODS[method](
        shapes={"state": (STATE_DIM,)},
        action_dim=ACTION_DIM,
        normalizer={"parts": {"state": [{"size": STATE_DIM}], "action": [{"size": ACTION_DIM}]}},
        network=network,
        **sizes,
    )
    state = np.array([[-2, 0, 5], [2, 1, 9]], np.float32)
    policy.normalizer.fit({"state": state, "action": torch.stack([LOW, HIGH]).numpy()})
    return policy.eval()


def tiny_batch(policy: Policy, *, size: int = 5, positives: int = 1) -> Batch:
    """Random observations and chunks in the demonstrations' range."""
    draws = torch.Generator().manual_seed(7)
    observation = torch.randn(size, policy.obs_steps, STATE_DIM, generator=draws)
    chunks = torch.rand(size, positives, policy.horizon, ACTION_DIM, generator=draws)
    return Batch({"state": observation}, LOW + (HIGH - LOW) * chunks)


def draws_of(*seeds: int) -> list[torch.Generator]:
    """A generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def gradients(policy: Policy, loss: Tensor) -> list[Tensor]:
    """Gradient of a number by every parameter."""
    return list(torch.autograd.grad(loss, list(policy.parameters())))
