"""The run's log: one JSON line per call in ``metrics.jsonl``, and writers for TensorBoard and Weights & Biases."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from driftfield.training.atomic_file import write_text
from driftfield.training.errors import UserError

METRICS = "metrics.jsonl"
_log = logging.getLogger(__name__)


class Writer(Protocol):
    """A further place for the values of a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step."""

    def close(self) -> None:
        """Write what is left."""


class RunLog:
    """Append values to a run's log; each line is written out at once, so a kill loses at most the line being written.

    Args:
        directory: the run's folder.
        resume_step: the step resumed from: later lines, which will be written again, and a torn last line go.
            None starts the log anew.
        writers: further places, by name (``"tensorboard"``, ``"wandb"``) or as an object; one that fails is left out
            after one warning, and training goes on.

    Raises:
        UserError: if the log can't be written, a writer has no such name, or its package is not installed.

    >>> import tempfile
    >>> with RunLog(tempfile.mkdtemp()) as log:
    ...     log.log(1, samples_seen=64, loss=6.5)
    ...     [line["loss"] for line in read_log(log.path)]
    [6.5]
    """

    def __init__(
        self, directory: str | Path, resume_step: int | None = None, writers: Sequence[str | Writer] = ()
    ) -> None:
        self.path = Path(directory) / METRICS
        self._writers: dict[str, Writer] = {}
        try:
            _keep_until(self.path, resume_step)
            self._file = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"log {self.path} can't be written: {error.strerror}") from error
        try:
            for writer in writers:
                self._add(writer, Path(directory), resume_step)
        except BaseException:
            self.close()
            raise

    def log(self, step: int, samples_seen: int, **values: float) -> None:
        """Append one line: the step, the samples seen, the time (UTC) and the values.

        Args:
            step: the step just done; never less than one logged before.
            samples_seen: samples trained on so far.
            values: numbers by name, such as ``loss``; a tensor of one element is a number.

        Raises:
            UserError: if the disk takes no more.
        """
        numbers = {name: float(value) for name, value in values.items()}
        fixed = {
            "step": step,
            "samples_seen": samples_seen,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        try:
            self._file.write(json.dumps(fixed | {name: _json_number(value) for name, value in numbers.items()}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"log {self.path} can't be written: {error.strerror}") from error
        for name, writer in list(self._writers.items()):
            try:
                writer.write(step, numbers | {"samples_seen": samples_seen})
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        """Close the file and the writers."""
        try:
            self._file.close()
        except OSError as error:
            _log.warning("log %s: the last line can't be written: %s", self.path, error.strerror)
        for name, writer in list(self._writers.items()):
            try:
                writer.close()
            except Exception as error:
                self._drop(name, error)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, writer: str | Writer, directory: Path, resume_step: int | None) -> None:
        if not isinstance(writer, str):
            self._writers[type(writer).__name__] = writer
            return
        if writer not in _WRITERS:
            raise UserError(f"log writer: expected one of {', '.join(_WRITERS)}; found {writer!r}")
        try:
            self._writers[writer] = _WRITERS[writer](directory, resume_step)
        except ImportError as error:
            raise UserError(f"log writer {writer} needs a package that is missing: pip install {writer}") from error
        except Exception as error:
            self._drop(writer, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._writers.pop(name, None)
        _log.warning("log writer %s failed and is left out from now on (%s stays): %s", name, METRICS, error)


class TensorBoardWriter:
    """Values as TensorBoard curves in the folder ``tensorboard``."""

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        make: Any = SummaryWriter
        self._writer = make(str(directory / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbWriter:
    """Values in a Weights & Biases run; its id is kept in ``wandb_id.txt`` so that a resume continues it."""

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        import wandb

        file = directory / "wandb_id.txt"
        known = file.read_text(encoding="utf-8").strip() if resume_step is not None and file.exists() else None
        self._run = wandb.init(dir=str(directory), id=known, resume="allow", name=directory.resolve().name)
        write_text(file, f"{self._run.id}\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values to the run."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()


_WRITERS: dict[str, type[TensorBoardWriter] | type[WandbWriter]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
}


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read a log's lines; a torn last line, left by a kill, is left out.

    Raises:
        UserError: naming the file and the line, if any other line is not a JSON object with a step.

    Returns:
        One dict per line; NaN and infinities are floats again.
    """
    return [_parse_line(text, f"{path}, line {i}") for i, text in enumerate(_whole_lines(Path(path)), start=1)]


_NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers, so they are written as text


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _whole_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # what follows the last newline is torn


def _parse_line(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        int(line["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"log {where}: expected a JSON object with a step, found {text[:80]!r}") from error
    return {name: float(value) if value in _NOT_FINITE else value for name, value in line.items()}


def _keep_until(path: Path, resume_step: int | None) -> None:
    if not path.exists():
        return
    kept: list[str] = []
    if resume_step is not None:
        lines = zip(_whole_lines(path), read_log(path), strict=True)
        kept = [text for text, line in lines if line["step"] <= resume_step]
    write_text(path, "".join(f"{text}\n" for text in kept))
