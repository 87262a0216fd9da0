"""Observations as one feature vector per time: cameras through a ResNet-18 each, numbers as they are."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from policy.draws import Draws

NUM_KEYPOINTS: Final = 32  # maps of the spatial softmax, of which each gives one (x, y)
CAMERA_DIM: Final = 64  # features of one camera
SMALLEST: Final = 33  # pixels; up to 32 the ResNet leaves a single place, whose position says nothing
CHANNELS_PER_GROUP: Final = 16  # of the group normalisations


class SpatialSoftmax(nn.Module):
    """Mean position (x, y) under each map's softmax, in coordinates from -1 (left, top) to 1.

    >>> maps = torch.zeros(1, 1, 2, 3); maps[0, 0, 0, 2] = 100.0
    >>> SpatialSoftmax()(maps).tolist()
    [[1.0, -1.0]]
    """

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        weight = maps.flatten(2).softmax(dim=2).unflatten(2, (height, width))  # [N, K, H, W]
        x = weight.sum(2) @ torch.linspace(-1, 1, width, device=maps.device, dtype=maps.dtype)  # [N, K]
        y = weight.sum(3) @ torch.linspace(-1, 1, height, device=maps.device, dtype=maps.dtype)
        return torch.stack((x, y), dim=2).flatten(1)  # [N, 2 K]: x, y of the first map, then of the next


class CameraEncoder(nn.Sequential):
    """ResNet-18 from random weights with group normalisation, 32 key points, 64 features of them.

    Source: the image encoder of Diffusion Policy's hybrid workspaces, which is robomimic's. Batch normalisation would
    spoil the average of the weights that is evaluated.

    >>> CameraEncoder()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 64])
    """

    def __init__(self) -> None:
        from torchvision.models import resnet18  # takes seconds, and only images need it

        network = resnet18(weights=None, norm_layer=_group_norm)
        super().__init__(
            *list(network.children())[:-2],  # without pooling and classes
            nn.Conv2d(512, NUM_KEYPOINTS, 1),
            SpatialSoftmax(),
            nn.Linear(2 * NUM_KEYPOINTS, CAMERA_DIM),
            nn.ReLU(),
        )


class ObservationEncoder(nn.Module):
    """Features of each observation by itself: of every camera in the order of their names, then of all other keys.

    Cameras have an encoder each. While training, each image is cropped at a random place; while evaluating, in the
    middle.

    Args:
        shapes: per key the shape of one observation: (H, W, 3) of a camera, (D,) of anything else.
        crop: side of the crop in pixels; None keeps whole images.
        frequencies: F; beside each number its sines and cosines at π/2, π, ... 2^(F-1) π/2: small differences count.

    Raises:
        ValueError: no keys, another kind of shape, an image or crop below 33 pixels, a crop that does not fit, or
            frequencies below 0.
            `forward`: a key is missing or its shape or dtype is another.

    >>> encoder = ObservationEncoder({"state": (9,), "wrist": (48, 48, 3)}, crop=40)
    >>> images = torch.zeros(1, 2, 48, 48, 3, dtype=torch.uint8)
    >>> encoder({"wrist": images, "state": torch.zeros(1, 2, 9)}).shape, encoder.dim
    (torch.Size([1, 2, 73]), 73)
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, crop: int | None = None, frequencies: int = 0) -> None:
        super().__init__()
        if frequencies < 0:
            raise ValueError(f"frequencies must be at least 0, got {frequencies}")
        if not shapes:
            raise ValueError("shapes must have at least one observation, got none")
        for key, shape in shapes.items():
            _check_shape(key, tuple(shape), crop)
        self.crop = crop
        self.cameras = {key: tuple(shapes[key]) for key in sorted(shapes) if len(shapes[key]) == 3}
        self.numbers = {key: tuple(shapes[key]) for key in sorted(shapes) if len(shapes[key]) == 1}
        self.encoders = nn.ModuleList(CameraEncoder() for _ in self.cameras)  # a camera's name may have a dot
        self.frequencies = frequencies
        self.dim = CAMERA_DIM * len(self.cameras) + (1 + 2 * frequencies) * sum(
            size for (size,) in self.numbers.values()
        )

    def forward(self, observation: Mapping[str, Tensor], *, draws: Draws | None = None) -> Tensor:
        """Encode observations; nothing is mixed between rows or times.

        Args:
            observation: per key [B, To, ...]: cameras uint8 [B, To, H, W, 3], the rest normalised floats [B, To, D].
                Keys that `shapes` does not have are left alone.
            draws: where random crops come from; None is PyTorch's global generator.

        Returns:
            [B, To, dim].
        """
        features = [
            self._see(_checked(observation, key, shape, torch.uint8), encoder, draws or Draws())
            for (key, shape), encoder in zip(self.cameras.items(), self.encoders, strict=True)
        ]
        numbers = [_checked(observation, key, shape) for key, shape in self.numbers.items()]
        features += numbers
        for octave in range(self.frequencies):
            for wave in (torch.sin, torch.cos):
                features += [wave(number * (2**octave * torch.pi / 2)) for number in numbers]
        return torch.cat(features, dim=2)

    def _see(self, images: Tensor, encoder: nn.Module, draws: Draws) -> Tensor:
        if self.crop is not None:
            images = random_crop(images, self.crop, draws) if self.training else centre_crop(images, self.crop)
        flat = images.flatten(0, 1)  # [B To, H, W, 3]
        scaled = flat.permute(0, 3, 1, 2).to(next(encoder.parameters()).dtype) * (2 / 255) - 1
        return encoder(scaled).unflatten(0, images.shape[:2])  # [B, To, 64]


def random_crop(images: Tensor, size: int, draws: Draws) -> Tensor:
    """A square from a random place of each image.

    Source: robomimic's CropRandomizer; offsets are uniform on [0, H - size - 1], so that the last is never drawn.

    Args:
        images: [B, To, H, W, C].
        size: side of the square.
        draws: where the offsets come from.

    Returns:
        [B, To, size, size, C].

    >>> random_crop(torch.zeros(5, 2, 8, 8, 3), 6, Draws()).shape
    torch.Size([5, 2, 6, 6, 3])
    """
    span = torch.arange(size, device=images.device)
    rows, columns = (
        draws.integers(max(1, length - size), images.shape[:2]).to(images.device).flatten().unsqueeze(1) + span
        for length in images.shape[2:4]
    )  # [B To, size] each
    index = torch.arange(len(rows), device=images.device).view(-1, 1, 1)
    crops = images.flatten(0, 1)[index, rows.unsqueeze(2), columns.unsqueeze(1)]
    return crops.unflatten(0, images.shape[:2])


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The square in the middle of each image, [B, To, H, W, C] -> [B, To, size, size, C].

    >>> centre_crop(torch.arange(16.0).view(1, 1, 4, 4, 1), 2).flatten().tolist()
    [5.0, 6.0, 9.0, 10.0]
    """
    top, left = ((length - size) // 2 for length in images.shape[2:4])
    return images[:, :, top : top + size, left : left + size]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)


def _check_shape(key: str, shape: tuple[int, ...], crop: int | None) -> None:
    if len(shape) not in (1, 3) or (len(shape) == 3 and shape[2] != 3) or min(shape, default=0) < 1:
        raise ValueError(f"shape of {key!r} must be (height, width, 3) or (size,), got {shape}")
    if len(shape) != 3:
        return
    if min(shape[:2]) < SMALLEST:
        raise ValueError(f"images of {key!r} must have sides of at least {SMALLEST} pixels, got {shape}")
    if crop is not None and not SMALLEST <= crop <= min(shape[:2]):
        raise ValueError(f"crop must be {SMALLEST} to {min(shape[:2])} for {key!r} of shape {shape}, got {crop}")


def _checked(
    observation: Mapping[str, Tensor], key: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """The entry of a key, [B, To, *shape], of a dtype or else floating point."""
    if key not in observation:
        raise ValueError(f"observation must have {key!r}, got {sorted(observation)}")
    value = observation[key]
    if value.ndim != 2 + len(shape) or tuple(value.shape[2:]) != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"observation {key!r} must be [batch, times, {expected}], got {list(value.shape)}")
    if value.dtype != dtype if dtype else not value.is_floating_point():
        raise ValueError(f"observation {key!r} must be {dtype or 'floating point'}, got {value.dtype}")
    return value
