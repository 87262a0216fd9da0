"""`python -m benchmarks.policy_latency`: it times what its table says, and the networks export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import policy_latency as program
from benchmarks.policy_latency import BenchmarkConfig, build, inputs, methods, percentiles, prepare, ratios
from driftfield.training import run_program
from policy.diffusion import ActionDenoiser
from policy.unet1d import ConditionalUnet1D

CPU = torch.device("cpu")


def test_the_program_prints_and_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    words = ["networks=[tiny]", "rounds=2", "threads=1", "device=cpu", f"out={tmp_path / 'new' / 'a.json'}"]
    try:
        ended = run_program(
            program.main,
            BenchmarkConfig,
            config_dir=program.CONFIG_DIR,
            config_name="policy_latency",
            description="",
            arguments=words,
        )
    finally:
        torch.set_num_threads(threads)
    assert ended == 0
    written = json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8"))
    (row,) = written["rows"]
    assert (row["network"], row["form"], written["machine"]) == ("tiny", "eager", "CPU, 1 threads")
    assert [row[method]["chunks"] for method in ("drifting", "ddpm", "ddim")] == [200, 2, 12]
    assert all(0 < row[method]["p50_ms"] <= row[method]["p95_ms"] for method in ("drifting", "ddpm", "ddim"))
    # 100 evaluations take at least 50 times as long as one: the promise of the method.
    assert row["ddpm_over_drifting"] > 50 and row["ddpm_over_drifting"] > row["ddim_over_drifting"] > 8
    assert program.table(written["rows"]) in capsys.readouterr().out


def test_each_method_evaluates_the_network_as_often_as_it_says() -> None:
    calls: list[int] = []

    def count(x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        calls.append(int(step))
        return x

    makers = methods(count, inputs(CPU))
    assert set(makers) == set(program.EVALUATIONS)
    for method, make in makers.items():
        calls.clear()
        assert make().shape == (1, 16, 2)
        assert len(calls) == program.EVALUATIONS[method]
    assert calls[-1] == 0


@pytest.mark.parametrize(("name", "millions"), [("small", 4.2), ("66M", 65.8)])
def test_the_networks_have_the_sizes_of_their_names(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = build(name, torch.device("meta"))
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions


def test_the_network_exports_to_a_graph_that_computes_the_same() -> None:
    network, given = build("tiny", CPU), inputs(CPU)
    exported = torch.export.export(network, given).module()
    torch.testing.assert_close(exported(*given), network(*given))


def test_a_form_that_cannot_run_says_why_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(network: ConditionalUnet1D, form: program.Form, *more: Any) -> ActionDenoiser:
        if form == "compile":
            raise RuntimeError("no C++ compiler found\nand more")
        return prepare(network, form, *more)

    monkeypatch.setattr(program, "prepare", failing)
    failed, eager = program.measure("tiny", ["compile", "eager"], 2, CPU)
    assert failed["failure"] == "no C++ compiler found" and eager["drifting"]["p50_ms"] > 0
    assert "| compile | no C++ compiler found | - |" in program.table([failed, eager])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["compile", "export"])
def test_a_compiled_network_computes_the_same(form: program.Form, tmp_path: Path) -> None:
    network, given = build("tiny", CPU), inputs(CPU)
    with torch.no_grad():
        compiled = prepare(network, form, tmp_path, given)
        torch.testing.assert_close(compiled(*given), network(*given), rtol=1e-4, atol=1e-5)


def test_percentiles_are_of_milliseconds() -> None:
    figures = percentiles([step / 1000 for step in range(101)])
    assert figures == pytest.approx({"p50_ms": 50, "p95_ms": 95, "chunks": 101})


def test_the_ratio_is_of_the_medians() -> None:
    figures = {
        method: {"p50_ms": ms, "p95_ms": 2 * ms} for method, ms in (("drifting", 2.0), ("ddpm", 220.0), ("ddim", 34.0))
    }
    assert ratios(figures) == {"ddpm_over_drifting": 110.0, "ddim_over_drifting": 17.0}
