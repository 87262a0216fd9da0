"""`python -m vision.curve`: the models that a run has kept, judged, beside its log."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from driftfield.training import read_log, run_program
from vision import curve, train
from vision.config import CONFIG_DIR, TrainConfig
from vision.curve import CurveConfig, rank_correlation

TINY = (
    "images=480", "labels_per_step=3", "generated_per_label=4", "positives_per_label=6", "unconditional_per_label=2",
    "queue.push_per_step=8", "warmup_images=24", "checkpoint_every_images=480", "log_every_images=24",
    "picture_every_images=480", "snapshot_every_images=120", "evaluate_images=100", "encoder.features=''",
    "generator.hidden_size=16", "generator.num_heads=2", "generator.cond_size=16", "generator.depth=1",
    "judge.epochs=1", "device=cpu",
)  # fmt: skip


def run(*arguments: str) -> int:
    return run_program(
        curve.main, CurveConfig, config_dir=CONFIG_DIR, config_name="curve", description="", arguments=arguments
    )


def test_points_are_the_kept_models_and_the_log_between_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = [*TINY, f"run_dir={folder}", f"judge.folder={tmp_path / 'judges'}"]
    ended = run_program(
        train.main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description="", arguments=words
    )
    assert ended == 0
    assert run(f"run_dir={folder}", "num=100", "device=cpu") == 0
    points = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    assert [point["images_seen"] for point in points] == [0, 120, 240, 360, 480]
    assert points[0]["loss"] is None and points[0]["drift_norm"] is None
    log = read_log(folder / "metrics.jsonl")
    for point in points[1:]:
        since = [line for line in log if point["images_seen"] - 120 < line["samples_seen"] <= point["images_seen"]]
        assert len(since) == 5
        assert point["loss"] == pytest.approx(np.mean([line["loss"] for line in since]))
        assert np.log(point["drift_norm"]) == pytest.approx(np.mean(np.log([line["lambda"] for line in since])))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert points[-1]["evaluation"] == results["evaluation"]  # the last kept model is the finished one
    assert points[0]["evaluation"]["frechet"] != points[-1]["evaluation"]["frechet"]
    with Image.open(folder / "curve.png") as picture:
        picture.load()
    assert "rank correlation with the Fréchet distance" in capsys.readouterr().out


def test_run_without_kept_models_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"run_dir={tmp_path}") == 2
    assert "config.yaml" in capsys.readouterr().err


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20)
    assert rank_correlation(list(a), list(b)) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
