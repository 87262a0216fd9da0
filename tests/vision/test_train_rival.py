"""`python -m vision.train_rival` end to end, small: what it leaves, how it resumes, what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from torch import Tensor

from driftfield.training import UserError, load_config, read_checkpoint, read_log, run_program
from vision import train_rival
from vision.config import CONFIG_DIR, TrainConfig
from vision.data import ImageSet, load
from vision.rivals.config import Method, RivalConfig
from vision.rivals.training import TRAININGS, GanTraining, RivalTraining, build_generator

METHODS = get_args(Method)
TINY = (
    "images=96", "warmup_images=16", "checkpoint_every_images=40", "log_every_images=8", "picture_every_images=48",
    "evaluate_images=100", "generator.hidden_size=16", "generator.num_heads=2", "generator.cond_size=16",
    "generator.depth=1", "judge.epochs=1", "device=cpu", *(f"{method}.batch_size=8" for method in METHODS),
    "flow_matching.evaluations=[1,4]", "mean_flow.apart_share=0.5", "mean_flow.omega=1.5", "mean_flow.kappa=0.25",
    "mean_flow.evaluations=[1,2]",
)  # fmt: skip
STEPS = 12


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judge")


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return load("digits", "train")


def overrides(folder: Path, judge: Path, method: str, *more: str) -> list[str]:
    return [f"method={method}", *TINY, f"run_dir={folder}", f"judge.folder={judge}", *more]


def run(arguments: list[str]) -> int:
    return run_program(
        train_rival.main,
        RivalConfig,
        config_dir=train_rival.RIVALS_DIR,
        config_name="train_rival",
        description="",
        arguments=arguments,
    )


def final_state(folder: Path) -> dict[str, dict[str, Tensor]]:
    loaded = read_checkpoint(folder / "checkpoints")
    assert loaded is not None and loaded.step == STEPS
    return loaded.tensors


def assert_equal_bits(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for group in one:
        assert one[group].keys() == other[group].keys()
        for name in one[group]:
            assert torch.equal(one[group][name], other[group][name]), f"{group}/{name}"


@pytest.fixture(scope="module", params=METHODS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, judge_folder: Path) -> Path:
    """A run of each method, from start to end without disturbance, in a folder of the method's name."""
    folder = tmp_path_factory.mktemp("finished") / request.param
    assert run(overrides(folder, judge_folder, request.param)) == 0
    return folder


def test_run_leaves_model_pictures_log_and_results(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert (results["method"], results["images_seen"]) == (finished.name, 96)
    ways = [(row["sampler"], row["evaluations"], row["guidance_scale"]) for row in results["rows"]]
    assert ways == {
        "flow_matching": [
            ("euler", 1, 1), ("euler", 4, 1), ("heun", 4, 1), ("euler", 4, 2), ("heun", 4, 2),
        ],
        "mean_flow": [("mean_flow", 1, 2), ("mean_flow", 2, 2)],
        "gan": [("gan", 1, 1)],
    }[finished.name]  # fmt: skip
    for row in results["rows"]:
        assert row["evaluation"]["n_generated"] == 100 and row["images_per_s"] > 0
    figures = [row["evaluation"]["frechet"] for row in results["rows"]]
    assert len(set(figures)) == len(figures)  # every row has a sampler of its own
    lines = read_log(finished / "metrics.jsonl")
    assert [line["samples_seen"] for line in lines] == list(range(8, 97, 8))
    pictures = sorted((finished / "pictures").glob("*.png"))
    assert [int(path.stem) for path in pictures] == [0, 48, 96]
    for picture in [*pictures, finished / "samples.png", finished / "training.gif"]:
        with Image.open(picture) as image:
            image.load()


def test_model_is_the_average_of_the_weights(finished: Path) -> None:
    config = load_config(
        RivalConfig,
        config_dir=train_rival.RIVALS_DIR,
        config_name="train_rival",
        overrides=overrides(finished, finished, finished.name),
    )
    model = type(build_generator(config, load("digits", "test"))).from_pretrained(finished / "model")
    ema, decay = final_state(finished)["ema"], config.optimizer.ema_decays[0]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, ema[f"{decay}/{name}"])


def test_killed_and_started_again_ends_bit_identical(
    finished: Path, judge_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = overrides(tmp_path / "run", judge_folder, finished.name)
    if finished.name == "gan":  # as the system does it; once, since a process takes seconds to come up
        environment = os.environ | {"DRIFTFIELD_FAULT": "rival.step.8:exit"}
        command = [sys.executable, "-m", "vision.train_rival", *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 9, ended.stderr
    else:
        with monkeypatch.context() as patched:
            patched.setattr("driftfield.training.loop.fault_point", interrupt_at("rival.step.8"))
            assert run(arguments) == 130
    stopped = read_checkpoint(tmp_path / "run" / "checkpoints")
    assert stopped is not None and stopped.step == 5  # three steps are done again
    assert run(arguments) == 0
    assert_equal_bits(final_state(tmp_path / "run"), final_state(finished))
    logged = [[(line["step"], line["loss"]) for line in read_log(folder / "metrics.jsonl")] for folder in
              (tmp_path / "run", finished)]  # fmt: skip
    assert logged[0] == logged[1]


def interrupt_at(place: str) -> Callable[[str], None]:
    """A fault point that raises at this place."""

    def fault_point(name: str) -> None:
        if name == place:
            raise KeyboardInterrupt

    return fault_point


def training_of(method: str, real: ImageSet, *more: str) -> RivalTraining:
    config = load_config(
        RivalConfig,
        config_dir=train_rival.RIVALS_DIR,
        config_name="train_rival",
        overrides=[f"method={method}", *TINY, *more],
    )
    return TRAININGS[config.method](config, real, torch.device("cpu"))


@pytest.mark.parametrize("method", METHODS)
def test_halves_of_a_batch_have_the_gradient_of_the_whole(
    method: str, real: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process draws depends on (seed, step, slot) alone, and gradients add up over processes."""

    def gradient(slots: slice) -> Tensor:
        training = training_of(method, real)
        monkeypatch.setattr("vision.rivals.training.share", lambda count: slots)
        training.losses()
        return torch.cat([p.grad.flatten() for p in training.generator.parameters() if p.grad is not None])

    if method == "gan":  # the discriminator takes its own step first, with a gradient that no other process adds to
        monkeypatch.setattr("driftfield.training.Update.__call__", lambda update, rate: 0.0)
    whole = gradient(slice(None))
    assert whole.norm() > 0
    torch.testing.assert_close(gradient(slice(0, 4)) + gradient(slice(4, 8)), whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_loss_of_what_is_trained_falls(method: str, real: ImageSet) -> None:
    more = ("images=4800", "warmup_images=0", f"{method}.batch_size=32", f"{method}.learning_rate=3e-3")
    training = training_of(method, real, *more)
    name = {"flow_matching": "loss", "mean_flow": "squared_error", "gan": "discriminator_loss"}[method]
    values = [float(training.step()[name]) for _ in range(60)]
    assert sum(values[-10:]) < 0.9 * sum(values[:10])


def test_penalty_enters_the_gradient_in_proportion_to_gamma(real: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftfield.training.Update.__call__", lambda update, rate: 0.0)
    penalties, gradients = [], []
    for gamma in (0, 1, 3):
        training = training_of("gan", real, f"gan.r1_gamma={gamma}")
        assert isinstance(training, GanTraining)
        penalties.append(float(training.losses()["r1_penalty"].detach()))
        weight = training.discriminator.patch_embedding.weight
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert penalties == pytest.approx([0, penalties[1], 3 * penalties[1]]) and penalties[1] > 0
    of_penalty = gradients[1] - gradients[0]
    assert of_penalty.norm() > 1e-3 * gradients[0].norm()
    torch.testing.assert_close(gradients[2] - gradients[0], 3 * of_penalty, rtol=1e-3, atol=1e-6)


def test_a_run_does_not_go_on_with_other_data(real: ImageSet) -> None:
    training = training_of("flow_matching", real)
    with pytest.raises(UserError, match="data: expected the real images that this run began with, fingerprint"):
        training.restore(1, training.tensors(), training.state() | {"data": "another"})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method=diffusion", ["method", "flow_matching, mean_flow, gan", "'diffusion'"]),
        ("learning_rate=1", ["learning_rate", "did you mean"]),
        ("flow_matching.picture_evaluations=3", ["flow_matching.picture_evaluations", "multiple of 2", "3"]),
        ("flow_matching.label_dropout=0", ["flow_matching.label_dropout", "guidance", "0"]),
        ("mean_flow.label_dropout=0", ["mean_flow.label_dropout", "guidance", "0"]),
        ("gan.r1_gamma=-1", ["gan.r1_gamma", ">= 0", "-1"]),
        ("data.name=latents", ["data.name", "digits, fashion_mnist", "'latents'"]),
        ("data.folder=/nonexistent", ["/nonexistent"]),
        ("experiment=ablation", ["experiment", "fashion_mnist", "'ablation'"]),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    override: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*overrides(tmp_path / "run", tmp_path / "judge", "flow_matching"), override]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message and "Traceback" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("experiment", ["", "experiment=fashion_mnist"])
@pytest.mark.parametrize("method", METHODS)
def test_transformer_data_and_length_are_those_of_drifting(experiment: str, method: str) -> None:
    chosen = [experiment] if experiment else []
    drifting = load_config(TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=chosen)
    rival = load_config(
        RivalConfig,
        config_dir=train_rival.RIVALS_DIR,
        config_name="train_rival",
        overrides=[*chosen, f"method={method}"],
    )
    for name in ("generator", "judge", "images", "bfloat16", "weight_decay", "clip_norm", "evaluate_images"):
        assert getattr(rival, name) == getattr(drifting, name), name
    assert rival.data.name == drifting.data.name
