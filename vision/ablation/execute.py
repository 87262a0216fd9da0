"""Run the commands of runs, several at once, until all have ended or a stop is requested."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from driftfield.training import RunFolder, Stopped, StopRequest
from vision.ablation.plan import PROGRAMS, Run

POLL_S: Final = 0.1


def execute(runs: Sequence[Run], workers: int, stop: StopRequest, done: Callable[[Run, str | None], None]) -> None:
    """Run the commands of each run, `workers` runs at once.

    Args:
        runs: what to run.
        workers: how many at once.
        stop: a request is passed on to what runs, which saves itself.
        done: called after each run with what its failed command said last, or None.

    Raises:
        Stopped: a stop was requested.
        UserError: a run's folder is in use by another process or can't be written.
    """
    waiting = list(reversed(runs))
    running: list[tuple[Run, Iterator[int | None]]] = []
    processes: list[subprocess.Popen[bytes]] = []
    try:
        while (waiting and not stop.requested) or running:
            while waiting and len(running) < workers and not stop.requested:
                run = waiting.pop()
                running.append((run, _steps(run, workers, processes)))
            still_running = []
            for run, steps in running:
                code = next(steps)
                if code is None:
                    still_running.append((run, steps))
                elif not stop.requested:
                    done(run, None if code == 0 else _last_words(run.log, code))
            running = still_running
            if stop.requested:
                _terminate(processes)
            time.sleep(POLL_S)
    finally:
        _terminate(processes)
        for process in processes:
            process.wait()
    if stop.requested:
        raise Stopped


def _steps(run: Run, workers: int, processes: list[subprocess.Popen[bytes]]) -> Iterator[int | None]:
    """The exit code of a run's commands, None while they run."""
    with RunFolder(run.folder, run.config, may_change=PROGRAMS[run.program].may_change):
        pass  # what is wrong with the folder is no failure of the row
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if workers > 1:  # threads of one process wait for those of another where there are more of them than cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    code = 0
    for program, *words in run.commands:
        process = _start([sys.executable, "-m", program, *words], run.log, environment)
        processes.append(process)
        while process.poll() is None:
            yield None
        processes.remove(process)
        code = process.returncode
        if code != 0:
            break
    yield code


def _start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def _terminate(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()


def _last_words(log: Path, code: int) -> str:
    """What a failed command said: its error in one sentence, or its last line."""
    if code < 0:
        return f"killed by signal {-code}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1]
