"""Images as rows of square patches, and back."""

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
    grid = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # [B, C, h, p, w, p]
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


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
    grid_size = round(patches.shape[1] ** 0.5)
    grid = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (grid_size, grid_size))  # [B, h, w, p, p, C]
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
