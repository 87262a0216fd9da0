"""Figures of a generator in Inception's features: samples are streamed, not held, and divided among processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from driftfield.training import UserError
from driftfield.training.atomic_file import TEMPORARY_PREFIX
from driftfield.training.distributed import barrier, is_main, rank, world_size
from vision.fid import (
    PROTOCOLS,
    ProtocolName,
    RealImages,
    Reference,
    StreamedGaussian,
    StreamedInceptionScore,
    gather_rows,
    kernel_distance,
    sample_labels,
)
from vision.generator import ImageGenerator
from vision.inception import InceptionOutput
from vision.metrics import Gaussian, frechet_between, precision_recall
from vision.npz import read_npz_rows
from vision.sample import Decoder, images_in_batches
from vision.sample_files import NpzFile


class FeatureNetwork(Protocol):
    """`vision.inception.Inception`, or what stands for it in a test."""

    num_features: int
    num_logits: int
    num_spatial: int

    def __call__(self, images: Tensor) -> InceptionOutput:
        """Features, logits, spatial features `[B, num_...]` of uint8 images `[B, 3, H, W]`."""
        ...


class Figures(NamedTuple):
    """What is measured of one generator at one guidance scale; None where what it is compared with is not given.

    That is spatial statistics of the reference for sFID, and real images for what follows the Inception Score.
    """

    fid: float
    sfid: float | None
    inception_score: float
    inception_score_std: float
    precision: float | None
    recall: float | None
    kid: float | None
    kid_std: float | None
    kid_subset_size: int | None
    num: int
    num_real_images: int | None


class Measurement:
    """What generators are measured with, and how many of their samples; every process of a group makes the same one.

    Args:
        network: on the device to compute on.
        reference: statistics of the protocol.
        protocol: decides the labels.
        num: samples in all, of all processes.
        seed: of noise, style and random labels.
        batch_size: images at once in each process.
        device: where to compute.
        real_images: for precision, recall and KID, which hold the features of all samples; None leaves them out.

    Raises:
        UserError: there are fewer samples or real images than processes.
        ValueError: the file of real images is damaged.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        reference: Reference,
        *,
        protocol: ProtocolName,
        num: int,
        seed: int,
        batch_size: int,
        device: torch.device,
        real_images: RealImages | None = None,
    ) -> None:
        self.num, self.seed, self.batch_size, self.device = num, seed, batch_size, device
        self.label_rule = PROTOCOLS[protocol].labels
        self._network = network
        self._reference = Gaussian(*(part.to(device) for part in reference.gaussian))
        self._spatial_reference = reference.spatial and Gaussian(*(part.to(device) for part in reference.spatial))
        self._share = process_share(num)
        self._real_features = None if real_images is None else self._features_of(real_images)

    @torch.no_grad()
    def __call__(
        self,
        generator: ImageGenerator,
        *,
        guidance_scale: float,
        tokenizer: Decoder | None = None,
        bfloat16: bool = False,
        save_as: Path | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Figures:
        """Sample and measure, this process its share; every process returns the figures of all samples.

        Args:
            generator: on the device.
            guidance_scale: α.
            tokenizer: decodes latents; None for a generator of pixels.
            bfloat16: activations of generator and tokenizer in bfloat16.
            save_as: npz to write the samples to, as ADM's evaluator reads them.
            progress: called with the size of each finished batch.

        Raises:
            ValueError: generator, tokenizer and network do not fit each other, or a sample is not finite.
            OSError: the samples cannot be written.
        """
        gaussian = StreamedGaussian(self._network.num_features, device=self.device)
        spatial_gaussian = StreamedGaussian(self._network.num_spatial, device=self.device)
        score = StreamedInceptionScore(self.num, num_logits=self._network.num_logits, device=self.device)
        kept: list[Tensor] = []
        index = self._share.start
        batches = images_in_batches(
            generator,
            self._labels(generator, self._share),
            guidance_scale=guidance_scale,
            seed=self.seed,
            first_index=index,
            batch_size=self.batch_size,
            tokenizer=tokenizer,
            bfloat16=bfloat16,
            rounding="down",
        )
        with _sample_file(save_as, lambda: self._labels(generator, range(self.num))) as save:
            for images in batches:
                features, logits, spatial = self._network(images.to(self.device))
                gaussian.update(features)
                if self._spatial_reference is not None:
                    spatial_gaussian.update(spatial)
                score.update(logits, first_index=index)
                if self._real_features is not None:
                    kept.append(features)
                save(images)
                index += len(images)
                progress(len(images))
        gaussian.reduce()
        score.reduce()
        fid, sfid = frechet_between(gaussian.gaussian(), self._reference), None
        if self._spatial_reference is not None:
            spatial_gaussian.reduce()
            sfid = frechet_between(spatial_gaussian.gaussian(), self._spatial_reference)
        mean, std = score.score()
        if self._real_features is None:
            return Figures(fid, sfid, mean, std, None, None, None, None, None, self.num, None)
        features = gather_rows(torch.cat(kept))
        precision, recall = precision_recall(self._real_features, features)
        kid, kid_std, subset_size = kernel_distance(self._real_features, features)
        num_real = len(self._real_features)
        return Figures(fid, sfid, mean, std, precision, recall, kid, kid_std, subset_size, self.num, num_real)

    def _labels(self, generator: ImageGenerator, indices: range) -> Tensor:
        return sample_labels(self.label_rule, indices, num_classes=generator.num_classes, seed=self.seed)

    @torch.no_grad()
    def _features_of(self, images: RealImages) -> Tensor:
        """Features `[images.num, F]`, computed by all processes together."""
        rows = read_npz_rows(images.path, "arr_0", rows=process_share(images.num), at_once=self.batch_size)
        parts = [self._network(torch.tensor(part).permute(0, 3, 1, 2).to(self.device)).features for part in rows]
        return gather_rows(torch.cat(parts))


def process_share(num: int) -> range:
    """The indices of `num` things that belong to this process; shares differ by one at most.

    Raises:
        UserError: there are fewer than processes.

    >>> process_share(5)
    range(0, 5)
    """
    if num < world_size():
        raise UserError(f"expected at least one image for each of {world_size()} processes, found {num}")
    return range(num * rank() // world_size(), num * (rank() + 1) // world_size())


@contextmanager
def _sample_file(path: Path | None, labels: Callable[[], Tensor]) -> Iterator[Callable[[Tensor], object]]:
    """A function that writes this process's images `[b, C, H, W]`; at the end process 0 has joined those of all."""
    if path is None:
        yield lambda images: None
        return
    parts = [path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{number}") for number in range(world_size())]
    if not is_main():
        with open(parts[rank()], "wb") as file:
            yield lambda images: file.write(images.contiguous().numpy().data)
        barrier()
        return
    with NpzFile(path, labels()) as whole:
        shapes: list[tuple[int, ...]] = []

        def write(images: Tensor) -> None:
            shapes[:] = [tuple(images.shape[1:])]
            whole.write(images)

        yield write
        barrier()  # the other parts are whole
        for part in parts[1:]:
            for images in _raw_images(part, *shapes):
                whole.write(images)
            part.unlink()


def _raw_images(path: Path, shape: tuple[int, ...], *, at_once: int = 256) -> Iterator[Tensor]:
    """Images `[b, *shape]` of a file of their bytes."""
    with open(path, "rb") as file:
        while content := file.read(at_once * torch.Size(shape).numel()):
            yield torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, *shape)
