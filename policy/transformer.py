"""The transformer of Diffusion Policy: actions as tokens that look at the observations."""

from typing import Any

import torch
from torch import Tensor, nn

from policy.mlp import ActionNetwork, check_positive, check_step_dim, sinusoidal_embedding

WEIGHT_STD = 0.02  # of all initial weights


class ActionTransformer(ActionNetwork):
    """Decoder with cross attention: an action sees those before it, and the observations up to its own time.

    Source: Diffusion Policy's TransformerForDiffusion. Tokens are the T actions; the memory is the step and then the
    To observations. Action t sees memory s where t >= s - 1, so that the step (s = 0) is seen by all.

    Args:
        action_dim: A, numbers per action.
        cond_dim: C, features per observation.
        obs_steps: To, observations that the chunk is conditioned on.
        horizon: T, actions per chunk.
        width: channels of a token; even, and a multiple of heads.
        depth: number of decoder layers.
        heads: of each attention.
        dropout: of attention and feed-forward layers, while training.

    Raises:
        ValueError: a size is less than 1, dropout is not in [0, 1), or width is odd or no multiple of heads.

    >>> network = ActionTransformer(2, 5, obs_steps=2, horizon=8, width=16, depth=1)
    >>> network(torch.randn(3, 8, 2), torch.zeros(3), torch.randn(3, 2, 5)).shape
    torch.Size([3, 8, 2])
    """

    def __init__(
        self,
        action_dim: int,
        cond_dim: int,
        obs_steps: int,
        horizon: int,
        *,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(action_dim, cond_dim, obs_steps, horizon)
        check_positive(width=width, depth=depth, heads=heads)
        check_step_dim(width)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads = {heads}, got {width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.width = width
        self.actions = nn.Linear(action_dim, width)
        self.observations = nn.Linear(cond_dim, width)
        self.action_positions = nn.Parameter(torch.empty(horizon, width))
        self.memory_positions = nn.Parameter(torch.empty(1 + obs_steps, width))
        self.memory = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.layers = nn.ModuleList(_decoder_layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, action_dim)
        self.register_buffer("later", _later(horizon, horizon, 0), persistent=False)
        self.register_buffer("unseen", _later(horizon, 1 + obs_steps, 1), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=WEIGHT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        self.check(x, step, cond)
        step_token = sinusoidal_embedding(step, self.width).to(x.dtype).unsqueeze(1)
        memory = torch.cat((step_token, self.observations(cond)), dim=1)  # [B, 1 + To, width]
        memory = self.memory(memory + self.memory_positions)
        h = self.actions(x) + self.action_positions  # [B, T, width]
        for layer in self.layers:
            h = layer(h, memory, tgt_mask=self.later, memory_mask=self.unseen, tgt_is_causal=True)
        return self.out(self.norm(h))


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Named parameter groups for AdamW: matrices and kernels decay; biases, norms and positions do not.

    Source: Diffusion Policy's optimizer groups of its transformer.

    Args:
        module: the network, or anything that contains one.
        weight_decay: of the first group; the second has none.

    Returns:
        Two groups of (name, parameter), every parameter that is trained in one of them. A group may be empty.

    >>> decayed, kept = parameter_groups(nn.Linear(2, 1), weight_decay=0.1)
    >>> [name for name, _ in decayed["params"]], [name for name, _ in kept["params"]]
    (['weight'], ['bias'])
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    decayed = [(n, p) for n, p in trained if p.ndim > 1 and not n.endswith("positions")]
    kept = [(n, p) for n, p in trained if p.ndim <= 1 or n.endswith("positions")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _decoder_layer(width: int, heads: int, dropout: float) -> nn.TransformerDecoderLayer:
    """Self-attention, cross-attention, feed-forward, each normalised first; attention is PyTorch's fused one."""
    return nn.TransformerDecoderLayer(
        width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
    )


def _later(num_actions: int, num_seen: int, lead: int) -> Tensor:
    """What action t may not look at: the s with s > t + lead, [num_actions, num_seen]."""
    return torch.arange(num_seen) > torch.arange(num_actions).unsqueeze(1) + lead
