"""A zarr store of format 2 as other programs leave it, written by the words of its specification, without zarr."""

import json
import zipfile
from itertools import product
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np

# zarr 2's own default, and what Diffusion Policy calls "disk".
LZ4 = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 0, "blocksize": 0}
ZSTD = {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 2, "blocksize": 0}


def write_array(folder: Path, array: np.ndarray, chunks: tuple[int, ...], compressor: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True)
    metadata = {
        "chunks": list(chunks),
        "compressor": compressor,
        "dtype": array.dtype.str,
        "fill_value": 0,
        "filters": None,
        "order": "C",
        "shape": list(array.shape),
        "zarr_format": 2,
    }
    (folder / ".zarray").write_text(json.dumps(metadata, indent=4), encoding="utf-8")
    codec = numcodecs.get_codec(compressor) if compressor else None
    for chunk in product(*(range(-(-length // size)) for length, size in zip(array.shape, chunks, strict=True))):
        full = np.zeros(chunks, array.dtype)  # a chunk at the edge is stored whole
        part = array[tuple(slice(i * n, (i + 1) * n) for i, n in zip(chunk, chunks, strict=True))]
        full[tuple(map(slice, part.shape))] = part
        content = codec.encode(full) if codec else full.tobytes()
        (folder / ".".join(map(str, chunk))).write_bytes(bytes(content))


def write_store(folder: Path, data: dict[str, np.ndarray], episode_ends: list[int], *, rows: int = 4) -> Path:
    """A replay buffer of Diffusion Policy, chunks of that many rows, compressors by turns."""
    for group in (folder, folder / "data", folder / "meta"):
        group.mkdir(parents=True, exist_ok=True)
        (group / ".zgroup").write_text('{\n    "zarr_format": 2\n}', encoding="utf-8")
    for (name, array), compressor in zip(data.items(), (LZ4, ZSTD, None) * len(data), strict=False):
        write_array(folder / "data" / name, array, (rows, *array.shape[1:]), compressor)
    write_array(folder / "meta/episode_ends", np.array(episode_ends, "<i8"), (len(episode_ends),), None)
    return folder


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zarr.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path
