"""Train a robot's policy from demonstrations and roll it out: `python -m policy.train`.

Without an argument: an arm that reaches a target behind an obstacle, on either side of it. Demonstrations are collected
by the task's scripted expert where there are none. To resume a run that was stopped or killed, run the same command
again. The loss of drifting is flat by construction; what falls are lambda, the norm of the drift, and nearest_error.
"""

import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

import envs
from driftfield.normalization import sum_over_processes
from driftfield.training import (
    EMA,
    Action,
    Progress,
    Stopped,
    StopRequest,
    Update,
    UserError,
    barrier,
    generator,
    is_main,
    process_group,
    require_equal,
    run_loop,
    run_program,
    run_to_results,
    share,
    to_yaml,
    warmup_constant,
    world_size,
)
from driftfield.training.atomic_file import parse_json, write_json
from driftfield.training.device import choose_device
from driftfield.training.schedule import annealed_factor, warmup_cosine
from driftfield.training.visits import Epochs, sample_ids
from policy.chunks import draw_chunks
from policy.collect import CollectConfig
from policy.collect import main as collect
from policy.config import CONFIG_DIR, TrainConfig
from policy.data_error import DataError
from policy.demonstrations import load_demonstrations
from policy.draws import Draws
from policy.drifting_policy import DriftingPolicy
from policy.methods import METHODS
from policy.neighbours import nearest_windows
from policy.normalizer import Normalizer, task_parts
from policy.policy import MODEL, SNAPSHOTS, Batch, Policy, PolicyLoss
from policy.replay_buffer import ACTION, ReplayBuffer
from policy.rollout import Episode, PolicyError, RolloutError, rollout
from policy.success import best_and_last, summarize, table
from policy.transformer import parameter_groups
from policy.video import film
from policy.windows import Windows, keep_episodes, validation_split

EVALUATIONS: Final = "evaluations"
RESULTS: Final = "results.json"
VIDEO: Final = "episodes.mp4"
CHUNKS: Final = "chunks.png"
DRAWN: Final = 6  # observations in it
HELD_OUT_WINDOWS: Final = 512  # whose errors an evaluation gives
WAIT_S: Final = 86_400.0  # of the other processes, while the main one collects or rolls out
COLLAPSE_WARNING: Final = 0.9  # share of collapsed groups
COLLAPSE_BATCHES: Final = 10  # over so many batches
# A resumed run may change what only concerns where it runs, not what it computes.
MAY_CHANGE: Final = (
    "run_dir", "demonstrations.path", "writers", "checkpoint_every", "log_every", "evaluation.every",
    "evaluation.episodes", "evaluation.first_seed", "evaluation.workers", "evaluation.keep", "evaluation.videos",
)  # fmt: skip


class Training:
    """Everything that changes during training, and the step that changes it.

    Args:
        config: as the program was told.
        buffer: demonstrations.
        device: where to compute.
    """

    def __init__(self, config: TrainConfig, buffer: ReplayBuffer, device: torch.device) -> None:
        self.config, self.device = config, device
        self.step_number = 0
        self.fingerprint = buffer.fingerprint
        self.policy = build_policy(config, buffer).to(device)
        keys = [ACTION, *self.policy.config["shapes"]]
        self._arrays = {key: torch.from_numpy(buffer.arrays[key]) for key in keys}
        split = validation_split(len(buffer), config.demonstrations.held_out)
        train = (
            split.train
            if config.demonstrations.keep is None
            else keep_episodes(split.train, config.demonstrations.keep)
        )
        self.windows = self._windows(buffer, train)
        self.held_out = self._windows(buffer, split.validation) if len(split.validation) else None
        self._positives = self._nearest()
        self._epochs = Epochs(len(self.windows), seed=config.seed)
        groups: Any = self.policy.named_parameters()
        if config.network.name == "transformer":
            groups = parameter_groups(self.policy, weight_decay=config.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema = EMA(self.policy, decays=(config.ema_decay,), warmup=True)
        self.update = Update(self.policy, self.optimizer, self.ema, clip_norm=config.clip_norm or float("inf"))
        if config.compile:
            self.policy.network.compile(dynamic=False)
        self._collapsed: list[Tensor] = []  # share of each batch after the warm-up, up to COLLAPSE_BATCHES of them

    @property
    def samples_per_step(self) -> int:
        """Observations of a step, those of all processes together."""
        return self.config.batch_size

    @property
    def samples_seen(self) -> int:
        """Observations trained on."""
        return self.step_number * self.samples_per_step

    def step(self) -> dict[str, float | Tensor]:
        """One training step on the part of the batch that this process computes."""
        size = self.config.batch_size
        visits = self._epochs(self.step_number * size, size)
        mine = range(size)[share(size)]
        batch = self._batch(
            self.windows, sample_ids(visits, len(self.windows))[mine.start : mine.stop], self._positives
        )
        noise = generator(self.config.seed, "noise", self.step_number, 0, device=self.device)
        self.policy.train()
        self.optimizer.zero_grad(set_to_none=True)
        output = self._loss(batch, Draws(noise, mine, size))
        (output.loss.sum() / size).backward()
        gradient_norm = self.update(self._learning_rate())
        self.step_number += 1
        values = mean_over_processes({"loss": output.loss.detach().mean(), **output.values})
        self._warn_of_collapse(values)
        return {
            **values,
            "gradient_norm": gradient_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "rejected_steps": self.update.rejected,
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors a resumed run needs, for a checkpoint."""
        return self.update.tensors()

    def state(self) -> dict[str, Any]:
        """Everything else it needs; randomness is a function of (seed, step) and has no state."""
        return {"data": self.fingerprint, **self.update.state()}

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Take over a checkpoint's `tensors` and `state`.

        Raises:
            UserError: they are of a training on other demonstrations.
        """
        if state["data"] != self.fingerprint:
            raise UserError(
                f"demonstrations: expected those that this run began with, fingerprint {state['data']}, "
                f"found {self.fingerprint}; choose run_dir=OTHER for others"
            )
        self.step_number = step
        self.update.restore(tensors, state)

    @torch.no_grad()
    def held_out_errors(self) -> dict[str, float]:
        """The policy's values on held-out windows, with the same noise at every time; none if none are held out."""
        if self.held_out is None:
            return {}
        chosen = torch.linspace(0, len(self.held_out) - 1, min(HELD_OUT_WINDOWS, len(self.held_out))).long()
        self.policy.eval()
        errors = self.policy.errors(
            self._batch(self.held_out, chosen, None), Draws(generator(self.config.seed, "held out", device=self.device))
        )
        return {f"held_out_{name}": value.item() for name, value in errors.items()}

    def draw_chunks(self, path: Path) -> Path | None:
        """Write a picture of chunks at the beginnings of episodes; None where actions are no positions in a plane."""
        if self.policy.action_dim != 2 or self.policy.task_options.get("action") == "delta":
            return None
        windows = self.held_out or self.windows
        starts = windows.first_windows[:DRAWN]
        with self.ema.swapped():
            self.policy.eval()
            draw_chunks(self.policy, self._batch(windows, torch.from_numpy(starts), None), path)
        return path

    def _windows(self, buffer: ReplayBuffer, episodes: np.ndarray) -> Windows:
        config = self.config
        return Windows(
            buffer.episode_ends,
            horizon=config.horizon,
            pad_before=config.obs_steps - 1,
            pad_after=config.action_steps - 1,
            episodes=episodes,
        )

    def _nearest(self) -> Tensor | None:
        """Windows whose chunks are the positives of each window, `[W, K]`, itself first; None if K = 1."""
        if self.config.method != "drifting" or self.config.drifting.positives == 1:
            return None
        numbers = [
            self.policy.normalizer.normalize(key, self._arrays[key]) for key in self.policy.encoder.numbers
        ]  # [N, D] each
        rows = torch.from_numpy(self.windows.indices(np.arange(len(self.windows))))[:, : self.config.obs_steps]
        try:
            return nearest_windows(torch.cat(numbers, -1)[rows].flatten(1), self.config.drifting.positives)
        except ValueError as error:
            raise UserError(f"drifting.positives: {error}") from error

    def _batch(self, windows: Windows, numbers: Tensor, positives: Tensor | None) -> Batch:
        chosen = numbers[:, None] if positives is None else positives[numbers]  # [B, K]
        rows = torch.from_numpy(windows.indices(chosen.flatten().numpy())).unflatten(0, chosen.shape)  # [B, K, T]
        seen = rows[:, 0, : self.config.obs_steps]  # [B, To]
        return Batch(
            {key: self._arrays[key][seen].to(self.device) for key in self._arrays if key != ACTION},
            self._arrays[ACTION][rows].to(self.device),
        )

    def _loss(self, batch: Batch, draws: Draws) -> PolicyLoss:
        if not isinstance(self.policy, DriftingPolicy):
            return self.policy.loss(batch, draws)
        config = self.config
        factor = annealed_factor(
            self.samples_seen,
            start=config.drifting.temperature_start,
            total_samples=config.samples,
            fraction=config.drifting.temperature_fraction,
        )
        return self.policy.loss(batch, draws, temperature_factor=factor)

    def _learning_rate(self) -> float:
        config = self.config
        if config.schedule == "cosine":
            return warmup_cosine(
                self.samples_seen,
                peak=config.learning_rate,
                warmup_samples=config.warmup_samples,
                total_samples=config.samples,
            )
        return warmup_constant(self.samples_seen, peak=config.learning_rate, warmup_samples=config.warmup_samples)

    def _warn_of_collapse(self, values: Any) -> None:
        """Once: the chunks of an observation agree. Right where a task has one mode, a failure where it has two."""
        generated = self.config.drifting.generated
        past_warmup = self.samples_seen > max(self.config.warmup_samples, self.config.samples // 10)
        if "collapsed" not in values or generated == 1 or not past_warmup or len(self._collapsed) == COLLAPSE_BATCHES:
            return
        self._collapsed.append(values["collapsed"])
        if len(self._collapsed) < COLLAPSE_BATCHES or not is_main():
            return
        share_collapsed = torch.stack(self._collapsed).mean().item()
        if share_collapsed > COLLAPSE_WARNING:
            print(
                f"note: in {share_collapsed:.0%} of the observations all {generated} chunks agree. "
                "If demonstrations of one observation differ, the policy averages them: see "
                "drifting.normalize_over=x, drifting.repulsion=0, drifting.noise_skip",
                flush=True,
            )


def mean_over_processes(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each value `[]` over all processes, whose parts of a batch are equally large.

    >>> mean_over_processes({"loss": torch.tensor(9.0)})
    {'loss': tensor(9.)}
    """
    means = sum_over_processes(torch.stack(list(values.values()))) / world_size()
    return dict(zip(values, means.unbind(), strict=True))


def build_policy(config: TrainConfig, buffer: ReplayBuffer) -> Policy:
    """The policy of a configuration, its normaliser fitted, its initial weights a function of the seed.

    Raises:
        UserError: the demonstrations lack what the task observes, or sizes do not fit.
    """
    arrays = buffer.arrays
    keys = [key for key in arrays if key != ACTION and (config.observation == "image" or key == "state")]
    if not keys or (config.observation == "image" and all(arrays[key].ndim == 2 for key in keys)):
        wanted = "a camera" if config.observation == "image" else "the observation 'state'"
        raise UserError(f"demonstrations: expected {wanted}, found {', '.join(arrays)}")
    sizes = {key: arrays[key].shape[-1] for key in (*keys, ACTION) if arrays[key].ndim == 2}
    kind = _action_kind(config, buffer)
    options: dict[str, Any] = {"observation": config.observation}
    if config.action is not None or kind == "delta":
        options["action"] = kind
    try:
        normalizer = Normalizer(task_parts(config.task, sizes, observation=config.observation, action=kind))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            policy = METHODS[config.method](
                shapes={key: arrays[key].shape[1:] for key in keys},
                action_dim=arrays[ACTION].shape[-1],
                normalizer=normalizer.config,
                network=config.network_keywords(),
                obs_steps=config.obs_steps,
                horizon=config.horizon,
                action_steps=config.action_steps,
                crop=config.crop,
                frequencies=config.frequencies,
                differences=config.differences,
                trunk=config.trunk,
                task=config.task,
                task_options=options,
                **config.method_keywords(),
            )
    except ValueError as error:
        raise UserError(str(error)) from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy.normalizer.fit(arrays)
    for warning in caught:
        print(f"note: {warning.message}")
    return policy


def _action_kind(config: TrainConfig, buffer: ReplayBuffer) -> Literal["absolute", "delta"]:
    """What the demonstrations' actions are, where they say it, else what the configuration says.

    Raises:
        UserError: they are of another task or kind than the configuration names, or of a kind that no task takes.
    """
    task, kind = buffer.attributes.get("task", config.task), buffer.attributes.get("action")
    if task != config.task:
        raise UserError(f"demonstrations: expected those of task={config.task}, found those of {task}")
    if kind not in (None, "absolute", "delta") or (config.action is not None and kind not in (None, config.action)):
        expected = f"action={config.action}" if config.action else "absolute or delta actions"
        raise UserError(f"demonstrations: expected {expected}, found {kind} actions")
    found: Literal["absolute", "delta"] = kind or config.action or "absolute"
    return found


def load_buffer(config: TrainConfig) -> ReplayBuffer:
    """The demonstrations of a configuration; those of the task's expert are collected where there are none.

    Raises:
        UserError: there are none, and none can be collected.
    """
    wanted = config.demonstrations
    path = wanted.path
    if path is None:
        collection = CollectConfig(
            task=config.task, out=None, episodes=wanted.collect, workers=max(1, config.evaluation.workers),
            first_seed=0, observation=config.observation, action=config.action, action_noise=wanted.action_noise,
            phases=None, success_only=True, max_failures=None,
        )  # fmt: skip
        path = collection.folder
        if is_main():
            _collect(collection)
        barrier()
    try:
        return load_demonstrations(path, format=wanted.format)
    except DataError as error:
        raise UserError(str(error)) from error


def _collect(collection: CollectConfig) -> None:
    """Collect, go on with it, or see that what is there is what is asked for."""
    try:
        code = collect(collection)
    except UserError as error:
        raise UserError(f"{error}; demonstrations.path={collection.folder} takes what is there as it is") from error
    if code:
        raise Stopped(code)


class Evaluations:
    """Rollouts of the averaged policy on the way: a file each, and the policies of the last and the best.

    Args:
        training: whose policy.
        folder: the run's folder.
    """

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.config = training, training.config.evaluation
        self.folder, self.snapshots = folder / EVALUATIONS, folder / SNAPSHOTS
        self._episodes: list[Episode] = []  # of the last one

    def evaluate(self) -> None:
        """Roll out and write the result, unless it is there from before a resume or training has not begun."""
        training, name = self.training, f"{self.training.samples_seen:012d}"
        file = self.folder / f"{name}.json"
        if training.samples_seen == 0 or file.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with training.ema.swapped():
            training.policy.eval()
            result: dict[str, Any] = {"samples": training.samples_seen, **training.held_out_errors()}
            if self.config.episodes:
                start = time.monotonic()
                self._episodes = self._roll_out()
                summary = summarize(self._episodes)
                print(table([(f"{training.samples_seen} samples", summary)]), flush=True)
                result |= {"summary": summary._asdict(), "rollout_s": round(time.monotonic() - start, 1)}
            training.policy.save_pretrained(self.snapshots / name)
        write_json(file, result)
        self._forget_old()

    def results(self) -> list[dict[str, Any]]:
        """All of them in order."""
        return [parse_json(file.read_bytes()) for file in sorted(self.folder.glob("*.json"))]

    def film(self, path: Path) -> Path | None:
        """Write a video of the first successes and failures of the finished policy; None if nothing can be filmed."""
        policy, config = self.training.policy, self.config
        if not (config.videos and config.episodes):
            return None
        if not self._episodes:  # they were of a start before this one
            with self.training.ema.swapped():
                policy.eval()
                self._episodes = self._roll_out()
        return film(path, self._episodes, policy.task, task_options=policy.task_options, count=config.videos)

    def _roll_out(self) -> list[Episode]:
        policy, config = self.training.policy, self.config
        seeds = range(config.first_seed, config.first_seed + config.episodes)
        with Progress(config.episodes, unit="episodes") as progress:
            return rollout(
                policy, policy.task, task_options=policy.task_options, seeds=seeds, workers=config.workers,
                batch=config.batch, noise_seed=self.training.config.seed, progress=progress,
            )  # fmt: skip

    def _forget_old(self) -> None:
        results = self.results()
        best = max(results, key=_score)["samples"]
        kept = {result["samples"] for result in results[-self.config.keep :]} | {best}
        for folder in self.snapshots.iterdir():
            if int(folder.name) not in kept:
                shutil.rmtree(folder)


def _score(result: dict[str, Any]) -> float:
    return float(result.get("summary", {}).get("score", 0.0))


def run(config: TrainConfig, buffer: ReplayBuffer, device: torch.device, stop: StopRequest) -> None:
    """Train to the end, from the newest checkpoint if there is one, then write the policy and `results.json`.

    Raises:
        Stopped: a stop was requested; the checkpoint is written.
        UserError: the data, the folder or the disk do not allow it, or gradients stay not finite.
    """
    start, folder = time.monotonic(), config.run_dir
    training = Training(config, buffer, device)
    evaluations = Evaluations(training, folder)
    if is_main():
        print(
            f"{config.method} on {config.task}: {len(buffer)} episodes, {len(training.windows)} windows, "
            f"{sum(parameter.numel() for parameter in training.policy.parameters()):,} parameters",
            flush=True,
        )
    try:
        run_loop(
            training,
            folder,
            stop,
            name="train",
            samples=config.samples,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            shown=("loss", "nearest_error") if config.method == "drifting" else ("loss",),
            actions=[Action(config.evaluation.every or config.samples, evaluations.evaluate)],
            writers=config.writers,
            unit="samples",
        )
    except (RolloutError, PolicyError) as error:
        raise UserError(str(error)) from error
    if is_main():
        with training.ema.swapped():
            training.policy.save_pretrained(folder / MODEL)
        results = evaluations.results()
        scores = best_and_last([_score(result) for result in results])
        video = evaluations.film(folder / VIDEO)
        chunks = training.draw_chunks(folder / CHUNKS)
        write_json(
            folder / RESULTS,
            {
                "samples_seen": training.samples_seen,
                "parameters": sum(parameter.numel() for parameter in training.policy.parameters()),
                "device": str(device),
                "this_start_s": round(time.monotonic() - start, 1),
                "best_score": scores.max,
                "last_10_mean_score": scores.last10,
                "last_evaluation": results[-1],
            },
        )
        written = [path for path in (folder / MODEL, folder / RESULTS, chunks, video) if path is not None]
        print(f"written: {', '.join(map(str, written))}")
    barrier()


def main(config: TrainConfig) -> int:
    """Train, roll out, and say where everything is."""
    if config.task not in envs.TASKS:
        raise UserError(f"task: expected one of {', '.join(envs.TASKS)}, found {config.task!r}")
    device = choose_device(config.device)
    with process_group(device, timeout_s=WAIT_S), StopRequest() as stop:
        try:
            buffer = load_buffer(config)
        except Stopped as stopped:
            return int(stopped.args[0])
        require_equal(config=to_yaml(config), data=buffer.fingerprint)
        share(config.batch_size, "batch_size")  # refused here rather than in the first step
        return run_to_results(
            config, lambda: run(config, buffer, device, stop), stop, results=RESULTS, may_change=MAY_CHANGE
        )


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description=__doc__ or "")
    )
