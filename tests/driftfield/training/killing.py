"""Processes to be killed: forked from a server that has imported torch once."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftfield.training import Checkpoint, CheckpointError, RunFolder, RunFolderError, StopRequest
from driftfield.training.faults import VARIABLE

_context = multiprocessing.get_context("forkserver")
# A first optimizer step imports torch._dynamo, which takes seconds.
_context.set_forkserver_preload(["torch._dynamo", "driftfield.training"])


def start(function: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseProcess:
    """Begin a function of an importable module in a process of its own."""
    process = _context.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def finish(process: BaseProcess, timeout_s: float = 60.0) -> int:
    """Wait for the end and return the exit code: minus the signal for a kill."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"the process did not end in {timeout_s} s")
    return process.exitcode


def run_to_end(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run a function in a process of its own and return its exit code."""
    return finish(start(function, *args, **kwargs))


def kill_when(process: BaseProcess, condition: Callable[[], bool], number: int = signal.SIGKILL) -> int:
    """Signal a process as soon as a condition holds, and return its exit code."""
    wait_until(process, condition)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)
    return finish(process)


def wait_until(process: BaseProcess, condition: Callable[[], bool]) -> None:
    """Wait for a condition, or for the end of the process that should bring it about."""
    while not condition() and process.is_alive():
        time.sleep(0.0005)


def lines_in(path: Path) -> int:
    """Number of whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def save_with_fault(directory: Path, step: int, fault: str, file_limit: int | None = None) -> None:
    """Save a checkpoint whose every number is its step, under a fault; a refusal is left in ``refusal.txt``."""
    os.environ[VARIABLE] = fault
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        Checkpoint(directory).save(step, numbered_tensors(step), {"step": step})
    except CheckpointError as error:
        (directory.parent / "refusal.txt").write_text(str(error), encoding="utf-8")


def numbered_tensors(step: int) -> dict[str, dict[str, Tensor]]:
    """Tensors of a checkpoint that tells its step from each of its numbers."""
    model = {"weight": torch.full((50, 3), float(step)), "bias": torch.full((3,), step, dtype=torch.bfloat16)}
    return {"model": model, "ema": {"weight": model["weight"] / 2}, "rank-00000": {"queue": torch.full((7,), step)}}


def hold(folder: Path, *, fork: bool = False) -> None:
    """Open a run's folder and stay, together with a child if asked for, whose process id goes to ``child.txt``."""
    with RunFolder(folder, {}):
        child = os.fork() if fork else 0
        if child:
            (folder.parent / "child.txt").write_text(str(child), encoding="utf-8")
        if child or not fork:
            (folder.parent / "held").touch()
        time.sleep(60)


def open_without_permission(folder: Path) -> None:
    """Try to open a run's folder as nobody, if this is root's process; the refusal is left in ``refusal.txt``."""
    answer = os.open(folder.parent / "refusal.txt", os.O_WRONLY | os.O_CREAT)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        RunFolder(folder, {})
    except RunFolderError as error:
        os.write(answer, str(error).encode())


def stop_slowly(folder: Path) -> None:
    """A training without training: wait for a request to stop, then save for a long time."""
    with StopRequest() as stop:
        (folder / "started").touch()
        while not stop.requested:
            time.sleep(0.01)
        (folder / "saving").touch()
        time.sleep(60)
    raise SystemExit(stop.exit_code)
