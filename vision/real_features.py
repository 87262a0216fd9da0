"""Features of real samples, computed once where they stay the same and fit in memory."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor

from vision.data import ImageSet, RealSamples
from vision.features import group_by_label

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
    >>> features(torch.tensor([[0, 1, 2], [3, 2, 1]]))["global"].shape
    torch.Size([2, 1, 3, 64])
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
        self._real, self._encode, self._device, self._seed = real, encode, device, seed
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="real")
        self._reads: dict[int, Future[Tensor]] = {}  # by id of the visits they are of
        self._kept: dict[str, Tensor] | None = None
        if isinstance(real, ImageSet):
            one_sample = sum(
                feature.nbytes for feature in self._features(self._read(torch.zeros(1, dtype=torch.int64))).values()
            )
            if one_sample * len(real) <= memory_mib * 2**20:
                parts = [self._features(self._read(ids)) for ids in torch.arange(len(real)).split(BATCH_SIZE)]
                self._kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def prefetch(self, visits: Tensor) -> None:
        """Begin to read these visits, while the device computes; the next call with this very tensor takes them."""
        if self._kept is None:
            self._reads[id(visits)] = self._reader.submit(self._read, visits.flatten())

    @torch.no_grad()
    def __call__(self, visits: Tensor) -> dict[str, Tensor]:
        """Features of visits `[L, K]`, as groups `[L, locations, K, channels]` by name."""
        flat = visits.flatten()
        if self._kept is None:
            if id(visits) not in self._reads:
                self.prefetch(visits)
            features = self._features(self._reads.pop(id(visits)).result())
        else:
            ids = (flat % len(self._real)).to(self._device)
            features = {name: feature[ids] for name, feature in self._kept.items()}
        return group_by_label(features, len(visits))

    def _read(self, visits: Tensor) -> Tensor:
        return self._real.read(visits, seed=self._seed)

    @torch.no_grad()
    def _features(self, samples: Tensor) -> dict[str, Tensor]:
        return dict(self._encode(samples.to(self._device, non_blocking=True)))
