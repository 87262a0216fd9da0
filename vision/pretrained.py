"""Models in a folder: config.json (the constructor's keywords) and model.safetensors (the weights)."""

import json
import os
import re
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
from torch import nn

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


class Pretrained(nn.Module):
    """A module that can be written to a folder and built again from it; its class sets `config` when constructed."""

    config: dict[str, Any]  # the keywords that build this module again

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into a folder, each whole or not at all.

        Args:
            folder: made if it does not exist; the two files in it are replaced.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        config = {"model": type(self).__name__, "arguments": self.config}
        _write_aside(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        _write_aside(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

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
        model = cls(**_read_arguments(folder / CONFIG_FILE, cls.__name__))
        path = folder / WEIGHTS_FILE
        try:
            model.load_state_dict(safetensors.torch.load_file(path), strict=True)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        except RuntimeError as error:
            raise ValueError(f"{path}: the weights do not fit the model of {CONFIG_FILE}: {error}") from error
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict) or config.keys() != {"model", "arguments"}:
        raise ValueError(f"{path}: expected an object with the keys 'model' and 'arguments'")
    if config["model"] != model:
        raise ValueError(f"{path}: expected the config of {model}, found that of {config['model']}")
    return config["arguments"]


def _write_aside(path: Path, content: bytes) -> None:
    """Write next to the path, then rename, so that a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, path)
