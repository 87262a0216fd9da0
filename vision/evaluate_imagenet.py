"""Judge generators at ImageNet's scale: `python -m vision.evaluate_imagenet models=[FOLDER] reference=FILE.npz`.

FID, Inception Score, sFID where the reference has its statistics (ADM's has) and, where real images are given,
precision, recall and KID, in Inception's features. Several models (decays of the EMA) and guidance scales are a search,
and its result is reported as one. Samples are streamed, not held, and divided among the processes of torchrun; a sample
depends on (seed, index, class, α) alone. Every finished row is in `evaluation.json`; stopped, the same command goes on
with the next.
"""

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from driftfield.training import ConfigError, Progress, RunFolder, UserError, option, read_config, run_program
from driftfield.training.atomic_file import parse_json, write_json
from driftfield.training.device import Device, choose_device
from driftfield.training.distributed import any_process, barrier, is_main, process_group, require_equal
from driftfield.training.pretrained import CONFIG_FILE
from vision.config import CONFIG_DIR
from vision.encoders import fingerprint
from vision.evaluate import SNAPSHOTS
from vision.fid import (
    FULL_COUNT,
    PROTOCOLS,
    SCORE_SPLITS,
    SPATIAL_STATISTICS,
    ProtocolName,
    RealImages,
    Reference,
    describe_labels,
    fid_name,
    open_real_images,
    open_reference,
)
from vision.generator import ImageGenerator
from vision.inception import load_inception
from vision.measure import Figures, Measurement, process_share
from vision.real import load_tokenizer
from vision.tokenizer import Tokenizer

RESULTS: Final = "evaluation.json"
PIXELS: Final = "floor(255 clip((x + 1) / 2, 0, 1))"  # how an image in [-1, 1] becomes bytes, in both protocols
REFERENCE_IMAGES: Final = 10_000  # of precision and recall
TIMEOUT_S: Final = 3600.0  # the processes wait for one to join the parts of an npz
# Of the release's ablation run: step, the best of its guidance scales, FID-50k there (its README).
RELEASE_ABLATION: Final = (
    (5_000, 3.5, 35.20),
    (10_000, 2.5, 13.33),
    (15_000, 2.0, 10.70),
    (20_000, 2.0, 9.47),
    (25_000, 2.0, 8.84),
    (30_000, 2.0, 8.34),
)
RELEASE_ABLATION_BATCH: Final = 4096  # generated images per step


@dataclass(kw_only=True)
class EvaluateImageNetConfig:
    """Keys of `python -m vision.evaluate_imagenet`."""

    run_dir: Path = option("folder of the results; an evaluation found there is gone on with")
    models: tuple[str, ...] = option(
        "folders or hub ids of generators, such as the EMA decays of one run, or a folder of such folders; searched"
    )
    ema_decays: tuple[float, ...] = option(
        "EMA decay of each model, for the record; empty: read from the folder's name or its run", min=0, below=1
    )
    guidance_scales: tuple[float, ...] = option("values of α; searched", min=1)
    tokenizer: str | None = option("folder or hub id of the autoencoder that decodes latents; null: pixels")
    protocol: ProtocolName = option("what is compared with: the release's (MeanFlow's) statistics, or ADM's")
    reference: Path = option(
        "npz file of the protocol's statistics; with mu_s and sigma_s, as ADM's has them, also of sFID"
    )
    reference_sha256: str | None = option("what its SHA-256 must be; null: any, it is recorded")
    reference_images: Path | None = option("npz with real images, arr_0, for precision, recall, KID; null: reference")
    inception: Path | None = option("file of Inception's weights; null: torch-fidelity's usual place")
    num: int = option("samples for each model and α; 50000 in every published figure", min=SCORE_SPLITS)
    seed: int = option("seed of noise, style and random labels", min=0)
    batch_size: int = option("images at once in each process", min=1)
    bfloat16: bool = option("generator and tokenizer in bfloat16; Inception stays in float32")
    save_samples: bool = option("write the samples of each row as an npz that ADM's evaluator reads")
    device: Device = option("where to compute")

    def __post_init__(self) -> None:
        if not self.models or not self.guidance_scales:
            raise ValueError("models and guidance_scales: expected at least one each")
        if self.ema_decays and len(self.ema_decays) != len(self.models):
            raise ValueError(
                f"ema_decays: expected one for each of {len(self.models)} models, found {len(self.ema_decays)}"
            )


class IntermediateFid(NamedTuple):
    """A Frechet distance in the middle of a training, at the best α tried, of so many samples."""

    fid: float
    guidance_scale: float
    num: int

    @property
    def cells(self) -> str:
        """α and distance as two cells of a table; another number of samples than the release's is said."""
        samples = "" if self.num == FULL_COUNT else f" ({fid_name(self.num)})"
        return f"{self.guidance_scale:g} | {self.fid:.2f}{samples}"


def release_ablation_table(ours: Mapping[int, IntermediateFid]) -> str:
    """The release's ablation run beside ours as a Markdown table, by generated images trained on.

    Args:
        ours: by generated images.

    >>> print(release_ablation_table({20_480_000: IntermediateFid(34.5, 3.0, 5000)}).splitlines()[2])
    | 20.48 M | 5k | 3.5 | 35.20 | 3 | 34.50 (FID-5k) |
    """
    release = {
        step * RELEASE_ABLATION_BATCH: f"{step // 1000}k | {alpha:g} | {fid:.2f}"
        for step, alpha, fid in RELEASE_ABLATION
    }
    lines = ["| images | release: step | α | FID-50k | ours: α | FID |", "|---|---|---|---|---|---|"]
    for images in sorted(release.keys() | ours.keys()):
        mine = ours[images].cells if images in ours else "|"
        lines.append(f"| {images / 1e6:.2f} M | {release.get(images, '| |')} | {mine} |")
    return "\n".join(lines)


def intermediate_fids(rows: Sequence[Mapping[str, Any]]) -> dict[int, IntermediateFid]:
    """The best α of every snapshot of a training among rows of `evaluation.json`, by generated images trained on."""
    found: dict[int, IntermediateFid] = {}
    for row in sorted(rows, key=lambda row: -row["fid"]):
        if row["images_seen"] is not None:
            found[row["images_seen"]] = IntermediateFid(row["fid"], row["guidance_scale"], row["num"])
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `evaluation.json` as a Markdown table."""
    columns = ("model", "EMA decay", "α", fid_name(rows[0]["num"]), "sFID", "IS", "precision", "recall", "KID · 10³")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (
            row["model"],
            "unknown" if row["ema_decay"] is None else f"{row['ema_decay']:g}",
            f"{row['guidance_scale']:g}",
            f"{row['fid']:.2f}",
            "" if row["sfid"] is None else f"{row['sfid']:.2f}",
            f"{row['inception_score']:.1f} ± {row['inception_score_std']:.1f}",
            *("" if row[name] is None else f"{row[name]:.3f}" for name in ("precision", "recall")),
            "" if row["kid"] is None else f"{1000 * row['kid']:.3f} ± {1000 * row['kid_std']:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: EvaluateImageNetConfig) -> int:
    """Check every file first; then sample, measure and record, row after row."""
    device = choose_device(config.device)
    network = load_inception(config.inception, device=device)
    reference = open_reference(
        config.reference,
        protocol=config.protocol,
        num_features=network.num_features,
        num_spatial=network.num_spatial,
        expected_sha256=config.reference_sha256,
    )
    real_images = _real_images(config)
    tokenizer = load_tokenizer(config.tokenizer, device, bfloat16=config.bfloat16)
    record = {
        "protocol": config.protocol,
        "reference": {"is": PROTOCOLS[config.protocol].title, "sha256": reference.sha256},
        "sfid": reference.spatial is not None,
        "real_images": None if real_images is None else {"sha256": real_images.sha256, "num": real_images.num},
        "inception_sha256": network.sha256,
        "torch_fidelity": importlib.metadata.version("torch-fidelity"),
        "metric": fid_name(config.num),
        "num": config.num,
        "seed": config.seed,
        "pixels": PIXELS,
        "bfloat16": config.bfloat16,
        "tokenizer": None if tokenizer is None else {"source": config.tokenizer, "sha256": tokenizer.fingerprint},
    }
    with process_group(device, timeout_s=TIMEOUT_S), ExitStack() as stack:
        require_equal(files=repr(record), rows=repr((config.models, config.guidance_scales, config.save_samples)))
        if is_main():
            stack.enter_context(RunFolder(config.run_dir, record))
            _say_what_is_measured(config, reference, real_images)
        barrier()  # the folder is there
        measurement = Measurement(
            network,
            reference,
            protocol=config.protocol,
            num=config.num,
            seed=config.seed,
            batch_size=config.batch_size,
            device=device,
            real_images=real_images,
        )
        rows = _measure_rows(config, record, measurement, tokenizer)
        if is_main():
            _say_what_was_found(config, rows)
    return 0


def _measure_rows(
    config: EvaluateImageNetConfig, record: Mapping[str, Any], measurement: Measurement, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """Every model at every α; process 0 skips what is recorded, and records."""
    rows = _recorded(config.run_dir / RESULTS) if is_main() else []
    for source, ema_decay in _candidates(config):
        model = _model(source, measurement.device)
        digest = fingerprint(model)
        what = {
            "model": source,
            "model_sha256": digest,
            "ema_decay": ema_decay,
            "images_seen": _images_seen(Path(source)),
            "labels": describe_labels(measurement.label_rule, config.num, model.num_classes),
        }
        for alpha in config.guidance_scales:
            samples = config.run_dir / f"samples-{digest[:8]}-{alpha:g}.npz" if config.save_samples else None
            others = [row for row in rows if (row["model_sha256"], row["guidance_scale"]) != (digest, alpha)]
            if any_process(len(others) < len(rows) and (samples is None or samples.exists())):
                continue
            figures = _figures(config, model, measurement, tokenizer, alpha, samples)
            if is_main():
                rows = [*others, {**what, "guidance_scale": alpha, **figures._asdict()}]
                write_json(config.run_dir / RESULTS, {**record, "search": _search(rows), "rows": rows})
    return rows


def _figures(
    config: EvaluateImageNetConfig,
    model: ImageGenerator,
    measurement: Measurement,
    tokenizer: Tokenizer | None,
    alpha: float,
    samples: Path | None,
) -> Figures:
    """One row, with a bar, and its errors in the user's words."""
    try:
        with ExitStack() as stack:
            bar = stack.enter_context(Progress(len(process_share(config.num)))) if is_main() else None
            return measurement(
                model,
                guidance_scale=alpha,
                tokenizer=tokenizer,
                bfloat16=config.bfloat16,
                save_as=samples,
                progress=(lambda _: None) if bar is None else bar.update,
            )
    except ValueError as error:
        raise UserError(f"models: {error}") from error
    except OSError as error:
        raise UserError(f"run_dir: expected room for the samples in {config.run_dir}: {error.strerror}") from error


def _real_images(config: EvaluateImageNetConfig) -> RealImages | None:
    images = open_real_images(config.reference_images or config.reference, at_most=REFERENCE_IMAGES)
    if images is None and config.reference_images is not None:
        raise UserError(f"reference_images: expected an array arr_0 in {config.reference_images}, found none")
    return images


def _model(source: str, device: torch.device) -> ImageGenerator:
    try:
        return ImageGenerator.from_pretrained(source).to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"models: {error}") from error


def _candidates(config: EvaluateImageNetConfig) -> Iterator[tuple[str, float | None]]:
    """Every model and its EMA decay, as the user or its folder says; None if nobody knows."""
    for source, said in zip_longest(config.models, config.ema_decays):
        inside = [] if (Path(source) / CONFIG_FILE).exists() else sorted(Path(source).glob(f"*/{CONFIG_FILE}"))
        for folder in [str(file.parent) for file in inside] or [source]:
            yield folder, _ema_decay(Path(folder)) if said is None else said


def _ema_decay(folder: Path) -> float | None:
    """As the folder's name ends ("model-0.9995"), or the first of the run it is in."""
    run_dir = folder.parent.parent if folder.parent.name == SNAPSHOTS else folder.parent
    try:
        decay = float(folder.name.partition("-")[2] or read_config(run_dir / "config.yaml")["ema_decays"][0])
        return decay if 0 <= decay < 1 else None
    except (ConfigError, KeyError, IndexError, TypeError, ValueError):
        return None


def _images_seen(folder: Path) -> int | None:
    """Generated images that a snapshot of a training was trained on: its name."""
    return int(folder.name) if folder.parent.name == SNAPSHOTS and folder.name.isdecimal() else None


def _recorded(path: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation that was stopped; its folder is known to be of the same settings."""
    try:
        return list(parse_json(path.read_bytes())["rows"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"run_dir: {path} cannot be read ({error}); delete it or choose run_dir=OTHER") from error


def _search(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best row, and how many it is the best of."""
    best = min(rows, key=lambda row: row["fid"])
    return {
        "candidates": len(rows),
        "chosen_by": "the lowest FID, on the very samples that are reported",
        "best": {name: best[name] for name in ("model", "ema_decay", "guidance_scale", "fid")},
    }


def _say_what_is_measured(config: EvaluateImageNetConfig, reference: Reference, real: RealImages | None) -> None:
    name = fid_name(config.num)
    print(f"{name}, protocol {config.protocol}: {reference.path}, SHA-256 {reference.sha256}")
    if config.num != FULL_COUNT:
        print(
            f"warning: {config.num} samples, not {FULL_COUNT}: {name} is not comparable with published figures, "
            "since fewer samples give larger distances",
            file=sys.stderr,
        )
    if reference.spatial is None:
        print(f"no {' and '.join(SPATIAL_STATISTICS)} in the reference, so no sFID; ADM's reference has them")
    if real is None:
        print("no real images (arr_0), so no precision, recall and KID; name some by reference_images=FILE.npz")


def _say_what_was_found(config: EvaluateImageNetConfig, rows: Sequence[Mapping[str, Any]]) -> None:
    search = _search(rows)
    best = search["best"]
    print(table(rows))
    if len(rows) > 1:
        print(
            f"best {fid_name(config.num)} {best['fid']:.2f}: {best['model']} at α = {best['guidance_scale']:g}, "
            f"found by a search over {search['candidates']} candidates"
        )
    if curve := intermediate_fids(rows):
        print(f"the release's ablation run beside these snapshots\n{release_ablation_table(curve)}")
    print(f"written: {config.run_dir / RESULTS}")


if __name__ == "__main__":
    raise SystemExit(
        run_program(
            main,
            EvaluateImageNetConfig,
            config_dir=CONFIG_DIR,
            config_name="evaluate_imagenet",
            description=__doc__ or "",
        )
    )
