"""The masked autoencoder whose encoder makes the features of the drift: a ResNet with a U-Net decoder (paper A.3)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from driftfield.checks import working_dtype
from vision.features import FAMILIES, multi_scale_features, root_mean_square
from vision.pretrained import Pretrained

MAX_GROUPS = 32
NORM_EPSILON = 1e-6
TRUNCATED_STD = 0.87962566103423978  # standard deviation of a standard normal cut at -2 and 2
NO_LOCATION = 1e-8  # added to the number of hidden locations: an image with none has loss 0


class MAELoss(NamedTuple):
    """What `ResNetMAE.loss` finds for each image of a batch, [B] each; the last two only where labels are given."""

    loss: Tensor  # classification_weight * classification + (1 - classification_weight) * reconstruction
    reconstruction: Tensor  # squared error over the hidden locations: mean over locations, sum over channels
    classification: Tensor | None = None  # cross entropy
    correct: Tensor | None = None  # whether the likeliest class is the label


class GroupNorm(nn.GroupNorm):
    """Group normalisation with as many groups, up to 32, as divide the channels (paper A.3).

    Computed in float32; the result has the dtype of the map and its layout in memory.

    >>> GroupNorm(48).num_groups
    24
    """

    def __init__(self, channels: int) -> None:
        groups = next(groups for groups in range(min(MAX_GROUPS, channels), 0, -1) if channels % groups == 0)
        super().__init__(groups, channels, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch's own on a GPU returns channels apart in memory, whatever it is given, and float32 under autocast.
        return self.normalize(x) if x.is_cuda else super().forward(x)

    def normalize(self, x: Tensor) -> Tensor:
        """The same, written out: moments of each channel, from them those of its group, then one pass over the map."""
        exact = x.to(working_dtype(x))
        variance, mean = torch.var_mean(exact, dim=(2, 3), correction=0)  # [B, C]
        variance, mean = (moment.unflatten(1, (self.num_groups, -1)) for moment in (variance, mean))  # [B, groups, C/g]
        centre = mean.mean(2, keepdim=True)
        spread = (variance + (mean - centre).square()).mean(2, keepdim=True)
        scale = self.weight.view(self.num_groups, -1) * (spread + self.eps).rsqrt()  # [B, groups, C/g]
        centre, scale = (moment.expand_as(mean).flatten(1)[..., None, None] for moment in (centre, scale))
        return ((exact - centre) * scale + self.bias[:, None, None]).to(x.dtype)


class ConvNorm(nn.Module):
    """Convolution without bias, then group normalisation (paper A.3).

    >>> ConvNorm(3, 8, stride=2)(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        _initialize(self.conv)
        self.norm = GroupNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the skip is projected only where the shape changes (paper A.3).

    >>> BasicBlock(4, 8, stride=2)(torch.randn(1, 4, 8, 8)).shape
    torch.Size([1, 8, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        same_shape = in_channels == out_channels and stride == 1
        self.stride = stride
        self.first = ConvNorm(in_channels, out_channels, stride=stride)
        self.second = ConvNorm(out_channels, out_channels)
        self.skip = nn.Identity() if same_shape else ConvNorm(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        # A strided 1x1 convolution is one of the strided map. As one call, its gradient is computed by a kernel of
        # oneDNN that writes outside its memory for less than 16 channels (uxlfoundation/oneDNN#6035).
        skip = self.skip(x[:, :, :: self.stride, :: self.stride])
        return F.relu(skip + self.second(F.relu(self.first(x))))


class ResNetEncoder(nn.Module):
    """ResNet of basic blocks; each stage after the first halves the map and doubles the channels (paper A.3).

    >>> maps = ResNetEncoder(1, 4, (1, 2))(torch.randn(1, 1, 8, 8))
    >>> {name: list(feature_map.shape) for name, feature_map in maps.items()}
    {'conv1': [1, 4, 8, 8], 'layer1': [1, 4, 8, 8], 'layer2_blk2': [1, 8, 4, 4], 'layer2': [1, 8, 4, 4]}
    """

    def __init__(self, in_channels: int, base_channels: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem = ConvNorm(in_channels, base_channels)
        self.stages = nn.ModuleList()
        self.norms = nn.ModuleList()
        channels = base_channels
        for stage, num_blocks in enumerate(blocks):
            stride = 1 if stage == 0 else 2
            first = BasicBlock(channels, channels * stride, stride=stride)
            channels *= stride
            self.stages.append(nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(1, num_blocks))))
            self.norms.append(GroupNorm(channels))

    def forward(self, x: Tensor, *, every_block: int = 2) -> dict[str, Tensor]:
        # Channels last: the vectors [B, L, C] of every map are then views whose channels lie side by side.
        x = F.relu(self.stem(x)).contiguous(memory_format=torch.channels_last)
        maps = {"conv1": x}
        for stage, (blocks, norm) in enumerate(zip(self.stages, self.norms, strict=True), start=1):
            for index, block in enumerate(blocks.children(), start=1):
                x = block(x)
                if index % every_block == 0:
                    maps[f"layer{stage}_blk{index}"] = x
            maps[f"layer{stage}"] = x = norm(x)  # the next stage receives the normalised map
        return maps


class UpBlock(nn.Module):
    """Resize to the skip's size, concatenate it, normalise, two 3x3 convolutions (paper A.3).

    >>> UpBlock(8, 4)(torch.randn(1, 8, 2, 2), torch.randn(1, 4, 4, 4)).shape
    torch.Size([1, 4, 4, 4])
    """

    def __init__(self, in_channels: int, skip_channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(in_channels + skip_channels)
        self.project = ConvNorm(in_channels + skip_channels, skip_channels)
        self.refine = ConvNorm(skip_channels, skip_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if x.shape[2:] != skip.shape[2:]:
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        x = self.norm(torch.cat((x, skip), dim=1))
        return F.relu(self.refine(F.relu(self.project(x))))


class UNetDecoder(nn.Module):
    """From the last stage up through every earlier stage and the stem to the input's channels (paper A.3).

    >>> decoder = UNetDecoder(4, 2, 3)
    >>> decoder([torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4, 4)]).shape
    torch.Size([1, 3, 8, 8])
    """

    def __init__(self, base_channels: int, num_stages: int, out_channels: int) -> None:
        super().__init__()
        widths = [base_channels * 2**stage for stage in reversed(range(num_stages))]  # deepest stage first
        self.bridge = ConvNorm(widths[0], widths[0])
        skips = [*widths[1:], base_channels]  # the stem comes last
        self.ups = nn.ModuleList(UpBlock(width, skip) for width, skip in zip(widths, skips, strict=True))
        self.head = nn.Conv2d(base_channels, out_channels, 1)
        _initialize(self.head)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps from the stem to the last stage -> [B, out_channels, h, w]."""
        *skips, x = maps
        x = F.relu(self.bridge(x))
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return self.head(x)


class ResNetMAE(Pretrained):
    """Masked autoencoder over a ResNet; its encoder makes the features of the drift (paper A.3).

    Args:
        in_channels: channels of the images.
        base_channels: channels C of the first stage; stage i has C * 2^(i-1).
        blocks: residual blocks of each stage; as many stages as numbers.
        patch_size: pixels along the side of the patch behind one location of the first map: 1, or 8 for 256^2 pixels.
        mask_patch: locations along the side of a masked patch.
        num_classes: outputs of the linear classifier on the mean of the last stage.

    Raises:
        ValueError: a size is not positive or there is no stage.

    >>> mae = ResNetMAE(in_channels=1, base_channels=8, blocks=(1, 1), num_classes=10)
    >>> images = torch.randn(2, 1, 8, 8)
    >>> mae(images, mae.draw_mask(images)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        *,
        in_channels: int,
        base_channels: int,
        blocks: Sequence[int] = (3, 4, 6, 3),
        patch_size: int = 1,
        mask_patch: int = 2,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.config = {
            "in_channels": in_channels, "base_channels": base_channels, "blocks": list(blocks),
            "patch_size": patch_size, "mask_patch": mask_patch, "num_classes": num_classes,
        }  # fmt: skip
        for name, size in self.config.items():
            if min(size or [0] if isinstance(size, list) else [size]) < 1:
                raise ValueError(f"{name}: expected at least 1, found {size}")
        self.in_channels, self.patch_size, self.mask_patch = in_channels, patch_size, mask_patch
        self.num_classes = num_classes
        self.stage_names = [f"layer{stage}" for stage in range(1, len(blocks) + 1)]
        patch_channels = in_channels * patch_size * patch_size

        self.encoder = ResNetEncoder(patch_channels, base_channels, blocks)
        self.decoder = UNetDecoder(base_channels, len(blocks), patch_channels)
        self.classifier = nn.Linear(base_channels * 2 ** (len(blocks) - 1), num_classes)
        _initialize(self.classifier)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Reconstruct the whole input from what the mask leaves of it.

        Args:
            images: [B, channels, H, W].
            mask: True or 1 where a location is hidden, [B, 1, H / patch_size, W / patch_size].

        Raises:
            ValueError: a shape is wrong.

        Returns:
            [B, channels * patch_size^2, H / patch_size, W / patch_size], an estimate of `to_map(images)`.
        """
        return self._reconstruct(self.encode(self.hide(images, mask)))

    def loss(
        self, images: Tensor, mask: Tensor, label: Tensor | None = None, *, classification_weight: float | Tensor = 0.0
    ) -> MAELoss:
        """Squared error on the hidden locations, and for the fine-tuning a share of cross entropy.

        Args:
            images: [B, channels, H, W].
            mask: True or 1 where a location is hidden, [B, 1, H / patch_size, W / patch_size].
            label: class of each image, integers [B].
            classification_weight: lambda in lambda * cross entropy + (1 - lambda) * squared error, in [0, 1]. Compiled,
                each number is a function of its own, and a tensor [] one for all; its value is not looked at.

        Raises:
            ValueError: a shape is wrong, or classification_weight is outside [0, 1] or lacks the labels it needs.

        Returns:
            The loss and its parts for each image.
        """
        known = isinstance(classification_weight, float | int)
        if known and not 0 <= classification_weight <= (0 if label is None else 1):
            raise ValueError(
                f"classification_weight: expected a number in [0, 1], 0 without labels; found {classification_weight} "
                f"{'without' if label is None else 'with'} labels"
            )
        maps = self.encode(self.hide(images, mask))
        squared_error = (self._reconstruct(maps) - self.to_map(images)).square()  # [B, C p^2, h, w]
        hidden = mask.to(squared_error.dtype)
        num_hidden = hidden.sum(dim=(1, 2, 3))
        reconstruction = (squared_error * hidden).sum(dim=(1, 2, 3)) / (num_hidden + NO_LOCATION)  # [B]
        if label is None:
            return MAELoss(reconstruction, reconstruction)
        logits = self._classify(maps)  # [B, num_classes]
        classification = F.cross_entropy(logits, label, reduction="none")  # [B]
        loss = classification_weight * classification + (1 - classification_weight) * reconstruction
        return MAELoss(loss, reconstruction, classification, logits.argmax(dim=1) == label)

    def features(self, images: Tensor, *, families: str = FAMILIES, every_block: int = 2) -> dict[str, Tensor]:
        """The features in which the drift is computed (paper A.5), those of the input itself among them.

        Args:
            images: [B, channels, H, W].
            families: which of the families (a) to (d) of `multi_scale_features`.
            every_block: use the maps after every so many residual blocks of a stage.

        Returns:
            Features [B, L, C] by name: `norm_x` of the input, then `multi_scale_features` of each map of `encode`.
        """
        maps = self.encode(images, every_block=every_block)
        return {"norm_x": root_mean_square(self.to_map(images))} | multi_scale_features(maps, families=families)

    def encode(self, images: Tensor, *, every_block: int = 2) -> dict[str, Tensor]:
        """Maps [B, C_i, h_i, w_i] by name: `conv1` after the stem, `layer1`, ... after each stage, `layer1_blk2`, ...

        Args:
            images: [B, channels, H, W].
            every_block: hand out the maps after every so many residual blocks of a stage.
        """
        return self.encoder(self.to_map(images), every_block=every_block)

    def classify(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, channels, H, W]."""
        return self._classify(self.encode(images))

    def to_map(self, images: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> patches as channels [B, channels * p^2, H / p, W / p], p = patch_size."""
        height, width = self._map_size(images)
        return rearrange(images, "b c (h p) (w q) -> b (p q c) h w", h=height, w=width)

    def to_images(self, patches: Tensor) -> Tensor:
        """A map such as a reconstruction as images [B, channels, H, W]: the inverse of `to_map`."""
        size = self.patch_size
        return rearrange(patches, "b (p q c) h w -> b c (h p) (w q)", p=size, q=size)

    def hide(self, images: Tensor, mask: Tensor) -> Tensor:
        """Images with the hidden locations set to 0."""
        shape = [len(images), 1, *self._map_size(images)]
        if list(mask.shape) != shape:
            raise ValueError(f"mask: expected shape {shape}, found {list(mask.shape)}")
        kept = 1 - mask.to(images.dtype)
        return images * F.interpolate(kept, scale_factor=float(self.patch_size))  # [B, channels, H, W]

    def draw_mask(self, images: Tensor, *, ratio: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
        """Hide each patch of mask_patch x mask_patch locations with the same probability, independently (paper A.3).

        Args:
            images: [B, channels, H, W]; only the shape and the device are used.
            ratio: probability.
            generator: source of the random numbers, on its own device.

        Raises:
            ValueError: the patches do not tile the map.

        Returns:
            bool [B, 1, H / patch_size, W / patch_size], True where hidden.
        """
        size = self.mask_patch
        height, width = self._map_size(images)
        if height % size or width % size:
            raise ValueError(f"images: expected a map that patches of {size} tile, found {height} x {width} locations")
        device = images.device if generator is None else generator.device
        uniform = torch.rand(len(images), 1, height // size, width // size, generator=generator, device=device)
        hidden = (uniform < ratio).repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
        return hidden.to(images.device)

    def _map_size(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the input's map, in locations; raises ValueError for what is no input."""
        size = self.patch_size
        if images.ndim != 4 or images.shape[1] != self.in_channels or images.shape[2] % size or images.shape[3] % size:
            raise ValueError(
                f"images: expected shape [B, {self.in_channels}, H, W], H and W multiples of {size}, "
                f"found {list(images.shape)}"
            )
        return images.shape[2] // size, images.shape[3] // size

    def _reconstruct(self, maps: dict[str, Tensor]) -> Tensor:
        return self.decoder([maps["conv1"], *(maps[name] for name in self.stage_names)])

    def _classify(self, maps: dict[str, Tensor]) -> Tensor:
        return self.classifier(maps[self.stage_names[-1]].mean(dim=(2, 3)))


def _initialize(layer: nn.Conv2d | nn.Linear) -> None:
    """Weights: normal numbers cut at two standard deviations, of variance 1 / fan-in; biases 0."""
    bound = 2 / (TRUNCATED_STD * math.sqrt(layer.weight[0].numel()))
    nn.init.trunc_normal_(layer.weight, std=bound / 2, a=-bound, b=bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
