"""Which runs a table is made of: its rows as command lines of the programs that train."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from driftfield.training import UserError, is_same_run, load_config, option, to_plain
from driftfield.training.atomic_file import to_json
from vision import train, train_rival
from vision.ablation.table import outcomes_of, training_rate
from vision.config import CONFIG_DIR, TrainConfig
from vision.rivals.config import RivalConfig

ProgramName = Literal["vision.train", "vision.train_rival"]
BaseName = Literal["digits", "fashion_mnist"]
SAME_TIME: Final = 0.05  # a row whose speed differs by less from the first row's has trained as long as that already
LONGEST_NAME: Final = 120  # of a run's folder
# Keys of an encoder that do not decide its weights.
NOT_OF_WEIGHTS: Final = (
    "run_dir", "features", "pretrained", "microbatch", "log_every_images", "checkpoint_every_images",
)  # fmt: skip


class Program(NamedTuple):
    """What trains a row."""

    schema: type[TrainConfig] | type[RivalConfig]
    config_dir: Path
    config_name: str
    may_change: Sequence[str]  # keys that may differ when a run goes on


PROGRAMS: Final[dict[ProgramName, Program]] = {
    "vision.train": Program(TrainConfig, CONFIG_DIR, "train", train.MAY_CHANGE),
    "vision.train_rival": Program(RivalConfig, CONFIG_DIR / "rivals", "train_rival", train_rival.MAY_CHANGE),
}


@dataclass(kw_only=True)
class RowConfig:
    """A row of a table."""

    overrides: tuple[str, ...] = option("what it changes: keys of its program", ())
    program: ProgramName = option("what trains it", "vision.train")
    bases: tuple[BaseName, ...] = option("bases that it is for", ("digits", "fashion_mnist"))


@dataclass(kw_only=True)
class TableConfig:
    """A file of `configs/vision/table`."""

    name: str = option("of the file")
    title: str = option("what the table asks")
    rows: dict[str, RowConfig] = option("rows by name; the first is what the others are compared with")
    guidance_scales: tuple[float, ...] = option("judge each model at these α; none: at the run's own", (), min=1)


@dataclass(kw_only=True)
class BaseConfig:
    """A file of `configs/vision/base`."""

    name: BaseName = option("of the file")
    overrides: dict[ProgramName, tuple[str, ...]] = option("what all rows of a program have in common: its keys")


@dataclass(kw_only=True)
class AblateConfig:
    """Keys of `python -m vision.ablate`."""

    table: TableConfig
    base: BaseConfig
    folder: Path = option("where runs and tables are kept; a run that several tables need is made once")
    seeds: tuple[int, ...] = option("a run of each row for each", min=0)
    equal: Literal["samples", "time"] = option("train rows on equally many images; time: then also for equally long")
    overrides: tuple[str, ...] = option("further overrides of every row")
    workers: int = option("runs at once", min=1)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected one or more different numbers, found {list(self.seeds)}")
        if not self.rows:
            raise ValueError(f"table: expected rows for base={self.base.name}, found none in {self.table.name}")

    @property
    def rows(self) -> dict[str, RowConfig]:
        """The rows for this base."""
        return {name: row for name, row in self.table.rows.items() if self.base.name in row.bases}

    @property
    def table_folder(self) -> Path:
        """Where the table is written; `runs` and `encoders`, which tables share, lie beside `tables`."""
        return self.folder / self.base.name / "tables" / self.table.name


class Run(NamedTuple):
    """One training of one row, and its commands, of which each begins when the one before has ended well."""

    row: str
    seed: int
    program: ProgramName
    config: TrainConfig | RivalConfig
    commands: tuple[tuple[str, ...], ...]
    guidance_scales: tuple[float, ...]

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.config.run_dir

    @property
    def log(self) -> Path:
        """What the commands print."""
        return self.folder.with_name(f"{self.folder.name}.log")


def runs_of(config: AblateConfig) -> list[Run]:
    """Every run of a table at equal samples: all rows with the first seed, then all with the next.

    Raises:
        ConfigError: a row sets what its program does not take.
    """
    return [run_of(config, name, seed) for seed in config.seeds for name in config.rows]


def run_of(config: AblateConfig, name: str, seed: int, *more: str) -> Run:
    """The run of a row and a seed.

    Args:
        config: as the program was told.
        name: of the row.
        seed: of the run.
        more: further overrides.

    Raises:
        ConfigError: the row sets what its program does not take.
    """
    row = config.rows[name]
    own = [*row.overrides, *config.overrides, *more]
    home = config.folder / config.base.name
    folder = home / "runs" / _name([*row.overrides, *more], config.overrides) / f"seed{seed}"
    try:
        common = _compose(row.program, (*config.base.overrides.get(row.program, ()), *own))
    except UserError as error:
        raise UserError(f"table {config.table.name}, row {name!r}: {error}") from error
    overrides = [*config.base.overrides.get(row.program, ()), *own, f"seed={seed}", f"run_dir={folder}"]
    composed: TrainConfig | RivalConfig = replace(common, seed=seed, run_dir=folder)
    if isinstance(composed, TrainConfig):
        identity = {key: value for key, value in to_plain(composed.encoder).items() if key not in NOT_OF_WEIGHTS}
        encoder = home / "encoders" / _digest(identity)  # equal encoders are trained once
        composed = replace(composed, encoder=replace(composed.encoder, run_dir=encoder))
        overrides.append(f"encoder.run_dir={encoder}")
    commands: list[tuple[str, ...]] = [(row.program, *overrides)]
    scales = config.table.guidance_scales if isinstance(composed, TrainConfig) else ()
    if scales:
        alphas = ",".join(f"{alpha:g}" for alpha in scales)
        words = (f"run_dir={folder}", f"guidance_scales=[{alphas}]", f"num={composed.evaluate_images}")
        commands.append(("vision.evaluate", *words, f"device={composed.device}"))
    return Run(name, seed, row.program, composed, tuple(commands), scales)


@cache
def _compose(program: ProgramName, overrides: tuple[str, ...]) -> TrainConfig | RivalConfig:
    schema, config_dir, config_name, _ = PROGRAMS[program]
    return load_config(schema, config_dir=config_dir, config_name=config_name, overrides=overrides)


def _name(own: Sequence[str], further: Sequence[str]) -> str:
    """Name of the folder of a row: its overrides, and a digest where those would be too long or there are others.

    >>> _name(["loss.temperatures=[0.02,0.05]", "images=80"], [])
    'loss.temperatures_0.02_0.05__images_80'
    """
    name = "__".join(re.sub(r"[^\w.]+", "_", override).strip("_") for override in own) or "default"
    return f"{name[:LONGEST_NAME]}-{_digest([*own, *further])}" if further or len(name) > LONGEST_NAME else name


def _digest(value: Any) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:8]


def runs_of_equal_time(config: AblateConfig) -> list[Run]:
    """A run of each row that is faster or slower than the first, of as many images as fit into the first's time.

    Speeds are those of the finished runs of the first seed, so that a program started again asks for the same runs.
    """
    first, *others = (run_of(config, name, config.seeds[0]) for name in config.rows)
    rate = training_rate(first.folder)
    runs = []
    for run in others:
        own = training_rate(run.folder)
        if rate is None or own is None or abs(own / rate - 1) < SAME_TIME:
            continue
        images = max(1, round(first.config.images * own / rate))
        runs += [run_of(config, run.row, seed, f"images={images}") for seed in config.seeds]
    return runs


def is_finished(run: Run) -> bool:
    """Whether a run has all its figures.

    Raises:
        UserError: its folder holds another run.
    """
    return (
        run.folder.exists()
        and is_same_run(run.folder, run.config, PROGRAMS[run.program].may_change)
        and bool(outcomes_of(run.folder, run.row, run.seed, run.guidance_scales))
    )
