"""What `python -m vision.train_rival` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from driftfield.training import option
from driftfield.training.device import Device
from vision.config import GeneratorConfig, JudgeConfig
from vision.data import DatasetName
from vision.rivals.flow_matching import Sampler, Solver

Method = Literal["flow_matching", "mean_flow", "gan"]


@dataclass(kw_only=True)
class RivalDataConfig:
    """Where the real images come from."""

    name: DatasetName = option("data set")
    folder: Path | None = option("folder of its files; null: scikit-learn, the system's package or an earlier download")
    download: bool = option("fetch the files if they are nowhere")


@dataclass(kw_only=True)
class OptimizerConfig:
    """What is tuned for each method by itself."""

    batch_size: int = option("images per step", min=1)
    learning_rate: float = option("AdamW's peak learning rate", above=0)
    betas: tuple[float, float] = option("AdamW's β", min=0, below=1)
    ema_decays: tuple[float, ...] = option("decays of the averages of the weights; the first is used", min=0, below=1)


@dataclass(kw_only=True)
class FlowMatchingConfig(OptimizerConfig):
    """Flow matching (arXiv 2210.02747)."""

    time_distribution: Literal["uniform", "logit_normal"] = option("of t in training; t = 1 is noise")
    time_mean: float = option("mean of the logit of t, for logit_normal")
    time_std: float = option("its standard deviation", above=0)
    label_dropout: float = option("share of samples trained without their class, for guidance", min=0, max=1)
    solvers: tuple[Solver, ...] = option("judged: euler (an evaluation a step), heun (two)")
    evaluations: tuple[int, ...] = option("judged: passes of the network per image, guidance included", min=1)
    guidance_scales: tuple[float, ...] = option(
        "judged: scales of classifier-free guidance; but for 1 it doubles the passes"
    )
    picture_sampler: Solver = option("solver of the pictures through training")
    picture_evaluations: int = option("its passes of the network per image", min=1)
    picture_guidance_scale: float = option("its scale of guidance", min=1)

    def __post_init__(self) -> None:
        sampler, guided = Sampler(self.picture_sampler, self.picture_evaluations), self.picture_guidance_scale != 1
        try:
            sampler.steps(guided=guided)
        except ValueError as error:
            raise ValueError(f"picture_{error}") from error
        if self.label_dropout == 0 and {*self.guidance_scales, self.picture_guidance_scale} != {1.0}:
            raise ValueError("label_dropout: guidance needs samples without their class, so expected above 0, found 0")


@dataclass(kw_only=True)
class MeanFlowConfig(OptimizerConfig):
    """MeanFlow (arXiv 2505.13447)."""

    time_mean: float = option("mean of the logits of t and r")
    time_std: float = option("their standard deviation", above=0)
    apart_share: float = option("share of samples with r < t; at r = t it is flow matching", min=0, max=1)
    loss_power: float = option("p of the adaptive weight; 0: the squared error", min=0)
    loss_epsilon: float = option("ε of the adaptive weight", above=0)
    label_dropout: float = option("share of samples trained without their class, for guidance", min=0, max=1)
    omega: float = option("ω of the guidance in training; its scale is ω / (1 - κ)", above=0)
    kappa: float = option("κ of the guidance in training", min=0, below=1)
    evaluations: tuple[int, ...] = option("judged: steps, each a pass of the network", min=1)

    def __post_init__(self) -> None:
        if self.label_dropout == 0 and self.is_guided:
            raise ValueError("label_dropout: guidance needs samples without their class, so expected above 0, found 0")

    @property
    def is_guided(self) -> bool:
        """Whether the flow that is learnt is other than that of the data."""
        return (self.omega, self.kappa) != (1, 0)

    @property
    def guidance_scale(self) -> float:
        """Of the classifier-free guidance that it amounts to."""
        return self.omega / (1 - self.kappa)


@dataclass(kw_only=True)
class GanConfig(OptimizerConfig):
    """A generative adversarial network."""

    r1_gamma: float = option("γ of the gradient penalty (arXiv 1801.04406)", min=0)


@dataclass(kw_only=True)
class RivalConfig:
    """Keys of `python -m vision.train_rival`; the same as those of vision.train where they mean the same."""

    method: Method = option("what to train")
    run_dir: Path = option("folder of the run; a run found there is resumed")
    seed: int = option("seed of the weights, the noise and the order of the data", min=0)
    device: Device = option("where to compute")
    bfloat16: bool = option("activations in bfloat16; parameters and loss stay float32")
    data: RivalDataConfig
    generator: GeneratorConfig
    flow_matching: FlowMatchingConfig
    mean_flow: MeanFlowConfig
    gan: GanConfig
    judge: JudgeConfig
    images: int = option("samples to train on in all: noised images, or images that the GAN's generator makes", min=1)
    warmup_images: int = option("images until the peak", min=0)
    cooldown_fraction: float = option("last part of the run over which the rate falls to 0", min=0, max=1)
    weight_decay: float = option("AdamW's weight decay", min=0)
    clip_norm: float = option("largest norm of the gradient", above=0)
    ema_warmup: bool = option("a lower decay at first: (1 + t) / (10 + t) at step t")
    checkpoint_every_images: int = option("images between two checkpoints", min=1)
    log_every_images: int = option("images between two lines of the log", min=1)
    picture_every_images: int = option("images between two pictures", min=1)
    evaluate_images: int = option("samples that the final evaluation judges for each row", min=100)

    @property
    def optimizer(self) -> OptimizerConfig:
        """That of the method."""
        chosen: OptimizerConfig = getattr(self, self.method)
        return chosen
