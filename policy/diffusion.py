"""The baseline's noise process: Diffusion Policy's DDPM, sampled in 100 evaluations, or in fewer by DDIM."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from policy.draws import Draws

ActionDenoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [B, T, A], step [B], cond [B, To, C] -> [B, T, A]
Sampler = Literal["ddpm", "ddim"]


class DiffusionProcess:
    """Noise that a network learns to predict, and its removal step by step.

    Source: Diffusion Policy's configuration of diffusers' schedulers: squared-cosine betas, the noise is predicted,
    data is clipped to [-1, 1] in every step, DDPM with the smaller of the two fixed variances, DDIM without noise.

    Args:
        train_steps: steps of the process that is trained.
        sampler: "ddpm" or "ddim".
        steps: evaluations of the network per sample, at most train_steps.

    Raises:
        ValueError: an unknown sampler, or steps that are not 1 ... train_steps.

    >>> process = DiffusionProcess(sampler="ddim", steps=16)
    >>> zero = lambda x, step, cond: torch.zeros_like(x)
    >>> generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    >>> process.sample(zero, (3, 8, 2), torch.zeros(3, 2, 5), generators).shape
    torch.Size([3, 8, 2])
    """

    def __init__(self, train_steps: int = 100, *, sampler: Sampler = "ddpm", steps: int = 100) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler  # takes seconds

        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler must be one of {', '.join(map(repr, get_args(Sampler)))}, got {sampler!r}")
        if not 1 <= steps <= train_steps:
            raise ValueError(f"steps must be 1 to train_steps = {train_steps}, got {steps}")
        settings: dict[str, Any] = {
            "num_train_timesteps": train_steps,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "epsilon",
            "clip_sample": True,
        }
        self.train_steps = train_steps
        self.steps = steps
        scheduler: Any = DDIMScheduler(**settings)
        if sampler == "ddpm":
            scheduler = DDPMScheduler(**settings, variance_type="fixed_small")
        self.scheduler = scheduler
        self.scheduler.set_timesteps(steps)

    def loss(self, network: ActionDenoiser, actions: Tensor, cond: Tensor, draws: Draws) -> Tensor:
        """Squared error of the predicted noise at a random step of each row, averaged over the chunk.

        Args:
            network: `network(x, step, cond)` predicts the noise in x.
            actions: normalised chunks [B, T, A].
            cond: features of the observations [B, To, C].
            draws: where steps and noise come from.

        Returns:
            One loss per row, [B].
        """
        step = draws.integers(self.train_steps, (len(actions),)).to(actions.device)
        noise = draws.normal(actions.shape).to(actions)
        predicted = network(self.add_noise(actions, noise, step), step, cond)
        return (predicted - noise).square().flatten(1).mean(1)

    def add_noise(self, actions: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """sqrt(a) actions + sqrt(1 - a) noise, where a falls from 1 to 0 along the steps.

        Args:
            actions: clean chunks [B, T, A].
            noise: [B, T, A].
            step: int64 [B], from 0 to train_steps - 1.

        Returns:
            [B, T, A].
        """
        return self.scheduler.add_noise(actions, noise, step)

    @torch.no_grad()
    def sample(
        self, network: ActionDenoiser, shape: Sequence[int], cond: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Chunks from noise, in `steps` evaluations of the network.

        Args:
            network: `network(x, step, cond)` predicts the noise in x.
            shape: (B, T, A).
            cond: features of the observations [B, To, C].
            generators: one per row, so that a row is the same in every batch.

        Raises:
            ValueError: there are not as many generators as rows.

        Returns:
            [B, T, A] on the device and in the dtype of cond, within [-1, 1] up to rounding.
        """
        x = row_noise(shape, generators).to(cond)
        for step in self.scheduler.timesteps:  # on the CPU: as indices, they would make a GPU wait
            predicted = network(x, torch.full((len(x),), int(step), device=x.device), cond)
            x = self.scheduler.step(predicted, step, x, generator=list(generators)).prev_sample
        return x


def row_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise, each row from its own generator.

    Args:
        shape: (B, ...).
        generators: B of them, on one device.

    Raises:
        ValueError: there are not as many generators as rows.

    Returns:
        float32 [B, ...] on the generators' device.

    >>> alone = row_noise((1, 3), [torch.Generator().manual_seed(5)])
    >>> both = row_noise((2, 3), [torch.Generator().manual_seed(seed) for seed in (4, 5)])
    >>> torch.equal(alone[0], both[1])
    True
    """
    if len(generators) != shape[0]:
        raise ValueError(f"expected one generator per row, {shape[0]}, got {len(generators)}")
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g, device=g.device) for g in generators])
