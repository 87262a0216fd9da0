"""Real samples and the tokenizer as a configuration names them."""

import torch

from driftfield.training import UserError
from vision.config import DataConfig
from vision.data import RealSamples, load
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
    if config.name == "latents":
        return LatentStore(config.folder, tokenizer=tokenizer, workers=config.workers)
    return ImageFolder(
        config.folder,
        classes=config.classes,
        augmentation=config.augmentation,
        image_size=config.image_size,
        workers=config.workers,
        memory_gib=config.memory_gib,
    )


def load_tokenizer(source: str | None, device: torch.device, *, bfloat16: bool = False) -> Tokenizer | None:
    """The tokenizer of latents, frozen, on the device; None where pixels are generated.

    Raises:
        UserError: its weights are absent or are not those of an autoencoder.
    """
    try:
        return None if source is None else Tokenizer.from_pretrained(source, bfloat16=bfloat16).to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
