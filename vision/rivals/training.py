"""Training of the rivals: the state that changes, and the step of each method."""

from abc import ABC, abstractmethod
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from driftfield.normalization import sum_over_processes
from driftfield.training import EMA, Update, UserError, generator, share, to_plain, warmup_constant
from driftfield.training.visits import Epochs, sample_ids
from vision.data import ImageSet, to_float
from vision.generator import ImageGenerator
from vision.rivals.config import Method, OptimizerConfig, RivalConfig
from vision.rivals.flow_matching import FlowMatchingGenerator, Sampler, flow_matching_error
from vision.rivals.gan import Discriminator, discriminator_loss, generator_loss, penalised_logits
from vision.rivals.mean_flow import (
    MeanFlowGenerator,
    adaptive_error,
    guided_velocity,
    mean_flow_target,
)
from vision.rivals.velocity import drop_labels, interpolate, logit_normal

GENERATORS: Final[dict[Method, type[ImageGenerator]]] = {
    "flow_matching": FlowMatchingGenerator,
    "mean_flow": MeanFlowGenerator,
    "gan": ImageGenerator,
}
NOT_OF_THE_DISCRIMINATOR: Final = (
    "num_context_tokens", "num_styles", "num_style_entries", "output_gain", "guidance_gain",
    "attention_in_float32",
)  # fmt: skip

PREFIX: Final = "discriminator_"  # of its groups of tensors in a checkpoint


class RealBatch(NamedTuple):
    """Real images of a step that this process computes with."""

    images: Tensor  # [b, C, H, W]
    labels: Tensor  # [b]


class RivalTraining(ABC):
    """Everything that changes during the training of a rival; a subclass has the step that changes it.

    Every random number of a step is a function of (seed, step, slot), a slot being an image's place in the batch of all
    processes, so neither a resume nor the number of processes changes it.

    Args:
        config: as the program was told.
        real: real training images.
        device: where to compute.
    """

    shown = "loss"  # beside the progress

    def __init__(self, config: RivalConfig, real: ImageSet, device: torch.device) -> None:
        self.config, self.real, self.device = config, real, device
        self.step_number = 0
        self.generator = build_generator(config, real).to(device)
        self.ema = EMA(self.generator, decays=self.options.ema_decays, warmup=config.ema_warmup)
        self.update = Update(self.generator, self.adamw(self.generator), self.ema, clip_norm=config.clip_norm)
        self._epochs = Epochs(len(real), seed=config.seed)
        self._images = real.images.to(device)  # bytes

    @property
    def options(self) -> OptimizerConfig:
        """Of the method."""
        return self.config.optimizer

    @property
    def samples_per_step(self) -> int:
        """Samples of one step, those of all processes together."""
        return self.options.batch_size

    @property
    def images_seen(self) -> int:
        """Samples trained on."""
        return self.step_number * self.samples_per_step

    @abstractmethod
    def losses(self) -> dict[str, Tensor]:
        """Compute the gradients of a step, and whatever is updated before the generator.

        Returns:
            Sums over the samples of this process, by name.
        """

    def step(self) -> dict[str, float | Tensor]:
        """One step; values for the progress line and the log."""
        self.generator.zero_grad(set_to_none=True)
        sums = self.losses()
        learning_rate = self.learning_rate()
        gradient_norm = self.update(learning_rate)
        self.step_number += 1
        return {
            **{name: sum_over_processes(value.detach()) / self.samples_per_step for name, value in sums.items()},
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate,
            "rejected_steps": self.update.rejected,
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors a resumed run needs, for a checkpoint."""
        return self.update.tensors()

    def state(self) -> dict[str, Any]:
        """Everything else it needs; randomness is a function of (seed, step, slot) and has no state."""
        return {"data": self.real.fingerprint, **self.update.state()}

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Take over a checkpoint's `tensors` and `state`.

        Raises:
            UserError: they are of a training on other real images.
        """
        if state["data"] != self.real.fingerprint:
            raise UserError(
                f"data: expected the real images that this run began with, fingerprint {state['data']}, "
                f"found {self.real.fingerprint}; choose run_dir=OTHER for other data"
            )
        self.step_number = step
        self.update.restore(tensors, state)

    def adamw(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer of a network."""
        return torch.optim.AdamW(
            model.named_parameters(),
            lr=self.options.learning_rate,
            betas=self.options.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )

    def learning_rate(self) -> float:
        """Of the next step."""
        return warmup_constant(
            self.images_seen,
            peak=self.options.learning_rate,
            warmup_samples=self.config.warmup_images,
            total_samples=self.config.images,
            cooldown_fraction=self.config.cooldown_fraction,
        )

    def draw_real(self) -> RealBatch:
        """The next real images of the epoch."""
        size = self.samples_per_step
        visits = self._of_this_process(self._epochs(self.step_number * size, size))
        ids = sample_ids(visits, len(self.real))
        return RealBatch(to_float(self._images[ids.to(self.device)]), self.real.labels[ids].to(self.device))

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers `[b, *shape]`, those of a slot functions of (seed, purpose, step, slot)."""
        return self._of_this_process(torch.randn(self.samples_per_step, *shape, **self._source(purpose)))

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Numbers in [0, 1), likewise."""
        return self._of_this_process(torch.rand(self.samples_per_step, *shape, **self._source(purpose)))

    def _source(self, purpose: str) -> dict[str, Any]:
        draw = generator(self.config.seed, purpose, self.step_number, device=self.device)
        return {"generator": draw, "device": self.device}

    def _of_this_process(self, batch: Tensor) -> Tensor:
        return batch[share(self.samples_per_step)]

    def autocast(self) -> torch.autocast:
        """Of the networks' passes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bfloat16)


class FlowMatchingTraining(RivalTraining):
    """v(z_t, t, class) learns the velocity of the straight path from noise to a real image."""

    generator: FlowMatchingGenerator

    def losses(self) -> dict[str, Tensor]:
        options, real = self.config.flow_matching, self.draw_real()
        noise = self.normal("noise", *self.real.sample_shape)  # [b, C, H, W]
        t = self._times()  # [b]
        label = drop_labels(
            real.labels, self.generator.no_class, share=options.label_dropout, uniform=self.uniform("dropout")
        )

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            with self.autocast():
                return self.generator.velocity(z, t[:, None], label).float()

        loss = flow_matching_error(velocity, real.images, noise, t).sum()
        (loss / self.samples_per_step).backward()
        return {"loss": loss}

    def _times(self) -> Tensor:
        options = self.config.flow_matching
        if options.time_distribution == "uniform":
            return self.uniform("time")
        return logit_normal(self.normal("time"), mean=options.time_mean, std=options.time_std)


class MeanFlowTraining(RivalTraining):
    """u(z_t, r, t, class) learns the average velocity from the MeanFlow identity."""

    generator: MeanFlowGenerator
    shown = "squared_error"  # the adaptive loss is 1 but for ε where p = 1

    def losses(self) -> dict[str, Tensor]:
        options, real = self.config.mean_flow, self.draw_real()
        noise = self.normal("noise", *self.real.sample_shape)  # [b, C, H, W]
        r, t = self._times()  # [b] each
        label = drop_labels(
            real.labels, self.generator.no_class, share=options.label_dropout, uniform=self.uniform("dropout")
        )
        z = interpolate(real.images, noise, t)
        velocity = self._velocity(noise - real.images, z, t, label)
        target = mean_flow_target(lambda z, r, t, chosen: self._field(z, r, t, label[chosen]), z, r, t, velocity)
        average = self._field(z, r, t, label)
        loss = adaptive_error(average, target, power=options.loss_power, epsilon=options.loss_epsilon).sum()
        (loss / self.samples_per_step).backward()
        return {"loss": loss, "squared_error": (average.detach() - target).square().mean((1, 2, 3)).sum()}

    def _times(self) -> tuple[Tensor, Tensor]:
        """r <= t, equal but for a share of the samples (section 4.3)."""
        options = self.config.mean_flow
        times = logit_normal(self.normal("time", 2), mean=options.time_mean, std=options.time_std)  # [b, 2]
        r, t = times.amin(1), times.amax(1)
        return r.where(self.uniform("apart") < options.apart_share, t), t

    def _field(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor) -> Tensor:
        with self.autocast():
            return self.generator.average_velocity(z, r, t, label).float()

    @torch.no_grad()
    def _velocity(self, velocity: Tensor, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The velocity that is to be learnt: that of guidance for samples with a class."""
        options = self.config.mean_flow
        if not options.is_guided:
            return velocity
        nothing = torch.full_like(label, self.generator.no_class)
        of_any = self._field(z, t, t, nothing)
        of_class = self._field(z, t, t, label) if options.kappa else of_any
        guided = guided_velocity(velocity, of_class, of_any, omega=options.omega, kappa=options.kappa)
        return velocity.where((label == nothing)[:, None, None, None], guided)


class GanTraining(RivalTraining):
    """A generator and a discriminator, a step of the latter before each of the former."""

    def __init__(self, config: RivalConfig, real: ImageSet, device: torch.device) -> None:
        super().__init__(config, real, device)
        self.discriminator = build_discriminator(config, real).to(device)
        unused = EMA(self.discriminator, decays=(0.0,))
        self.discriminator_update = Update(
            self.discriminator, self.adamw(self.discriminator), unused, clip_norm=config.clip_norm
        )

    def losses(self) -> dict[str, Tensor]:
        real = self.draw_real()
        with torch.no_grad():
            generated = self._generate("discriminator", real.labels)
        of_real, squared_gradient = penalised_logits(lambda images: self._judge(images, real.labels), real.images)
        of_generated = self._judge(generated, real.labels)
        loss = discriminator_loss(of_real, of_generated).sum()
        penalty = self.config.gan.r1_gamma / 2 * squared_gradient.sum()
        self.discriminator.zero_grad(set_to_none=True)
        ((loss + penalty) / self.samples_per_step).backward()
        self.discriminator_update(self.learning_rate())

        loss_of_generator = generator_loss(self._judge(self._generate("generator", real.labels), real.labels)).sum()
        (loss_of_generator / self.samples_per_step).backward(inputs=list(self.generator.parameters()))
        return {
            "loss": loss_of_generator,
            "discriminator_loss": loss,
            "r1_penalty": penalty,
            "logit/real": of_real.sum(),
            "logit/generated": of_generated.sum(),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        of_discriminator = self.discriminator_update.tensors()
        return {**super().tensors(), **{f"{PREFIX}{name}": each for name, each in of_discriminator.items()}}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "discriminator": self.discriminator_update.state()}

    def restore(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        super().restore(step, tensors, state)
        of_discriminator = {
            name.removeprefix(PREFIX): each for name, each in tensors.items() if name.startswith(PREFIX)
        }
        self.discriminator_update.restore(of_discriminator, state["discriminator"])

    def _generate(self, purpose: str, labels: Tensor) -> Tensor:
        model = self.generator
        noise = self.normal(f"noise of {purpose}", *self.real.sample_shape)
        style = (self.uniform(f"style of {purpose}", model.num_styles) * model.num_style_entries).long()
        with self.autocast():
            return model(noise, labels, torch.ones_like(labels, dtype=noise.dtype), style).float()

    def _judge(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            return self.discriminator(images, labels).float()


TRAININGS: Final[dict[Method, type[RivalTraining]]] = {
    "flow_matching": FlowMatchingTraining,
    "mean_flow": MeanFlowTraining,
    "gan": GanTraining,
}


def build_generator(config: RivalConfig, real: ImageSet) -> ImageGenerator:
    """The generator of a configuration, its initial weights a function of the seed."""
    channels, image_size, _ = real.sample_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = GENERATORS[config.method](
            image_size=image_size, channels=channels, num_classes=real.num_classes, **to_plain(config.generator)
        )
    if isinstance(model, FlowMatchingGenerator):
        model.sampler = Sampler(config.flow_matching.picture_sampler, config.flow_matching.picture_evaluations)
    return model


def build_discriminator(config: RivalConfig, real: ImageSet) -> Discriminator:
    """The discriminator of a configuration: the generator's sizes, its initial weights a function of the seed."""
    channels, image_size, _ = real.sample_shape
    sizes = {key: value for key, value in to_plain(config.generator).items() if key not in NOT_OF_THE_DISCRIMINATOR}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Discriminator(image_size=image_size, channels=channels, num_classes=real.num_classes, **sizes)
