"""`python -m benchmarks.features`: its forms compute the same moments, its floors count what has to be moved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import features as program
from benchmarks.features import Case, error, moments_function, table
from driftfield.training import run_program
from driftfield.training.errors import UserError

CPU = torch.device("cpu")


def run(tmp_path: Path, *words: str) -> dict[str, Any]:
    ended = run_program(
        program.main,
        program.BenchmarkConfig,
        config_dir=program.CONFIG_DIR,
        config_name="features",
        description="",
        arguments=["repeats=1", "device=cpu", *words, f"out={tmp_path / 'new' / 'a.json'}"],
    )
    assert ended == 0
    written: dict[str, Any] = json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8"))
    return written


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "COPY_BYTES", {"cpu": 1 << 16})


def test_the_program_prints_and_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(tmp_path, "forms=[eager,plain]")
    rows = written["rows"]
    assert [(row["side"], row["layout"], row["form"]) for row in rows] == [
        (side, layout, form) for side in (16, 8) for layout in ("last", "first") for form in ("eager", "plain")
    ]
    for row in rows:
        assert 0 < row["forward_ms"] and 0 < row["both_ms"] and row["forward_floor_ms"] < row["both_floor_ms"]
        # The gradient of a bfloat16 map is rounded to bfloat16: half of 2^-8, at most.
        assert row["error"] < (1e-5 if row["dtype"] == "float32" else 2e-3)
    assert table(rows) in capsys.readouterr().out


@pytest.mark.parametrize("form", ["fused", "eager", "plain"])
@pytest.mark.parametrize("layout", ["last", "first"])
def test_every_form_computes_the_moments(form: program.Form, layout: str) -> None:
    assert error(moments_function(form), Case(1, 3, 8, "float32"), layout, CPU) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the compiler's own
def test_compiled_computes_the_moments() -> None:
    assert error(moments_function("compiled"), Case(1, 3, 8, "float32"), "last", CPU) < 1e-5


def test_what_cannot_run_says_why_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = run(tmp_path, "maps=[1x2x4xfloat32]", "channels=[last]", "forms=[fused,eager]")["rows"]
    assert "expected a map on a GPU, found one on cpu" in rows[0]["problem"] and "problem" not in rows[1]
    assert "expected a map on a GPU" in table(rows)


def test_floors_count_the_map_and_its_moments() -> None:
    case = Case.of("2x8x4xbfloat16")
    assert case.bytes == 2 * 8 * 16 * 2
    assert case.bytes_of_moments == 2 * 8 * (4 + 1 + 1) * 2 * 4
    assert case.bytes_both - case.bytes_forward == 2 * case.bytes + 2 * case.bytes_of_moments


@pytest.mark.parametrize("text", ["256x512x16", "256x512x16xfloat64", "2x2x2x2xfloat32", "axbxcxfloat32"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="maps: expected sizes as 256x512x16xfloat32"):
        Case.of(text)
    with pytest.raises(UserError, match="maps: expected a side that patches of 4 tile, found 6"):
        Case.of("1x1x6xfloat32")
