"""What the runs of a table say: read from their folders, written as Markdown, JSON and a picture."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from driftfield.training import UserError, read_log
from driftfield.training.atomic_file import parse_json, write_json, write_text
from driftfield.training.runlog import METRICS
from vision.evaluate import EVALUATION, worst_class
from vision.metrics import EvaluationResult
from vision.train import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAST_SHARE: Final = 0.1  # of the log's lines, over which the last λ is averaged
FLOOR_COLOUR, SEED_COLOUR, MEAN_COLOUR = "0.5", "tab:blue", "black"


class Outcome(NamedTuple):
    """What one run came to, sampled in one way."""

    row: str
    seed: int
    run_dir: str
    sampled: str = ""  # how, where a run is judged in several ways
    images: int | None = None  # generated images trained on
    images_per_s: float | None = None  # of training, the median over its log
    drift_norm: float | None = None  # λ at the end; None for a program that has none
    evaluation: EvaluationResult | None = None
    failure: str | None = None  # what its training said when it ended

    @property
    def seconds(self) -> float | None:
        """Wall-clock time of its training steps, whatever stops lay between."""
        return self.images / self.images_per_s if self.images and self.images_per_s else None


class Table(NamedTuple):
    """What the rows of a table have in common, for the reader."""

    name: str
    title: str
    base: str
    overrides: Mapping[str, Sequence[str]]  # by row
    common: Mapping[str, Sequence[str]]  # by program
    seeds: Sequence[int]
    equal_time: bool


def outcomes_of(folder: Path, row: str, seed: int, guidance_scales: Sequence[float] = ()) -> list[Outcome]:
    """What a finished run came to, in each way that it is sampled; nothing if it is not finished.

    Args:
        folder: of the run.
        row: name of its row.
        seed: of the run.
        guidance_scales: to be found in what `vision.evaluate` wrote there; none: what the run itself measured.

    Raises:
        UserError: a file there is damaged or of another version.
    """
    path = folder / (EVALUATION if guidance_scales else RESULTS)
    if not (folder / RESULTS).exists() or not path.exists():
        return []
    try:
        results = parse_json((folder / RESULTS).read_bytes())
        if guidance_scales:
            entries = {entry["guidance_scale"]: entry for entry in parse_json(path.read_bytes())}
            if not set(guidance_scales) <= entries.keys():
                return []
            ways = {f"α = {scale:g}": _evaluation(entries[scale]) for scale in guidance_scales}
        elif "rows" in results:  # of vision.train_rival
            ways = {_sampler(entry): _evaluation(entry["evaluation"]) for entry in results["rows"]}
        else:
            ways = {"": _evaluation(results["evaluation"])}
        images = int(results["images_seen"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected the figures of a run of this version, found: {error!r}") from error
    rate, norm = training_rate(folder), _last_drift_norm(folder)
    return [Outcome(row, seed, str(folder), how, images, rate, norm, evaluation) for how, evaluation in ways.items()]


def _sampler(entry: Mapping[str, Any]) -> str:
    guided = "" if entry["guidance_scale"] == 1 else f", α = {entry['guidance_scale']:g}"
    return f"{entry['sampler']}, {entry['evaluations']} evaluations{guided}"


def _evaluation(figures: Mapping[str, Any]) -> EvaluationResult:
    return EvaluationResult(**{name: figures[name] for name in EvaluationResult._fields})


def training_rate(folder: Path) -> float | None:
    """Images per second of a run's training, the median between two lines of its log; None without a log."""
    lines = [(line["samples_seen"], datetime.fromisoformat(line["time"])) for line in _log(folder)]
    rates = [
        (seen - seen_before) / (now - before).total_seconds()
        for (seen_before, before), (seen, now) in pairwise(lines)
        if now > before
    ]
    return statistics.median(rates) if rates else None


def _last_drift_norm(folder: Path) -> float | None:
    norms = [line["lambda"] for line in _log(folder) if line.get("lambda", 0) > 0]
    last = norms[-max(1, round(LAST_SHARE * len(norms))) :]
    return statistics.geometric_mean(last) if last else None


def _log(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    return read_log(path) if path.exists() else []


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; no deviation of one."""

    mean: float
    deviation: float | None

    def text(self, digits: int) -> str:
        """As it stands in a table.

        >>> Spread(1.0, 0.25).text(2), Spread(1.0, None).text(1)
        ('1.00 ± 0.25', '1.0')
        """
        mean = f"{self.mean:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {self.deviation:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean and deviation of at least one value.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, deviation=1.4142135623730951)
    """
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


class _Column(NamedTuple):
    heading: str
    of: Callable[[EvaluationResult], float]
    digits: int
    floor: Callable[[EvaluationResult], float] | None = None


COLUMNS: Final = (
    _Column("Fréchet", lambda e: e.frechet, 2, lambda e: e.frechet_floor),
    _Column("coverage", lambda e: e.coverage, 3, lambda e: e.coverage_real),
    _Column("in pixels", lambda e: e.coverage_pixels, 3, lambda e: e.coverage_pixels_real),
    _Column("precision", lambda e: e.precision, 3),
    _Column("recall", lambda e: e.recall, 3),
    _Column("agreement", lambda e: e.agreement, 3, lambda e: e.judge_accuracy),
    _Column("worst class", worst_class, 3),
)
DRAWN: Final = ("Fréchet", "coverage", "agreement")


def write_table(folder: Path, table: Table, samples: Sequence[Outcome], in_time: Sequence[Outcome] = ()) -> None:
    """Write `table.md`, `table.json` and `table.png`.

    Args:
        folder: where; it must exist.
        table: what it is.
        samples: outcomes at equal samples.
        in_time: outcomes at equal time of the rows that are not as fast as the first.
    """
    write_json(folder / "table.json", as_json(table, samples, in_time))
    write_text(folder / "table.md", markdown(table, samples, in_time))
    if _evaluations(samples):
        draw(folder / "table.png", table, samples, in_time)


def as_json(table: Table, samples: Sequence[Outcome], in_time: Sequence[Outcome] = ()) -> dict[str, Any]:
    """All of it as data."""

    def plain(outcome: Outcome) -> dict[str, Any]:
        evaluation = None if outcome.evaluation is None else outcome.evaluation._asdict()
        return {**outcome._asdict(), "evaluation": evaluation, "seconds": outcome.seconds}

    return {
        **table._asdict(),
        "equal_samples": [plain(outcome) for outcome in samples],
        "equal_time_of_other_length": [plain(outcome) for outcome in in_time],
    }


def markdown(table: Table, samples: Sequence[Outcome], in_time: Sequence[Outcome] = ()) -> str:
    """The table for a reader: what real images reach first, then mean ± sample deviation over seeds of each row."""
    groups, timed = _by_label(samples), _by_label(in_time)
    any_result = next(iter(_evaluations(samples)), None)
    if any_result is None:
        about = "no run has finished yet"
    else:
        about = (
            f"{any_result.n_generated} one-step samples of each run, in {any_result.feature_space}, against "
            f"{any_result.n_reference} real test images; mean ± standard deviation over seeds; λ compares within a loss"
        )
    headings = ["variant", "seeds", *(column.heading for column in COLUMNS), "λ at the end", "s"]
    headings += ["images in equal time", "Fréchet then", "coverage then"] if table.equal_time else []
    lines = [
        f"# {table.title}", "",
        f"`python -m vision.ablate table={table.name} base={table.base}`: {about}.", "",
        _line(headings), _line(["---"] * len(headings)),
    ]  # fmt: skip
    if any_result is not None:
        floor = ["" if c.floor is None else f"{c.floor(any_result):.{c.digits}f}" for c in COLUMNS]
        lines.append(_line([f"{any_result.n_floor} real training images", "", *floor], len(headings)))
    notes = []
    for label, outcomes in groups.items():
        lines.append(_line([label, *_cells(outcomes, table, timed.get(label))], len(headings)))
        notes += [f"{label}, seed {each.seed}: {each.failure}" for each in outcomes if each.failure]
    notes += [f"{each.row}, seed {each.seed}, equal time: {each.failure}" for each in in_time if each.failure]
    return "\n".join([*lines, *(["", "Not finished:", "", *(f"- {note}" for note in notes)] if notes else [])]) + "\n"


def _cells(outcomes: Sequence[Outcome], table: Table, timed: Sequence[Outcome] | None) -> list[str]:
    found = _evaluations(outcomes)
    if not found:
        return ["0", "failed" if any(outcome.failure for outcome in outcomes) else ""]
    norms = [outcome.drift_norm for outcome in outcomes if outcome.drift_norm is not None]
    seconds = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
    cells = [str(len(found)), *_spreads(found, COLUMNS)]
    cells.append(f"{statistics.geometric_mean(norms):.3g}" if norms else "")
    cells.append(f"{statistics.fmean(seconds):.0f}" if seconds else "")
    if table.equal_time:
        then = timed or outcomes  # a row as fast as the first has trained for as long already
        images = sorted({outcome.images for outcome in then if outcome.images is not None})
        cells.append(", ".join(f"{number:,}" for number in images))
        cells += _spreads(_evaluations(then), COLUMNS[:2]) or ["failed"]
    return cells


def _evaluations(outcomes: Sequence[Outcome]) -> list[EvaluationResult]:
    return [outcome.evaluation for outcome in outcomes if outcome.evaluation is not None]


def _spreads(found: Sequence[EvaluationResult], columns: Sequence[_Column]) -> list[str]:
    return [spread([column.of(each) for each in found]).text(column.digits) for column in columns if found]


def _line(cells: Sequence[str], width: int = 0) -> str:
    return "| " + " | ".join([*cells, *[""] * (width - len(cells))]) + " |"


def _by_label(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by what stands in the first column: the row, and how it is sampled where there are several ways."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(f"{outcome.row}, {outcome.sampled}".rstrip(", "), []).append(outcome)
    return groups


def draw(path: Path, table: Table, samples: Sequence[Outcome], in_time: Sequence[Outcome] = ()) -> None:
    """A point per seed, a bar at the mean, a dashed line where real images are; rings at equal time."""
    from matplotlib.figure import Figure  # no global state, no display
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    groups, timed = _by_label(samples), _by_label(in_time)
    figure = Figure(figsize=(9, 1.3 + 0.32 * len(groups)), layout="constrained")
    panels = figure.subplots(1, len(DRAWN), sharey=True)
    for axes, column in zip(panels, (c for c in COLUMNS if c.heading in DRAWN), strict=True):
        _panel(axes, column, groups, timed)
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panels[0].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    panels[0].set(yticks=range(len(groups)), yticklabels=list(groups), ylim=(len(groups) - 0.5, -0.5))
    figure.suptitle(f"{table.title} ({table.base})", fontsize=10)
    figure.savefig(path, dpi=110)


def _panel(
    axes: "Axes",
    column: _Column,
    groups: Mapping[str, Sequence[Outcome]],
    timed: Mapping[str, Sequence[Outcome]],
) -> None:
    for height, (label, outcomes) in enumerate(groups.items()):
        found = _evaluations(outcomes)
        values = [column.of(evaluation) for evaluation in found]
        axes.plot(values, [height] * len(values), "o", color=SEED_COLOUR, alpha=0.6, markersize=5)
        if values:
            axes.plot(statistics.fmean(values), height, "|", color=MEAN_COLOUR, markersize=14, markeredgewidth=1.5)
        then = [column.of(evaluation) for evaluation in _evaluations(timed.get(label, ()))]
        axes.plot(then, [height + 0.2] * len(then), "o", color=SEED_COLOUR, markersize=5, fillstyle="none")
        if column.floor is not None and found:
            axes.axvline(column.floor(found[0]), color=FLOOR_COLOUR, linestyle="--", linewidth=0.8)
    axes.set_xlabel(f"{column.heading} (dashed: real images)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", which="both", alpha=0.2)
