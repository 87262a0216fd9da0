"""Which curve shows progress? The loss, λ and the Fréchet distance through one training: `python -m vision.curve`.

Judges every model that `vision.train snapshot_every_images=...` has kept, and draws what it finds over the loss and λ
of the run's log: the loss is flat by construction (Eq. 25), λ falls. Writes `curve.json` and `curve.png` into the run's
folder.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from driftfield.training import UserError, option, read_log, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.device import Device, choose_device
from driftfield.training.runlog import METRICS
from vision.config import CONFIG_DIR
from vision.evaluate import SNAPSHOTS, Judgement, config_of_run, judged_splits
from vision.generator import ImageGenerator
from vision.metrics import EvaluationResult

FEWEST: Final = 3  # models, below which there is no curve


@dataclass(kw_only=True)
class CurveConfig:
    """Keys of `python -m vision.curve`."""

    run_dir: Path = option("folder of a run of vision.train with snapshot_every_images")
    num: int = option("one-step samples of each model", min=100)
    guidance_scale: float | None = option("α; null: the run's own evaluate_guidance_scale", min=1)
    seed: int = option("seed of the samples", min=0)
    device: Device = option("where to compute")


class Point(NamedTuple):
    """A kept model: how it is judged, and what its training's log says since the one before."""

    images_seen: int
    evaluation: EvaluationResult
    loss: float | None  # mean; None of the model before the first step
    drift_norm: float | None  # λ, geometric mean


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, for values without ties: 1 where both rise and fall together, -1 where one falls as the other rises.

    Args:
        a, b: equally many numbers, at least two.

    Raises:
        ValueError: all numbers of one are equal.

    >>> rank_correlation([1, 2, 3], [2, 40, 600]), rank_correlation([1, 2, 3], [3, 2, 1])
    (1.0, -1.0)
    """
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    return statistics.correlation(*ranks)


def curve(config: CurveConfig) -> list[Point]:
    """Judge the models that a run has kept, first to last.

    Raises:
        UserError: it is no run of vision.train on data with a judge, or has kept too few.
    """
    trained = config_of_run(config.run_dir)
    folders = sorted((config.run_dir / SNAPSHOTS).glob("*/config.json"))
    if len(folders) < FEWEST:
        raise UserError(
            f"run_dir: expected at least {FEWEST} models in {config.run_dir / SNAPSHOTS}, found {len(folders)}; "
            "vision.train keeps them with snapshot_every_images=NUMBER"
        )
    device = choose_device(config.device)
    judgement = Judgement(trained.judge, *judged_splits(trained), device)
    log, before, points = read_log(config.run_dir / METRICS), 0, []
    for path in folders:
        images = int(path.parent.name)
        model = ImageGenerator.from_pretrained(path.parent).to(device)
        scale = config.guidance_scale or trained.evaluate_guidance_scale
        evaluation = judgement.evaluate(model, num=config.num, guidance_scale=scale, seed=config.seed)
        since = [line for line in log if before < line["samples_seen"] <= images]
        points.append(
            Point(
                images,
                evaluation,
                statistics.fmean(line["loss"] for line in since) if since else None,
                statistics.geometric_mean([line["lambda"] for line in since]) if since else None,
            )
        )
        print(f"{images} images: Fréchet {evaluation.frechet:.2f}, coverage {evaluation.coverage:.3f}", flush=True)
        before = images
    return points


def draw(points: Sequence[Point], log: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and λ of every line of the log on the left axis, the Fréchet distance of the kept models on the right."""
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    left = figure.subplots()
    seen = [line["samples_seen"] for line in log]
    left.plot(seen, [line["loss"] for line in log], color="0.6", label="loss: flat by construction")
    left.plot(seen, [line["lambda"] for line in log], color="tab:blue", label="λ, norm of the drift")
    left.set(xlabel="generated images trained on", ylabel="loss, λ", yscale="log")
    right = left.twinx()
    right.plot(
        [point.images_seen for point in points],
        [point.evaluation.frechet for point in points],
        "o-", color="tab:red", label="Fréchet distance",
    )  # fmt: skip
    right.axhline(
        points[0].evaluation.frechet_floor, color="tab:red", linestyle="--", linewidth=0.8, label="real images"
    )
    right.set(ylabel="Fréchet distance", yscale="log")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main(config: CurveConfig) -> int:
    """Judge, draw, and say how far loss and λ agree with the figure that counts."""
    points = curve(config)
    plain = [{**point._asdict(), "evaluation": point.evaluation._asdict()} for point in points]
    write_json(config.run_dir / "curve.json", plain)
    draw(points, read_log(config.run_dir / METRICS), config.run_dir / "curve.png")
    trained = [point for point in points if point.drift_norm is not None and point.loss is not None]
    frechet = [point.evaluation.frechet for point in trained]
    for name, values in (("λ", [p.drift_norm or 0 for p in trained]), ("loss", [p.loss or 0 for p in trained])):
        first, last = values[0], values[-1]
        agreed = rank_correlation(values, frechet)
        print(f"{name}: {first:.3g} to {last:.3g}, rank correlation with the Fréchet distance {agreed:.2f}")
    rose = sum(later > earlier for earlier, later in pairwise(frechet))
    print(f"Fréchet distance: {frechet[0]:.2f} to {frechet[-1]:.2f}, rose {rose} times of {len(frechet) - 1}")
    print(f"written: {config.run_dir / 'curve.json'}, {config.run_dir / 'curve.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, CurveConfig, config_dir=CONFIG_DIR, config_name="curve", description=__doc__ or "")
    )
