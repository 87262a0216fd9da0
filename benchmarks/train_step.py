"""How long a training step takes, and in how much memory: `python -m benchmarks.train_step`.

The experiments of `vision.train` with samples of noise, held in memory, and random weights of the encoder: what the
device does takes as long as in a real training, but nothing is read or decoded. For each: time of a step, generated
images per second, floating-point operations per second beside what one large product of matrices reaches in the same
run (the floor), and the largest memory. With `profile=true` one more step of each is recorded: a table of its kernels
and a trace beside the figures.
"""

import gc
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.step_profile import profile_step, report
from driftfield.training import generator, load_config, option, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.device import choose_device
from vision.config import CONFIG_DIR as VISION_CONFIG_DIR
from vision.config import Device, TrainConfig
from vision.encoders import load_encoder
from vision.train import Training

CONFIG_DIR: Final = Path(__file__).parents[1] / "configs" / "benchmarks"
SHAPES: Final = {"latents": (4, 32, 32), "imagenet": (3, 256, 256)}
PER_CLASS: Final = 130  # more than any queue holds
WARMUP_STEPS: Final = 2  # compilation, and the choice of algorithms
PRODUCT_SIZE: Final = {"cuda": 8192, "cpu": 1024}


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Keys of `python -m benchmarks.train_step`."""

    experiments: tuple[str, ...] = option("experiments of vision.train on latents or imagenet")
    overrides: tuple[str, ...] = option(
        "keys of vision.train to change in all of them, as ['labels_at_once=8','compile=false']"
    )
    encoder: str | None = option("encoder in the place of the experiment's own, as mae:mae_latent_256; empty: none")
    steps: int = option("steps measured, after two that are not", min=1)
    profile: bool = option(
        "record one more step: OUT's name with the experiment's, .md its kernels, .trace.json its trace"
    )
    device: Device = option("where to compute")
    out: Path = option("JSON file of the figures")


class RandomSamples:
    """Samples of noise in the place of real ones, as `vision.data.RealSamples`.

    Args:
        shape: (C, H, W) of one.
        num_classes: classes, each of 130 samples.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        self.sample_shape = shape
        self.class_names = tuple(str(label) for label in range(num_classes))
        self.labels = torch.arange(num_classes * PER_CLASS) % num_classes
        self.fingerprint = "noise"
        self._noise = torch.randn(256, *shape, generator=generator(0, "samples"))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, visits: Tensor, *, seed: int) -> Tensor:
        """Float32 `[k, C, H, W]`."""
        return self._noise[visits % len(self._noise)]


def training_on_noise(
    experiment: str, overrides: Sequence[str], encoder: str | None, device: torch.device
) -> tuple[TrainConfig, Training]:
    """An experiment of `vision.train` before its first step, on samples of noise, its encoder's weights random.

    Args:
        experiment: name of one on latents or imagenet.
        overrides: keys of `vision.train` to change.
        encoder: in the place of the experiment's own; empty: none.
        device: where to compute.
    """
    words = [f"experiment={experiment}", f"device={device.type}", *overrides]
    train = load_config(TrainConfig, config_dir=VISION_CONFIG_DIR, config_name="train", overrides=words)
    specs = [encoder] if encoder is not None else train.encoder.pretrained
    specs = [spec.replace("hf://", "") for spec in specs if spec]
    torch.manual_seed(0)
    loaded = load_encoder(specs, random_weights=True).to(device) if specs else None
    return train, Training(train, RandomSamples(SHAPES[train.data.name], 1000), loaded, device)


def measure(config: BenchmarkConfig, experiment: str, device: torch.device) -> dict[str, Any]:
    """Figures of one experiment."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train, training = training_on_noise(experiment, config.overrides, config.encoder, device)
    for _ in range(WARMUP_STEPS):
        training.step()
    start = time.perf_counter()
    for _ in range(config.steps):
        values = training.step()  # ends by reading the norm of the gradient: the device is done
    seconds = (time.perf_counter() - start) / config.steps
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    if config.profile:
        beside = config.out.with_name(f"{config.out.stem}-{experiment}")
        beside.parent.mkdir(parents=True, exist_ok=True)
        found = profile_step(training.step, device, beside.with_suffix(".trace.json"))
        beside.with_suffix(".md").write_text(report(found) + "\n", encoding="utf-8")
        print(report(found))
    return {
        "experiment": experiment,
        "labels": train.labels_per_step,
        "labels_at_once": train.labels_at_once,
        "statistics": train.statistics,
        "images_per_step": training.samples_per_step,
        "step_s": seconds,
        "images_per_s": training.samples_per_step / seconds,
        "teraflops": float(values["teraflops"]) * seconds_of(values, training) / seconds,
        "hours_of_the_run": train.images / training.samples_per_step * seconds / 3600,
        "peak_gib": peak_gib,
        "parameters": sum(parameter.numel() for parameter in training.generator.parameters()),
    }


def forget() -> None:
    """Let the next experiment find the device and the compiler as this one did."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds_of(values: dict[str, Any], training: Training) -> float:
    """Time of the step that gave these values."""
    return training.samples_per_step / float(values["images_per_s"])


def product_teraflops(device: torch.device, *, bfloat16: bool) -> float:
    """What one large product of matrices reaches."""
    size = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if bfloat16 else None) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def table(rows: Sequence[dict[str, Any]], floor: float) -> str:
    """Figures as a Markdown table."""
    lines = [
        f"| experiment | images a step | at once | step | images/s | TFLOP/s (product: {floor:.3g}) | of product "
        "| memory | whole run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB"
        at_once = f"{row['labels_at_once'] or row['labels']} labels, {row['statistics']}"
        lines.append(
            f"| {row['experiment']} | {row['images_per_step']} | {at_once} | {row['step_s']:.3g} s "
            f"| {row['images_per_s']:.4g} | {row['teraflops']:.3g} | {row['teraflops'] / floor:.0%} | {memory} "
            f"| {row['hours_of_the_run']:.3g} h |"
        )
    return "\n".join(lines)


def main(config: BenchmarkConfig) -> int:
    """Measure, print a table, write JSON."""
    device = choose_device(config.device)
    floor = product_teraflops(device, bfloat16=device.type == "cuda")
    rows = []
    for experiment in config.experiments:
        rows.append(measure(config, experiment, device))
        forget()
        print(table(rows[-1:], floor), flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.out, {"device": name, "torch": torch.__version__, "product_teraflops": floor, "rows": rows})
    print(f"\n{name}\n{table(rows, floor)}\nwritten: {config.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, BenchmarkConfig, config_dir=CONFIG_DIR, config_name="train_step", description=__doc__ or "")
    )
