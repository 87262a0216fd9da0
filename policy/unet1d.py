"""The 1-D U-Net of Diffusion Policy: convolutions along the chunk, the observation as scale and shift (FiLM)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.mlp import ActionNetwork, check_positive, check_step_dim, sinusoidal_embedding

FEW_ROWS = 256  # of a product of matrices, chunks times actions: from here on PyTorch's convolution is no slower


class Conv1d(nn.Conv1d):
    """`nn.Conv1d` without dilation or groups, padded by half its size; few rows on a CPU as one product of matrices.

    For a chunk or a few, PyTorch's convolution on a CPU takes a path that is some three times as slow.

    >>> convolution = Conv1d(2, 3, 3, stride=2, padding=1)
    >>> convolution(torch.randn(1, 2, 16)).shape
    torch.Size([1, 3, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _few_rows(x):
            return super().forward(x)
        (size,), (stride,), padding = self.kernel_size, self.stride, self.kernel_size[0] // 2
        windows = F.pad(x, (padding, padding)).unfold(2, size, stride)  # [B, C, T', size]
        return F.linear(windows.transpose(1, 2).flatten(2), self.weight.flatten(1), self.bias).transpose(1, 2)


class Lengthen(nn.ConvTranspose1d):
    """Transposed convolution of size 4 that doubles the length; few rows on a CPU as one product of matrices.

    >>> Lengthen(2)(torch.randn(1, 2, 4)).shape
    torch.Size([1, 2, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not _few_rows(x):
            return super().forward(x, output_size)
        taps = F.linear(x.transpose(1, 2), self.weight.flatten(1).T).transpose(1, 2)  # [B, C 4, T]
        folded = F.fold(taps, (1, 2 * x.shape[2]), (1, 4), padding=(0, 1), stride=(1, 2)).squeeze(2)
        return folded if self.bias is None else folded + self.bias.unsqueeze(1)  # [B, C, 2 T]


class ConvNormMish(nn.Sequential):
    """Convolution that keeps the length, group normalisation, Mish.

    >>> ConvNormMish(2, 8, kernel_size=5, groups=4)(torch.randn(1, 2, 16)).shape
    torch.Size([1, 8, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int, groups: int) -> None:
        super().__init__(
            Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(groups, out_channels),
            nn.Mish(),
        )


class FiLMBlock(nn.Module):
    """Residual block of two convolutions; the condition scales and shifts what lies between them.

    The scale is raw, without "1 +", as Diffusion Policy has it: with PyTorch's initial weights it is small, so that
    at first little of the first convolution gets through.

    Args:
        in_channels: channels of the input; the shortcut is a 1x1 convolution where they are not out_channels.
        out_channels: channels of the output.
        cond_size: channels of the condition vector.
        kernel_size: of both convolutions, odd.
        groups: of both normalisations.

    >>> block = FiLMBlock(2, 8, cond_size=3, kernel_size=5, groups=4)
    >>> block(torch.randn(1, 2, 16), torch.randn(1, 3)).shape
    torch.Size([1, 8, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, *, cond_size: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.first = ConvNormMish(in_channels, out_channels, kernel_size=kernel_size, groups=groups)
        self.film = nn.Linear(cond_size, 2 * out_channels)
        self.second = ConvNormMish(out_channels, out_channels, kernel_size=kernel_size, groups=groups)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition).unsqueeze(-1).chunk(2, dim=1)  # [B, out_channels, 1] each
        return self.second(scale * self.first(x) + shift) + self.shortcut(x)


class Level(nn.Module):
    """Two residual blocks at one length.

    >>> level = Level(2, 8, cond_size=3, kernel_size=5, groups=4)
    >>> level(torch.randn(1, 2, 16), torch.randn(1, 3)).shape
    torch.Size([1, 8, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, *, cond_size: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.first = FiLMBlock(in_channels, out_channels, cond_size=cond_size, kernel_size=kernel_size, groups=groups)
        self.second = FiLMBlock(out_channels, out_channels, cond_size=cond_size, kernel_size=kernel_size, groups=groups)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.second(self.first(x, condition), condition)


class ConditionalUnet1D(ActionNetwork):
    """U-Net over the actions of a chunk: 16 - 8 - 4 - 8 - 16 with three levels.

    Source: Diffusion Policy's ConditionalUnet1D. Its way up has one level less than its way down, and the skip at
    full length, which nothing there reads, is dropped.

    Args:
        action_dim: A, numbers per action.
        cond_dim: C, features per observation.
        obs_steps: To, observations that the chunk is conditioned on.
        channels: of the levels, from the full length down; each a multiple of groups.
        step_dim: channels of the step embedding.
        kernel_size: of the convolutions, odd.
        groups: of the group normalisations.

    Raises:
        ValueError: a size is less than 1, kernel_size is even, step_dim odd or below 4, or channels are no multiples of
            groups. `forward`: the horizon is not a multiple of 2^(levels - 1).

    >>> network = ConditionalUnet1D(2, 5, obs_steps=2, channels=(16, 32), step_dim=8)
    >>> network(torch.randn(3, 8, 2), torch.zeros(3), torch.randn(3, 2, 5)).shape
    torch.Size([3, 8, 2])
    """

    def __init__(
        self,
        action_dim: int,
        cond_dim: int,
        obs_steps: int,
        *,
        channels: Sequence[int] = (256, 512, 1024),
        step_dim: int = 256,
        kernel_size: int = 5,
        groups: int = 8,
    ) -> None:
        super().__init__(action_dim, cond_dim, obs_steps)
        channels = tuple(channels)
        check_positive(groups=groups, kernel_size=kernel_size, levels=len(channels))
        check_step_dim(step_dim)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that a convolution keeps the length, got {kernel_size}")
        if any(width < 1 or width % groups for width in channels):
            raise ValueError(f"channels must be multiples of groups = {groups}, got {channels}")
        self.step_dim = step_dim
        self.length_unit = 2 ** (len(channels) - 1)
        self.step_embedding = nn.Sequential(
            nn.Linear(step_dim, 4 * step_dim), nn.Mish(), nn.Linear(4 * step_dim, step_dim)
        )
        cond_size = step_dim + obs_steps * cond_dim

        def level(in_channels: int, out_channels: int) -> Level:
            return Level(in_channels, out_channels, cond_size=cond_size, kernel_size=kernel_size, groups=groups)

        self.down = nn.ModuleList(level(i, o) for i, o in pairwise((action_dim, *channels)))
        self.shorten = nn.ModuleList(Conv1d(width, width, 3, stride=2, padding=1) for width in channels[:-1])
        self.middle = level(channels[-1], channels[-1])
        ups = list(pairwise(reversed(channels)))  # (1024, 512), (512, 256)
        self.up = nn.ModuleList(level(2 * i, o) for i, o in ups)
        self.lengthen = nn.ModuleList(Lengthen(o) for _, o in ups)
        self.out = nn.Sequential(
            ConvNormMish(channels[0], channels[0], kernel_size=kernel_size, groups=groups),
            Conv1d(channels[0], action_dim, 1),
        )

    def forward(self, x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        self.check(x, step, cond)
        if x.shape[1] % self.length_unit:
            raise ValueError(
                f"the horizon must be a multiple of {self.length_unit} for {len(self.down)} levels, got {x.shape[1]}"
            )
        embedded = self.step_embedding(sinusoidal_embedding(step, self.step_dim).to(x.dtype))  # [B, step_dim]
        condition = F.mish(torch.cat((embedded, cond.flatten(1)), dim=1))  # of every block
        h = x.transpose(1, 2)  # [B, A, T]
        skips = []
        for index, level in enumerate(self.down):
            if index:
                h = self.shorten[index - 1](h)
            h = level(h, condition)
            if index:
                skips.append(h)  # [B, channels[index], T / 2^index]
        h = self.middle(h, condition)
        for level, lengthen in zip(self.up, self.lengthen, strict=True):
            h = lengthen(level(torch.cat((h, skips.pop()), dim=1), condition))
        return self.out(h).transpose(1, 2)  # [B, T, A]


def _few_rows(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[0] * x.shape[2] <= FEW_ROWS
