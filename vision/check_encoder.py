"""What a drift would see in the features of an encoder, before any training: `python -m vision.check_encoder`.

A weak encoder makes training collapse, and this takes seconds where training takes days. For each feature of real
images: how often the nearest other image is of the same class; how much distances vary beside their mean, for a kernel
cannot tell near from far where all distances are alike; and how many neighbours the kernel counts at each
temperature. Raw pixels ("global") stand beside the encoder's features; `encoders=[none]` checks them alone.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from driftfield.drift import SCALE_FLOOR
from driftfield.kernel import centre, distances
from driftfield.training import UserError, generator, option, run_program, to_plain
from driftfield.training.atomic_file import write_json
from driftfield.training.device import Device, choose_device
from vision.config import CONFIG_DIR, DataConfig
from vision.data import RealSamples
from vision.encoders import FrozenEncoder, fingerprint, load_encoder
from vision.features import Encoder, image_features, require_families
from vision.mae import ResNetMAE
from vision.real import load_real, load_tokenizer
from vision.tokenizer import Tokenizer

SEES_CLASSES: Final = "sees classes"  # the verdict on a feature that a drift can follow
RAW: Final = "global"  # the feature of `image_features` that is the sample itself
NO_ENCODER: Final = "none"
CHANCE_ERRORS: Final = 3.0  # standard errors above chance from which an agreement is no accident
RAW_ERRORS: Final = 2.0  # standard errors above raw samples from which an encoder is better
BLIND_SHARE: Final = 0.5  # of the other images: a kernel that counts more of them tells near from far no longer


@dataclass(kw_only=True)
class CheckConfig:
    """Keys of `python -m vision.check_encoder`."""

    encoders: tuple[str, ...] = option("mae:FOLDER, convnextv2, resnet50:FILE ...; none: raw samples alone")
    families: str = option("families of features (A.5), letters of abcd")
    tokenizer: str | None = option("autoencoder of data.name=latents, folder or hub id; null: data are pixels")
    data: DataConfig
    num: int = option("real samples to look at", min=4)
    max_classes: int = option("classes they are drawn from, as many samples of each", min=2)
    max_locations: int = option("locations of each map to look at", min=1)
    temperatures: tuple[float, ...] = option("τ, multiples of the mean distance", above=0)
    batch_size: int = option("samples encoded at once", min=1)
    out: Path = option("JSON file to write")
    seed: int = option("seed of the choice of samples and locations", min=0)
    device: Device = option("where to compute")


class FeatureCheck(NamedTuple):
    """What `check_feature` finds; every location is a set of samples of its own, as it is for the loss."""

    channels: int
    agreement: float  # share of samples whose nearest other sample is of their class
    mean_distance: float  # over all pairs, before any normalisation
    concentration: float  # standard deviation of all distances / their mean
    nearest: float  # mean distance to the nearest other sample / mean distance
    neighbours: dict[float, float]  # τ: exp(entropy) of the kernel over the other samples, mean over samples
    verdict: str = ""


def check_feature(feature: Tensor, labels: Tensor, temperatures: Sequence[float]) -> FeatureCheck:
    """Statistics of the distances among samples in one feature.

    As in the loss, samples are compared at one location at a time, all locations share one scale, the mean distance,
    and τ multiplies it (A.6). Nearest neighbours at equal distance count in equal parts.

    Args:
        feature: [N, L, C].
        labels: class of each sample, [N].
        temperatures: τ.

    Raises:
        ValueError: a value is not finite.

    >>> points, labels = torch.tensor([0.0, 1.0, 10.0, 11.0]), torch.tensor([0, 0, 1, 1])
    >>> found = check_feature(points[:, None, None], labels, [0.05])
    >>> found.agreement, round(found.mean_distance, 3), round(found.neighbours[0.05], 3)
    (1.0, 7.0, 1.0)
    """
    if not feature.isfinite().all():
        raise ValueError("expected finite values, found NaN or infinity")
    num = len(feature)
    itself = torch.eye(num, dtype=torch.bool, device=feature.device)
    distance = torch.stack([_distances(points) for points in feature.float().unbind(1)])  # [L, N, N]
    pairs = distance[:, ~itself].double()  # [L, N(N-1)]
    mean = pairs.mean()
    scale = mean.clamp(min=torch.finfo(torch.float32).tiny).float()
    others = distance.masked_fill(itself, torch.inf)
    nearest = others.amin(-1, keepdim=True)
    tied = others == nearest
    same = labels[:, None] == labels
    neighbours = {
        temperature: torch.special.entr((-others / (temperature * scale)).softmax(-1)).sum(-1).exp().mean().item()
        for temperature in temperatures
    }
    return FeatureCheck(
        channels=feature.shape[-1],
        agreement=((tied & same).sum(-1) / tied.sum(-1)).double().mean().item(),
        mean_distance=mean.item(),
        concentration=(pairs.std(correction=0) / scale).item(),
        nearest=(nearest.double().mean() / scale).item(),
        neighbours=neighbours,
    )


def chance_of_agreement(labels: Tensor) -> float:
    """Probability that another sample, drawn blindly, is of a sample's class.

    >>> chance_of_agreement(torch.tensor([0, 0, 1, 1]))
    0.3333333333333333
    """
    counts = labels.unique(return_counts=True)[1].double()
    return ((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1))).item()


def verdict(check: FeatureCheck, *, num: int, chance: float) -> str:
    """One feature's statistics in words: "sees classes", or the first reason why a drift in it leads nowhere.

    Args:
        check: the statistics.
        num: samples.
        chance: agreement by chance.

    >>> verdict(FeatureCheck(8, 0.1, 1.0, 0.2, 0.5, {0.05: 3.0, 0.2: 30.0}), num=100, chance=0.1)
    'neighbours are of any class'
    """
    if check.mean_distance <= SCALE_FLOOR:  # below it the loss no longer enlarges a feature
        return "the same for every image"
    if check.agreement <= chance + CHANCE_ERRORS * (chance * (1 - chance) / num) ** 0.5:
        return "neighbours are of any class"
    if check.neighbours[min(check.neighbours)] > BLIND_SHARE * (num - 1):
        return "blind: all distances alike, even the smallest τ counts most images"
    return SEES_CLASSES


def summary(checks: Mapping[str, FeatureCheck], *, num: int, chance: float) -> str:
    """The verdict on an encoder: how many of its features see classes, and whether the best beats raw samples.

    Args:
        checks: by feature; "global" is the raw samples.
        num: samples.
        chance: agreement by chance.

    >>> raw = FeatureCheck(8, 0.1, 1.0, 0.2, 0.5, {0.2: 9.0}, "sees classes")
    >>> summary({"global": raw}, num=100, chance=0.02)
    'raw samples alone: sees classes; the nearest is of the same class for 10.0 % (chance 2.0 %)'
    """
    raw = checks[RAW]
    features = {name: check for name, check in checks.items() if name != RAW}
    if not features:
        return (
            f"raw samples alone: {raw.verdict}; the nearest is of the same class for {_percent(raw.agreement)} "
            f"(chance {_percent(chance)})"
        )
    seeing = {name: check for name, check in features.items() if check.verdict == SEES_CLASSES}
    if not seeing:
        return f"none of the encoder's {len(features)} features sees classes: a drift in them leads nowhere"
    best = max(seeing, key=lambda name: seeing[name].agreement)
    error = (raw.agreement * (1 - raw.agreement) / num) ** 0.5
    better = seeing[best].agreement > raw.agreement + RAW_ERRORS * error
    return (
        f"{len(seeing)} of the encoder's {len(features)} features see classes; in the best, {best}, the nearest is of "
        f"the same class for {_percent(seeing[best].agreement)} (chance {_percent(chance)}), in raw samples for "
        f"{_percent(raw.agreement)}: by this measure the encoder {'is better than' if better else 'adds nothing to'} "
        "raw samples"
    )


def table(checks: Mapping[str, FeatureCheck], *, chance: float) -> str:
    """The statistics as a Markdown table.

    Args:
        checks: by feature.
        chance: agreement by chance.
    """
    temperatures = list(next(iter(checks.values())).neighbours)
    heads = ["feature", "channels", f"same class (chance {chance:.3f})", "std / mean", "nearest / mean"]
    rows = [heads + [f"neighbours at τ = {temperature:g}" for temperature in temperatures] + ["verdict"]]
    for name, check in checks.items():
        counts = [f"{count:.1f}" for count in check.neighbours.values()]
        shares = [f"{share:.3f}" for share in (check.agreement, check.concentration, check.nearest)]
        rows.append([name, str(check.channels), *shares, *counts, check.verdict])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def choose_samples(labels: Tensor, *, num: int, max_classes: int, draws: torch.Generator) -> Tensor:
    """Positions of about `num` samples: as many of each of at most `max_classes` classes.

    Args:
        labels: [n].
        num: samples wanted; fewer where classes have fewer.
        max_classes: few enough that the samples of a class have neighbours of it.
        draws: source of the choice.

    Raises:
        ValueError: less than two classes, or two samples of each.

    Returns:
        Ascending positions.

    >>> choose_samples(torch.tensor([0, 1, 0, 1]), num=4, max_classes=2, draws=torch.Generator()).tolist()
    [0, 1, 2, 3]
    """
    classes = labels.unique()
    classes = classes[torch.randperm(len(classes), generator=draws)[:max_classes]]
    per_class = num // max(len(classes), 1)
    if len(classes) < 2 or per_class < 2:
        raise ValueError(
            f"num: expected at least two samples of each of at least two classes, found {num} samples of "
            f"{len(classes)} classes; max_classes limits the classes"
        )
    chosen = []
    for label in classes:
        ids = torch.nonzero(labels == label)[:, 0]
        chosen.append(ids[torch.randperm(len(ids), generator=draws)[:per_class]])
    return torch.cat(chosen).sort().values


@torch.no_grad()
def compute_features(
    real: RealSamples, ids: Tensor, encoder: Encoder | None, config: CheckConfig, device: torch.device
) -> dict[str, Tensor]:
    """Features [N, L, C] of the samples at some positions, at most `max_locations` random locations of each, float32.

    Args:
        real: the samples.
        ids: positions, [N].
        encoder: on the device; None for raw samples alone.
        config: families, max_locations, batch_size, seed.
        device: where to compute.
    """
    parts: dict[str, list[Tensor]] = {}
    for batch in ids.split(config.batch_size):
        samples = real.read(batch, seed=config.seed).to(device)
        for name, feature in image_features(samples, encoder, families=config.families).items():
            locations = torch.randperm(feature.shape[1], generator=generator(config.seed, "locations", name))
            kept = locations[: config.max_locations].sort().values.to(device)
            parts.setdefault(name, []).append(feature[:, kept].float())
    return {name: torch.cat(of_name) for name, of_name in parts.items()}


def main(config: CheckConfig) -> int:
    """Check, print and write."""
    try:
        require_families(config.families)
        tokenizer = load_tokenizer(config.tokenizer, torch.device("cpu"))
        encoder = _load(config.encoders, tokenizer)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    device = choose_device(config.device)
    if encoder is not None:
        encoder = encoder.to(device)
    real = load_real(config.data, tokenizer)
    try:
        draws = generator(config.seed, "samples")
        ids = choose_samples(real.labels, num=config.num, max_classes=config.max_classes, draws=draws)
        features = compute_features(real, ids, encoder, config, device)
    except ValueError as error:
        raise UserError(str(error)) from error
    labels = real.labels[ids].to(device)
    chance = chance_of_agreement(labels)
    checks = {}
    for name, feature in features.items():
        try:
            check = check_feature(feature, labels, config.temperatures)
        except ValueError as error:
            raise UserError(f"feature {name}: {error}") from error
        checks[name] = check._replace(verdict=verdict(check, num=len(ids), chance=chance))
    text = summary(checks, num=len(ids), chance=chance)
    print(f"{len(ids)} samples of {len(labels.unique())} classes of {config.data.name}\n{table(checks, chance=chance)}")
    print(f"verdict: {text}")
    _write(config, encoder, checks, {"num": len(ids), "chance": chance, "verdict": text})
    return 0


def _load(specs: Sequence[str], tokenizer: Tokenizer | None) -> FrozenEncoder | ResNetMAE | None:
    specs = [spec for spec in specs if spec != NO_ENCODER]
    return load_encoder(specs, tokenizer=tokenizer) if specs else None


def _write(
    config: CheckConfig,
    encoder: FrozenEncoder | ResNetMAE | None,
    checks: Mapping[str, FeatureCheck],
    result: Mapping[str, Any],
) -> None:
    report = {
        "config": to_plain(config),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm")},  # timm's maps have changed
        "weights_sha256": None if encoder is None else fingerprint(encoder),
        **result,
        "features": {name: to_plain(check._asdict()) for name, check in checks.items()},
    }
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.out, report)
    except OSError as error:
        raise UserError(f"out: expected a place that can be written, found {config.out}: {error.strerror}") from error
    print(f"written: {config.out}")


def _distances(points: Tensor) -> Tensor:
    """Distances [N, N] among points [N, C], as the loss computes them."""
    centred = centre(points)
    return distances(centred.points, centred.points, centred.unit)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, CheckConfig, config_dir=CONFIG_DIR, config_name="check_encoder", description=__doc__ or "")
    )
