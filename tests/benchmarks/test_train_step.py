"""`python -m benchmarks.train_step`: a real step of a published experiment, small, and its figures."""

import json
from pathlib import Path

from benchmarks import train_step as program
from benchmarks.train_step import BenchmarkConfig
from driftfield.training import run_program

SMALL = (
    "generator.hidden_size=32", "generator.depth=1", "generator.num_heads=2", "labels_per_step=2", "labels_at_once=1",
    "generated_per_label=4", "positives_per_label=4", "unconditional_per_label=2", "compile=false", "bfloat16=false",
)  # fmt: skip


def test_a_step_of_the_ablation_is_measured(tmp_path: Path) -> None:
    overrides = ",".join(f"'{word}'" for word in SMALL)
    words = ["experiments=[ablation]", f"overrides=[{overrides}]", "steps=1", "encoder=", "device=cpu"]
    ended = run_program(
        program.main,
        BenchmarkConfig,
        config_dir=program.CONFIG_DIR,
        config_name="train_step",
        description="",
        arguments=[*words, f"out={tmp_path / 'figures.json'}"],
    )
    assert ended == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    (row,) = figures["rows"]
    assert row["images_per_step"] == 8 and row["labels_at_once"] == 1 and row["statistics"] == "batch"
    assert abs(row["images_per_s"] * row["step_s"] - 8) < 1e-9
    assert 0 < row["teraflops"] < figures["product_teraflops"]
    assert abs(row["hours_of_the_run"] - 122_880_000 / 8 * row["step_s"] / 3600) < 1e-6 * row["hours_of_the_run"]
