"""The loop of every training: steps, log, checkpoints; stopped at any moment, the same command goes on."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from driftfield.training.checkpoint import Checkpoint, read_checkpoint
from driftfield.training.distributed import any_process, barrier, is_main, require_equal
from driftfield.training.faults import fault_point
from driftfield.training.interrupt import StopRequest
from driftfield.training.progress import Progress
from driftfield.training.run_folder import RunFolder
from driftfield.training.runlog import RunLog

CHECKPOINTS = "checkpoints"  # folder of the checkpoints inside a run folder


class Stopped(Exception):
    """A stop was requested and everything is saved; the program ends with the request's exit code."""


class Trainable(Protocol):
    """What is trained: its state, and the step that changes it."""

    step_number: int  # steps done

    @property
    def samples_per_step(self) -> int:
        """Samples of one step, those of all processes together."""
        ...

    def step(self) -> Mapping[str, float | Tensor]:
        """One step; values for the progress line and the log."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors a resumed run needs, by group. Every process is asked; what the main one returns is written."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything else it needs, as JSON."""
        ...

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Take over what `tensors` and `state` returned after `step` steps."""
        ...


class Action(NamedTuple):
    """Something to do before the first step, whenever training crosses a multiple of `every` samples, and at the end.

    The main process does it alone, unless everywhere: all do it, which a sharded model needs.
    """

    every: int
    do: Callable[[], None]
    everywhere: bool = False


def run_loop(
    training: Trainable,
    folder: Path,
    stop: StopRequest,
    *,
    name: str,
    samples: int,
    checkpoint_every: int,
    log_every: int,
    shown: Sequence[str],
    actions: Sequence[Action] = (),
    writers: Sequence[str] = (),
    unit: str = "images",
) -> None:
    """Train until `samples` samples are done, from the newest checkpoint in the folder if there is one.

    Args:
        training: what to train; all processes hold the same.
        folder: the run's folder: gets `checkpoints` and `metrics.jsonl`, from the main process.
        stop: looked at after every step; set in any process, it stops all.
        name: of the places where a test can make it fail, `NAME.step.N`.
        samples, checkpoint_every, log_every: in samples, whatever the batch.
        shown: names of the values beside the progress.
        actions: what else to do now and then.
        writers: further logs, as for `RunLog`.
        unit: what a sample is, in the plural.

    Raises:
        Stopped: a stop was requested; the checkpoint is written.
        UserError: from the step, the log or the disk, or the processes do not agree.
    """
    checkpoint = Checkpoint(folder / CHECKPOINTS) if is_main() else None
    barrier()
    loaded = read_checkpoint(folder / CHECKPOINTS)
    require_equal(**{"step to resume from": str(loaded and loaded.step)})
    resumed = loaded is not None
    if loaded is not None:
        training.restore(*loaded)
        loaded = None  # as large as the training itself
    actions = [action for action in actions if is_main() or action.everywhere]
    if resumed and is_main():
        print(f"resuming at {_done(training)} {unit}")
    log = RunLog(folder, resume_step=training.step_number, writers=writers) if is_main() else None
    progress = Progress(samples, initial=_done(training), unit=unit) if is_main() else None
    with log or nullcontext(), progress or nullcontext():

        def after_step(values: Mapping[str, float | Tensor], stopping: bool) -> None:
            if progress is not None:
                progress.update(training.samples_per_step, **{name: float(values[name]) for name in shown})
            if log is not None and _is_due(training, log_every, samples):
                log.log(training.step_number, _done(training), **{key: float(value) for key, value in values.items()})
            for action in actions:
                if _is_due(training, action.every, samples):
                    action.do()
            if stopping or _is_due(training, checkpoint_every, samples):
                tensors = training.tensors()
                if checkpoint is not None:
                    checkpoint.save(training.step_number, tensors, training.state())

        if training.step_number == 0:
            for action in actions:
                action.do()
        _steps(training, stop, name, samples, after_step)


def run_to_results(
    config: Any, run: Callable[[], None], stop: StopRequest, *, results: str, may_change: Collection[str]
) -> int:
    """Run in the run's folder until its results are there: a finished run is left alone, a stopped one says so.

    Args:
        config: of the program; its `run_dir` is the folder.
        run: trains from the newest checkpoint to the end, and writes the results last.
        stop: looked at by `run`.
        results: name of the file that a finished run has.
        may_change: dotted keys of the configuration that may differ when a run goes on.

    Raises:
        UserError: the folder can't be used, or from `run`.

    Returns:
        The program's exit code.
    """
    file = Path(config.run_dir) / results
    with RunFolder(config.run_dir, config, may_change=may_change) if is_main() else nullcontext():
        if file.exists():
            if is_main():
                print(f"{file}: this run is complete; for another one choose run_dir=OTHER or delete its folder")
            return 0
        try:
            run()
        except Stopped:
            if is_main():
                print(f"stopped and saved; the same command goes on from here ({config.run_dir})")
            return stop.exit_code
    return 0


def _steps(
    training: Trainable,
    stop: StopRequest,
    name: str,
    samples: int,
    after_step: Callable[[Mapping[str, float | Tensor], bool], None],
) -> None:
    while _done(training) < samples:
        fault_point(f"{name}.step.{training.step_number}")
        values = training.step()
        stopping = any_process(stop.requested)
        after_step(values, stopping)
        if stopping:
            barrier()  # no process ends while the checkpoint is being written
            raise Stopped
    barrier()


def _done(training: Trainable) -> int:
    return training.step_number * training.samples_per_step


def _is_due(training: Trainable, every: int, samples: int) -> bool:
    """Whether the last step crossed a multiple of `every`, or was the last one of all."""
    done = _done(training)
    return done // every > (done - training.samples_per_step) // every or done >= samples
