"""Run a table of the paper at the size of one machine: `python -m vision.ablate table=NAME`.

A table is a list of rows, each a few overrides of `vision.train`; everything else is equal, training images included,
and each row has several seeds. Writes `table.md`, `table.json` and `table.png` after every finished run. To go on after
a stop or a kill, run the same command again. `equal=time` also trains each row for as long as the first one took.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driftfield.training import RunFolder, Stopped, StopRequest, run_program
from driftfield.training.device import choose_device
from vision.ablation.execute import execute
from vision.ablation.plan import AblateConfig, Run, is_finished, runs_of, runs_of_equal_time
from vision.ablation.table import Outcome, Table, outcomes_of, write_table
from vision.config import CONFIG_DIR, TrainConfig
from vision.evaluate import judged_splits, load_judge
from vision.real import load_real
from vision.train_mae import trained_mae


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
