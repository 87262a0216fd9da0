"""Reader of the release's weight files and the map from its names to ours (METHOD.md section 14 describes both)."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
ARRAY_EXTENSION = 1  # msgpack extension type of an array: (shape, dtype name, bytes)


def read_config(folder: Path) -> dict[str, Any]:
    """The constructor's keywords that an artifact of the release was made with."""
    return json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["model_config"]


def read_artifact(path: Path) -> dict[str, Array]:
    """Every array of a msgpack artifact by its path, such as "encoder/conv1/kernel"."""
    tree = msgpack.unpackb(path.read_bytes(), ext_hook=_decode_array, raw=False)
    return dict(_leaves(tree))


def formula_weights(folder: Path) -> dict[str, Array]:
    """The golden MAE's weights, which are random numbers seeded by each array's path."""
    shapes = json.loads((folder / "param_shapes.json").read_text(encoding="utf-8"))
    return {path: _formula_array(path, tuple(shape)) for path, shape in shapes.items()}


def generator_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ImageGenerator for a generator config of the release."""
    fixed = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "mlp_ratio": 4.0}
    different = {name: config[name] for name, value in fixed.items() if config[name] != value}
    if different or config["in_channels"] != config["out_channels"]:
        raise ValueError(f"not the generator of the paper: {different or 'in_channels differs from out_channels'}")
    return {
        "image_size": config["input_size"],
        "channels": config["in_channels"],
        "patch_size": config["patch_size"],
        "hidden_size": config["hidden_size"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "cond_size": config["cond_dim"],
        "num_classes": config["num_classes"],
        "num_context_tokens": config["n_cls_tokens"],
        "num_styles": config["noise_coords"] if config["noise_classes"] else 0,
        "num_style_entries": max(config["noise_classes"], 1),
        "attention_in_float32": config["attn_fp32"],
    }


def generator_state(arrays: Mapping[str, Array], *, depth: int, num_styles: int) -> dict[str, Tensor]:
    """Our names and layouts for the generator's arrays, each used exactly once."""
    left = dict(arrays)
    state: dict[str, Array] = {}
    dit = "LightningDiT_0"

    def linear(ours: str, *theirs: str) -> None:
        """Several layers of the release above one another make one of ours."""
        state[f"{ours}.weight"] = np.concatenate([left.pop(f"{name}/Dense_0/kernel").T for name in theirs])
        state[f"{ours}.bias"] = np.concatenate([left.pop(f"{name}/Dense_0/bias") for name in theirs])

    def gain(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = left.pop(f"{theirs}/weight")

    state["conditioning.label.weight"] = left.pop("Embed_0/embedding")
    if num_styles:
        tables = [left.pop(f"noise_embeds_{slot}/embedding") for slot in range(num_styles)]
        state["conditioning.style.weight"] = np.stack(tables, axis=1).reshape(-1, tables[0].shape[1])
    linear("conditioning.guidance.mlp.0", "TimestepEmbedder_0/TorchLinear_0")
    linear("conditioning.guidance.mlp.2", "TimestepEmbedder_0/TorchLinear_1")
    gain("conditioning.guidance.norm", "RMSNorm_0")

    linear("patch_embedding", f"{dit}/TorchLinear_0")
    linear("context_projection", f"{dit}/TorchLinear_1")
    state["position"] = left.pop(f"{dit}/pos_embed")[0]
    state["context"] = left.pop(f"{dit}/cls_embed")[0]
    for index in range(depth):
        ours, theirs = f"blocks.{index}", f"{dit}/blocks_{index}"
        gain(f"{ours}.attention_norm", f"{theirs}/RMSNorm_0")
        linear(f"{ours}.attention.qkv", f"{theirs}/Attention_0/TorchLinear_0")
        gain(f"{ours}.attention.query_norm", f"{theirs}/Attention_0/q_norm")
        gain(f"{ours}.attention.key_norm", f"{theirs}/Attention_0/k_norm")
        linear(f"{ours}.attention.out", f"{theirs}/Attention_0/TorchLinear_1")
        gain(f"{ours}.feed_forward_norm", f"{theirs}/RMSNorm_1")
        swiglu = f"{theirs}/SwiGLUFFN_0/TorchLinear"
        linear(f"{ours}.feed_forward.gate_up", f"{swiglu}_0", f"{swiglu}_1")
        linear(f"{ours}.feed_forward.down", f"{swiglu}_2")
        linear(f"{ours}.modulation", f"{theirs}/TorchLinear_0")
    gain("final.norm", f"{dit}/FinalLayer_0/RMSNorm_0")
    linear("final.modulation", f"{dit}/FinalLayer_0/TorchLinear_0")
    linear("final.out", f"{dit}/FinalLayer_0/TorchLinear_1")
    return _finished(state, left)


def mae_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ResNetMAE for an encoder config of the release."""
    if config["dropout_prob"] != 0.0:
        raise ValueError(f"not the encoder of the paper: dropout_prob {config['dropout_prob']}")
    return {
        "in_channels": config["in_channels"],
        "base_channels": config["base_channels"],
        "blocks": tuple(config["layers"]),
        "patch_size": config["input_patch_size"],
        "mask_patch": config["patch_size"],
        "num_classes": config["num_classes"],
    }


def mae_state(arrays: Mapping[str, Array], *, blocks: tuple[int, ...]) -> dict[str, Tensor]:
    """Our names and layouts for the encoder's and decoder's arrays, each used exactly once."""
    left = dict(arrays)
    state: dict[str, Array] = {}

    def conv(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = left.pop(f"{theirs}/kernel").transpose(3, 2, 0, 1)

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = left.pop(f"{theirs}/scale")
        state[f"{ours}.bias"] = left.pop(f"{theirs}/bias")

    def conv_norm(ours: str, their_conv: str, their_norm: str) -> None:
        conv(f"{ours}.conv", their_conv)
        norm(f"{ours}.norm", their_norm)

    conv_norm("encoder.stem", "encoder/conv1", "encoder/gn1")
    for stage, num_blocks in enumerate(blocks):
        for index in range(num_blocks):
            ours, theirs = f"encoder.stages.{stage}.{index}", f"encoder/stages_{stage}/layers_{index}"
            conv_norm(f"{ours}.first", f"{theirs}/conv1", f"{theirs}/gn1")
            conv_norm(f"{ours}.second", f"{theirs}/conv2", f"{theirs}/gn2")
            if stage > 0 and index == 0:
                conv_norm(f"{ours}.skip", f"{theirs}/proj_conv", f"{theirs}/proj_gn")
        norm(f"encoder.norms.{stage}", f"encoder/layer{stage + 1}_norm")
    state["classifier.weight"] = left.pop("fc/kernel").T
    state["classifier.bias"] = left.pop("fc/bias")

    conv_norm("decoder.bridge", "decoder/bridge/conv", "decoder/bridge/gn")
    for step, name in enumerate(("up43", "up32", "up21", "up10")):
        ours, theirs = f"decoder.ups.{step}", f"decoder/{name}"
        norm(f"{ours}.norm", f"{theirs}/concat_norm_fn")
        conv_norm(f"{ours}.project", f"{theirs}/proj/conv", f"{theirs}/proj/gn")
        conv_norm(f"{ours}.refine", f"{theirs}/refine/conv", f"{theirs}/refine/gn")
    conv("decoder.head", "decoder/head")
    state["decoder.head.bias"] = left.pop("decoder/head/bias")
    return _finished(state, left)


def nchw(images: Array) -> Tensor:
    """The release's [B, H, W, C] as our [B, C, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _finished(state: Mapping[str, Array], left: Mapping[str, Array]) -> dict[str, Tensor]:
    if left:
        raise ValueError(f"arrays that no part of the model uses: {sorted(left)}")
    return {name: torch.tensor(array) for name, array in state.items()}


def _formula_array(path: str, shape: tuple[int, ...]) -> Array:
    std = np.sqrt(2 / np.prod(shape[:-1])) if len(shape) > 1 else 0.1
    values = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape) * std
    return (values + path.endswith("scale")).astype(np.float32)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Array]]:
    leaves: list[tuple[str, Array]] = []
    for name, value in tree.items():
        if isinstance(value, np.ndarray):
            leaves.append((prefix + name, value))
        elif "__msgpack_chunked_array__" in value:
            leaves.append((prefix + name, _join_chunks(value)))
        else:
            leaves += _leaves(value, f"{prefix}{name}/")
    return leaves


def _join_chunks(value: Mapping[str, Any]) -> Array:
    """A large array is stored as the pieces of its flat form; lists are stored as maps from "0", "1", ..."""
    shape = tuple(value["shape"][str(axis)] for axis in range(len(value["shape"])))
    chunks = [value["chunks"][str(index)] for index in range(len(value["chunks"]))]
    return np.concatenate(chunks).reshape(shape)


def _decode_array(code: int, data: bytes) -> Array:
    if code != ARRAY_EXTENSION:
        raise ValueError(f"msgpack extension {code} is not an array")
    shape, dtype, content = msgpack.unpackb(data, raw=False)
    return np.frombuffer(content, dtype).reshape(shape)
