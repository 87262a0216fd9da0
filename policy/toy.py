"""Two ways to act, learned in a minute: `python -m policy.toy`.

A chunk of actions is a path to one side or to the other, m(o) or -m(o) with equal odds, for a random observation o; one
demonstration is seen of each observation. A generative policy makes chunks near either mode, a regression their mean.
Writes a picture of sampled chunks and, as JSON, shares of chunks near a mode (within 25 % of its length), at the
mean (likewise), coherent (every step on the same side), of the first mode, and of observations with 30 to 70 % of it.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from driftfield.kernel import NormalizeOver
from driftfield.training import EMA, Progress, Update, generator, option, run_program
from driftfield.training.atomic_file import write_json
from driftfield.training.schedule import warmup_cosine
from policy.config import CONFIG_DIR, Method
from policy.draws import Draws
from policy.drifting_policy import LossOver
from policy.methods import METHODS
from policy.policy import Batch, Policy

OBSERVATION_DIM: Final = 2
ACTION_DIM: Final = 2
NEAR: Final = 0.25  # of a mode's length
TEST_OBSERVATIONS: Final = 500
TEST_CHUNKS: Final = 32  # of each
DRAWN: Final = 6  # observations in the picture
WARMUP: Final = 0.05  # of the steps


@dataclass(kw_only=True)
class ToyConfig:
    """Keys of `python -m policy.toy`."""

    out: Path = option("folder to write into")
    seeds: tuple[int, ...] = option("a training for each", min=0)
    method: Method = option("drifting; or a baseline: diffusion, regression")
    network: Literal["mlp", "unet1d"] = option("kind of network")
    horizon: int = option("T, actions of a chunk", min=1)
    steps: int | None = option("training steps; null: 2500 of mlp, 800 of unet1d", min=1)
    batch_size: int | None = option("observations per step; null: 64 of mlp, 32 of unet1d", min=1)
    learning_rate: float | None = option("peak learning rate; null: 8e-3 of mlp, 2e-3 of unet1d", above=0)
    ema_decay: float = option("decay of the average of the weights", min=0, below=1)
    generated: int = option("G, chunks generated per observation", min=1)
    temperatures: tuple[float, ...] = option("tau, multiples of the mean distance", above=0)
    normalize_over: NormalizeOver = option("softmax over: x keeps modes with one demonstration per observation")
    repulsion: float = option("factor on the push of other chunks; 1 in the paper", min=0)
    loss_over: LossOver = option("drift whole chunks, or every time step by itself")
    noise_skip: float = option("sigma: the output is net(z) + sigma z", min=0)

    @property
    def settings(self) -> "Settings":
        """What is set, or suits the network."""
        own = SETTINGS[self.network]
        return Settings(
            self.steps or own.steps, self.batch_size or own.batch_size, self.learning_rate or own.learning_rate
        )


class Settings(NamedTuple):
    """How a network is trained in about a minute."""

    steps: int
    batch_size: int
    learning_rate: float


SETTINGS: Final = {"mlp": Settings(2500, 64, 8e-3), "unet1d": Settings(800, 32, 2e-3)}


def modes(observation: Tensor, horizon: int) -> Tensor:
    """The path m(o) that a demonstration takes, or takes mirrored.

    Args:
        observation: `[B, 2]` in [-1, 1]: direction and length of the path.
        horizon: T.

    Returns:
        `[B, T, 2]`.

    >>> modes(torch.zeros(1, 2), 4).shape
    torch.Size([1, 4, 2])
    """
    time_ = torch.linspace(0, 1, horizon)
    angle, length = math.pi * observation[:, :1], 0.6 + 0.3 * observation[:, 1:]
    forward = length * angle.cos() * (math.pi / 2 * time_ + 0.2).sin()
    sideways = length * angle.sin() * (0.3 + time_)
    return torch.stack([forward, sideways], -1)


def build_policy(config: ToyConfig, seed: int) -> Policy:
    """The policy of a seed; observations and actions are left as they are."""
    networks: dict[str, dict[str, Any]] = {
        "mlp": {"name": "mlp", "width": 256, "depth": 3},
        "unet1d": {"name": "unet1d", "channels": [32, 64], "step_dim": 32},
    }
    options: dict[str, Any] = {}
    if config.method == "drifting":
        loss = {
            "temperatures": list(config.temperatures),
            "normalize_over": config.normalize_over,
            "repulsion": config.repulsion,
        }
        options = {
            "generated": config.generated, "loss_over": config.loss_over, "noise_skip": config.noise_skip, "loss": loss,
        }  # fmt: skip
    identity = {key: [{"size": 2, "mode": "identity"}] for key in ("state", "action")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = METHODS[config.method](
            shapes={"state": (OBSERVATION_DIM,)}, action_dim=ACTION_DIM, normalizer={"parts": identity},
            network=networks[config.network], obs_steps=1, horizon=config.horizon, action_steps=config.horizon,
            **options,
        )  # fmt: skip
    corners = torch.tensor([[-2.0, -2.0], [2.0, 2.0]]).numpy()
    policy.normalizer.fit({"state": corners, "action": corners})
    return policy


def train(policy: Policy, config: ToyConfig, seed: int) -> Mapping[str, Tensor]:
    """Train; the averaged weights are left in the policy. Returns what the last step said."""
    optimizer = torch.optim.AdamW(policy.network.parameters(), weight_decay=1e-4, fused=True)
    ema = EMA(policy, decays=(config.ema_decay,), warmup=True)
    update = Update(policy, optimizer, ema, clip_norm=2.0)
    steps, batch_size, learning_rate = config.settings
    samples = steps * batch_size
    values: Mapping[str, Tensor] = {}
    with Progress(samples, unit="observations") as progress:
        for step in range(steps):
            draws = generator(seed, "toy", step)
            observation, actions = demonstrations(batch_size, config.horizon, draws)
            output = policy.loss(Batch({"state": observation[:, None]}, actions[:, None]), Draws(draws))
            optimizer.zero_grad()
            output.loss.mean().backward()
            update(
                warmup_cosine(
                    step * batch_size, peak=learning_rate, warmup_samples=int(WARMUP * samples),
                    total_samples=samples,
                )
            )  # fmt: skip
            values = output.values
            progress.update(batch_size, **{name: float(value) for name, value in values.items()})
    policy.network.load_state_dict(
        {name.removeprefix("network."): each for name, each in ema.weights().items() if name.startswith("network.")}
    )
    return values


def demonstrations(count: int, horizon: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Observations `[count, 2]` and one demonstrated chunk `[count, T, 2]` of each."""
    observation = torch.rand(count, OBSERVATION_DIM, generator=draws) * 2 - 1
    side = torch.randint(2, (count, 1, 1), generator=draws) * 2 - 1
    return observation, side * modes(observation, horizon)


@torch.no_grad()
def measure(policy: Policy, config: ToyConfig) -> dict[str, float]:
    """Shares over 32 chunks of each of 500 fresh observations, as the module says."""
    draws = generator(0, "toy test")
    observation = torch.rand(TEST_OBSERVATIONS, OBSERVATION_DIM, generator=draws) * 2 - 1
    chunks = sample(policy, observation, TEST_CHUNKS)  # [500, 32, T, 2]
    mode = modes(observation, config.horizon)[:, None]  # [500, 1, T, 2]
    length = mode.flatten(2).norm(dim=-1)  # [500, 1]
    to_first, to_second, to_mean = ((chunks - other).flatten(2).norm(dim=-1) / length for other in (mode, -mode, 0.0))
    side = (chunks * mode).sum(-1) > 0  # [500, 32, T]
    first = to_first < to_second  # [500, 32]
    share = first.float().mean(1)
    return {
        "near": (torch.minimum(to_first, to_second) < NEAR).float().mean().item(),
        "collapsed": (to_mean < NEAR).float().mean().item(),
        "coherent": (side.all(-1) | ~side.any(-1)).float().mean().item(),
        "first_mode": first.float().mean().item(),
        "balanced": ((share >= 0.3) & (share <= 0.7)).float().mean().item(),
    }


def sample(policy: Policy, observation: Tensor, count: int) -> Tensor:
    """`count` chunks of each observation, `[B, count, T, 2]`."""
    cond = policy.encode({"state": observation[:, None]}).repeat_interleave(count, 0)
    draws = [generator(0, "toy chunk", row) for row in range(len(cond))]
    return policy.sample(cond, draws).unflatten(0, (len(observation), count))


@torch.no_grad()
def draw(policy: Policy, config: ToyConfig, path: Path) -> None:
    """Picture of the chunks of a few observations, over the two modes."""
    observation = torch.rand(DRAWN, OBSERVATION_DIM, generator=generator(0, "toy picture")) * 2 - 1
    chunks, mode = sample(policy, observation, TEST_CHUNKS), modes(observation, config.horizon)
    figure, axes = plt.subplots(1, DRAWN, figsize=(2.2 * DRAWN, 2.4), layout="constrained")
    for axis, some, path_ in zip(axes, chunks, mode, strict=True):
        for sign in (1, -1):
            axis.plot(*(sign * path_.T), color="0.75", linewidth=6, solid_capstyle="round")
        for chunk in some:
            axis.plot(*chunk.T, color="tab:blue", linewidth=0.8, marker=".", markersize=2)
        axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[], aspect="equal")
    figure.suptitle(f"{config.method}: {TEST_CHUNKS} chunks of each observation (blue), its two modes (grey)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(config: ToyConfig) -> int:
    """Train and measure every seed, draw the first."""
    config.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in config.seeds:
        start = time.monotonic()
        policy = build_policy(config, seed)
        last = train(policy, config, seed)
        policy.eval()
        result = {"seed": seed, **measure(policy, config), "seconds": round(time.monotonic() - start, 1)}
        results.append(result | {f"training_{name}": float(value) for name, value in last.items()})
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
            )
        )
        if seed == config.seeds[0]:
            draw(policy, config, config.out / f"{config.method}_{config.network}.png")
    write_json(config.out / f"{config.method}_{config.network}.json", {"results": results})
    print(f"pictures and figures: {config.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main, ToyConfig, config_dir=CONFIG_DIR, config_name="toy", description=__doc__ or ""))
