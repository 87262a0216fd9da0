"""Images as rows of square patches, and back."""

import math

from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches, row by row; inside a patch rows, then columns, then channels.

    Args:
        images: [B, C, H, W], H and W multiples of the patch size p.
        patch_size: p.

    Returns:
        [B, (H/p) * (W/p), p * p * C].

    >>> import torch
    >>> patchify(torch.arange(4.0).reshape(1, 1, 2, 2), 1).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Put the patches of square images together again: the inverse of `patchify`.

    Args:
        patches: [B, N, p * p * C] with N a square number.
        patch_size: p.

    Returns:
        [B, C, p * sqrt(N), p * sqrt(N)].

    >>> import torch
    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.equal(unpatchify(patchify(x, 4), 4), x)
    True
    """
    grid_size = math.isqrt(patches.shape[1])
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid_size, p=patch_size, q=patch_size)
