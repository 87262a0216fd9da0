"""A data set of LeRobot's format v3.0, written by its description: tables by pyarrow, videos by ffmpeg."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

FPS = 10
CAMERA, PICTURE = "observation.images.top", "observation.image"


def gray(steps: int) -> np.ndarray:
    """Frames whose shade says their number, [steps, 32, 48, 3]."""
    return np.broadcast_to((20 + 5 * np.arange(steps, dtype=np.uint8))[:, None, None, None], (steps, 32, 48, 3)).copy()


def write_video(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size]
    command += ["-r", str(FPS), "-i", "pipe:0", "-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"]
    subprocess.run([*command, str(path)], input=frames.tobytes(), check=True)


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "png")
    return buffer.getvalue()


def write_table(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_data_set(
    folder: Path, lengths: list[int], arrays: dict[str, np.ndarray], *, files: list[int], version: str = "v3.0"
) -> Path:
    """Write a data set.

    Args:
        lengths: of the episodes.
        arrays: "action", "observation.state" [N, D] float32 and "pictures" uint8 [N, H, W, 3].
        files: for each episode, the number of the file that holds its frames and its video.
    """
    ends = np.cumsum(lengths)
    starts, episode_of = ends - lengths, np.repeat(np.arange(len(lengths)), lengths)
    feature = {"dtype": "float32", "names": None}
    info = {
        "codebase_version": version,
        "robot_type": None,
        "total_episodes": len(lengths),
        "total_frames": int(ends[-1]),
        "total_tasks": 1,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            "action": feature | {"shape": [arrays["action"].shape[1]], "names": {"motors": ["x", "y"]}},
            "observation.state": feature | {"shape": [arrays["observation.state"].shape[1]]},
            "observation.effort": feature | {"shape": [1]},
            CAMERA: {"dtype": "video", "shape": [3, 32, 48], "names": ["channels", "height", "width"]},
            PICTURE: {"dtype": "image", "shape": [6, 9, 3], "names": ["height", "width", "channel"]},
        },
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info, indent=4), encoding="utf-8")
    frames, video_starts = gray(int(ends[-1])), []
    for number in sorted(set(files)):
        rows = np.flatnonzero(np.isin(episode_of, [e for e, file in enumerate(files) if file == number]))
        index = np.arange(len(episode_of))[rows]
        table = {
            "action": pyarrow.array(list(arrays["action"][rows]), pyarrow.list_(pyarrow.float32())),
            "observation.state": pyarrow.array(
                list(arrays["observation.state"][rows]),
                pyarrow.list_(pyarrow.float32(), arrays["observation.state"].shape[1]),
            ),
            "observation.effort": pyarrow.array(index.astype(np.float32)),
            PICTURE: [{"bytes": png(frame), "path": None} for frame in arrays["pictures"][rows]],
            "timestamp": (index - starts[episode_of[rows]]) / FPS,
            "frame_index": index - starts[episode_of[rows]],
            "episode_index": episode_of[rows],
            "index": index,
            "task_index": np.zeros(len(rows), np.int64),
        }
        write_table(folder / f"data/chunk-000/file-{number:03d}.parquet", table)
        write_video(folder / f"videos/{CAMERA}/chunk-000/file-{number:03d}.mp4", frames[rows])
    for episode, file in enumerate(files):
        video_starts.append(sum(length for e, length in enumerate(lengths[:episode]) if files[e] == file) / FPS)
    episodes = {
        "episode_index": np.arange(len(lengths)),
        "tasks": [["push"]] * len(lengths),
        "length": np.array(lengths),
        "data/chunk_index": np.zeros(len(lengths), np.int64),
        "data/file_index": np.array(files),
        "dataset_from_index": starts,
        "dataset_to_index": ends,
        f"videos/{CAMERA}/chunk_index": np.zeros(len(lengths), np.int64),
        f"videos/{CAMERA}/file_index": np.array(files),
        f"videos/{CAMERA}/from_timestamp": video_starts,
        f"videos/{CAMERA}/to_timestamp": np.array(video_starts) + np.array(lengths) / FPS,
        "stats/action/mean": [[0.0, 0.0]] * len(lengths),
    }
    write_table(folder / "meta/episodes/chunk-000/file-000.parquet", episodes)
    return folder
