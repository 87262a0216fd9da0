"""Train a one-step image generator by drifting (A.9): `python -m vision.train`.

Without an argument: scikit-learn's digits, in about two minutes on two CPU cores. To resume a run that was
stopped or killed, run the same command again. The loss is flat by construction; what falls is lambda, the norm of the
drift. Several GPUs: `torchrun --nproc-per-node=8 -m vision.train ...` shares the labels of each step.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from driftfield import (
    DriftingLoss,
    DriftingOutput,
    DriftStatistics,
    FeatureBatch,
    SampleQueue,
    feature_statistics,
    sample_guidance_scale,
    sum_over_features,
)
from driftfield import unconditional_weight as weight_of_unconditional
from driftfield.checks import NotFiniteError
from driftfield.normalization import sum_over_processes
from driftfield.training import (
    EMA,
    Action,
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
    to_plain,
    to_yaml,
    warmup_constant,
)
from driftfield.training.atomic_file import write_json
from driftfield.training.device import choose_device
from driftfield.training.distributed import is_sharded
from driftfield.training.schedule import annealed_factor
from driftfield.training.sharding import shard
from driftfield.training.visits import Epochs, sample_ids
from vision.config import CONFIG_DIR, TrainConfig
from vision.data import RealSamples, require_per_class
from vision.encoders import load_encoder, round_weights
from vision.evaluate import MODEL, SNAPSHOTS, Judgement, judged_splits, table
from vision.features import Encoder, family_of, group_by_label, image_features
from vision.generator import ImageGenerator
from vision.pictures import save_animation, save_grid
from vision.real import load_real, load_tokenizer, unreadable_images
from vision.real_features import RealFeatures
from vision.sample import draw_inputs, sample
from vision.tokenizer import Tokenizer
from vision.train_mae import trained_mae

BETAS: Final = (0.9, 0.95)  # A.9
PICTURE_ROWS: Final = 10  # images of each class in the pictures of training
MAX_PICTURE_CLASSES: Final = 10
MAX_FRAMES: Final = 40  # of the animation
# A resumed run may change what only concerns where it runs, not what it computes.
MAY_CHANGE: Final = (
    "run_dir", "shard", "data.folder", "data.workers", "data.memory_gib", "data.max_unreadable",
    "checkpoint_activations", "real_features_mib", "writers", "checkpoint_every_images", "log_every_images",
    "picture_every_images", "picture_guidance_scales", "snapshot_every_images",
)  # fmt: skip
RESULTS: Final = "results.json"
PICTURES: Final = "pictures"  # folder of the grids through training


class Piece(NamedTuple):
    """The labels of a step that are computed at once, and what was drawn for them."""

    slots: range  # places of the labels among those of the step
    labels: Tensor  # [l]
    alpha: Tensor  # [l]
    weight: Tensor  # of unconditional samples (A.7)  [l, M]
    real: Tensor  # visits [l, P + M]: positives, then unconditional samples


class Training:
    """Everything that changes during training, and the step that changes it.

    Args:
        config: as the program was told.
        real: real training samples.
        encoder: frozen; None drifts in the samples themselves alone. With `bfloat16`, its weights are rounded in place.
        device: where to compute.
    """

    def __init__(self, config: TrainConfig, real: RealSamples, encoder: Encoder | None, device: torch.device) -> None:
        if config.bfloat16 and isinstance(encoder, nn.Module):
            round_weights(encoder)
        self.config, self.real, self.encoder, self.device = config, real, encoder, device
        self.step_number = 0
        channels, image_size, _ = real.sample_shape
        num_classes = len(real.class_names)
        self.generator = build_generator(config, channels=channels, image_size=image_size, num_classes=num_classes).to(
            device
        )
        self.generator.checkpoint_activations = config.checkpoint_activations
        if config.shard:
            shard(self.generator, self.generator.blocks, device)
        self.optimizer = torch.optim.AdamW(
            self.generator.named_parameters(),
            lr=config.learning_rate,
            betas=BETAS,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema = EMA(self.generator, decays=config.ema_decays, warmup=config.ema_warmup)
        self.update = Update(self.generator, self.optimizer, self.ema, clip_norm=config.clip_norm)
        self.loss = DriftingLoss(**to_plain(config.loss))
        self.queue = SampleQueue(num_classes, config.queue.per_class)  # of visits of `real`
        self.unconditional_queue = SampleQueue(1, config.queue.unconditional)
        self._epochs = Epochs(len(real), seed=config.seed)
        self._fill_queues()
        self._step_end, self._flops_per_step = time.monotonic(), self._count_flops()
        self._generate = self._compiled_generator() if config.compile else self.generator
        self._encode = torch.compile(self._encode_eagerly, dynamic=False) if config.compile else self._encode_eagerly
        self.real_features = RealFeatures(
            real, self._encode, device, seed=config.seed, memory_mib=config.real_features_mib
        )

    @property
    def samples_per_step(self) -> int:
        """Generated images of a step, those of all processes together: B = N_c · N."""
        return self.config.images_per_step

    @property
    def images_seen(self) -> int:
        """Generated images trained on."""
        return self.step_number * self.samples_per_step

    def step(self) -> dict[str, float | Tensor]:
        """One training step: the seven lines of A.9, for the labels that this process computes.

        Returns:
            What the progress line and the log show.
        """
        labels = self._push_newest_real()  # 1. newest real samples into the queues; the labels of this step  [L]
        alpha = self._draw_guidance_scale(len(labels))  # 2. one guidance scale per label  [L]
        positives, unconditional = self._draw_real(labels)  # 3. real samples from the queues  [L, P] and [L, M]
        pieces = self._pieces(labels, alpha, torch.cat([positives, unconditional], dim=1))
        temperature_factor = self._temperature_factor()
        statistics = self._batch_statistics(pieces, temperature_factor)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = []
        for batch in self._features(pieces):  # 4.-5. N images per label in one pass; features of these and of real ones
            output = sum_over_features(  # 6. the loss in every feature
                self.loss, *batch, statistics=statistics, temperature_factor=temperature_factor
            )
            (output.loss.sum() / len(labels)).backward()
            outputs.append(DriftingOutput(*(part.detach() for part in output)))
        gradient_norm = self.update(self._learning_rate())  # 7. AdamW and the averages of the weights
        self.step_number += 1
        return self._values(outputs, list(batch.x), gradient_norm)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors a resumed run needs, for a checkpoint."""
        return {
            **self.update.tensors(),
            "queue": self.queue.state_dict(),
            "unconditional_queue": self.unconditional_queue.state_dict(),
        }

    def state(self) -> dict[str, Any]:
        """Everything else it needs; randomness is a function of (seed, step, slot) and has no state."""
        return {"data": self.real.fingerprint, **self.update.state()}

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Take over a checkpoint's `tensors` and `state`.

        Raises:
            UserError: they are of a training on other real samples.
        """
        if state["data"] != self.real.fingerprint:
            raise UserError(
                f"data: expected the real samples that this run began with, fingerprint {state['data']}, "
                f"found {self.real.fingerprint}; choose run_dir=OTHER for other data"
            )
        self.step_number = step
        self.update.restore(tensors, state)
        self.queue.load_state_dict(tensors["queue"])
        self.unconditional_queue.load_state_dict(tensors["unconditional_queue"])

    def _compiled_generator(self) -> Callable[..., Any]:
        """As one graph; where it is sharded, one for each block, since messages between processes are in no graph."""
        if not any(is_sharded(parameter) for parameter in self.generator.parameters()):
            return torch.compile(self.generator, dynamic=False)
        for block in self.generator.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        return self.generator

    def _random(self, *purpose: int | str, device: torch.device | str = "cpu") -> torch.Generator:
        return generator(self.config.seed, *purpose, self.step_number, device=device)

    def _fill_queues(self) -> None:
        """Every class full, or all its samples, before the first step: no step ever lacks positives."""
        visits = torch.randperm(len(self.real), generator=generator(self.config.seed, "fill"))
        self._push(visits)

    def _push_newest_real(self) -> Tensor:
        count = self.config.queue.push_per_step
        return self._push(self._epochs(self.step_number * count, count))[: self.config.labels_per_step]

    def _push(self, visits: Tensor) -> Tensor:
        labels = self.real.labels[sample_ids(visits, len(self.real))]
        self.queue.push(visits, labels)
        self.unconditional_queue.push(visits, torch.zeros_like(labels))
        return labels

    def _draw_guidance_scale(self, num: int) -> Tensor:
        return sample_guidance_scale(num, **to_plain(self.config.guidance), generator=self._random("guidance"))

    def _draw_real(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Visits of P samples of each label and M samples of any class."""
        config = self.config
        positives = self.queue.sample(labels, config.positives_per_label, generator=self._random("positives"))
        unconditional = self.unconditional_queue.sample(
            torch.zeros_like(labels), config.unconditional_per_label, generator=self._random("unconditional")
        )
        return positives, unconditional  # [L, P], [L, M]

    def _slots(self) -> list[range]:
        """Places, among the labels of a step, of those this process computes, in pieces that fit into its memory."""
        slots = range(self.config.labels_per_step)
        slots = slots[share(len(slots))]
        size = self.config.labels_at_once or len(slots)
        return [slots[start : start + size] for start in range(0, len(slots), size)]

    def _pieces(self, labels: Tensor, alpha: Tensor, real: Tensor) -> list[Piece]:
        """What this process computes, in pieces that fit into its memory."""
        # Onto the device once, not piece by piece: it would be waited for each time.
        parts = (labels.to(self.device), alpha.to(self.device), self._unconditional_weight(alpha), real)
        return [Piece(slots, *(part[slots.start : slots.stop] for part in parts)) for slots in self._slots()]

    def _batch_statistics(self, pieces: list[Piece], temperature_factor: float) -> Mapping[str, DriftStatistics] | None:
        """Scale and drift norms of the whole batch where it is computed in pieces: two passes without gradient."""
        if self.config.statistics == "piece" or len(pieces) == 1:
            return None  # the loss takes those of what it is given, over all processes
        with torch.no_grad():
            return feature_statistics(self.loss, _Anew(self, pieces), temperature_factor=temperature_factor)

    def _features(
        self, pieces: list[Piece], draw_generated: Callable[[Piece], Tensor] | None = None
    ) -> Iterator[FeatureBatch]:
        """Piece by piece, features of generated images, and of real samples without gradient, by label."""
        draw_generated = draw_generated or self._draw_generated
        reals = self.real_features([piece.real for piece in pieces])  # [l, locations, P + M, channels] by name
        for piece, real in zip(pieces, reals, strict=True):
            x = draw_generated(piece)  # [l·N, C, H, W]
            num_positives = self.config.positives_per_label
            yield FeatureBatch(
                group_by_label(self._encode(x), len(piece.labels)),
                {name: feature[..., :num_positives, :] for name, feature in real.items()},
                {name: feature[..., num_positives:, :] for name, feature in real.items()},
                piece.weight,
            )

    def _draw_generated(self, piece: Piece) -> Tensor:
        """Noise and style of a slot depend on (seed, step, slot) alone, however slots are spread over processes."""
        count = self.config.generated_per_label
        with self._autocast():
            draws = [self._random("generated", slot, device=self.device) for slot in piece.slots]
            noise, style = draw_inputs(self.generator, draws, count)
            images = self._generate(
                noise,
                piece.labels.repeat_interleave(count),
                piece.alpha.repeat_interleave(count),
                style,
            )  # [l·N, C, H, W]
        return images.float()

    def _encode_eagerly(self, images: Tensor) -> dict[str, Tensor]:
        """Features `[B, locations, channels]` by name of samples `[B, C, H, W]`: themselves, and the encoder's."""
        with self._autocast():
            return image_features(
                images,
                self.encoder,
                families=self.config.encoder.features or "a",
                clamp=self.config.clamp_to_encode,
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bfloat16)

    def _unconditional_weight(self, alpha: Tensor) -> Tensor:
        count = self.config.unconditional_per_label
        weight = weight_of_unconditional(alpha, self.config.generated_per_label, count)  # A.7  [L]
        return weight[:, None].expand(-1, count).to(self.device)

    def _learning_rate(self) -> float:
        config = self.config
        return warmup_constant(
            self.images_seen,
            peak=config.learning_rate,
            warmup_samples=config.warmup_images,
            total_samples=config.images,
            cooldown_fraction=config.cooldown_fraction,
        )

    def _temperature_factor(self) -> float:
        config = self.config
        return annealed_factor(
            self.images_seen,
            start=config.temperature_start,
            total_samples=config.images,
            fraction=config.temperature_fraction,
        )

    @torch.no_grad()
    def _count_flops(self) -> int:
        """Floating-point operations of a step of all processes, but for the loss.

        A backward pass costs twice the forward pass in the generator, and as much again in the frozen encoder; the
        statistics of a batch in pieces cost one more forward pass of the generator and two of the encoder.
        """
        config, zero = self.config, torch.zeros(1, dtype=torch.int64, device=self.device)
        noise = torch.zeros(1, *self.real.sample_shape, device=self.device)
        counts = []
        style = zero.expand(1, self.generator.num_styles)
        for part in (lambda: self.generator(noise, zero, zero + 1.0, style), lambda: self._encode_eagerly(noise)):
            with FlopCounterMode(display=False) as counter:
                part()
            counts.append(counter.get_total_flops())
        generate, encode = counts
        real = config.positives_per_label + config.unconditional_per_label
        label = config.generated_per_label * (3 * generate + 2 * encode) + real * encode
        if config.statistics == "batch" and len(self._slots()) > 1:
            label += config.generated_per_label * (generate + 2 * encode) + 2 * real * encode
        return config.labels_per_step * label

    def _values(self, outputs: list[DriftingOutput], names: list[str], gradient_norm: float) -> dict[str, Any]:
        """λ over all features, by temperature and by family of features: geometric means, since they differ widely."""
        norms = torch.stack([output.drift_norm for output in outputs])  # [pieces, features, temperatures]
        log = norms.clamp(min=torch.finfo(norms.dtype).tiny).log().mean(0)  # [features, temperatures]
        config, families = self.config, [family_of(name) for name in names]
        start, self._step_end = self._step_end, time.monotonic()
        seconds = self._step_end - start
        return {
            "loss": sum_over_processes(torch.cat([output.loss for output in outputs]).sum()) / config.labels_per_step,
            "lambda": log.mean().exp(),
            **{f"lambda/{t}": each.exp() for t, each in zip(self.loss.options.temperatures, log.mean(0), strict=True)},
            **{
                f"lambda/{family}": log[[other == family for other in families]].mean().exp()
                for family in sorted(set(families))
            },
            "gradient_norm": gradient_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "rejected_steps": self.update.rejected,
            "degenerate_features": torch.stack([output.degenerate for output in outputs]).any(0).sum(),
            "images_per_s": self.samples_per_step / seconds,
            "teraflops": self._flops_per_step / seconds / 1e12,  # of all processes, but for the loss
        }


class _Anew:
    """The features of every piece, computed at each iteration: memory for one piece, and for all images, is enough."""

    def __init__(self, training: Training, pieces: list[Piece]) -> None:
        self._training, self._pieces = training, pieces
        self._images: dict[range, Tensor] = {}  # by slots

    def __iter__(self) -> Iterator[FeatureBatch]:
        return self._training._features(self._pieces, self._draw_generated)

    def _draw_generated(self, piece: Piece) -> Tensor:
        if piece.slots not in self._images:
            self._images[piece.slots] = self._training._draw_generated(piece)
        return self._images[piece.slots]


def build_generator(config: TrainConfig, *, channels: int, image_size: int, num_classes: int) -> ImageGenerator:
    """The generator of a configuration, its initial weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ImageGenerator(
            image_size=image_size, channels=channels, num_classes=num_classes, **to_plain(config.generator)
        )


def run(
    config: TrainConfig, real: RealSamples, tokenizer: Tokenizer | None, device: torch.device, stop: StopRequest
) -> None:
    """Train to the end, from the newest checkpoint if there is one, then judge and write `results.json`.

    Raises:
        Stopped: a stop was requested; the checkpoint is written.
        UserError: the data, the folder or the disk do not allow it, or gradients stay not finite.
    """
    start, folder = time.monotonic(), config.run_dir
    training = Training(config, real, build_encoder(config, real, tokenizer, device, stop), device)
    pictures = Pictures(training, tokenizer, folder)

    def snapshot() -> None:
        with training.ema.swapped():
            training.generator.save_pretrained(folder / SNAPSHOTS / f"{training.images_seen:012d}")

    actions = [Action(config.picture_every_images, pictures.save, everywhere=config.shard)]
    if config.snapshot_every_images:
        actions.append(Action(config.snapshot_every_images, snapshot, everywhere=config.shard))
    if is_main():
        print(_about_queue(config, len(real.class_names)))
    train_start = time.monotonic()
    try:
        run_loop(
            training,
            folder,
            stop,
            name="train",
            samples=config.images,
            checkpoint_every=config.checkpoint_every_images,
            log_every=config.log_every_images,
            shown=("lambda",),
            actions=actions,
            writers=config.writers,
        )
    except NotFiniteError as error:
        raise UserError(f"step {training.step_number}: {error}") from error
    trained_s = time.monotonic() - train_start
    names = {decay: f"{MODEL}-{decay}" for decay in config.ema_decays} | {config.ema_decays[0]: MODEL}
    for decay, name in names.items():
        with training.ema.swapped(decay):
            training.generator.save_pretrained(folder / name)
    if is_main():
        results = {
            "images_seen": training.images_seen,
            "generator_parameters": sum(parameter.numel() for parameter in training.generator.parameters()),
            "device": str(device),
            "trained_in_this_start_s": round(trained_s, 1),
            "this_start_s": round(time.monotonic() - start, 1),
            "unreadable_images_in_this_start": unreadable_images(real),
            **judge(config, device),
        }
        save_animation(_some(sorted((folder / PICTURES).glob("*.png"))), folder / "training.gif")
        write_json(folder / RESULTS, results)
    barrier()


def _some(frames: list[Path]) -> list[Path]:
    """At most MAX_FRAMES of them, evenly spread, the last one among them."""
    every = -(-len(frames) // MAX_FRAMES)
    return frames[::-1][::every][::-1]


def _about_queue(config: TrainConfig, num_classes: int) -> str:
    queue = config.queue
    steps = queue.per_class * num_classes / queue.push_per_step
    return (
        f"queue: {queue.per_class} real samples of each of {num_classes} classes, {queue.push_per_step} new ones a "
        f"step by all processes together: a sample stays about {steps:.0f} steps"
    )


def build_encoder(
    config: TrainConfig, real: RealSamples, tokenizer: Tokenizer | None, device: torch.device, stop: StopRequest
) -> Encoder | None:
    """The frozen encoder that a configuration names; a masked autoencoder is trained first if it is not there."""
    if config.encoder.pretrained:
        try:
            return load_encoder(config.encoder.pretrained, tokenizer=tokenizer).to(device)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from error
    if config.encoder.features:
        return trained_mae(
            config.encoder,
            real,
            device,
            stop,
            tokenizer=tokenizer,
            bfloat16=config.bfloat16,
            compile=config.compile,
        )
    return None


def judge(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What a classifier that training never saw says of the finished run's samples, for data that have one."""
    if config.data.name in ("imagenet", "latents"):
        print("judge the model by python -m vision.evaluate_imagenet")
        return {}
    scale = config.evaluate_guidance_scale
    judgement = Judgement(config.judge, *judged_splits(config), device)
    model = ImageGenerator.from_pretrained(config.run_dir / MODEL).to(device)  # whole, where training had it in parts
    evaluation = judgement.evaluate(model, num=config.evaluate_images, guidance_scale=scale)
    print(f"{config.evaluate_images} one-step samples, in the features of {evaluation.feature_space}")
    print(table({scale: evaluation}))
    return {"guidance_scale": scale, "evaluation": evaluation._asdict()}


class Pictures:
    """Grids of samples through training: the same noise at every time, a column per class.

    Args:
        training: whose generator draws them.
        tokenizer: decodes latents.
        folder: the run's folder.
    """

    def __init__(self, training: Training, tokenizer: Tokenizer | None, folder: Path) -> None:
        self.training, self.tokenizer, self.folder = training, tokenizer, folder

    def save(self) -> None:
        """Draw one and write it in the main process; where the generator is sharded, all must call this."""
        training, num_classes = self.training, len(self.training.real.class_names)
        columns = min(num_classes, MAX_PICTURE_CLASSES)
        classes = torch.arange(columns) * num_classes // columns
        for alpha in dict.fromkeys([training.config.evaluate_guidance_scale, *training.config.picture_guidance_scales]):
            with training.ema.swapped():
                images = sample(
                    training.generator,
                    classes.repeat(PICTURE_ROWS),
                    guidance_scale=alpha,
                    tokenizer=self.tokenizer,
                )
            if not is_main():
                continue
            first = alpha == training.config.evaluate_guidance_scale
            through_training = self.folder / (PICTURES if first else f"{PICTURES}/alpha-{alpha:g}")
            through_training.mkdir(parents=True, exist_ok=True)
            save_grid(images, through_training / f"{training.images_seen:010d}.png", columns=columns)
            if first:
                save_grid(images, self.folder / "samples.png", columns=columns)


def main(config: TrainConfig) -> int:
    """Train, judge, and say where everything is."""
    if config.clamp_to_encode and (config.tokenizer is not None or config.data.name == "latents"):
        raise UserError("clamp_to_encode: expected false for latents, which have no range, found true")
    device = choose_device(config.device)
    with process_group(device), StopRequest() as stop:
        tokenizer = load_tokenizer(config.tokenizer, device, bfloat16=config.bfloat16)
        real = load_real(config.data, tokenizer)
        require_per_class(real, config.positives_per_label, purpose="the positives of a step")
        require_equal(config=to_yaml(config), data=real.fingerprint)
        share(config.labels_per_step, "labels_per_step")  # refused here rather than in the first step
        may_change = (*MAY_CHANGE, *(["labels_at_once"] if config.statistics == "batch" else []))
        if code := run_to_results(
            config, lambda: run(config, real, tokenizer, device, stop), stop, results=RESULTS, may_change=may_change
        ):
            return code
        if is_main():
            names = (config.run_dir / name for name in ("samples.png", "training.gif", RESULTS))
            print("samples: {}, training: {}, figures: {}".format(*names))
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description=__doc__ or "")
    )
