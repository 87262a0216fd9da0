"""The step of `vision.train_mae`: what is compiled, and how often."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from driftfield.training import load_config
from vision import train_mae
from vision.config import CONFIG_DIR, EncoderConfig, TrainConfig
from vision.data import load
from vision.train_mae import MAETraining

STEPS = 14  # more than torch.compile compiles one function


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
