"""Flow matching (Lipman et al., arXiv 2210.02747) along straight paths, sampled by Euler's or Heun's method."""

from collections.abc import Callable
from itertools import pairwise
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from vision.rivals.velocity import VelocityGenerator, interpolate

Solver = Literal["euler", "heun"]
EVALUATIONS_PER_STEP: Final[dict[Solver, int]] = {"euler": 1, "heun": 2}


class Sampler(NamedTuple):
    """How the field is followed: a solver, and the passes of the network that one image may take in all."""

    solver: Solver
    evaluations: int

    def steps(self, *, guided: bool) -> int:
        """Steps of the solver; with guidance each velocity takes two passes.

        Raises:
            ValueError: the passes make no whole number of steps.

        >>> Sampler("heun", 20).steps(guided=True)
        5
        """
        each = EVALUATIONS_PER_STEP[self.solver] * (2 if guided else 1)
        if self.evaluations < each or self.evaluations % each:
            raise ValueError(
                f"evaluations: expected a multiple of {each}, those of a step of {self.solver}"
                f"{' with guidance' if guided else ''}, found {self.evaluations}"
            )
        return self.evaluations // each


class FlowMatchingGenerator(VelocityGenerator):
    """Images by flow matching: noise follows the velocity field v(z, t, class) from t = 1 to 0.

    `sampler` says how; its default is Euler's method in 20 steps.

    Args:
        architecture: keywords of `ImageGenerator`.

    >>> model = FlowMatchingGenerator(image_size=8, channels=1, patch_size=2, hidden_size=16, depth=1, num_heads=2,
    ...                               cond_size=16, num_classes=10)
    >>> model(torch.randn(2, 1, 8, 8), torch.tensor([0, 9]), torch.ones(2)).shape
    torch.Size([2, 1, 8, 8])
    """

    num_times = 1
    sampler = Sampler("euler", 20)

    def forward(self, noise: Tensor, label: Tensor, guidance_scale: Tensor, style: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W]; arguments as of `ImageGenerator`, whose α is here the scale of classifier-free guidance.

        v = v(no class) + α (v(class) - v(no class)): arXiv 2207.12598, Eq. 6 with α = 1 + w. Where α is 1 throughout,
        the network is not asked about no class.

        Raises:
            ValueError: as `ImageGenerator`, and if the sampler's evaluations make no whole number of steps.
        """
        self._check_inputs(noise, label, guidance_scale, label.new_empty((len(label), 0)) if style is None else style)
        guided = bool((guidance_scale != 1).any())
        nothing = torch.full_like(label, self.no_class)
        scale = guidance_scale[:, None, None, None]

        def velocity(z: Tensor, time: float) -> Tensor:
            times = z.new_full((len(z), 1), time)
            of_class = self.velocity(z, times, label)
            if not guided:
                return of_class
            of_any = self.velocity(z, times, nothing)
            return of_any + scale * (of_class - of_any)

        return integrate(velocity, noise, solver=self.sampler.solver, steps=self.sampler.steps(guided=guided))


def integrate(velocity: Callable[[Tensor, float], Tensor], z: Tensor, *, solver: Solver, steps: int) -> Tensor:
    """Follow dz/dt = v(z, t) from t = 1 to 0 in equal steps, by Euler's method or Heun's.

    Args:
        velocity: v, of [B, ...] and t.
        z: where to start, [B, ...].
        solver: of order 1 (one evaluation a step) or 2 (two).
        steps: how many.

    Returns:
        z at t = 0, [B, ...].

    >>> integrate(lambda z, t: torch.ones_like(z), torch.zeros(1), solver="euler", steps=4).item()
    -1.0
    """
    times = [1 - step / steps for step in range(steps)] + [0.0]
    for start, end in pairwise(times):
        slope = velocity(z, start)
        if solver == "heun":
            slope = (slope + velocity(z + (end - start) * slope, end)) / 2
        z = z + (end - start) * slope
    return z


def flow_matching_error(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """|| v(z_t, t) - (ε - x) ||² of each sample, the mean over its pixels (arXiv 2210.02747, Eq. 23 with σ_min = 0).

    Args:
        velocity: v, of [B, C, H, W] and times [B].
        x: real samples, [B, C, H, W].
        noise: ε, [B, C, H, W].
        t: [B].

    Returns:
        [B].

    >>> x, noise = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    >>> flow_matching_error(lambda z, t: torch.ones_like(z), x, noise, torch.rand(1)).item()
    0.0
    """
    return (velocity(interpolate(x, noise, t), t) - (noise - x)).square().mean((1, 2, 3))
