"""Demonstrations of LeRobot's format v3.0: a folder of parquet tables and videos, many episodes in each.

meta/info.json                                  version, fps, features by name, numbers of episodes and frames
meta/episodes/chunk-000/file-000.parquet        a row for each episode: its length, and in which files it is
data/chunk-000/file-000.parquet                 a row for each frame
videos/KEY/chunk-000/file-000.mp4               frames of a camera
"""

import io
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import imageio_ffmpeg
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from driftfield.training.atomic_file import parse_json
from policy.data_error import DataError, available, naming
from policy.replay_buffer import ACTION, STATE, ReplayBuffer

VERSION: Final = "v3."
DATA_PATH: Final = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH: Final = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
STATE_FEATURE: Final = "observation.state"
IMAGE_PREFIXES: Final = ("observation.images.", "observation.")


def load_lerobot(
    folder: str | os.PathLike[str],
    *,
    observation: Literal["state", "image"] = "state",
    state_features: Sequence[str] = (STATE_FEATURE,),
) -> ReplayBuffer:
    """Read a data set of LeRobot.

    Args:
        folder: of meta/info.json.
        observation: "state" leaves the cameras out, "image" decodes them; their keys are without "observation.images.".
        state_features: which features, one after the other, are the state.

    Raises:
        DataError: a file is missing or damaged, of another version, or lacks a feature (listing those there are).
    """
    folder = Path(folder)
    info = _read_info(folder)
    features: dict[str, Any] = info["features"]
    for name in (ACTION, *state_features):
        if name not in features:
            raise DataError(f"{folder / 'meta/info.json'}: expected a feature {name}, {available(name, features)}")
    episodes = _read_episodes(folder, info)
    cameras = [name for name, feature in features.items() if feature["dtype"] in ("image", "video")]
    cameras = cameras if observation == "image" else []
    stored = [name for name in cameras if features[name]["dtype"] == "image"]
    frames = _read_frames(folder, episodes, [ACTION, *state_features, *stored])
    arrays = {
        ACTION: _numbers(folder, frames, ACTION),
        STATE: np.concatenate([_numbers(folder, frames, name) for name in state_features], axis=1),
    }
    for name in cameras:
        arrays[_short(name)] = (
            _pictures(folder, frames, name)
            if name in stored
            else _videos(folder, episodes, name, fps=float(info["fps"]), size=_size(features[name]))
        )
    names = {key: features[key].get("names") for key in (ACTION, *state_features)}
    attributes = {"source": "lerobot", "control_hz": info["fps"], "observation": observation, "feature_names": names}
    with naming(folder):
        return ReplayBuffer(arrays, np.cumsum([episode["length"] for episode in episodes]), attributes)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / "meta/info.json"
    try:
        info = parse_json(path.read_bytes())
        version = str(info["codebase_version"])
        wanted = {key: info[key] for key in ("fps", "features", "total_episodes", "total_frames", "data_path")}
        if not all(isinstance(feature, dict) and "dtype" in feature for feature in info["features"].values()):
            raise ValueError("features without a dtype")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected LeRobot's description, found {type(error).__name__}: {error}") from error
    if not version.startswith(VERSION):
        raise DataError(
            f"{path}: codebase_version: expected {VERSION}*, found {version}; LeRobot's own scripts convert older ones"
        )
    for key, expected in (("data_path", DATA_PATH), ("video_path", VIDEO_PATH)):
        if info.get(key) not in (expected, None):
            raise DataError(f"{path}: {key}: expected {expected}, found {info[key]}")
    return wanted


def _read_episodes(folder: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    paths = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    columns = ("episode_index", "length", "dataset_from_index", "data/", "videos/")
    episodes = [row for path in paths for row in _read_table(path, prefixes=columns).to_pylist()]
    episodes.sort(key=lambda episode: episode["episode_index"])
    start = 0
    for number, episode in enumerate(episodes):
        found = (episode["episode_index"], episode["dataset_from_index"])
        if found != (number, start) or episode["length"] < 1:
            raise DataError(
                f"{folder / 'meta/episodes'}: expected episode {number} from frame {start} on, found "
                f"episode {found[0]} from frame {found[1]} on, {episode['length']} frames"
            )
        start += episode["length"]
    if (len(episodes), start) != (info["total_episodes"], info["total_frames"]):
        raise DataError(
            f"{folder / 'meta/episodes'}: expected {info['total_episodes']} episodes of {info['total_frames']} frames "
            f"in all, as meta/info.json says, found {len(episodes)} of {start}"
        )
    return episodes


def _read_frames(folder: Path, episodes: list[dict[str, Any]], names: Sequence[str]) -> pyarrow.Table:
    """The frames of all episodes in their order, whichever files hold them."""
    places = sorted({(episode["data/chunk_index"], episode["data/file_index"]) for episode in episodes})
    paths = [folder / DATA_PATH.format(chunk_index=chunk, file_index=file) for chunk, file in places]
    columns = ("index", "episode_index", *names)
    tables = [_read_table(path, columns=columns) for path in paths]
    try:
        table = pyarrow.concat_tables(tables).sort_by("index")
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{folder / 'data'}: expected tables of one kind, found: {error}") from error
    expected = np.repeat(np.arange(len(episodes)), [episode["length"] for episode in episodes])
    index, episode = table["index"].to_numpy(), table["episode_index"].to_numpy()
    if len(index) != len(expected) or (index != np.arange(len(index))).any() or (episode != expected).any():
        raise DataError(
            f"{folder / 'data'}: expected the frames 0 to {len(expected) - 1} of {len(episodes)} episodes as "
            f"meta/episodes has them, found {len(index)} frames in another order or of other episodes"
        )
    return table


def _read_table(path: Path, *, columns: Sequence[str] = (), prefixes: tuple[str, ...] = ()) -> pyarrow.Table:
    try:
        there = pyarrow.parquet.read_schema(path).names
        for name in columns:
            if name not in there:
                raise DataError(f"{path}: expected a column {name}, {available(name, there)}")
        wanted = list(columns) or [name for name in there if name.startswith(prefixes)]
        return pyarrow.parquet.read_table(path, columns=wanted)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: expected a parquet table, found {type(error).__name__}: {error}") from error


def _numbers(folder: Path, frames: pyarrow.Table, name: str) -> np.ndarray:
    """A feature as float32 [N, D]."""
    column = frames[name].combine_chunks()
    lists = pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type)
    try:
        values = (column.flatten() if lists else column).to_numpy(zero_copy_only=False).astype(np.float32)
        lengths = set(column.value_lengths().to_pylist()) if pyarrow.types.is_list(column.type) else {None}
        if column.null_count or len(lengths) != 1 or len(values) % len(frames):
            raise ValueError(f"frames of several lengths: {sorted(map(str, lengths))[:5]}, {column.null_count} missing")
        numbers: np.ndarray = values.reshape(len(frames), -1)
        return numbers
    except (ValueError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{folder / 'data'}: column {name}: expected numbers, as many in each frame: {error}"
        ) from error


def _pictures(folder: Path, frames: pyarrow.Table, name: str) -> np.ndarray:
    """Pictures that are stored in the table, uint8 [N, H, W, 3]."""
    images = []
    for number, entry in enumerate(frames[name].to_pylist()):
        try:
            images.append(np.asarray(Image.open(io.BytesIO(entry["bytes"])).convert("RGB")))
        except (OSError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{folder / 'data'}: {name}: frame {number}: expected a picture: {error}") from error
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"{folder / 'data'}: {name}: frame {number}: expected shape {images[0].shape}, found {images[-1].shape}"
            )
    return np.stack(images)


def _videos(
    folder: Path, episodes: list[dict[str, Any]], name: str, *, fps: float, size: tuple[int, int]
) -> np.ndarray:
    """Frames of a camera, uint8 [N, H, W, 3]."""
    height, width = size
    images = np.empty((sum(episode["length"] for episode in episodes), height, width, 3), np.uint8)
    for place, rows in _by_file(episodes, name, fps):
        path = folder / VIDEO_PATH.format(video_key=name, chunk_index=place[0], file_index=place[1])
        found = 0
        for number, frame in enumerate(_decoded(path, size)):
            if number in rows:
                images[rows[number]] = frame
                found += 1
        if found < len(rows):
            raise DataError(f"{path}: expected frames up to {max(rows)}, found {len(rows) - found} of them missing")
    return images


def _by_file(
    episodes: Iterable[dict[str, Any]], name: str, fps: float
) -> Iterator[tuple[tuple[int, int], dict[int, int]]]:
    """For each file of a camera, the row of each of its frames that belong to an episode."""
    files: dict[tuple[int, int], dict[int, int]] = {}
    for episode in episodes:
        try:
            place = (episode[f"videos/{name}/chunk_index"], episode[f"videos/{name}/file_index"])
            start = round(episode[f"videos/{name}/from_timestamp"] * fps)
        except KeyError as error:
            raise DataError(f"meta/episodes: expected a column {error}, {available(str(error), episode)}") from error
        rows = range(episode["dataset_from_index"], episode["dataset_from_index"] + episode["length"])
        files.setdefault(place, {}).update(zip(range(start, start + len(rows)), rows, strict=True))
    yield from files.items()


def _decoded(path: Path, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The frames of a video, each as often as it is stored, by imageio-ffmpeg's ffmpeg."""
    if not path.is_file():
        raise DataError(f"{path}: expected a video; there is no such file")
    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise DataError(f"{path}: expected ffmpeg to decode it, found none: {error}") from error
    command = [ffmpeg, "-v", "error", "-protocol_whitelist", "file", "-i", f"file:{path}"]
    command += ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        if process.stdout is None:
            raise RuntimeError("a process with stdout=PIPE has no stdout")
        try:
            while header := process.stdout.readline():  # of a PPM: "P6", width and height, 255, and then the pixels
                width, height = map(int, process.stdout.readline().split())
                if (height, width) != size or header != b"P6\n" or process.stdout.readline() != b"255\n":
                    raise DataError(f"{path}: expected frames of {size} (height, width), found {(height, width)}")
                content = process.stdout.read(height * width * 3)
                if len(content) < height * width * 3:
                    break
                yield np.frombuffer(content, np.uint8).reshape(height, width, 3)
            failed = process.wait()
        finally:
            process.kill()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().partition("\n")[0]
        if failed or said:
            raise DataError(f"{path}: expected a whole video, ffmpeg says: {said or f'exit code {failed}'}")


def _size(feature: dict[str, Any]) -> tuple[int, int]:
    """Height and width; the channels are first or last."""
    shape = [int(length) for length in feature["shape"]]
    return (shape[1], shape[2]) if shape[0] == 3 and shape[2] != 3 else (shape[0], shape[1])


def _short(name: str) -> str:
    for prefix in IMAGE_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
