"""The authors' published weights: which there are, where they are, and how their files are read."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack  # type: ignore[import-untyped]
import torch
from torch import Tensor

RELEASE_REPOSITORY: Final = "Goodeat/drifting"  # on the Hugging Face hub
RELEASE_PREFIX: Final = "hf://"
METADATA_FILE: Final = "metadata.json"
ARRAYS_FILE: Final = "ema_params.msgpack"
RELEASED: Final = {  # name -> kind, as metadata.json calls it
    "latent_L_sota": "gen",
    "latent_B_sota": "gen",
    "pixel_L_sota": "gen",
    "pixel_B_sota": "gen",
    "ablation": "gen",
    "mae_latent_640": "mae",
    "mae_latent_256": "mae",
    "mae_pixel_640": "mae",
}

ARRAY_EXTENSION: Final = 1  # msgpack extension type of an array: (shape, dtype name, bytes)
CHUNKED: Final = "__msgpack_chunked_array__"  # key of a map that stands for a large array
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_DEPTH: Final = 16  # of maps in maps; the release has 6
MAX_ENTRIES: Final = 100_000  # of one map
MAX_LIST: Final = 64  # lists hold the dimensions of an array


class Damaged(NamedTuple):
    """What a file holds in the place of an array of real numbers."""

    found: str


class _Leaf(NamedTuple):
    """An entry of the file that is no plain map: an array, the chunks of one, or what should not be there."""

    name: str
    value: Any


def download_release(name: str, *, revision: str | None = None) -> Path:
    """Download the two files of one of the release's models, or find them in the Hugging Face cache.

    Args:
        name: one of `RELEASED`.
        revision: commit, tag or branch of `RELEASE_REPOSITORY`.

    Raises:
        ValueError: there is no such name.
        FileNotFoundError: the files are not in the cache and the hub can't be reached.

    Returns:
        The folder that holds metadata.json and ema_params.msgpack.

    >>> download_release("latent_L")
    Traceback (most recent call last):
    ValueError: expected one of latent_L_sota, latent_B_sota, pixel_L_sota, pixel_B_sota, ablation, mae_latent_640, \
mae_latent_256, mae_pixel_640, found 'latent_L'
    """
    if name not in RELEASED:
        raise ValueError(f"expected one of {', '.join(RELEASED)}, found {name!r}")
    path = f"models/{RELEASED[name]}/jax/{name}"
    files = [METADATA_FILE, ARRAYS_FILE]
    try:
        folder = download(RELEASE_REPOSITORY, [f"{path}/{file}" for file in files], revision=revision) / path
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; without a network, fetch {METADATA_FILE} and {ARRAYS_FILE} of {path} elsewhere, put the two "
            "into a folder and run python -m vision.convert source=FOLDER out=MODEL"
        ) from error
    require_files(folder, files)
    return folder


def download(repository: str, files: Sequence[str], *, revision: str | None = None) -> Path:
    """Download files of a repository of the Hugging Face hub, or find them in its cache.

    Args:
        repository: "owner/name".
        files: their paths in the repository.
        revision: commit, tag or branch.

    Raises:
        FileNotFoundError: they are not in the cache and the hub can't be reached, or refuses.

    Returns:
        The folder that stands for the repository.
    """
    import huggingface_hub  # takes a second, and only a download needs it

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the errors of whichever HTTP library the hub's client uses are among them
        raise FileNotFoundError(
            f"{repository}: expected it on the Hugging Face hub or in its cache, found neither ({first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, as far as it fits a sentence.

    >>> first_line(OSError("401\\nsee the manual"))
    '401'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def require_files(folder: Path, names: Sequence[str]) -> None:
    """Raise FileNotFoundError, naming what is absent, unless a folder holds all of these files."""
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        expected, found = " and ".join(names), " nor ".join(absent)
        raise FileNotFoundError(f"{folder}: expected a folder with {expected}, found no {found}")


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Tensor | Damaged]:
    """Read a Flax msgpack file as data alone.

    Source: Flax's serialisation: maps in maps, arrays as msgpack extension 1.

    Args:
        path: the file.

    Raises:
        ValueError: the file as a whole is damaged: cut, longer than its content, nested deeply, a name given twice.

    Returns:
        What stands under each name, such as "encoder/conv1/kernel": a float32 tensor in the file's own layout (bfloat16
        is widened), or why there is none.
    """
    content = Path(path).read_bytes()
    try:
        tree = _unpack(content)
        del content  # of the size of the arrays
        leaves = list(_leaves(tree))
    except ValueError as error:  # msgpack's own errors are ValueErrors too
        raise ValueError(f"{path}: expected a whole Flax msgpack file, found: {first_line(error)}") from error
    del tree
    arrays: dict[str, Tensor | Damaged] = {}
    for index, leaf in enumerate(leaves):
        if leaf.name in arrays:
            raise ValueError(f"{path}: expected each name once, found {leaf.name!r} twice")
        arrays[leaf.name] = _array(leaf.value)
        leaves[index] = leaf._replace(value=None)  # its bytes are not needed any more
    return arrays


def _unpack(content: bytes) -> Any:
    return msgpack.unpackb(content, raw=False, object_pairs_hook=_map, max_map_len=MAX_ENTRIES, max_array_len=MAX_LIST)


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    result = {}
    for name, value in pairs:
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"a name that is no text: {name!r:.100}")
        if name in result:
            raise ValueError(f"the name {name!r:.100} twice in one map")
        result[name] = value
    return result


def _leaves(tree: Any) -> Iterator[_Leaf]:
    """All that is no plain map, without recursion; a root that holds "params" alone is left out of the names."""
    if not isinstance(tree, dict):
        raise ValueError(f"{type(tree).__name__} instead of a map of names")
    if tree.keys() == {"params"} and isinstance(tree["params"], dict):
        tree = tree["params"]
    rest = [("", 1, tree)]
    while rest:
        prefix, depth, branch = rest.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"maps nested more than {MAX_DEPTH} deep")
        for name, value in branch.items():
            if isinstance(value, dict) and CHUNKED not in value:
                rest.append((f"{prefix}{name}/", depth + 1, value))
            else:
                yield _Leaf(prefix + name, value)


def _array(value: Any) -> Tensor | Damaged:
    try:
        return _joined(value) if isinstance(value, dict) else _decoded(value)
    except ValueError as error:
        return Damaged(str(error))


def _decoded(value: Any) -> Tensor:
    if not isinstance(value, msgpack.ExtType) or value.code != ARRAY_EXTENSION:
        raise ValueError(f"{_kind(value)} instead of an array")
    try:
        parts = _unpack(value.data)
    except ValueError as error:
        raise ValueError(f"a damaged array ({first_line(error)})") from error
    if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[2], bytes):
        raise ValueError("an array that is not (shape, dtype, bytes)")
    shape, dtype, content = parts
    _require_shape(shape)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.100} {shape}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if len(content) != expected:
        raise ValueError(f"{len(content)} bytes for {dtype} {shape}, which takes {expected}")
    # A bytearray, because torch warns of memory that it may not write to. The format is little-endian, as torch's CPUs.
    return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).reshape(shape).float()


def _joined(value: dict[str, Any]) -> Tensor:
    """A large array is stored as the chunks of its flat form."""
    if value.keys() != {CHUNKED, "shape", "chunks"}:
        raise ValueError(f"a chunked array with the keys {sorted(value)}")
    shape, chunks = _listed(value["shape"]), _listed(value["chunks"])
    _require_shape(shape)
    flat = [_decoded(chunk).flatten() for chunk in chunks]
    found = sum(len(chunk) for chunk in flat)
    if found != math.prod(shape):
        raise ValueError(f"chunks of {found} numbers for {shape}, which takes {math.prod(shape)}")
    return torch.cat(flat).reshape(shape)


def _listed(value: Any) -> list[Any]:
    """Flax stores a list as a map from "0", "1", ..."""
    if isinstance(value, dict) and value.keys() == {str(index) for index in range(len(value))}:
        return [value[str(index)] for index in range(len(value))]
    if isinstance(value, list):
        return value
    raise ValueError(f"{_kind(value)} instead of a list in a chunked array")


def _require_shape(shape: Any) -> None:
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"an array of shape {shape!r:.100}")


def _kind(value: Any) -> str:
    return f"extension {value.code}" if isinstance(value, msgpack.ExtType) else type(value).__name__
