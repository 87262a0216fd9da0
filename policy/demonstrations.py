"""Demonstrations from files of any of the formats that are known here."""

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, get_args

from driftfield.training.schema import nearest
from policy.data_error import DataError
from policy.replay_buffer import HEADER, ReplayBuffer
from policy.zarr_arrays import ZarrStore

Format = Literal["auto", "driftfield", "diffusion_policy", "block_push", "kitchen", "robomimic", "lerobot"]

# Format -> module and function; a module is imported when it is needed, for each may need a library of its own.
_READERS: Final[dict[str, tuple[str, str]]] = {
    "diffusion_policy": ("policy.diffusion_policy_data", "load_diffusion_policy"),
    "block_push": ("policy.block_push_data", "load_block_push"),
    "kitchen": ("policy.kitchen_data", "load_kitchen"),
    "robomimic": ("policy.robomimic_data", "load_robomimic"),
    "lerobot": ("policy.lerobot_data", "load_lerobot"),
}
_KNOWN: Final = (
    "a zarr folder or zip file (ours, Diffusion Policy's), an HDF5 file (robomimic), a folder with meta/info.json "
    "(LeRobot), multimodal_push_masks.npy (BlockPush), existence_mask.npy or */*.mjl (kitchen)"
)


def load_demonstrations(path: str | os.PathLike[str], *, format: Format = "auto", **options: Any) -> ReplayBuffer:
    """Read demonstrations.

    Args:
        path: file or folder.
        format: whose; "auto" looks at what is there.
        options: keywords of the format's own reader, such as `observation`, or `keys` for our own format.

    Raises:
        DataError: they are missing, damaged, of no known format, the format has no such option, or what it needs is not
            installed.
    """
    path = Path(path)
    if format == "auto":
        format = detect_format(path)
    elif format not in get_args(Format):
        known = get_args(Format)
        raise DataError(f"format: expected one of {', '.join(known)}, found {format!r}{nearest(format, known)}")
    reader = _reader(format)
    allowed = [
        name for name, parameter in inspect.signature(reader).parameters.items() if name not in ("path", "folder")
    ]
    for name in options:
        if name not in allowed:
            raise DataError(f"{path}: {format} has no option {name!r}: it has {', '.join(allowed)}")
    try:
        return reader(path, **options)
    except ModuleNotFoundError as error:  # a simulator, which says itself how to install it
        raise DataError(f"{path}: {error}") from error


def detect_format(path: Path) -> Format:
    """The format of a file or folder, by what it holds.

    Raises:
        DataError: there is nothing, or nothing that is known.
    """
    if not path.exists():
        raise DataError(f"{path}: expected demonstrations; there is nothing of that name")
    if path.suffix in (".hdf5", ".h5"):
        return "robomimic"
    if path.suffix == ".zip" or any((path / name).is_file() for name in ("zarr.json", ".zgroup")):
        with ZarrStore(path) as store:
            return "driftfield" if HEADER in store.attributes else "diffusion_policy"
    if (path / "meta/info.json").is_file():
        return "lerobot"
    if (path / "multimodal_push_masks.npy").is_file():
        return "block_push"
    if (path / "existence_mask.npy").is_file() or any(path.glob("*/*.mjl")):
        return "kitchen"
    raise DataError(f"{path}: expected {_KNOWN}; found none of them")


def _reader(format: str) -> Callable[..., ReplayBuffer]:
    if format == "driftfield":
        return ReplayBuffer.load
    module, name = _READERS[format]
    try:
        reader: Callable[..., ReplayBuffer] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise DataError(
            f"demonstrations of format {format} need {error.name}, which is not installed: pip install -e '.[policy]'"
        ) from error
    return reader
