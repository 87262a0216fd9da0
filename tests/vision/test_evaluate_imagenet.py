"""`python -m vision.evaluate_imagenet`: its figures against the metrics of whole sets, alone and in two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from driftfield.training import run_program
from vision import evaluate_imagenet as program
from vision.config import CONFIG_DIR
from vision.evaluate_imagenet import (
    RELEASE_ABLATION,
    EvaluateImageNetConfig,
    IntermediateFid,
    intermediate_fids,
    release_ablation_table,
)
from vision.fid import StreamedInceptionScore, sample_labels
from vision.generator import ImageGenerator
from vision.measure import Measurement
from vision.metrics import fit_gaussian, frechet_distance, precision_recall
from vision.sample import images_in_batches
from vision.train import SNAPSHOTS

from . import evaluate_imagenet_worker as worker
from .evaluate_imagenet_worker import FeatureNetwork

REPOSITORY = Path(__file__).parents[2]
NUM = 40
CLASSES = 5


def tiny_generator(seed: int, *, channels: int = 3) -> ImageGenerator:
    torch.manual_seed(seed)
    model = ImageGenerator(
        image_size=8, channels=channels, patch_size=4, hidden_size=16, depth=1, num_heads=2, cond_size=16,
        num_classes=CLASSES, num_context_tokens=1, num_styles=3, output_gain=1.0,
    )  # fmt: skip
    for parameter in model.parameters():  # adaLN-zero would hide class and scale
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return path


@pytest.fixture(scope="module")
def real_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, real_images: np.ndarray) -> Path:
    """Two models of a run, the references of both protocols, and real images."""
    folder = tmp_path_factory.mktemp("imagenet")
    tiny_generator(0).save_pretrained(folder / "run" / "model")
    tiny_generator(1).save_pretrained(folder / "run" / "model-0.9995")
    (folder / "run" / "config.yaml").write_text("ema_decays: [0.999, 0.9995]\n", encoding="utf-8")
    features, _, spatial = FeatureNetwork()(torch.from_numpy(real_images).permute(0, 3, 1, 2))
    mean, covariance = (part.numpy() for part in fit_gaussian(features))
    mu_s, sigma_s = (part.numpy() for part in fit_gaussian(spatial))
    save_npz(folder / "release.npz", ref_mu=mean, ref_sigma=covariance)
    save_npz(folder / "adm.npz", mu=mean, sigma=covariance, mu_s=mu_s, sigma_s=sigma_s, arr_0=real_images)
    return folder


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "load_inception", lambda path, device: FeatureNetwork())


def arguments(folder: Path, run_dir: Path, *more: str) -> list[str]:
    keys = {"models": f"[{folder / 'run' / 'model'}]", "reference": folder / "release.npz", "num": NUM}
    given = {word.partition("=")[0] for word in more}
    base = [f"{key}={value}" for key, value in keys.items() if key not in given]
    return [*base, f"run_dir={run_dir}", "batch_size=7", "device=cpu", "seed=5", *more]


def adm(folder: Path) -> list[str]:
    """All figures: the reference has spatial statistics and real images."""
    return ["protocol=adm", f"reference={folder / 'adm.npz'}"]


def run(words: list[str]) -> int:
    return run_program(
        program.main,
        EvaluateImageNetConfig,
        config_dir=CONFIG_DIR,
        config_name="evaluate_imagenet",
        description="",
        arguments=words,
    )


def results(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))


def all_samples(folder: Path, name: str, rule: str, alpha: float) -> Tensor:
    model = ImageGenerator.from_pretrained(folder / "run" / name)
    labels = sample_labels(rule, range(NUM), num_classes=CLASSES, seed=5)
    batches = images_in_batches(model, labels, guidance_scale=alpha, seed=5, batch_size=NUM, rounding="down")
    return torch.cat(list(batches))


# --- one process --------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_whole_set(folder: Path, tmp_path: Path, real_images: np.ndarray) -> None:
    more = [f"reference_images={folder / 'adm.npz'}", "guidance_scales=[1.5]", "save_samples=true"]
    assert run(arguments(folder, tmp_path / "out", *more)) == 0
    found = results(tmp_path / "out")
    (row,) = found["rows"]
    images = all_samples(folder, "model", "balanced", 1.5)
    generated, logits, _ = FeatureNetwork()(images)
    real = FeatureNetwork()(torch.from_numpy(real_images).permute(0, 3, 1, 2)).features
    score = StreamedInceptionScore(NUM, num_logits=5)
    score.update(logits, first_index=0)
    assert row["fid"] == pytest.approx(frechet_distance(generated, real), rel=1e-6) and row["fid"] > 0.01
    assert (row["inception_score"], row["inception_score_std"]) == pytest.approx(score.score(), rel=1e-6)
    assert (row["precision"], row["recall"]) == precision_recall(real, generated)
    assert row["kid"] > 0 and row["kid_subset_size"] == 30
    assert (row["num"], row["num_real_images"]) == (NUM, 30)
    (npz,) = (tmp_path / "out").glob("samples-*-1.5.npz")
    with np.load(npz) as file:
        assert file["arr_0"].dtype == np.uint8
        assert np.abs(file["arr_0"].astype(int) - images.permute(0, 2, 3, 1).numpy()).max() <= 1
        assert file["labels"].tolist() == [i % CLASSES for i in range(NUM)]


def test_a_figure_carries_all_it_depends_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = f"models=[{folder / 'run' / 'model'},{folder / 'run' / 'model-0.9995'}]"
    assert run(arguments(folder, tmp_path / "out", models, "guidance_scales=[1.0,2.0]")) == 0
    printed = capsys.readouterr()
    found = results(tmp_path / "out")
    assert found["protocol"] == "release" and found["metric"] == "FID-40" and found["seed"] == 5 and found["num"] == NUM
    assert found["reference"]["sha256"] in printed.out and len(found["reference"]["sha256"]) == 64
    assert found["real_images"] is None and found["tokenizer"] is None
    assert [(row["ema_decay"], row["guidance_scale"]) for row in found["rows"]] == [
        (0.999, 1), (0.999, 2), (0.9995, 1), (0.9995, 2),
    ]  # fmt: skip
    assert len({row["model_sha256"] for row in found["rows"]}) == 2 and len({row["fid"] for row in found["rows"]}) == 4
    for row in found["rows"]:
        assert row["labels"] == "balanced: i mod 5, 8 of each class"
        assert row["sfid"] is row["precision"] is row["recall"] is row["kid"] is row["num_real_images"] is None
    best = min(found["rows"], key=lambda row: row["fid"])
    assert found["search"]["candidates"] == 4 and found["search"]["best"]["fid"] == best["fid"]
    assert "search over 4 candidates" in printed.out and "FID-40" in printed.out
    assert "FID-50k" not in printed.out + (tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8")
    assert "no mu_s and sigma_s in the reference, so no sFID" in printed.out and found["sfid"] is False
    assert "warning: 40 samples, not 50000" in printed.err


def test_adm_has_its_own_labels_its_own_real_images_and_spatial_statistics(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(folder, tmp_path / "out", *adm(folder))) == 0
    found = results(tmp_path / "out")
    (row,) = found["rows"]
    assert row["labels"].startswith("random") and row["num_real_images"] == 30 and 0 <= row["recall"] <= 1
    assert found["real_images"] == {"sha256": found["reference"]["sha256"], "num": 30}
    generated = FeatureNetwork()(all_samples(folder, "model", "random", 1.0))
    real = FeatureNetwork()(torch.from_numpy(np.load(folder / "adm.npz")["arr_0"]).permute(0, 3, 1, 2))
    assert row["fid"] == pytest.approx(frechet_distance(generated.features, real.features), rel=1e-6)
    assert row["sfid"] == pytest.approx(frechet_distance(generated.spatial, real.spatial), rel=1e-6)
    assert abs(row["sfid"] - row["fid"]) > 0.01 and found["sfid"] is True
    printed = capsys.readouterr().out
    assert f"| {row['fid']:.2f} | {row['sfid']:.2f} |" in printed and "no sFID" not in printed


def test_a_stopped_evaluation_goes_on_with_the_next_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    measure = Measurement.__call__

    def count(self: Measurement, generator: ImageGenerator, **keywords: Any) -> Any:
        if len(measured) == 1 and keywords["guidance_scale"] == 2:
            raise KeyboardInterrupt
        measured.append(keywords["guidance_scale"])
        return measure(self, generator, **keywords)

    monkeypatch.setattr(Measurement, "__call__", count)
    words = arguments(folder, tmp_path / "out", "guidance_scales=[1.0,2.0,3.0]")
    assert run(words) == 130
    assert [row["guidance_scale"] for row in results(tmp_path / "out")["rows"]] == [1]
    measured.extend(["stopped"])
    assert run(words) == 0
    assert measured == [1, "stopped", 2, 3]
    assert [row["guidance_scale"] for row in results(tmp_path / "out")["rows"]] == [1, 2, 3]


def test_latents_are_decoded_by_the_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import AutoencoderKL

    tiny_generator(2, channels=4).save_pretrained(tmp_path / "latent")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        layers_per_block=1, norm_num_groups=4, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    words = arguments(folder, tmp_path / "out", f"models=[{tmp_path / 'latent'}]", f"tokenizer={tmp_path / 'vae'}")
    assert run([*words, "save_samples=true"]) == 0
    found = results(tmp_path / "out")
    assert found["tokenizer"]["source"] == str(tmp_path / "vae") and len(found["tokenizer"]["sha256"]) == 64
    assert (
        found["rows"][0]["ema_decay"] is found["rows"][0]["images_seen"] is None
    )  # neither the folder nor a run says it
    with np.load(next((tmp_path / "out").glob("samples-*.npz"))) as file:
        assert file["arr_0"].shape == (NUM, 16, 16, 3)  # the autoencoder doubles 8 x 8
    assert run(arguments(folder, tmp_path / "other", f"models=[{tmp_path / 'latent'}]")) == 2
    assert "tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["reference=/nonexistent.npz", "models=[/nonexistent]"], ["reference", "/nonexistent.npz"]),
        (["reference_sha256=abc"], ["reference", "abc", "SHA-256"]),
        (["protocol=adm"], ["protocol=adm", "ref_mu"]),
        (["reference_images={release}"], ["reference_images", "arr_0"]),
        (["models=[/nonexistent]"], ["models", "/nonexistent"]),
        (["models=[]"], ["models"]),
        (["tokenizer=/nonexistent"], ["tokenizer", "/nonexistent"]),
        (["ema_decays=[0.9,0.8]"], ["ema_decays", "1 models", "found 2"]),
        (["num=9"], ["num", ">= 10"]),
        (["protocol=clean"], ["protocol", "release", "adm", "clean"]),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [word.replace("{release}", str(folder / "release.npz")) for word in more]
    assert run(arguments(folder, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_the_reference_comes_before_the_models_and_the_network_before_both(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # the real network, whose weights are absent
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert run(arguments(folder, tmp_path / "out")) == 2
    assert "weights-inception" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_one_evaluation(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(folder, tmp_path / "out")) == 0
    before = results(tmp_path / "out")
    assert run(arguments(folder, tmp_path / "out", "seed=6")) == 2
    assert "seed (was 5, now 6)" in capsys.readouterr().err
    assert run(arguments(folder, tmp_path / "out", "batch_size=40")) == 0  # changes nothing that is recorded
    assert results(tmp_path / "out") == before


def test_samples_asked_for_later_are_made(folder: Path, tmp_path: Path) -> None:
    assert run(arguments(folder, tmp_path / "out", "guidance_scales=[1.0,2.0]")) == 0
    before = results(tmp_path / "out")["rows"]
    assert run(arguments(folder, tmp_path / "out", "save_samples=true")) == 0
    after = results(tmp_path / "out")["rows"]
    assert sorted(after, key=lambda row: row["guidance_scale"]) == before  # the first row was made again, not twice
    assert [path.name for path in (tmp_path / "out").glob("*.npz")] == [
        f"samples-{before[0]['model_sha256'][:8]}-1.npz"
    ]


@pytest.mark.parametrize(
    ("name", "decay"), [("model-0.9998", 0.9998), ("model", None), ("run-2", None), ("latent-b", None)]
)
def test_a_decay_is_read_from_a_folders_name_or_not_at_all(name: str, decay: float | None, tmp_path: Path) -> None:
    assert program._ema_decay(tmp_path / name) == decay


# --- two processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    more = [*adm(folder), "guidance_scales=[1.5,2.0]", "save_samples=true", "num=41"]
    command = [sys.executable, worker.__file__, str(out / "stream"), *arguments(folder, out / "out", *more)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return out


def test_statistics_of_two_processes_are_those_of_one(two_processes: Path) -> None:
    alone = worker.stream(slice(0, 40))
    np.testing.assert_allclose(alone["covariance"], np.cov(worker.rows().numpy(), rowvar=False), rtol=1e-12)
    for rank in (0, 1):
        with np.load(two_processes / f"stream-{rank}.npz") as file:
            assert set(file) == set(alone)
            for name, value in alone.items():
                np.testing.assert_allclose(file[name], value, rtol=1e-12, atol=1e-14, err_msg=name)


def test_figures_of_two_processes_are_those_of_one(folder: Path, two_processes: Path, tmp_path: Path) -> None:
    more = [*adm(folder), "guidance_scales=[1.5,2.0]", "save_samples=true", "num=41"]
    assert run(arguments(folder, tmp_path / "out", *more)) == 0
    alone, together = results(tmp_path / "out"), results(two_processes / "out")
    assert {name: alone[name] for name in alone if name not in ("rows", "search")} == {
        name: together[name] for name in together if name not in ("rows", "search")
    }
    for one, two in zip(alone["rows"], together["rows"], strict=True):
        assert one.keys() == two.keys() and None not in [one[name] for name in ("sfid", "kid", "recall")]
        for name, value in one.items():
            assert two[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    names = sorted(path.name for path in (tmp_path / "out").glob("samples-*.npz"))
    assert names == sorted(path.name for path in (two_processes / "out").glob("samples-*.npz")) and len(names) == 2
    for name in names:
        with np.load(tmp_path / "out" / name) as one, np.load(two_processes / "out" / name) as two:
            assert one["arr_0"].shape == (41, 8, 8, 3)
            np.testing.assert_array_equal(one["labels"], two["labels"])
            assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1
    assert not list((two_processes / "out").glob(".tmp-*"))


# --- the release's curve ------------------------------------------------------------------------------------------


def test_the_releases_curve_is_as_published() -> None:
    assert [(step, fid) for step, _, fid in RELEASE_ABLATION] == [
        (5_000, 35.20), (10_000, 13.33), (15_000, 10.70), (20_000, 9.47), (25_000, 8.84), (30_000, 8.34),
    ]  # fmt: skip


def test_ours_stands_beside_the_release_at_the_same_number_of_images() -> None:
    ours = {10_000 * 4096: IntermediateFid(14.0, 2.5, 50_000), 1_000_000: IntermediateFid(200.0, 1.0, 5_000)}
    lines = release_ablation_table(ours).splitlines()
    assert len(lines) == 2 + 6 + 1 and len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| 1.00 M | | | | 1 | 200.00 (FID-5k) |"
    assert lines[4] == "| 40.96 M | 10k | 2.5 | 13.33 | 2.5 | 14.00 |"


def test_snapshots_of_a_training_stand_beside_the_release(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = tmp_path / "run" / SNAPSHOTS
    tiny_generator(0).save_pretrained(snapshots / f"{5_000 * 4096:012d}")
    tiny_generator(1).save_pretrained(snapshots / f"{10_000 * 4096:012d}")
    (tmp_path / "run" / "config.yaml").write_text("ema_decays: [0.99]\n", encoding="utf-8")
    assert run(arguments(folder, tmp_path / "out", f"models=[{snapshots}]", "guidance_scales=[1.0,4.0]")) == 0
    rows = results(tmp_path / "out")["rows"]
    assert [(row["images_seen"], row["guidance_scale"], row["ema_decay"]) for row in rows] == [
        (20_480_000, 1, 0.99), (20_480_000, 4, 0.99), (40_960_000, 1, 0.99), (40_960_000, 4, 0.99),
    ]  # fmt: skip
    best = min(rows[:2], key=lambda row: row["fid"])
    assert intermediate_fids(rows)[20_480_000] == (best["fid"], best["guidance_scale"], NUM)
    line = f"| 20.48 M | 5k | 3.5 | 35.20 | {best['guidance_scale']:g} | {best['fid']:.2f} (FID-40) |"
    assert line in capsys.readouterr().out
