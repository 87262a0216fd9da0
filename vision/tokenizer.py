"""The tokenizer: images to latents and back by a frozen variational autoencoder of diffusers."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from driftfield.training.pretrained import CONFIG_FILE
from vision.pretrained import HUB_ID
from vision.release import download

SD_VAE: Final = "stabilityai/sd-vae-ft-mse"  # latents of all of the paper's latent models
SD_VAE_REVISION: Final = "31f26fdeee1355a5c34592e401dd41e45d25a493"
SD_VAE_SHA256: Final = "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"  # of its 334,643,276 bytes
VAE_WEIGHTS_FILE: Final = "diffusion_pytorch_model.safetensors"


class Moments(NamedTuple):
    """Mean and standard deviation of the posterior of an image, each `[B, c, h, w]`, not scaled."""

    mean: Tensor
    std: Tensor


class Tokenizer(nn.Module):
    """A frozen autoencoder between images in [-1, 1] and latents of about unit variance.

    Args:
        vae: a diffusers AutoencoderKL; it is put in eval mode and takes no gradient.
        fingerprint: SHA-256 of the file of its weights.
        bfloat16: compute in bfloat16; weights and results stay float32.
        microbatch: images to encode or decode at once; bounds the memory, also of a decoding that is differentiated.

    Raises:
        ValueError: the autoencoder moves its latents by more than a factor.
    """

    def __init__(self, vae: Any, *, fingerprint: str = "", bfloat16: bool = False, microbatch: int = 16) -> None:
        super().__init__()
        if microbatch < 1:
            raise ValueError(f"microbatch: expected at least 1, found {microbatch}")
        for name in ("shift_factor", "latents_mean", "latents_std"):
            if vae.config.get(name) is not None:
                raise ValueError(f"expected an autoencoder without {name}, found {name} = {vae.config[name]}")
        self.vae: Any = vae.float().requires_grad_(False).eval()
        self.fingerprint = fingerprint
        self.use_bfloat16 = bfloat16
        self.microbatch = microbatch
        self.scale = float(vae.config["scaling_factor"])
        self.channels = int(vae.config["latent_channels"])
        self.downsampling = 2 ** (len(vae.config["block_out_channels"]) - 1)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = SD_VAE,
        *,
        revision: str | None = None,
        bfloat16: bool = False,
        microbatch: int = 16,
    ) -> Self:
        """Load an autoencoder from a folder or from a repository of the Hugging Face hub, onto the CPU.

        Args:
            source: folder with config.json and diffusion_pytorch_model.safetensors, or a hub id "owner/name".
            revision: commit, tag or branch of the hub repository; of SD_VAE one commit is the default, and its weights
                are checked against their known SHA-256.
            bfloat16, microbatch: as for the constructor.

        Raises:
            FileNotFoundError: neither a folder nor a hub id, a file is absent, or the hub can't be reached.
            ValueError: the files are damaged, or are no AutoencoderKL's.

        Returns:
            The tokenizer; every weight of the file is used and none of the autoencoder is left as it was.
        """
        folder = _folder_of(source, revision)
        for name in (CONFIG_FILE, VAE_WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: expected an autoencoder, {_LAYOUT}; found no {name}")
        with open(folder / VAE_WEIGHTS_FILE, "rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        if str(source) == SD_VAE and revision in (None, SD_VAE_REVISION) and fingerprint != SD_VAE_SHA256:
            raise ValueError(
                f"{folder / VAE_WEIGHTS_FILE}: expected the weights of {SD_VAE}, SHA-256 {SD_VAE_SHA256}, "
                f"found {fingerprint}"
            )
        try:
            return cls(_load_vae(folder), fingerprint=fingerprint, bfloat16=bfloat16, microbatch=microbatch)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """Moments of the posterior of each image.

        Args:
            images: `[B, 3, H, W]` in [-1, 1], H and W multiples of `downsampling`.

        Raises:
            ValueError: if the shape does not fit.

        Returns:
            Mean and standard deviation, each `[B, channels, H / downsampling, W / downsampling]` float32.
        """
        channels, factor = self.vae.config["in_channels"], self.downsampling
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images: expected [B, {channels}, H, W] with H and W multiples of {factor}, found {list(images.shape)}"
            )
        mean, log_variance = self._in_microbatches(self._encode, images).chunk(2, dim=1)
        return Moments(mean, (0.5 * log_variance.clamp(-30, 20)).exp())  # the bounds that the autoencoder knows

    def to_latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Scaled sample of the posterior, `(mean + std * noise) * scale`; zero noise gives its mode."""
        return (mean + std * noise) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents, differentiable with respect to them.

        Where a gradient is wanted, each microbatch is computed again on the way back, so that the activations of one
        microbatch at a time are in memory.

        Args:
            latents: `[B, channels, h, w]`.

        Raises:
            ValueError: if the shape does not fit.

        Returns:
            `[B, 3, h * downsampling, w * downsampling]` float32, in [-1, 1] up to the decoder's error.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents: expected [B, {self.channels}, h, w], found {list(latents.shape)}")
        return self._in_microbatches(self._decode, latents)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: the autoencoder is frozen."""
        return super().train(False)

    def _encode(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.use_bfloat16):
            return self.vae.encode(images).latent_dist.parameters.float()  # [b, 2c, h, w]

    def _decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=self.use_bfloat16):
            return self.vae.decode(latents / self.scale).sample.float()

    def _in_microbatches(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        parts = inputs.float().split(self.microbatch)
        if len(parts) > 1 and inputs.requires_grad and torch.is_grad_enabled():
            return torch.cat([checkpoint(function, part, use_reentrant=False) for part in parts])
        return torch.cat([function(part) for part in parts])


_LAYOUT: Final = f"that is a folder with {CONFIG_FILE} and {VAE_WEIGHTS_FILE} as diffusers writes them"


def _folder_of(source: str | os.PathLike[str], revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"tokenizer {source}: expected a hub id 'owner/name' or a folder; there is no such one")
    if str(source) == SD_VAE and revision is None:
        revision = SD_VAE_REVISION
    try:
        return download(str(source), [CONFIG_FILE, VAE_WEIGHTS_FILE], revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"tokenizer {error}; without a network, name a copy of it instead, {_LAYOUT}"
        ) from error


def _load_vae(folder: Path) -> Any:
    """The autoencoder of a folder; diffusers also renames the attention weights of older files."""
    from diffusers import AutoencoderKL  # takes seconds, and only latent models need it

    try:
        vae, report = AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"expected an AutoencoderKL of diffusers, found: {' '.join(str(error).split())}") from error
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise ValueError(f"the weights do not fit the {CONFIG_FILE}: {wrong}")
    return vae
