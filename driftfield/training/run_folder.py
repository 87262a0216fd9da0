"""A run's folder: one run, one process at a time, and everything needed to say what the run was."""

import fcntl
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from driftfield.training.atomic_file import TEMPORARY_PREFIX, parse_json, write_json, write_text
from driftfield.training.config import read_config, to_yaml
from driftfield.training.errors import UserError
from driftfield.training.schema import ConfigError, to_plain

CONFIG, RUN, LOCK = "config.yaml", "run.json", "run.lock"
PACKAGES = (
    "driftfield", "torch", "numpy", "safetensors", "hydra-core", "timm", "scikit-learn", "diffusers", "gymnasium",
    "mujoco", "robosuite", "gymnasium-robotics",
)  # fmt: skip
_SECRET = re.compile(r"(?is)^([^=]*(?:token(?!i)|secret|passw|credential|api[_-]?key)[^=]*=).*")  # a tokenizer is none
_log = logging.getLogger(__name__)


class RunFolderError(UserError):
    """A folder that this run can't or must not use."""


class RunFolder:
    """Open the folder of a run: make it, or resume it where it holds the same configuration.

    On return the folder is known to be writable, is locked against a second process until `close`, and holds
    ``config.yaml`` (resolved) and ``run.json`` (one entry per start: time, git commit, versions, command line).

    Args:
        path: the folder.
        config: the resolved configuration, a dataclass or a mapping.
        may_change: dotted keys that a resume may change.

    Raises:
        RunFolderError: it can't be written, another process uses it, or it belongs to another run (which keys differ).

    >>> import tempfile
    >>> with RunFolder(tempfile.mkdtemp(), {"seed": 0}) as folder:
    ...     folder.resumed
    False
    """

    def __init__(self, path: str | Path, config: Any, *, may_change: Collection[str] = ()) -> None:
        self.path = Path(path)
        plain = to_plain(config)
        _probe(self.path)
        self._lock = _take_lock(self.path)
        os.register_at_fork(after_in_child=self._forget_lock)
        try:
            _delete_leftovers(self.path)
            self.resumed = is_same_run(self.path, plain, may_change)
            write_text(self.path / CONFIG, to_yaml(plain))  # first: what follows may be missing after a kill
            _note_start(self.path / RUN)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the folder go to another process; a killed process lets it go too."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def _forget_lock(self) -> None:
        # A loader's worker may outlive a killed run for seconds and would hold its lock all the while.
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _probe(path: Path) -> None:
    """Write, sync, rename and delete a file: permissions, full disks and read-only mounts all show here."""
    probe = path / f"{TEMPORARY_PREFIX}probe-{uuid.uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            write_text(probe, "probe\n")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = "a file of that name exists" if isinstance(error, FileExistsError) else error.strerror
        raise RunFolderError(f"run folder {path}: expected a folder that can be written, found: {reason}") from error


def _take_lock(path: Path) -> int | None:
    # The system frees a lock with its process, so a killed run leaves none behind and process ids need no guessing.
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 4096).decode(errors="replace").strip()
        os.close(descriptor)
        raise RunFolderError(f"run folder {path} is in use by {owner}; wait for it, or choose run_dir=OTHER") from None
    except OSError as error:
        _log.warning("%s has no locks (%s): a second run in this folder would not be noticed", path, error.strerror)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {_utc_now()}\n".encode())
    return descriptor


def _delete_leftovers(path: Path) -> None:
    for leftover in path.glob(f"{TEMPORARY_PREFIX}*"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def is_same_run(path: Path, config: Any, may_change: Collection[str] = ()) -> bool:
    """Whether a folder holds this very run; reads only, and takes no lock.

    Args:
        path: the folder.
        config: the resolved configuration, a dataclass or a mapping.
        may_change: dotted keys that may differ.

    Raises:
        RunFolderError: it belongs to another run (which keys differ), or to no run and is not empty.

    Returns:
        False for a folder without a run.

    >>> import tempfile
    >>> is_same_run(Path(tempfile.mkdtemp()), {"seed": 0})
    False
    """
    file = path / CONFIG
    if not file.exists():
        others = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
        if others:
            raise RunFolderError(
                f"run folder {path}: expected an empty folder or one with a {CONFIG} of this program, "
                f"found {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}; choose run_dir=OTHER"
            )
        return False
    try:
        old = dict(_flatten(read_config(file)))
    except ConfigError as error:
        raise RunFolderError(f"run folder {path}: {error}; choose run_dir=OTHER or delete the folder") from error
    new = dict(_flatten(to_plain(config)))
    differing = [
        f"{key} (was {old.get(key, 'absent')}, now {new.get(key, 'absent')})"
        for key in sorted(old.keys() | new.keys())
        if key not in may_change and (key not in old or key not in new or old[key] != new[key])
    ]
    if differing:
        raise RunFolderError(
            f"run folder {path} belongs to another run: {', '.join(differing)}; choose run_dir=OTHER or delete it"
        )
    return True


def _flatten(config: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _note_start(file: Path) -> None:
    starts: list[Any] = []
    if file.exists():
        try:
            starts = list(parse_json(file.read_bytes())["starts"])
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("%s can't be read and is written anew: %s", file, error)
    start = {
        "time": _utc_now(),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "command": [_without_secrets(word) for word in _command_line()],
    }
    write_json(file, {"starts": [*starts, start]})


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # installed without its repository, or without git


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _command_line() -> list[str]:
    return [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]


def _without_secrets(word: str) -> str:
    word = _SECRET.sub(r"\1***", word)
    home = os.path.expanduser("~")
    return word.replace(home, "~") if len(home) > 1 else word
