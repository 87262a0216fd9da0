"""A model spread over two processes is trained, saved and resumed as a whole one is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from driftfield.training import Update, read_checkpoint
from driftfield.training.pretrained import read_model_name, read_weights

from .sharding_worker import DECAYS, EXAMPLES, STEPS, Training, parts

WORKER = Path(__file__).parent / "sharding_worker.py"


class Runs(NamedTuple):
    folder: Path  # of what the sharded ones wrote
    whole: Training  # alone, not sharded
    norms: list[float]  # of its gradients
    reports: list[dict[str, Any]]  # of each process


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, whole = tmp_path_factory.mktemp("sharding"), Training(sharded=False)
    norms = [whole.step()]
    whole.save(folder / "start", 1)
    norms += [whole.step() for _ in range(1, STEPS)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    reports = [json.loads((folder / f"report-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return Runs(folder, whole, norms, reports)


def assert_same(found: dict[str, dict[str, Tensor]], update: Update) -> None:
    expected = update.tensors()
    assert found.keys() == expected.keys()
    for group in expected:
        assert found[group].keys() == expected[group].keys()
        for name, tensor in expected[group].items():
            torch.testing.assert_close(found[group][name], tensor, rtol=1e-4, atol=1e-6, msg=f"{group}/{name}")


def test_each_process_holds_its_part_of_everything(runs: Runs) -> None:
    held = [report["numbers"] for report in runs.reports]
    assert sum(held) == parts(runs.whole) and max(held) < 0.75 * sum(held)


def test_gradients_and_steps_are_those_of_a_whole_model(runs: Runs) -> None:
    for report in runs.reports:
        assert report["norms"] == pytest.approx(runs.norms, rel=1e-5)
    loaded = read_checkpoint(runs.folder / "sharded")
    assert loaded is not None
    assert_same(loaded.tensors, runs.whole.update)


def test_a_gradient_that_is_not_finite_changes_nothing_anywhere(runs: Runs) -> None:
    assert [(report["rejected"], report["unchanged"]) for report in runs.reports] == [("nan", True)] * 2


def test_a_sharded_model_goes_on_from_the_checkpoint_of_a_whole_one(runs: Runs) -> None:
    loaded = read_checkpoint(runs.folder / "resumed")
    assert loaded is not None
    assert_same(loaded.tensors, runs.whole.update)


def test_a_whole_model_goes_on_from_the_checkpoint_of_a_sharded_one(runs: Runs) -> None:
    resumed = Training(sharded=False)
    assert resumed.restore(runs.folder / "sharded") == STEPS
    assert resumed.update.rejected == 1
    straight = Training(sharded=False)
    for _ in range(STEPS + 1):
        straight.step()
    resumed.step()
    assert_same(resumed.update.tensors(), straight.update)


def test_an_average_is_written_and_computed_with_as_a_whole(runs: Runs) -> None:
    assert read_model_name(runs.folder / "model") == "Sequential"
    written = read_weights(runs.folder / "model", lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))
    for name, tensor in runs.whole.ema.weights(DECAYS[1]).items():
        torch.testing.assert_close(written.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        averaged, own = written(EXAMPLES).flatten(), runs.whole.model(EXAMPLES).flatten()
    for report in runs.reports:  # and the model's own weights are back afterwards, in every process
        torch.testing.assert_close(torch.tensor(report["averaged"]), averaged, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.tensor(report["own"]), own, rtol=1e-4, atol=1e-6)
    assert (averaged - own).abs().max() > 1e-3
