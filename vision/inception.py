"""The Inception network of published Frechet distances: torch-fidelity's, with exactly the published weights.

TensorFlow's 2015-12-05 graph in PyTorch: its padding, its average pools and its resizing without antialiasing, from
bytes to 2048 features and 1008 logits. Other Inception weights, torchvision's among them, give other distances, so
there is no substitute for the file.

The spatial features of sFID (Nash et al. 2021) are, as ADM's evaluator takes them, the first 7 channels of the graph's
`mixed_6/conv`, flattened as TensorFlow lays them out: row, column, channel. That operation is the last of its layer,
after convolution and batch norm, so a ReLU's output; and torch-fidelity's conversion of the weights puts `mixed_6/conv`
into `Mixed_6d.branch1x1`, whose output it therefore is. This follows from the graph's and the conversion's names; it is
not compared with numbers of TensorFlow.
"""

import hashlib
import io
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from driftfield.training import UserError

WEIGHTS_FILE: Final = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL: Final = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # its first 8 digits are the name's
NUM_FEATURES: Final = 2048
NUM_LOGITS: Final = 1008
SPATIAL_MODULE: Final = "Mixed_6d.branch1x1"  # Mixed_5b, 5c, ... 7c are TensorFlow's mixed, mixed_1, ... mixed_10
SPATIAL_CHANNELS: Final = 7
NUM_SPATIAL: Final = 17 * 17 * SPATIAL_CHANNELS  # 2023


class InceptionOutput(NamedTuple):
    """What the metrics of a batch are computed from."""

    features: Tensor  # [B, 2048], the pooled last layer
    logits: Tensor  # [B, 1008], without the bias, as the Inception Score takes them
    spatial: Tensor  # [B, 2023], rows x columns x channels of the layer of sFID


class Inception:
    """The network on a device, in float32 throughout: no autocast, no TensorFloat-32.

    Args:
        network: torch-fidelity's, giving features "2048" and "logits_unbiased".
        sha256: of the file of its weights.
    """

    num_features: int = NUM_FEATURES
    num_logits: int = NUM_LOGITS
    num_spatial: int = NUM_SPATIAL

    def __init__(self, network: nn.Module, sha256: str) -> None:
        self._network, self.sha256 = network, sha256

    @torch.no_grad()
    def __call__(self, images: Tensor) -> InceptionOutput:
        """Features, logits and spatial features of uint8 images `[B, 3, H, W]`.

        Raises:
            ValueError: the images are of another kind or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [B, 3, H, W], found {images.dtype} {list(images.shape)}")
        exact_convolutions = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        layer: list[Tensor] = []  # [B, 192, 17, 17]
        hook = self._network.get_submodule(SPATIAL_MODULE).register_forward_hook(lambda *call: layer.append(call[-1]))
        with hook, exact_convolutions, torch.autocast(images.device.type, enabled=False):
            features, logits = self._network(images)
        return InceptionOutput(features, logits, layer[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1))


def load_inception(path: Path | None = None, *, device: torch.device | str = "cpu") -> Inception:
    """Load the published weights, and nothing else, into torch-fidelity's network.

    Args:
        path: file of the weights; None looks where torch-fidelity keeps them, in torch.hub's folder of checkpoints.
        device: where to compute.

    Raises:
        UserError: there is no such file, or it is another one; the message says which is expected, and where.
    """
    content = _verified(path or usual_place())
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # takes seconds to import

    # It unpickles what it is given, so it gets the very bytes whose hash was compared, not a path to read again.
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(content)
    )
    return Inception(network.to(device), WEIGHTS_SHA256)


def usual_place() -> Path:
    """Where torch-fidelity keeps the file: torch.hub's folder, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE


def _verified(path: Path) -> bytes:
    """The file's bytes, if they are the published weights."""
    wanted = f"expected torch-fidelity's {WEIGHTS_FILE} (SHA-256 {WEIGHTS_SHA256}, from {WEIGHTS_URL})"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"inception: {wanted} at {path}, found: {error.strerror}; put it there, or name its place by "
            "inception=FILE. No other network gives comparable figures, so none is taken instead"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != WEIGHTS_SHA256:
        raise UserError(f"inception: {wanted}, found SHA-256 {found} of {len(content)} bytes in {path}")
    return content
