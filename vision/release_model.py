"""A model of the release as one of ours: every array checked, then converted and written."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from driftfield.training.pretrained import write_files
from vision.release import ARRAYS_FILE, METADATA_FILE, Damaged, read_arrays, require_files
from vision.release_layout import Description, Origin, describe_model, our_tensor, their_shapes


class Converted(NamedTuple):
    """What `convert` wrote."""

    model: str  # name of the class
    num_parameters: int
    source: Path  # the file of the arrays
    source_sha256: str


def convert_release(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, models: Sequence[type[nn.Module]]
) -> Converted:
    """Convert a model of the release to a folder that `from_pretrained` takes.

    Args:
        source: folder with metadata.json and ema_params.msgpack.
        out: folder to write, made if it does not exist; a model in it is replaced.
        models: classes of ours that it may become, each with `config`, the keywords that build it.

    Raises:
        FileNotFoundError: the source lacks one of the two files.
        ValueError: metadata.json is not that of one of the models, or arrays are missing, left over, damaged, not
            finite or of another shape or type than it says: all of them are listed, and nothing is written.
        OSError: the disk refuses.
    """
    source = Path(source)
    require_files(source, [METADATA_FILE, ARRAYS_FILE])
    description = describe_model(source / METADATA_FILE)
    model = _empty(description, models, source / METADATA_FILE)
    arrays = read_arrays(source / ARRAYS_FILE)
    wrong = list(_mismatches(description.origins, model.state_dict(), arrays))
    if wrong:
        raise ValueError(
            f"{source / ARRAYS_FILE}: expected the arrays of the {description.model} of {METADATA_FILE}, found "
            "differences:\n  " + "\n  ".join(wrong)
        )
    model.load_state_dict(_our_state(description.origins, arrays), strict=True, assign=True)
    # By every process that converts: each machine of a training has a cache of its own, and not each the main process.
    write_files(Path(out), model.state_dict(), description.model, model.config)
    with open(source / ARRAYS_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Converted(description.model, num_parameters, source / ARRAYS_FILE, digest)


def _empty(description: Description, models: Sequence[type[nn.Module]], path: Path) -> Any:
    """The model without memory for its weights."""
    names = [model.__name__ for model in models]
    if description.model not in names:
        raise ValueError(f"{path}: expected the metadata of {' or '.join(names)}, found that of {description.model}")
    try:
        with torch.device("meta"):
            return models[names.index(description.model)](**description.arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _mismatches(
    origins: Sequence[Origin], ours: Mapping[str, Tensor], arrays: Mapping[str, Tensor | Damaged]
) -> Iterator[str]:
    """A line for each array that is not what our tensors need, in the order of their names."""
    shapes: dict[str, list[int]] = {}
    for origin in origins:
        shapes |= their_shapes(origin, ours[origin.ours].shape)
    for name in sorted(shapes.keys() | arrays.keys()):
        expected = f"float32 {shapes[name]}" if name in shapes else "no such array"
        array = arrays.get(name, Damaged("none"))
        if isinstance(array, Damaged):
            yield f"{name}: expected {expected}, found {array.found}"
        elif list(array.shape) != shapes.get(name):
            yield f"{name}: expected {expected}, found float32 {list(array.shape)}"
        elif not array.isfinite().all():
            yield f"{name}: expected finite numbers, found {int((~array.isfinite()).sum())} that are not"


def _our_state(origins: Sequence[Origin], arrays: dict[str, Any]) -> dict[str, Tensor]:
    """Our tensors; each array is taken out when it is used, so that a large model is not held twice."""
    return {origin.ours: our_tensor(origin, [arrays.pop(name) for name in origin.theirs]) for origin in origins}
