"""Run a table of the paper at the size of one machine: `python -m vision.ablate table=NAME`.

A table is a list of rows, each a few overrides of `vision.train`; everything else is equal, training images included,
and each row has several seeds. Writes `table.md`, `table.json` and `table.png` after every finished run. To go on after
a stop or a kill, run the same command again. `equal=time` also trains each row for as long as the first one took.
"""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from driftfield.training import (
    RunFolder,
    Stopped,
    StopRequest,
    UserError,
    is_same_run,
    load_config,
    option,
    run_program,
    to_plain,
)
from driftfield.training.atomic_file import to_json
from driftfield.training.device import choose_device
from vision import train, train_rival
from vision.ablation_table import Outcome, Table, outcomes_of, training_rate, write_table
from vision.config import CONFIG_DIR, TrainConfig
from vision.evaluate import judged_splits, load_judge
from vision.real import load_real
from vision.rivals.config import RivalConfig
from vision.train_mae import trained_mae

ProgramName = Literal["vision.train", "vision.train_rival"]
BaseName = Literal["digits", "fashion_mnist"]
SAME_TIME: Final = 0.05  # a row whose speed differs by less from the first row's has trained as long as that already
POLL_S: Final = 0.1
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
        """Where the table is written."""
        return self.folder / self.base.name / self.table.name


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


def prepare(runs: Sequence[Run], stop: StopRequest) -> None:
    """Train, once, what runs share: encoders, judges.

    Raises:
        Stopped: a stop was requested.
        UserError: the data or a folder do not allow it.
    """
    configs = [run.config for run in runs if isinstance(run.config, TrainConfig)]
    judges = {(config.judge.folder, config.judge.epochs): config for config in configs}
    for config in judges.values():
        load_judge(config.judge, *judged_splits(config), choose_device(config.device))
    encoders = {config.encoder.run_dir: config for config in configs}
    for config in encoders.values():
        if config.encoder.features and not config.encoder.pretrained:
            device, real = choose_device(config.device), load_real(config.data)
            bfloat16, compile = config.bfloat16, config.compile
            trained_mae(config.encoder, real, device, stop, bfloat16=bfloat16, compile=compile)


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


def execute(runs: Sequence[Run], workers: int, stop: StopRequest, done: Callable[[Run, str | None], None]) -> None:
    """Run the commands of each run, `workers` runs at once.

    Args:
        runs: what to run.
        workers: how many at once.
        stop: a request is passed on to what runs, which saves itself.
        done: called after each run with what its failed command said last, or None.

    Raises:
        Stopped: a stop was requested.
        UserError: a run's folder is in use by another process or can't be written.
    """
    waiting = list(reversed(runs))
    running: list[tuple[Run, Iterator[int | None]]] = []
    processes: list[subprocess.Popen[bytes]] = []
    try:
        while (waiting and not stop.requested) or running:
            while waiting and len(running) < workers and not stop.requested:
                run = waiting.pop()
                running.append((run, _steps(run, workers, processes)))
            still_running = []
            for run, steps in running:
                code = next(steps)
                if code is None:
                    still_running.append((run, steps))
                elif not stop.requested:
                    done(run, None if code == 0 else _last_words(run.log, code))
            running = still_running
            if stop.requested:
                _terminate(processes)
            time.sleep(POLL_S)
    finally:
        _terminate(processes)
        for process in processes:
            process.wait()
    if stop.requested:
        raise Stopped


def _steps(run: Run, workers: int, processes: list[subprocess.Popen[bytes]]) -> Iterator[int | None]:
    """The exit code of a run's commands, None while they run."""
    with RunFolder(run.folder, run.config, may_change=PROGRAMS[run.program].may_change):
        pass  # what is wrong with the folder is no failure of the row
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if workers > 1:  # threads of one process wait for those of another where there are more of them than cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    code = 0
    for program, *words in run.commands:
        process = _start([sys.executable, "-m", program, *words], run.log, environment)
        processes.append(process)
        while process.poll() is None:
            yield None
        processes.remove(process)
        code = process.returncode
        if code != 0:
            break
    yield code


def _start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def _terminate(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()


def _last_words(log: Path, code: int) -> str:
    """What a failed command said: its error in one sentence, or its last line."""
    if code < 0:
        return f"killed by signal {-code}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1]


class _Board:
    """What is known of a table, written anew after every run, with a line on how far it is.

    Args:
        config: as the program was told.
        runs: at equal samples.
    """

    def __init__(self, config: AblateConfig, runs: Sequence[Run]) -> None:
        self._config, self._samples = config, list(runs)
        self._time: list[Run] = []
        self._failures: dict[Path, str] = {}
        self._start, self._done, self._left = time.monotonic(), 0, 0

    def add_equal_time(self, runs: Sequence[Run]) -> None:
        """Take in the runs of equal time, once they are known."""
        self._time = list(runs)

    def left(self) -> list[Run]:
        """Runs that are not finished and have not failed in this start."""
        runs = {run.folder: run for run in reversed([*self._samples, *self._time])}  # equal rows share a run
        left = [run for run in runs.values() if run.folder not in self._failures and not is_finished(run)]
        self._left = len(left)
        return left[::-1]

    def done(self, run: Run, failure: str | None) -> None:
        """Note a run's end, write the table, print a line."""
        if failure is not None:
            self._failures[run.folder] = failure
        self._done, self._left = self._done + 1, self._left - 1
        self.write()
        seconds = (time.monotonic() - self._start) / self._done * self._left
        result = failure or ", ".join(
            f"Fréchet {found.evaluation.frechet:.2f}, coverage {found.evaluation.coverage:.3f}"
            for found in self._of(run)[:1]
            if found.evaluation is not None
        )
        clock = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
        print(f"{run.row}, seed {run.seed}: {result}; {self._left} runs, {clock} left", flush=True)

    def write(self) -> None:
        """Write the table of what there is."""
        config = self._config
        samples = [outcome for run in self._samples for outcome in self._of(run)]
        in_time = [outcome for run in self._time for outcome in self._of(run)]
        table = Table(
            name=config.table.name,
            title=config.table.title,
            base=config.base.name,
            overrides={name: [*row.overrides, *config.overrides] for name, row in config.rows.items()},
            common={name: list(overrides) for name, overrides in config.base.overrides.items()},
            equal_time=config.equal == "time",
            seeds=list(config.seeds),
        )
        write_table(config.table_folder, table, samples, in_time)

    def _of(self, run: Run) -> list[Outcome]:
        if run.folder in self._failures:
            return [Outcome(run.row, run.seed, str(run.folder), failure=self._failures[run.folder])]
        return outcomes_of(run.folder, run.row, run.seed, run.guidance_scales)


def main(config: AblateConfig) -> int:
    """Run what is missing of a table and write it."""
    runs = runs_of(config)
    identity: dict[str, Any] = {"table": config.table.name, "base": config.base.name}
    with StopRequest() as stop, RunFolder(config.table_folder, identity):
        board = _Board(config, runs)
        try:
            _fill(board, runs, config, stop)
            if config.equal == "time":
                more = runs_of_equal_time(config)
                board.add_equal_time(more)
                _fill(board, more, config, stop)
        except Stopped:
            print(f"stopped and saved; the same command goes on from here ({config.table_folder})")
            return stop.exit_code
        board.write()
    print((config.table_folder / "table.md").read_text(encoding="utf-8"))
    print(f"written: {config.table_folder}/table.md, table.json, table.png")
    return 0


def _fill(board: _Board, runs: Sequence[Run], config: AblateConfig, stop: StopRequest) -> None:
    left = board.left()
    print(f"{config.table.name} on {config.base.name}: {len(runs)} runs, {len(left)} of them to do", flush=True)
    prepare(left, stop)
    execute(left, config.workers, stop, board.done)


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, AblateConfig, config_dir=CONFIG_DIR, config_name="ablate", description=__doc__ or "")
    )
