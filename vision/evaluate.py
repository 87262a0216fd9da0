"""Judge one-step samples of a run at several guidance scales: `python -m vision.evaluate`.

Everything is measured in the features of a classifier that no training saw, coverage in raw pixels too, against the
real test images; real training images judged likewise are the floor. Writes `evaluation.json` and `guidance.png` into
the run's folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor

from driftfield.training import ConfigError, UserError, from_plain, option, read_config, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.device import Device, choose_device
from vision.config import CONFIG_DIR, JudgeConfig, TrainConfig
from vision.data import ImageSet, Split, load, to_float, to_uint8
from vision.generator import ImageGenerator
from vision.judge import SETTINGS, Judge, load_or_train
from vision.metrics import Coverage, EvaluationResult, balanced_subset, evaluate_features
from vision.sample import sample

FLOOR_DRAWS: Final = 5  # subsets of real training images whose mean is the floor in pixels
MODEL: Final = "model"  # folder of the finished generator inside its run folder
EVALUATION: Final = "evaluation.json"  # file of these figures there
SNAPSHOTS: Final = "snapshots"  # folder inside a run: models through training, named by generated images seen


@dataclass(kw_only=True)
class EvaluateConfig:
    """Keys of `python -m vision.evaluate`."""

    run_dir: Path = option("folder of a finished run of vision.train")
    guidance_scales: tuple[float, ...] = option("values of α to compare", min=1)
    num: int = option("one-step samples per guidance scale, the same number of each class", min=100)
    seed: int = option("seed of the samples", min=0)
    device: Device = option("where to compute")


class Judgement:
    """A judge with what it makes of the real images, computed once for any number of generators.

    Args:
        config: where judges are kept.
        device: where to compute.
        real: training split.
        held_out: test split, the reference.
    """

    def __init__(self, config: JudgeConfig, real: ImageSet, held_out: ImageSet, device: torch.device) -> None:
        self.judge = load_judge(config, real, held_out, device)
        self.real = real
        self._train = self._features(to_float(real.images))
        self._reference = self._features(to_float(held_out.images))
        self._device = device
        self._pixel_coverage = Coverage(self._pixels(to_float(held_out.images)))
        self._real_pixel_coverage: dict[int, float] = {}  # by number of images

    def evaluate(
        self, model: ImageGenerator, *, num: int, guidance_scale: float = 1.0, seed: int = 0
    ) -> EvaluationResult:
        """Judge `num` one-step samples, as many of each class, rounded to bytes as a picture file would hold them."""
        labels = torch.arange(num) % self.real.num_classes
        images = to_float(to_uint8(sample(model, labels, guidance_scale=guidance_scale, seed=seed)))
        return evaluate_features(
            self._features(images),
            self.judge.logits(images).cpu(),
            labels,
            train=self._train,
            train_labels=self.real.labels,
            reference=self._reference,
            feature_space=self.judge.name,
            judge_accuracy=self.judge.test_accuracy,
            coverage_pixels=self._pixel_coverage(self._pixels(images)),
            coverage_pixels_real=self._coverage_by_real(num),
        )

    def _coverage_by_real(self, num: int) -> float:
        """Coverage in pixels by as many real training images, or as many as there are, as the mean of several draws."""
        if num not in self._real_pixel_coverage:
            draws = [balanced_subset(self.real.labels, num, seed=0, draw=draw) for draw in range(FLOOR_DRAWS)]
            covered = [self._pixel_coverage(self._pixels(to_float(self.real.images[draw]))) for draw in draws]
            self._real_pixel_coverage[num] = sum(covered) / FLOOR_DRAWS
        return self._real_pixel_coverage[num]

    def _features(self, images: Tensor) -> Tensor:
        return self.judge.features(images).cpu()

    def _pixels(self, images: Tensor) -> Tensor:
        """Images as vectors `[n, C * H * W]`, on the device: they are long enough for it to matter."""
        return images.flatten(1).to(self._device)


def load_judge(config: JudgeConfig, real: ImageSet, held_out: ImageSet, device: torch.device) -> Judge:
    """The judge that a configuration names, trained if it is not there; arguments as of `Judgement`."""
    settings = SETTINGS[real.name]
    if config.epochs is not None:
        settings = replace(settings, epochs=config.epochs)
    return load_or_train(real, held_out, config.folder, settings=settings, device=device)


def table(rows: Mapping[float, EvaluationResult]) -> str:
    """Figures by guidance scale as a Markdown table, the floor of real images in its last row.

    Args:
        rows: guidance scale to figures.
    """
    lines = [
        "| α | agreement | worst class | Fréchet | precision | recall | coverage | in pixels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for alpha, row in rows.items():
        lines.append(
            f"| {alpha:g} | {row.agreement:.3f} | {worst_class(row):.3f} | {row.frechet:.2f} | {row.precision:.3f} "
            f"| {row.recall:.3f} | {row.coverage:.3f} | {row.coverage_pixels:.3f} |"
        )
    real = next(iter(rows.values()))
    lines.append(
        f"| {real.n_floor} real | {real.judge_accuracy:.3f} (test) | | {real.frechet_floor:.2f} | | "
        f"| {real.coverage_real:.3f} | {real.coverage_pixels_real:.3f} |"
    )
    return "\n".join(lines)


def worst_class(result: EvaluationResult) -> float:
    """Agreement of the class that the judge recognises least often."""
    return min(share for share in result.agreement_per_class if share is not None)


def main(config: EvaluateConfig) -> int:
    """Judge a finished run."""
    trained = config_of_run(config.run_dir)
    real, held_out = judged_splits(trained)
    device = choose_device(config.device)
    try:
        model = ImageGenerator.from_pretrained(config.run_dir / MODEL).to(device)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"run_dir: expected a finished run, found: {error}") from error
    judgement = Judgement(trained.judge, real, held_out, device)
    rows = {
        alpha: judgement.evaluate(model, num=config.num, guidance_scale=alpha, seed=config.seed)
        for alpha in config.guidance_scales
    }
    write_json(
        config.run_dir / EVALUATION,
        [{"guidance_scale": alpha, "seed": config.seed, **row._asdict()} for alpha, row in rows.items()],
    )
    _plot(rows, config.run_dir / "guidance.png")
    first = next(iter(rows.values()))
    print(
        f"{first.n_generated} samples per row against {first.n_reference} real test images, in {first.feature_space}\n"
        f"{table(rows)}\nwritten: {config.run_dir / EVALUATION}, {config.run_dir / 'guidance.png'}"
    )
    return 0


def config_of_run(run_dir: Path) -> TrainConfig:
    """The configuration that a folder of vision.train was trained with.

    Raises:
        UserError: it is no such folder, or of another version.
    """
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"run_dir: expected a folder of vision.train, found no config.yaml in {run_dir}")
    try:
        return from_plain(TrainConfig, read_config(run_dir / "config.yaml"))
    except ConfigError as error:
        raise UserError(f"run_dir: {run_dir / 'config.yaml'} is not of this version: {error}") from error


def judged_splits(trained: TrainConfig) -> tuple[ImageSet, ImageSet]:
    """Training and test split of a run's data, for data that have a judge.

    Raises:
        UserError: these have none.
    """
    name = trained.data.name
    if name == "imagenet" or name == "latents":
        raise UserError(f"run_dir: expected a run on digits or fashion_mnist, which have a judge, found one on {name}")
    train, test = (load(name, split, data_dir=trained.data.folder) for split in get_args(Split))
    return train, test


def _plot(rows: Mapping[float, EvaluationResult], path: Path) -> None:
    from matplotlib.figure import Figure  # no global state, no display

    alphas = list(rows)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    shares = figure.subplots()
    shares.plot(alphas, [row.agreement for row in rows.values()], "o-", color="tab:blue", label="agreement with label")
    shares.plot(alphas, [row.coverage for row in rows.values()], "s-", color="tab:orange", label="coverage of real")
    shares.set(xlabel="guidance scale α", ylabel="share")
    distance = shares.twinx()
    distance.plot(alphas, [row.frechet for row in rows.values()], "^--", color="tab:gray", label="Fréchet distance")
    distance.set(ylabel="Fréchet distance", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, EvaluateConfig, config_dir=CONFIG_DIR, config_name="evaluate", description=__doc__ or "")
    )
