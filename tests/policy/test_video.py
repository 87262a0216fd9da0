"""Videos: which episodes, where they stand, and what is written where no encoder is."""

import builtins
import logging
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from policy.rollout import Episode
from policy.rollout_worker import Frames
from policy.video import BORDER, CAPTION_HEIGHT, choose, write_video


def episode(seed: int, *, success: bool, steps: int = 5, failure: str | None = None) -> Episode:
    return Episode(
        seed=seed,
        score=float(success),
        success=success,
        phases=int(success),
        num_phases=1,
        steps=steps,
        diverged=False,
        clipped=0,
        failure=failure,
        retries=0,
        latencies=(),
        actions=np.zeros((steps, 2), np.float32),
    )


def frames_of(episodes: list[Episode], side: int = 60) -> list[Frames]:
    """Plain pictures: as bright as the step, times 10."""
    return [
        Frames(
            pictures=np.stack([np.full((side, side, 3), 10 * step, np.uint8) for step in range(each.steps + 1)]),
            steps=tuple(range(each.steps + 1)),
            hz=20.0,
        )
        for each in episodes
    ]


EPISODES = [episode(0, success=True), episode(1, success=False, steps=9), episode(2, success=True, steps=3)]


def levels(canvas: np.ndarray, side: int = 60) -> dict[tuple[int, int], int]:
    """Brightness in the middle of each cell, by row and column."""
    height, width = side + 2 * BORDER + CAPTION_HEIGHT, side + 2 * BORDER
    rows, columns = len(canvas) // height, canvas.shape[1] // width
    return {
        (row, column): int(canvas[row * height + CAPTION_HEIGHT + side // 2, column * width + side // 2].mean())
        for row in range(rows)
        for column in range(columns)
    }


def read_mp4(path: Path) -> tuple[float, list[np.ndarray]]:
    """Pictures per second and the pictures, RGB."""
    video = cv2.VideoCapture(str(path))
    canvases = []
    while (read := video.read())[0]:
        canvases.append(read[1][..., ::-1])
    return video.get(cv2.CAP_PROP_FPS), canvases


def test_the_first_successes_and_failures_are_chosen_and_none_that_raised() -> None:
    episodes = [episode(seed, success=seed % 2 == 0) for seed in range(10)]
    episodes[1] = episode(1, success=False, failure="Traceback")
    assert [each.seed for each in choose(episodes, 2)] == [0, 2, 3, 5]
    assert choose(episodes, 0) == []


def test_a_video_shows_successes_above_failures_and_holds_the_last_picture(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", EPISODES, frames_of(EPISODES), columns=2)
    hz, canvases = read_mp4(path)
    assert len(canvases) == 10 and hz == 20
    assert levels(canvases[0])[0, 0] == pytest.approx(0, abs=4)
    at_end = levels(canvases[9])
    assert at_end[0, 0] == pytest.approx(50, abs=4)  # seed 0 ended at step 5
    assert at_end[0, 1] == pytest.approx(30, abs=4)  # seed 2 at step 3
    assert at_end[1, 0] == pytest.approx(90, abs=4)  # the failure
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_an_ended_episode_gets_the_colour_of_its_outcome(tmp_path: Path) -> None:
    _, canvases = read_mp4(write_video(tmp_path / "a.mp4", EPISODES, frames_of(EPISODES), columns=2))
    edge = BORDER // 2

    def border(canvas: np.ndarray, row: int) -> int:
        return int(np.argmax(canvas[row * (68 + CAPTION_HEIGHT) + CAPTION_HEIGHT + 34, edge]))

    assert border(canvases[9], 0) == 1  # green
    assert border(canvases[9], 1) == 0  # red


@pytest.mark.parametrize("fault", ["no_program", "program_fails", "no_package"])
def test_without_an_encoder_a_gif_is_written_with_one_warning(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if fault == "no_program":
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent")
    elif fault == "program_fails":
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(shutil.which("false")))
    else:
        real_import = builtins.__import__

        def without_encoder(name: str, *arguments: Any, **keywords: Any) -> Any:
            if name == "imageio_ffmpeg":
                raise ModuleNotFoundError("No module named 'imageio_ffmpeg'")
            return real_import(name, *arguments, **keywords)

        monkeypatch.setattr(builtins, "__import__", without_encoder)
    with caplog.at_level(logging.WARNING):
        path = write_video(tmp_path / "a.mp4", EPISODES, frames_of(EPISODES), columns=2)
    assert path == tmp_path / "a.gif"
    assert len(caplog.records) == 1 and "no mp4 can be written" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gif"]
    with Image.open(path) as image:
        assert image.n_frames == 10
        image.seek(9)
        assert levels(np.asarray(image.convert("RGB")))[1, 0] == pytest.approx(90, abs=6)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        write_video(tmp_path / "nowhere" / "a.mp4", EPISODES, frames_of(EPISODES), columns=2)
