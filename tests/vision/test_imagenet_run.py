"""ImageNet's way from end to end, tiny: photographs, latents, encoder, generator, samples; killed and resumed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from driftfield.training import load_config, read_checkpoint, read_log, run_program
from tests.vision.tiny_models import autoencoder
from vision import cache_latents, sample, train, train_mae
from vision.config import CONFIG_DIR, TrainConfig
from vision.imagenet import ImageFolder
from vision.latents import LatentStore
from vision.mae import ResNetMAE
from vision.tokenizer import Tokenizer

CLASSES = ("china", "flower")
PER_CLASS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs cut into the images of two classes, and an autoencoder."""
    folder = tmp_path_factory.mktemp("imagenet")
    draw = np.random.default_rng(0)
    for name, photograph in zip(CLASSES, load_sample_images().images, strict=True):
        (folder / "images" / "train" / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            top, left = draw.integers(0, photograph.shape[0] - 96), draw.integers(0, photograph.shape[1] - 120)
            crop = Image.fromarray(photograph[top : top + 96, left : left + 120])
            crop.save(folder / "images" / "train" / name / f"{index}.JPEG")
    autoencoder().save_pretrained(folder / "vae")
    return folder


def run(program: Any, schema: type, name: str, *arguments: str) -> None:
    ended = run_program(
        program.main, schema, config_dir=CONFIG_DIR, config_name=name, description="", arguments=arguments
    )
    assert ended == 0


def small(folder: Path) -> list[str]:
    return ["device=cpu", "bfloat16=false", "compile=false", f"tokenizer={folder / 'vae'}", "data.classes=folders",
            "data.image_size=16", "data.workers=2"]  # fmt: skip


def encoder(folder: Path, *more: str) -> list[str]:
    return [
        "experiment=mae_256", *small(folder), f"data.folder={folder / 'images'}", f"encoder.run_dir={folder / 'mae'}",
        "encoder.base_channels=4", "encoder.blocks=[1,2]", "encoder.images=96", "encoder.batch_size=16",
        "encoder.microbatch=5", "encoder.warmup_images=32", "encoder.log_every_images=16",
        "encoder.classifier_images=48", "encoder.classifier_warmup_images=32", *more,
    ]  # fmt: skip


def generator(folder: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "experiment=ablation", *small(folder), f"run_dir={run_dir}", "data.name=latents",
        f"data.folder={folder / 'latents'}", f"encoder.pretrained=[mae:{folder / 'mae' / 'model'}]",
        "generator.hidden_size=16", "generator.depth=1", "generator.num_heads=2", "generator.cond_size=16",
        "queue.per_class=8", "queue.unconditional=16", "queue.push_per_step=6", "labels_per_step=4",
        "generated_per_label=4", "positives_per_label=6", "unconditional_per_label=2", "labels_at_once=2",
        "images=160", "warmup_images=32", "checkpoint_every_images=48", "log_every_images=16",
        "picture_every_images=80", "snapshot_every_images=80", *more,
    ]  # fmt: skip


def killed_then_finished(module: str, arguments: list[str], fault: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(
        command, env=os.environ | {"DRIFTFIELD_FAULT": fault}, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 9, ended.stderr
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def latents(folder: Path) -> Path:
    run(
        cache_latents, cache_latents.CacheLatentsConfig, "cache_latents", "classes=folders",
        f"data={folder / 'images'}",
        f"out={folder / 'latents'}", f"tokenizer={folder / 'vae'}", "image_size=16", "chunk_images=5", "workers=2",
        "std_band=[0.1,1.0]", "dtype=float32", "device=cpu",
    )  # fmt: skip
    return folder / "latents"


@pytest.fixture(scope="module")
def mae(folder: Path) -> Path:
    run(train_mae, TrainConfig, "train", *encoder(folder))
    return folder / "mae"


def test_latents_are_those_of_the_images(folder: Path, latents: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder / "vae")
    store = LatentStore(latents, tokenizer=tokenizer)
    images = ImageFolder(folder / "images", classes="folders", augmentation="none", image_size=16, workers=2)
    assert store.class_names == images.class_names == CLASSES
    assert torch.equal(store.labels, images.labels) and len(store) == len(CLASSES) * PER_CLASS
    mean, std = tokenizer.encode(images.read(torch.arange(len(images)), seed=0))
    epochs = torch.stack([store.read(torch.arange(len(store)) + e * len(store), seed=0) for e in range(64)])
    mirrored, _ = tokenizer.encode(images.read(torch.arange(len(images)), seed=0).flip(-1))
    spread = std.mean() * tokenizer.scale / 64**0.5 + (mirrored - mean).abs() / 2 * tokenizer.scale / 64**0.5
    assert ((epochs.mean(0) - (mean + mirrored) / 2 * tokenizer.scale).abs() < 5 * spread + 1e-3).float().mean() > 0.99


def test_encoder_learns_and_its_classifier_comes_last(mae: Path) -> None:
    lines = read_log(mae / "metrics.jsonl")
    assert [line["samples_seen"] for line in lines] == list(range(16, 97, 16))
    assert ["accuracy" in line for line in lines] == [False] * 3 + [True] * 3
    assert lines[-1]["reconstruction"] < lines[0]["reconstruction"]
    assert ResNetMAE.from_pretrained(mae / "model").in_channels == 4
    with Image.open(mae / "reconstruction.png") as image:
        image.load()


def test_encoder_killed_and_resumed_is_the_same(folder: Path, mae: Path, tmp_path: Path) -> None:
    again = [*encoder(folder), f"encoder.run_dir={tmp_path / 'mae'}"]
    again = [word for word in again if word != f"encoder.run_dir={mae}"]
    killed_then_finished("vision.train_mae", again, "mae.step.4:exit")
    one, other = (ResNetMAE.from_pretrained(place / "model").state_dict() for place in (mae, tmp_path / "mae"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_encoder_stopped_among_unreadable_images_and_resumed_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a tree in which the next image of the class stands in the place of each unreadable one."""
    broken, copied = (Path(shutil.copytree(folder / "images", tmp_path / name)) for name in ("broken", "copied"))
    for name, other in (("china/10.JPEG", "china/11.JPEG"), ("flower/9.JPEG", "flower/0.JPEG")):  # bytewise: 9 is last
        shutil.copy(broken / "train" / other, copied / "train" / name)
        os.truncate(broken / "train" / name, (broken / "train" / name).stat().st_size // 2)

    def words(name: str, share: float) -> list[str]:
        changes = {
            "data.folder": tmp_path / name, "data.max_unreadable": share, "encoder.run_dir": tmp_path / f"{name}_mae",
            "tokenizer": "null", "encoder.images": 48, "encoder.microbatch": 16, "encoder.classifier_images": 16,
            "encoder.checkpoint_every_images": 16,
        }  # fmt: skip
        base = [word for word in encoder(folder) if word.partition("=")[0] not in changes]
        return [*base, *(f"{key}={value}" for key, value in changes.items())]

    run(train_mae, TrainConfig, "train", *words("copied", 0))
    with monkeypatch.context() as patched:
        patched.setenv("DRIFTFIELD_FAULT", "mae.step.2:raise")
        with pytest.raises(RuntimeError):
            run(train_mae, TrainConfig, "train", *words("broken", 0.1))
    run(train_mae, TrainConfig, "train", *words("broken", 0.1))
    assert "2 images were unreadable and replaced by the next of their class" in capsys.readouterr().out
    one, other = (
        ResNetMAE.from_pretrained(tmp_path / f"{name}_mae" / "model").state_dict() for name in ("copied", "broken")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    refused = run_program(
        train_mae.main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description="",
        arguments=[*words("broken", 0.05), f"encoder.run_dir={tmp_path / 'again'}"],
    )  # fmt: skip
    assert refused == 2 and "max_unreadable=0.05 allows 1 of 24 files" in capsys.readouterr().err


def test_generator_killed_and_resumed_is_the_same_and_samples_images(
    folder: Path, latents: Path, mae: Path, tmp_path: Path
) -> None:
    run(train, TrainConfig, "train", *generator(folder, tmp_path / "whole"))
    killed_then_finished("vision.train", generator(folder, tmp_path / "killed"), "train.step.5:exit")
    one, other = (read_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "killed"))
    assert one is not None and other is not None and one.step == other.step == 10
    for group, named in one.tensors.items():
        assert all(torch.equal(tensor, other.tensors[group][name]) for name, tensor in named.items()), group
    line = read_log(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert {"lambda/global", "lambda/norm_x", "lambda/a", "lambda/b", "lambda/c", "lambda/d"} <= line.keys()
    assert [path.name for path in sorted((tmp_path / "whole" / "snapshots").iterdir())][-1] == f"{160:012d}"
    out = tmp_path / "samples.npz"
    run(
        sample, sample.SampleConfig, "sample", f"model={tmp_path / 'whole' / 'model'}", f"tokenizer={folder / 'vae'}",
        f"out={out}", "num=6", "device=cpu",
    )  # fmt: skip
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (6, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8


def test_latents_of_another_autoencoder_are_refused_before_any_work(
    folder: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = autoencoder()
    torch.nn.init.normal_(other.quant_conv.weight)
    other.save_pretrained(tmp_path / "vae")
    arguments = generator(folder, tmp_path / "run", f"tokenizer={tmp_path / 'vae'}")
    arguments = [word for word in arguments if word != f"tokenizer={folder / 'vae'}"]
    ended = run_program(
        train.main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description="", arguments=arguments
    )
    assert ended == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message and str(latents) in message
    assert not (tmp_path / "run").exists()


def test_every_program_of_an_experiment_has_its_data() -> None:
    for path in sorted((CONFIG_DIR / "experiment").glob("*.yaml")):
        config = load_config(
            TrainConfig, config_dir=CONFIG_DIR, config_name="train", overrides=[f"experiment={path.stem}"]
        )
        assert config.tokenizer is not None or config.data.name != "latents"
        assert config.labels_per_step % (config.labels_at_once or 1) == 0
