"""Frozen encoders behind the protocol `vision.features.Encoder`, and how they are loaded by name (paper A.3, A.5)."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, Self

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from driftfield.training.pretrained import WEIGHTS_FILE
from vision.features import FAMILIES, Encoder, multi_scale_features, require_families
from vision.mae import ResNetMAE
from vision.release import download, first_line, require_files

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
CONVNEXT_V2: Final = "convnextv2_base.fcmae_ft_in22k_in1k"  # timm's name of the weights that the release uses
TIMM_NAME: Final = re.compile(r"convnextv2_\w+\.\w+")
CONVNEXT_BLOCK: Final = re.compile(r"stages\.([0-3])\.(?:blocks\.)?(\d+)\.(?:conv_dw|dwconv)\.weight")
CHANNEL_STD_FLOOR: Final = 1e-3  # added to the standard deviation over channels (the release's)

# First words of names in checkpoints of self-supervised training that are no part of the ResNet, such as a projector,
# a momentum copy or MoCo's queue. Everything else has to fit.
IGNORED: Final = frozenset({
    "classifier", "encoder_k", "fc", "head", "linear", "momentum_backbone", "momentum_projector", "predictor",
    "projection_head", "projector", "queue", "queue_ptr",
})  # fmt: skip
RESNET_PREFIXES: Final = ("", "encoder_q.", "encoder.", "backbone.", "model.")

RELEASED_MAES: Final[Mapping[str, Mapping[str, Any]]] = {  # sizes, for random weights
    "mae_latent_256": {"in_channels": 4, "base_channels": 256, "num_classes": 1000},
    "mae_latent_640": {"in_channels": 4, "base_channels": 640, "num_classes": 1000},
    "mae_pixel_640": {"in_channels": 3, "base_channels": 640, "num_classes": 1000, "patch_size": 8},
}


class LatentDecoder(Protocol):
    """What `ThroughDecoder` needs of a tokenizer."""

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of latents [B, channels, h, w], differentiable."""
        ...


class FrozenEncoder(nn.Module, ABC):
    """An encoder whose weights take no gradient and which stays in evaluation mode whatever its owner does."""

    @abstractmethod
    def features(self, images: Tensor, *, families: str = FAMILIES) -> dict[str, Tensor]:
        """Features [B, L, C] by name, differentiable with respect to the images."""

    def train(self, mode: bool = True) -> Self:
        """Nothing changes: in training mode an encoder would be another function."""
        return super().train(False)

    def _freeze(self) -> None:
        self.requires_grad_(False).train()


class ConvNeXtV2(FrozenEncoder):
    """ConvNeXt-V2 on images resized to 224 x 224, with the features of the release (paper A.5 and Table 9).

    Each stage's map is normalised over its channels at each location: (x - mean) / (std + 1e-3). Features:
    `stage_1`, `stage_2`, `stage_3` (family a: the locations; the first stage has too many), `stage_0_mean`,
    `stage_0_std`, ... `stage_3_std` (b: over the whole map), `global_mean` (b: the mean of the last stage before that
    normalisation, after the network's final layer normalisation) and `global_std` (b: `stage_3_std` once more, so it
    counts twice). There are no families c and d.

    Args:
        depths: blocks of each of the four stages; the default is the base network's.
        dims: channels of each stage.
        image_size: side to which images are resized.

    >>> encoder = ConvNeXtV2(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))
    >>> features = encoder.features(torch.zeros(2, 3, 32, 32), families="b")
    >>> len(features), features["stage_3_mean"].shape
    (10, torch.Size([2, 1, 8]))
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 27, 3),
        dims: Sequence[int] = (128, 256, 512, 1024),
        image_size: int = 224,
    ) -> None:
        from timm.models.convnext import ConvNeXt  # imported here: slow, and a training without it is common

        super().__init__()
        self.image_size = image_size
        self.backbone = ConvNeXt(
            depths=tuple(depths), dims=tuple(dims), use_grn=True, ls_init_value=None, num_classes=0
        )
        self._freeze()

    @classmethod
    def from_pretrained(cls, source: str | Path = CONVNEXT_V2) -> Self:
        """Load weights in timm's or the original authors' naming; the network's size is read off them.

        Args:
            source: a checkpoint file, a folder with model.safetensors, or a name of timm's, looked up on the hub.

        Raises:
            FileNotFoundError: there are no such weights here, and the hub gives none.
            ValueError: the file cannot be read, or holds something else than one ConvNeXt-V2.
        """
        from timm.models.convnext import checkpoint_filter_fn

        if not Path(source).exists():
            source = _download_convnext(str(source))
        weights = _read_weights(source)
        depths, dims = _convnext_sizes(weights, source)
        encoder = cls(depths=depths, dims=dims)
        weights = checkpoint_filter_fn(weights, encoder.backbone)
        _load(encoder.backbone, {k: v for k, v in weights.items() if not k.startswith("head.fc.")}, source)
        return encoder

    def features(self, images: Tensor, *, families: str = FAMILIES) -> dict[str, Tensor]:
        """The features that the class names.

        Args:
            images: [B, 3, H, W] or, for grey images, [B, 1, H, W], in [-1, 1], of any size.
            families: which of a and b; others add nothing.

        Raises:
            ValueError: unknown families, or a shape is wrong.

        Returns:
            [B, L, C] by name.
        """
        require_families(families)
        x = self.backbone.stem(imagenet_input(images, self.image_size))
        features: dict[str, Tensor] = {}
        for stage, blocks in enumerate(self.backbone.stages):
            x = blocks(x)
            normalized = _normalize_channels(x)
            known = [family for family in "ab" if family in families and (family, stage) != ("a", 0)]
            if known:
                features |= multi_scale_features({f"stage_{stage}": normalized}, families="".join(known))
        if "b" in families:
            norm: Any = self.backbone.head.norm
            pooled = x.float().mean(dim=(2, 3))  # [B, C]
            features["global_mean"] = F.layer_norm(pooled, pooled.shape[1:], norm.weight, norm.bias, norm.eps)[:, None]
            features["global_std"] = features["stage_3_std"]
        return features


class ResNet50(FrozenEncoder):
    """A ResNet-50, as SimCLR and MoCo-v2 train them, with the features of A.5 (paper Table 3).

    Maps: `conv1` after the stem (its pooling included), `layer1` ... `layer4` after each stage, and `layer1_blk2`,
    `layer3_blk2`, ... after every second block of a stage; the last block's map is the stage's own and is not handed
    out twice. Of each map the features are those of `multi_scale_features`.

    Args:
        image_size: side to which images are resized; the last map has a 32nd of it.
        normalize: subtract ImageNet's mean and divide by its standard deviation, as MoCo-v2 does; SimCLR's networks
            take [0, 1] as it is.

    >>> features = ResNet50(image_size=32).features(torch.zeros(1, 3, 8, 8), families="b")
    >>> [name for name in features if name.endswith("_mean")][:4]
    ['conv1_mean', 'layer1_blk2_mean', 'layer1_mean', 'layer2_blk2_mean']
    """

    def __init__(self, *, image_size: int = 256, normalize: bool = True) -> None:
        from torchvision.models import resnet50

        super().__init__()
        self.image_size, self.normalize = image_size, normalize
        self.backbone = resnet50(weights=None)
        self.backbone.fc = nn.Identity()
        self._freeze()

    @classmethod
    def from_pretrained(cls, source: str | Path, *, image_size: int = 256, normalize: bool = True) -> Self:
        """Load a checkpoint of self-supervised or supervised training, in torchvision's naming.

        A prefix as in `module.encoder_q.conv1.weight` is taken off; heads and momentum copies (`IGNORED`) are left
        out; every other name has to be one of the network's, and all of those have to be there.

        Args:
            source: a .safetensors or .pth file, or a folder with model.safetensors. Of a .pth only tensors are read.
            image_size, normalize: as for the class.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file cannot be read, or its weights do not fit.
        """
        if not Path(source).exists():
            raise FileNotFoundError(f"resnet50: expected a checkpoint of a ResNet-50, found nothing at {source}")
        weights = _read_weights(source)
        prefix = next((prefix for prefix in RESNET_PREFIXES if f"{prefix}conv1.weight" in weights), None)
        if prefix is None:
            raise ValueError(
                f"{source}: expected a ResNet with conv1.weight, found names such as {sorted(weights)[:3]}"
            )
        stripped = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        encoder = cls(image_size=image_size, normalize=normalize)
        _load(encoder.backbone, {k: v for k, v in stripped.items() if k.partition(".")[0] not in IGNORED}, source)
        return encoder

    def features(self, images: Tensor, *, families: str = FAMILIES) -> dict[str, Tensor]:
        """The features that the class names.

        Args:
            images: [B, 3, H, W] or, for grey images, [B, 1, H, W], in [-1, 1], of any size.
            families: which of (a) to (d) of `multi_scale_features`.

        Raises:
            ValueError: unknown families, or a shape is wrong.

        Returns:
            [B, L, C] by name.
        """
        return multi_scale_features(self._maps(images), families=families)

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        net = self.backbone
        x = imagenet_input(images, self.image_size, normalize=self.normalize)
        maps = {"conv1": (x := net.maxpool(net.relu(net.bn1(net.conv1(x)))))}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            blocks = list(getattr(net, name))
            for index, block in enumerate(blocks, start=1):
                x = block(x)
                if index % 2 == 0 and index < len(blocks):
                    maps[f"{name}_blk{index}"] = x
            maps[name] = x
        return maps


class ThroughDecoder(FrozenEncoder):
    """An encoder of images as an encoder of latents: decode, then encode; gradients pass through both (paper A.3).

    Args:
        tokenizer: decodes latents.
        encoder: of images.
        images_at_once: decode and encode so many at once, and where a gradient is wanted compute them once more in
            the backward pass: the maps of so many images are in memory at a time. None: all at once, computed once.

    Raises:
        ValueError: images_at_once is less than 1.

    Several encoders of images share one decoding as `ThroughDecoder(tokenizer, JoinedEncoders({...}))`.
    """

    def __init__(self, tokenizer: LatentDecoder, encoder: Encoder, *, images_at_once: int | None = None) -> None:
        if images_at_once is not None and images_at_once < 1:
            raise ValueError(f"images_at_once: expected at least 1, found {images_at_once}")
        super().__init__()
        self.tokenizer: LatentDecoder = tokenizer
        self.encoder: Encoder = encoder
        self.images_at_once = images_at_once
        self._freeze()

    def features(self, images: Tensor, *, families: str = FAMILIES) -> dict[str, Tensor]:
        """Features [B, L, C] by name of latents [B, channels, h, w], those of the images they decode to."""
        if self.images_at_once is None:
            return self._features(images, families)
        parts = [
            checkpoint(self._features, part, families, use_reentrant=False, preserve_rng_state=False)
            for part in images.split(self.images_at_once)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _features(self, latents: Tensor, families: str) -> dict[str, Tensor]:
        return self.encoder.features(self.tokenizer.decode(latents), families=families)


class JoinedEncoders(FrozenEncoder):
    """The features of several encoders of the same images, each name after its encoder's: "mae/layer1" (Table 9).

    Args:
        encoders: by name.

    Raises:
        ValueError: there is none.

    >>> pixel_mae = ResNetMAE(in_channels=1, base_channels=4, blocks=(1,), num_classes=2)
    >>> list(JoinedEncoders({"mae": pixel_mae}).features(torch.zeros(1, 1, 4, 4), families="a"))
    ['mae/norm_x', 'mae/conv1', 'mae/layer1']
    """

    def __init__(self, encoders: Mapping[str, Encoder]) -> None:
        if not encoders:
            raise ValueError("encoders: expected at least one, found none")
        super().__init__()
        self.encoders = dict(encoders)
        # nn.ModuleDict would refuse names that are its own methods'.
        self.members = nn.ModuleList(member for member in encoders.values() if isinstance(member, nn.Module))
        self._freeze()

    def features(self, images: Tensor, *, families: str = FAMILIES) -> dict[str, Tensor]:
        """Features [B, L, C] of images [B, channels, H, W], by "encoder/feature"."""
        return {
            f"{encoder_name}/{name}": feature
            for encoder_name, encoder in self.encoders.items()
            for name, feature in encoder.features(images, families=families).items()
        }


def load_encoder(
    spec: str | Sequence[str],
    *,
    tokenizer: LatentDecoder | None = None,
    images_at_once: int | None = None,
    random_weights: bool = False,
) -> FrozenEncoder | ResNetMAE:
    """Load an encoder by name, frozen, on the CPU; several become one (`JoinedEncoders`).

    - "mae:FOLDER", "mae:OWNER/NAME" on the hub, "mae:hf://NAME" of the release: `ResNetMAE.from_pretrained`
    - "convnextv2", "convnextv2:FILE", "convnextv2:NAME" of timm: `ConvNeXtV2.from_pretrained`
    - "resnet50:FILE": `ResNet50.from_pretrained`; "simclr:FILE": the same for a network that takes [0, 1]

    Args:
        spec: one of these, or several of different kinds, whose features are then named after the kind.
        tokenizer: the images are its latents. Encoders of images then work through its decoder; an MAE does so
            unless its input has as many channels as a latent.
        images_at_once: as for `ThroughDecoder`.
        random_weights: leave the weights as they are initialised, for measurements of speed; needs no file. An MAE
            is then one of `RELEASED_MAES`, as in "mae:mae_latent_256", and a ConvNeXt-V2 the default or a timm name's.

    Raises:
        FileNotFoundError: there are no such weights; the message says what to put where.
        ValueError: an unknown kind, a kind twice, or weights that do not fit.

    >>> load_encoder("resnet18:weights.pth")
    Traceback (most recent call last):
    ValueError: encoder: expected mae:..., convnextv2[:...], resnet50:... or simclr:..., found 'resnet18:weights.pth'
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    kinds = [each.partition(":")[0] for each in specs]
    if len(set(kinds)) != len(kinds) or not specs:
        raise ValueError(f"encoder: expected encoders of different kinds, found {specs}; JoinedEncoders joins any")
    encoders = {kind: _load_one(each, random_weights) for kind, each in zip(kinds, specs, strict=True)}
    if tokenizer is not None:
        encoders = {
            kind: encoder
            if isinstance(encoder, ResNetMAE) and encoder.in_channels == tokenizer.channels
            else ThroughDecoder(tokenizer, encoder, images_at_once=images_at_once)
            for kind, encoder in encoders.items()
        }
    return encoders[kinds[0]] if len(kinds) == 1 else JoinedEncoders(encoders)


def round_weights(encoder: nn.Module) -> None:
    """Keep frozen weights of convolutions and linear maps in bfloat16, to which autocast rounds them at every call.

    Under autocast to bfloat16 the features stay the same. Autocast remembers what it rounded only of weights that take
    a gradient; and convolutions find their weights channels last, as the maps are. A tokenizer's weights stay float32.

    Args:
        encoder: changed in place.

    Raises:
        ValueError: a weight takes a gradient.

    >>> mae = ResNetMAE(in_channels=1, base_channels=4, blocks=(1,), num_classes=2).requires_grad_(False)
    >>> round_weights(mae)
    >>> mae.encoder.stem.conv.weight.dtype, mae.encoder.stem.norm.weight.dtype
    (torch.bfloat16, torch.float32)
    """
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError("encoder: expected frozen weights, found some that take a gradient")
    if isinstance(encoder, nn.Conv2d | nn.Linear):
        encoder.to(torch.bfloat16)
    if isinstance(encoder, nn.Conv2d):
        encoder.to(memory_format=torch.channels_last)
    for child in [encoder.encoder] if isinstance(encoder, ThroughDecoder) else encoder.children():
        if isinstance(child, nn.Module):
            round_weights(child)


def imagenet_input(images: Tensor, image_size: int, *, normalize: bool = True) -> Tensor:
    """Images as networks trained on ImageNet take them: [0, 1], mean and standard deviation, square size.

    Args:
        images: [B, 3, H, W] or [B, 1, H, W] in [-1, 1]; values outside stay outside, so that their gradient does.
        image_size: side of the result; bilinear, with antialiasing where it is smaller.
        normalize: subtract ImageNet's mean and divide by its standard deviation.

    Raises:
        ValueError: a shape is wrong.

    Returns:
        float32 [B, 3, image_size, image_size], under autocast too; channels last in memory.

    >>> imagenet_input(torch.ones(1, 1, 4, 4), 8, normalize=False).unique()
    tensor([1.])
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected shape [B, 3, H, W] or [B, 1, H, W], found {list(images.shape)}")
    with torch.autocast(images.device.type, enabled=False):
        images = (images.float() + 1) / 2
        if normalize:
            mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
            images = (images - mean) / std
        rows, columns = (_resizing(size, image_size, images.device) for size in images.shape[2:])
        # Two matrix products rather than F.interpolate, whose gradient on a GPU differs from run to run.
        images = (rows @ images @ columns.mT).expand(-1, 3, -1, -1)
        # Channels last: the vectors [B, L, C] of every map are then views whose channels lie side by side.
        return images.contiguous(memory_format=torch.channels_last)


def fingerprint(encoder: nn.Module) -> str:
    """SHA-256 of an encoder's weights: names, types, shapes and values.

    >>> fingerprint(nn.Linear(1, 1)) == fingerprint(nn.Linear(1, 1))
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _resizing(size: int, new_size: int, device: torch.device) -> Tensor:
    """The matrix [new_size, size] that resizes a column."""
    return F.interpolate(torch.eye(size, device=device)[None, None], (new_size, size), mode="bilinear", antialias=True)[
        0, 0
    ]


def _normalize_channels(x: Tensor) -> Tensor:
    """Each location's vector less its mean, over its standard deviation + 1e-3; computed in float32."""
    std, mean = torch.std_mean(x.float(), dim=1, correction=0, keepdim=True)
    return ((x.float() - mean) / (std + CHANNEL_STD_FLOOR)).to(x.dtype)


def _load_one(spec: str, random_weights: bool) -> FrozenEncoder | ResNetMAE:
    kind, _, source = spec.partition(":")
    if kind == "convnextv2":
        return _random_convnext(source) if random_weights else ConvNeXtV2.from_pretrained(source or CONVNEXT_V2)
    if kind in ("resnet50", "simclr") and (source or random_weights):
        normalize = kind == "resnet50"
        return (
            ResNet50(normalize=normalize) if random_weights else ResNet50.from_pretrained(source, normalize=normalize)
        )
    if kind == "mae" and source:
        mae = _random_mae(source) if random_weights else _pretrained_mae(source)
        return mae.requires_grad_(False).eval()
    raise ValueError(f"encoder: expected mae:..., convnextv2[:...], resnet50:... or simclr:..., found {spec!r}")


def _random_convnext(name: str) -> ConvNeXtV2:
    if not name:
        return ConvNeXtV2()
    import timm

    with torch.device("meta"):
        weights = timm.create_model(name).state_dict()
    depths, dims = _convnext_sizes(weights, name)
    return ConvNeXtV2(depths=depths, dims=dims)


def _random_mae(name: str) -> ResNetMAE:
    sizes = RELEASED_MAES.get(name.removeprefix("hf://"))
    if sizes is None:
        raise ValueError(f"mae: expected one of {', '.join(RELEASED_MAES)} for random weights, found {name!r}")
    return ResNetMAE(**sizes)


def _pretrained_mae(source: str) -> ResNetMAE:
    try:
        return ResNetMAE.from_pretrained(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"mae: {error}; vision.train_mae trains one into RUN_DIR/model") from error


def _download_convnext(name: str) -> Path:
    """The folder with a timm name's weights, from the hub or its cache."""
    if not TIMM_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"convnextv2: expected a checkpoint file, a folder with {WEIGHTS_FILE} or a timm name such as "
            f"{CONVNEXT_V2}, found nothing at {name}"
        )
    try:
        folder = download(f"timm/{name}", [WEIGHTS_FILE])
        require_files(folder, [WEIGHTS_FILE])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"convnextv2: {error}; without a network, fetch its {WEIGHTS_FILE} elsewhere and say convnextv2:PATH"
        ) from error
    return folder


def _read_weights(source: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a checkpoint file, or of model.safetensors in a folder; `module.` is taken off."""
    import timm.models

    path = Path(source) / WEIGHTS_FILE if Path(source).is_dir() else Path(source)
    try:
        weights: Any = timm.models.load_state_dict(str(path), device="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected a checkpoint file, found none") from error
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: expected safetensors or a .pth of tensors alone ({first_line(error)})") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path}: expected tensors by name, at the top or under 'state_dict' or 'model'")
    return weights


def _convnext_sizes(weights: Mapping[str, Tensor], source: str | Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks and channels of the four stages."""
    channels = {
        (int(match[1]), int(match[2])): len(tensor)
        for name, tensor in weights.items()
        if (match := CONVNEXT_BLOCK.fullmatch(name))
    }
    stages = [[size for (stage, _), size in channels.items() if stage == wanted] for wanted in range(4)]
    if not all(stages):
        raise ValueError(f"{source}: expected a ConvNeXt-V2 of four stages, found names such as {sorted(weights)[:3]}")
    return tuple(len(blocks) for blocks in stages), tuple(blocks[0] for blocks in stages)


def _load(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:  # it names every tensor that is missing, left over or of another shape
        raise ValueError(f"{source}: the weights do not fit the network: {error}") from error
