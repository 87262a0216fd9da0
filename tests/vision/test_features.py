"""Multi-scale features against loops over pixels, and their shape for the loss."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vision.features import (
    FAMILIES,
    VARIANCE_FLOOR,
    group_by_label,
    image_features,
    multi_scale_features,
    root_mean_square,
)


def make_map(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def patch_moments(feature_map: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations [B, L, C] of height x width patches in row order, by loops in float64."""
    batch, channels, rows, columns = feature_map.shape
    corners = list(itertools.product(range(0, rows, height), range(0, columns, width)))
    means, stds = np.zeros((2, batch, len(corners), channels))
    for image, (place, (row, column)), channel in itertools.product(range(batch), enumerate(corners), range(channels)):
        values = [float(feature_map[image, channel, row + i, column + j]) for i in range(height) for j in range(width)]
        mean = math.fsum(values) / len(values)
        means[image, place, channel] = mean
        variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        stds[image, place, channel] = math.sqrt(variance + VARIANCE_FLOOR)
    return means, stds


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 4, 12)])
def test_features_against_loops(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    feature_map = make_map(*shape).contiguous(memory_format=layout)
    features = multi_scale_features({"m": feature_map})
    assert list(features) == ["m", "m_mean_2", "m_std_2", "m_mean_4", "m_std_4", "m_mean", "m_std"]
    places = itertools.product(range(shape[2]), range(shape[3]))
    for index, (row, column) in enumerate(places):
        assert torch.equal(features["m"][:, index], feature_map[:, :, row, column])
    for suffix, height, width in [("", *shape[2:]), ("_2", 2, 2), ("_4", 4, 4)]:
        means, stds = patch_moments(feature_map.numpy(), height, width)
        np.testing.assert_allclose(features[f"m_mean{suffix}"], means, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(features[f"m_std{suffix}"], stds, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("families", "names"),
    [
        ("a", {"m"}),
        ("b", {"m_mean", "m_std"}),
        ("c", {"m_mean_2", "m_std_2"}),
        ("d", {"m_mean_4", "m_std_4"}),
        ("ab", {"m", "m_mean", "m_std"}),
        ("bd", {"m_mean", "m_std", "m_mean_4", "m_std_4"}),
    ],
)
def test_families_are_chosen_and_do_not_change_each_other(families: str, names: set[str]) -> None:
    maps = {"m": make_map(2, 3, 8, 8)}
    features, everything = multi_scale_features(maps, families=families), multi_scale_features(maps)
    assert features.keys() == names
    for name, feature in features.items():
        torch.testing.assert_close(feature, everything[name])


@pytest.mark.parametrize(
    ("size", "missing"),
    [(1, {"_2", "_4"}), (2, {"_4"}), (3, {"_2", "_4"}), (6, {"_4"}), (4, set()), (8, set())],
)
def test_maps_that_patches_do_not_tile_are_skipped(size: int, missing: set[str]) -> None:
    features = multi_scale_features({"m": make_map(2, 3, size, size)})
    present = {f"m_{statistic}{suffix}" for statistic in ("mean", "std") for suffix in {"", "_2", "_4"} - missing}
    assert features.keys() == {"m"} | present
    means, stds = patch_moments(make_map(2, 3, size, size).numpy(), size, size)
    np.testing.assert_allclose(features["m_mean"], means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features["m_std"], stds, rtol=1e-5, atol=1e-6)


def test_a_small_spread_far_from_zero_survives() -> None:
    """E[x^2] - E[x]^2 in float32 would be off by more than the whole variance here."""
    feature_map = 1000 + 0.05 * make_map(1, 2, 8, 8)
    features = multi_scale_features({"m": feature_map})
    for suffix, size in [("", 8), ("_2", 2), ("_4", 4)]:
        _, stds = patch_moments(feature_map.numpy(), size, size)
        np.testing.assert_allclose(features[f"m_std{suffix}"], stds, rtol=2e-3)


def test_a_constant_map_has_finite_gradients() -> None:
    feature_map = torch.full((1, 2, 8, 8), 3.7, requires_grad=True)
    features = multi_scale_features({"m": feature_map})
    for name in ("m_std", "m_std_2", "m_std_4"):
        np.testing.assert_allclose(features[name].detach(), VARIANCE_FLOOR**0.5, rtol=1e-3)
    sum(feature.sum() for feature in features.values()).backward()
    assert feature_map.grad.isfinite().all()
    assert feature_map.grad.abs().max() < 10


def test_gradients() -> None:
    feature_map = make_map(1, 2, 4, 4, dtype=torch.float64).float().double().requires_grad_()
    names = list(multi_scale_features({"m": feature_map}))

    def features(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(multi_scale_features({"m": x})[name] for name in names)

    assert torch.autograd.gradcheck(features, feature_map)


def test_moments_of_half_precision_maps_are_taken_in_float32() -> None:
    feature_map = make_map(2, 3, 8, 8, dtype=torch.bfloat16)
    features = multi_scale_features({"m": feature_map})
    assert features.pop("m").dtype == torch.bfloat16
    exact = multi_scale_features({"m": feature_map.float()})
    for name, feature in features.items():
        assert torch.equal(feature, exact[name])


def test_root_mean_square_against_loops() -> None:
    images = make_map(2, 3, 4, 5)
    expected = np.sqrt((images.double().numpy() ** 2).sum(axis=(2, 3)) / 20 + 1e-6)
    np.testing.assert_allclose(root_mean_square(images)[:, 0], expected, rtol=1e-6)


class HalvesOfImages:
    """An encoder of our own: the two halves of each image as two locations."""

    def features(self, images: Tensor, *, families: str = FAMILIES) -> dict[str, Tensor]:
        return {f"halves_{families}": images.flatten(1).unflatten(1, (2, -1))}


def test_any_encoder_will_do() -> None:
    images = make_map(4, 1, 4, 4)
    features = image_features(images, HalvesOfImages(), families="ab")
    assert {name: list(feature.shape) for name, feature in features.items()} == {
        "global": [4, 1, 16],
        "halves_ab": [4, 2, 8],
    }
    assert torch.equal(features["global"][:, 0], images.flatten(1))
    assert image_features(images).keys() == {"global"}


def test_the_encoder_sees_what_a_picture_file_keeps() -> None:
    images = (2.0 * make_map(4, 1, 4, 4)).requires_grad_()
    outside = images.abs() > 1.0
    assert outside.any() and not outside.all()
    features = image_features(images, HalvesOfImages(), families="ab", clamp=True)
    assert torch.equal(features["halves_ab"].flatten(1), images.clamp(-1.0, 1.0).flatten(1))
    assert torch.equal(features["global"][:, 0], images.flatten(1))
    (gradient,) = torch.autograd.grad(features["halves_ab"].sum(), images)
    assert torch.equal(gradient, 1.0 - outside.float())


def test_groups_are_label_then_location() -> None:
    num_labels, samples, locations, channels = 3, 2, 5, 4
    feature = make_map(num_labels * samples, locations, channels)
    groups = group_by_label({"f": feature}, num_labels)["f"]
    assert groups.shape == (num_labels, locations, samples, channels)
    for label, location, sample in itertools.product(range(num_labels), range(locations), range(samples)):
        assert torch.equal(groups[label, location, sample], feature[label * samples + sample, location])
    assert groups.data_ptr() == feature.data_ptr()  # a view


def test_vectors_of_a_channels_last_map_are_views() -> None:
    feature_map = make_map(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    vectors = multi_scale_features({"m": feature_map}, families="a")["m"]
    assert vectors.is_contiguous()
    assert vectors.data_ptr() == feature_map.data_ptr()


@pytest.mark.parametrize("families", ["", "e", "abx"])
def test_unknown_families(families: str) -> None:
    with pytest.raises(ValueError, match=f"families: expected letters of 'abcd', found '{families}'"):
        multi_scale_features({"m": make_map(1, 1, 4, 4)}, families=families)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"m: expected shape \[B, C, H, W\], found \[2, 3, 4\]"):
        multi_scale_features({"m": make_map(2, 3, 4)})
    for num_labels in (0, 4):
        with pytest.raises(ValueError, match=f"f: expected a multiple of {num_labels} labels, found 6"):
            group_by_label({"f": make_map(6, 1, 2)}, num_labels)
