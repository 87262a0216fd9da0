"""A small decoder in the place of the VAE's: a fortieth of its parameters, and less fine detail."""

import os
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny  # diffusers takes seconds to import


class TinyDecoder(nn.Module):
    """The decoder of diffusers' `AutoencoderTiny`, frozen, for the same latents as the VAE that it was distilled from.

    Args:
        autoencoder: its encoder is left out.
        bfloat16: compute in bfloat16; weights and results stay float32.
    """

    def __init__(self, autoencoder: "AutoencoderTiny", *, bfloat16: bool = False) -> None:
        super().__init__()
        untyped = cast(Any, autoencoder)
        config = untyped.config
        self._bfloat16 = bfloat16
        self.decoder = untyped.decoder.eval().requires_grad_(False)
        self.scale = float(config["scaling_factor"])  # 1 in the published ones: they take scaled latents
        self.channels = int(config["latent_channels"])

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, revision: str | None = None, bfloat16: bool = False
    ) -> Self:
        """Load it from a folder or from a repository of the Hugging Face hub, on the CPU.

        Args:
            source: folder with config.json and diffusion_pytorch_model.safetensors, or a hub id such as
                "madebyollin/taesd".
            revision: commit, tag or branch of the hub repository.
            bfloat16: as for the constructor.

        Raises:
            ValueError: it cannot be loaded from there.
        """
        from diffusers import AutoencoderTiny

        try:
            autoencoder, report = AutoencoderTiny.from_pretrained(
                str(source),
                revision=revision,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            found = " ".join(str(error).split())
            raise ValueError(f"{source}: expected diffusers' AutoencoderTiny, found: {found}") from error
        if wrong := {kind: names for kind, names in report.items() if names}:
            raise ValueError(f"{source}: the weights do not fit the config.json: {wrong}")
        return cls(autoencoder, bfloat16=bfloat16)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents: scaled as the generator makes them, `[B, channels, h, w]`.

        Returns:
            Images in [-1, 1] up to the decoder's error, `[B, 3, 8 h, 8 w]` with the published weights.

        >>> from diffusers import AutoencoderTiny
        >>> tiny = TinyDecoder(AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        ...     num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))
        >>> tiny.decode(torch.zeros(2, 4, 4, 4)).shape
        torch.Size([2, 3, 8, 8])
        """
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            images: Tensor = self.decoder(latents / self.scale)
        return images.float()
