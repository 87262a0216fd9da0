"""Models in a folder: config.json (the constructor's keywords) and model.safetensors (the weights)."""

import os
import re
import uuid
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
from torch import nn

from driftfield.training.atomic_file import TEMPORARY_PREFIX, parse_json, sync, write_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


class Pretrained(nn.Module):
    """A module that can be written to a folder and built again from it; its class sets `config` when constructed."""

    config: dict[str, Any]  # the keywords that build this module again

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into a folder, each whole or not at all.

        Args:
            folder: made if it does not exist; the two files in it are replaced, config.json last.

        Raises:
            OSError: if the disk refuses; a file is then as it was.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(folder / WEIGHTS_FILE, self)
        write_json(folder / CONFIG_FILE, {"model": type(self).__name__, "arguments": self.config})

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Build the model from a folder or from a repository of the Hugging Face hub, on the CPU, in eval mode.

        Args:
            source: folder with config.json and model.safetensors, or a hub id "owner/name".
            revision: commit, tag or branch of the hub repository.

        Raises:
            FileNotFoundError: neither a folder nor a hub id, or one of the two files is absent.
            ValueError: config.json is another model's, or its arguments or the weights do not fit the model.

        Returns:
            The model; every weight of the file is used and none of the model is left as it was.
        """
        folder = _folder_of(source, revision)
        config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        try:
            model = cls(**_read_arguments(config, cls.__name__))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config}: {error}") from error
        try:
            model.load_state_dict(safetensors.torch.load_file(weights), strict=True)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{weights}: not a whole safetensors file ({error})") from error
        except RuntimeError as error:
            raise ValueError(f"{weights}: the weights do not fit the model of {CONFIG_FILE}: {error}") from error
        return model.eval()


def _folder_of(source: str | os.PathLike[str], revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{source}: expected a folder or a hub id 'owner/name'; there is no such folder")
    from huggingface_hub import snapshot_download  # only a download needs it

    return Path(snapshot_download(str(source), revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))


def _read_arguments(path: Path, model: str) -> dict[str, Any]:
    config = parse_json(path.read_bytes())
    if not isinstance(config, dict) or config.keys() != {"model", "arguments"}:
        raise ValueError("expected an object with the keys 'model' and 'arguments'")
    if config["model"] != model:
        raise ValueError(f"expected the config of {model}, found that of {config['model']}")
    if not isinstance(config["arguments"], dict):
        raise ValueError(f"arguments: expected an object, found {config['arguments']!r}")
    return config["arguments"]


def _write_weights(path: Path, model: nn.Module) -> None:
    """Write next to the path, then rename, so that a reader sees the old file or the new one."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex}")
    try:
        aside.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
