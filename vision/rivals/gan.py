"""A generative adversarial network: non-saturating losses (arXiv 1406.2661) and the R1 penalty (arXiv 1801.04406)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vision.conditioning import EMBEDDING_STD
from vision.generator import sincos_positions
from vision.patches import patchify
from vision.transformer import RMSNorm, TransformerBlock, rotary_table


class PenalisedLogits(NamedTuple):
    """Logits of images and the squared length of their gradient by the image, both [B] and with gradient."""

    logits: Tensor
    squared_gradient: Tensor


class Discriminator(nn.Module):
    """How real an image of a class is: the generator's transformer the other way, from patches to one logit.

    The class modulates the blocks, and is projected onto the mean token φ: logit = w·φ + e(class)·φ (arXiv 1802.05637,
    section 3).

    Args:
        image_size: height and width of the images.
        channels: of the images.
        patch_size: height and width of the patch behind one token.
        hidden_size: channels of a token.
        depth: number of blocks.
        num_heads: attention heads.
        cond_size: channels of the condition vector.
        num_classes: number of class labels.

    >>> discriminator = Discriminator(image_size=8, channels=1, patch_size=4, hidden_size=16, depth=1, num_heads=2,
    ...                               cond_size=8, num_classes=10)
    >>> discriminator(torch.randn(2, 1, 8, 8), torch.tensor([0, 9])).shape
    torch.Size([2])
    """

    rotary: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        cond_size: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        grid_size = image_size // patch_size
        self.patch_embedding = nn.Linear(patch_size * patch_size * channels, hidden_size)
        self.position = nn.Parameter(sincos_positions(grid_size, hidden_size))  # [N, hidden]
        self.label = nn.Embedding(num_classes, cond_size)
        self.blocks = nn.ModuleList(TransformerBlock(hidden_size, num_heads, cond_size=cond_size) for _ in range(depth))
        self.norm = RMSNorm(hidden_size)
        self.projection = nn.Embedding(num_classes, hidden_size)
        self.logit = nn.Linear(hidden_size, 1)
        self.register_buffer("rotary", rotary_table(grid_size * grid_size, hidden_size // num_heads), persistent=False)
        for embedding in (self.label, self.projection):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
        for layer in (self.patch_embedding, self.logit):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        """Logits [B] of images [B, C, H, W] of classes [B]."""
        tokens = self.patch_embedding(patchify(images, self.patch_size)) + self.position  # [B, N, hidden]
        condition = self.label(label)  # [B, cond]
        for block in self.blocks:
            tokens = block(tokens, condition, self.rotary)
        pooled = self.norm(tokens).mean(1)  # φ  [B, hidden]
        return self.logit(pooled).squeeze(1) + (self.projection(label) * pooled).sum(1)


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """-log σ(D(real)) - log(1 - σ(D(generated))) of each pair, of logits [B] (arXiv 1406.2661, Eq. 1).

    >>> round(discriminator_loss(torch.zeros(1), torch.zeros(1)).item(), 3)
    1.386
    """
    return functional.softplus(-real) + functional.softplus(generated)


def generator_loss(generated: Tensor) -> Tensor:
    """-log σ(D(generated)) of each sample, of logits [B]: the non-saturating loss (arXiv 1406.2661, section 3).

    >>> round(generator_loss(torch.zeros(1)).item(), 3)
    0.693
    """
    return functional.softplus(-generated)


def penalised_logits(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> PenalisedLogits:
    """D(x) and || ∇D(x) ||² at each image, whose mean over real ones times γ/2 is R1 (arXiv 1801.04406, Eq. 9).

    Args:
        discriminator: logits [B] of images.
        images: [B, C, H, W].

    >>> penalised_logits(lambda images: 3 * images.sum((1, 2, 3)), torch.ones(1, 1, 1, 2)).squared_gradient.item()
    18.0
    """
    images = images.detach().requires_grad_()
    # Of the attention's kernels only the plain one has a second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        logits = discriminator(images)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return PenalisedLogits(logits, gradient.square().sum((1, 2, 3)))
