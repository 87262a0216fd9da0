"""Features of images at many scales, in which the drift is computed (paper Eq. 13-14, A.5)."""

import re
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

import torch
from torch import Tensor

from driftfield.fused.patch_moments import VARIANCE_FLOOR, Moments, patch_moments

FAMILIES: Final = "abcd"  # A.5's names: locations, whole-map moments, 2x2 patches, 4x4 patches
PATCH_SIZES: Final = {"c": 2, "d": 4}


class Encoder(Protocol):
    """Anything that turns images into named features; drifting asks nothing else of it."""

    def features(self, images: Tensor, *, families: str = FAMILIES) -> dict[str, Tensor]:
        """Features [B, L, C] of images [B, channels, H, W], those of the families the encoder knows."""
        ...


def image_features(
    images: Tensor, encoder: Encoder | None = None, *, families: str = FAMILIES, clamp: bool = False
) -> dict[str, Tensor]:
    """The features the drift is computed in: each image as one vector, and what the encoder makes of it.

    Source: paper A.5; the name "global" is the release's.

    Args:
        images: [B, channels, H, W].
        encoder: makes further features; without one the drift is computed on pixels alone.
        families: which of the encoder's families (a) to (d), see `multi_scale_features`.
        clamp: the encoder sees pixels clamped to [-1, 1], which is what a picture file keeps of them. Those outside
            take no gradient from the encoder; "global", which is not clamped, draws them back.

    Returns:
        Features [B, L, C] by name; "global" has L = 1 and C = channels * H * W.

    >>> import torch
    >>> image_features(torch.zeros(5, 1, 8, 8))["global"].shape
    torch.Size([5, 1, 64])
    """
    seen = images.clamp(-1.0, 1.0) if clamp else images
    features = {} if encoder is None else encoder.features(seen, families=families)
    return {"global": images.flatten(1).unsqueeze(1)} | features


def require_families(families: str) -> None:
    """Raise ValueError for what names no families of features.

    >>> require_families("abz")
    Traceback (most recent call last):
    ValueError: families: expected letters of 'abcd', found 'abz'
    """
    if not families or not set(families) <= set(FAMILIES):
        raise ValueError(f"families: expected letters of {FAMILIES!r}, found {families!r}")


def multi_scale_features(maps: Mapping[str, Tensor], *, families: str = FAMILIES) -> dict[str, Tensor]:
    """Locations, means and standard deviations of feature maps at several scales.

    Source: paper A.5: (a) every location, (b) mean and standard deviation over the map, (c) over 2x2 patches, (d) over
    4x4 patches. A map that its patches do not tile has no features of that family.

    Args:
        maps: feature maps [B, C, H, W] by name.
        families: which of (a) to (d), such as "abcd" or "b".

    Raises:
        ValueError: an unknown family or none, or a map that is not [B, C, H, W].

    Returns:
        Features [B, L, C]: `name` (a), `name_mean` and `name_std` (b), `name_mean_2`, `name_std_2` (c), `name_mean_4`,
        `name_std_4` (d); locations and patches in row order.

    >>> import torch
    >>> features = multi_scale_features({"layer1": torch.zeros(5, 3, 8, 8)}, families="ac")
    >>> {name: list(feature.shape) for name, feature in features.items()}
    {'layer1': [5, 64, 3], 'layer1_mean_2': [5, 16, 3], 'layer1_std_2': [5, 16, 3]}
    """
    require_families(families)
    features: dict[str, Tensor] = {}
    for name, feature_map in maps.items():
        if feature_map.ndim != 4:
            raise ValueError(f"{name}: expected shape [B, C, H, W], found {list(feature_map.shape)}")
        features |= _features_of_map(name, feature_map, families)
    return features


def root_mean_square(images: Tensor) -> Tensor:
    """sqrt(mean over locations of x^2 + 1e-6) for each channel (paper A.5; "norm_x" in the release).

    Args:
        images: [B, C, H, W].

    Returns:
        [B, 1, C].

    >>> import torch
    >>> root_mean_square(torch.full((1, 2, 3, 3), 2.0)).round(decimals=3).tolist()
    [[[2.0, 2.0]]]
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    return (images.square().mean(dim=(2, 3)) + VARIANCE_FLOOR).sqrt().unsqueeze(1)


def family_of(name: str) -> str:
    """The family of a feature by its name: "a" to "d" (A.5), or "global" or "norm_x" for those of the input itself.

    >>> [family_of(name) for name in ("layer1", "layer1_std", "mae/layer1_blk2_mean_4", "global", "norm_x")]
    ['a', 'b', 'd', 'global', 'norm_x']
    """
    name = name.rpartition("/")[2]
    if name in ("global", "norm_x"):
        return name
    found = re.search(r"_(?:mean|std)(?:_(\d+))?$", name)
    if found is None:
        return "a"
    return "b" if found[1] is None else next(family for family, size in PATCH_SIZES.items() if size == int(found[1]))


def group_by_label(features: Mapping[str, Tensor], num_labels: int) -> dict[str, Tensor]:
    """Features of a batch as groups of samples of one label at one location, the form the loss takes; no copy.

    Args:
        features: [num_labels * N, L, C] by name, the N samples of a label one after the other.
        num_labels: labels in the batch.

    Raises:
        ValueError: the batch is not a multiple of num_labels.

    Returns:
        [num_labels, L, N, C] by name: two dimensions of groups, then samples, then channels.

    >>> import torch
    >>> group_by_label({"layer1": torch.zeros(6, 16, 3)}, 2)["layer1"].shape
    torch.Size([2, 16, 3, 3])
    """
    for name, feature in features.items():
        if num_labels < 1 or len(feature) % num_labels:
            raise ValueError(f"{name}: expected a multiple of {num_labels} labels, found {len(feature)} samples")
    return {name: feature.unflatten(0, (num_labels, -1)).transpose(1, 2) for name, feature in features.items()}


def _features_of_map(name: str, feature_map: Tensor, families: str) -> dict[str, Tensor]:
    features = {name: feature_map.flatten(2).transpose(1, 2)} if "a" in families else {}  # [B, H * W, C]
    sizes = [PATCH_SIZES[family] for family in _tiling(families, *feature_map.shape[2:])]
    if not sizes and "b" not in families:
        return features
    moments = patch_moments(feature_map, sizes)
    for size, patches in zip(sizes, moments.patches, strict=True):
        features |= _named(name, patches, f"_{size}")
    return features | (_named(name, moments.whole, "") if "b" in families else {})


def _tiling(families: str, height: int, width: int) -> Iterable[str]:
    """The families of patches that are asked for and tile the map, smallest patches first."""
    return (
        family
        for family, patch_size in PATCH_SIZES.items()
        if family in families and height % patch_size == 0 and width % patch_size == 0
    )


def _named(name: str, moments: Moments, suffix: str) -> dict[str, Tensor]:
    return {f"{name}_mean{suffix}": moments.mean, f"{name}_std{suffix}": moments.std}
