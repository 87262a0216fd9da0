"""The judging classifier: its features and classes measure generated images, and training never sees it.

It is trained once on the real training split, kept in a cache folder with its accuracy on the test split, and used
again while data and settings are the same. Trained from nothing again on the same kind of machine, it gets the same
weights.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from driftfield.training.atomic_file import parse_json, to_json, write_json
from driftfield.training.pretrained import WEIGHTS_FILE
from driftfield.training.schedule import warmup_constant
from driftfield.training.seeding import derive_seed, generator
from vision.data import ImageSet, to_float
from vision.pretrained import Pretrained

RECORD_FILE = "judge.json"
RECIPE = 1  # to be raised when this file's architecture or training changes, so that no older cache is used
WARMUP_FRACTION = 0.2  # of the training; the learning rate falls over the rest
EVALUATION_BATCH = 500  # images at once


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How a judge is built and trained.

    Args:
        widths: channels of the stages, each of which halves the image.
        stem_stride: step of the first convolution; 2 quarters the work that follows.
        num_features: length of the feature vector.
        epochs: passes over the training split.
        batch_size: images per step.
        learning_rate: the highest, after a fifth of the training.
        weight_decay: AdamW's.
        label_smoothing: keeps logits, and with them features, from growing without end.
        max_shift: of the augmentation, as a share of the image's width.
        max_rotation_deg: of the augmentation.
        max_zoom: of the augmentation, as a share of the image's size.
        mirror: whether the augmentation mirrors half of the images, left to right.
        seed: of initial weights, order and augmentation.
    """

    widths: tuple[int, ...]
    stem_stride: int
    num_features: int = 64
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    max_shift: float
    max_rotation_deg: float
    max_zoom: float
    mirror: bool
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in [("epochs", self.epochs), ("batch_size", self.batch_size), ("widths", len(self.widths))]:
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


SETTINGS: Mapping[str, JudgeSettings] = {
    "digits": JudgeSettings(
        widths=(32, 64), stem_stride=1, epochs=10, batch_size=64, learning_rate=2e-3,
        max_shift=0.08, max_rotation_deg=12, max_zoom=0.1, mirror=False,
    ),
    "fashion_mnist": JudgeSettings(
        widths=(32, 64, 128), stem_stride=2, epochs=20, batch_size=128, learning_rate=4e-3,
        max_shift=0.03, max_rotation_deg=0, max_zoom=0, mirror=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JudgeRecord:
    """What is stored beside a judge's weights.

    Args:
        identity: data, settings and recipe that it was trained from; a cached judge is used while they are equal.
        test_accuracy: share of the test split that it classifies rightly.
        num_test: images `test_accuracy` was measured on.
        device: type of device it was trained on.
        torch_version: release of torch it was trained with.
        weights_sha256: of the weights' file.
    """

    identity: dict[str, Any]
    test_accuracy: float
    num_test: int
    device: str
    torch_version: str
    weights_sha256: str


class JudgeNetwork(Pretrained):
    """Convolutional classifier: stages of two 3 x 3 convolutions and a halving, a feature vector, a linear head.

    Args:
        image_shape: (C, H, W) of one image.
        num_classes: length of the logits.
        widths: channels of the stages.
        stem_stride: step of the first convolution.
        num_features: length of the feature vector.

    Raises:
        ValueError: if the image is too small to be halved as often as there are stages.

    >>> network = JudgeNetwork(image_shape=(1, 8, 8), num_classes=10, widths=(4, 8), stem_stride=1, num_features=16)
    >>> [tuple(output.shape) for output in network(torch.zeros(5, 1, 8, 8))]
    [(5, 16), (5, 10)]
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        widths: tuple[int, ...],
        stem_stride: int,
        num_features: int,
    ) -> None:
        super().__init__()
        self.config = {
            "image_shape": list(image_shape),
            "num_classes": num_classes,
            "widths": list(widths),
            "stem_stride": stem_stride,
            "num_features": num_features,
        }
        channels, *sides = image_shape
        height, width = (math.ceil(side / stem_stride) // 2 ** len(widths) for side in sides)
        if min(height, width) == 0:
            smallest = stem_stride * (2 ** len(widths) - 1) + 1
            raise ValueError(f"image_shape must be at least {smallest} x {smallest}, found {sides[0]} x {sides[1]}")
        inputs, strides = (channels, *widths[:-1]), (stem_stride, *[1] * (len(widths) - 1))
        self.stages = nn.Sequential(*map(_stage, inputs, widths, strides))
        size = widths[-1] * height * width
        self.features = nn.Sequential(
            nn.Flatten(), nn.Linear(size, num_features, bias=False), nn.BatchNorm1d(num_features), nn.ReLU()
        )
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[B, F]` and logits `[B, classes]` of images `[B, C, H, W]` in [-1, 1]."""
        features = self.features(self.stages(images))  # [B, F]
        return features, self.head(features)  # [B, classes]


@dataclass(frozen=True)
class Judge:
    """A trained classifier and where it comes from.

    Args:
        network: in eval mode, on the device to compute on.
        record: what is stored beside its weights.
    """

    network: JudgeNetwork
    record: JudgeRecord

    @property
    def name(self) -> str:
        """Name of its feature space, which its very weights decide."""
        return f"{self.record.identity['dataset']} judge {self.record.weights_sha256[:8]}"

    @property
    def test_accuracy(self) -> float:
        """Share of the test split that it classifies rightly."""
        return self.record.test_accuracy

    def features(self, images: Tensor) -> Tensor:
        """Feature vectors, what the last linear layer sees.

        Args:
            images: floating point `[B, C, H, W]` in [-1, 1], on any device.

        Raises:
            ValueError: if the images have another shape or dtype than those it was trained on.

        Returns:
            float32 `[B, F]`, on the judge's device, without gradient.
        """
        return _outputs(self.network, images)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Unnormalised log-probabilities `[B, classes]`; arguments and errors as of `features`."""
        return _outputs(self.network, images)[1]


def load_or_train(
    train: ImageSet,
    test: ImageSet,
    folder: str | Path,
    *,
    settings: JudgeSettings | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Judge:
    """Take the judge of these data and settings from the cache, or train it and put it there.

    Args:
        train: the training split.
        test: the test split, only measured on.
        folder: the cache; each judge has a folder of its own in it, named after what it was trained from.
        settings: `SETTINGS[train.name]` when None.
        device: where to train and to compute.
        progress: called after each training step with images seen and images in all.

    Raises:
        ValueError: if the splits do not belong together, or a data set without settings of its own comes without any.
        OSError: if the cache cannot be written.

    Returns:
        The judge.
    """
    settings = _settings_for(train) if settings is None else settings
    _check_splits(train, test)
    identity = _identity(train, test, settings)
    place = Path(folder) / f"judge-{train.name}-{_sha256(json.dumps(identity, sort_keys=True).encode())[:12]}"
    judge = _load(place, identity)
    if judge is None:
        judge = _store(place, train_judge(train, settings, device=device, progress=progress), identity, test)
    judge.network.to(device)
    return judge


def train_judge(
    train: ImageSet,
    settings: JudgeSettings,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> JudgeNetwork:
    """Train a judge from nothing; the same arguments on the same kind of machine give the same weights.

    Args:
        train: the training split.
        settings: how.
        device: where.
        progress: called after each step with images seen and images in all.

    Returns:
        The network, in eval mode.
    """
    network = _new_network(train, settings).to(device)
    images, labels = to_float(train.images).to(device), train.labels.to(device)
    batch_size = min(settings.batch_size, len(train))
    total = settings.epochs * (len(train) // batch_size) * batch_size
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=settings.weight_decay)
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
        for step, batch in enumerate(_batches(len(train), batch_size, settings)):
            batch = batch.to(device)
            pictures = _augment(images[batch], settings, generator(settings.seed, "judge augmentation", step))
            loss = functional.cross_entropy(
                network(pictures)[1], labels[batch], label_smoothing=settings.label_smoothing
            )
            optimizer.param_groups[0]["lr"] = _learning_rate(step * batch_size, total, settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress is not None:
                progress((step + 1) * batch_size, total)
    return network.eval()


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs, stride), _convolution(outputs, outputs, 1), nn.MaxPool2d(2))


def _new_network(train: ImageSet, settings: JudgeSettings) -> JudgeNetwork:
    """A network with initial weights decided by the seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "judge weights"))
        return JudgeNetwork(
            image_shape=train.sample_shape,
            num_classes=train.num_classes,
            widths=settings.widths,
            stem_stride=settings.stem_stride,
            num_features=settings.num_features,
        )


def _learning_rate(images_seen: int, total: int, settings: JudgeSettings) -> float:
    """Up and down in two straight lines."""
    return warmup_constant(
        images_seen,
        peak=settings.learning_rate,
        warmup_samples=int(WARMUP_FRACTION * total),
        total_samples=total,
        cooldown_fraction=1 - WARMUP_FRACTION,
    )


def _batches(num_train: int, batch_size: int, settings: JudgeSettings) -> Iterator[Tensor]:
    """Positions `[batch_size]` of each step's images: a new order every epoch, whose last few images are left out."""
    for epoch in range(settings.epochs):
        order = torch.randperm(num_train, generator=generator(settings.seed, "judge order", epoch))
        yield from order[: num_train - num_train % batch_size].split(batch_size)


def _augment(images: Tensor, settings: JudgeSettings, randomness: torch.Generator) -> Tensor:
    """Turn, zoom, mirror and shift each image a little, each by its own amounts; what comes in repeats the border."""
    turn, zoom, shift_x, shift_y = torch.rand(4, len(images), generator=randomness) * 2 - 1  # each [B] in [-1, 1]
    angle = turn * math.radians(settings.max_rotation_deg)
    size = 1 + zoom * settings.max_zoom
    mirrored = (torch.rand(len(images), generator=randomness) < 0.5) & settings.mirror
    sign = torch.where(mirrored, -1.0, 1.0)
    shift = 2 * settings.max_shift  # the grid's coordinates run from -1 to 1
    rows = [
        torch.stack([size * angle.cos() * sign, -size * angle.sin(), shift_x * shift], dim=1),
        torch.stack([size * angle.sin() * sign, size * angle.cos(), shift_y * shift], dim=1),
    ]
    transform = torch.stack(rows, dim=1).to(images.device)  # [B, 2, 3]
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _settings_for(train: ImageSet) -> JudgeSettings:
    if train.name not in SETTINGS:
        raise ValueError(f"settings must be given for data sets other than {', '.join(SETTINGS)}, found {train.name!r}")
    return SETTINGS[train.name]


def _check_splits(train: ImageSet, test: ImageSet) -> None:
    for what, first, second in [
        ("name", train.name, test.name),
        ("image shape", train.sample_shape, test.sample_shape),
        ("classes", train.class_names, test.class_names),
    ]:
        if first != second:
            raise ValueError(f"{what} of train and test must be the same, found {first} and {second}")


def _identity(train: ImageSet, test: ImageSet, settings: JudgeSettings) -> dict[str, Any]:
    """Everything that decides a judge, in JSON's own types."""
    return {
        "dataset": train.name,
        "train_fingerprint": train.fingerprint,
        "test_fingerprint": test.fingerprint,
        "recipe": RECIPE,
        "settings": parse_json(to_json(asdict(settings))),
    }


def _store(place: Path, network: JudgeNetwork, identity: dict[str, Any], test: ImageSet) -> Judge:
    """Write the weights first and the record last: a judge whose record does not fit is trained again."""
    network.save_pretrained(place)
    predicted = _outputs(network, to_float(test.images))[1].argmax(1).cpu()
    record = JudgeRecord(
        identity=identity,
        test_accuracy=float((predicted == test.labels).double().mean()),
        num_test=len(test),
        device=network.head.weight.device.type,
        torch_version=str(torch.__version__),
        weights_sha256=_sha256((place / WEIGHTS_FILE).read_bytes()),
    )
    write_json(place / RECORD_FILE, asdict(record))
    return Judge(network, record)


def _load(place: Path, identity: dict[str, Any]) -> Judge | None:
    """The judge kept in a folder; None if there is none, and None with a warning if it is damaged."""
    if not (place / RECORD_FILE).exists():
        return None
    try:
        record = JudgeRecord(**parse_json((place / RECORD_FILE).read_text(encoding="utf-8")))
        if record.identity != identity:
            raise ValueError(f"{RECORD_FILE} is of other data or settings")
        if _sha256((place / WEIGHTS_FILE).read_bytes()) != record.weights_sha256:
            raise ValueError(f"{WEIGHTS_FILE} is not the file that {RECORD_FILE} describes")
        return Judge(JudgeNetwork.from_pretrained(place), record)
    except (ValueError, TypeError, OSError) as error:
        warnings.warn(f"{place}: expected a whole judge, found: {error}; training it again", stacklevel=3)
        return None


@torch.no_grad()
def _outputs(network: JudgeNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[B, F]` and logits `[B, classes]`, in batches, on the network's device."""
    expected = network.config["image_shape"]
    if not images.is_floating_point() or list(images.shape[1:]) != expected:
        shape = ", ".join(map(str, expected))
        raise ValueError(f"images must be floating point [B, {shape}], found {images.dtype} {list(images.shape)}")
    device = network.head.weight.device
    features, logits = zip(
        *(network(batch.to(device, torch.float32)) for batch in images.split(EVALUATION_BATCH)), strict=True
    )
    return torch.cat(features), torch.cat(logits)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
