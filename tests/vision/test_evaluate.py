"""`Judgement`: what it says of images whose figures are known, coverage in raw pixels above all."""

import pytest
import torch
from torch import Tensor

from vision import evaluate
from vision.config import JudgeConfig
from vision.data import load, to_float
from vision.evaluate import Judgement
from vision.generator import ImageGenerator
from vision.metrics import EvaluationResult, balanced_subset

MODEL = ImageGenerator(
    image_size=8, channels=1, num_classes=10, patch_size=4, hidden_size=8, depth=1, num_heads=2, cond_size=8
)


@pytest.fixture(scope="module")
def judgement(tmp_path_factory: pytest.TempPathFactory) -> Judgement:
    settings = JudgeConfig(folder=tmp_path_factory.mktemp("judge"), epochs=1)
    return Judgement(settings, load("digits", "train"), load("digits", "test"), torch.device("cpu"))


def judged(judgement: Judgement, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> EvaluationResult:
    """The figures of given images in the place of a generator's samples."""
    monkeypatch.setattr(evaluate, "sample", lambda *_, **__: images)
    return judgement.evaluate(MODEL, num=len(images))


def test_coverage_in_pixels_of_the_reference_itself_of_one_image_and_of_noise(
    judgement: Judgement, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = to_float(load("digits", "test").images)
    assert judged(judgement, test, monkeypatch).coverage_pixels == 1
    image = to_float(load("digits", "train").images[:1])
    one = judged(judgement, image.expand(100, -1, -1, -1), monkeypatch)
    within = torch.cdist(test.flatten(1).double(), image.flatten(1).double())[:, 0]  # of each to the one
    radii = torch.cdist(test.flatten(1).double(), test.flatten(1).double()).sort(dim=1).values[:, 5]
    assert one.coverage_pixels == float((within <= radii).double().mean()) < 0.1
    noise = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert judged(judgement, noise, monkeypatch).coverage_pixels == 0


def test_real_training_images_reach_their_own_floor_of_coverage_in_pixels(
    judgement: Judgement, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = load("digits", "train")
    images = to_float(train.images[balanced_subset(train.labels, 500, seed=7)])
    result = judged(judgement, images, monkeypatch)
    assert 0.9 < result.coverage_pixels_real < 1
    assert result.coverage_pixels == pytest.approx(result.coverage_pixels_real, abs=0.02)
    fewer = judged(judgement, images[::5], monkeypatch)
    assert fewer.coverage_pixels_real < result.coverage_pixels_real - 0.1  # as many real ones as there are generated
