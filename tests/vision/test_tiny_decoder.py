"""The tiny decoder is the decoder of the file, on latents as the generator makes them."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from tests.vision.tiny_models import autoencoder, tiny_autoencoder
from vision.tiny_decoder import TinyDecoder


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_it_decodes_as_diffusers_does(scale: float, tmp_path: Path) -> None:
    whole = tiny_autoencoder()
    whole.register_to_config(scaling_factor=scale)
    whole.save_pretrained(tmp_path)
    decoder = TinyDecoder.from_pretrained(tmp_path)
    latents = torch.randn(3, 4, 8, 8)
    expected = AutoencoderTiny.from_pretrained(tmp_path).decode(latents / scale).sample
    assert decoder.channels == 4 and expected.shape == (3, 3, 16, 16)
    torch.testing.assert_close(decoder.decode(latents), expected)


def test_bfloat16_is_near_and_returns_float32() -> None:
    latents = torch.randn(3, 4, 8, 8)
    exact, rounded = (TinyDecoder(tiny_autoencoder(), bfloat16=on).decode(latents) for on in (False, True))
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_it_is_frozen() -> None:
    decoder = TinyDecoder(tiny_autoencoder())
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected diffusers' AutoencoderTiny"):
        TinyDecoder.from_pretrained(tmp_path / "absent")
    autoencoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        TinyDecoder.from_pretrained(tmp_path)
