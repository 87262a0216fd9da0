"""`python -m benchmarks.loss_curves`: a fast and a plain training beside each other, small."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import loss_curves as program
from benchmarks.loss_curves import CURVES, CurvesConfig
from driftfield.training import run_program

SMALL = (
    "generator.hidden_size=32", "generator.depth=1", "generator.num_heads=2", "labels_per_step=2", "labels_at_once=2",
    "generated_per_label=4", "positives_per_label=4", "unconditional_per_label=2", "compile=false", "bfloat16=false",
    "images=80", "warmup_images=8", "learning_rate=1e-2",
)  # fmt: skip


def curves(tmp_path: Path, plain: str, *both: str) -> dict[str, Any]:
    overrides = ",".join(f"'{word}'" for word in (*SMALL, *both))
    out = tmp_path / "curves.json"
    ended = run_program(
        program.main,
        CurvesConfig,
        config_dir=program.CONFIG_DIR,
        config_name="loss_curves",
        description="",
        arguments=[
            f"overrides=[{overrides}]",
            f"plain=[{plain and repr(plain)}]",
            "steps=3",
            "encoder=",
            "device=cpu",
            f"out={out}",
        ],
    )
    assert ended == 0
    return json.loads(out.read_text(encoding="utf-8"))["curves"]


def test_equal_settings_give_equal_curves(tmp_path: Path) -> None:
    found = curves(tmp_path, "")
    for name in CURVES:
        assert len(found["plain"][name]) == 3 and found["as set"][name] == found["plain"][name]
    assert len(set(found["plain"]["lambda"])) == 3  # it trains
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("as_set", "plain", "bound"),
    [
        ("labels_at_once=1", "labels_at_once=2", 1e-3),  # in pieces, by the statistics of the whole batch
        ("bfloat16=true", "bfloat16=false", 2e-2),  # 8 bits
    ],
)
def test_a_step_made_otherwise_learns_the_same(tmp_path: Path, as_set: str, plain: str, bound: float) -> None:
    found = curves(tmp_path, plain, as_set)
    assert found["as set"]["lambda"] != found["plain"]["lambda"]
    for fast, reference in zip(found["as set"]["lambda"], found["plain"]["lambda"], strict=True):
        assert abs(fast - reference) <= bound * reference
