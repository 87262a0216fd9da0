"""Pre-train the masked autoencoder whose features drive the drift (A.3): `python -m vision.train_mae`."""

import time
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from driftfield.training import (
    EMA,
    Checkpoint,
    Progress,
    RunFolder,
    RunLog,
    StopRequest,
    fault_point,
    generator,
    is_same_run,
    load_optimizer,
    optimizer_state,
    run_program,
    to_plain,
    warmup_constant,
)
from vision.config import CONFIG_DIR, EncoderConfig, TrainConfig
from vision.data import ImageSet, load, to_float
from vision.device import choose_device
from vision.mae import ResNetMAE
from vision.pictures import save_grid

BETAS: Final = (0.9, 0.95)
WEIGHTS: Final = "model"  # folder of the finished encoder inside its run folder
CHECKPOINTS: Final = 10  # per training


def pretrained_encoder(config: EncoderConfig, real: ImageSet, device: torch.device, stop: StopRequest) -> ResNetMAE:
    """The encoder of `config`, frozen; trained first if its folder holds no finished one.

    Args:
        config: what to train and where.
        real: the real training images.
        device: where to compute.
        stop: looked at between two steps.

    Raises:
        Stopped: a stop was requested; a checkpoint is written and the same call goes on from there.
        RunFolderError: the folder holds an encoder trained otherwise.
    """
    identity = {"encoder": to_plain(config), "data": real.fingerprint}
    may_change = ("encoder.run_dir",)
    weights = config.run_dir / WEIGHTS
    if (weights / "config.json").exists():  # finished: any number of runs may read it
        is_same_run(config.run_dir, identity, may_change)
    else:
        with RunFolder(config.run_dir, identity, may_change=may_change) as folder:
            _train(config, real, device, stop, folder.path)
    return ResNetMAE.from_pretrained(weights).to(device).requires_grad_(False)


class Stopped(Exception):
    """A stop was requested and everything is saved; the program ends with the request's exit code."""


def _train(config: EncoderConfig, real: ImageSet, device: torch.device, stop: StopRequest, folder: Path) -> None:
    images = to_float(real.images).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ResNetMAE(
            in_channels=real.image_shape[0],
            base_channels=config.base_channels,
            blocks=config.blocks,
            patch_size=config.patch_size,
            mask_patch=config.mask_patch,
            num_classes=real.num_classes,
        ).to(device)
    optimizer = torch.optim.AdamW(
        model.named_parameters(), lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
    )
    ema = EMA(model, decays=(config.ema_decay,), warmup=True)
    checkpoint = Checkpoint(folder / "checkpoints")
    loaded = checkpoint.load()
    step = 0
    if loaded is not None:
        step = loaded.step
        model.load_state_dict(loaded.tensors["model"])
        ema.load_state_dict(loaded.tensors["ema"])
        load_optimizer(optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"])
    steps = -(-config.images // config.batch_size)
    save_every = -(-steps // CHECKPOINTS)

    def save() -> None:
        tensors, state = optimizer_state(optimizer)
        checkpoint.save(
            step,
            {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": tensors},
            {"optimizer": state},
        )

    print(f"training the encoder: {steps} steps of {config.batch_size} images, in {folder}")
    log = RunLog(folder, resume_step=step)
    progress = Progress(steps * config.batch_size, initial=step * config.batch_size)
    with log, progress:
        while step < steps:
            fault_point(f"mae.step.{step}")
            for group in optimizer.param_groups:
                group["lr"] = warmup_constant(
                    step * config.batch_size,
                    peak=config.learning_rate,
                    warmup_samples=config.warmup_images,
                    total_samples=steps * config.batch_size,
                    cooldown_fraction=0.3,
                )
            batch, mask = _masked_batch(config, model, images, step)
            loss = model.loss(batch, mask).loss.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            ema.update()
            step += 1
            progress.update(config.batch_size, reconstruction=loss.item())
            log.log(step, step * config.batch_size, loss=loss.item())
            if stop.requested or step % save_every == 0 and step < steps:
                save()
            if stop.requested:
                raise Stopped
    with ema.swapped():
        _picture_of_reconstruction(model, images[:16], folder / "reconstruction.png")
        model.save_pretrained(folder / WEIGHTS)


def _masked_batch(config: EncoderConfig, model: ResNetMAE, images: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Images of a step and what is hidden of them, as a function of (seed, step)."""
    draw = generator(config.seed, "mae", step)
    batch = images[torch.randint(len(images), (config.batch_size,), generator=draw).to(images.device)]
    return batch, model.draw_mask(batch, ratio=config.mask_ratio, generator=draw)


@torch.no_grad()
def _picture_of_reconstruction(model: ResNetMAE, images: Tensor, path: Path) -> None:
    """Rows: the images, what the encoder sees of them, what the decoder makes of that."""
    mask = model.draw_mask(images, generator=generator(0, "picture"))
    rows = torch.cat([images, model.hide(images, mask), model.to_images(model(images, mask))])
    save_grid(rows, path, columns=len(images))


def main(config: TrainConfig) -> int:
    """Train the encoder of a configuration alone."""
    start = time.monotonic()
    real = load(config.data.name, "train", data_dir=config.data.folder, download=config.data.download)
    with StopRequest() as stop:
        try:
            pretrained_encoder(config.encoder, real, choose_device(config.device), stop)
        except Stopped:
            return stop.exit_code
    print(f"encoder in {config.encoder.run_dir / WEIGHTS}, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(
        run_program(main, TrainConfig, config_dir=CONFIG_DIR, config_name="train", description=__doc__ or "")
    )
