"""Checkpoints: a folder per step, complete and verified or not there at all, and without pickle.

    step-1200/
        model.safetensors  ema.safetensors  queue.safetensors ...   one file per group of tensors
        state.json          everything that is not a tensor
        MANIFEST.json       size and SHA-256 of each file above, written last

A checkpoint is written aside as ``.tmp-step-1200-<uuid>/``, pushed to the disk and renamed, so a kill at any instant
leaves the checkpoints before it as they were. One process writes all of it; the others hold the same state.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from driftfield.training.atomic_file import TEMPORARY_PREFIX, parse_json, sync, to_json
from driftfield.training.errors import UserError
from driftfield.training.faults import fault_point

FORMAT = 1
MANIFEST, STATE, TENSORS = "MANIFEST.json", "state.json", ".safetensors"
SET_ASIDE_PREFIX = ".replaced-"
MAX_JSON_BYTES = 64 * 2**20  # far above any real state; bounds the memory a forged file can ask for
MAX_STATE_CHARACTERS = MAX_JSON_BYTES // 4  # of at most 4 bytes each
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.safetensors|\.json)")
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, the process's limit
_log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that can't be written, or must not be read."""


class Loaded(NamedTuple):
    """What `Checkpoint.save` was given, verified."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # group -> name -> tensor, on the CPU
    state: dict[str, Any]


class Checkpoint:
    """The checkpoints of one run, for the one process that writes them; others read with `read_checkpoint`.

    Left-overs of an earlier process that was killed are put right at once.

    Args:
        directory: folder of the ``step-N`` folders; made if missing.
        keep_last: how many to keep, the newest by step number.

    Raises:
        CheckpointError: if the folder can't be made.
        ValueError: if ``keep_last`` is less than 1.

    >>> import tempfile, torch
    >>> checkpoint = Checkpoint(tempfile.mkdtemp())
    >>> checkpoint.save(5, {"model": {"weight": torch.ones(2)}}, {"samples_seen": 320}).name
    'step-5'
    >>> checkpoint.load().state
    {'samples_seen': 320}
    """

    def __init__(self, directory: str | Path, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last: expected 1 or more, found {keep_last}")
        self.directory = Path(directory)
        self.keep_last = keep_last
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoints {self.directory}: expected a folder: {error.strerror}") from error
        self._put_right()

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step; one of the same step is replaced, surplus older ones are deleted.

        Args:
            step: the step that these values follow.
            tensors: group -> name -> tensor; each group becomes one file.
            state: JSON values: the step's counters, the optimizer's settings, what the run is.

        Raises:
            CheckpointError: no space; the checkpoints that were there remain, and nothing else is left behind.
            ValueError: a negative step, a group's name that is not a plain file name, or NaN in ``state``.

        Returns:
            The checkpoint's folder.
        """
        if step < 0:
            raise ValueError(f"step: expected 0 or more, found {step}")
        for group in tensors:
            if not _NAME.fullmatch(group):
                raise ValueError(f"group of tensors: expected a name like 'model' or 'ema', found {group!r}")
        text = to_json(dict(state))
        if len(text) > MAX_STATE_CHARACTERS:
            raise ValueError(
                f"state: expected at most {MAX_STATE_CHARACTERS} characters, found {len(text)}: use tensors"
            )
        target = self.directory / f"step-{step}"
        temporary = self.directory / f"{TEMPORARY_PREFIX}step-{step}-{uuid.uuid4().hex}"
        try:
            self._check_space(target, tensors)
            temporary.mkdir()
            _write_files(temporary, step, tensors, text)
            self._publish(temporary, target)
        except (OSError, SafetensorError) as error:
            raise self._explain(error, target, tensors) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already, unless something failed
        self._delete_surplus(step)
        return target

    def load(self, step: int | None = None) -> Loaded | None:
        """Read a checkpoint as `read_checkpoint` does."""
        return read_checkpoint(self.directory, step)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; whether each is valid is found out by reading it."""
        return checkpoint_steps(self.directory)

    def _publish(self, temporary: Path, target: Path) -> None:
        fault_point("checkpoint.before_rename")
        aside = self.directory / f"{SET_ASIDE_PREFIX}{target.name}"
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(target, aside)  # a kill before the next line is put right by the next start
            fault_point("checkpoint.after_set_aside")
        os.rename(temporary, target)
        fault_point("checkpoint.after_rename")
        sync(self.directory)
        shutil.rmtree(aside, ignore_errors=True)

    def _put_right(self) -> None:
        for aside in self.directory.glob(f"{SET_ASIDE_PREFIX}step-*"):
            original = self.directory / aside.name.removeprefix(SET_ASIDE_PREFIX)
            if not original.exists():
                os.rename(aside, original)
        for prefix in (TEMPORARY_PREFIX, SET_ASIDE_PREFIX):
            for leftover in self.directory.glob(f"{prefix}*"):
                _log.info("removing %s, left by a process that was stopped", leftover)
                _delete(leftover)

    def _delete_surplus(self, step: int) -> None:
        # Later steps, left by a resume from an older checkpoint, neither count nor go: the one just written stays.
        older = [other for other in self.steps() if other < step]
        for other in older[: max(0, len(older) + 1 - self.keep_last)]:
            folder = self.directory / f"step-{other}"
            aside = self.directory / f"{TEMPORARY_PREFIX}delete-step-{other}-{uuid.uuid4().hex}"
            try:
                os.rename(folder, aside)  # a kill amid the deletion must not leave half a checkpoint under its name
            except OSError as error:
                _log.warning("can't delete the old checkpoint %s: %s", folder, error)
                continue
            fault_point("checkpoint.before_delete")
            _delete(aside)

    def _check_space(self, target: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        if _bytes_of(tensors) > shutil.disk_usage(self.directory).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    def _explain(self, error: Exception, target: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> CheckpointError:
        if _errno_of(error) not in _NO_SPACE:
            return CheckpointError(f"checkpoint {target} can't be written: {error}")
        need, free = _bytes_of(tensors) / 2**20, shutil.disk_usage(self.directory).free / 2**20
        return CheckpointError(f"No space left for checkpoint {target}: need {need:.1f} MiB, free {free:.1f} MiB")


def checkpoint_steps(directory: str | Path) -> list[int]:
    """Steps that have a checkpoint in a folder, ascending by number; an absent folder has none.

    >>> checkpoint_steps("/nonexistent")
    []
    """
    folder = Path(directory)
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def read_checkpoint(directory: str | Path, step: int | None = None) -> Loaded | None:
    """Read and verify a checkpoint; every byte is compared with the manifest, and nothing in it is executed.

    Args:
        directory: folder of the ``step-N`` folders.
        step: which one, and no other. Without it the newest valid one, with a warning for each newer one rejected.

    Raises:
        CheckpointError: the step asked for is missing or invalid, or there are checkpoints and none is valid.

    Returns:
        The checkpoint, or None where none was ever written.
    """
    folder = Path(directory)
    steps = checkpoint_steps(folder)
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {folder}; there are steps {steps}")
        return _read(folder / f"step-{step}", step)
    for candidate in reversed(steps):
        try:
            return _read(folder / f"step-{candidate}", candidate)
        except CheckpointError as error:
            _log.warning("REJECTED: %s", error)
    if steps:
        raise CheckpointError(f"none of the checkpoints {steps} in {folder} is valid; delete that folder to start anew")
    return None


def _write_files(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: str) -> None:
    state_file = folder / STATE
    _write_synced(state_file, state)
    mode = state_file.stat().st_mode & 0o777  # what the umask allows: safetensors makes files that only the owner reads
    for group, named in tensors.items():
        path = folder / (group + TENSORS)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, path)
        path.chmod(mode)
        sync(path)
        fault_point(f"checkpoint.after_file.{group}")
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    _write_synced(folder / MANIFEST, to_json({"format": FORMAT, "step": step, "files": files}))
    sync(folder)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fault_point(f"checkpoint.after_file.{path.stem}")


def _read(folder: Path, step: int) -> Loaded:
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder}: expected a folder, found a link or a file")
    files = _read_manifest(folder, step)
    for name, expected in files.items():
        _verify(folder / name, expected)
    state = _read_json(folder / STATE)
    try:
        groups = [name for name in files if name.endswith(TENSORS)]
        return Loaded(step, {name.removesuffix(TENSORS): load_file(folder / name) for name in groups}, state)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from error


def _read_manifest(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, found {manifest.get('format')!r}")
    if manifest.get("step") != step:
        raise CheckpointError(f"{path}: expected step {step}, found {manifest.get('step')!r}")
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise CheckpointError(f"{path}: expected 'files' with {STATE} among them")
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{path}: expected plain names of .safetensors and .json files, found {name!r}")
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise CheckpointError(f"{path}: expected the size and sha256 of {name}, found {entry!r}")
    return files


def _verify(path: Path, expected: Mapping[str, Any]) -> None:
    _check_regular(path)
    if path.stat().st_size != expected["size"]:
        raise CheckpointError(f"{path}: expected {expected['size']} bytes, found {path.stat().st_size}")
    found = _sha256(path)
    if found != expected["sha256"]:
        raise CheckpointError(f"{path}: expected SHA-256 {expected['sha256']}, found {found}")


def _read_json(path: Path) -> dict[str, Any]:
    _check_regular(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_JSON_BYTES} bytes, found {path.stat().st_size}")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _check_regular(path: Path) -> None:
    if path.is_symlink():
        raise CheckpointError(f"{path}: expected a file, found a symbolic link")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, found {'something else' if path.exists() else 'none'}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for named in tensors.values() for tensor in named.values())


def _errno_of(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))  # safetensors passes the system's code on as text alone
    return int(found[1]) if found else 0


def _delete(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        _log.warning("can't delete %s: %s", path, error)
