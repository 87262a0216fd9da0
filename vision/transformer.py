"""The transformer under the generator: attention, feed-forward and adaLN-zero blocks (paper A.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-6
ROTARY_BASE = 10000.0
FEED_FORWARD_MULTIPLE = 32  # the hidden width of SwiGLU is rounded up to a multiple of this


def rotary_table(num_tokens: int, head_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines and sines of the rotary angles n * base^(-2i / head_size).

    Source: paper A.2 (rotary position embedding over the whole sequence).

    Args:
        num_tokens: length N of the sequence.
        head_size: channels D of one head, an even number.
        dtype: in which tokens, frequencies, angles and the result are rounded.

    Returns:
        float32 table [2, N, D/2]: cosines, then sines.

    >>> rotary_table(3, 4)[:, 0].tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    half = head_size // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32) / half)  # [D/2]
    angle = torch.outer(torch.arange(num_tokens, dtype=torch.float32).to(dtype), frequency.to(dtype))  # [N, D/2]
    return torch.stack((angle.cos(), angle.sin())).float()  # [2, N, D/2]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (channel i, channel i + D/2) of token n by the angle of the table.

    Source: paper A.2, in the half-split form of the rotary embedding.

    Args:
        x: queries or keys [..., N, D].
        table: `rotary_table(N, D)` [2, N, D/2].

    Returns:
        [..., N, D] in the dtype of x.

    >>> rotate(torch.ones(1, 4), rotary_table(1, 4)).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    cosine, sine = table.to(x.dtype)  # [N, D/2] each
    first, second = x.chunk(2, dim=-1)  # [..., N, D/2] each
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation with a learned gain, computed in the precision of the gain: float32 (paper A.2).

    >>> RMSNorm(2)(torch.tensor([3.0, -3.0])).round(decimals=3).tolist()
    [1.0, -1.0]
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Modulation(nn.Linear):
    """adaLN-zero: one linear map of SiLU(condition), zero at the start, in float32 even under autocast (paper A.2).

    >>> Modulation(8, 4, 6)(torch.randn(2, 8)).shape
    torch.Size([2, 1, 24])
    """

    def __init__(self, cond_size: int, hidden_size: int, num_vectors: int) -> None:
        super().__init__(cond_size, num_vectors * hidden_size)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, condition: Tensor) -> Tensor:
        with torch.autocast(condition.device.type, enabled=False):
            return super().forward(F.silu(condition.to(self.weight.dtype))).unsqueeze(1)  # [B, 1, num_vectors * hidden]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, the same shift and scale for every token (paper A.2, adaLN).

    >>> modulate(torch.ones(1, 1, 2), torch.tensor(1.0), torch.tensor(2.0)).tolist()
    [[[4.0, 4.0]]]
    """
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention with RMS-normalised, rotated queries and keys (paper A.2).

    Args:
        hidden_size: channels of a token; a multiple of num_heads.
        num_heads: number of heads; each has an even number of channels.
        attention_in_float32: compute the attention itself in float32 although autocast is on.

    >>> Attention(8, 2)(torch.randn(1, 3, 8), rotary_table(3, 4)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, hidden_size: int, num_heads: int, *, attention_in_float32: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_in_float32 = attention_in_float32
        self.qkv = _linear(hidden_size, 3 * hidden_size)
        self.query_norm = RMSNorm(hidden_size // num_heads)
        self.key_norm = RMSNorm(hidden_size // num_heads)
        self.out = _linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, N, D]
        if self.attention_in_float32:
            heads = heads.to(self.qkv.weight.dtype)  # the parameters are float32
        query, key, value = heads.unbind()  # [B, heads, N, D] each
        with torch.autocast(x.device.type, enabled=False):
            query = rotate(self.query_norm(query), rotary)
            key = rotate(self.key_norm(key), rotary)
            mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, N, D]
        return self.out(mixed.transpose(1, 2).flatten(2).to(x.dtype))  # [B, N, hidden]


class SwiGLU(nn.Module):
    """Feed-forward layer W2 (silu(W1 x) * W3 x), hidden width 2/3 * 4 * hidden_size rounded up (paper A.2).

    >>> SwiGLU(12).down.in_features
    32
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = 2 * 4 * hidden_size // 3
        inner = -(-inner // FEED_FORWARD_MULTIPLE) * FEED_FORWARD_MULTIPLE
        self.gate_up = _linear(hidden_size, 2 * inner)  # W1 above W3: one product instead of two
        for half in self.gate_up.weight.chunk(2):  # each is a matrix of its own, so each has its own Xavier bound
            nn.init.xavier_uniform_(half.detach())
        self.down = _linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Attention and SwiGLU, each normalised, modulated and gated by the condition; the identity at the start (A.2).

    Args:
        hidden_size: channels of a token.
        num_heads: number of attention heads.
        cond_size: channels of the condition vector.
        attention_in_float32: compute the attention itself in float32 although autocast is on.

    >>> block = TransformerBlock(8, 2, cond_size=4); x = torch.randn(1, 3, 8)
    >>> torch.equal(block(x, torch.randn(1, 4), rotary_table(3, 4)), x)
    True
    """

    def __init__(self, hidden_size: int, num_heads: int, *, cond_size: int, attention_in_float32: bool = True) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads, attention_in_float32=attention_in_float32)
        self.feed_forward_norm = RMSNorm(hidden_size)
        self.feed_forward = SwiGLU(hidden_size)
        self.modulation = Modulation(cond_size, hidden_size, num_vectors=6)

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(condition).to(x.dtype).chunk(6, dim=-1)
        x = x + gate_a * self.attention(modulate(self.attention_norm(x), shift_a, scale_a), rotary)  # [B, N, hidden]
        return x + gate_f * self.feed_forward(modulate(self.feed_forward_norm(x), shift_f, scale_f))


class FinalLayer(nn.Module):
    """Norm, modulation and a linear map from tokens to patches; zero at the start (paper A.2).

    >>> FinalLayer(8, 4, cond_size=6)(torch.randn(1, 3, 8), torch.randn(1, 6)).abs().max().item()
    0.0
    """

    def __init__(self, hidden_size: int, out_size: int, *, cond_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.modulation = Modulation(cond_size, hidden_size, num_vectors=2)
        self.out = nn.Linear(hidden_size, out_size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).to(x.dtype).chunk(2, dim=-1)
        return self.out(modulate(self.norm(x), shift, scale))  # [B, N, out_size]


def _linear(in_size: int, out_size: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero bias (paper A.2)."""
    layer = nn.Linear(in_size, out_size)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
