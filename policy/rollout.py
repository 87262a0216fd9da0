"""Episodes of a policy in simulation, by receding horizon; no number depends on how many processes simulate.

Episodes go in blocks of `batch` seeds. The parent runs the policy on a block's rows all at once, finished rows kept as
padding; worker processes own the environments and execute whole slices. So the policy always sees the same batches,
and the initial state and the noise of an episode follow from its seed alone.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

import envs
from driftfield.training import Progress, UserError, generator
from policy.ensembling import TemporalEnsemble
from policy.rollout_worker import SCRIPT, CannotMake, Frames, Host, MakeEnvironment, Report, Setup

MOST_FRAMES: Final = 150  # of an episode; a picture takes as long as hundreds of steps
TRIES: Final = 3  # of an episode whose worker dies or hangs
ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class RunnablePolicy(Protocol):
    """What can be rolled out: `obs_steps` (To), `horizon` (T), `action_steps` (Ta) and predictions for a batch."""

    obs_steps: int
    horizon: int
    action_steps: int

    def predict(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        """Actions to execute `[B, Ta, A]`, from the last To observations `[B, To, ...]` and one generator per row."""
        ...

    def predict_chunk(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        """The whole chunk `[B, T, A]`, its first To - 1 actions of the past; asked for where chunks are averaged."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """How an episode went.

    Attributes:
        seed: of its initial state and its noise.
        score: by the task's own definition, in [0, 1]; 0 if it failed.
        success: whether all phases were completed.
        phases: how many were.
        num_phases: how many there are.
        steps: control steps it took.
        diverged: whether the physics ran away.
        clipped: entries of its actions that lay outside the action's box.
        failure: traceback of what the environment raised; None if nothing.
        retries: times that its worker was lost and it was begun anew.
        latencies: seconds of each prediction it took part in, of the whole batch.
        actions: what the policy said, as far as executed, float32 `[steps, A]`.
    """

    seed: int
    score: float
    success: bool
    phases: int
    num_phases: int
    steps: int
    diverged: bool
    clipped: int
    failure: str | None
    retries: int
    latencies: tuple[float, ...]
    actions: np.ndarray

    def to_plain(self) -> dict[str, Any]:
        """All but the actions, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "actions"}


class PolicyError(ValueError):
    """Actions that no environment should see."""


class RolloutError(RuntimeError):
    """Episodes that say nothing about the policy.

    Attributes:
        episodes: those that ended, failures included.
    """

    def __init__(self, message: str, episodes: Sequence[Episode] = ()) -> None:
        super().__init__(message)
        self.episodes = list(episodes)


def rollout(
    policy: RunnablePolicy,
    task: str,
    *,
    task_options: Mapping[str, Any] | None = None,
    seeds: Sequence[int],
    workers: int = 0,
    batch: int = 25,
    noise_seed: int = 0,
    ensemble: float | None = None,
    timeout_s: float = 300.0,
    failure_cap: float = 0.1,
    progress: Progress | None = None,
    make: MakeEnvironment = envs.make,
) -> list[Episode]:
    """Run one episode per seed, executing Ta of every predicted chunk (receding horizon), or averages of chunks.

    Args:
        policy: on its device.
        task: name in `envs.TASKS`.
        task_options: keywords of `envs.make`, such as `observation` and `action`.
        seeds: one per episode.
        workers: processes that simulate; 0: this one does, which notices no environment that hangs.
        batch: episodes that run at once, each in an environment of its own; the policy always sees this many rows.
        noise_seed: chooses the policy's noise, with the episode's seed and the number of the chunk.
        ensemble: decay of a `TemporalEnsemble`: predict at every step, and execute the mean of what all chunks say of
            it; None executes Ta actions of each chunk.
        timeout_s: longest that a worker may take for a reset or a slice before it counts as hung.
        failure_cap: share of episodes whose environment may raise.
        progress: counts episodes as they end.
        make: `make(task, **task_options)` makes an environment; a function that a new process can import.

    Raises:
        PolicyError: what the policy returns is not finite, or of a wrong shape, type or device.
        UserError: the environment can't be made.
        RolloutError: an episode lost its worker three times, or more environments raised than `failure_cap` allows.

    Returns:
        The episodes, in order of `seeds`.
    """
    if batch < 1 or workers < 0:
        raise ValueError(f"batch and workers: expected at least 1 and 0, found {batch} and {workers}")
    setup = Setup(make, task, dict(task_options or {}), policy.obs_steps)
    size = min(batch, len(seeds))
    episodes: list[Episode] = []
    with _crew(setup, min(workers, size), timeout_s) as crew:
        for first in range(0, len(seeds), size or 1):
            block = [int(seed) for seed in seeds[first : first + size]]
            averaged = None if ensemble is None else TemporalEnsemble(ensemble)
            episodes += _Block(policy, crew, block, size, noise_seed, averaged, progress).run()
    _refuse_many_failures(task, episodes, failure_cap)
    return episodes


def replay(
    episodes: Sequence[Episode],
    task: str,
    *,
    task_options: Mapping[str, Any] | None = None,
    timeout_s: float = 300.0,
    make: MakeEnvironment = envs.make,
) -> list[Frames]:
    """Show episodes, by executing their actions again in a process that draws.

    Args:
        episodes: of `rollout`; none that failed.
        task, task_options, make: as they were for `rollout`.
        timeout_s: longest that an episode may take.

    Raises:
        RolloutError: they can't be drawn here.

    Returns:
        Pictures of each episode, at one rate and at most `MOST_FRAMES` + 1 of each.
    """
    every = math.ceil(max((episode.steps for episode in episodes), default=1) / MOST_FRAMES)
    worker = _Worker(Setup(make, task, dict(task_options or {}), obs_steps=1))
    try:
        shown = []
        for episode in episodes:
            worker.command(0, "frames", (episode.seed, episode.actions, every), timeout_s)
            if not worker.connection.poll(timeout_s):
                raise RolloutError(f"{task} can't be drawn: its worker gave no answer in {timeout_s:g} s")
            answer = worker.connection.recv()
            if isinstance(answer, CannotMake):
                raise RolloutError(f"{task} can't be drawn: {answer}")
            shown.append(answer)
        return shown
    except (EOFError, OSError) as error:
        raise RolloutError(f"{task} can't be drawn: its worker {worker.end()}") from error
    finally:
        worker.deadline = 0.0
        worker.end()


class _Block:
    """Episodes that run at once.

    Args:
        policy, crew, noise_seed, progress: as above.
        seeds: of the episodes.
        size: rows of a batch; where there are fewer seeds the last one fills it up.
        ensemble: of these episodes, empty; None where chunks are not averaged.
    """

    def __init__(
        self,
        policy: RunnablePolicy,
        crew: "_Crew",
        seeds: Sequence[int],
        size: int,
        noise_seed: int,
        ensemble: TemporalEnsemble | None,
        progress: Progress | None,
    ) -> None:
        self._policy, self._crew, self._seeds, self._noise_seed = policy, crew, seeds, noise_seed
        self._rows = [min(row, len(seeds) - 1) for row in range(size)]  # the episode that each row of the batch shows
        self._device = _device_of(policy)
        self._ensemble, self._progress = ensemble, progress
        self._latencies: list[list[float]] = [[] for _ in seeds]
        self._actions: list[list[np.ndarray]] = [[] for _ in seeds]

    def run(self) -> list[Episode]:
        reports = self._crew.start(self._seeds)
        self._count(reports)
        chunk = 0
        while live := [row for row, report in enumerate(reports) if not report.done]:
            actions, seconds = self._predict(reports, live, chunk)  # [B, Ta, A]
            for row in live:
                self._latencies[row].append(seconds)
                self._actions[row].append(actions[row])
            answers = self._crew.execute({row: actions[row] for row in live})
            self._count([answers[row] for row in live])
            reports = [answers.get(row, report) for row, report in enumerate(reports)]
            chunk += 1
        return [self._episode(row, report) for row, report in enumerate(reports)]

    def _predict(self, reports: Sequence[Report], live: Sequence[int], chunk: int) -> tuple[np.ndarray, float]:
        """The policy's actions for every row, and the seconds that they took."""
        observation = {key: value.to(self._device) for key, value in self._observation(reports, live).items()}
        draws = [
            generator(self._noise_seed, "rollout", self._seeds[row], chunk, device=self._device) for row in self._rows
        ]
        start = time.perf_counter()
        whole, policy = self._ensemble is not None, self._policy
        with torch.no_grad():
            actions = (policy.predict_chunk if whole else policy.predict)(observation, draws)
        steps = policy.horizon if whole else policy.action_steps
        _check_actions(actions, (len(self._rows), steps, *reports[0].action_shape), self._device, live)
        array = actions.cpu().numpy()  # waits for the device
        if self._ensemble is not None:
            self._ensemble.add(np.nan_to_num(array[:, policy.obs_steps - 1 :]))  # NaN: of finished rows alone
            array = self._ensemble.action().astype(np.float32)[:, None]  # [B, 1, A]
        return array, time.perf_counter() - start

    def _observation(self, reports: Sequence[Report], live: Sequence[int]) -> dict[str, Tensor]:
        seen = [report.observations for report in reports]
        rows = [seen[row] or seen[live[0]] or {} for row in self._rows]  # one that failed at reset has seen nothing
        return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}  # [B, To, ...]

    def _count(self, reports: Sequence[Report]) -> None:
        ended = [report for report in reports if report.done]
        if self._progress is not None and ended:
            self._progress.update(len(ended))

    def _episode(self, row: int, report: Report) -> Episode:
        nothing = [np.zeros((0, *report.action_shape), np.float32)]
        return Episode(
            seed=self._seeds[row],
            score=report.score,
            success=report.success,
            phases=report.phases,
            num_phases=report.num_phases,
            steps=report.steps,
            diverged=report.diverged,
            clipped=report.clipped,
            failure=report.failure,
            retries=self._crew.retries(row),
            latencies=tuple(self._latencies[row]),
            actions=np.concatenate(self._actions[row] or nothing)[: report.steps],
        )


class _Crew(Protocol):
    """Who simulates the episodes of a block."""

    def start(self, seeds: Sequence[int]) -> list[Report]:
        """Begin one episode per row."""
        ...

    def execute(self, actions: Mapping[int, np.ndarray]) -> dict[int, Report]:
        """Execute a slice `[Ta, A]` in each of these rows."""
        ...

    def retries(self, row: int) -> int:
        """Times that a row's episode was begun anew."""
        ...


@contextlib.contextmanager
def _crew(setup: Setup, workers: int, timeout_s: float) -> Iterator[_Crew]:
    if workers:
        processes = _Processes(setup, workers, timeout_s)
        try:
            yield processes
        finally:
            processes.close()
        return
    host = Host(setup)
    try:
        yield _InProcess(setup.task, host)
    finally:
        host.close()


class _InProcess:
    def __init__(self, task: str, host: Host) -> None:
        self._task, self._host = task, host

    def start(self, seeds: Sequence[int]) -> list[Report]:
        try:
            return [self._host.start(row, seed) for row, seed in enumerate(seeds)]
        except CannotMake as error:
            raise UserError(f"task {self._task}: {error}") from error

    def execute(self, actions: Mapping[int, np.ndarray]) -> dict[int, Report]:
        return {row: self._host.execute(row, chunk) for row, chunk in actions.items()}

    def retries(self, row: int) -> int:
        return 0


class _Worker:
    """A process with the rows it owns; it has at most one command at a time, so a full pipe blocks nobody."""

    def __init__(self, setup: Setup) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-c", SCRIPT, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # simulators greet
                start_new_session=True,  # Ctrl-C is the parent's
                env=os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)},  # it imports what we can
            )
        self.waiting: deque[int] = deque()  # rows whose command is still to be sent
        self.row: int | None = None  # the row at work
        self.deadline = math.inf
        self._send(setup)

    def command(self, row: int, name: str, arguments: tuple[Any, ...], timeout_s: float) -> None:
        self.row, self.deadline = row, time.monotonic() + timeout_s
        self._send((name, arguments))

    def end(self) -> str:
        """Kill it; what became of it, in words."""
        code = self.process.poll()
        try:
            code = self.process.wait(timeout=1) if code is None and time.monotonic() < self.deadline else code
        except subprocess.TimeoutExpired:
            code = None
        self.connection.close()
        self.process.kill()
        self.process.wait()
        if code is None:
            return "gave no answer in time"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # a process that is gone shows when its answer is read
            self.connection.send(message)


class _Processes:
    """Rows spread over worker processes; those of a lost worker are played again on a fresh one.

    Args:
        setup: what environments to make.
        workers: how many processes; row i belongs to the (i mod workers)-th.
        timeout_s: longest time for an answer.
    """

    def __init__(self, setup: Setup, workers: int, timeout_s: float) -> None:
        self._setup, self._timeout_s = setup, timeout_s
        self._workers = [_Worker(setup) for _ in range(workers)]
        self._seeds: list[int] = []
        self._chunks: list[list[np.ndarray]] = []  # what each row has been told to execute
        self._reports: dict[int, Report] = {}
        self._lost: list[int] = []
        self._must_start: set[int] = set()

    def start(self, seeds: Sequence[int]) -> list[Report]:
        self._seeds, self._chunks, self._lost = list(seeds), [[] for _ in seeds], [0] * len(seeds)
        self._reports = {}
        self._must_start = set(range(len(seeds)))
        self._run(range(len(seeds)))
        return [self._reports[row] for row in range(len(seeds))]

    def execute(self, actions: Mapping[int, np.ndarray]) -> dict[int, Report]:
        for row, chunk in actions.items():
            self._chunks[row].append(chunk)
        self._run(actions)
        return {row: self._reports[row] for row in actions}

    def retries(self, row: int) -> int:
        return self._lost[row]

    def close(self) -> None:
        for worker in self._workers:
            worker.deadline = 0.0
            worker.end()

    def _run(self, rows: Iterable[int]) -> None:
        """Have a command executed in each row."""
        for row in rows:
            self._workers[row % len(self._workers)].waiting.append(row)
        while True:
            for worker in self._workers:
                if worker.row is None and worker.waiting:
                    self._command(worker, worker.waiting.popleft())
            busy = [worker for worker in self._workers if worker.row is not None]
            if not busy:
                return
            left = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], timeout=max(0.0, left))
            for worker in busy:
                if worker.connection in ready:
                    self._receive(worker)
                elif time.monotonic() >= worker.deadline:
                    self._replace(worker)

    def _command(self, worker: _Worker, row: int) -> None:
        if row in self._must_start:
            self._must_start.remove(row)
            chunks = self._chunks[row]
            worker.command(row, "start", (row, self._seeds[row], chunks), self._timeout_s * (1 + len(chunks)))
        else:
            worker.command(row, "execute", (row, self._chunks[row][-1]), self._timeout_s)

    def _receive(self, worker: _Worker) -> None:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if isinstance(answer, CannotMake):
            raise UserError(f"task {self._setup.task}: {answer}")
        if worker.row is not None:
            self._reports[worker.row] = answer
        worker.row = None

    def _replace(self, worker: _Worker) -> None:
        """Put a fresh worker in the place of a lost one and play its unfinished episodes again."""
        row = worker.row
        if row is None:
            return
        reason = worker.end()
        self._lost[row] += 1
        if self._lost[row] >= TRIES:
            raise RolloutError(
                f"episode with seed {self._seeds[row]} of {self._setup.task}: its worker {reason}, "
                f"and so did {TRIES - 1} others before; expected an environment that answers"
            )
        slot = self._workers.index(worker)
        own = range(slot, len(self._seeds), len(self._workers))
        again = [each for each in own if each not in self._reports or not self._reports[each].done]
        self._must_start |= set(again)
        self._workers[slot] = _Worker(self._setup)
        self._workers[slot].waiting.extend(again)


def _device_of(policy: RunnablePolicy) -> torch.device:
    weight = next(policy.parameters(), None) if isinstance(policy, torch.nn.Module) else None
    return torch.device("cpu") if weight is None else weight.device


def _check_actions(actions: Any, shape: tuple[int, ...], device: torch.device, live: Sequence[int]) -> None:
    """Refuse what no environment should see; rows of finished episodes may hold anything."""
    if not isinstance(actions, Tensor):
        raise PolicyError(f"policy: expected a tensor of actions, found {type(actions).__name__}")
    if tuple(actions.shape) != shape:
        raise PolicyError(
            f"policy: expected actions [batch, action_steps, action_dim] = {list(shape)}, found {list(actions.shape)}"
        )
    if actions.dtype != torch.float32 or actions.device != device:
        raise PolicyError(f"policy: expected actions in float32 on {device}, found {actions.dtype} on {actions.device}")
    wrong = (~actions[list(live)].isfinite()).nonzero()  # [n, 3]
    if len(wrong):
        row, step, entry = wrong[0].tolist()
        raise PolicyError(
            f"policy: expected finite actions, found {actions[live[row], step, entry].item()} "
            f"at row {live[row]}, step {step}, entry {entry}"
        )


def _refuse_many_failures(task: str, episodes: Sequence[Episode], cap: float) -> None:
    failed = [episode for episode in episodes if episode.failure is not None]
    if len(failed) > cap * len(episodes):
        raise RolloutError(
            f"{task}: the environment raised in {len(failed)} of {len(episodes)} episodes, expected at most "
            f"{cap:.0%}; with seed {failed[0].seed}: {last_line(failed[0].failure or '')}",
            episodes,
        )


def last_line(text: str) -> str:
    """The error itself, the end of a traceback.

    >>> last_line("Traceback ...\\n  File ...\\nValueError: no cube\\n")
    'ValueError: no cube'
    """
    return text.strip().rpartition("\n")[2]
