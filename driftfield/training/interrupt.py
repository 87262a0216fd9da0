"""Stopping on request: Ctrl-C or a scheduler's signal lets the step end and the checkpoint be written."""

import os
import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Note SIGINT, SIGTERM and SIGUSR1 inside a ``with``, for the training loop to look at between two steps.

    The first signal sets `requested`. A second Ctrl-C raises KeyboardInterrupt at once; further SIGTERM and SIGUSR1
    change nothing, since the checkpoint is being written. The handlers from before come back after the ``with``.
    For the main thread, where Python handles signals.

    >>> with StopRequest() as stop:
    ...     stop.requested, stop.exit_code
    (False, 0)
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after the present step."""
        return self._first is not None

    @property
    def exit_code(self) -> int:
        """What the program should return: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1, else 0."""
        return 0 if self._first is None else 128 + self._first

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self._first is None:
            self._first = number
            name = signal.Signals(number).name
            text = f"\n{name}: stopping after this step and its checkpoint; Ctrl-C again stops at once\n"
            os.write(2, text.encode())  # `print` may already be at work on standard error, which it does not survive
