"""The generator's transformer as a velocity field: times take the place of style and guidance scale."""

import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vision.conditioning import EMBEDDING_STD
from vision.generator import ImageGenerator

NUM_FREQUENCIES: Final = 128  # cosines and sines make 256 channels, as those of the guidance scale
# Of the angles t * frequency, t in [0, 1]. The highest bounds how fast the network can change with t, and with it the
# derivative that MeanFlow takes; the lowest is the slope over the whole interval.
LOWEST_FREQUENCY, HIGHEST_FREQUENCY = 0.1, 30.0


class TimeEmbedding(nn.Module):
    """Times -> sum over them of MLP(cos and sin at 128 frequencies): DiT's embedding (arXiv 2212.09748).

    The MLPs have 2 cond_size hidden channels in all, so that the number of times leaves the number of weights alone.

    Args:
        num_times: T.
        cond_size: channels of the result.

    >>> TimeEmbedding(2, 4)(torch.rand(3, 2)).shape
    torch.Size([3, 4])
    """

    frequencies: Tensor

    def __init__(self, num_times: int, cond_size: int) -> None:
        super().__init__()
        span = torch.linspace(math.log(LOWEST_FREQUENCY), math.log(HIGHEST_FREQUENCY), NUM_FREQUENCIES)
        self.register_buffer("frequencies", span.exp(), persistent=False)  # [128]
        hidden = 2 * cond_size // num_times
        self.first = nn.ModuleList(nn.Linear(2 * NUM_FREQUENCIES, hidden) for _ in range(num_times))
        self.second = nn.Linear(num_times * hidden, cond_size)
        for layer in (*self.first, self.second):
            nn.init.normal_(layer.weight, std=EMBEDDING_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, times: Tensor) -> Tensor:
        angle = times[..., None] * self.frequencies  # [B, T, 128]
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1)  # [B, T, 256]
        hidden = torch.cat([first(wave) for first, wave in zip(self.first, waves.unbind(1), strict=True)], dim=-1)
        return self.second(functional.silu(hidden))  # [B, cond]


class TimeConditioning(nn.Module):
    """Condition vector = class embedding + time embedding; class `num_classes` stands for no class.

    Args:
        num_classes: classes beside that one.
        cond_size: channels of the condition vector.
        num_times: T.

    >>> TimeConditioning(10, 4, num_times=1)(torch.tensor([10]), torch.rand(1, 1)).shape
    torch.Size([1, 4])
    """

    def __init__(self, num_classes: int, cond_size: int, *, num_times: int) -> None:
        super().__init__()
        self.label = nn.Embedding(num_classes + 1, cond_size)
        nn.init.normal_(self.label.weight, std=EMBEDDING_STD)
        self.time = TimeEmbedding(num_times, cond_size)

    def forward(self, label: Tensor, times: Tensor) -> Tensor:
        return self.label(label) + self.time(times)  # [B, cond]


class VelocityGenerator(ImageGenerator):
    """`ImageGenerator` whose transformer is a velocity field; a subclass's `forward` follows it from noise to images.

    So sampling, judging and pictures are the same code for all. It has no style slots.

    Args:
        architecture: keywords of `ImageGenerator`.
    """

    num_times: int  # of the field; a subclass says it

    def __init__(self, **architecture: Any) -> None:
        super().__init__(**architecture | {"num_styles": 0})
        cond_size = self.config["cond_size"]
        self.time_conditioning = TimeConditioning(self.num_classes, cond_size, num_times=self.num_times)
        del self.conditioning

    @property
    def no_class(self) -> int:
        """The label of no class."""
        return self.num_classes

    def velocity(self, z: Tensor, times: Tensor, label: Tensor) -> Tensor:
        """The field at z.

        Args:
            z: [B, C, H, W].
            times: of each, in [0, 1], [B, T].
            label: of each, `no_class` among them, integers [B].

        Returns:
            [B, C, H, W].
        """
        return self.transform(z, self.time_conditioning(label, times))


def drop_labels(label: Tensor, no_class: int, *, share: float, uniform: Tensor) -> Tensor:
    """Labels of which a share becomes no class: what classifier-free guidance is trained by (arXiv 2207.12598, Alg. 1).

    Args:
        label: [B].
        no_class: what stands for no class.
        share: probability.
        uniform: random numbers in [0, 1), [B].

    >>> drop_labels(torch.tensor([3, 4]), 10, share=0.1, uniform=torch.tensor([0.05, 0.5])).tolist()
    [10, 4]
    """
    return label.where(uniform >= share, no_class)


def logit_normal(normal: Tensor, *, mean: float, std: float) -> Tensor:
    """Times whose logit is normal (arXiv 2403.03206, section 3.1), of standard normal numbers of any shape.

    >>> logit_normal(torch.zeros(1), mean=0.0, std=1.0).item()
    0.5
    """
    return (mean + std * normal).sigmoid()


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The straight path from the sample at t = 0 to noise at t = 1: z_t = (1 - t) x + t ε.

    Source: conditional optimal transport, arXiv 2210.02747 Eq. 22 with σ_min = 0 and time running the other way, as in
    MeanFlow.

    Args:
        x, noise: [B, C, H, W].
        t: [B].

    >>> interpolate(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([0.25])).item()
    0.75
    """
    t = t[:, None, None, None]
    return (1 - t) * x + t * noise
