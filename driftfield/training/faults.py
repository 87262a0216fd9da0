"""Places where a test can make the program fail: ``DRIFTFIELD_FAULT=point:action``."""

import errno
import os

VARIABLE = "DRIFTFIELD_FAULT"


def fault_point(name: str) -> None:
    """Fail here if the environment asks for it, else do nothing.

    Args:
        name: name of this place, such as ``"checkpoint.before_rename"`` or ``"step.3"``.

    Raises:
        RuntimeError: for the action ``raise``.
        OSError: ENOSPC for the action ``enospc``; the action ``exit`` leaves as a kill would, with no clean-up, code 9.
        ValueError: for any other action.

    >>> fault_point("step.3")
    """
    point, _, action = os.environ.get(VARIABLE, "").rpartition(":")
    if point != name:
        return
    if action == "exit":
        os._exit(9)
    if action == "raise":
        raise RuntimeError(f"fault asked for at {name}")
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    raise ValueError(f"{VARIABLE}: expected the action exit, raise or enospc, found {action!r}")
