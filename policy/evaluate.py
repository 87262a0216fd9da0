"""Roll trained policies out in simulation: `python -m policy.evaluate run_dir=runs/policy/arm_reach episodes=100`.

An episode's initial state and noise follow from its seed, so no number depends on the number of workers. Writes
RUN_DIR/evaluation/: eval_log.json (every episode, figures with intervals, versions, command), and a video of the first
successes and failures.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from driftfield.training import Progress, RunFolder, UserError, generator, option, run_program, to_plain
from driftfield.training.atomic_file import parse_json, write_json
from driftfield.training.device import Device, choose_device
from policy.config import CONFIG_DIR
from policy.methods import load_policy
from policy.policy import MODEL, SNAPSHOTS, Policy
from policy.rollout import Episode, PolicyError, RolloutError, rollout
from policy.success import Summary, best_and_last, summarize, table
from policy.video import film

WARM_UP: Final = 3  # predictions that are not timed
LOG, VIDEO = "eval_log.json", "episodes.mp4"


@dataclass(kw_only=True)
class EvaluateConfig:
    """Keys of `python -m policy.evaluate`."""

    run_dir: Path = option("folder of a run of policy.train, or of a saved policy")
    snapshots: int = option("newest snapshots of the run to roll out as well, for `max / last10`", min=0)
    episodes: int = option("episodes of each policy", min=1)
    first_seed: int = option("seed of the first episode; the next ones count up", min=0)
    noise_seed: int = option("seed of the policy's noise", min=0)
    workers: int = option("processes that simulate; 0: this one", min=0)
    batch: int = option("episodes at once, each in an environment of its own; changes the last bits of actions", min=1)
    max_steps: int | None = option("control steps after which an episode ends; null: the task's own number", min=1)
    ensemble: float | None = option(
        "decay of temporal ensembling, such as 0.01: predict at every step, execute the mean of all chunks; null: none"
    )
    device: Device = option("where the policy computes")
    latency_chunks: int = option("predictions for one robot that are timed; 0: none", min=0)
    show: int = option("successes in the video, and as many failures; 0: no video", min=0)
    timeout_s: float = option("seconds for a reset or a slice after which a worker counts as hung", above=0)
    failure_cap: float = option("share of episodes whose environment may raise", min=0, max=1)


class Latency(NamedTuple):
    """Seconds from one robot's observation to its actions, on the device and the threads of this process."""

    p50_s: float
    p95_s: float
    chunks: int


class Evaluation(NamedTuple):
    """A policy with its episodes.

    Attributes:
        name: of its folder inside the run.
        episodes: in order of their seeds.
        summary: their figures.
        latency: of a prediction; None if it was not asked for.
        seconds: that the episodes took.
    """

    name: str
    episodes: list[Episode]
    summary: Summary
    latency: Latency | None
    seconds: float


def main(config: EvaluateConfig) -> int:
    """Evaluate the policies of a run."""
    device = choose_device(config.device)
    folders = _policies(config.run_dir, config.snapshots)
    may_change = [field.name for field in fields(config)]
    with RunFolder(config.run_dir / "evaluation", config, may_change=may_change) as folder:
        evaluations: list[Evaluation] = []
        for name, path in folders.items():
            policy = _load(path, device)
            try:
                evaluations.append(_evaluate(config, name, policy))
            except RolloutError as error:
                if error.episodes:  # what there is helps to find out why
                    evaluations.append(Evaluation(name, error.episodes, summarize(error.episodes), None, 0.0))
                    write_json(folder.path / LOG, _record(config, folder.path, policy, evaluations))
                raise UserError(str(error)) from error
            except PolicyError as error:
                raise UserError(f"{path}: {error}") from error
            write_json(folder.path / LOG, _record(config, folder.path, policy, evaluations))
        print(_report(config, policy, evaluations))
        video = film(
            folder.path / VIDEO,
            evaluations[-1].episodes,
            policy.task,
            task_options=_task_options(config, policy),
            count=config.show,
            timeout_s=config.timeout_s,
        )
    print(f"written: {', '.join(str(path) for path in (folder.path / LOG, video) if path is not None)}")
    return 0


def _policies(run: Path, snapshots: int) -> dict[str, Path]:
    """Folders of policies by their names: the newest snapshots in order of training, then the finished one."""
    if (run / "config.json").exists():
        if snapshots:
            raise UserError(f"snapshots: expected 0 for the folder of a single policy, {run}, found {snapshots}")
        return {run.name: run}
    found = sorted((run / SNAPSHOTS).glob("*/config.json"), key=lambda path: (len(path.parent.name), path))
    if snapshots > len(found):
        raise UserError(f"snapshots: expected at most the {len(found)} in {run / SNAPSHOTS}, found {snapshots}")
    if not (run / MODEL / "config.json").exists():
        raise UserError(f"run_dir: expected the folder of a finished run of policy.train, or of a policy, found {run}")
    chosen = [path.parent for path in found[len(found) - snapshots :]]
    return {f"{SNAPSHOTS}/{path.name}": path for path in chosen} | {MODEL: run / MODEL}


def _load(path: Path, device: torch.device) -> Policy:
    try:
        return load_policy(path).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"run_dir: {error}") from error


class _Witness(nn.Module):
    """The policy, and the last thing that it was asked."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.obs_steps, self.horizon, self.action_steps = policy.obs_steps, policy.horizon, policy.action_steps
        self.observation: dict[str, Tensor] = {}

    def predict(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        self.observation = observation
        return self.policy.predict(observation, generators)

    def predict_chunk(self, observation: dict[str, Tensor], generators: Sequence[torch.Generator]) -> Tensor:
        self.observation = observation
        return self.policy.predict_chunk(observation, generators)


def _task_options(config: EvaluateConfig, policy: Policy) -> dict[str, Any]:
    """Keywords of `envs.make`."""
    return policy.task_options | ({} if config.max_steps is None else {"max_episode_steps": config.max_steps})


def _evaluate(config: EvaluateConfig, name: str, policy: Policy) -> Evaluation:
    witness = _Witness(policy)
    start = time.monotonic()
    with Progress(config.episodes, unit="episodes") as progress:
        episodes = rollout(
            witness,
            policy.task,
            task_options=_task_options(config, policy),
            seeds=range(config.first_seed, config.first_seed + config.episodes),
            workers=config.workers,
            batch=config.batch,
            noise_seed=config.noise_seed,
            ensemble=config.ensemble,
            timeout_s=config.timeout_s,
            failure_cap=config.failure_cap,
            progress=progress,
        )
    seconds = time.monotonic() - start
    return Evaluation(
        name, episodes, summarize(episodes), _latency(policy, witness.observation, config.latency_chunks), seconds
    )


def _latency(policy: Policy, observation: Mapping[str, Tensor], chunks: int) -> Latency | None:
    """Time predictions of a batch's first row; the first ones warm up."""
    if not (chunks and observation):
        return None
    row = {key: value[:1] for key, value in observation.items()}
    device = next(iter(row.values())).device
    times = []
    for chunk in range(WARM_UP + chunks):
        draw = generator(0, "latency", chunk, device=device)
        start = time.perf_counter()
        policy.predict(row, [draw]).cpu()  # waits for the device
        times.append(time.perf_counter() - start)
    median, late = np.quantile(times[WARM_UP:], [0.5, 0.95]).tolist()
    return Latency(median, late, chunks)


def _record(config: EvaluateConfig, folder: Path, policy: Policy, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """All that can be said of the evaluations so far, as plain data."""
    start = parse_json((folder / "run.json").read_bytes())["starts"][-1]
    return {
        "task": policy.task,
        "task_options": _task_options(config, policy),
        "config": to_plain(config),
        "start": start,
        "protocol": protocol(evaluations),
        "evaluations": [
            {
                "policy": each.name,
                "summary": each.summary._asdict(),
                "latency": None if each.latency is None else each.latency._asdict(),
                "seconds": each.seconds,
                "episodes": [
                    {key: value for key, value in episode.to_plain().items() if key != "latencies"}
                    for episode in each.episodes
                ],
            }
            for each in evaluations
        ],
    }


def protocol(evaluations: Sequence[Evaluation]) -> dict[str, Mapping[str, float]]:
    """The numbers of Diffusion Policy's tables, `max` and `last10`, of every figure over a training's snapshots.

    Args:
        evaluations: at least one, in order of training; the finished policy counts where there is no snapshot, since
            it is the last one again.
    """
    snapshots = [each.summary for each in evaluations if each.name.startswith(SNAPSHOTS)]
    summaries = snapshots or [each.summary for each in evaluations]
    figures = {"success": [each.success for each in summaries], "score": [each.score for each in summaries]}
    figures |= {f"p{k}": [each.phases[k - 1] for each in summaries] for k in range(1, 1 + len(summaries[0].phases))}
    return {name: best_and_last(values)._asdict() for name, values in figures.items()}


def _report(config: EvaluateConfig, policy: Policy, evaluations: Sequence[Evaluation]) -> str:
    last = evaluations[-1]
    lines = [
        f"{policy.task}, {config.episodes} episodes with seeds from {config.first_seed}, "
        f"{len(last.episodes) / last.seconds:.3g} episodes/s",
        table([(each.name, each.summary) for each in evaluations]),
    ]
    if len(evaluations) > 1:
        lines += [
            f"{name}: max {row['max']:.3f}, last10 {row['last10']:.3f}" for name, row in protocol(evaluations).items()
        ]
    if last.latency is not None:
        p50, p95, chunks = last.latency
        lines.append(f"latency of a chunk: p50 {1e3 * p50:.3g} ms, p95 {1e3 * p95:.3g} ms ({chunks} predictions)")
    if last.summary.clipped:
        lines.append(f"{last.summary.clipped:.2%} of the actions' entries lay outside the task's box and were clipped")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, EvaluateConfig, config_dir=CONFIG_DIR, config_name="evaluate", description=__doc__ or "")
    )
