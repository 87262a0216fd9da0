"""Episodes side by side in one video: an mp4, or a GIF where there is no encoder."""

import contextlib
import itertools
import logging
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw

import envs
from driftfield.training.atomic_file import TEMPORARY_PREFIX
from policy.rollout import Episode, RolloutError, replay
from policy.rollout_worker import Frames, MakeEnvironment

CAPTION_HEIGHT: Final = 28  # pixels above a picture, two lines of text
BORDER: Final = 4  # pixels around it, in the colour of the outcome
BLOCK: Final = 16  # encoders want sides that are multiples of this
SUCCESS, FAILURE, RUNNING = (46, 139, 87), (178, 34, 34), (96, 96, 96)
_log = logging.getLogger(__name__)


def choose(episodes: Sequence[Episode], count: int) -> list[Episode]:
    """The first successes and the first failures, `count` of each; none whose environment raised.

    Args:
        episodes: of one task.
        count: how many of each to take.
    """
    shown = [episode for episode in episodes if episode.failure is None]
    successes = [episode for episode in shown if episode.success]
    failures = [episode for episode in shown if not episode.success]
    return [*successes[:count], *failures[:count]]


def film(
    path: Path,
    episodes: Sequence[Episode],
    task: str,
    *,
    task_options: Mapping[str, Any] | None = None,
    count: int,
    timeout_s: float = 300.0,
    make: MakeEnvironment = envs.make,
) -> Path | None:
    """Write a video of the first successes and failures; where they can't be drawn, warn and go on.

    Args:
        path: of the video, `NAME.mp4`.
        episodes, task, task_options, make: as they were for `rollout`.
        count: successes to show, and as many failures.
        timeout_s: longest that the pictures of an episode may take.

    Raises:
        OSError: the folder can't be written.

    Returns:
        What was written; None if there is nothing to show, or no way to draw it.
    """
    chosen = choose(episodes, count)
    if not chosen:
        return None
    try:
        frames = replay(chosen, task, task_options=task_options, timeout_s=timeout_s, make=make)
    except RolloutError as error:
        _log.warning("no video: %s", error)
        return None
    return write_video(path, chosen, frames, columns=count)


def write_video(path: Path, episodes: Sequence[Episode], frames: Sequence[Frames], *, columns: int) -> Path:
    """Write episodes side by side, each with its seed, its outcome and a counter of steps; ended ones stand still.

    Args:
        path: of the video, `NAME.mp4`.
        episodes: at least one.
        frames: their pictures, all of one size.
        columns: episodes in a row; a row holds either successes or failures.

    Raises:
        OSError: the folder can't be written.

    Returns:
        What was written: `path`, or `NAME.gif` with one warning where there is no encoder.
    """
    hz = frames[0].hz
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{path.suffix}")
    try:
        _write_mp4(temporary, _canvases(episodes, frames, columns), hz)
        written = path
    except (ImportError, OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        written, temporary = path.with_suffix(".gif"), temporary.with_suffix(".gif")
        _log.warning("no mp4 can be written (%s), so the video is %s", error, written)
        _write_gif(temporary, _canvases(episodes, frames, columns), hz)
    try:
        os.replace(temporary, written)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _canvases(episodes: Sequence[Episode], frames: Sequence[Frames], columns: int) -> Iterator[np.ndarray]:
    """The pictures of the video, uint8 `[H, W, 3]`, H and W multiples of BLOCK."""
    cells = _places(episodes, columns)
    height, width = (side + 2 * BORDER for side in frames[0].pictures.shape[1:3])
    rows, used = max(row for row, _ in cells) + 1, max(column for _, column in cells) + 1
    size = [-(-side // BLOCK) * BLOCK for side in (rows * (height + CAPTION_HEIGHT), used * width)]
    for index in range(max(len(shown.pictures) for shown in frames)):
        canvas = np.full((*size, 3), 255, np.uint8)
        for episode, shown, (row, column) in zip(episodes, frames, cells, strict=True):
            panel = _panel(episode, shown, index)
            top, left = row * len(panel), column * width
            canvas[top : top + len(panel), left : left + width] = panel
        yield canvas


def _places(episodes: Sequence[Episode], columns: int) -> list[tuple[int, int]]:
    """Row and column of each episode: successes first, failures in rows of their own."""
    rows_of_successes = -(-sum(episode.success for episode in episodes) // columns)
    counts = {True: 0, False: 0}
    places = []
    for episode in episodes:
        row, column = divmod(counts[episode.success], columns)
        places.append((row + (0 if episode.success else rows_of_successes), column))
        counts[episode.success] += 1
    return places


def _panel(episode: Episode, shown: Frames, index: int) -> np.ndarray:
    """One episode's picture of one moment, with caption and border."""
    index = min(index, len(shown.pictures) - 1)
    picture, ended = shown.pictures[index], index == len(shown.pictures) - 1
    outcome = "success" if episode.success else "diverged" if episode.diverged else "no success"
    color = RUNNING if not ended else SUCCESS if episode.success else FAILURE
    height, width = (side + 2 * BORDER for side in picture.shape[:2])
    image = Image.new("RGB", (width, height + CAPTION_HEIGHT), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, CAPTION_HEIGHT, width, height + CAPTION_HEIGHT), fill=color)
    text = f"seed {episode.seed}\nstep {shown.steps[index]}/{episode.steps}" + (
        f": {outcome}, {episode.score:.2f}" if ended else ""
    )
    draw.multiline_text((BORDER, 1), text, fill=color, spacing=1)
    image.paste(Image.fromarray(picture), (BORDER, CAPTION_HEIGHT + BORDER))
    return np.asarray(image)


def _write_mp4(path: Path, canvases: Iterator[np.ndarray], hz: float) -> None:
    import imageio_ffmpeg  # brings the program along

    first = next(canvases)
    height, width = first.shape[:2]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(hz), "-i", "-"]
    h264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "20"]  # what browsers and slides show
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *raw, *h264, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as encoder:
        if encoder.stdin is not None:
            with contextlib.suppress(BrokenPipeError), encoder.stdin as pipe:  # why it ended stands on its stderr
                for canvas in itertools.chain([first], canvases):
                    pipe.write(canvas.tobytes())
        said = b"" if encoder.stderr is None else encoder.stderr.read()
    if encoder.returncode != 0:
        raise RuntimeError(
            f"ffmpeg ended with exit status {encoder.returncode}: {said.decode(errors='replace').strip()}"
        )


def _write_gif(path: Path, canvases: Iterator[np.ndarray], hz: float) -> None:
    images = [Image.fromarray(canvas).quantize(64) for canvas in canvases]
    images[0].save(path, save_all=True, append_images=images[1:], duration=max(20, round(1000 / hz)), loop=0)
