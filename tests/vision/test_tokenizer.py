"""The tokenizer against diffusers' own autoencoder, and against files that are not what they should be."""

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

from tests.vision.tiny_models import autoencoder
from vision.tokenizer import SD_VAE, SD_VAE_REVISION, SD_VAE_SHA256, VAE_WEIGHTS_FILE, Tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    autoencoder().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "vae"))


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 8, 12, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_moments_are_those_of_diffusers(saved: Path) -> None:
    images = pictures(3)
    with torch.no_grad():
        posterior = autoencoder().encode(images).latent_dist
    mean, std = Tokenizer.from_pretrained(saved).encode(images)
    assert mean.shape == std.shape == (3, 4, 4, 6)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)


def test_latents_are_scaled_samples_and_decoding_takes_the_scale_away(saved: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(saved)
    mean, std, noise = torch.randn(3, 2, 4, 4, 6).unbind()
    latents = tokenizer.to_latents(mean, std, noise)
    torch.testing.assert_close(latents, 0.18215 * mean + 0.18215 * std * noise)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode(latents), autoencoder().decode(mean + std * noise).sample)
    assert (tokenizer.scale, tokenizer.channels, tokenizer.downsampling) == (0.18215, 4, 2)


def test_microbatches_change_neither_moments_nor_images_nor_gradients(saved: Path) -> None:
    whole, parts = Tokenizer.from_pretrained(saved), Tokenizer.from_pretrained(saved, microbatch=2)
    images, weight = pictures(5), torch.randn(5, 3, 8, 12)
    for one, other in zip(whole.encode(images), parts.encode(images), strict=True):
        torch.testing.assert_close(one, other)
    results = []
    for tokenizer in (whole, parts):
        latents = torch.randn(5, 4, 4, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
        decoded = tokenizer.decode(latents)
        (gradient,) = torch.autograd.grad((decoded * weight).sum(), latents)
        results.append((decoded, gradient))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][1].abs().min() > 0


def test_gradient_of_decoding_is_a_directional_derivative(saved: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(saved).double()
    vae = tokenizer.vae
    latents, direction = torch.randn(2, 2, 4, 4, 6, dtype=torch.float64).unbind()
    latents.requires_grad_()
    (gradient,) = torch.autograd.grad(vae.decode(latents / tokenizer.scale).sample.sum(), latents)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (vae.decode((latents + s * direction) / tokenizer.scale).sample.sum() for s in (step, -step))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    single = tokenizer.float()
    latents32 = latents.detach().float().requires_grad_()
    (gradient32,) = torch.autograd.grad(single.decode(latents32).sum(), latents32)
    torch.testing.assert_close(gradient32, gradient.float(), rtol=1e-3, atol=1e-4)


def test_weights_are_frozen_and_stay_in_eval_mode(saved: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(saved).train()
    assert not tokenizer.training and not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_bfloat16_computes_coarsely_and_gives_float32(saved: Path) -> None:
    exact, coarse = Tokenizer.from_pretrained(saved), Tokenizer.from_pretrained(saved, bfloat16=True)
    images = pictures(2)
    for fine, rough in zip(exact.encode(images), coarse.encode(images), strict=True):
        assert rough.dtype == torch.float32
        assert 0 < (fine - rough).abs().max() < 0.05 * fine.abs().max()
    assert coarse.decode(torch.randn(1, 4, 2, 2)).dtype == torch.float32


def test_fingerprint_is_that_of_the_file(saved: Path) -> None:
    content = (saved / VAE_WEIGHTS_FILE).read_bytes()
    assert Tokenizer.from_pretrained(saved).fingerprint == hashlib.sha256(content).hexdigest()


def test_attention_weights_of_older_files_are_renamed(copied: Path) -> None:
    """stabilityai/sd-vae-ft-mse is such a file."""
    file = copied / VAE_WEIGHTS_FILE
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, weight in safetensors.torch.load_file(file).items():
        for new, older in names.items():
            name = name.replace(new, older)
        old[name] = weight
    assert any("query" in name for name in old)
    safetensors.torch.save_file(old, file)
    images = pictures(1)
    with torch.no_grad():
        torch.testing.assert_close(
            Tokenizer.from_pretrained(copied).encode(images).mean, autoencoder().encode(images).latent_dist.mean
        )


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "truncated"])
def test_weights_that_do_not_fit_are_refused(copied: Path, fault: str) -> None:
    file = copied / VAE_WEIGHTS_FILE
    weights = safetensors.torch.load_file(file)
    name = "encoder.conv_in.bias"
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        weights["other"] = torch.zeros(1)
    elif fault == "shape":
        weights[name] = torch.zeros(3)
    safetensors.torch.save_file(weights, file)
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=str(copied)) as error:
        Tokenizer.from_pretrained(copied)
    named = {"missing": name, "unexpected": "other", "shape": name, "truncated": VAE_WEIGHTS_FILE}
    assert named[fault] in str(error.value)


def test_an_autoencoder_that_shifts_its_latents_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    (copied / "config.json").write_text(json.dumps(config | {"shift_factor": 0.1}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"without shift_factor, found shift_factor = 0\.1"):
        Tokenizer.from_pretrained(copied)


@pytest.mark.parametrize("name", ["config.json", VAE_WEIGHTS_FILE])
def test_an_absent_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"found no {name}"):
        Tokenizer.from_pretrained(copied)


def test_what_is_neither_folder_nor_hub_id_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="no_such_folder: expected a hub id"):
        Tokenizer.from_pretrained("no_such_folder")


def test_without_network_the_message_says_what_to_provide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        Tokenizer.from_pretrained(SD_VAE)
    for word in (SD_VAE, "without a network", "a folder with config.json and " + VAE_WEIGHTS_FILE):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_the_pinned_autoencoder_must_have_its_known_hash(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    asked = []

    def snapshot_download(repo_id: str, *, revision: str | None, **_: object) -> str:
        asked.append((repo_id, revision))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=f"SHA-256 {SD_VAE_SHA256}, found"):
        Tokenizer.from_pretrained(SD_VAE)
    assert asked == [(SD_VAE, SD_VAE_REVISION)]
    assert Tokenizer.from_pretrained("someone/else").channels == 4


def test_wrong_shapes_are_refused(saved: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"multiples of 2, found \[1, 3, 8, 9\]"):
        tokenizer.encode(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match=r"expected \[B, 4, h, w\], found \[1, 3, 4, 4\]"):
        tokenizer.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="microbatch: expected at least 1, found 0"):
        Tokenizer.from_pretrained(saved, microbatch=0)
