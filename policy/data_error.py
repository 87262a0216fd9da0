"""What is wrong with demonstrations, told in one sentence."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from driftfield.training import UserError


class DataError(UserError, ValueError):
    """Demonstrations that are missing, damaged, or not what their format says."""


def available(key: str, keys: Iterable[str]) -> str:
    """End of a sentence about a missing key: those that are there, and the one that was probably meant.

    >>> available("obs/agentview", ["obs/agentview_image", "actions"])
    "found actions, obs/agentview_image; did you mean 'obs/agentview_image'?"
    """
    names = sorted(keys)
    close = difflib.get_close_matches(key, names, n=1)
    return f"found {', '.join(names) or 'none'}" + (f"; did you mean {close[0]!r}?" if close else "")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn a ValueError about arrays into a DataError that names where they are from."""
    try:
        yield
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
