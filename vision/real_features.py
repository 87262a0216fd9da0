"""Features of real images, computed once where they fit in memory."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from vision.data import to_float
from vision.features import group_by_label

BATCH_SIZE: Final = 500  # images encoded at once


class RealFeatures:
    """Features of real images by their position in the data set.

    Images and encoder are the same at every step, so their features are too: they are computed once if all of them
    fit into `memory_mib`, and at every use otherwise.

    Args:
        images: uint8 `[n, C, H, W]`.
        encode: float images `[B, C, H, W]` on `device` to features `[B, locations, channels]` by name.
        device: where to compute and to keep them.
        memory_mib: largest size of all features together, in MiB.

    >>> images = torch.arange(8, dtype=torch.uint8).reshape(4, 1, 1, 2)
    >>> features = RealFeatures(images, lambda x: {"global": x.flatten(1)[:, None]}, torch.device("cpu"), memory_mib=1)
    >>> features(torch.tensor([[0, 1, 2], [3, 2, 1]]))["global"].shape
    torch.Size([2, 1, 3, 2])
    """

    def __init__(
        self,
        images: Tensor,
        encode: Callable[[Tensor], Mapping[str, Tensor]],
        device: torch.device,
        *,
        memory_mib: int,
    ) -> None:
        self._images, self._encode, self._device = images, encode, device
        one_image = sum(feature.nbytes for feature in self._compute(torch.zeros(1, dtype=torch.int64)).values())
        self._kept: dict[str, Tensor] | None = None
        if one_image * len(images) <= memory_mib * 2**20:
            parts = [self._compute(ids) for ids in torch.arange(len(images)).split(BATCH_SIZE)]
            self._kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> dict[str, Tensor]:
        """Features of the images at positions `[L, K]`, as groups `[L, locations, K, channels]` by name."""
        flat = ids.flatten()
        if self._kept is None:
            features = self._compute(flat)
        else:
            flat = flat.to(self._device)
            features = {name: feature[flat] for name, feature in self._kept.items()}
        return group_by_label(features, len(ids))

    @torch.no_grad()
    def _compute(self, ids: Tensor) -> dict[str, Tensor]:
        return dict(self._encode(to_float(self._images[ids]).to(self._device, non_blocking=True)))
