"""`python -m vision.train` end to end on real images, small: what it leaves, how it resumes, what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from driftfield import DriftingLoss
from driftfield.training import (
    MAX_REJECTED_STEPS,
    Update,
    UserError,
    distributed,
    load_config,
    read_checkpoint,
    read_log,
    run_program,
)
from vision import evaluate, train
from vision.config import CONFIG_DIR, TrainConfig
from vision.data import load
from vision.mae import ResNetMAE
from vision.train import Training

TINY = (
    "images=480", "labels_per_step=3", "generated_per_label=4", "positives_per_label=6", "unconditional_per_label=2",
    "queue.push_per_step=8", "warmup_images=24", "checkpoint_every_images=120", "log_every_images=24",
    "picture_every_images=240", "evaluate_images=100", "encoder.images=96", "encoder.batch_size=16",
    "encoder.warmup_images=16", "encoder.base_channels=4",
    "encoder.blocks=[1]", "generator.hidden_size=16", "generator.num_heads=2",
    "generator.cond_size=16", "generator.depth=1", "judge.epochs=1", "device=cpu",
)  # fmt: skip
STEPS = 40  # 480 images, 12 a step


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judge")


def overrides(folder: Path, judge: Path, *more: str) -> list[str]:
    return [*TINY, f"run_dir={folder / 'run'}", f"encoder.run_dir={folder / 'encoder'}", f"judge.folder={judge}", *more]


def run(arguments: list[str]) -> int:
    return run_program(
        train.main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description="", arguments=arguments
    )


def final_state(folder: Path) -> dict[str, dict[str, Tensor]]:
    loaded = read_checkpoint(folder / "run" / "checkpoints")
    assert loaded is not None and loaded.step == STEPS
    return loaded.tensors


def assert_equal_bits(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for group in one:
        assert one[group].keys() == other[group].keys()
        for name in one[group]:
            assert torch.equal(one[group][name], other[group][name]), f"{group}/{name}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, judge_folder: Path) -> Path:
    """A run from start to end without disturbance."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(overrides(folder, judge_folder)) == 0
    return folder


def test_run_leaves_model_pictures_log_and_results(finished: Path) -> None:
    results = json.loads((finished / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["images_seen"] == 480
    assert results["evaluation"]["n_generated"] == 100
    assert 0 <= results["evaluation"]["agreement"] <= 1
    lines = read_log(finished / "run" / "metrics.jsonl")
    assert [line["samples_seen"] for line in lines] == list(range(24, 481, 24))
    assert all(line["lambda"] > 0 and line["rejected_steps"] == 0 for line in lines)
    pictures = sorted((finished / "run" / "pictures").glob("*.png"))
    assert [int(path.stem) for path in pictures] == [0, 240, 480]
    for picture in [*pictures, finished / "run" / "training.gif", finished / "encoder" / "reconstruction.png"]:
        with Image.open(picture) as image:
            image.load()
    model = train.ImageGenerator.from_pretrained(finished / "run" / "model")
    ema = final_state(finished)["ema"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, ema[f"0.98/{name}"])


def test_finished_run_can_be_judged_at_several_guidance_scales(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"run_dir={finished / 'run'}", "num=100", "guidance_scales=[1.5,3]"]
    ended = run_program(
        evaluate.main,
        evaluate.EvaluateConfig,
        config_dir=CONFIG_DIR,
        config_name="evaluate",
        description="",
        arguments=arguments,
    )
    assert ended == 0
    rows = json.loads((finished / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["guidance_scale"] for row in rows] == [1.5, 3.0]
    results = json.loads((finished / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["guidance_scale"] == 1.5
    trained = results["evaluation"]
    assert {name: rows[0][name] for name in trained} == trained  # the same samples, judged the same way
    assert rows[0]["frechet"] != rows[1]["frechet"]
    assert f"| 3 | {rows[1]['agreement']:.3f} |" in capsys.readouterr().out
    with Image.open(finished / "run" / "guidance.png") as image:
        image.load()


def test_same_command_on_a_finished_run_changes_nothing(
    finished: Path, judge_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "run" / "results.json").read_bytes()
    assert run(overrides(finished, judge_folder)) == 0
    assert (finished / "run" / "results.json").read_bytes() == before
    assert "complete" in capsys.readouterr().out


def test_killed_anywhere_and_started_again_ends_bit_identical(
    finished: Path, judge_folder: Path, tmp_path: Path
) -> None:
    faults = ("mae.step.3:exit", "train.step.13:exit", "checkpoint.before_rename@20:exit", "train.step.39:exit")
    command = [sys.executable, "-m", "vision.train", *overrides(tmp_path, judge_folder)]
    for fault in faults:
        environment = os.environ | {"DRIFTFIELD_FAULT": fault.replace("@20", "")}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 9, ended.stderr
    assert run(overrides(tmp_path, judge_folder)) == 0
    assert_equal_bits(final_state(tmp_path), final_state(finished))
    logged = [
        [(line["step"], line["loss"]) for line in read_log(folder / "run" / "metrics.jsonl")]
        for folder in (tmp_path, finished)
    ]
    assert logged[0] == logged[1]


def test_sigterm_saves_and_the_same_command_goes_on(
    finished: Path, judge_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Training.step

    def step_with_signal(training: Training) -> dict[str, float | Tensor]:
        if training.step_number == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(training)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "step", step_with_signal)
        assert run(overrides(tmp_path, judge_folder)) == 143
    stopped = read_checkpoint(tmp_path / "run" / "checkpoints")
    assert stopped is not None and stopped.step == 18
    assert run(overrides(tmp_path, judge_folder)) == 0
    assert_equal_bits(final_state(tmp_path), final_state(finished))


def test_three_processes_take_the_steps_of_one(finished: Path, judge_folder: Path, tmp_path: Path) -> None:
    words = [
        word for word in overrides(finished, judge_folder) if not word.startswith(("run_dir", "images=", "log_every"))
    ]
    words += ["images=24", "log_every_images=12", "evaluate_images=100"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for count in (1, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command += ["-m", "vision.train", *words, f"run_dir={tmp_path / str(count)}"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert ended.returncode == 0, ended.stderr
    one, three = (read_log(tmp_path / name / "metrics.jsonl") for name in ("1", "3"))
    assert len(one) == len(three) == 2
    for mine, theirs in zip(one, three, strict=True):
        for name in ("loss", "lambda", "lambda/0.02", "lambda/global", "gradient_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3), name
    queues = [read_checkpoint(tmp_path / name / "checkpoints") for name in ("1", "3")]
    assert queues[0] is not None and queues[1] is not None
    assert_equal_bits({"queue": queues[0].tensors["queue"]}, {"queue": queues[1].tensors["queue"]})


def levels(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture, dtype=np.float32).copy())


@pytest.mark.slow
@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_killed_run_goes_on_sharded_or_not_and_ends_the_same(
    sharded_first: bool, finished: Path, judge_folder: Path, tmp_path: Path
) -> None:
    words = [
        word for word in overrides(finished, judge_folder) if not word.startswith(("run_dir", "images=", "labels_per"))
    ]
    words += ["labels_per_step=4", "labels_at_once=1", "images=96", "checkpoint_every_images=48", "log_every_images=16"]
    words += ["picture_every_images=48", "snapshot_every_images=48", "ema_decays=[0.9,0.98]"]
    assert run([*words, f"run_dir={tmp_path / 'straight'}"]) == 0
    alone = [sys.executable, "-m", "vision.train", *words, f"run_dir={tmp_path / 'killed'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    commands = [alone, [*launcher, *alone[1:], "shard=true"]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command, fault in zip(commands[:: -1 if sharded_first else 1], ("train.step.5:exit", ""), strict=True):
        faulty = environment | ({"DRIFTFIELD_FAULT": fault} if fault else {})
        ended = subprocess.run(command, env=faulty, capture_output=True, text=True, timeout=110)
        assert (ended.returncode == 0) != bool(fault), ended.stderr
    straight, killed = (read_log(tmp_path / name / "metrics.jsonl") for name in ("straight", "killed"))
    assert [line["step"] for line in killed] == [line["step"] for line in straight] == list(range(1, 7))
    for mine, theirs in zip(straight, killed, strict=True):
        for name in ("loss", "lambda", "gradient_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3), name
    for name in ("model", "model-0.98", "snapshots/000000000048", "snapshots/000000000096"):
        weights = [train.ImageGenerator.from_pretrained(tmp_path / run / name) for run in ("straight", "killed")]
        expected, found = (model.state_dict() for model in weights)
        for key in expected:
            assert (found[key] - expected[key]).norm() <= 1e-3 * expected[key].norm() + 1e-5, f"{name}/{key}"
    for name in ("0000000000", "0000000048", "0000000096"):
        expected, found = (levels(tmp_path / run / "pictures" / f"{name}.png") for run in ("straight", "killed"))
        assert (found - expected).abs().max() <= 2  # of 255


@pytest.fixture
def training(finished: Path, judge_folder: Path) -> Training:
    config = load_config(
        TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=overrides(finished, judge_folder)
    )
    return Training(config, load("digits", "train"), None, torch.device("cpu"))


def test_gradient_that_is_not_finite_changes_nothing(training: Training) -> None:
    training.step()
    before = {
        group: {name: tensor.clone() for name, tensor in named.items()} for group, named in training.tensors().items()
    }
    parameter = next(iter(training.generator.parameters()))
    for rejected in range(1, MAX_REJECTED_STEPS):
        training.optimizer.zero_grad()
        (parameter * float("nan")).sum().backward()
        training.update(1e-3)
        assert training.update.rejected == rejected
    assert_equal_bits(training.tensors(), before)
    (parameter * float("nan")).sum().backward()
    with pytest.raises(UserError, match="10 steps in a row had a gradient that is not finite"):
        training.update(1e-3)


def test_a_run_does_not_go_on_with_other_data(training: Training) -> None:
    tensors, state = training.tensors(), training.state()
    training.real.images[0] ^= 255
    del training.real.__dict__["fingerprint"]  # computed once per set
    with pytest.raises(UserError, match="data: expected the real samples that this run began with, fingerprint"):
        training.restore(1, tensors, state)


def pieces_of(training: Training, at_once: int | None) -> list[train.Piece]:
    labels, alpha = torch.tensor([4, 1, 7]), torch.tensor([1.0, 2.0, 3.0])
    training.config.labels_at_once = at_once
    return training._pieces(labels, alpha, torch.cat(training._draw_real(labels), dim=1))


def test_noise_of_a_slot_does_not_depend_on_the_other_slots(training: Training) -> None:
    torch.nn.init.normal_(training.generator.final.out.weight)
    (whole,) = pieces_of(training, None)
    all_slots = training._draw_generated(whole)
    parts = [training._draw_generated(piece) for piece in pieces_of(training, 2)]
    count = training.config.generated_per_label
    assert [len(part) for part in parts] == [2 * count, count]
    torch.testing.assert_close(all_slots, torch.cat(parts), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(all_slots[:count], all_slots[count : 2 * count])


def test_blocks_computed_again_on_the_way_back_change_nothing(training: Training) -> None:
    whole = gradient(training, None, "batch")
    training.generator.checkpoint_activations = True
    torch.testing.assert_close(gradient(training, None, "batch"), whole, rtol=1e-5, atol=1e-6)


def gradient(training: Training, at_once: int | None, statistics: Literal["batch", "piece"]) -> Tensor:
    """Gradient of the first step; the training stays as it was."""
    training.config.labels_at_once, training.config.statistics = at_once, statistics
    training.update = Update(training.generator, training.optimizer, training.ema, clip_norm=1e9)
    state = training.state()
    tensors = {group: {name: t.clone() for name, t in named.items()} for group, named in training.tensors().items()}
    training.step()
    training.restore(0, tensors, state)
    return torch.cat(
        [parameter.grad.flatten() for parameter in training.generator.parameters() if parameter.grad is not None]
    )


def test_a_step_in_bfloat16_takes_weights_rounded_once(
    finished: Path, judge_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = overrides(finished, judge_folder, "bfloat16=true", "encoder.features=abcd")
    config = load_config(TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=words)
    values = []
    for rounded in (True, False):
        torch.manual_seed(0)
        encoder = ResNetMAE(in_channels=1, base_channels=16, blocks=(2,), num_classes=2).requires_grad_(False)
        if not rounded:
            monkeypatch.setattr(train, "round_weights", lambda encoder: None)
        training = Training(config, load("digits", "train"), encoder, torch.device("cpu"))
        assert (encoder.encoder.stem.conv.weight.dtype == torch.bfloat16) == rounded
        values.append(training.step())
    for name in ("loss", "lambda", "gradient_norm"):
        assert float(values[0][name]) == pytest.approx(float(values[1][name]), rel=0.02), name


def test_pieces_with_the_statistics_of_the_batch_give_its_gradient(training: Training) -> None:
    whole = gradient(training, None, "batch")
    exact, by_piece = gradient(training, 1, "batch"), gradient(training, 1, "piece")
    assert (exact - whole).norm() < 1e-4 * whole.norm()
    assert (by_piece - whole).norm() > 1e-2 * whole.norm()  # statistics of its own make a piece another loss


def test_statistics_of_the_batch_draw_images_once(training: Training) -> None:
    generate, calls = training._generate, []
    training._generate = lambda *inputs: calls.append(torch.is_grad_enabled()) or generate(*inputs)
    training.config.labels_at_once = 1
    training.step()
    assert sorted(calls) == [False] * 3 + [True] * 3  # three labels


def test_annealed_temperatures_start_at_their_multiple_and_end_as_they_are(training: Training) -> None:
    plain = gradient(training, 1, "batch")  # in pieces, so that both passes take part
    training.config.temperature_start, training.config.temperature_fraction = 4.0, 0.5
    annealed = gradient(training, 1, "batch")
    training.config.temperature_start, temperatures = 1.0, training.loss.options.temperatures
    training.loss = DriftingLoss([4.0 * temperature for temperature in temperatures])
    assert torch.equal(annealed, gradient(training, 1, "batch"))
    assert not torch.allclose(annealed, plain)
    training.config.temperature_start = 4.0
    training.step_number = training.config.images // training.samples_per_step
    assert training._temperature_factor() == 1.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning_rte=1", ["learning_rte", "did you mean 'learning_rate'"]),
        ("learning_rate=fast", ["learning_rate", "a number", "'fast'"]),
        ("images=-5", ["images", ">= 1", "-5"]),
        ("learning_rate=nan", ["learning_rate", "nan"]),
        ("experiment=mnist", ["experiment", "fashion_mnist", "'mnist'"]),
        ("data.folder=/nonexistent", ["/nonexistent"]),
        ("positives_per_label=9", ["queue.per_class", "9"]),
        ("loss.second_batch=halves", ["loss.second_batch='halves' needs field='sinkhorn'"]),
        ("temperature_start=0", ["temperature_start", "> 0"]),
        ("tokenizer=/nonexistent", ["clamp_to_encode", "latents"]),
        ("run_dir=/dev/null/run", ["/dev/null/run"]),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    override: str, words: list[str], tmp_path: Path, judge_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["queue.per_class=8"] if override.startswith("positives") else []
    assert run([*overrides(tmp_path, judge_folder), *extra, override]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message and "Traceback" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "encoder").exists()


def test_labels_that_processes_cannot_share_are_refused_by_their_name(
    tmp_path: Path, judge_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert run(overrides(tmp_path, judge_folder)) == 2
    assert "error: labels_per_step: expected a number that 2 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_class_with_too_few_images_is_named(
    tmp_path: Path, judge_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ("positives_per_label=200", "queue.per_class=200")
    assert run([*overrides(tmp_path, judge_folder), *many]) == 2
    assert "at least 200 images" in capsys.readouterr().err
    assert not (tmp_path / "encoder").exists()


def test_folder_of_another_run_is_refused_naming_the_difference(
    finished: Path, judge_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "run" / "config.yaml").read_bytes()
    assert run(overrides(finished, judge_folder, "seed=1")) == 2
    message = capsys.readouterr().err
    assert "seed (was 0, now 1)" in message and "run_dir=" in message
    assert (finished / "run" / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("experiment", ["", *sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))])
def test_every_experiment_composes_and_builds(experiment: str) -> None:
    chosen = [f"experiment={experiment}"] if experiment else []
    config = load_config(TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=chosen)
    channels, size, num_classes = {
        "digits": (1, 8, 10),
        "fashion_mnist": (1, 32, 10),
        "latents": (4, 32, 1000),
        "imagenet": (3, 256, 1000),
    }[config.data.name]
    with torch.device("meta"):
        generator = train.build_generator(config, channels=channels, image_size=size, num_classes=num_classes)
    assert sum(parameter.numel() for parameter in generator.parameters()) > 0
