"""A generator with its decoder as one object to call: `DriftingPipeline`, where diffusers has `DiTPipeline`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from driftfield.training.atomic_file import write_json
from driftfield.training.pretrained import CONFIG_FILE, WEIGHTS_FILE
from vision.class_names import CLASS_NAMES_FILE, class_names, label_ids
from vision.data import to_uint8
from vision.generator import ImageGenerator
from vision.pretrained import HUB_ID
from vision.release import download
from vision.sample import BATCH_SIZE, VAE_FOLDER, require_decoder, sample
from vision.tiny_decoder import TinyDecoder
from vision.tokenizer import Tokenizer

OutputType = Literal["pil", "pt", "np"]


class PipelineOutput(NamedTuple):
    """What a call returns.

    `images` is a list of pictures ("pil"), or numbers in [0, 1]: a tensor `[B, C, H, W]` ("pt") or an array
    `[B, H, W, C]` ("np"), both float32 on the CPU.
    """

    images: list[Image.Image] | Tensor | np.ndarray


class DriftingPipeline:
    """From classes to images in one pass of the generator (and one of the decoder, where it makes latents).

    It is called as diffusers' `DiTPipeline` is, and is no `DiffusionPipeline`: that one saves and loads only parts
    derived from classes of diffusers or transformers, and a generator of pixels needs neither.

    Args:
        generator: makes pixels or latents.
        tokenizer: decodes latents; None for pixels.
        class_names: one text per class, several names of a class separated by commas.

    Raises:
        ValueError: generator, tokenizer and names do not fit each other.

    >>> generator = ImageGenerator(image_size=8, channels=1, patch_size=2, hidden_size=16, depth=1, num_heads=2,
    ...                            cond_size=16, num_classes=2)
    >>> pipeline = DriftingPipeline(generator, class_names=["cat, tomcat", "dog"]).to("cpu")
    >>> output = pipeline(class_labels=pipeline.get_label_ids(["dog", "tomcat"]), guidance_scale=1.5, generator=0)
    >>> [image.size for image in output.images]
    [(8, 8), (8, 8)]
    """

    def __init__(
        self,
        generator: ImageGenerator,
        tokenizer: Tokenizer | TinyDecoder | None = None,
        *,
        class_names: Sequence[str] | None = None,
    ) -> None:
        require_decoder(generator, tokenizer)
        if class_names is not None and len(class_names) != generator.num_classes:
            raise ValueError(
                f"class_names: expected the generator's {generator.num_classes}, found {len(class_names)} names"
            )
        self.generator, self.tokenizer = generator, tokenizer
        self.class_names = None if class_names is None else tuple(class_names)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        tokenizer: Tokenizer | TinyDecoder | str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
    ) -> Self:
        """Load a pipeline that `save_pretrained` wrote, or a generator alone, onto the CPU.

        Args:
            source: folder, hub id "owner/name", or what else `ImageGenerator.from_pretrained` takes.
            tokenizer: what decodes latents: itself, or the folder or hub id of an AutoencoderKL, such as SD_VAE; if
                None, the one in `source`, if it has one.
            revision: commit, tag or branch of the hub repository `source`.

        Raises:
            FileNotFoundError: a folder or file is absent.
            ValueError: files are damaged, or do not fit each other; or a generator of latents has no tokenizer.
        """
        folder = _with_all_parts(source, revision)
        generator = ImageGenerator.from_pretrained(folder, revision=revision)
        if tokenizer is None and (Path(folder) / VAE_FOLDER).is_dir():
            tokenizer = Path(folder) / VAE_FOLDER
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = Tokenizer.from_pretrained(tokenizer)
        return cls(generator, tokenizer, class_names=class_names(folder, generator.num_classes))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write everything into a folder, which is also a generator's: `python -m vision.sample model=FOLDER` takes it.

        Args:
            folder: made if it does not exist; gets `vae/` and class_names.json where there are such, config.json last.

        Raises:
            ValueError: the decoder is a `TinyDecoder`, which has no encoder to save.
            OSError: if the disk refuses.
        """
        if isinstance(self.tokenizer, TinyDecoder):
            raise ValueError("tokenizer: expected one that can be saved, found a decoder without its encoder")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.vae.save_pretrained(folder / VAE_FOLDER)
        if self.class_names is not None:
            write_json(folder / CLASS_NAMES_FILE, self.class_names)
        self.generator.save_pretrained(folder)

    def to(self, device: torch.device | str) -> Self:
        """Move generator and decoder to a device."""
        self.generator.to(device)
        if self.tokenizer is not None:
            self.tokenizer.to(device)
        return self

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The classes that have these names.

        Args:
            label: a name or several; case does not matter.

        Raises:
            ValueError: the names of the classes are not known, or no class or more than one has a name.
        """
        if self.class_names is None:
            raise ValueError(f"the names of the generator's {self.generator.num_classes} classes are not known")
        return label_ids(self.class_names, [label] if isinstance(label, str) else label)

    def __call__(
        self,
        class_labels: int | Sequence[int],
        *,
        guidance_scale: float = 1.0,
        generator: torch.Generator | int | None = None,
        output_type: OutputType = "pil",
        batch_size: int = BATCH_SIZE,
        bfloat16: bool = False,
    ) -> PipelineOutput:
        """One image of each class named.

        Args:
            class_labels: class of each image.
            guidance_scale: α >= 1; it costs no second pass.
            generator: chooses the images: a seed, with which image i is sample i of `python -m vision.sample`, or a
                source of one; None draws from PyTorch's own.
            output_type: "pil", "pt" or "np", see `PipelineOutput`.
            batch_size: how many to make at once.
            bfloat16: the generator's activations in bfloat16.

        Raises:
            ValueError: an argument is not as stated, or a picture is not finite.
        """
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type: expected one of {', '.join(get_args(OutputType))}, found {output_type!r}")
        images = sample(
            self.generator,
            torch.as_tensor(class_labels).reshape(-1),
            guidance_scale=guidance_scale,
            seed=_seed(generator),
            batch_size=batch_size,
            tokenizer=self.tokenizer,
            bfloat16=bfloat16,
        )
        return PipelineOutput(_as(output_type, images))


def _with_all_parts(source: str | os.PathLike[str], revision: str | None) -> str | os.PathLike[str]:
    """The source, or the folder of a hub repository with everything that `save_pretrained` writes."""
    if Path(source).is_dir() or not HUB_ID.fullmatch(str(source)):
        return source
    return download(str(source), [CONFIG_FILE, WEIGHTS_FILE, CLASS_NAMES_FILE, f"{VAE_FOLDER}/*"], revision=revision)


def _seed(generator: torch.Generator | int | None) -> int:
    if isinstance(generator, int):
        return generator
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _as(output_type: OutputType, images: Tensor) -> Any:
    if output_type == "pil":
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()  # [B, H, W, C]
        return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
    levels = (images.clamp(-1, 1) + 1) / 2
    return levels if output_type == "pt" else levels.permute(0, 2, 3, 1).numpy()
