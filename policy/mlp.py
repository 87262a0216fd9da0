"""What every action network takes and gives, and the plainest of them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST_PERIOD = 10_000.0  # of the step embedding's sines, divided by 2 pi
STEP_DIM = 32


def sinusoidal_embedding(step: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of a number at dim/2 frequencies from 1 down to 1/10000.

    Source: Diffusion Policy's step embedding, frequencies exp(-k ln 10000 / (dim/2 - 1)).

    Args:
        step: numbers [B], integer or floating point.
        dim: length of the embedding, even and at least 4.

    Raises:
        ValueError: dim is odd or less than 4.

    Returns:
        float32 [B, dim].

    >>> sinusoidal_embedding(torch.tensor([0]), 4).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    check_step_dim(dim)
    half = dim // 2
    exponent = torch.arange(half, device=step.device, dtype=torch.float32) / (half - 1)
    angle = step.float().unsqueeze(-1) * torch.exp(-math.log(LONGEST_PERIOD) * exponent)  # [B, dim/2]
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class ActionNetwork(nn.Module):
    """A network from noise and observation to a chunk of actions; its sizes, and the check of what it is given.

    `forward(x [B, T, A], step [B], cond [B, To, C]) -> [B, T, A]`: x is noise (drifting) or noisy actions
    (diffusion), step the diffusion step, 0 for a network that is evaluated once.

    Args:
        action_dim: A, numbers per action.
        cond_dim: C, features per observation.
        obs_steps: To, observations that the chunk is conditioned on.
        horizon: T, actions per chunk; None where any length will do.

    Raises:
        ValueError: a size is less than 1.
    """

    def __init__(self, action_dim: int, cond_dim: int, obs_steps: int, horizon: int | None = None) -> None:
        super().__init__()
        sizes = {"action_dim": action_dim, "cond_dim": cond_dim, "obs_steps": obs_steps}
        check_positive(**(sizes if horizon is None else sizes | {"horizon": horizon}))
        self.action_dim = action_dim
        self.cond_dim = cond_dim
        self.obs_steps = obs_steps
        self.horizon = horizon

    def check(self, x: Tensor, step: Tensor, cond: Tensor) -> None:
        """Refuse inputs of `forward` that do not fit the network or each other.

        Raises:
            ValueError: a shape does not fit.

        >>> ActionNetwork(2, 3, 1).check(torch.zeros(5, 4, 2), torch.zeros(5), torch.zeros(5, 2, 3))
        Traceback (most recent call last):
        ...
        ValueError: cond must be [5, 1, 3] (batch, observations, features), got [5, 2, 3]
        """
        if x.ndim != 3 or x.shape[2] != self.action_dim or self.horizon not in (None, x.shape[1]):
            expected = f"[batch, {self.horizon or 'horizon'}, {self.action_dim}]"
            raise ValueError(f"x must be {expected} (batch, actions, action_dim), got {list(x.shape)}")
        batch = x.shape[0]
        if step.shape != (batch,):
            raise ValueError(f"step must be [{batch}], one number per row of x, got {list(step.shape)}")
        if cond.shape != (batch, self.obs_steps, self.cond_dim):
            expected = f"[{batch}, {self.obs_steps}, {self.cond_dim}]"
            raise ValueError(f"cond must be {expected} (batch, observations, features), got {list(cond.shape)}")


class ActionMLP(ActionNetwork):
    """Chunk, observations and step flattened into one vector, through hidden layers with Mish.

    Args:
        action_dim: A, numbers per action.
        cond_dim: C, features per observation.
        obs_steps: To, observations that the chunk is conditioned on.
        horizon: T, actions per chunk.
        width: channels of the hidden layers.
        depth: number of hidden layers.

    Raises:
        ValueError: a size is less than 1.

    >>> network = ActionMLP(2, 5, obs_steps=2, horizon=8)
    >>> network(torch.randn(3, 8, 2), torch.zeros(3), torch.randn(3, 2, 5)).shape
    torch.Size([3, 8, 2])
    """

    def __init__(
        self, action_dim: int, cond_dim: int, obs_steps: int, horizon: int, *, width: int = 256, depth: int = 3
    ) -> None:
        super().__init__(action_dim, cond_dim, obs_steps, horizon)
        check_positive(width=width, depth=depth)
        widths = [horizon * action_dim + obs_steps * cond_dim + STEP_DIM, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:], strict=False))
        self.out = nn.Linear(width, horizon * action_dim)

    def forward(self, x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        self.check(x, step, cond)
        h = torch.cat((x.flatten(1), cond.flatten(1), sinusoidal_embedding(step, STEP_DIM).to(x.dtype)), dim=1)
        for layer in self.hidden:
            h = F.mish(layer(h))  # [B, width]
        return self.out(h).view_as(x)


class ObservationTrunk(nn.Module):
    """All observations of a policy flattened into one vector, through hidden layers with Mish.

    They run once for all chunks that are generated for an observation, and for all evaluations of one chunk.

    Args:
        cond_dim: C, features per observation.
        obs_steps: To, observations.
        widths: channels of the layers, the last one's the features that come out; none: the observations go through.

    Raises:
        ValueError: a size is less than 1.

    >>> trunk = ObservationTrunk(5, 2, [8, 6])
    >>> trunk(torch.randn(3, 2, 5)).shape, trunk.obs_steps, trunk.dim
    (torch.Size([3, 1, 6]), 1, 6)
    """

    def __init__(self, cond_dim: int, obs_steps: int, widths: Sequence[int]) -> None:
        super().__init__()
        for width in widths:
            check_positive(width=width)
        self.obs_steps, self.dim = (1, widths[-1]) if widths else (obs_steps, cond_dim)
        sizes = [obs_steps * cond_dim, *widths]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))

    def forward(self, cond: Tensor) -> Tensor:
        """Features `[B, To, C]` to `[B, 1, widths[-1]]`."""
        if not self.layers:
            return cond
        h = cond.flatten(1)
        for layer in self.layers:
            h = F.mish(layer(h))
        return h.unsqueeze(1)


def check_positive(**sizes: int) -> None:
    """Refuse sizes that are less than 1.

    Raises:
        ValueError: naming the first such size.

    >>> check_positive(width=0)
    Traceback (most recent call last):
    ...
    ValueError: width must be at least 1, got 0
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_step_dim(dim: int) -> None:
    """Refuse a length that no step embedding has.

    Raises:
        ValueError: dim is odd or less than 4.

    >>> check_step_dim(7)
    Traceback (most recent call last):
    ...
    ValueError: the length of a step embedding must be even and at least 4, got 7
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"the length of a step embedding must be even and at least 4, got {dim}")
