"""Rows G1, G2: the first signal waits for the step, the second Ctrl-C does not."""

import os
import signal
import time
from pathlib import Path

import pytest
from killing import kill_when, start, stop_slowly, wait_until

from driftfield.training import StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_the_first_signal_is_noted(number: int, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop.requested and stop.exit_code == 0
        send(number)
        assert stop.requested and stop.exit_code == code
    said = capfd.readouterr().err
    assert said.strip().count("\n") == 0 and signal.Signals(number).name in said


def test_a_second_ctrl_c_is_immediate() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert stop.exit_code == 130


def test_a_second_sigterm_does_not_disturb_the_saving(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        send(signal.SIGINT)  # the first Ctrl-C
    assert stop.exit_code == 143
    assert capfd.readouterr().err.count("stopping") == 1


def test_the_handlers_before_come_back() -> None:
    seen: list[int] = []
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    old = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with pytest.raises(ZeroDivisionError), StopRequest():
            raise ZeroDivisionError
        send(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert seen == [signal.SIGUSR1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_ctrl_c_twice_ends_a_process_in_the_middle_of_its_save(tmp_path: Path) -> None:
    process = start(stop_slowly, tmp_path)
    wait_until(process, (tmp_path / "started").exists)
    os.kill(process.pid or 0, signal.SIGINT)
    begin = time.monotonic()
    assert kill_when(process, (tmp_path / "saving").exists, signal.SIGINT) not in (
        0,
        130,
    )  # an error, not the save's end
    assert time.monotonic() - begin < 30
