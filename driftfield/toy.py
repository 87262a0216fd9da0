"""The paper's toy examples on a CPU: three starts onto a bimodal target (Fig. 3), two shapes in the plane (Fig. 4).

`python -m driftfield.toy` trains five small generators in under a minute, draws how their samples drift onto the
target with the loss and λ beside them, and prints how close they came. `--field`, `--normalize-over` and
`--affinity-floor` choose the variants of Tables 1 and 11, so that a broken field can be seen failing, and fields beyond
the paper. The loop to copy is `train`.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from driftfield.kernel import NormalizeOver
from driftfield.loss import DriftingLoss, DriftingOutput, Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

BATCH = 128  # generated samples per step, and as many real ones
SHOWN = 500  # samples in a picture
MEASURED = 2000  # samples behind a printed figure
FRAMES = 41  # of an animation
IN_PICTURE = (0, 4, 8, 16, 40)  # the frames that stand side by side in the PNG
STEPS = {"fig3": 800, "fig4": 2000}
# Without the 0.02 of images: in the plane a kernel that narrow sees only the floor of the affinity across the gap
# between two modes, which draws a blob between them together in the middle.
TEMPERATURES = (0.05, 0.2)
FIELDS: dict[str, dict[str, Any]] = {  # keywords of `DriftingLoss`
    "default": {},
    "1.5x-attraction": {"attraction": 1.5},  # Table 1: the factors of V+ and V-
    "1.5x-repulsion": {"repulsion": 1.5},
    "2x-attraction": {"attraction": 2.0},
    "2x-repulsion": {"repulsion": 2.0},
    "attraction-only": {"repulsion": 0.0},
    "bias-corrected": {"bias_correction": True},  # beyond the paper
    "sinkhorn": {"field": "sinkhorn"},
    "sinkhorn-halves": {"field": "sinkhorn", "second_batch": "halves"},
    "mmd": {"field": "mmd"},
}
HEADLINES = {
    "fig3": "Three starts drift onto the same two modes (Fig. 3)",
    "fig4": "One blob drifts onto two shapes (Fig. 4)",
}
SAMPLE_COLOUR, TARGET_COLOUR, LOSS_COLOUR = "#e4572e", "#8fb8de", "#9a9a9a"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": "#b8b8b8",
    "axes.titlesize": 10,
    "xtick.color": "#606060",
    "xtick.labelsize": 8,
    "ytick.color": "#606060",
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}

Target = Callable[[int, torch.Generator], Tensor]

MODES = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # [modes, 2]
MODE_STD = 0.2


def bimodal(num: int, rng: torch.Generator) -> Tensor:
    """Two Gaussians of equal weight (Fig. 3), `[num, 2]`."""
    mode = torch.randint(2, (num,), generator=rng)
    return MODES[mode] + MODE_STD * torch.randn(num, 2, generator=rng)


def checkerboard(num: int, rng: torch.Generator) -> Tensor:
    """Uniform on every other cell of a 4 x 4 board over [-1, 1]² (Fig. 4), `[num, 2]`."""
    row = torch.randint(4, (num,), generator=rng)
    column = 2 * torch.randint(2, (num,), generator=rng) + row % 2
    return (torch.stack([column, row], -1) + torch.rand(num, 2, generator=rng)) / 2 - 1


def swiss_roll(num: int, rng: torch.Generator) -> Tensor:
    """A spiral of one and a half turns (Fig. 4), `[num, 2]`."""
    angle = math.pi * (1.5 + 3.0 * torch.rand(num, generator=rng))
    spiral = torch.stack([angle.cos(), angle.sin()], -1) * angle[:, None] / (4.5 * math.pi)
    return spiral + 0.02 * torch.randn(num, 2, generator=rng)


class Panel(NamedTuple):
    """One generator: where its samples start and where they should go."""

    name: str
    target: Target
    start: tuple[float, float]  # mean of the first samples
    spread: float  # their standard deviation


PANELS = {
    "fig3": (
        Panel("between the modes", bimodal, (0.0, 0.0), 0.15),
        Panel("far away", bimodal, (0.0, 2.0), 0.15),
        Panel("collapsed on one mode", bimodal, (-1.0, 0.0), MODE_STD),
    ),
    "fig4": (
        Panel("checkerboard", checkerboard, (-1.2, -1.2), 0.15),
        Panel("swiss roll", swiss_roll, (-1.2, -1.2), 0.15),
    ),
}


class Generator(nn.Sequential):
    """A multilayer perceptron from noise `[N, 2]` to samples `[N, 2]`, at first a blob of given mean and deviation.

    >>> rng = torch.Generator().manual_seed(0)
    >>> x = Generator((3.0, 0.0), 0.1, rng=rng)(torch.randn(500, 2, generator=rng))
    >>> bool((x.mean(0) - torch.tensor([3.0, 0.0])).norm() < 0.1)
    True
    """

    def __init__(self, start: tuple[float, float], spread: float, *, rng: torch.Generator, width: int = 128) -> None:
        layers = [nn.Linear(2, width), *(nn.Linear(width, width) for _ in range(3)), nn.Linear(width, 2)]
        for layer in layers:
            # wide in the first layer: a smooth function of the noise would hardly tear between two modes
            std = 3.0 if layer is layers[0] else (2.0 / width) ** 0.5
            nn.init.normal_(layer.weight, std=std, generator=rng)
            nn.init.normal_(layer.bias, std=std, generator=rng)
        super().__init__(*[module for layer in layers for module in (layer, nn.SiLU())][:-1])
        head = layers[-1]
        with torch.no_grad():
            first = self(torch.randn(MEASURED, 2, generator=rng))
            factor = spread / first.std(0)  # [2]
            head.weight *= factor[:, None]
            head.bias.copy_(torch.tensor(start) + factor * (head.bias - first.mean(0)))


def train(
    generator: nn.Module, target: Target, loss_fn: DriftingLoss, *, steps: int, rng: torch.Generator
) -> Iterator[DriftingOutput]:
    """Train a generator by drifting; every step yields what the loss returned."""
    optimizer = torch.optim.Adam(generator.parameters(), lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = generator(torch.randn(BATCH, 2, generator=rng))  # [N, 2] in one forward pass
        output = loss_fn(x, target(BATCH, rng))  # repulsion comes from x itself
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
        yield output


class Run(NamedTuple):
    """What was seen of one panel: frames are moments of its training, from before it to after it."""

    panel: Panel
    temperatures: tuple[float, ...]
    moments: list[int]  # [frames], optimizer steps done
    samples: Tensor  # [frames, MEASURED, 2], of the same noise throughout
    loss: Tensor  # [steps]
    drift_norm: Tensor  # [steps, temperatures], λ
    real: Tensor  # [MEASURED, 2]
    real_drift_norm: Tensor  # [temperatures], λ of real samples in place of generated ones


def run_panel(panel: Panel, loss_fn: DriftingLoss, *, steps: int, seed: int) -> Run:
    """Train one panel's generator, keeping what the pictures and the table show.

    Args:
        steps: optimizer steps, >= 1.
        seed: of the weights, the noise and the real samples.
    """
    rng = torch.Generator().manual_seed(seed)
    generator = Generator(panel.start, panel.spread, rng=rng)
    noise = torch.randn(MEASURED, 2, generator=rng)
    # samples move most at first, and so frames are densest there
    moments = [round(steps * (frame / (FRAMES - 1)) ** 2) for frame in range(FRAMES)]
    samples, outputs = {0: generator(noise).detach()}, []
    for step, output in enumerate(train(generator, panel.target, loss_fn, steps=steps, rng=rng), start=1):
        outputs.append(output)
        if step in moments:
            samples[step] = generator(noise).detach()
    of_real = [loss_fn(panel.target(BATCH, rng), panel.target(BATCH, rng)) for _ in range(50)]
    return Run(
        panel,
        loss_fn.options.temperatures,
        moments,
        torch.stack([samples[moment] for moment in moments]),
        torch.stack([output.loss.detach() for output in outputs]),
        torch.stack([output.drift_norm for output in outputs]),
        panel.target(MEASURED, rng),
        torch.stack([output.drift_norm for output in of_real]).mean(0),
    )


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two sets of points `[N, 2]`, `[M, 2]`: 0 where the distributions agree.

    >>> energy_distance(torch.zeros(3, 2), torch.ones(4, 2)) == 2 * 2**0.5
    True
    """
    between, within_x, within_y = (torch.cdist(a.double(), b.double()).mean() for a, b in ((x, y), (x, x), (y, y)))
    return float(2 * between - within_x - within_y)


def share_of_modes(x: Tensor) -> Tensor:
    """Share of the points `[N, 2]` within 3 standard deviations of each mode of `bimodal`, `[modes]`.

    >>> share_of_modes(torch.tensor([[-1.0, 0.1], [0.0, 0.0]])).tolist()
    [0.5, 0.0]
    """
    return (torch.cdist(x, MODES) < 3 * MODE_STD).float().mean(0)


def table(runs: Sequence[Run], *, seed: int) -> str:
    """One line per panel, and one with what real samples reach against other real samples after the last of a target.

    λ is the mean over the last tenth of the steps.
    """
    bimodal_too = runs[0].panel.target is bimodal
    columns = [f"λ at τ={temperature:g}" for temperature in runs[0].temperatures]
    columns += ["left mode", "right mode"] * bimodal_too + ["energy distance"]
    lines = [" " * 24 + "".join(f"{column:>17}" for column in columns)]

    def add(name: str, drift_norm: Tensor, x: Tensor, real: Tensor) -> None:
        cells = [f"{value:.3f}" for value in drift_norm.tolist()]
        cells += [f"{share:.1%}" for share in share_of_modes(x).tolist()] * bimodal_too
        lines.append(f"{name:<24}" + "".join(f"{cell:>17}" for cell in [*cells, f"{energy_distance(x, real):.4f}"]))

    for index, run in enumerate(runs):
        last_tenth = run.drift_norm[-math.ceil(len(run.drift_norm) / 10) :]
        add(run.panel.name, last_tenth.mean(0), run.samples[-1], run.real)
        if index + 1 == len(runs) or runs[index + 1].panel.target is not run.panel.target:
            others = run.panel.target(MEASURED, torch.Generator().manual_seed(seed + 1))
            add("  real samples", run.real_drift_norm, others, run.real)
    return "\n".join(lines)


def moments_side_by_side(runs: Sequence[Run], title: str) -> "Figure":
    """One row per panel: its samples at a few moments, then its curves."""
    from matplotlib.figure import Figure

    columns = len(IN_PICTURE) + 1
    figure = Figure(figsize=(14.0, 2.3 * len(runs) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.add_gridspec(len(runs), columns, width_ratios=[1.0] * (columns - 1) + [1.5])
    for row, run in enumerate(runs):
        for column, frame in enumerate(IN_PICTURE):
            axes = figure.add_subplot(grid[row, column])
            draw_target(axes, run)
            x, y = run.samples[frame, :SHOWN].T.numpy()
            axes.scatter(x, y, s=5, c=SAMPLE_COLOUR, alpha=0.7, linewidths=0)
            axes.set_xlabel(f"step {run.moments[frame]}")
            if column == 0:
                axes.set_ylabel(run.panel.name)
        draw_curves(figure.add_subplot(grid[row, -1]), run)
    return figure


def animation(runs: Sequence[Run], title: str) -> "list[Image]":
    """Frames with one column per panel: its samples over its curves, where a line marks the moment."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(3.2 * len(runs), 5.8), dpi=90, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(2, len(runs), height_ratios=[1.6, 1.0])
    moving = []
    for column, run in enumerate(runs):
        axes, curves = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        draw_target(axes, run)
        draw_curves(curves, run)
        axes.set_title(run.panel.name)
        dots = axes.scatter([], [], s=7, c=SAMPLE_COLOUR, alpha=0.8, linewidths=0, animated=True)
        step = axes.text(0.97, 0.03, "", transform=axes.transAxes, horizontalalignment="right", animated=True)
        mark = curves.axvline(1, color="black", linewidth=1, animated=True)
        moving.append((run, axes, dots, step, curves, mark))
    canvas.draw()
    still = canvas.copy_from_bbox(figure.bbox)  # what does not move is drawn once
    frames = []
    for frame in range(FRAMES):
        canvas.restore_region(still)
        for run, axes, dots, step, curves, mark in moving:
            dots.set_offsets(run.samples[frame, :SHOWN].numpy())
            step.set_text(f"step {run.moments[frame]}")
            mark.set_xdata([max(run.moments[frame], 1)] * 2)
            axes.draw_artist(dots)
            axes.draw_artist(step)
            curves.draw_artist(mark)
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    palette = frames[0].quantize(128)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def draw_target(axes: "Axes", run: Run) -> None:
    """The density of the target, in a square that also holds the start."""
    from matplotlib.colors import LinearSegmentedColormap

    seen = torch.cat([run.real, run.samples[0]])
    low, high = seen.quantile(torch.tensor([0.002, 0.998]), dim=0)  # [2] each
    middle, half = (high + low) / 2, float((high - low).max()) * 0.56
    left, right, bottom, top = (float(middle[axis]) + sign * half for axis in (0, 1) for sign in (-1, 1))
    many = run.panel.target(200_000, torch.Generator().manual_seed(0))
    density = torch.histogramdd(many, [90, 90], range=[left, right, bottom, top]).hist.T  # [y, x]
    axes.imshow(
        density.numpy(),
        extent=(left, right, bottom, top),
        origin="lower",
        cmap=LinearSegmentedColormap.from_list("target", ["white", TARGET_COLOUR]),
        vmax=float(density.flatten().quantile(0.995)),
        interpolation="bicubic",
    )
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])


def draw_curves(axes: "Axes", run: Run) -> None:
    """Loss and λ of each temperature, both axes logarithmic; dashed λ of real samples."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    steps, temperatures = run.drift_norm.shape
    edges = sorted({round((steps + 1) ** (part / 60)) for part in range(61)})  # means over steps of one ratio
    bins = list(zip(edges[:-1], edges[1:], strict=True))
    curves = [(run.loss, LOSS_COLOUR, "loss")]
    for index in range(temperatures):
        colour = to_hex(colormaps["viridis"]((index + 0.5) / (temperatures + 0.5)))
        curves.append((run.drift_norm[:, index], colour, f"λ at τ={run.temperatures[index]:g}"))
        axes.axhline(float(run.real_drift_norm[index]), color=colour, linestyle="--", linewidth=1)
    for values, colour, label in curves:
        means = [float(values[low - 1 : high - 1].mean()) for low, high in bins]
        axes.plot([(low * (high - 1)) ** 0.5 for low, high in bins], means, color=colour, linewidth=1.6, label=label)
    axes.set(xscale="log", yscale="log", xlim=(1, max(steps, 2)), xlabel="step")
    axes.legend()


def write_pictures(runs: Sequence[Run], title: str, folder: Path, name: str) -> list[Path]:
    """Write `name.png`, moments side by side, and `name.gif`, moving; returns their paths."""
    from matplotlib import rc_context

    still, moving = folder / f"{name}.png", folder / f"{name}.gif"
    with rc_context(STYLE):
        moments_side_by_side(runs, title).savefig(still, dpi=110)
        first, *others = animation(runs, title)
    first.save(moving, save_all=True, append_images=others, duration=[*[80] * len(others), 2500], loop=0)
    return [still, moving]


def headline(name: str, options: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """What should be seen in a figure, or with which options it was made where they are not the usual ones."""
    keys = ("recipe", "field", "normalize_over", "affinity_floor", "temperatures", "steps")
    changed = [key for key in keys if getattr(options, key) != getattr(defaults, key)]
    words = " ".join(f"--{key.replace('_', '-')} {_as_typed(getattr(options, key))}" for key in changed)
    first = f"{name.replace('fig', 'Fig. ')} with {words}" if changed else HEADLINES[name]
    loss = "loss: mean ‖V‖²" if options.recipe == "paper" else "loss: flat by construction"
    real = "dashed: λ of real samples" if changed else "λ: falls to that of real samples (dashed)"
    return f"{first}\nblue: target, orange: one-step samples\n{loss}, {real}"


def _as_typed(value: object) -> str:
    return " ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else str(value)


def command_line() -> argparse.ArgumentParser:
    """The options of `python -m driftfield.toy`."""
    parser = argparse.ArgumentParser(
        prog="python -m driftfield.toy",
        usage="%(prog)s [options]",
        description="Train small generators in the plane by drifting, and draw how their samples move.",
        epilog="Try --field attraction-only: nothing keeps the samples apart, and all end on one point.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/toy"), metavar="FOLDER", help="for the pictures (%(default)s)")
    add("--only", choices=PANELS, help="one figure: fig3, three starts; fig4, two shapes (both)")
    add("--recipe", choices=get_args(Recipe), default="official", help="loss of the release, or Eq. 6 (%(default)s)")
    add(
        "--field",
        choices=FIELDS,
        default="default",
        metavar="NAME",
        help=f"Table 1's, or one beyond the paper: {', '.join(FIELDS)} (%(default)s)",
    )
    add("--normalize-over", choices=get_args(NormalizeOver), default="xy", help="Table 11 (%(default)s)")
    add("--affinity-floor", type=float, metavar="FLOOR", help="least squared affinity (official 1e-6, paper 0)")
    add(
        "--temperatures",
        type=float,
        nargs="+",
        default=TEMPERATURES,
        metavar="TAU",
        help=f"in units of the mean distance (official) or of the plane (paper) ({_as_typed(TEMPERATURES)})",
    )
    steps = ", ".join(f"{figure} {number}" for figure, number in STEPS.items())
    add("--steps", type=int, metavar="K", help=f"optimizer steps of every generator ({steps})")
    add("--seed", type=int, default=0, metavar="S", help="of weights, noise and real samples (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = command_line()
    options = parser.parse_args(argv)
    options.temperatures = tuple(options.temperatures)
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        print(f"error: drawing needs {error.name}: pip install -e .[train]", file=sys.stderr)
        return 1
    if options.steps is not None and options.steps < 1:
        parser.error(f"argument --steps: must be at least 1, found {options.steps}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"argument --seed: must lie in [0, 2^63), found {options.seed}")
    try:
        loss_fn = DriftingLoss(
            options.temperatures,
            recipe=options.recipe,
            normalize_over=options.normalize_over,
            affinity_floor=options.affinity_floor,
            **FIELDS[options.field],
        )
        options.out.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {options.out}: {error.strerror}")
    paths = []
    for name in [options.only] if options.only else PANELS:
        title = headline(name, options, parser.parse_args([]))
        print(f"{title}\n", flush=True)
        begin = time.monotonic()
        steps = options.steps or STEPS[name]
        runs = [run_panel(panel, loss_fn, steps=steps, seed=options.seed) for panel in PANELS[name]]
        print(f"{table(runs, seed=options.seed)}\n{time.monotonic() - begin:.0f} s\n", flush=True)
        paths += write_pictures(runs, title, options.out, name)
    print("wrote", *paths, sep="\n  ")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # work as small as this only waits on a second thread
    sys.exit(main())
