"""The step of `vision.train` against A.9 put together from its parts: draws, loss, gradient, AdamW, average."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from driftfield import DriftingLoss
from driftfield.training import load_config
from driftfield.training.visits import Epochs
from vision.config import CONFIG_DIR, TrainConfig
from vision.data import ImageSet, load, to_float
from vision.generator import ImageGenerator
from vision.train import Training

LABELS, GENERATED, POSITIVES, UNCONDITIONAL = 3, 4, 6, 2
PEAK, DECAY, CLIP, AVERAGE, PUSHED = 1e-2, 0.5, 0.1, 0.9, 8
WORDS = (
    "images=480", f"labels_per_step={LABELS}", f"generated_per_label={GENERATED}", f"positives_per_label={POSITIVES}",
    f"unconditional_per_label={UNCONDITIONAL}", f"queue.push_per_step={PUSHED}", f"learning_rate={PEAK}",
    "warmup_images=24", "cooldown_fraction=0", f"weight_decay={DECAY}", f"clip_norm={CLIP}",
    f"ema_decays=[{AVERAGE}]", "ema_warmup=false", "guidance.low=2", "guidance.high=3", "guidance.share_at_one=0",
    "generator.hidden_size=16", "generator.num_heads=2", "generator.cond_size=16", "generator.depth=1", "device=cpu",
)  # fmt: skip


class Draws(NamedTuple):
    """What a step drew, as its queues and its generator saw it."""

    visits: list[Tensor]  # positives [L, P], unconditional samples [L, M]
    inputs: list[tuple[Tensor, ...]]  # of the generator: noise, label, guidance scale, style


@pytest.fixture
def real() -> ImageSet:
    return load("digits", "train")


@pytest.fixture
def training(real: ImageSet) -> Training:
    config = load_config(TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=WORDS)
    return Training(config, real, None, torch.device("cpu"))


def watch(training: Training, monkeypatch: pytest.MonkeyPatch) -> Draws:
    draws, generate = Draws([], []), training._generate

    def generate_and_note(*inputs: Tensor) -> Tensor:
        draws.inputs.append(inputs)
        return generate(*inputs)

    monkeypatch.setattr(training, "_generate", generate_and_note)
    for queue in (training.queue, training.unconditional_queue):

        def sample_and_note(*arguments: object, sample=queue.sample, **options: object) -> Tensor:
            draws.visits.append(sample(*arguments, **options))
            return draws.visits[-1]

        monkeypatch.setattr(queue, "sample", sample_and_note)
    return draws


def loss_of(generator: ImageGenerator, real: ImageSet, draws: Draws) -> Tensor:
    """A.7 and A.9 in raw pixels, mean over labels."""
    x = generator(*draws.inputs[-1]).reshape(LABELS, GENERATED, -1)  # [L, N, D]
    positives, unconditional = (to_float(real.images[visits % len(real)]).flatten(2) for visits in draws.visits[-2:])
    alpha = draws.inputs[-1][2].reshape(LABELS, GENERATED)[:, :1]  # [L, 1]
    weight = (alpha - 1) * (GENERATED - 1) / UNCONDITIONAL  # A.7
    return DriftingLoss()(x, positives, unconditional, weight.expand(-1, UNCONDITIONAL)).loss.mean()


def test_steps_are_those_of_the_paper(training: Training, real: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, generator = watch(training, monkeypatch), copy.deepcopy(training.generator)
    optimizer = torch.optim.AdamW(generator.parameters(), betas=(0.9, 0.95), weight_decay=DECAY)
    average = [parameter.detach().clone() for parameter in generator.parameters()]
    for step in range(3):
        values = training.step()
        optimizer.zero_grad()
        loss = loss_of(generator, real, draws)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(generator.parameters(), CLIP)
        assert norm > CLIP
        optimizer.param_groups[0]["lr"] = [1e-6, 1e-6 + (PEAK - 1e-6) / 2, PEAK][step]  # 12 of 24 images a step
        optimizer.step()
        average = [
            AVERAGE * old + (1 - AVERAGE) * new for old, new in zip(average, generator.parameters(), strict=True)
        ]
        assert float(values["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(values["gradient_norm"]) == pytest.approx(norm.item(), rel=1e-3)
    moved = training.ema.state_dict()
    for (name, found), expected, mean in zip(
        training.generator.named_parameters(), generator.parameters(), average, strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # AdamW divides tiny gradients by their size
        torch.testing.assert_close(moved[f"{AVERAGE}/{name}"], mean, rtol=1e-3, atol=1e-4)


def test_a_step_is_of_the_newest_labels_and_their_positives(
    training: Training, real: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = watch(training, monkeypatch)
    training.step_number = 5
    newest = Epochs(len(real), seed=training.config.seed)(5 * PUSHED, PUSHED)
    training.step()
    labels = real.labels[newest[:LABELS] % len(real)]
    noise, asked, alpha, style = draws.inputs[0]
    assert torch.equal(asked, labels.repeat_interleave(GENERATED))
    positives, unconditional = draws.visits
    assert torch.equal(real.labels[positives % len(real)], labels[:, None].expand(-1, POSITIVES))
    assert unconditional.shape == (LABELS, UNCONDITIONAL)
    per_label = alpha.reshape(LABELS, GENERATED)
    assert (per_label == per_label[:, :1]).all() and per_label[:, 0].unique().numel() == LABELS
    assert 2 <= alpha.min() and alpha.max() <= 3
    assert len(noise.flatten(1).unique(dim=0)) == len(style.unique(dim=0)) == LABELS * GENERATED


def test_samples_of_all_classes_serve_as_unconditional_ones(training: Training, real: ImageSet) -> None:
    found = set()
    for training.step_number in range(20):
        _, unconditional = training._draw_real(torch.tensor([4, 4, 4]))
        found |= set(real.labels[unconditional.flatten() % len(real)].tolist())
    assert found == set(range(10))
