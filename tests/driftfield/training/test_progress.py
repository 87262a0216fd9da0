"""A bar on a terminal, plain lines elsewhere."""

import io
import re
import time

import pytest

from driftfield.training import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the test moves: ``clock[0]`` in seconds."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_come_in_intervals_and_tell_speed_and_time_left(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(10_000, initial=2_000, every_s=10, stream=stream) as progress:
        for _ in range(25):
            clock[0] += 1
            progress.update(100, lambda_=0.12345, loss=6.5)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "3000/10000 images, 100 images/s, 1:10 left, lambda 0.123, loss 6.5",
        "4000/10000 images, 100 images/s, 1:00 left, lambda 0.123, loss 6.5",
        "4500/10000 images, 100 images/s, 0:55 left, lambda 0.123, loss 6.5",
    ]


def test_hours(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(7_384, unit="episodes", stream=stream) as progress:
        clock[0] += 1
        progress.update(1)
    assert stream.getvalue() == "1/7384 episodes, 1 episodes/s, 2:03:03 left\n"


def test_nothing_done_says_nothing() -> None:
    stream = io.StringIO()
    Progress(10, stream=stream).close()
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress(200, initial=50, stream=stream) as progress:
        progress.update(150, lambda_=0.5)
    assert re.search(r"100%.*200/200.*images/s.*lambda=0\.5", stream.getvalue().replace("\r", "\n"))
