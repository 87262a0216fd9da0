"""The step of `vision.train_mae`: the classifier's share, what is compiled and how often, latents of images."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from driftfield.training import load_config
from tests.vision.tiny_models import autoencoder
from vision import train_mae
from vision.config import CONFIG_DIR, EncoderConfig, TrainConfig
from vision.data import ImageSet, load
from vision.tokenizer import Tokenizer
from vision.train_mae import MAETraining

STEPS = 10  # more than torch.compile compiles one function


@pytest.fixture
def config() -> EncoderConfig:
    """Two steps without the classifier; then its share of the loss rises at every step."""
    words = [
        "encoder.base_channels=4", "encoder.batch_size=6", f"encoder.images={6 * STEPS}",
        f"encoder.classifier_images={6 * (STEPS - 2)}", f"encoder.classifier_warmup_images={6 * STEPS}",
        "encoder.classifier_weight=0.5",
    ]  # fmt: skip
    return load_config(TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=words).encoder


def losses(config: EncoderConfig, *, compile: bool) -> list[float]:
    training = MAETraining(config, load("digits", "train"), torch.device("cpu"), compile=compile)
    return [float(training.step()["loss"]) for _ in range(STEPS)]


def test_rising_share_of_the_classifier_is_compiled_once(
    config: EncoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, counter = losses(config, compile=False), CompileCounter()
    monkeypatch.setattr(train_mae.torch, "compile", functools.partial(torch.compile, backend=counter))
    assert losses(config, compile=True) == pytest.approx(expected, rel=1e-5)
    assert counter.frame_count == 2  # without the classifier, and with it


def test_share_of_the_classifier_rises_over_the_last_images(config: EncoderConfig) -> None:
    """A.3: none before the last images, then linearly up to its weight, which it keeps."""
    config.images, config.batch_size = 6000, 6
    config.classifier_images, config.classifier_weight, config.classifier_warmup_images = 1800, 0.1, 600
    training = MAETraining(config, load("digits", "train"), torch.device("cpu"))
    for step, share in {0: 0, 699: 0, 700: 0.001, 749: 0.05, 774: 0.075, 799: 0.1, 800: 0.1, 999: 0.1}.items():
        training.step_number = step
        assert training._classification_weight() == pytest.approx(share), step


def test_latents_are_drawn_from_the_posterior_at_each_visit(config: EncoderConfig) -> None:
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    real = ImageSet(images, torch.zeros(4, dtype=torch.int64), ("all",), "noise", "train")
    tokenizer = Tokenizer(autoencoder())
    training = MAETraining(config, real, torch.device("cpu"), tokenizer=tokenizer)
    visits = 2 + 4 * torch.arange(200)  # of the third image
    latents = training.read(visits)
    mean, std = tokenizer.encode(real.read(torch.tensor([2])))
    error = (latents.mean(0) / tokenizer.scale - mean[0]) / std[0]
    assert error.abs().max() < 5 / 200**0.5
    assert (latents.std(0) / tokenizer.scale / std[0] - 1).abs().max() < 0.25
    torch.testing.assert_close(training.read(visits[[7, 3]]), latents[[7, 3]], rtol=1e-4, atol=1e-5)
