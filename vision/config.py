"""What the programs of `vision` can be told: one dataclass per part, its fields the keys of `configs/vision`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from driftfield import DriftingLoss
from driftfield.backend import Backend
from driftfield.field import Field
from driftfield.kernel import NormalizeOver
from driftfield.sinkhorn import SecondBatch
from driftfield.training import option, to_plain
from driftfield.training.device import Device
from vision.data import DatasetName
from vision.imagenet import Augmentation, Classes

CONFIG_DIR: Final = Path(__file__).parents[1] / "configs" / "vision"
DataName = Literal[DatasetName, "imagenet", "latents"]


@dataclass(kw_only=True)
class DataConfig:
    """Where the real samples come from."""

    name: DataName = option("data set; imagenet: a folder of class folders; latents: a store of vision.cache_latents")
    folder: Path | None = option("folder of its files; null: scikit-learn, the system's package or an earlier download")
    download: bool = option("fetch the files if they are nowhere")
    classes: Classes = option("class folders of imagenet: ImageNet's 1000 synsets, or whatever folders there are")
    augmentation: Augmentation = option("of imagenet's images at each visit: none, flip, or random crop and flip")
    image_size: int = option("side of imagenet's crops, in pixels", min=1)
    workers: int = option("threads that read images or latents", min=1)
    memory_gib: float = option("memory for samples read again, in GiB; the processes of a machine share it", min=0)
    max_unreadable: float = option(
        "share of imagenet's files that may be damaged, each replaced by the next of its class", min=0, max=1
    )


@dataclass(kw_only=True)
class EncoderConfig:
    """The features in which images drift: of pretrained encoders, or of a masked autoencoder trained first (A.3)."""

    features: str = option("families of features (A.5), letters of abcd; empty: drift in raw pixels alone")
    pretrained: tuple[str, ...] = option("mae:FOLDER, convnextv2, resnet50:FILE ...; empty: train what follows")
    run_dir: Path = option("folder of the masked autoencoder; trained there by vision.train_mae if it holds none")
    seed: int = option("seed of its training", min=0)
    base_channels: int = option("channels C of the first stage; each further stage doubles them", min=1)
    patch_size: int = option("side of the pixel patches that make the channels of its map", min=1)
    mask_patch: int = option("side of what is hidden at once, in locations of its map", min=1)
    blocks: tuple[int, ...] = option("residual blocks of each stage; each further stage halves the map", min=1)
    mask_ratio: float = option("probability that such a patch is hidden", above=0, below=1)
    images: int = option("images to train on in all", min=1)
    batch_size: int = option("images per step", min=1)
    microbatch: int | None = option("images computed at once, by each process; null: all of them", min=1)
    learning_rate: float = option("peak learning rate", above=0)
    warmup_images: int = option("images until the peak", min=0)
    cooldown_fraction: float = option("last part of the training over which the rate falls to 0", min=0, max=1)
    weight_decay: float = option("AdamW's weight decay", min=0)
    ema_decay: float = option("decay of the average of the weights", min=0, below=1)
    ema_warmup: bool = option("a lower decay at first: (1 + t) / (10 + t) at step t")
    clip_norm: float = option("largest norm of the gradient", above=0)
    classifier_images: int = option("images, the last ones, that also teach a classifier (A.3)", min=0)
    classifier_weight: float = option("share of the classifier in the loss", min=0, max=1)
    classifier_warmup_images: int = option("images over which the share rises from 0", min=0)
    log_every_images: int = option("images between two lines of the log", min=1)
    checkpoint_every_images: int = option("images between two checkpoints", min=1)


@dataclass(kw_only=True)
class GeneratorConfig:
    """The diffusion transformer that generates in one pass (A.2)."""

    patch_size: int = option("side of a patch, in pixels", min=1)
    hidden_size: int = option("channels of a token", min=4)
    depth: int = option("number of blocks", min=1)
    num_heads: int = option("attention heads", min=1)
    cond_size: int = option("channels of the condition vector", min=1)
    num_context_tokens: int = option("tokens made from the condition", min=1)
    num_styles: int = option("random style slots", min=0)
    num_style_entries: int = option("entries of each style slot", min=1)
    output_gain: float = option("gain of the last layer's initial weights; 0: the paper's zero", min=0)
    guidance_gain: float = option("size of the guidance embedding; 0.02: the paper's, learned late", min=0)
    attention_in_float32: bool = option("attention itself in float32 although activations are bfloat16")


@dataclass(kw_only=True)
class LossConfig:
    """Keywords of `driftfield.DriftingLoss`; null keeps the recipe's value."""

    temperatures: tuple[float, ...] = option("τ, multiples of the mean distance", above=0)
    recipe: Literal["official", "paper"] = option("the release's loss, or the plain Eq. 6")
    normalize_features: bool | None = option("divide features by their scale (Eq. 21)")
    normalize_drift: bool | None = option("divide the drift of each τ by its norm (Eq. 25)")
    affinity_floor: float | None = option("lower bound of the squared affinity", min=0)
    normalize_over: NormalizeOver = option("softmax over: targets and samples, targets (y), samples (x), none")
    attraction: float = option("factor on V+ (Table 1)", min=0)
    repulsion: float = option("factor on V- (Table 1)", min=0)
    field: Field = option("the paper's; or barycentres of entropic couplings; or the gradient of MMD (C.2)")
    bias_correction: bool = option("of the centroids: no first-order bias of few samples (arXiv 2604.27239)")
    sinkhorn_iterations: int = option("of each coupling and τ", min=0)
    second_batch: SecondBatch = option("sinkhorn: what generated samples are coupled with, all others or a half")
    backend: Backend = option("fused: kernels of a GPU; auto: where they serve; eager: formulas as they stand")
    memory_mib: float | None = option("eager works in strips beyond this much for pairs, in MiB; null: never", above=0)
    check_finite: bool = option("stop at the first NaN or infinity, naming it; costs a wait for the device")

    def __post_init__(self) -> None:
        DriftingLoss(**to_plain(self))  # refuses what makes no sense together


@dataclass(kw_only=True)
class GuidanceConfig:
    """Distribution of the guidance scale α in training: p(α) ∝ α^-exponent on [low, high] (A.7)."""

    exponent: float = option("k")
    low: float = option("smallest α", min=1)
    high: float = option("largest α", min=1)
    share_at_one: float = option("share of α = 1 beside it", min=0, max=1)

    def __post_init__(self) -> None:
        if self.high < self.low:
            raise ValueError(f"high: expected at least low = {self.low}, found {self.high}")


@dataclass(kw_only=True)
class QueueConfig:
    """The queues of real samples (A.8)."""

    per_class: int = option("real samples kept of each class", min=1)
    unconditional: int = option("real samples kept of all classes together", min=1)
    push_per_step: int = option("newest real samples taken in at each step", min=1)


@dataclass(kw_only=True)
class JudgeConfig:
    """The classifier that judges samples; training never sees it."""

    folder: Path = option("where judges are kept; trained if there is none of these data and settings")
    epochs: int | None = option("passes over the real training images; null: the data set's own number", min=1)


@dataclass(kw_only=True)
class TrainConfig:
    """Keys of `python -m vision.train`."""

    run_dir: Path = option("folder of the run; a run found there is resumed")
    seed: int = option("seed of the weights, the noise and the order of the data", min=0)
    device: Device = option("where to compute")
    bfloat16: bool = option("activations in bfloat16; parameters and loss stay float32")
    compile: bool = option("torch.compile the generator and the encoder")
    shard: bool = option("spread weights, averages and AdamW's state over the processes (FSDP2); saves memory")
    checkpoint_activations: bool = option("compute the generator's blocks again on the way back; saves memory")
    tokenizer: str | None = option("autoencoder of the latents, folder or hub id; null: generate pixels")
    data: DataConfig
    encoder: EncoderConfig
    generator: GeneratorConfig
    loss: LossConfig
    guidance: GuidanceConfig
    queue: QueueConfig
    judge: JudgeConfig
    labels_per_step: int = option("N_c, groups per step", min=1)
    generated_per_label: int = option("N, generated images per group", min=2)
    positives_per_label: int = option("P, real images per group", min=1)
    unconditional_per_label: int = option("M, real images of any class per group", min=1)
    clamp_to_encode: bool = option("the encoder sees pixels clamped to [-1, 1], as picture files keep them")
    labels_at_once: int | None = option("groups of a piece, which a process computes at once; null: all", min=1)
    statistics: Literal["batch", "piece"] = option(
        "scale and drift norm of the whole batch, or of what is computed at once"
    )
    images: int = option("generated images to train on in all", min=1)
    temperature_start: float = option("factor of every τ at first; falls or rises geometrically to 1", above=0)
    temperature_fraction: float = option("first part of the run over which it does", min=0, max=1)
    learning_rate: float = option("AdamW's peak learning rate", above=0)
    warmup_images: int = option("images until the peak", min=0)
    cooldown_fraction: float = option("last part of the run over which the rate falls to 0", min=0, max=1)
    weight_decay: float = option("AdamW's weight decay", min=0)
    clip_norm: float = option("largest norm of the gradient", above=0)
    ema_decays: tuple[float, ...] = option("decays of the averages of the weights; the first is used", min=0, below=1)
    ema_warmup: bool = option("a lower decay at first: (1 + t) / (10 + t) at step t")
    checkpoint_every_images: int = option("generated images between two checkpoints", min=1)
    log_every_images: int = option("generated images between two lines of the log", min=1)
    picture_every_images: int = option("generated images between two pictures", min=1)
    picture_guidance_scales: tuple[float, ...] = option("further α of pictures, beside evaluate_guidance_scale", min=1)
    snapshot_every_images: int | None = option("generated images between two models kept for evaluation", min=1)
    writers: tuple[Literal["tensorboard", "wandb"], ...] = option("log writers beside metrics.jsonl")
    real_features_mib: int = option("memory for the features of all real images, in MiB; else computed anew", min=0)
    evaluate_images: int = option("one-step samples that the final evaluation judges", min=100)
    evaluate_guidance_scale: float = option("their α", min=1)

    def __post_init__(self) -> None:
        if self.queue.per_class < self.positives_per_label:
            raise ValueError(
                f"queue.per_class: expected at least positives_per_label = {self.positives_per_label}, "
                f"found {self.queue.per_class}"
            )
        if self.queue.unconditional < self.unconditional_per_label:
            raise ValueError(
                f"queue.unconditional: expected at least unconditional_per_label = {self.unconditional_per_label}, "
                f"found {self.queue.unconditional}"
            )
        if self.queue.push_per_step < self.labels_per_step:
            raise ValueError(
                "queue.push_per_step: the labels of a step are those of the newest real samples, so expected at least "
                f"labels_per_step = {self.labels_per_step}, found {self.queue.push_per_step}"
            )

    @property
    def images_per_step(self) -> int:
        """Generated images of one step, B = N_c · N."""
        return self.labels_per_step * self.generated_per_label
