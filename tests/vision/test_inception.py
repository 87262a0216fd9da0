"""Loading torch-fidelity's Inception: the published file or an error, and the features in the right places."""

import hashlib
import io
from pathlib import Path

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as published
from torch import Tensor

from driftfield.training import UserError
from vision import inception
from vision.inception import NUM_FEATURES, NUM_LOGITS, NUM_SPATIAL, SPATIAL_CHANNELS, SPATIAL_MODULE, load_inception


class WithoutWeights(published.FeatureExtractorInceptionV3):
    """The published network before its weights are loaded."""

    def load_state_dict(self, *_: object, **__: object) -> None:  # type: ignore[override]
        pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published one's form, with random weights."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    network = WithoutWeights("random", ["2048"], feature_extractor_weights_path=nothing)
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):  # variance-preserving: nothing dies out on the way through
            torch.nn.init.kaiming_normal_(tensor)
        elif name.endswith("fc.bias"):
            torch.nn.init.normal_(tensor, std=10)
    path = tmp_path_factory.mktemp("inception") / inception.WEIGHTS_FILE
    torch.save(state, path)
    return path


@pytest.fixture
def trusted(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The random file, with its hash in the place of the published one's."""
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    return weights


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 40, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_the_expected_file_is_torch_fidelitys() -> None:
    assert published.URL_INCEPTION_V3 == inception.WEIGHTS_URL
    assert inception.WEIGHTS_URL.endswith(inception.WEIGHTS_FILE)
    stated = inception.WEIGHTS_FILE.removesuffix(".pth").rpartition("-")[2]  # torch.hub: the hash's first digits
    assert len(stated) == 8 and inception.WEIGHTS_SHA256.startswith(stated) and len(inception.WEIGHTS_SHA256) == 64


def test_features_and_logits_are_those_of_torch_fidelity(trusted: Path, images: Tensor) -> None:
    network = load_inception(trusted)
    features, logits, _ = network(images)
    assert features.shape == (2, NUM_FEATURES) and logits.shape == (2, NUM_LOGITS)
    assert (network.num_features, network.num_logits) == (NUM_FEATURES, NUM_LOGITS)
    theirs = published.FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(trusted))
    torch.testing.assert_close(features, theirs(images)[0])
    assert (features[0] - features[1]).norm() > 1e-3 * features.norm()
    # Without the bias, as the score takes them; with it they would be off by 10.
    torch.testing.assert_close(logits, features @ theirs.fc.weight.T, rtol=1e-4, atol=1e-4)


def test_spatial_features_are_mixed_6_conv_as_tensorflow_lays_them_out(trusted: Path, images: Tensor) -> None:
    network = load_inception(trusted)
    found = network(images).spatial
    assert found.shape == (2, NUM_SPATIAL) == (2, 2023) and network.num_spatial == NUM_SPATIAL
    theirs = published.FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(trusted))
    # TensorFlow's blocks are mixed, mixed_1, ... mixed_10; its first branch of one is `conv`, a single convolution.
    blocks = [name for name, _ in theirs.named_children() if name.startswith("Mixed_")]
    assert len(blocks) == 11 and SPATIAL_MODULE == f"{blocks[6]}.branch1x1"
    # The branches are joined in order, so the next block starts with this one: ReLU's output.
    seen: list[Tensor] = []
    theirs.get_submodule(blocks[7]).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    theirs(images)
    (joined,) = seen
    assert joined.shape == (2, 768, 17, 17) and SPATIAL_CHANNELS == 7
    expected = [
        [float(image[channel, row, column]) for row in range(17) for column in range(17) for channel in range(7)]
        for image in joined
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert float(found.min()) == 0 and float(found.max()) > 0.1
    assert not network._network.get_submodule(SPATIAL_MODULE)._forward_hooks  # nothing is left behind


def test_nothing_lowers_the_precision(trusted: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_inception(trusted)
    exact, seen = network(images[:1]).features, []

    def look(*_: object) -> None:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic))

    network._network.Conv2d_1a_3x3.register_forward_hook(look)
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(network(images[:1]).features, exact)
    assert seen == [(False, True)]
    assert torch.backends.cudnn.allow_tf32 == before
    assert not exact.requires_grad


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()]
)
def test_only_bytes_of_three_channels_are_taken(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]"):
        inception.Inception(torch.nn.Identity(), "")(wrong)


def test_the_usual_place_is_torch_hubs(trusted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / inception.WEIGHTS_FILE
    place.parent.mkdir(parents=True)
    place.symlink_to(trusted)
    assert load_inception().sha256 == inception.WEIGHTS_SHA256


def test_absent_weights_are_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / inception.WEIGHTS_FILE
    with pytest.raises(UserError) as error:
        load_inception()
    for word in (inception.WEIGHTS_FILE, inception.WEIGHTS_SHA256, inception.WEIGHTS_URL, str(place), "inception=FILE"):
        assert word in str(error.value)
    with pytest.raises(UserError, match="/nonexistent/w.pth"):
        load_inception(Path("/nonexistent/w.pth"))


def test_other_weights_are_refused_before_anything_is_unpickled(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("unpickled a file that is not the published one")

    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(UserError, match=f"SHA-256 {inception.WEIGHTS_SHA256}.* found SHA-256 [0-9a-f]{{64}}"):
        load_inception(weights)
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(UserError, match=hashlib.sha256(b"").hexdigest()):
        load_inception(tmp_path / "empty.pth")
