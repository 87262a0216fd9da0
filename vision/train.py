"""Train a one-step image generator by drifting (A.9): `python -m vision.train`.

Without an argument: scikit-learn's digits, in about two minutes on two CPU cores. To resume a run that was
stopped or killed, run the same command again. The loss is flat by construction; what falls is lambda, the norm of the
drift.
"""

import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from driftfield import DriftingLoss, DriftingOutput, SampleQueue, sample_guidance_scale, sum_over_features
from driftfield import unconditional_weight as weight_of_unconditional
from driftfield.training import (
    EMA,
    Checkpoint,
    Progress,
    RunFolder,
    RunLog,
    StopRequest,
    UserError,
    fault_point,
    generator,
    load_optimizer,
    optimizer_state,
    run_program,
    to_plain,
    warmup_constant,
)
from driftfield.training.atomic_file import write_json
from vision.config import CONFIG_DIR, TrainConfig
from vision.data import ImageSet, Split, load
from vision.device import choose_device
from vision.evaluate import MODEL, Judgement, table
from vision.features import group_by_label, image_features
from vision.generator import ImageGenerator
from vision.mae import ResNetMAE
from vision.pictures import save_animation, save_grid
from vision.real_features import RealFeatures
from vision.sample import draw_inputs, sample
from vision.train_mae import Stopped, pretrained_encoder

BETAS: Final = (0.9, 0.95)  # A.9
MAX_REJECTED_STEPS: Final = 10  # in a row
PICTURE_ROWS: Final = 10  # images of each class in the pictures of training
RESULTS: Final = "results.json"
PICTURES: Final = "pictures"  # folder of the grids through training


class StepResult(NamedTuple):
    """What a step tells the log."""

    output: DriftingOutput
    gradient_norm: float
    applied: bool


class Training:
    """Everything that changes during training, and the step that changes it.

    Args:
        config: as the program was told.
        real: real training images.
        encoder: frozen; None drifts in raw pixels alone.
        device: where to compute.
    """

    def __init__(self, config: TrainConfig, real: ImageSet, encoder: ResNetMAE | None, device: torch.device) -> None:
        self.config, self.real, self.encoder, self.device = config, real, encoder, device
        self.step_number = 0
        self.rejected_steps = 0  # in a row
        channels, image_size, _ = real.image_shape
        self.generator = build_generator(
            config, channels=channels, image_size=image_size, num_classes=real.num_classes
        ).to(device)
        self.optimizer = torch.optim.AdamW(
            self.generator.named_parameters(),
            lr=config.learning_rate,
            betas=BETAS,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema = EMA(self.generator, decays=config.ema_decays, warmup=True)
        self.loss = DriftingLoss(**to_plain(config.loss))
        self.queue = SampleQueue(real.num_classes, config.queue.per_class)  # of positions in `real`
        self.unconditional_queue = SampleQueue(1, config.queue.unconditional)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # epoch and its order of the real images
        self._fill_queues()
        self.real_features = RealFeatures(real.images, self._encode, device, memory_mib=config.real_features_mib)
        self._generate = torch.compile(self.generator) if config.compile else self.generator

    @property
    def images_seen(self) -> int:
        """Generated images trained on."""
        return self.step_number * self.config.images_per_step

    def step(self) -> StepResult:
        """One training step: the seven lines of A.9."""
        labels = self._push_newest_real()  # 1. newest real images into the queues; the labels of this step  [L]
        alpha = self._draw_guidance_scale(len(labels))  # 2. one guidance scale per label  [L]
        positives, unconditional = self._draw_real(labels)  # 3. real images from the queues  [L, P] and [L, M]
        x = self._draw_generated(labels, alpha)  # 4. N images per label from noise, in one pass  [L·N, C, H, W]
        output = sum_over_features(  # 5.-6. the loss in every feature; the real ones carry no gradient
            self.loss,
            group_by_label(self._encode(x), len(labels)),
            self.real_features(positives),
            self.real_features(unconditional),
            self._unconditional_weight(alpha),
        )
        return StepResult(output, *self._update(output.loss.mean()))  # 7. AdamW and the averages of the weights

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors a resumed run needs, for a checkpoint."""
        return {
            "model": self.generator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_state(self.optimizer).tensors,
            "queue": self.queue.state_dict(),
            "unconditional_queue": self.unconditional_queue.state_dict(),
        }

    def state(self) -> dict[str, Any]:
        """Everything else it needs; randomness is a function of (seed, step, slot) and has no state."""
        return {"rejected_steps": self.rejected_steps, "optimizer": optimizer_state(self.optimizer).state}

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Take over a checkpoint's `tensors` and `state`."""
        self.step_number = step
        self.rejected_steps = state["rejected_steps"]
        self.generator.load_state_dict(tensors["model"])
        self.ema.load_state_dict(tensors["ema"])
        load_optimizer(self.optimizer, tensors["optimizer"], state["optimizer"])
        self.queue.load_state_dict(tensors["queue"])
        self.unconditional_queue.load_state_dict(tensors["unconditional_queue"])

    def _random(self, *purpose: int | str) -> torch.Generator:
        return generator(self.config.seed, *purpose, self.step_number)

    def _fill_queues(self) -> None:
        """Every class full, or all its images, before the first step: no step ever lacks positives."""
        ids = torch.randperm(len(self.real), generator=generator(self.config.seed, "fill"))
        self.queue.push(ids, self.real.labels[ids])
        self.unconditional_queue.push(ids, torch.zeros_like(ids))

    def _push_newest_real(self) -> Tensor:
        count = self.config.queue.push_per_step
        ids = self._real_ids(self.step_number * count, count)
        self.queue.push(ids, self.real.labels[ids])
        self.unconditional_queue.push(ids, torch.zeros_like(ids))
        return self.real.labels[ids[: self.config.labels_per_step]]

    def _real_ids(self, start: int, count: int) -> Tensor:
        """Positions `start` to `start + count` of the endless sequence of shuffled epochs."""
        parts = []
        while count:
            epoch, offset = divmod(start, len(self.real))
            if self._order[0] != epoch:
                order = torch.randperm(len(self.real), generator=generator(self.config.seed, "order", epoch))
                self._order = (epoch, order)
            part = self._order[1][offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)

    def _draw_guidance_scale(self, num: int) -> Tensor:
        return sample_guidance_scale(num, **to_plain(self.config.guidance), generator=self._random("guidance"))

    def _draw_real(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of P images of each label and M images of any class."""
        config = self.config
        positives = self.queue.sample(labels, config.positives_per_label, generator=self._random("positives"))
        unconditional = self.unconditional_queue.sample(
            torch.zeros_like(labels), config.unconditional_per_label, generator=self._random("unconditional")
        )
        return positives, unconditional  # [L, P], [L, M]

    def _draw_generated(self, labels: Tensor, alpha: Tensor) -> Tensor:
        """Noise and style of a slot depend on (seed, step, slot) alone, however slots are spread over processes."""
        count = self.config.generated_per_label
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bfloat16):
            noise, style = draw_inputs(
                self.generator, [self._random("generated", slot) for slot in range(len(labels))], count
            )
            images = self._generate(
                noise.to(self.device),
                labels.repeat_interleave(count).to(self.device),
                alpha.repeat_interleave(count).to(self.device),
                style.to(self.device),
            )  # [L·N, C, H, W]
        return images.float()

    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        """Features `[B, locations, channels]` by name of images `[B, C, H, W]`: raw pixels, and the encoder's."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bfloat16):
            return image_features(images, self.encoder, families=self.config.encoder.features or "a")

    def _unconditional_weight(self, alpha: Tensor) -> Tensor:
        count = self.config.unconditional_per_label
        weight = weight_of_unconditional(alpha, self.config.generated_per_label, count)  # A.7  [L]
        return weight[:, None].expand(-1, count).to(self.device)

    def _update(self, loss: Tensor) -> tuple[float, bool]:
        """Norm of the gradient, and whether the step was taken: a gradient that is not finite changes nothing."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = warmup_constant(
                self.images_seen,
                peak=config.learning_rate,
                warmup_samples=config.warmup_images,
                total_samples=config.images,
                cooldown_fraction=config.cooldown_fraction,
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), config.clip_norm).item()
        applied = norm < float("inf")  # False for NaN too
        if applied:
            self.optimizer.step()
            self.ema.update()
        self.step_number += 1
        self.rejected_steps = 0 if applied else self.rejected_steps + 1
        return norm, applied


def build_generator(config: TrainConfig, *, channels: int, image_size: int, num_classes: int) -> ImageGenerator:
    """The generator of a configuration, its initial weights a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ImageGenerator(
            image_size=image_size, channels=channels, num_classes=num_classes, **to_plain(config.generator)
        )


def run(config: TrainConfig, folder: Path, stop: StopRequest) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint if there is one.

    Raises:
        Stopped: a stop was requested; the checkpoint is written.
        UserError: the data, the folder or the disk do not allow it, or gradients stay not finite.

    Returns:
        What `results.json` says.
    """
    start = time.monotonic()
    device = choose_device(config.device)
    real, held_out = _load(config, "train"), _load(config, "test")
    encoder = pretrained_encoder(config.encoder, real, device, stop) if config.encoder.features else None
    training = Training(config, real, encoder, device)
    checkpoint = Checkpoint(folder / "checkpoints")
    loaded = checkpoint.load()
    if loaded is not None:
        training.restore(*loaded)
        print(f"resuming at image {training.images_seen}")
    train_start = time.monotonic()
    _loop(training, checkpoint, folder, stop)
    trained_s = time.monotonic() - train_start
    save_animation(sorted((folder / PICTURES).glob("*.png")), folder / "training.gif")
    for decay in config.ema_decays[1:]:
        with training.ema.swapped(decay):
            training.generator.save_pretrained(folder / f"{MODEL}-{decay}")
    with training.ema.swapped():
        training.generator.save_pretrained(folder / MODEL)
        judgement = Judgement(config.judge, real, held_out, device)
        evaluation = judgement.evaluate(
            training.generator, num=config.evaluate_images, guidance_scale=config.evaluate_guidance_scale
        )
    print(f"{config.evaluate_images} one-step samples, in the features of {evaluation.feature_space}")
    print(table({config.evaluate_guidance_scale: evaluation}))
    return {
        "images_seen": training.images_seen,
        "generator_parameters": sum(parameter.numel() for parameter in training.generator.parameters()),
        "device": str(device),
        "trained_in_this_start_s": round(trained_s, 1),
        "this_start_s": round(time.monotonic() - start, 1),
        "guidance_scale": config.evaluate_guidance_scale,
        "evaluation": evaluation._asdict(),
    }


def _load(config: TrainConfig, split: Split) -> ImageSet:
    return load(config.data.name, split, data_dir=config.data.folder, download=config.data.download)


def _loop(training: Training, checkpoint: Checkpoint, folder: Path, stop: StopRequest) -> None:
    config = training.config
    log = RunLog(folder, resume_step=training.step_number, writers=config.writers)
    progress = Progress(config.images, initial=training.images_seen)
    with log, progress:
        if training.step_number == 0:
            _save_picture(training, folder)
        while training.images_seen < config.images:
            fault_point(f"train.step.{training.step_number}")
            try:
                result = training.step()
            except ValueError as error:  # a tensor that is not finite, named
                raise UserError(f"step {training.step_number}: {error}") from error
            if training.rejected_steps >= MAX_REJECTED_STEPS:
                raise UserError(
                    f"{MAX_REJECTED_STEPS} steps in a row had a gradient that is not finite, the last at step "
                    f"{training.step_number}: nothing was changed since; try a lower learning_rate"
                )
            progress.update(config.images_per_step, lambda_=_geometric_mean(result.output.drift_norm).item())
            if _is_due(training, config.log_every_images):
                _write_log(log, training, result)
            if _is_due(training, config.picture_every_images):
                _save_picture(training, folder)
            if stop.requested or _is_due(training, config.checkpoint_every_images):
                checkpoint.save(training.step_number, training.tensors(), training.state())
            if stop.requested:
                raise Stopped


def _is_due(training: Training, every_images: int) -> bool:
    """Whether the last step crossed a multiple of `every_images`, or was the last one of all."""
    seen, step = training.images_seen, training.config.images_per_step
    return seen // every_images > (seen - step) // every_images or seen >= training.config.images


def _write_log(log: RunLog, training: Training, result: StepResult) -> None:
    output = result.output
    per_temperature = {
        f"lambda/{temperature}": _geometric_mean(norms).item()
        for temperature, norms in zip(training.config.loss.temperatures, output.drift_norm.unbind(1), strict=True)
    }
    log.log(
        training.step_number,
        training.images_seen,
        loss=output.loss.mean().item(),
        **{"lambda": _geometric_mean(output.drift_norm).item()},
        **per_temperature,
        gradient_norm=result.gradient_norm,
        learning_rate=training.optimizer.param_groups[0]["lr"],
        rejected_steps=training.rejected_steps,
        degenerate_features=int(output.degenerate.sum()),
    )


def _geometric_mean(drift_norm: Tensor) -> Tensor:
    """Of all entries: features differ in λ by orders of magnitude."""
    return drift_norm.clamp(min=torch.finfo(drift_norm.dtype).tiny).log().mean().exp()


def _save_picture(training: Training, folder: Path) -> None:
    """The same noise at every time: a column per class."""
    labels = torch.arange(training.real.num_classes).repeat(PICTURE_ROWS)
    with training.ema.swapped():
        images = sample(training.generator, labels, guidance_scale=training.config.evaluate_guidance_scale)
    (folder / PICTURES).mkdir(exist_ok=True)
    for name in (f"{PICTURES}/{training.images_seen:010d}.png", "samples.png"):
        save_grid(images, folder / name, columns=training.real.num_classes)


def main(config: TrainConfig) -> int:
    """Train, judge, and say where everything is."""
    _load(config, "train").require_per_class(config.positives_per_label, purpose="the positives of a step")
    with RunFolder(config.run_dir, config, may_change=("run_dir",)) as folder, StopRequest() as stop:
        results = folder.path / RESULTS
        if results.exists():
            print(f"{results}: this run is complete; for another one choose run_dir=OTHER or delete {folder.path}")
            return 0
        try:
            write_json(results, run(config, folder.path, stop))
        except Stopped:
            print(f"stopped and saved; the same command goes on from here ({folder.path})")
            return stop.exit_code
    print(f"samples: {folder.path / 'samples.png'}, training: {folder.path / 'training.gif'}, figures: {results}")
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description=__doc__ or "")
    )
