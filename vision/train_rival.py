"""Train what drifting is compared with: `python -m vision.train_rival method=flow_matching`, mean_flow or gan.

Transformer, data, optimizer, averages of the weights, number of training samples and judge are those of vision.train.
Without further arguments: scikit-learn's digits, some minutes on a CPU. To resume a run that was stopped or killed, run
the same command again.
"""

import time
from collections.abc import Iterator
from typing import Final, NamedTuple, get_args

import torch

from driftfield.training import (
    Action,
    StopRequest,
    barrier,
    is_main,
    process_group,
    require_equal,
    run_loop,
    run_program,
    run_to_results,
    share,
    to_yaml,
)
from driftfield.training.atomic_file import write_json
from driftfield.training.device import choose_device
from vision.config import CONFIG_DIR
from vision.data import ImageSet, Split, load
from vision.evaluate import MODEL, Judgement, worst_class
from vision.generator import ImageGenerator
from vision.metrics import EvaluationResult
from vision.pictures import save_animation, save_grid
from vision.rivals.config import RivalConfig
from vision.rivals.flow_matching import EVALUATIONS_PER_STEP, FlowMatchingGenerator, Sampler
from vision.rivals.mean_flow import MeanFlowGenerator
from vision.rivals.training import TRAININGS, RivalTraining
from vision.sample import BATCH_SIZE, sample

PICTURE_ROWS: Final = 10  # images of each class in the pictures of training
MAX_PICTURE_CLASSES: Final = 10
MAX_FRAMES: Final = 40  # of the animation
# A resumed run may change what only concerns where it runs, not what it computes.
MAY_CHANGE: Final = (
    "run_dir", "data.folder", "data.download", "checkpoint_every_images", "log_every_images", "picture_every_images",
)  # fmt: skip
RIVALS_DIR: Final = CONFIG_DIR / "rivals"  # of the configuration: vision.train's experiments are beside it
RESULTS: Final = "results.json"
PICTURES: Final = "pictures"  # folder of the grids through training


class Row(NamedTuple):
    """A way to sample, and what is measured of it."""

    sampler: str
    evaluations: int  # passes of the network per image, guidance included
    guidance_scale: float
    images_per_s: float
    evaluation: EvaluationResult


def run(config: RivalConfig, real: ImageSet, held_out: ImageSet, device: torch.device, stop: StopRequest) -> None:
    """Train to the end, from the newest checkpoint if there is one, then judge and write `results.json`.

    Raises:
        Stopped: a stop was requested; the checkpoint is written.
        UserError: the data, the folder or the disk do not allow it, or gradients stay not finite.
    """
    start = time.monotonic()
    training = TRAININGS[config.method](config, real, device)
    run_loop(
        training,
        config.run_dir,
        stop,
        name="rival",
        samples=config.images,
        checkpoint_every=config.checkpoint_every_images,
        log_every=config.log_every_images,
        shown=(training.shown,),
        actions=[Action(config.picture_every_images, lambda: save_picture(training))],
    )
    trained_s = time.monotonic() - start
    if is_main():
        with training.ema.swapped():
            training.generator.save_pretrained(config.run_dir / MODEL)
            rows = judge(config, training.generator, Judgement(config.judge, real, held_out, device))
        frames = sorted((config.run_dir / PICTURES).glob("*.png"))
        save_animation(frames[::-1][:: -(-len(frames) // MAX_FRAMES)][::-1], config.run_dir / "training.gif")
        results = {
            "method": config.method,
            "images_seen": training.images_seen,
            "generator_parameters": sum(parameter.numel() for parameter in training.generator.parameters()),
            "device": str(device),
            "trained_in_this_start_s": round(trained_s, 1),
            "this_start_s": round(time.monotonic() - start, 1),
            "rows": [{**row._asdict(), "evaluation": row.evaluation._asdict()} for row in rows],
        }
        print(f"{config.evaluate_images} samples a row, in the features of {rows[0].evaluation.feature_space}")
        print(table(rows))
        print(f"{config.method}: {training.images_seen} images in {trained_s:.0f} s of training")
        write_json(config.run_dir / RESULTS, results)
    barrier()


def save_picture(training: RivalTraining) -> None:
    """Write a grid of samples, the same noise at every time, a column per class."""
    num_classes = training.real.num_classes
    columns = min(num_classes, MAX_PICTURE_CLASSES)
    classes = torch.arange(columns) * num_classes // columns
    flow_matching = training.config.flow_matching
    scale = flow_matching.picture_guidance_scale if training.config.method == "flow_matching" else 1.0
    with training.ema.swapped():
        images = sample(training.generator, classes.repeat(PICTURE_ROWS), guidance_scale=scale)
    folder = training.config.run_dir / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / f"{training.images_seen:010d}.png", training.config.run_dir / "samples.png"):
        save_grid(images, path, columns=columns)


def judge(config: RivalConfig, model: ImageGenerator, judgement: Judgement) -> list[Row]:
    """What a classifier that training never saw says of every way to sample, of the noise that vision.train has."""
    rows = []
    for name, evaluations, scale in ways_to_sample(config, model):
        asked = scale if isinstance(model, FlowMatchingGenerator) else 1.0
        evaluation = judgement.evaluate(model, num=config.evaluate_images, guidance_scale=asked)
        rows.append(Row(name, evaluations, scale, images_per_s(model, asked), evaluation))
    return rows


def ways_to_sample(config: RivalConfig, model: ImageGenerator) -> Iterator[tuple[str, int, float]]:
    """Set the model to one sampler after another.

    Yields:
        The sampler's name, passes of the network per image, scale of guidance.
    """
    if isinstance(model, FlowMatchingGenerator):
        for scale in config.flow_matching.guidance_scales:
            for solver in config.flow_matching.solvers:
                each = EVALUATIONS_PER_STEP[solver] * (1 if scale == 1 else 2)
                for evaluations in config.flow_matching.evaluations:
                    if evaluations % each == 0:
                        model.sampler = Sampler(solver, evaluations)
                        yield solver, evaluations, scale
    elif isinstance(model, MeanFlowGenerator):
        for evaluations in config.mean_flow.evaluations:
            model.evaluations = evaluations
            yield "mean_flow", evaluations, config.mean_flow.guidance_scale
    else:
        yield "gan", 1, 1.0


def images_per_s(model: ImageGenerator, guidance_scale: float) -> float:
    """Speed of sampling one batch, the noise included and a first batch of one image left out."""
    sample(model, torch.zeros(1, dtype=torch.int64), guidance_scale=guidance_scale)
    start = time.perf_counter()
    sample(model, torch.arange(BATCH_SIZE) % model.num_classes, guidance_scale=guidance_scale)
    return BATCH_SIZE / (time.perf_counter() - start)


def table(rows: list[Row]) -> str:
    """Figures by sampler as a Markdown table, the floor of real images in its last row."""
    lines = [
        "| sampler | evaluations | α | Fréchet | coverage | agreement | worst class | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, evaluations, scale, speed, row in rows:
        lines.append(
            f"| {name} | {evaluations} | {scale:g} | {row.frechet:.2f} | {row.coverage:.3f} | {row.agreement:.3f} "
            f"| {worst_class(row):.3f} | {speed:.3g} |"
        )
    real = rows[0].evaluation
    lines.append(
        f"| {real.n_floor} real | | | {real.frechet_floor:.2f} | {real.coverage_real:.3f} "
        f"| {real.judge_accuracy:.3f} (test) | | |"
    )
    return "\n".join(lines)


def main(config: RivalConfig) -> int:
    """Train, judge, and say where everything is."""
    device = choose_device(config.device)
    with process_group(device), StopRequest() as stop:
        real, held_out = (
            load(config.data.name, split, data_dir=config.data.folder, download=config.data.download)
            for split in get_args(Split)
        )
        require_equal(config=to_yaml(config), data=real.fingerprint)
        share(config.optimizer.batch_size, f"{config.method}.batch_size")  # refused here rather than in the first step
        if code := run_to_results(
            config, lambda: run(config, real, held_out, device, stop), stop, results=RESULTS, may_change=MAY_CHANGE
        ):
            return code
        if is_main():
            names = (config.run_dir / name for name in ("samples.png", "training.gif", RESULTS))
            print("samples: {}, training: {}, figures: {}".format(*names))
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(
            main,
            RivalConfig,
            config_dir=RIVALS_DIR,
            config_name="train_rival",
            description=__doc__ or "",
        )
    )
