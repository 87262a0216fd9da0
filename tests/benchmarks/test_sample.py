"""`python -m benchmarks.sample`: it measures the published networks, and its table says what was measured."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import sample as program
from benchmarks.sample import BenchmarkConfig, build, slowest, table
from driftfield.training import load_config, run_program


def configured(*words: str) -> BenchmarkConfig:
    return load_config(BenchmarkConfig, config_dir=program.CONFIG_DIR, config_name="sample", overrides=words)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "decoder", "generator_millions", "decoder_parameters"),
    [
        ("B/2", "vae", 133, 83_653_863),  # of stabilityai/sd-vae-ft-mse, encoder included
        ("L/2", "tiny", 463, 1_222_531),  # of madebyollin/taesd's decoder
        ("B/16", "vae", 134, None),
        ("L/16", "vae", 464, None),
    ],
)
def test_the_networks_have_the_published_sizes(
    size: str, decoder: str, generator_millions: int, decoder_parameters: int | None
) -> None:
    with torch.device("meta"):
        model, decoding = build(configured(f"size={size}", f"decoder={decoder}"), torch.device("meta"))
    assert round(parameters(model) / 1e6) == generator_millions
    assert (None if decoding is None else parameters(decoding)) == decoder_parameters


@pytest.mark.parametrize("decoder", ["vae", "tiny"])
def test_the_program_prints_and_writes_its_table(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "SHORTEST_S", 0.01)
    words = [f"out={tmp_path / 'new' / 'a.json'}", "num=6", "batch_size=4", "device=cpu", f"decoder={decoder}"]
    assert 0 == run_program(
        program.main,
        BenchmarkConfig,
        config_dir=program.CONFIG_DIR,
        config_name="sample",
        description="",
        arguments=words,
    )
    written = json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8"))
    rates = written["images_per_second"]
    assert list(rates) == ["noise", "generator", "decoder", "PNG files", "end to end"]
    assert all(rate > 0 for rate in rates.values())
    assert table(rates) in capsys.readouterr().out
    assert (written["num"], written["decoder"]) == (6, decoder)


def test_the_share_is_of_the_slowest_part() -> None:
    rates = {"generator": 400.0, "decoder": 200.0, "end to end": 180.0}
    assert slowest(rates) == ("decoder", 0.9)
    assert table(rates).splitlines()[-1] == "| end to end / decoder | 0.90 |"
