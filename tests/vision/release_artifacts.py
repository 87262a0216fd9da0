"""Artifacts in the release's format: metadata.json and ema_params.msgpack, written from arrays."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def read_tree(folder: Path) -> dict[str, Any]:
    """The nested maps of an artifact, its arrays still packed."""
    return msgpack.unpackb((folder / "ema_params.msgpack").read_bytes(), raw=False)


def read_config(folder: Path) -> dict[str, Any]:
    """`model_config` of an artifact."""
    return json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["model_config"]


def write_artifact(folder: Path, *, kind: str, model_config: Mapping[str, Any], tree: Any) -> Path:
    """Write the two files; what is no array in the tree is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "flax.msgpack", "kind": kind, "backend": "jax", "model_config": dict(model_config)}
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    (folder / "ema_params.msgpack").write_bytes(msgpack.packb(tree, default=pack_array))
    return folder


def pack_array(array: np.ndarray) -> msgpack.ExtType:
    return packed(array.shape, array.dtype.name, array.tobytes())


def packed(shape: Any, dtype: Any, content: Any) -> msgpack.ExtType:
    """An array as Flax writes it, whether or not the three agree."""
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *branches, name = path.split("/")
        branch = tree
        for part in branches:
            branch = branch.setdefault(part, {})
        branch[name] = leaf
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} as {"a/b": x}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def golden_mae(name: str, folder: Path) -> Path:
    """Write the artifact of a golden MAE, whose weights are random numbers seeded by each array's path."""
    shapes = json.loads((GOLDEN / name / "param_shapes.json").read_text(encoding="utf-8"))
    tree = nested({path: _formula_array(path, tuple(shape)) for path, shape in shapes.items()})
    return write_artifact(folder, kind="mae", model_config=read_config(GOLDEN / name), tree=tree)


def nchw(images: np.ndarray) -> Tensor:
    """The release's [B, H, W, C] as our [B, C, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _formula_array(path: str, shape: tuple[int, ...]) -> np.ndarray:
    std = np.sqrt(2 / np.prod(shape[:-1])) if len(shape) > 1 else 0.1
    values = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape) * std
    return (values + path.endswith("scale")).astype(np.float32)
