"""The one-step generator f(noise, class, guidance scale, style) -> image: a diffusion transformer (paper A.2)."""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision.conditioning import EMBEDDING_STD, GUIDANCE_GAIN, Conditioning
from vision.patches import patchify, unpatchify
from vision.pretrained import Pretrained
from vision.transformer import FinalLayer, TransformerBlock, rotary_table

_BASE = {"hidden_size": 768, "depth": 12, "num_heads": 12, "cond_size": 768, "num_classes": 1000}
_LARGE = {"hidden_size": 1024, "depth": 24, "num_heads": 16, "cond_size": 1024, "num_classes": 1000}
_LATENT = {"image_size": 32, "channels": 4, "patch_size": 2}
_PIXEL = {"image_size": 256, "channels": 3, "patch_size": 16}
PRESETS: Final[dict[str, dict[str, int]]] = {  # Table 8
    "B/2": _LATENT | _BASE,
    "L/2": _LATENT | _LARGE,
    "B/16": _PIXEL | _BASE,
    "L/16": _PIXEL | _LARGE,
}


class ImageGenerator(Pretrained):
    """One-step image generator: a diffusion transformer with in-context tokens and adaLN-zero (paper A.2).

    Args:
        image_size: height and width H = W of the output; a multiple of patch_size.
        channels: channels C of the output and of the noise.
        patch_size: height and width of the patch behind one token.
        hidden_size: channels of a token; a multiple of 4 and, evenly, of num_heads.
        depth: number of transformer blocks.
        num_heads: attention heads.
        cond_size: channels of the condition vector.
        num_classes: number of class labels.
        num_context_tokens: tokens made from the condition and put before the patches.
        num_styles: random style slots S; 0 for none.
        num_style_entries: entries of each style slot.
        output_gain: gain of the last layer's initial Xavier-uniform weights. 0, the paper's: the first images are all
            equal. 1: they are spread like noise, from which a small network on few pixels spreads over the data at once
            instead of first leaving the mean of each class.
        guidance_gain: size of the guidance embedding. 0.02, the paper's: as the other embeddings at first, which then
            outgrow it, so that in a short run the guidance scale hardly matters. 1: it matters at once.
        attention_in_float32: compute the attention itself in float32 although autocast is on.
        rotary_in_bfloat16: round the rotary angles to bfloat16, by up to 1 rad in late tokens, as the release does for
            attention in bfloat16: its two latent finals learned with such angles.

    Raises:
        ValueError: a size is not positive or does not divide as stated.

    >>> generator = ImageGenerator(image_size=8, channels=1, patch_size=2, hidden_size=16, depth=1, num_heads=2,
    ...                            cond_size=16, num_classes=10, num_styles=3)
    >>> noise, style = torch.randn(2, 1, 8, 8), torch.zeros(2, 3, dtype=torch.int64)
    >>> generator(noise, torch.tensor([0, 9]), torch.ones(2), style).shape
    torch.Size([2, 1, 8, 8])
    """

    rotary: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        cond_size: int,
        num_classes: int,
        num_context_tokens: int = 16,
        num_styles: int = 32,
        num_style_entries: int = 64,
        output_gain: float = 0.0,
        guidance_gain: float = GUIDANCE_GAIN,
        attention_in_float32: bool = True,
        rotary_in_bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.config = {
            "image_size": image_size, "channels": channels, "patch_size": patch_size, "hidden_size": hidden_size,
            "depth": depth, "num_heads": num_heads, "cond_size": cond_size, "num_classes": num_classes,
            "num_context_tokens": num_context_tokens, "num_styles": num_styles,
            "num_style_entries": num_style_entries, "output_gain": output_gain, "guidance_gain": guidance_gain,
            "attention_in_float32": attention_in_float32, "rotary_in_bfloat16": rotary_in_bfloat16,
        }  # fmt: skip
        _check_sizes(self.config)
        self.image_size, self.channels, self.patch_size = image_size, channels, patch_size
        self.num_classes, self.num_styles, self.num_style_entries = num_classes, num_styles, num_style_entries
        self.num_context_tokens = num_context_tokens
        self.checkpoint_activations = False  # compute each block again on the way back, for less memory
        grid_size = image_size // patch_size
        patch_channels = patch_size * patch_size * channels

        self.conditioning = Conditioning(
            num_classes,
            cond_size,
            num_styles=num_styles,
            num_style_entries=num_style_entries,
            guidance_gain=guidance_gain,
        )
        self.patch_embedding = nn.Linear(patch_channels, hidden_size)
        self.position = nn.Parameter(sincos_positions(grid_size, hidden_size))  # [N, hidden]
        self.context_projection = nn.Linear(cond_size, hidden_size)
        self.context = nn.Parameter(torch.empty(num_context_tokens, hidden_size))
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_heads, cond_size=cond_size, attention_in_float32=attention_in_float32)
            for _ in range(depth)
        )
        self.final = FinalLayer(hidden_size, patch_channels, cond_size=cond_size)
        if output_gain:
            nn.init.xavier_uniform_(self.final.out.weight, gain=output_gain)
        num_tokens = num_context_tokens + grid_size * grid_size
        dtype = torch.bfloat16 if rotary_in_bfloat16 else torch.float32
        self.register_buffer("rotary", rotary_table(num_tokens, hidden_size // num_heads, dtype), persistent=False)

        nn.init.normal_(self.context, std=EMBEDDING_STD)
        for layer in (self.patch_embedding, self.context_projection):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, noise: Tensor, label: Tensor, guidance_scale: Tensor, style: Tensor | None = None) -> Tensor:
        """Make one image from each noise sample in one pass.

        Args:
            noise: standard normal [B, C, H, W].
            label: class of each image, integers [B] in [0, num_classes).
            guidance_scale: alpha of each image, [B], at least 1.
            style: style entries, integers [B, S] in [0, num_style_entries); may be left out when S = 0.

        Raises:
            ValueError: a shape is wrong, or, for tensors on the CPU, an index is out of range.
            TypeError: label or style does not hold integers, or noise or guidance_scale holds integers.

        Returns:
            Images [B, C, H, W].
        """
        if style is None:
            style = label.new_empty((len(label), 0))
        self._check_inputs(noise, label, guidance_scale, style)
        return self.transform(noise, self.conditioning(label, guidance_scale, style))

    def transform(self, noise: Tensor, condition: Tensor) -> Tensor:
        """The pass itself: images [B, C, H, W] to images [B, C, H, W] under a condition vector [B, cond]."""
        patches = self.patch_embedding(patchify(noise, self.patch_size))  # [B, N, hidden]
        patches = patches + self.position.to(patches.dtype)
        context = self.context_projection(condition)[:, None] + self.context.to(patches.dtype)  # [B, T, hidden]
        tokens = torch.cat((context, patches), dim=1)  # [B, T + N, hidden]
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            arguments = (tokens, condition, self.rotary)
            tokens = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        patches = self.final(tokens[:, self.num_context_tokens :], condition)  # [B, N, p * p * C]
        return unpatchify(patches, self.patch_size)  # [B, C, H, W]

    def _check_inputs(self, noise: Tensor, label: Tensor, guidance_scale: Tensor, style: Tensor) -> None:
        batch = len(noise)
        _check_tensor("noise", noise, (batch, self.channels, self.image_size, self.image_size), integers=False)
        _check_tensor("label", label, (batch,), integers=True)
        _check_tensor("guidance_scale", guidance_scale, (batch,), integers=False)
        _check_tensor("style", style, (batch, self.num_styles), integers=True)
        _check_range("label", label, self.num_classes)
        _check_range("style", style, self.num_style_entries)


def sincos_positions(grid_size: int, hidden_size: int) -> Tensor:
    """Sines and cosines of the column (first half of the channels) and of the row of each patch.

    Source: paper A.2; the fixed table of ViT and MAE, here the start of a learned one.

    Args:
        grid_size: patches along a side.
        hidden_size: channels, a multiple of 4.

    Returns:
        float32 table [grid_size^2, hidden_size].

    >>> sincos_positions(2, 4)[0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    quarter = hidden_size // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # [hidden/4]
    angle = torch.outer(torch.arange(grid_size, dtype=torch.float64), frequency)
    along = torch.cat((angle.sin(), angle.cos()), dim=1)  # [grid, hidden/2]
    columns = along.expand(grid_size, -1, -1)  # [row, column, hidden/2]
    rows = along[:, None].expand(-1, grid_size, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1).float()  # [grid^2, hidden]


def _check_sizes(config: dict[str, Any]) -> None:
    for name, size in config.items():
        if isinstance(size, bool):
            continue
        least = 0 if name in ("num_styles", "output_gain", "guidance_gain") else 1
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, found {size}")
    if config["image_size"] % config["patch_size"]:
        raise ValueError(
            f"image_size: expected a multiple of patch_size {config['patch_size']}, found {config['image_size']}"
        )
    if config["hidden_size"] % (2 * config["num_heads"]) or config["hidden_size"] % 4:
        raise ValueError(
            f"hidden_size: expected a multiple of 4 and of 2 * num_heads = {2 * config['num_heads']}, "
            f"found {config['hidden_size']}"
        )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, integers: bool) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
    if integers == (tensor.is_floating_point() or tensor.dtype is torch.bool):
        raise TypeError(f"{name}: expected {'integers' if integers else 'real numbers'}, found {tensor.dtype}")


def _check_range(name: str, indices: Tensor, size: int) -> None:
    """Name an index that no table has; only where looking at values costs no wait for another device."""
    if torch.compiler.is_compiling() or indices.device.type != "cpu" or indices.numel() == 0:
        return
    lowest, highest = indices.aminmax()
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name}: expected values in [0, {size}), found {lowest} to {highest}")
