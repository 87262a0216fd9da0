"""Collect demonstrations by a task's scripted expert: `python -m policy.collect task=block_push episodes=1000`.

Episodes have the seeds first_seed, first_seed + 1, ... until enough have succeeded. An episode is a function of its
seed, and they are stored in order of their seeds, so the result does not depend on the number of workers nor on
interruptions. Until all are there they wait in OUT.partial; the same command goes on from there.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import LifoQueue
from typing import Any, Final, Literal

import numpy as np

import envs
from driftfield.training import Progress, RunFolder, RunFolderError, StopRequest, UserError, option, run_program
from driftfield.training.atomic_file import parse_json, write_json
from policy.collect_worker import Record, Settings, episode_file, record_file
from policy.replay_buffer import EPISODES, ReplayBuffer

CONFIG_DIR: Final = Path(__file__).parents[1] / "configs" / "policy"
DATA_DIR: Final = Path("data/robots")
FACTS: Final = "facts.json"
COLLECTED_WITH: Final = "collected_with"  # attribute: the options that decide what is collected
TRIES: Final = 3  # of an episode whose worker dies
SPARE_FAILURES: Final = 10
ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(kw_only=True)
class CollectConfig:
    """Keys of `python -m policy.collect`."""

    task: str = option("one of envs.TASKS, such as block_push")
    out: Path | None = option("zarr folder to write; null: data/robots/TASK.zarr")
    episodes: int = option("how many to collect", min=1)
    workers: int = option("processes that simulate", min=1)
    first_seed: int = option("seed of the first episode; the next ones count up", min=0)
    observation: Literal["state", "image"] = option("the whole state as numbers, or cameras and proprioception")
    action: Literal["absolute", "delta"] | None = option("kind of action, where the task has both; null: its default")
    action_noise: float = option(
        "standard deviation of noise on executed actions, in their unit; clean ones are stored", min=0
    )
    phases: int | None = option("phases that an episode has to complete; null: those that the expert aims at", min=1)
    success_only: bool = option("leave out episodes that do not complete them")
    max_failures: int | None = option(
        "episodes that may fail before collecting stops; null: 10 more than episodes", min=0
    )

    @property
    def folder(self) -> Path:
        """Where the demonstrations go."""
        return self.out or DATA_DIR / f"{self.task}.zarr"

    @property
    def settings(self) -> Settings:
        """What an episode depends on, with its seed."""
        return Settings(
            task=self.task,
            observation=self.observation,
            action=self.action,
            action_noise=self.action_noise,
            phases=self.phases,
            success_only=self.success_only,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What the collected episodes depend on."""
        return {**self.settings._asdict(), "first_seed": self.first_seed}


def main(config: CollectConfig) -> int:
    """Collect, or go on; nothing is left to do where the demonstrations are there."""
    if config.task not in envs.TASKS:
        raise UserError(f"task: expected one of {', '.join(envs.TASKS)}, found {config.task!r}")
    partial = config.folder.with_name(f"{config.folder.name}.partial")
    if config.folder.exists():
        print(_describe(config.folder, _finished(config)))
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed at its very end
        return 0
    with _open(partial, config) as folder, StopRequest() as stop:
        collection = _Collection(config, folder)
        collection.run(stop)
        if stop.requested:
            print(f"{collection.kept} of {config.episodes} episodes so far; the same command goes on", file=sys.stderr)
            return stop.exit_code
        buffer = collection.join()
        try:
            buffer.save(config.folder)
        except OSError as error:
            raise UserError(f"out: expected a place that can be written, found {config.folder}: {error}") from error
    shutil.rmtree(partial)
    print(_describe(config.folder, buffer))
    return 0


class _Collection:
    """The episodes of a folder, and those that are still missing.

    Args:
        config: what to collect.
        folder: the episodes so far.
    """

    def __init__(self, config: CollectConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._records = {record.seed: record for record in _read_records(folder)}

    @property
    def kept(self) -> int:
        """Episodes so far, without failures."""
        return sum(not record.failure for record in self._records.values())

    def run(self, stop: StopRequest) -> None:
        """Play what is missing, until a stop is requested.

        Raises:
            UserError: the task can't be played here, too many episodes fail, or a worker dies again and again.
        """
        config = self._config
        self._check_failures()
        with (
            _Workers(self._folder, config.settings, config.workers) as workers,
            ThreadPoolExecutor(config.workers) as threads,
            Progress(config.episodes, initial=min(self.kept, config.episodes), unit="episodes") as progress,
        ):
            running: dict[Future[Record], int] = {}
            while True:
                while len(running) < config.workers and not stop.requested:
                    seed = next_seed(self._records, running.values(), config.first_seed, config.episodes)
                    if seed is None:
                        break
                    running[threads.submit(workers.play, seed)] = seed
                if not running:
                    return
                ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    record = self._records[running.pop(future)] = future.result()
                    progress.update(int(not record.failure), failed=self._failed)
                self._check_failures()

    def join(self) -> ReplayBuffer:
        """All episodes in order of their seeds."""
        kept: list[Record] = []
        failed: list[Record] = []
        for _, record in sorted(self._records.items()):
            if len(kept) < self._config.episodes:
                (failed if record.failure else kept).append(record)
        attributes = {
            "task": self._config.task,
            "source": "expert",
            **parse_json((self._folder / FACTS).read_bytes()),
            COLLECTED_WITH: self._config.identity,
            "failed": [{"seed": record.seed, "failure": record.failure} for record in failed],
            EPISODES: [_known(record) for record in kept],
        }
        return ReplayBuffer.from_episodes((self._episode(record.seed) for record in kept), attributes)

    @property
    def _failed(self) -> int:
        return len(self._records) - self.kept

    def _check_failures(self) -> None:
        config = self._config
        allowed = config.episodes + SPARE_FAILURES if config.max_failures is None else config.max_failures
        if self._failed > allowed:
            last = max((record for record in self._records.values() if record.failure), key=lambda record: record.seed)
            raise UserError(
                f"task {config.task}: {self._failed} of {len(self._records)} episodes failed, "
                f"max_failures={allowed} are allowed; the last is seed {last.seed}: {last.failure}"
            )

    def _episode(self, seed: int) -> dict[str, np.ndarray]:
        with np.load(episode_file(self._folder, seed)) as arrays:
            return {key: arrays[key] for key in arrays.files}


class _Workers:
    """Processes that play episodes; each starts when it is first needed.

    Args:
        folder: where they write.
        settings: of the episodes.
        count: how many there may be at once.
    """

    def __init__(self, folder: Path, settings: Settings, count: int) -> None:
        self._folder, self._settings = folder, settings
        self._free: LifoQueue[subprocess.Popen[str] | None] = LifoQueue()
        self._started: list[subprocess.Popen[str]] = []
        for _ in range(count):
            self._free.put(None)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()  # what it has not written is played again
            process.communicate()

    def play(self, seed: int) -> Record:
        """Have an episode played, by a new worker where one dies over it.

        Raises:
            UserError: the task can't be played, or the workers die over this episode.
        """
        process = self._free.get()
        try:
            for _ in range(TRIES):
                process = process or self._start()
                answer = _ask(process, str(seed))
                if answer:
                    return Record(**json.loads(answer))
                process = None
        finally:
            self._free.put(process)
        raise UserError(f"task {self._settings.task}: seed {seed}: {TRIES} workers died over it, see the output above")

    def _start(self) -> subprocess.Popen[str]:
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        process = subprocess.Popen(
            [sys.executable, "-m", "policy.collect_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        self._started.append(process)
        answer = _ask(process, json.dumps([str(self._folder.absolute()), self._settings._asdict()]))
        if not answer:
            raise UserError(f"task {self._settings.task}: a worker died before its first episode, see the output above")
        facts = json.loads(answer)
        if "error" in facts:
            raise UserError(facts["error"])
        _require_same_facts(self._folder / FACTS, facts)
        return process


def next_seed(records: Mapping[int, Record], running: Collection[int], first: int, wanted: int) -> int | None:
    """The lowest seed still to be played, if those running do well and more are needed all the same.

    Args:
        records: of the seeds played.
        running: seeds being played.
        first: seed of the first episode.
        wanted: episodes to be kept.

    >>> next_seed({0: Record(0, "", True, 1.0, 1, 9)}, {1}, 0, 3), next_seed({}, {0, 1}, 0, 2)
    (2, None)
    """
    kept, seed = 0, first
    while kept < wanted:
        if seed in records:
            kept += not records[seed].failure
        elif seed in running:
            kept += 1
        else:
            return seed
        seed += 1
    return None


def _ask(process: subprocess.Popen[str], line: str) -> str:
    """A worker's answer; empty if it is dead."""
    if process.stdin is None or process.stdout is None:
        raise TypeError("a worker has pipes")
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


@contextmanager
def _open(partial: Path, config: CollectConfig) -> Iterator[Path]:
    try:
        with RunFolder(partial, config.identity) as folder:
            yield folder.path
    except RunFolderError as error:
        raise UserError(str(error).replace("run_dir=", "out=")) from error


def _finished(config: CollectConfig) -> ReplayBuffer:
    """Demonstrations that are there already.

    Raises:
        UserError: they are others than those asked for.
    """
    buffer = ReplayBuffer.load(config.folder, keys=[])
    expected = {**config.identity, "episodes": config.episodes}
    found = {**buffer.attributes.get(COLLECTED_WITH, {}), "episodes": len(buffer)}
    differing = [
        f"{key} (was {found.get(key, 'absent')}, now {value})"
        for key, value in expected.items()
        if key not in found or found[key] != value
    ]
    if differing:
        raise UserError(
            f"{config.folder} holds other demonstrations: {', '.join(differing)}; choose out=OTHER or delete it"
        )
    return buffer


def _require_same_facts(path: Path, facts: Mapping[str, Any]) -> None:
    if not path.exists():
        write_json(path, facts)
        return
    old = parse_json(path.read_bytes())
    differing = [f"{key} (was {old.get(key)}, now {facts[key]})" for key in facts if old.get(key) != facts[key]]
    if differing:
        raise UserError(
            f"{path.parent}: its episodes were played with another simulator: {', '.join(differing)}; "
            "choose out=OTHER or delete it"
        )


def _read_records(folder: Path) -> Iterator[Record]:
    for path in folder.glob(record_file(Path(), 0).name.replace("00000000", "*")):
        yield Record(**parse_json(path.read_bytes()))


def _known(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record._asdict().items() if key != "failure"}


def _describe(folder: Path, buffer: ReplayBuffer) -> str:
    failed = [entry["seed"] for entry in buffer.attributes["failed"]]
    listed = f" ({', '.join(map(str, failed[:10]))}{', ...' if len(failed) > 10 else ''})" if failed else ""
    return f"{len(buffer)} episodes of {buffer.num_steps} steps in {folder}; {len(failed)} seeds failed{listed}"


if __name__ == "__main__":
    sys.exit(run_program(main, CollectConfig, config_dir=CONFIG_DIR, config_name="collect", description=__doc__ or ""))
