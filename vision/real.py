"""Real samples and the tokenizer as a configuration names them."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from driftfield.training import UserError
from vision.config import DataConfig
from vision.data import ImageSet, RealSamples, load, to_float
from vision.imagenet import ImageFolder
from vision.latents import LatentStore
from vision.tokenizer import Tokenizer


def load_real(config: DataConfig, tokenizer: Tokenizer | None = None) -> RealSamples:
    """The real training samples.

    Args:
        config: which, and where.
        tokenizer: the one whose latents a store of latents must hold.

    Raises:
        UserError: they are absent, damaged or not what they should be; the message names the place.
    """
    if config.name == "digits" or config.name == "fashion_mnist":
        return load(config.name, "train", data_dir=config.folder, download=config.download)
    if config.folder is None:
        raise UserError(f"data.folder: expected the folder of {config.name}, found null")
    memory_gib = config.memory_gib / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's, of this machine
    if config.name == "latents":
        return LatentStore(config.folder, tokenizer=tokenizer, workers=config.workers, memory_gib=memory_gib)
    return ImageFolder(
        config.folder,
        classes=config.classes,
        augmentation=config.augmentation,
        image_size=config.image_size,
        workers=config.workers,
        memory_gib=memory_gib,
        max_unreadable=config.max_unreadable,
    )


def unreadable_images(real: RealSamples) -> list[str]:
    """Files of a folder of images that this process found unreadable, each replaced by the next of its class."""
    return real.unreadable if isinstance(real, ImageFolder) else []


def load_tokenizer(source: str | None, device: torch.device, *, bfloat16: bool = False) -> Tokenizer | None:
    """The tokenizer of latents, frozen, on the device; None where pixels are generated.

    Raises:
        UserError: its weights are absent or are not those of an autoencoder.
    """
    try:
        return None if source is None else Tokenizer.from_pretrained(source, bfloat16=bfloat16).to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error


class Reader:
    """Read real samples in the background, one piece ahead of the device.

    Args:
        real: the samples.
        seed: of what differs between visits.
        device: where they are wanted.

    >>> reader = Reader(load("digits", "test"), 0, torch.device("cpu"))
    >>> [samples.shape[0] for samples in reader([torch.tensor([1, 2]), torch.tensor([3])])]
    [2, 1]
    """

    def __init__(self, real: RealSamples, seed: int, device: torch.device) -> None:
        self._real, self._seed, self._device = real, seed, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="real")

    def __call__(self, visits: Sequence[Tensor]) -> Iterator[Tensor]:
        """Samples `[k, C, H, W]` of each tensor of visits `[k]`, float32 on the device."""
        for samples in self._read_ahead(visits):
            samples = samples.to(self._device, non_blocking=True)
            yield to_float(samples) if samples.dtype == torch.uint8 else samples

    def _read_ahead(self, visits: Sequence[Tensor]) -> Iterator[Tensor]:
        if isinstance(self._real, ImageSet):
            # Nothing to wait for. And where a second thread uses OpenMP, GNU's no longer lets idle threads spin, since
            # there are then more of them than cores: small operations take twice as long.
            yield from map(self._read, visits)
            return
        ahead = self._thread.submit(self._read, visits[0])
        for following in visits[1:]:
            samples, ahead = ahead.result(), self._thread.submit(self._read, following)
            yield samples
        yield ahead.result()

    def _read(self, visits: Tensor) -> Tensor:
        """In memory from which a GPU copies by itself; images as bytes."""
        read = self._real.read_bytes if isinstance(self._real, ImageFolder) else self._real.read
        samples = read(visits, seed=self._seed)
        return samples.pin_memory() if self._device.type == "cuda" else samples
