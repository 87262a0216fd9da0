"""The masked autoencoder: its mathematics, and the release's own numbers."""

import functools
import inspect
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.vision.release_artifacts import golden_mae, nchw
from vision import mae as module
from vision.convert import convert
from vision.mae import BasicBlock, GroupNorm, MAELoss, ResNetMAE

GOLDEN = Path(__file__).parents[1] / "golden"
TINY: dict[str, Any] = {"in_channels": 2, "base_channels": 4, "blocks": (1, 2, 1), "num_classes": 5}


def make_mae(**changes: Any) -> ResNetMAE:
    torch.manual_seed(0)
    return ResNetMAE(**TINY | changes)


def make_images(batch: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, 2, size, size, generator=torch.Generator().manual_seed(1))


@functools.cache
def load_golden(name: str) -> tuple[ResNetMAE, dict[str, np.ndarray]]:
    with tempfile.TemporaryDirectory() as folder:
        convert(golden_mae(name, Path(folder) / "source"), folder)
        mae = ResNetMAE.from_pretrained(folder)
    with np.load(GOLDEN / name / "io.npz") as io:
        return mae.requires_grad_(False), dict(io)


def assert_release(found: Tensor, expected: np.ndarray) -> None:
    """Agreement to 1e-5 of the largest value of the array."""
    expected_tensor = torch.from_numpy(expected)
    torch.testing.assert_close(found, expected_tensor, rtol=1e-5, atol=1e-5 * expected_tensor.abs().max().item())


@pytest.mark.parametrize("name", ["mae_latent", "mae_pixel"])
def test_reconstruction_logits_and_loss_are_the_releases(name: str) -> None:
    mae, io = load_golden(name)
    images, mask = nchw(io["input_nhwc"]), nchw(io["mask_nhw1"])
    assert_release(mae(images, mask), io["reconstruction"].transpose(0, 3, 1, 2))
    assert_release(mae.classify(mae.hide(images, mask)), io["logits"])
    assert_release(mae.loss(images, mask).loss, io["reconstruction_loss"])


@pytest.mark.parametrize("name", ["mae_latent", "mae_pixel"])
def test_every_activation_is_the_releases(name: str) -> None:
    mae, io = load_golden(name)
    features = mae.features(nchw(io["input_nhwc"]))
    expected = {key.removeprefix("activation/"): io[key] for key in io if key.startswith("activation/")}
    assert features.keys() == expected.keys()
    for key, feature in features.items():
        assert_release(feature, expected[key])


def test_stages_halve_the_map_and_double_the_channels() -> None:
    maps = make_mae(blocks=(2, 1, 4)).encode(make_images(size=12))
    assert {name: list(feature_map.shape[1:]) for name, feature_map in maps.items()} == {
        "conv1": [4, 12, 12], "layer1": [4, 12, 12], "layer1_blk2": [4, 12, 12], "layer2": [8, 6, 6],
        "layer3": [16, 3, 3], "layer3_blk2": [16, 3, 3], "layer3_blk4": [16, 3, 3],
    }  # fmt: skip


@pytest.mark.parametrize("blocks", [(1,), (2,), (1, 1), (1, 1, 1, 1, 1)])
def test_any_number_of_stages(blocks: tuple[int, ...]) -> None:
    mae, images = make_mae(blocks=blocks), make_images(size=16)
    assert mae(images, mae.draw_mask(images)).shape == images.shape
    assert mae.classify(images).shape == (3, 5)


def test_skip_is_projected_only_where_the_shape_changes() -> None:
    assert isinstance(BasicBlock(4, 4).skip, torch.nn.Identity)
    for block in (BasicBlock(4, 8), BasicBlock(4, 4, stride=2)):
        assert not isinstance(block.skip, torch.nn.Identity)
        assert block.skip.conv.kernel_size == (1, 1)


@pytest.mark.parametrize("size", [7, 8])
def test_block_formula(size: int) -> None:
    block, x = BasicBlock(4, 8, stride=2), torch.randn(2, 4, size, size)
    inner = F.conv2d(x, block.first.conv.weight, stride=2, padding=1)
    inner = F.conv2d(block.first.norm(inner).relu(), block.second.conv.weight, padding=1)
    skip = F.conv2d(x, block.skip.conv.weight, stride=2)
    torch.testing.assert_close(block(x), (block.skip.norm(skip) + block.second.norm(inner)).relu())


def test_next_stage_receives_the_normalised_map() -> None:
    mae, images = make_mae(), make_images()
    maps = mae.encode(images, every_block=1)
    norm, stage = mae.encoder.norms[0], mae.encoder.stages[1]
    torch.testing.assert_close(maps["layer1"], norm(maps["layer1_blk1"]))
    torch.testing.assert_close(maps["layer2_blk2"], stage(maps["layer1"]))


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (4, 4), (32, 32), (48, 24), (37, 1), (96, 32), (640, 32)])
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    assert GroupNorm(channels).num_groups == groups


def test_only_what_is_seen_reaches_the_reconstruction() -> None:
    mae, images = make_mae(), make_images()
    mask = mae.draw_mask(images, generator=torch.Generator().manual_seed(3))
    elsewhere = torch.where(mask, images + 100, images)
    assert torch.equal(mae(images, mask), mae(elsewhere, mask))
    assert not torch.equal(mae(images, mask), mae(images + 1, mask))


def test_only_what_is_hidden_counts_in_the_loss() -> None:
    """Against loops: mean over hidden locations of the squared error summed over channels."""
    mae, images = make_mae(), make_images()
    mask = mae.draw_mask(images, generator=torch.Generator().manual_seed(3))
    reconstruction = mae(images, mask)
    losses = mae.loss(images, mask)
    for index in range(3):
        errors = [
            sum((reconstruction[index, channel, row, column] - images[index, channel, row, column]) ** 2
                for channel in range(2))
            for row in range(8)
            for column in range(8)
            if mask[index, 0, row, column]
        ]  # fmt: skip
        torch.testing.assert_close(losses.reconstruction[index], sum(errors) / len(errors))
    assert torch.equal(losses.loss, losses.reconstruction)
    assert losses.classification is losses.correct is None


def test_nothing_hidden_is_no_loss() -> None:
    mae, images = make_mae(), make_images()
    assert torch.equal(mae.loss(images, torch.zeros(3, 1, 8, 8)).loss, torch.zeros(3))


def test_bool_and_real_masks_mean_the_same() -> None:
    mae, images = make_mae(), make_images()
    mask = mae.draw_mask(images)
    assert torch.equal(mae(images, mask), mae(images, mask.float()))
    assert torch.equal(mae.loss(images, mask).loss, mae.loss(images, mask.float()).loss)


def test_mask_hides_whole_patches_at_the_asked_rate() -> None:
    mae = make_mae(mask_patch=4, patch_size=2)
    images = torch.empty(500, 2, 32, 32)
    mask = mae.draw_mask(images, ratio=0.3, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (500, 1, 16, 16)
    patches = mask.unflatten(3, (4, 4)).unflatten(2, (4, 4)).float().mean(dim=(3, 5))  # [B, 1, 4, 4]
    assert set(patches.unique().tolist()) == {0.0, 1.0}
    standard_error = (0.3 * 0.7 / 8000) ** 0.5
    assert patches.mean().item() == pytest.approx(0.3, abs=4 * standard_error)
    assert patches.mean(dim=0).std() < 0.05  # no patch is favoured


def test_mask_is_a_function_of_the_generator() -> None:
    mae, images = make_mae(), make_images()
    first, again, other = (mae.draw_mask(images, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pixel_patches_hide_their_pixels() -> None:
    mae = make_mae(patch_size=4)
    images = make_images(size=16)
    mask = torch.zeros(3, 1, 4, 4)
    mask[1, 0, 2, 3] = 1
    changed = (mae.hide(images, mask) != images).any(dim=1)
    expected = torch.zeros(3, 16, 16, dtype=torch.bool)
    expected[1, 8:12, 12:16] = True
    assert torch.equal(changed, expected)


def test_patches_become_channels_row_by_row() -> None:
    mae = make_mae(patch_size=4)
    images = make_images(size=16)
    patches = mae.to_map(images)
    assert patches.shape == (3, 32, 4, 4)
    assert torch.equal(patches[1, :, 2, 3], images[1, :, 8:12, 12:16].permute(1, 2, 0).flatten())
    assert torch.equal(mae.to_images(patches), images)


def test_classification_share_of_the_loss() -> None:
    mae, images, label = make_mae(), make_images(), torch.tensor([4, 0, 2])
    mask = mae.draw_mask(images)
    losses = mae.loss(images, mask, label, classification_weight=0.1)
    logits = mae.classify(mae.hide(images, mask))
    expected = torch.stack([row.exp().sum().log() - row[index] for row, index in zip(logits, label, strict=True)])
    torch.testing.assert_close(losses.classification, expected)
    torch.testing.assert_close(losses.loss, 0.1 * expected + 0.9 * losses.reconstruction)
    assert losses.correct.tolist() == (logits.argmax(dim=1) == label).tolist()


def test_classifier_sees_the_mean_of_the_last_stage() -> None:
    mae, images = make_mae(), make_images()
    mean = mae.encode(images)["layer3"].mean(dim=(2, 3))
    torch.testing.assert_close(mae.classify(images), mean @ mae.classifier.weight.T + mae.classifier.bias)


def test_every_weight_learns() -> None:
    mae, images = make_mae(), make_images()
    mae.loss(images, mae.draw_mask(images), torch.tensor([1, 2, 3]), classification_weight=0.5).loss.sum().backward()
    for name, parameter in mae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_training_reduces_the_loss() -> None:
    mae, images = make_mae(), make_images(4).cumsum(dim=2).cumsum(dim=3) / 4
    mask = mae.draw_mask(images, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(mae.parameters(), lr=1e-2)
    history: list[float] = []
    for _ in range(30):
        loss = mae.loss(images, mask).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.3 * history[0]


def test_images_do_not_see_each_other() -> None:
    mae, images = make_mae(), make_images(5)
    mask, order = mae.draw_mask(images), torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(mae.loss(images[order], mask[order]).loss, mae.loss(images, mask).loss[order])
    features, permuted = mae.features(images), mae.features(images[order])
    for name, feature in features.items():
        torch.testing.assert_close(permuted[name], feature[order], rtol=1e-4, atol=1e-5)


def test_initial_weights_keep_the_variance() -> None:
    weight = make_mae(base_channels=32).encoder.stages[1][0].second.conv.weight  # fan-in 9 * 64
    assert weight.var().item() * 576 == pytest.approx(1, rel=0.03)
    assert weight.abs().max() <= 2 / (0.8796 * 24)


def test_save_and_load(tmp_path: Path) -> None:
    mae, images = make_mae(), make_images()
    mae.save_pretrained(tmp_path)
    loaded = ResNetMAE.from_pretrained(tmp_path)
    assert loaded.config == mae.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in mae.state_dict().items())
    mask = mae.draw_mask(images)
    assert torch.equal(loaded(images, mask), mae(images, mask))


def test_config_holds_every_keyword() -> None:
    assert make_mae().config.keys() == inspect.signature(ResNetMAE).parameters.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 0}, "in_channels: expected at least 1, found 0"),
        ({"blocks": ()}, r"blocks: expected at least 1, found \[\]"),
        ({"blocks": (1, 0)}, r"blocks: expected at least 1, found \[1, 0\]"),
    ],
)
def test_wrong_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mae(**changes)


def loss_of(images: Tensor, mask: Tensor, *label: Tensor, weight: float = 0.0, **changes: Any) -> MAELoss:
    return make_mae(**changes).loss(images, mask, *label, classification_weight=weight)


def test_wrong_inputs() -> None:
    images, mask = make_images(), torch.zeros(3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, H, W\].*found \[3, 2, 8, 8\]"):
        loss_of(images, mask, in_channels=3)
    with pytest.raises(ValueError, match=r"images: expected shape .*multiples of 3, found \[3, 2, 8, 8\]"):
        loss_of(images, torch.zeros(3, 1, 2, 2), patch_size=3)
    with pytest.raises(ValueError, match=r"mask: expected shape \[3, 1, 8, 8\], found \[3, 1, 4, 4\]"):
        loss_of(images, mask[..., ::2, ::2])
    with pytest.raises(ValueError, match=r"classification_weight: expected .* found 0.1 without labels"):
        loss_of(images, mask, weight=0.1)
    with pytest.raises(ValueError, match=r"classification_weight: expected .* found 1.5 with labels"):
        loss_of(images, mask, torch.zeros(3).long(), weight=1.5)
    with pytest.raises(ValueError, match="patches of 3 tile, found 8 x 8 locations"):
        make_mae(mask_patch=3).draw_mask(images)


def test_compiles_without_a_graph_break() -> None:
    mae, images = make_mae(blocks=(1, 2)).requires_grad_(False), make_images().requires_grad_()
    features = torch.compile(mae.features, fullgraph=True, backend="aot_eager")(images)
    for name, feature in mae.features(images).items():
        torch.testing.assert_close(features[name], feature)
    sum(feature.sum() for feature in features.values()).backward()
    assert images.grad.isfinite().all()


def test_bfloat16_autocast() -> None:
    mae, images = make_mae(), make_images().requires_grad_()
    mask = mae.draw_mask(images)
    expected_features, expected_loss = mae.features(images), mae.loss(images, mask).loss
    with torch.autocast("cpu", torch.bfloat16):
        features, loss = mae.features(images), mae.loss(images, mask).loss
    torch.testing.assert_close(loss, expected_loss, rtol=0.02, atol=0)
    for name, feature in features.items():
        error = (feature.float() - expected_features[name]).square().mean().sqrt()
        assert error < 0.1, name  # of values around 1, after seven layers of 8-bit precision
        assert feature.dtype == torch.float32 or "mean" not in name and "std" not in name
    sum(feature.float().sum() for feature in features.values()).backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 48, 5, 6), (3, 4, 1, 1), (1, 64, 4, 4)])
def test_normalization_written_out_is_pytorchs(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    norm = GroupNorm(shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(shape) * 3 + 10).contiguous(memory_format=layout)
    inputs = [tensor.detach().requires_grad_() for tensor in (x, norm.weight, norm.bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    norm.weight, norm.bias = (nn.Parameter(tensor) for tensor in inputs[1:])
    found, expected = norm.normalize(inputs[0]), F.group_norm(exact[0], norm.num_groups, *exact[1:], norm.eps)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=layout)
    weight = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weight).sum(), [inputs[0], norm.weight, norm.bias])
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), exact), strict=True):
        torch.testing.assert_close(gradient, wanted.float(), rtol=1e-4, atol=1e-4)
    narrow = norm.normalize(x.bfloat16())
    expected = F.group_norm(x.bfloat16().double(), norm.num_groups, *exact[1:], norm.eps)
    torch.testing.assert_close(narrow, expected.bfloat16(), rtol=2**-7, atol=1e-5)


def test_maps_on_a_gpu_have_their_channels_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what PyTorch knows of each operation on a GPU; nothing is computed."""
    monkeypatch.setattr(module, "_initialize", lambda layer: None)  # it looks at values
    with FakeTensorMode(), torch.device("cuda"):
        maps = make_mae(blocks=(2, 2)).encode(torch.empty(2, 2, 8, 8))
    assert all(feature_map.is_contiguous(memory_format=torch.channels_last) for feature_map in maps.values())
