"""What `python -m policy.train` can be told: one dataclass per part, its fields the keys of `configs/policy`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from driftfield.kernel import NormalizeOver
from driftfield.loss import Recipe
from driftfield.training import option
from driftfield.training.device import Device
from policy.demonstrations import Format
from policy.diffusion import Sampler
from policy.drifting_policy import LossOver

CONFIG_DIR: Final = Path(__file__).parents[1] / "configs" / "policy"
Method = Literal["drifting", "diffusion", "regression"]


@dataclass(kw_only=True)
class DemonstrationsConfig:
    """What is learned from."""

    path: Path | None = option("demonstrations; null: data/robots/TASK.zarr, collected by the task's expert if absent")
    format: Format = option("whose files they are")
    keep: int | None = option("episodes to learn from, chosen by a fixed seed; null: all but the held-out ones", min=1)
    held_out: float = option("share of the episodes that is not learned from", min=0, below=1)
    collect: int = option("episodes to collect where there are none", min=1)
    action_noise: float = option("noise on the collected episodes' executed actions, in their unit", min=0)


@dataclass(kw_only=True)
class NetworkConfig:
    """The action network; a key that its kind does not have is left alone."""

    name: Literal["mlp", "unet1d", "transformer"] = option("kind")
    width: int = option("mlp, transformer: channels", min=1)
    depth: int = option("mlp: hidden layers; transformer: layers", min=1)
    heads: int = option("transformer: attention heads", min=1)
    dropout: float = option("transformer: dropout of the attention", min=0, below=1)
    channels: tuple[int, ...] = option("unet1d: channels of each level", min=1)
    step_dim: int = option("unet1d: embedding of the diffusion step", min=4)


@dataclass(kw_only=True)
class DriftingConfig:
    """method=drifting."""

    generated: int = option("G, chunks generated per observation", min=1)
    positives: int = option("K, demonstrated chunks per observation: its own and those of its nearest ones", min=1)
    loss_over: LossOver = option("drift whole chunks, or every time step by itself")
    noise_skip: float = option("sigma: the output is net(z) + sigma z", min=0)
    temperatures: tuple[float, ...] = option("tau, multiples of the mean distance", above=0)
    temperature_start: float = option("factor of every tau at first; falls or rises geometrically to 1", above=0)
    temperature_fraction: float = option("first part of the training over which it does", min=0, max=1)
    recipe: Recipe = option("names the defaults of DriftingLoss")
    normalize_over: NormalizeOver = option("softmax over: x keeps modes with one demonstration per observation")
    attraction: float = option("factor on the pull of demonstrations", min=0)
    repulsion: float = option("factor on the push of other chunks", min=0)


@dataclass(kw_only=True)
class DiffusionConfig:
    """method=diffusion."""

    train_steps: int = option("steps of the noise process", min=1)
    sampler: Sampler = option("ddpm or ddim")
    steps: int = option("evaluations per chunk", min=1)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Rollouts during training and at its end."""

    every: int | None = option("samples between two evaluations; null: at the end alone", min=1)
    episodes: int = option("episodes of each", min=0)
    first_seed: int = option("seed of the first episode; the next ones count up", min=0)
    workers: int = option("processes that simulate; 0: none", min=0)
    batch: int = option("episodes that run at once", min=1)
    keep: int = option("policies to keep, the last ones and the best", min=1)
    videos: int = option("successes and failures to film at the end, each", min=0)


@dataclass(kw_only=True)
class TrainConfig:
    """Keys of `python -m policy.train`."""

    run_dir: Path = option("folder of the run; the same command goes on in it")
    seed: int = option("seed of initial weights, order, noise", min=0)
    device: Device = option("where to compute")
    compile: bool = option("compile the action network at the first step")
    task: str = option("one of envs.TASKS")
    observation: Literal["state", "image"] = option("the whole state as numbers, or cameras and proprioception")
    action: Literal["absolute", "delta"] | None = option("kind of action, where the task has both; null: its default")
    method: Method = option("drifting; or a baseline: diffusion, regression")
    demonstrations: DemonstrationsConfig = option("what is learned from")
    obs_steps: int = option("To, observations that a chunk follows from", min=1)
    horizon: int = option("T, actions of a chunk", min=1)
    action_steps: int = option("Ta, actions executed before the next prediction", min=1)
    crop: int | None = option("side of the crop of images, in pixels", min=33)
    frequencies: int = option("sines and cosines beside each number of an observation, at so many frequencies", min=0)
    differences: tuple[tuple[int, ...], ...] = option(
        "for each axis the entries of the state that are positions along it; their differences are seen too", min=0
    )
    trunk: tuple[int, ...] = option("channels of layers that see the observations alone, once for all chunks", min=1)
    network: NetworkConfig = option("the action network")
    drifting: DriftingConfig = option("of method=drifting")
    diffusion: DiffusionConfig = option("of method=diffusion")
    batch_size: int = option("observations per step", min=1)
    samples: int = option("observations to train on in all", min=1)
    learning_rate: float = option("peak learning rate", above=0)
    schedule: Literal["cosine", "constant"] = option("after the warm-up: half a cosine down to 0, or constant")
    warmup_samples: int = option("samples until the peak", min=0)
    betas: tuple[float, float] = option("AdamW's", min=0, below=1)
    weight_decay: float = option("AdamW's", min=0)
    clip_norm: float | None = option("largest norm of the gradient; null: none", above=0)
    ema_decay: float = option("decay of the average of the weights that is evaluated", min=0, below=1)
    log_every: int = option("samples between two lines of the log", min=1)
    checkpoint_every: int = option("samples between two checkpoints", min=1)
    evaluation: EvaluationConfig = option("rollouts")
    writers: tuple[Literal["tensorboard", "wandb"], ...] = option("further logs")

    def network_keywords(self) -> dict[str, Any]:
        """The keys that the chosen kind of network has."""
        network = self.network
        match network.name:
            case "mlp":
                keywords: dict[str, Any] = {"width": network.width, "depth": network.depth}
            case "unet1d":
                keywords = {"channels": list(network.channels), "step_dim": network.step_dim}
            case "transformer":
                keywords = {
                    "width": network.width, "depth": network.depth, "heads": network.heads, "dropout": network.dropout,
                }  # fmt: skip
        return {"name": network.name, **keywords}

    def method_keywords(self) -> dict[str, Any]:
        """What the chosen policy takes besides what all of them take."""
        drifting, diffusion = self.drifting, self.diffusion
        match self.method:
            case "drifting":
                return {
                    "generated": drifting.generated, "loss_over": drifting.loss_over, "noise_skip": drifting.noise_skip,
                    "loss": {
                        "temperatures": list(drifting.temperatures), "recipe": drifting.recipe,
                        "normalize_over": drifting.normalize_over, "attraction": drifting.attraction,
                        "repulsion": drifting.repulsion,
                    },
                }  # fmt: skip
            case "diffusion":
                return {
                    "train_steps": diffusion.train_steps, "sampler": diffusion.sampler, "steps": diffusion.steps,
                }  # fmt: skip
            case "regression":
                return {}
