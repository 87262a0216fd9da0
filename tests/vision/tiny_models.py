"""Networks of the published kinds with random weights, small enough for a test."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from vision.generator import ImageGenerator

SIZE = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "cond_size": 16, "num_context_tokens": 1}


def generator(*, channels: int, num_classes: int = 5, image_size: int = 8) -> ImageGenerator:
    """A generator in which class, style and α change the image: adaLN-zero would hide them at the start."""
    torch.manual_seed(0)
    model = ImageGenerator(image_size=image_size, channels=channels, num_classes=num_classes, num_styles=3, **SIZE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def autoencoder() -> AutoencoderKL:
    """As stabilityai/sd-vae-ft-mse with two stages: latents of half the size."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
    ).eval()


def tiny_autoencoder() -> AutoencoderTiny:
    """As madebyollin/taesd with two stages: latents of half the size."""
    torch.manual_seed(2)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
