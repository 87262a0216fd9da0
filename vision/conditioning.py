"""The condition vector of the generator: class, style and guidance scale (paper A.2, A.7)."""

import math

import torch
from torch import Tensor, nn

from vision.transformer import RMSNorm

EMBEDDING_STD = 0.02
GUIDANCE_GAIN = 0.02  # the paper's: the size of the other embeddings before training
NUM_FREQUENCIES = 128  # cosines and sines make 256 channels
LONGEST_PERIOD = 10000.0


class GuidanceEmbedding(nn.Module):
    """Guidance scale alpha -> gain * RMSNorm(MLP(cos and sin of alpha at 128 frequencies)) (paper A.2).

    Args:
        cond_size: channels of the result.
        gain: size of the result; the paper's 0.02 takes long to be learned.

    >>> GuidanceEmbedding(4)(torch.tensor([1.0, 2.5])).shape
    torch.Size([2, 4])
    """

    frequencies: Tensor

    def __init__(self, cond_size: int, *, gain: float = GUIDANCE_GAIN) -> None:
        super().__init__()
        self.gain = gain
        exponent = torch.arange(NUM_FREQUENCIES, dtype=torch.float32) / NUM_FREQUENCIES
        frequencies = torch.exp(-math.log(LONGEST_PERIOD) * exponent)  # [128]
        self.register_buffer("frequencies", frequencies, persistent=False)
        first, second = nn.Linear(2 * NUM_FREQUENCIES, cond_size), nn.Linear(cond_size, cond_size)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=EMBEDDING_STD)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)
        self.norm = RMSNorm(cond_size)

    def forward(self, guidance_scale: Tensor) -> Tensor:
        angle = guidance_scale[:, None].float() * self.frequencies  # [B, 128]
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1)  # [B, 256]
        return self.gain * self.norm(self.mlp(waves))  # [B, cond]


class StyleEmbedding(nn.EmbeddingBag):
    """Sum over the style slots of one learned vector per slot and entry (paper A.2, "random style embeddings").

    Row `entry * num_styles + slot` belongs to entry `entry` of slot `slot`; so an entry that does not exist is a row
    that does not exist, and never another slot's vector.

    Args:
        num_styles: number of slots S.
        num_style_entries: entries of each slot.
        cond_size: channels of the result.

    >>> StyleEmbedding(3, 5, 4)(torch.tensor([[0, 4, 2]])).shape
    torch.Size([1, 4])
    """

    slots: Tensor

    def __init__(self, num_styles: int, num_style_entries: int, cond_size: int) -> None:
        super().__init__(num_styles * num_style_entries, cond_size, mode="sum")
        nn.init.normal_(self.weight, std=EMBEDDING_STD)
        self.num_styles = num_styles
        self.num_style_entries = num_style_entries
        self.register_buffer("slots", torch.arange(num_styles), persistent=False)

    def forward(self, style: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(style * self.num_styles + self.slots)  # [B, cond]


class Conditioning(nn.Module):
    """Condition vector = class embedding + style embeddings + guidance embedding (paper A.2).

    Args:
        num_classes: rows of the class table.
        cond_size: channels of the condition vector.
        num_styles: style slots S; 0 for none.
        num_style_entries: entries of each slot.
        guidance_gain: size of the guidance embedding.

    >>> condition = Conditioning(10, 4, num_styles=2, num_style_entries=3)
    >>> condition(torch.tensor([7]), torch.tensor([1.0]), torch.tensor([[0, 2]])).shape
    torch.Size([1, 4])
    """

    def __init__(
        self,
        num_classes: int,
        cond_size: int,
        *,
        num_styles: int,
        num_style_entries: int,
        guidance_gain: float = GUIDANCE_GAIN,
    ) -> None:
        super().__init__()
        self.label = nn.Embedding(num_classes, cond_size)
        nn.init.normal_(self.label.weight, std=EMBEDDING_STD)
        self.style = StyleEmbedding(num_styles, num_style_entries, cond_size) if num_styles else None
        self.guidance = GuidanceEmbedding(cond_size, gain=guidance_gain)

    def forward(self, label: Tensor, guidance_scale: Tensor, style: Tensor) -> Tensor:
        condition = self.label(label) + self.guidance(guidance_scale)  # [B, cond]
        return condition if self.style is None else condition + self.style(style)
