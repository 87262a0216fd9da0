"""A model in a folder: config.json (its class's name and the constructor's keywords) and model.safetensors."""

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor, nn

from driftfield.training.atomic_file import TEMPORARY_PREFIX, parse_json, sync, write_json
from driftfield.training.distributed import is_main
from driftfield.training.sharding import gathered

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
M = TypeVar("M", bound=nn.Module)


def write_model(folder: Path, model: nn.Module, name: str, arguments: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors into a folder, each whole or not at all.

    Of several processes, the main one writes; where the model is sharded, all must call this.

    Args:
        folder: made if it does not exist; the two files in it are replaced, config.json last.
        model: whose weights.
        name: of its class.
        arguments: the keywords that build it again.

    Raises:
        OSError: if the disk refuses; a file is then as it was.
    """
    tensors = gathered(model.state_dict())
    if is_main():
        write_files(folder, tensors, name, arguments)


def write_files(folder: Path, tensors: Mapping[str, Tensor], name: str, arguments: Mapping[str, Any]) -> None:
    """Write the two files of a model from its whole tensors, in whichever process calls this.

    Args:
        folder, name, arguments: as for `write_model`.
        tensors: by name.

    Raises:
        OSError: if the disk refuses; a file is then as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, {"model": name, "arguments": dict(arguments)})


def read_model_name(folder: Path) -> str:
    """The class that a folder's config.json names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file.
    """
    name: str = _read_config(folder / CONFIG_FILE)["model"]
    return name


def read_arguments(folder: Path, name: str) -> dict[str, Any]:
    """The keywords of a folder's config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file, or another class's than `name`.
    """
    path = folder / CONFIG_FILE
    config = _read_config(path)
    if config["model"] != name:
        raise ValueError(f"{path}: expected the config of {name}, found that of {config['model']}")
    arguments: dict[str, Any] = config["arguments"]
    return arguments


def read_weights(folder: Path, build: Callable[[], M]) -> M:
    """Build a model and fill it with a folder's weights, on the CPU, in eval mode.

    Args:
        folder: of `write_model`.
        build: makes the model of its config.json.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: the arguments or the weights do not fit the model.

    Returns:
        The model; every weight of the file is used and none of the model is left as it was.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise FileNotFoundError(f"{folder}: expected {WEIGHTS_FILE}, found none")
    try:
        model = build()
    except (TypeError, ValueError) as error:
        where = str(folder / CONFIG_FILE)
        raise ValueError(str(error) if where in str(error) else f"{where}: {error}") from error
    try:
        model.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights}: not a whole safetensors file ({error})") from error
    except RuntimeError as error:
        raise ValueError(f"{weights}: the weights do not fit the model of {CONFIG_FILE}: {error}") from error
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: expected {CONFIG_FILE}, found none")
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, dict) or config.keys() != {"model", "arguments"}:
        raise ValueError(f"{path}: expected an object with the keys 'model' and 'arguments'")
    if not isinstance(config["arguments"], dict) or not isinstance(config["model"], str):
        raise ValueError(f"{path}: expected a text and an object, found {config['model']!r}, {config['arguments']!r}")
    return config


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write next to the path, then rename, so that a reader sees the old file or the new one."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex}")
    try:
        aside.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
