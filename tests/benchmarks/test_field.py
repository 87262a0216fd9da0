"""`python -m benchmarks.field`: its forms compute one loss, its floors are those of the goals, a failure is a cell."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import field as program
from benchmarks.field import Case, LossFunction, Rates, errors, loss_function, table
from driftfield.training import run_program
from driftfield.training.errors import UserError

CPU = torch.device("cpu")
WORDS = ("many=[2x16xfloat32,2x16xbfloat16]", "few=[40x8xfloat32]", "repeats=1", "device=cpu")


def run(tmp_path: Path, *words: str) -> dict[str, Any]:
    ended = run_program(
        program.main,
        program.BenchmarkConfig,
        config_dir=program.CONFIG_DIR,
        config_name="field",
        description="",
        arguments=[*WORDS, *words, f"out={tmp_path / 'new' / 'a.json'}"],
    )
    assert ended == 0
    written: dict[str, Any] = json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8"))
    return written


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "PRODUCT_SIZE", {"cpu": 64})
    monkeypatch.setattr(program, "COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(program, "STRIPS_MIB", {"cpu": 0.05})


def test_the_program_prints_and_writes_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(tmp_path, "forms=[eager,strips,plain]")
    rows = [row for table_of in written["tables"].values() for row in table_of]
    assert [(row["case"], row["form"]) for row in rows] == [
        (case, form)
        for case in (
            "2 x (64 + 64 + 16) x 16, float32",
            "2 x (64 + 64 + 16) x 16, bfloat16",
            "1 x (40 + 40) x 8, float32",
        )
        for form in ("eager", "strips", "plain")
    ]
    for row in rows:
        assert row["forward_ms"] > 0 and row["both_ms"] > 0 and row["peak_gib"] is None
        assert row["floor_ms"] >= row["fastest_floor_ms"] > 0
        # The gradient to bfloat16 samples is rounded to bfloat16: half of 2^-8, at most.
        assert row["loss_error"] < 1e-4 and row["gradient_error"] < (1e-4 if row["dtype"] == "float32" else 2e-3)
    printed = capsys.readouterr().out
    assert all(table(rows_of) in printed for rows_of in written["tables"].values())


def test_what_cannot_run_says_why_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(form: program.Form, *case: Any) -> LossFunction:
        def exhausted(batch: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 550 GiB")

        return exhausted if form == "eager" else loss_function(form, *case)

    monkeypatch.setattr(program, "loss_function", failing)
    failed, plain = run(tmp_path, "forms=[eager,plain]", "many=[]")["tables"]["few large groups"]
    assert {failed[name] for name in ("forward_ms", "both_ms", "loss_error", "gradient_error")} == {"out of memory"}
    assert plain["both_ms"] > 0
    cells = table([failed]).splitlines()[-1].split(" | ")
    assert cells[2:7] == ["out of memory", "-", "-", "-", "-"] and cells[8:] == ["-", "- |"]


def test_the_kernels_say_that_they_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # else they run in Python
    case = Case.of_few("4x2xfloat32")
    with pytest.raises(ValueError, match="x is on cpu, expected a CUDA device"):
        loss_function("fused", case, CPU)(case.batch(CPU))


def test_the_errors_of_a_wrong_loss_are_seen() -> None:
    case = Case.of_many("1x4xfloat32")
    right = loss_function("plain", case, CPU)
    found = errors(lambda batch: 1.1 * right(batch), case, CPU)
    assert found == pytest.approx({"loss_error": 0.1, "gradient_error": 0.1}, rel=1e-2)


def test_the_floors_are_those_of_the_goals() -> None:
    # One H100: 3.01 TB/s; 402 TFLOP/s in TF32, 766 in bfloat16.
    reached = Rates(copy_terabytes=3.01, float32_teraflops=402, bfloat16_teraflops=766)
    small = reached.floors(Case.of_many("4096x256xfloat32"))
    assert round(small["floor_ms"], 2) == 0.29  # 0.87 GB
    assert round(reached.floors(Case.of_many("4096x2048xfloat32"))["floor_ms"], 1) == 2.3
    large = Case.of_few("16384x1024xfloat32")
    assert round(large.operations / 1e12, 1) == 4.4
    assert [round(floor) for floor in reached.floors(large).values()] == [11, 6]


@pytest.mark.parametrize("text", ["4096x256", "4096x256xfloat16", "ax256xfloat32", "1x2x3xfloat32", "-1x2xfloat32"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected sizes as 4096x256xfloat32"):
        Case.of_many(text)


def test_a_reason_is_short() -> None:
    assert program.reason(ValueError("needs CUDA\nand more")) == "needs CUDA"
    assert program.reason(RuntimeError("a" * 100)) == "a" * 77 + "..."
    assert program.reason(RuntimeError()) == "RuntimeError"
    assert program.reason(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")) == "out of memory"
