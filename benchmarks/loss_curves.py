"""Does what makes a step fast change what it learns? The curves of some steps: `python -m benchmarks.loss_curves`.

An experiment of `vision.train` as it is set (bfloat16, compiled, fused kernels) beside the same one plain: float32,
eager, the loss by its formulas. Weights, noise, labels and guidance scales of a step are equal in both; samples are
noise, the encoder's weights random. Prints how far loss, λ and the norm of the gradient are apart, and writes them by
step as JSON and as a picture.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.train_step import CONFIG_DIR, forget, training_on_noise
from driftfield.training import option, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.device import choose_device
from vision.config import Device

CURVES: Final = ("loss", "lambda", "gradient_norm")
AS_SET, PLAIN = "as set", "plain"


@dataclass(kw_only=True)
class CurvesConfig:
    """Keys of `python -m benchmarks.loss_curves`."""

    experiment: str = option("experiment of vision.train on latents or imagenet")
    overrides: tuple[str, ...] = option("keys of vision.train to change in both")
    plain: tuple[str, ...] = option("keys of vision.train that make the plain one")
    encoder: str | None = option("encoder in the place of the experiment's own, as mae:mae_latent_256; empty: none")
    steps: int = option("steps of each", min=2)
    device: Device = option("where to compute")
    out: Path = option("JSON file of the curves; the picture goes beside it")


def curves(config: CurvesConfig, overrides: Sequence[str], device: torch.device) -> dict[str, list[float]]:
    """Loss, λ and the norm of the gradient of every step."""
    _, training = training_on_noise(config.experiment, overrides, config.encoder, device)
    found: dict[str, list[float]] = {name: [] for name in CURVES}
    for step in range(config.steps):
        values = training.step()
        for name in CURVES:
            found[name].append(float(values[name]))
        if (step + 1) % max(1, config.steps // 10) == 0:
            print(f"{step + 1}/{config.steps} steps, lambda {found['lambda'][-1]:.4g}", flush=True)
    return found


def apart(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Relative differences, step by step.

    >>> apart([1.0, 3.0], [1.0, 2.0])
    [0.0, 0.5]
    """
    return [abs(a - b) / abs(b) for a, b in zip(one, other, strict=True)]


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """How far the curves are apart, as a Markdown table."""
    lines = [
        f"| | {PLAIN}, first | last | {AS_SET}, first | last | apart: first step | median | largest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CURVES:
        plain, as_set = found[PLAIN][name], found[AS_SET][name]
        difference = apart(as_set, plain)
        lines.append(
            f"| {name} | {plain[0]:.5g} | {plain[-1]:.5g} | {as_set[0]:.5g} | {as_set[-1]:.5g} "
            f"| {difference[0]:.2%} | {statistics.median(difference):.2%} | {max(difference):.2%} |"
        )
    return "\n".join(lines)


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A panel for each of loss, λ and gradient, both trainings in it."""
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for label, style in ((PLAIN, "-"), (AS_SET, "--")):
            axes.plot(found[label][name], style, label=label)
        axes.set(xlabel="step", title={"lambda": "λ"}.get(name, name.replace("_", " ")))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(config: CurvesConfig) -> int:
    """Train both, print a table, write JSON and a picture."""
    device = choose_device(config.device)
    found = {}
    for label, words in ((AS_SET, config.overrides), (PLAIN, (*config.overrides, *config.plain))):
        print(f"{label}: {' '.join((f'experiment={config.experiment}', *words))}", flush=True)
        found[label] = curves(config, words, device)
        forget()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {
        "experiment": config.experiment,
        "overrides": list(config.overrides),
        "plain": list(config.plain),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "curves": found,
    }
    write_json(config.out, figures)
    draw(found, config.out.with_suffix(".png"))
    print(f"{table(found)}\nwritten: {config.out}, {config.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, CurvesConfig, config_dir=CONFIG_DIR, config_name="loss_curves", description=__doc__ or "")
    )
