"""The observation encoder: published feature sizes, crops, key points, order of the keys."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policy.draws import Draws
from policy.observation import CameraEncoder, ObservationEncoder, SpatialSoftmax, centre_crop, random_crop


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=seeded(seed), dtype=torch.uint8)


def made(shapes: dict[str, Any], **options: Any) -> ObservationEncoder:
    torch.manual_seed(0)
    return ObservationEncoder(shapes, **options)


@pytest.mark.parametrize(
    ("shapes", "crop", "features"),
    [
        ({"agentview": (84, 84, 3), "robot0_eye_in_hand": (84, 84, 3), "state": (9,)}, 76, 274),  # Lift, Can
        ({"sideview": (240, 240, 3), "robot0_eye_in_hand": (240, 240, 3), "state": (9,)}, 216, 274),  # ToolHang
        ({"image": (96, 96, 3), "state": (2,)}, 84, 132),  # PushT
        ({"state": (20,)}, None, 40),  # PushT's state
    ],
)
def test_two_frames_have_the_published_number_of_features(
    shapes: dict[str, tuple[int, ...]], crop: int | None, features: int
) -> None:
    with torch.device("meta"):
        encoder = ObservationEncoder(shapes, crop=crop)
    given = {
        key: torch.zeros(1, 2, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32, device="meta")
        for key, shape in shapes.items()
    }
    assert encoder.eval()(given).shape == (1, 2, encoder.dim)
    assert 2 * encoder.dim == features


def test_the_state_alone_goes_through_unchanged() -> None:
    encoder = made({"state": (5,)})
    state = torch.randn(3, 2, 5)
    assert torch.equal(encoder({"state": state}), state)
    assert not list(encoder.parameters())


def test_the_order_is_cameras_then_numbers_by_name_however_they_are_given() -> None:
    shapes = {"state": (2,), "wrist": (40, 40, 3), "force": (1,), "front.left": (40, 40, 3)}
    given = {"force": torch.full((1, 1, 1), 7.0), "state": torch.tensor([[[8.0, 9.0]]])}
    given |= {"front.left": pictures(1, 1, 40, 40, 3), "wrist": pictures(1, 1, 40, 40, 3, seed=1)}
    encoder = made(shapes)
    features = encoder(given)
    assert features[0, 0, 128:].tolist() == [7.0, 8.0, 9.0]
    other = made(dict(reversed(shapes.items())))
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(dict(reversed(given.items()))), features)
    dark = encoder(given | {"wrist": torch.zeros(1, 1, 40, 40, 3, dtype=torch.uint8)})
    assert torch.equal(dark[..., :64], features[..., :64]) and not torch.equal(dark[..., 64:128], features[..., 64:128])


def test_rows_and_times_do_not_mix() -> None:
    encoder = made({"image": (44, 44, 3), "state": (2,)}, crop=36).eval()
    given = {"image": pictures(3, 2, 44, 44, 3), "state": torch.randn(3, 2, 2)}
    features = encoder(given)
    for row in range(3):
        for time in range(2):
            alone = encoder({key: value[row : row + 1, time : time + 1] for key, value in given.items()})
            torch.testing.assert_close(alone[0, 0], features[row, time], rtol=1e-4, atol=1e-5)


def test_the_network_sees_channels_from_minus_one_to_one() -> None:
    encoder = made({"image": (40, 40, 3)})
    seen: list[Tensor] = []
    encoder.encoders[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    image = torch.zeros(1, 1, 40, 40, 3, dtype=torch.uint8)
    image[0, 0, :, :, 1] = 255
    image[0, 0, 5, 7] = torch.tensor([51, 102, 204], dtype=torch.uint8)
    encoder({"image": image})
    torch.testing.assert_close(seen[0][0, :, 5, 7], torch.tensor([-0.6, -0.2, 0.6]))
    assert seen[0].shape == (1, 3, 40, 40) and seen[0][0, :, 0, 0].tolist() == [-1.0, 1.0, -1.0]


def test_every_normalisation_is_of_groups_of_16_channels() -> None:
    with torch.device("meta"):
        encoder = CameraEncoder()
    norms = [module for module in encoder.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 20 and all(norm.num_groups * 16 == norm.num_channels for norm in norms)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
    resnet18 = 11_689_512 - (512 * 1000 + 1000)  # torchvision's count without its classes
    keypoints, linear = 512 * 32 + 32, 64 * 64 + 64
    assert sum(parameter.numel() for parameter in encoder.parameters()) == resnet18 + keypoints + linear


def test_76_pixels_make_a_map_of_3_by_3() -> None:
    with torch.device("meta"):
        maps = nn.Sequential(*list(CameraEncoder())[:-4])(torch.zeros(1, 3, 76, 76))
    assert maps.shape == (1, 512, 3, 3)


def test_all_of_a_camera_learns() -> None:
    encoder = made({"image": (64, 64, 3)})
    encoder({"image": pictures(2, 1, 64, 64, 3)}).square().sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to all of a map does not move its softmax.
    assert without in ([], ["encoders.0.8.bias"])


def test_the_spatial_softmax_is_the_mean_position() -> None:
    maps = torch.randn(2, 3, 4, 5, generator=seeded()).double()
    found = SpatialSoftmax()(maps)
    for image in range(2):
        for channel in range(3):
            weights = maps[image, channel].exp() / maps[image, channel].exp().sum()
            x = sum(weights[i, j] * (-1 + 2 * j / 4) for i in range(4) for j in range(5))
            y = sum(weights[i, j] * (-1 + 2 * i / 3) for i in range(4) for j in range(5))
            torch.testing.assert_close(found[image, 2 * channel : 2 * channel + 2], torch.stack((x, y)))


def test_random_crops_are_windows_at_offsets_from_0_to_all_but_the_last() -> None:
    rows = torch.arange(12, dtype=torch.uint8).view(1, 12, 1, 1).expand(2000, 12, 10, 1)
    columns = torch.arange(10, dtype=torch.uint8).view(1, 1, 10, 1).expand(2000, 12, 10, 1)
    images = torch.cat((rows, columns), dim=3).unflatten(0, (1000, 2))
    crops = random_crop(images, 6, Draws(seeded())).flatten(0, 1)
    offsets = crops[:, 0, 0].long()
    window = torch.arange(6)
    assert torch.equal(crops[..., 0].long(), (offsets[:, 0, None] + window).unsqueeze(2).expand(-1, 6, 6))
    assert torch.equal(crops[..., 1].long(), (offsets[:, 1, None] + window).unsqueeze(1).expand(-1, 6, 6))
    for axis, length in enumerate((12, 10)):
        counts = offsets[:, axis].bincount(minlength=length - 6 + 1)
        expected = 2000 / (length - 6)
        assert counts[length - 6] == 0  # H - h itself is never drawn
        assert (counts[: length - 6] - expected).abs().max() < 5 * expected**0.5
    assert abs(torch.corrcoef(offsets.T.float())[0, 1]) < 0.1


def test_a_crop_of_the_whole_image_is_the_image() -> None:
    images = pictures(2, 1, 8, 8, 3)
    assert torch.equal(random_crop(images, 8, Draws(seeded())), images) and torch.equal(centre_crop(images, 8), images)


@pytest.mark.parametrize(("side", "crop"), [(84, 76), (96, 84), (240, 216)])
def test_the_centre_crop_leaves_the_same_margin_on_every_side(side: int, crop: int) -> None:
    images = torch.zeros(1, 2, side, side, 1, dtype=torch.uint8)
    margin = (side - crop) // 2
    images[:, :, margin : side - margin, margin : side - margin] = 1
    assert centre_crop(images, crop).shape == (1, 2, crop, crop, 1) and centre_crop(images, crop).sum() == images.sum()


def test_crops_are_random_while_training_and_central_while_evaluating() -> None:
    encoder = made({"image": (48, 40, 3)}, crop=36)
    seen: list[Tensor] = []
    encoder.encoders[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    given = {"image": pictures(2, 2, 48, 40, 3)}
    first, again = (encoder(given, draws=Draws(seeded(3))) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(encoder(given, draws=Draws(seeded(4))), first)
    torch.manual_seed(5)
    free = encoder(given)
    torch.manual_seed(5)
    assert torch.equal(encoder(given), free)  # without draws, those of PyTorch's global generator
    encoder.eval()
    assert torch.equal(encoder(given, draws=Draws(seeded(3))), encoder(given, draws=Draws(seeded(4))))
    central = given["image"][0, 1, 6:42, 2:38].permute(2, 0, 1).float() * (2 / 255) - 1
    torch.testing.assert_close(seen[-1][1], central)


@pytest.mark.parametrize(
    ("shapes", "crop", "message"),
    [
        ({}, None, "at least one observation, got none"),
        (
            {"image": (3, 40, 40)},
            None,
            r"shape of 'image' must be \(height, width, 3\) or \(size,\), got \(3, 40, 40\)",
        ),
        ({"state": (2, 2)}, None, r"shape of 'state' must be .* got \(2, 2\)"),
        ({"state": (0,)}, None, r"shape of 'state' must be .* got \(0,\)"),
        ({"state": ()}, None, r"shape of 'state' must be .* got \(\)"),
        ({"image": (40, 32, 3)}, None, r"'image' must have sides of at least 33 pixels, got \(40, 32, 3\)"),
        ({"image": (40, 48, 3)}, 41, r"crop must be 33 to 40 for 'image' of shape \(40, 48, 3\), got 41"),
        ({"image": (40, 48, 3)}, 32, r"crop must be 33 to 40 for 'image' of shape \(40, 48, 3\), got 32"),
    ],
)
def test_impossible_encoders_are_refused(shapes: dict[str, tuple[int, ...]], crop: int | None, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        ObservationEncoder(shapes, crop=crop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, r"observation must have 'image', got \['state'\]"),
        (
            {"image": torch.zeros(1, 2, 3, 40, 40)},
            r"'image' must be \[batch, times, 40, 40, 3\], got \[1, 2, 3, 40, 40\]",
        ),
        ({"image": torch.zeros(1, 2, 40, 40, 3)}, "'image' must be torch.uint8, got torch.float32"),
        ({"state": torch.zeros(1, 2, 3)}, r"'state' must be \[batch, times, 2\], got \[1, 2, 3\]"),
        ({"state": torch.zeros(2)}, r"'state' must be \[batch, times, 2\], got \[2\]"),
        ({"state": torch.zeros(1, 2, 2, dtype=torch.int64)}, "'state' must be floating point, got torch.int64"),
    ],
)
def test_observations_that_do_not_fit_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    given = {"image": torch.zeros(1, 2, 40, 40, 3, dtype=torch.uint8), "state": torch.zeros(1, 2, 2)} | change
    with pytest.raises(ValueError, match=message):
        made({"image": (40, 40, 3), "state": (2,)})({key: value for key, value in given.items() if value is not None})
