"""Pre-train the masked autoencoder whose features drive the drift (A.3): `python -m vision.train_mae`.

With `encoder.classifier_images` the last images also teach a linear classifier on its last map. To resume, run the
same command again; `torchrun --nproc-per-node=8 -m vision.train_mae ...` uses 8 GPUs.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from driftfield.normalization import sum_over_processes
from driftfield.training import (
    EMA,
    RunFolder,
    Stopped,
    StopRequest,
    Update,
    barrier,
    generator,
    is_main,
    is_same_run,
    process_group,
    require_equal,
    run_loop,
    run_program,
    share,
    to_plain,
    to_yaml,
    warmup_constant,
)
from driftfield.training.device import choose_device
from driftfield.training.visits import Epochs, sample_ids
from vision.config import CONFIG_DIR, EncoderConfig, TrainConfig
from vision.data import RealSamples
from vision.mae import MAELoss, ResNetMAE
from vision.pictures import save_grid
from vision.real import Reader, load_real, load_tokenizer, unreadable_images
from vision.tokenizer import Tokenizer

BETAS: Final = (0.9, 0.95)
WEIGHTS: Final = "model"  # folder of the finished encoder inside its run folder


def trained_mae(
    config: EncoderConfig,
    real: RealSamples,
    device: torch.device,
    stop: StopRequest,
    *,
    tokenizer: Tokenizer | None = None,
    bfloat16: bool = False,
    compile: bool = False,
) -> ResNetMAE:
    """The masked autoencoder of `config`, frozen; trained first if its folder holds no finished one.

    Args:
        config: what to train and where.
        real: the real training samples.
        device: where to compute.
        stop: looked at between two steps.
        tokenizer: for an encoder of latents: makes them, if the samples are images, and shows them.
        bfloat16: activations in bfloat16.
        compile: compile the model.

    Raises:
        Stopped: a stop was requested; a checkpoint is written and the same call goes on from there.
        RunFolderError: the folder holds an encoder trained otherwise.
    """
    identity = {"encoder": to_plain(config), "data": real.fingerprint}
    may_change = (
        "encoder.run_dir",
        "encoder.features",  # which of its features are used, not what it learns
        "encoder.microbatch",
        "encoder.log_every_images",
        "encoder.checkpoint_every_images",
    )
    weights = config.run_dir / WEIGHTS
    if (weights / "config.json").exists():  # finished: any number of runs may read it
        is_same_run(config.run_dir, identity, may_change)
    else:
        with RunFolder(config.run_dir, identity, may_change=may_change) if is_main() else nullcontext():
            share(config.batch_size, "encoder.batch_size")  # refused here rather than in the first step
            training = MAETraining(config, real, device, tokenizer=tokenizer, bfloat16=bfloat16, compile=compile)
            _train(training, stop, config.run_dir)
    return ResNetMAE.from_pretrained(weights).to(device).requires_grad_(False)


class MAETraining:
    """Everything that changes while the masked autoencoder is trained, and the step that changes it (A.3).

    Args:
        config: as the program was told.
        real: real training samples.
        device: where to compute.
        tokenizer: for an encoder of latents: makes them, if the samples are images, and shows them.
        bfloat16: activations in bfloat16.
        compile: compile the model.
    """

    def __init__(
        self,
        config: EncoderConfig,
        real: RealSamples,
        device: torch.device,
        *,
        tokenizer: Tokenizer | None = None,
        bfloat16: bool = False,
        compile: bool = False,
    ) -> None:
        self.config, self.real, self.device, self.tokenizer, self.bfloat16 = config, real, device, tokenizer, bfloat16
        self.step_number = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = ResNetMAE(
                in_channels=real.sample_shape[0] if tokenizer is None else tokenizer.channels,
                base_channels=config.base_channels,
                blocks=config.blocks,
                patch_size=config.patch_size,
                mask_patch=config.mask_patch,
                num_classes=len(real.class_names),
            ).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.named_parameters(),
            lr=config.learning_rate,
            betas=BETAS,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema = EMA(self.model, decays=(config.ema_decay,), warmup=config.ema_warmup)
        self.update = Update(self.model, self.optimizer, self.ema, clip_norm=config.clip_norm)
        self._read = Reader(real, config.seed, device)
        self._model_loss = torch.compile(self.model.loss, dynamic=False) if compile else self.model.loss
        self._epochs = Epochs(len(real), seed=config.seed)

    @property
    def samples_per_step(self) -> int:
        """Images of a step, those of all processes together."""
        return self.config.batch_size

    @property
    def samples(self) -> int:
        """Images of the whole training: `config.images`, rounded up to whole steps."""
        return -(-self.config.images // self.config.batch_size) * self.config.batch_size

    def step(self) -> dict[str, float | Tensor]:
        """One step on masked images; the learning rate, masks and images are functions of the step alone."""
        weight = self._classification_weight()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(3, device=self.device)  # loss, reconstruction, correct
        batches = list(self._microbatches())
        visits = [self._epochs(self.step_number * self.samples_per_step + slots.start, len(slots)) for slots in batches]
        for slots, seen, samples in zip(batches, visits, self._read(visits), strict=True):
            losses = self._loss(slots, seen, self._to_latents(samples, seen), weight)
            (losses.loss.sum() / self.samples_per_step).backward()
            correct = losses.correct if losses.correct is not None else losses.loss.new_zeros(len(slots))
            total += torch.stack([losses.loss.sum(), losses.reconstruction.sum(), correct.sum()]).detach()
        norm = self.update(self._learning_rate())
        self.step_number += 1
        mean = sum_over_processes(total) / self.samples_per_step
        values: dict[str, float | Tensor] = {"loss": mean[0], "reconstruction": mean[1], "gradient_norm": norm}
        return values | ({"accuracy": mean[2]} if weight else {})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors a resumed run needs, for a checkpoint."""
        return self.update.tensors()

    def state(self) -> dict[str, Any]:
        """Everything else it needs."""
        return self.update.state()

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Take over a checkpoint's `tensors` and `state`."""
        self.step_number = step
        self.update.restore(tensors, state)

    def read(self, visits: Tensor) -> Tensor:
        """What the encoder sees of visits `[k]`, `[k, C, H, W]` on the device."""
        (samples,) = self._read([visits])
        return self._to_latents(samples, visits)

    def _to_latents(self, images: Tensor, visits: Tensor) -> Tensor:
        if self.tokenizer is None or images.shape[1] == self.tokenizer.channels:
            return images
        with torch.no_grad():
            mean, std = self.tokenizer.encode(images)
        shape = mean.shape[1:]
        noise = [torch.randn(shape, generator=generator(self.config.seed, "posterior", int(v))) for v in visits]
        return self.tokenizer.to_latents(mean, std, torch.stack(noise).to(self.device))

    def _learning_rate(self) -> float:
        return warmup_constant(
            self.step_number * self.samples_per_step,
            peak=self.config.learning_rate,
            warmup_samples=self.config.warmup_images,
            total_samples=self.samples,
            cooldown_fraction=self.config.cooldown_fraction,
        )

    def _microbatches(self) -> Iterator[range]:
        """This process's slots of the batch, in pieces that fit."""
        slots = range(self.samples_per_step)[share(self.samples_per_step)]
        size = self.config.microbatch or len(slots)
        for start in range(0, len(slots), size):
            yield slots[start : start + size]

    def _loss(self, slots: range, visits: Tensor, batch: Tensor, classification_weight: float) -> MAELoss:
        draws = [generator(self.config.seed, "mask", self.step_number, slot) for slot in slots]
        one = batch.new_empty(1, *batch.shape[1:], device="cpu")  # only its shape is used
        mask = torch.cat([self.model.draw_mask(one, ratio=self.config.mask_ratio, generator=draw) for draw in draws])
        classified: dict[str, Tensor] = {}
        if classification_weight:
            labels = self.real.labels[sample_ids(visits, len(self.real))]
            weight = torch.tensor(classification_weight)  # a number would be compiled in, and changes at every step
            classified = {"label": labels.to(self.device), "classification_weight": weight.to(self.device)}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            return self._model_loss(batch, mask.to(self.device), **classified)

    def _classification_weight(self) -> float:
        """A.3: 0, and over the last images a share of cross entropy that rises from 0."""
        config = self.config
        into = self.step_number * self.samples_per_step - (self.samples - config.classifier_images)
        if not config.classifier_images or into < 0:
            return 0.0
        risen = min(1.0, (into + self.samples_per_step) / max(config.classifier_warmup_images, 1))
        return config.classifier_weight * risen


def _train(training: MAETraining, stop: StopRequest, folder: Path) -> None:
    config = training.config
    if is_main():
        steps = training.samples // training.samples_per_step
        print(f"training the encoder: {steps} steps of {config.batch_size} images, in {folder}")
    run_loop(
        training,
        folder,
        stop,
        name="mae",
        samples=training.samples,
        checkpoint_every=config.checkpoint_every_images,
        log_every=config.log_every_images,
        shown=("reconstruction",),
    )
    if is_main():
        with training.ema.swapped():
            _picture_of_reconstruction(training, folder / "reconstruction.png")
            training.model.save_pretrained(folder / WEIGHTS)
    barrier()


@torch.no_grad()
def _picture_of_reconstruction(training: MAETraining, path: Path) -> None:
    """Rows: the images, what the encoder sees of them, what the decoder makes of that."""
    model, samples = training.model, training.read(torch.arange(min(16, len(training.real))))
    mask = model.draw_mask(samples, generator=generator(0, "picture"))
    rows = torch.cat([samples, model.hide(samples, mask), model.to_images(model(samples, mask))])
    if training.tokenizer is not None:
        rows = training.tokenizer.decode(rows)
    save_grid(rows, path, columns=len(samples))


def main(config: TrainConfig) -> int:
    """Train the encoder of a configuration alone."""
    start = time.monotonic()
    device = choose_device(config.device)
    with process_group(device), StopRequest() as stop:
        tokenizer = load_tokenizer(config.tokenizer, device, bfloat16=config.bfloat16)
        real = load_real(config.data, tokenizer)
        require_equal(config=to_yaml(config), data=real.fingerprint)
        try:
            trained_mae(
                config.encoder,
                real,
                device,
                stop,
                tokenizer=tokenizer,
                bfloat16=config.bfloat16,
                compile=config.compile,
            )
        except Stopped:
            return stop.exit_code
        if is_main():
            print(f"encoder in {config.encoder.run_dir / WEIGHTS}, {time.monotonic() - start:.0f} s")
            if names := unreadable_images(real):
                print(f"{len(names)} images were unreadable and replaced by the next of their class, as said above")
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description=__doc__ or "")
    )
