"""What the release calls each tensor, in which layout, and which keywords its models were made with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from driftfield.training import ConfigError, from_plain, option
from driftfield.training.atomic_file import parse_json

T = TypeVar("T", "ReleasedGenerator", "ReleasedMAE")
MODELS: Final = {"gen": "ImageGenerator", "mae": "ResNetMAE"}  # kind, as metadata.json says it -> our class
MAX_COUNT: Final = 1000  # blocks, tokens, styles: bounds the time that a damaged metadata.json can take
MAX_SIZE: Final = 1_000_000
UP_BLOCKS: Final = ("up43", "up32", "up21", "up10")  # of the decoder, from the deepest; one for each stage


@dataclass(kw_only=True)
class ReleasedGenerator:
    """`model_config` of a generator's metadata.json; the defaults are the release's."""

    input_size: int = option("side of the output", min=1, max=MAX_SIZE)
    in_channels: int = option("channels of the noise", min=1, max=MAX_SIZE)
    out_channels: int = option("channels of the output", min=1, max=MAX_SIZE)
    patch_size: int = option("side of a patch", min=1, max=MAX_SIZE)
    hidden_size: int = option("channels of a token", min=1, max=MAX_SIZE)
    depth: int = option("blocks", min=1, max=MAX_COUNT)
    num_heads: int = option("attention heads", min=1, max=MAX_SIZE)
    cond_dim: int = option("channels of the condition", min=1, max=MAX_SIZE)
    num_classes: int = option("rows of the class table", min=1, max=MAX_SIZE)
    n_cls_tokens: int = option("in-context tokens", min=1, max=MAX_COUNT)
    noise_classes: int = option("entries of a style slot; 0: no styles", 0, min=0, max=MAX_SIZE)
    noise_coords: int = option("style slots", 1, min=1, max=MAX_COUNT)
    mlp_ratio: float = option("width of the feed-forward layers before the factor 2/3", 4.0)
    use_qknorm: bool = option("normalised queries and keys", False)
    use_swiglu: bool = option("SwiGLU", False)
    use_rope: bool = option("rotary embedding", False)
    use_rmsnorm: bool = option("RMSNorm", False)
    attn_fp32: bool = option("attention in float32", True)
    use_bf16: bool = option("activations in bfloat16: autocast's part here", False)
    use_remat: bool = option("recomputed activations in training", False)

    def __post_init__(self) -> None:
        _require(
            self, use_qknorm=True, use_swiglu=True, use_rope=True, use_rmsnorm=True, mlp_ratio=4.0,
            out_channels=self.in_channels,
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """The keywords of `ImageGenerator`."""
        return {
            "image_size": self.input_size, "channels": self.in_channels, "patch_size": self.patch_size,
            "hidden_size": self.hidden_size, "depth": self.depth, "num_heads": self.num_heads,
            "cond_size": self.cond_dim, "num_classes": self.num_classes, "num_context_tokens": self.n_cls_tokens,
            "num_styles": self.noise_coords if self.noise_classes else 0,
            "num_style_entries": max(self.noise_classes, 1), "attention_in_float32": self.attn_fp32,
            "rotary_in_bfloat16": self.use_bf16 and not self.attn_fp32,
        }  # fmt: skip


@dataclass(kw_only=True)
class ReleasedMAE:
    """`model_config` of a masked autoencoder's metadata.json; the defaults are the release's."""

    in_channels: int = option("channels of the images", 3, min=1, max=MAX_SIZE)
    base_channels: int = option("channels of the first stage", 64, min=1, max=MAX_SIZE)
    layers: tuple[int, ...] = option("blocks of each stage", min=1, max=MAX_COUNT)
    input_patch_size: int = option("side of the patches that make the channels", 1, min=1, max=MAX_SIZE)
    patch_size: int = option("side of what is masked at once", 4, min=1, max=MAX_SIZE)
    num_classes: int = option("classes", 1000, min=1, max=MAX_SIZE)
    dropout_prob: float = option("dropout", 0.0)
    use_bf16: bool = option("activations in bfloat16: autocast's part here", False)

    def __post_init__(self) -> None:
        _require(self, dropout_prob=0.0)
        if len(self.layers) != len(UP_BLOCKS):
            raise ValueError(f"layers: expected {len(UP_BLOCKS)} numbers, found {len(self.layers)}")

    def arguments(self) -> dict[str, Any]:
        """The keywords of `ResNetMAE`."""
        return {
            "in_channels": self.in_channels, "base_channels": self.base_channels, "blocks": self.layers,
            "patch_size": self.input_patch_size, "mask_patch": self.patch_size, "num_classes": self.num_classes,
        }  # fmt: skip


class Layout(NamedTuple):
    """The same tensor there and here, as the two sides of einops' `rearrange`; several arrays make one of ours."""

    theirs: str
    ours: str


DENSE: Final = Layout("part i o", "(part o) i")  # the weight of a linear map
CONV: Final = Layout("part h w i o", "(part o) i h w")
VECTOR: Final = Layout("part o", "(part o)")
TABLE: Final = Layout("part k c", "(part k) c")
TOKENS: Final = Layout("part 1 n c", "(part n) c")
STYLES: Final = Layout("part k c", "(k part) c")  # row entry * num_styles + slot


class Origin(NamedTuple):
    """One tensor of ours and the arrays of the release that make it."""

    ours: str
    layout: Layout
    theirs: tuple[str, ...]


class Description(NamedTuple):
    """A model of the release in our terms."""

    model: str  # name of the class
    arguments: dict[str, Any]  # keywords of its constructor
    origins: list[Origin]  # of all its tensors


def describe_model(path: Path) -> Description:
    """What a metadata.json of the release says about its model.

    Raises:
        ValueError: the file is no such metadata, or describes a model that is not the paper's.
        OSError: it cannot be read.
    """
    try:
        metadata = parse_json(path.read_bytes())
        if not isinstance(metadata, dict) or not isinstance(metadata.get("model_config"), dict):
            raise ValueError("expected an object with the keys 'kind' and 'model_config'")
        if metadata.get("kind") == "gen":
            arguments = _checked(ReleasedGenerator, metadata["model_config"]).arguments()
            origins = generator_origins(depth=arguments["depth"], num_styles=arguments["num_styles"])
        elif metadata.get("kind") == "mae":
            arguments = _checked(ReleasedMAE, metadata["model_config"]).arguments()
            origins = mae_origins(blocks=arguments["blocks"])
        else:
            raise ValueError(f"kind: expected 'gen' or 'mae', found {metadata.get('kind')!r}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Description(MODELS[metadata["kind"]], arguments, list(origins))


def their_shapes(origin: Origin, shape: Sequence[int]) -> dict[str, list[int]]:
    """Shapes of the arrays that make a tensor of ours of this shape.

    >>> their_shapes(Origin("up.weight", DENSE, ("w1", "w3")), [6, 2])
    {'w1': [2, 3], 'w3': [2, 3]}
    """
    ours, theirs = origin.layout.ours, origin.layout.theirs
    parts = rearrange(torch.empty(*shape, device="meta"), f"{ours} -> {theirs}", part=len(origin.theirs))
    return dict.fromkeys(origin.theirs, list(parts.shape[1:]))


def our_tensor(origin: Origin, arrays: Sequence[Tensor]) -> Tensor:
    """The arrays of an origin as one tensor in our layout.

    >>> our_tensor(Origin("up.weight", DENSE, ("w1", "w3")), [torch.ones(2, 3), torch.zeros(2, 3)]).shape
    torch.Size([6, 2])
    """
    return rearrange(list(arrays), f"{origin.layout.theirs} -> {origin.layout.ours}").contiguous()


def generator_origins(*, depth: int, num_styles: int) -> Iterator[Origin]:
    """Where each tensor of `ImageGenerator` comes from."""
    dit = "LightningDiT_0"
    yield Origin("conditioning.label.weight", TABLE, ("Embed_0/embedding",))
    if num_styles:
        slots = tuple(f"noise_embeds_{slot}/embedding" for slot in range(num_styles))
        yield Origin("conditioning.style.weight", STYLES, slots)
    yield from _linear("conditioning.guidance.mlp.0", "TimestepEmbedder_0/TorchLinear_0")
    yield from _linear("conditioning.guidance.mlp.2", "TimestepEmbedder_0/TorchLinear_1")
    yield _gain("conditioning.guidance.norm", "RMSNorm_0")
    yield from _linear("patch_embedding", f"{dit}/TorchLinear_0")
    yield from _linear("context_projection", f"{dit}/TorchLinear_1")
    yield Origin("position", TOKENS, (f"{dit}/pos_embed",))
    yield Origin("context", TOKENS, (f"{dit}/cls_embed",))
    for index in range(depth):
        yield from _block_origins(f"blocks.{index}", f"{dit}/blocks_{index}")
    yield _gain("final.norm", f"{dit}/FinalLayer_0/RMSNorm_0")
    yield from _linear("final.modulation", f"{dit}/FinalLayer_0/TorchLinear_0")
    yield from _linear("final.out", f"{dit}/FinalLayer_0/TorchLinear_1")


def mae_origins(*, blocks: tuple[int, ...]) -> Iterator[Origin]:
    """Where each tensor of `ResNetMAE` comes from."""
    yield from _conv_norm("encoder.stem", "encoder/conv1", "encoder/gn1")
    for stage, num_blocks in enumerate(blocks):
        for index in range(num_blocks):
            ours, theirs = f"encoder.stages.{stage}.{index}", f"encoder/stages_{stage}/layers_{index}"
            yield from _conv_norm(f"{ours}.first", f"{theirs}/conv1", f"{theirs}/gn1")
            yield from _conv_norm(f"{ours}.second", f"{theirs}/conv2", f"{theirs}/gn2")
            if stage > 0 and index == 0:
                yield from _conv_norm(f"{ours}.skip", f"{theirs}/proj_conv", f"{theirs}/proj_gn")
        yield from _norm(f"encoder.norms.{stage}", f"encoder/layer{stage + 1}_norm")
    yield Origin("classifier.weight", DENSE, ("fc/kernel",))
    yield Origin("classifier.bias", VECTOR, ("fc/bias",))
    yield from _conv_norm("decoder.bridge", "decoder/bridge/conv", "decoder/bridge/gn")
    for step, name in enumerate(UP_BLOCKS):
        ours, theirs = f"decoder.ups.{step}", f"decoder/{name}"
        yield from _norm(f"{ours}.norm", f"{theirs}/concat_norm_fn")
        yield from _conv_norm(f"{ours}.project", f"{theirs}/proj/conv", f"{theirs}/proj/gn")
        yield from _conv_norm(f"{ours}.refine", f"{theirs}/refine/conv", f"{theirs}/refine/gn")
    yield Origin("decoder.head.weight", CONV, ("decoder/head/kernel",))
    yield Origin("decoder.head.bias", VECTOR, ("decoder/head/bias",))


def _block_origins(ours: str, theirs: str) -> Iterator[Origin]:
    swiglu = f"{theirs}/SwiGLUFFN_0/TorchLinear"
    yield _gain(f"{ours}.attention_norm", f"{theirs}/RMSNorm_0")
    yield from _linear(f"{ours}.attention.qkv", f"{theirs}/Attention_0/TorchLinear_0")
    yield _gain(f"{ours}.attention.query_norm", f"{theirs}/Attention_0/q_norm")
    yield _gain(f"{ours}.attention.key_norm", f"{theirs}/Attention_0/k_norm")
    yield from _linear(f"{ours}.attention.out", f"{theirs}/Attention_0/TorchLinear_1")
    yield _gain(f"{ours}.feed_forward_norm", f"{theirs}/RMSNorm_1")
    yield from _linear(f"{ours}.feed_forward.gate_up", f"{swiglu}_0", f"{swiglu}_1")
    yield from _linear(f"{ours}.feed_forward.down", f"{swiglu}_2")
    yield from _linear(f"{ours}.modulation", f"{theirs}/TorchLinear_0")


def _linear(ours: str, *theirs: str) -> Iterator[Origin]:
    """Several linear maps of the release, one above the other, make one of ours."""
    yield Origin(f"{ours}.weight", DENSE, tuple(f"{name}/Dense_0/kernel" for name in theirs))
    yield Origin(f"{ours}.bias", VECTOR, tuple(f"{name}/Dense_0/bias" for name in theirs))


def _gain(ours: str, theirs: str) -> Origin:
    return Origin(f"{ours}.weight", VECTOR, (f"{theirs}/weight",))


def _conv_norm(ours: str, their_conv: str, their_norm: str) -> Iterator[Origin]:
    yield Origin(f"{ours}.conv.weight", CONV, (f"{their_conv}/kernel",))
    yield from _norm(f"{ours}.norm", their_norm)


def _norm(ours: str, theirs: str) -> Iterator[Origin]:
    yield Origin(f"{ours}.weight", VECTOR, (f"{theirs}/scale",))
    yield Origin(f"{ours}.bias", VECTOR, (f"{theirs}/bias",))


def _checked(schema: type[T], model_config: Mapping[str, Any]) -> T:
    unknown = sorted(model_config.keys() - {field.name for field in fields(schema)})
    if unknown:
        raise ValueError(f"model_config: expected the release's keys, found {', '.join(unknown)}")
    try:
        return from_plain(schema, model_config)
    except ConfigError as error:
        raise ValueError(f"model_config: {error}") from error


def _require(config: object, **values: Any) -> None:
    for name, value in values.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}: expected {value}, the paper's, found {getattr(config, name)}")
