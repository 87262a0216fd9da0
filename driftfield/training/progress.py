"""How far a training is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Show samples done of a total, samples per second, time left and a few values.

    A terminal gets a bar that redraws itself; a file or a pipe gets a line now and then, without control codes.

    Args:
        total: samples of the whole run.
        initial: samples done before a resume; they do not count for the speed.
        unit: what a sample is, in the plural.
        every_s: seconds between two lines where there is no terminal.
        stream: where to write, standard error if not given.

    >>> with Progress(100, stream=sys.stdout) as progress:
    ...     progress.update(100, loss=0.5)  # doctest: +ELLIPSIS
    100/100 images, ... images/s, 0:00 left, loss 0.5
    """

    def __init__(
        self, total: int, *, initial: int = 0, unit: str = "images", every_s: float = 10.0, stream: TextIO | None = None
    ) -> None:
        self._total, self._done, self._initial, self._unit, self._every_s = total, initial, initial, unit, every_s
        self._stream = sys.stderr if stream is None else stream
        self._values: dict[str, float] = {}
        self._start = time.monotonic()
        self._next_line = self._start + every_s
        self._unwritten = False
        self._bar = self._make_bar() if self._stream.isatty() else None

    def update(self, samples: int, **values: float) -> None:
        """Count samples as done and show values beside them, such as ``lambda_`` (a trailing ``_`` is left out)."""
        self._done += samples
        self._values = values
        if self._bar is not None:
            self._bar.set_postfix(_shown(values), refresh=False)
            self._bar.update(samples)
            return
        self._unwritten = True
        if time.monotonic() >= self._next_line:
            self._write_line()

    def close(self) -> None:
        """Show the last state and leave the line."""
        if self._bar is not None:
            self._bar.close()
        elif self._unwritten:
            self._write_line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_bar(self) -> "tqdm[None]":
        return tqdm(
            total=self._total,
            initial=self._initial,
            unit=f" {self._unit}",
            unit_scale=True,
            dynamic_ncols=True,
            file=self._stream,
        )

    def _write_line(self) -> None:
        now = time.monotonic()
        speed = (self._done - self._initial) / max(now - self._start, 1e-9)
        left = _clock((self._total - self._done) / speed) if speed > 0 else "?"
        values = "".join(f", {name} {value}" for name, value in _shown(self._values).items())
        line = f"{self._done}/{self._total} {self._unit}, {speed:.3g} {self._unit}/s, {left} left{values}"
        print(line, file=self._stream, flush=True)
        self._next_line = now + self._every_s
        self._unwritten = False


def _shown(values: dict[str, float]) -> dict[str, str]:
    return {name.removesuffix("_"): f"{value:.3g}" for name, value in values.items()}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
