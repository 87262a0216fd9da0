"""Features of real samples, computed once where they stay the same and fit in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from vision.data import ImageSet, RealSamples
from vision.features import group_by_label
from vision.real import Reader

BATCH_SIZE: Final = 500  # images encoded at once when all are


class RealFeatures:
    """Features of real samples by their visit.

    An `ImageSet` looks the same at every visit, so its features do: they are computed once if all of them fit into
    `memory_mib`, and at every use otherwise.

    Args:
        real: the samples.
        encode: samples `[B, C, H, W]` on `device` to features `[B, locations, channels]` by name.
        device: where to compute and to keep them.
        seed: of what differs between visits.
        memory_mib: largest size of all features together, in MiB.

    >>> from vision.data import load
    >>> digits = load("digits", "test")
    >>> pixels = lambda x: {"global": x.flatten(1)[:, None]}
    >>> features = RealFeatures(digits, pixels, torch.device("cpu"), seed=0, memory_mib=1)
    >>> [part["global"].shape for part in features([torch.tensor([[0, 1, 2], [3, 2, 1]])])]
    [torch.Size([2, 1, 3, 64])]
    """

    def __init__(
        self,
        real: RealSamples,
        encode: Callable[[Tensor], Mapping[str, Tensor]],
        device: torch.device,
        *,
        seed: int,
        memory_mib: int,
    ) -> None:
        self._encode, self._device, self._count = encode, device, len(real)
        self._read = Reader(real, seed, device)
        self._kept: dict[str, Tensor] | None = None
        if isinstance(real, ImageSet):
            one_sample = sum(feature.nbytes for part in self._compute([torch.tensor([0])]) for feature in part.values())
            if one_sample * len(real) <= memory_mib * 2**20:
                parts = list(self._compute(torch.arange(len(real)).split(BATCH_SIZE)))
                self._kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __call__(self, visits: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        """Features of each tensor of visits `[L, K]`, as groups `[L, locations, K, channels]` by name, one by one."""
        flat = [piece.flatten() for piece in visits]
        features = self._compute(flat) if self._kept is None else map(self._look_up, flat)
        for piece, found in zip(visits, features, strict=True):
            yield group_by_label(found, len(piece))

    def _look_up(self, visits: Tensor) -> dict[str, Tensor]:
        ids = (visits % self._count).to(self._device)
        return {name: feature[ids] for name, feature in (self._kept or {}).items()}

    def _compute(self, visits: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        for samples in self._read(visits):
            with torch.no_grad():
                features = dict(self._encode(samples))
            yield features
