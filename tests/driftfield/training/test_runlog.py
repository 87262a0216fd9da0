"""Row G7: the log is always there and always readable, whatever becomes of its further readers."""

import json
import logging
import math
import os
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from driftfield.training import RunLog, UserError, read_log


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_log(path)]


def log_steps(directory: Path, steps: range, resume_step: int | None = None) -> None:
    with RunLog(directory, resume_step) as log:
        for step in steps:
            log.log(step, samples_seen=64 * step, loss=1 / step)


def test_one_json_line_per_call_written_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log(1, samples_seen=64, loss=0.25, drift_norm=torch.tensor(2.0), count=3)
        text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 1
    line = json.loads(text)
    when = datetime.fromisoformat(line.pop("time"))
    assert when.utcoffset() == timedelta(0)
    assert line == {"step": 1, "samples_seen": 64, "loss": 0.25, "drift_norm": 2.0, "count": 3.0}


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log(1, samples_seen=64, a=math.nan, b=math.inf, c=-math.inf)
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    json.loads(text, parse_constant=pytest.fail)
    line = read_log(log.path)[0]
    assert math.isnan(line["a"]) and (line["b"], line["c"]) == (math.inf, -math.inf)


def test_a_resume_drops_later_lines_and_goes_on(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log_steps(tmp_path, range(5, 7), resume_step=4)
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:4] == before[:4]


def test_a_run_without_a_checkpoint_starts_its_log_anew(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 8))
    log_steps(tmp_path, range(1, 3))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_kill_at_any_byte_of_the_last_line(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert steps_of(path) == [1, 2]
        log_steps(tmp_path, range(3, 4), resume_step=3)
        assert steps_of(path) == [1, 2, 3]


@pytest.mark.parametrize("line", ["{", "[1]", "5", '{"loss": 1}', '{"step": "x"}', ""])
def test_a_broken_line_elsewhere_is_named(tmp_path: Path, line: str) -> None:
    log_steps(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape("metrics.jsonl, line 1: expected a JSON object with a step")):
        read_log(path)


class Recorder:
    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.fails_at, self.closed = fails_at, False

    def write(self, step: int, values: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.seen.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_a_writer_gets_every_value(tmp_path: Path) -> None:
    writer = Recorder()
    with RunLog(tmp_path, writers=[writer]) as log:
        log.log(1, samples_seen=64, loss=0.5)
    assert writer.seen == [(1, {"loss": 0.5, "samples_seen": 64})] and writer.closed


def test_a_writer_that_fails_is_left_out_after_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Recorder(fails_at=2)
    with RunLog(tmp_path, writers=[writer]) as log, caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            log.log(step, samples_seen=step, loss=1.0)
    assert [step for step, _ in writer.seen] == [1]
    assert len(caplog.records) == 1 and "Recorder failed" in caplog.text and "the server is gone" in caplog.text
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_writer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in [module for module in sys.modules if module.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {name}") as refused:
        RunLog(tmp_path, writers=[name])
    assert "\n" not in str(refused.value)


def test_an_unknown_writer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of tensorboard, wandb; found 'tensorbaord'"):
        RunLog(tmp_path, writers=["tensorbaord"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorboard
def test_tensorboard_shows_the_values_and_a_resume_continues_the_curve(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps, resume_step in ((range(1, 6), None), (range(4, 8), 3)):
        with RunLog(tmp_path, resume_step, writers=["tensorboard"]) as log:
            for step in steps:
                log.log(step, samples_seen=64 * step, loss=1 / step)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 8)
    ]


class FakeWandb(SimpleNamespace):
    """Stands in for the service: remembers what it is asked for."""

    def __init__(self) -> None:
        super().__init__(asked=[], logged=[], down=False)

    def init(self, **options: Any) -> "FakeWandb":
        if self.down:
            raise ConnectionError("no route to the service")
        self.asked.append(options)
        self.id = options["id"] or "abc123"
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.logged.append("finished")


def test_wandb_continues_its_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume_step in (None, 1):
        with RunLog(tmp_path, resume_step, writers=["wandb"]) as log:
            log.log(2, samples_seen=64, loss=0.5)
    assert [(asked["id"], asked["resume"]) for asked in wandb.asked] == [(None, "allow"), ("abc123", "allow")]
    assert wandb.logged == [(2, {"loss": 0.5, "samples_seen": 64}), "finished"] * 2


def test_a_service_that_is_down_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = FakeWandb()
    wandb.down = True
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with RunLog(tmp_path, writers=["wandb"]) as log:
        log.log(1, samples_seen=64, loss=0.5)
    assert len(caplog.records) == 1 and "no route to the service" in caplog.text
    assert steps_of(tmp_path / "metrics.jsonl") == [1]


def test_a_folder_that_is_none_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"log /dev/null/metrics\.jsonl can't be written: Not a directory"):
        RunLog("/dev/null")


def test_a_disk_that_fills_up_ends_the_run_in_one_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RunLog(tmp_path)
    with open("/dev/full", "w", encoding="utf-8") as full:
        os.dup2(full.fileno(), log._file.fileno())
    with pytest.raises(UserError, match=r"metrics\.jsonl can't be written: No space left on device"), log:
        log.log(1, samples_seen=1, loss=1.0)
