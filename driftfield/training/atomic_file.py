"""Small text and JSON files, written whole or not at all, and read with suspicion."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


def sync(path: Path) -> None:
    """Push a file or a folder's entries to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a restart after a kill, sees the old text or the new, never a part.

    Args:
        path: the file; its folder must exist.
        text: all of its content.

    Raises:
        OSError: if the disk refuses; the old file is untouched and nothing is left behind.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def to_json(value: Any) -> str:
    """Text of a JSON value; NaN and infinity, which JSON lacks, are refused.

    >>> to_json({"step": 3})
    '{\\n  "step": 3\\n}\\n'
    """
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, to_json(value))


def parse_json(text: str | bytes) -> Any:
    """Read JSON as data: a key given twice, NaN and unbounded nesting are errors.

    Raises:
        ValueError: saying what is wrong with the text.

    >>> parse_json('{"step": 3}')
    {'step': 3}
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"JSON key given twice: {next(name for name in names if names.count(name) > 1)!r}")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")
