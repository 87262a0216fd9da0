"""Encoders: the release's numbers, frozen weights, gradients of images, and what checkpoints may hold."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.vision.tiny_models import autoencoder
from vision import encoders
from vision.encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ConvNeXtV2,
    JoinedEncoders,
    ResNet50,
    ThroughDecoder,
    fingerprint,
    imagenet_input,
    load_encoder,
    round_weights,
)
from vision.features import FAMILIES, multi_scale_features
from vision.mae import ResNetMAE
from vision.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "convnext_v2.npz"


def make_images(batch: int = 2, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def make_mae(in_channels: int = 3) -> ResNetMAE:
    torch.manual_seed(0)
    return ResNetMAE(in_channels=in_channels, base_channels=4, blocks=(1, 2), num_classes=3)


def make_convnext() -> ConvNeXtV2:
    torch.manual_seed(0)
    encoder = ConvNeXtV2(depths=(1, 1, 2, 1), dims=(4, 8, 12, 16), image_size=64)
    for parameter in encoder.parameters():  # GRN starts at 0, which would hide it
        nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.fixture(scope="module")
def resnet() -> ResNet50:
    torch.manual_seed(0)
    return ResNet50(image_size=64)


class DoublingDecoder(nn.Module):
    """Stands in for a tokenizer: latents [B, 4, h, w] to images [B, 3, 2h, 2w]."""

    channels = 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.up = nn.ConvTranspose2d(4, 3, 2, 2)
        self.decoded: list[int] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(len(latents))
        return self.up(latents).tanh()


def authors_weights(golden: Any) -> dict[str, Tensor]:
    """The golden file's arrays as a checkpoint of ConvNeXt-V2's authors names and lays them out, with a classifier."""
    weights = {"head.weight": torch.randn(5, 32), "head.bias": torch.randn(5)}
    for path in golden:
        if not path.startswith("param/"):
            continue
        name = re.sub(r"_(\d)/layers_(\d)", r".\1.\2", path.removeprefix("param/")).replace("/", ".")
        array = torch.from_numpy(golden[path])
        if name.endswith(".kernel"):
            array = array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T
        weights[re.sub(r"\.(kernel|scale)$", ".weight", name)] = array.contiguous()
    return weights


def from_authors_pth(weights: dict[str, Tensor], folder: Path) -> ConvNeXtV2:
    torch.save({"model": weights}, folder / "convnext.pt")
    return ConvNeXtV2.from_pretrained(folder / "convnext.pt")


def from_timms_folder(weights: dict[str, Tensor], folder: Path) -> ConvNeXtV2:
    state = from_authors_pth(weights, folder).backbone.state_dict()
    state |= {"head.fc.weight": torch.randn(5, 32), "head.fc.bias": torch.randn(5)}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return ConvNeXtV2.from_pretrained(folder)


@pytest.mark.parametrize("load", [from_authors_pth, from_timms_folder])
def test_every_convnext_feature_is_the_releases(
    load: Callable[[dict[str, Tensor], Path], ConvNeXtV2], tmp_path: Path
) -> None:
    with np.load(GOLDEN) as file:
        golden = dict(file)
    encoder = load(authors_weights(golden), tmp_path)
    normalized = torch.from_numpy(golden["input_nhwc_imagenet_normalised"]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    features = encoder.features((normalized * std + mean) * 2 - 1)
    prefix = "activation/"
    expected = {
        key.removeprefix(prefix).removeprefix("convenxt_"): golden[key] for key in golden if key.startswith(prefix)
    }
    assert features.keys() == expected.keys()
    for name, feature in features.items():
        array = torch.from_numpy(expected[name])
        torch.testing.assert_close(feature, array, rtol=1e-5, atol=1e-5 * array.abs().max().item(), msg=name)


def test_the_default_convnext_is_the_base_network() -> None:
    with torch.device("meta"):
        convnext = ConvNeXtV2()
    assert sum(parameter.numel() for parameter in convnext.parameters()) == 87_692_800


@pytest.mark.parametrize("size", [(256, 256), (40, 24), (8, 8), (224, 224), (300, 224)])
def test_resizing_is_bilinear_with_antialiasing(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate((images + 1) / 2, (224, 224), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(imagenet_input(images, 224, normalize=False), expected, rtol=0, atol=1e-5)


def test_imagenets_mean_becomes_0_and_one_deviation_1() -> None:
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    colours = torch.stack((mean, mean + std))[:, :, None, None].expand(-1, -1, 5, 5) * 2 - 1
    normalized = imagenet_input(colours, 8)
    torch.testing.assert_close(normalized[0], torch.zeros(3, 8, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalized[1], torch.ones(3, 8, 8), rtol=0, atol=1e-5)


def test_autocast_does_not_round_the_input() -> None:
    images = make_images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = imagenet_input(images, 24)
    assert found.dtype == torch.float32
    assert torch.equal(found, imagenet_input(images, 24))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"[B, 3, H, W] or [B, 1, H, W], found {list(shape)}")):
        imagenet_input(torch.zeros(shape), 8)


def test_grey_images_are_colour_images_of_equal_channels(resnet: ResNet50) -> None:
    grey = make_images(channels=1)
    for encoder in (make_convnext(), resnet):
        of_grey, of_colour = (encoder.features(images) for images in (grey, grey.expand(-1, 3, -1, -1)))
        for name, feature in of_grey.items():
            torch.testing.assert_close(feature, of_colour[name])


def test_convnext_stages_are_normalised_over_channels() -> None:
    """Where the spread over channels is large beside 1e-3, each location has mean 0 and deviation 1."""
    locations = make_convnext().features(make_images(), families="a")
    assert {name: list(feature.shape) for name, feature in locations.items()} == {
        "stage_1": [2, 64, 8],
        "stage_2": [2, 16, 12],
        "stage_3": [2, 4, 16],
    }
    for feature in locations.values():
        torch.testing.assert_close(feature.mean(-1), torch.zeros(feature.shape[:2]), rtol=0, atol=1e-4)
        assert (feature.std(-1, correction=0) - 1).abs().max() < 0.05


def test_convnext_knows_families_a_and_b() -> None:
    encoder, images = make_convnext(), make_images()
    everything = encoder.features(images)
    parts = [encoder.features(images, families=families) for families in ("ac", "b", "cd")]
    assert parts[2] == {}
    assert parts[0].keys() | parts[1].keys() == everything.keys() and not parts[0].keys() & parts[1].keys()
    with pytest.raises(ValueError, match="families: expected letters"):
        encoder.features(images, families="e")


def test_resnet_maps_are_torchvisions(resnet: ResNet50) -> None:
    """After the stem, each stage, and every second block that does not end one, seen by hooks on torchvision's own."""
    places = {
        "conv1": "maxpool", "layer1_blk2": "layer1.1", "layer1": "layer1", "layer2_blk2": "layer2.1",
        "layer2": "layer2", "layer3_blk2": "layer3.1", "layer3_blk4": "layer3.3", "layer3": "layer3",
        "layer4_blk2": "layer4.1", "layer4": "layer4",
    }  # fmt: skip
    seen: dict[str, Tensor] = {}
    hooks = [
        resnet.backbone.get_submodule(place).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.clone()})
        )
        for name, place in places.items()
    ]
    images = make_images(size=64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    resnet.backbone(((images + 1) / 2 - mean) / std)
    for hook in hooks:
        hook.remove()
    features = resnet.features(images)
    expected = multi_scale_features(seen)
    assert features.keys() == expected.keys()
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert features["layer3"].shape == (2, 16, 1024) and "layer4_mean_2" in features


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_images_take_gradients_and_weights_none(kind: str, resnet: ResNet50) -> None:
    """Also of constant images, which is what a zero-initialised generator draws first."""
    encoder = make_convnext() if kind == "convnext" else resnet
    for images in (make_images(), torch.zeros(2, 3, 32, 32)):
        images = images.requires_grad_()
        sum(feature.float().square().sum() for feature in encoder.features(images).values()).backward()
        assert images.grad.isfinite().all() and images.grad.abs().max() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())


def test_gradients_of_images_are_those_of_finite_differences() -> None:
    encoder = make_convnext()
    images = make_images(batch=1, size=16).requires_grad_()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(4))

    def value(x: Tensor) -> Tensor:
        features = encoder.features(x, families="b")
        return sum((feature.double() * torch.arange(1, feature.shape[-1] + 1)).sum() for feature in features.values())

    (gradient,) = torch.autograd.grad(value(images), images)
    step = 1e-2
    with torch.no_grad():
        difference = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=2e-2)


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_statistics_are_float32_under_autocast(kind: str, resnet: ResNet50) -> None:
    encoder = make_convnext() if kind == "convnext" else resnet
    images = make_images()
    exact = encoder.features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = encoder.features(images)
    assert features.keys() == exact.keys()
    for name, feature in features.items():
        if "_mean" in name or "_std" in name:
            assert feature.dtype == torch.float32, name
        assert ((feature - exact[name]).norm() / exact[name].norm()).item() < 0.05, name


@pytest.mark.parametrize("kind", ["mae", "convnext", "decoder"])
def test_weights_rounded_once_give_the_features_of_weights_rounded_at_every_call(kind: str) -> None:
    mae = make_mae().requires_grad_(False)
    encoder = {
        "mae": mae,
        "convnext": make_convnext(),
        "decoder": ThroughDecoder(Tokenizer(autoencoder(), bfloat16=True), JoinedEncoders({"mae": mae})),
    }[kind]
    images = make_images(channels=4, size=8) if kind == "decoder" else make_images()
    images.requires_grad_()

    def features_and_gradient() -> tuple[dict[str, Tensor], Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = encoder.features(images)
        return features, torch.autograd.grad(sum(part.float().square().mean() for part in features.values()), images)[0]

    expected, expected_gradient = features_and_gradient()
    round_weights(encoder)
    assert (features_and_gradient()[1] - expected_gradient).norm() / expected_gradient.norm() < 0.02  # of bfloat16
    for part in encoder.modules():  # in the layout that they had
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous()
    found, gradient = features_and_gradient()
    assert all(torch.equal(found[name], feature) for name, feature in expected.items())
    assert torch.equal(gradient, expected_gradient)
    rounded = {type(part) for part in encoder.modules() if getattr(part, "weight", images).dtype == torch.bfloat16}
    assert rounded and rounded <= {nn.Conv2d, nn.Linear}
    if kind == "decoder":
        assert {parameter.dtype for parameter in encoder.tokenizer.parameters()} == {torch.float32}


def test_only_frozen_weights_are_rounded() -> None:
    with pytest.raises(ValueError, match="encoder: expected frozen weights, found some that take a gradient"):
        round_weights(make_mae())


def test_frozen_encoders_stay_in_evaluation_mode(resnet: ResNet50) -> None:
    owner = nn.Sequential(resnet)
    owner.train()
    assert not any(module.training for module in resnet.modules())
    images = make_images()
    before = resnet.backbone.bn1.running_mean.clone()
    resnet.features(images)
    assert torch.equal(resnet.backbone.bn1.running_mean, before)


@pytest.fixture(scope="module")
def resnet_weights(resnet: ResNet50) -> dict[str, Tensor]:
    return dict(resnet.backbone.state_dict())


def assert_same_resnet(found: ResNet50, expected: ResNet50) -> None:
    assert fingerprint(found) == fingerprint(expected)


def test_a_moco_checkpoint(resnet: ResNet50, resnet_weights: dict[str, Tensor], tmp_path: Path) -> None:
    """What MoCo-v2 publishes: a query encoder with a projector, its momentum copy and the queue, under one prefix."""
    state = {f"module.encoder_q.{name}": tensor for name, tensor in resnet_weights.items()}
    state |= {f"module.encoder_{which}.fc.{i}.weight": torch.zeros(3, 3) for which in "qk" for i in (0, 2)}
    state |= {"module.encoder_k.conv1.weight": torch.zeros(64, 3, 7, 7)}
    state |= {"module.queue": torch.zeros(128, 9), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state}, tmp_path / "moco.pth.tar")
    encoder = load_encoder(f"resnet50:{tmp_path / 'moco.pth.tar'}")
    assert isinstance(encoder, ResNet50) and encoder.normalize
    assert_same_resnet(encoder, resnet)


def test_a_simclr_checkpoint(resnet: ResNet50, resnet_weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Under another prefix, as safetensors, without BatchNorm's counters; for input in [0, 1]."""
    state = {f"backbone.{k}": v for k, v in resnet_weights.items() if not k.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state | {"projector.0.weight": torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    encoder = load_encoder(f"simclr:{tmp_path / 'w.safetensors'}")
    assert isinstance(encoder, ResNet50) and not encoder.normalize
    assert_same_resnet(encoder, resnet)


def test_a_resnet_checkpoint_has_to_fit(resnet_weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    few = {name: tensor for name, tensor in resnet_weights.items() if name.startswith(("conv1", "bn1"))}
    safetensors.torch.save_file(few | {"layer9.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"(?s)do not fit.*layer4\.2\.bn3\.weight.*layer9\.weight"):
        ResNet50.from_pretrained(path)
    safetensors.torch.save_file({"stem.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"expected a ResNet with conv1\.weight, found names such as \['stem"):
        ResNet50.from_pretrained(path)


def test_a_convnext_checkpoint_has_to_fit(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = make_convnext().backbone.state_dict()
    first_version = {k: v for k, v in state.items() if "grn" not in k} | {"stages.0.blocks.0.gamma": torch.zeros(4)}
    safetensors.torch.save_file(first_version, path)
    with pytest.raises(ValueError, match=r"(?s)do not fit.*grn\.weight.*gamma"):
        ConvNeXtV2.from_pretrained(path)
    safetensors.torch.save_file({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="expected a ConvNeXt-V2 of four stages"):
        ConvNeXtV2.from_pretrained(path)


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pth_runs_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": Trap(tmp_path / "sprung")}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: expected safetensors or a \.pth of tensors alone"):
        ResNet50.from_pretrained(tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 half a zip"])
def test_damaged_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: expected safetensors or a .pth")):
        ResNet50.from_pretrained(tmp_path / name)


def test_a_pth_of_something_else(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "weights": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="expected tensors by name, at the top or under 'state_dict' or 'model'"):
        ResNet50.from_pretrained(tmp_path / "w.pth")


def test_gradients_pass_through_decoder_and_encoder() -> None:
    decoder, mae = DoublingDecoder(), make_mae()
    encoder = ThroughDecoder(decoder, mae)
    latents = torch.randn(3, 4, 4, 4, requires_grad=True)
    features = encoder.features(latents)
    expected = mae.features(decoder.up(latents).tanh())
    assert features.keys() == expected.keys()
    weights = {name: torch.randn(feature.shape) for name, feature in features.items()}
    found, wanted = (
        torch.autograd.grad(sum((f[name] * weight).sum() for name, weight in weights.items()), latents)[0]
        for f in (features, expected)
    )
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted)
    assert not any(parameter.requires_grad for module in (decoder, mae) for parameter in module.parameters())


@pytest.mark.parametrize("images_at_once", [1, 2, 5, 9])
def test_decoding_some_at_a_time_changes_nothing(images_at_once: int) -> None:
    decoder, mae = DoublingDecoder().double(), make_mae().double()
    latents = torch.randn(5, 4, 4, 4, dtype=torch.float64, requires_grad=True)

    def gradient(encoder: ThroughDecoder) -> Tensor:
        value = sum(feature.square().sum() for feature in encoder.features(latents).values())
        return torch.autograd.grad(value, latents)[0]

    expected = gradient(ThroughDecoder(decoder, mae))
    decoder.decoded.clear()
    torch.testing.assert_close(gradient(ThroughDecoder(decoder, mae, images_at_once=images_at_once)), expected)
    parts = [len(part) for part in latents.split(images_at_once)]
    assert sorted(decoder.decoded) == sorted(parts * 2)  # once forward, once more in the backward pass
    with torch.no_grad():
        decoder.decoded.clear()
        ThroughDecoder(decoder, mae, images_at_once=images_at_once).features(latents)
    assert decoder.decoded == parts


def test_gradients_pass_through_the_tokenizer() -> None:
    """Which computes microbatches of its own twice."""
    tokenizer, mae = Tokenizer(autoencoder(), microbatch=1), make_mae()
    latents = torch.randn(3, 4, 8, 8, requires_grad=True)
    expected = mae.features(tokenizer.vae.decode(latents / tokenizer.scale).sample)
    (wanted,) = torch.autograd.grad(sum(feature.square().sum() for feature in expected.values()), latents)
    for images_at_once in (None, 2):
        features = ThroughDecoder(tokenizer, mae, images_at_once=images_at_once).features(latents)
        (found,) = torch.autograd.grad(sum(feature.square().sum() for feature in features.values()), latents)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_maps_of_few_images_are_kept_at_a_time() -> None:
    """The bytes that autograd keeps from forward to backward, counted by its own hooks."""
    decoder, mae = DoublingDecoder(), make_mae()
    latents = torch.randn(8, 4, 8, 8, requires_grad=True)

    def kept(images_at_once: int | None) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        encoder = ThroughDecoder(decoder, mae, images_at_once=images_at_once)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = encoder.features(latents, families="b")
        assert features
        return sum(sizes.values())

    assert kept(2) < kept(None) / 5


def test_images_at_once_is_checked() -> None:
    with pytest.raises(ValueError, match="images_at_once: expected at least 1, found 0"):
        ThroughDecoder(DoublingDecoder(), make_mae(), images_at_once=0)


def test_joined_features_carry_their_encoders_name() -> None:
    members = {"mae": make_mae(), "convnext": make_convnext()}
    joined, images = JoinedEncoders(members), make_images()
    features = joined.features(images, families="ab")
    expected = {
        f"{name}/{key}": f for name, m in members.items() for key, f in m.features(images, families="ab").items()
    }
    assert list(features) == list(expected)
    for name, feature in features.items():
        assert torch.equal(feature, expected[name])
    assert not any(parameter.requires_grad for parameter in members["mae"].parameters())
    assert len(list(joined.parameters())) == sum(len(list(member.parameters())) for member in members.values())


def test_any_object_with_features_joins_under_any_name() -> None:
    class Pixels:
        def features(self, images: Tensor, *, families: str = FAMILIES) -> dict[str, Tensor]:
            return {"pixels": images.flatten(2).mT}

    features = JoinedEncoders({"train": Pixels(), "keys": make_mae()}).features(make_images(), families="a")
    assert list(features)[:2] == ["train/pixels", "keys/norm_x"]
    with pytest.raises(ValueError, match="encoders: expected at least one, found none"):
        JoinedEncoders({})


def test_an_mae_and_a_convnext_are_loaded_by_name(tmp_path: Path) -> None:
    make_mae().save_pretrained(tmp_path / "mae")
    safetensors.torch.save_file(make_convnext().backbone.state_dict(), tmp_path / "convnext.safetensors")
    specs = [f"mae:{tmp_path / 'mae'}", f"convnextv2:{tmp_path / 'convnext.safetensors'}"]
    alone, joined = load_encoder(specs[0]), load_encoder(specs)
    assert isinstance(alone, ResNetMAE) and not alone.training
    assert not any(p.requires_grad for encoder in (alone, joined) for p in encoder.parameters())
    images = make_images(size=16)
    features = joined.features(images, families="b")
    for name, feature in make_mae().features(images, families="b").items():
        assert torch.equal(features[f"mae/{name}"], feature)
    assert "convnextv2/stage_3_std" in features


def test_with_a_tokenizer_encoders_of_images_work_on_latents(tmp_path: Path) -> None:
    for channels in (3, 4):
        make_mae(channels).save_pretrained(tmp_path / f"{channels}")
    decoder = DoublingDecoder()
    assert isinstance(load_encoder(f"mae:{tmp_path / '4'}", tokenizer=decoder), ResNetMAE)
    through = load_encoder(f"mae:{tmp_path / '3'}", tokenizer=decoder, images_at_once=2)
    assert isinstance(through, ThroughDecoder) and through.images_at_once == 2
    latents = torch.randn(3, 4, 4, 4)
    features = through.features(latents)
    assert sum(decoder.decoded) == 3
    for name, feature in make_mae(3).features(decoder.decode(latents)).items():
        torch.testing.assert_close(features[name], feature)


def test_random_weights_only_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "RELEASED_MAES", {"small": {"in_channels": 4, "base_channels": 4, "num_classes": 2}})
    joined = load_encoder(["mae:small", "convnextv2:convnextv2_atto", "resnet50"], random_weights=True)
    assert isinstance(joined, JoinedEncoders) and list(joined.encoders) == ["mae", "convnextv2", "resnet50"]
    assert joined.encoders["convnextv2"].backbone.num_features == 320
    assert not any(parameter.requires_grad for parameter in joined.parameters())
    with pytest.raises(ValueError, match="mae: expected one of small for random weights, found 'else'"):
        load_encoder("mae:else", random_weights=True)


def test_the_releases_maes_by_name() -> None:
    with torch.device("meta"):
        sizes = {name: encoders._random_mae(name).config for name in encoders.RELEASED_MAES}
    assert sizes["mae_latent_256"]["base_channels"] == 256 and sizes["mae_latent_640"]["in_channels"] == 4
    assert sizes["mae_pixel_640"]["patch_size"] == 8 and sizes["mae_pixel_640"]["blocks"] == [3, 4, 6, 3]


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client as on a machine without network that has never fetched anything."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("empty_hub")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mae:nowhere/at/all", "mae: nowhere/at/all: expected a folder or a hub id .* vision.train_mae trains one"),
        ("mae:owner/name", "mae: owner/name: expected it on the Hugging Face hub .* vision.train_mae trains one"),
        ("resnet50:nowhere.pth", "resnet50: expected a checkpoint of a ResNet-50, found nothing at nowhere.pth"),
        ("convnextv2:nowhere.pth", "convnextv2: expected a checkpoint file, .* found nothing at nowhere.pth"),
        ("convnextv2:convnextv2_huge", "or a timm name such as .*, found nothing at convnextv2_huge"),
        ("convnextv2:convnextv2_huge.fcmae", "timm/convnextv2_huge.fcmae: expected .* say convnextv2:PATH"),
        ("convnextv2", "timm/convnextv2_base.fcmae_ft_in22k_in1k: expected .* say convnextv2:PATH"),
    ],
)
def test_absent_weights_are_an_error_that_says_what_to_put_where(spec: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message) as error:
        load_encoder(spec)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: expected a checkpoint file, found none"):
        load_encoder(f"convnextv2:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_encoder(f"mae:{tmp_path}")


@pytest.mark.parametrize("spec", ["mae", "mae:", "resnet50", "simclr:", "dino:x", ""])
def test_unknown_encoders_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"encoder: expected mae:\.\.\., convnextv2\[:\.\.\.\], .* found "):
        load_encoder(spec)


@pytest.mark.parametrize("specs", [[], ["resnet50:a", "resnet50:b"]])
def test_encoders_need_different_kinds(specs: list[str]) -> None:
    with pytest.raises(ValueError, match="encoder: expected encoders of different kinds"):
        load_encoder(specs)


def test_the_fingerprint_is_that_of_the_weights() -> None:
    one, same = make_mae(), make_mae()
    assert fingerprint(one) == fingerprint(same)
    for parameter in list(same.parameters())[-1:]:
        parameter.data.view(-1)[0] += 1e-6
    assert fingerprint(one) != fingerprint(same)
    assert fingerprint(one) != fingerprint(make_mae().double())


def test_compiled_features_are_one_graph() -> None:
    joined, images = JoinedEncoders({"mae": make_mae(), "convnext": make_convnext()}), make_images()
    compiled = torch.compile(lambda x: joined.features(x, families="ab"), backend="eager", fullgraph=True)
    features = compiled(images)
    expected = joined.features(images, families="ab")
    assert list(features) == list(expected)
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name])
