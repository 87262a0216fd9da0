"""MeanFlow (Geng et al., arXiv 2505.13447): the average velocity of a flow, learnt from an identity, in one step."""

import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vision.rivals.velocity import VelocityGenerator

# u(z [k, C, H, W], r [k], t [k], samples that these are [k]) -> [k, C, H, W]
Field = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class MeanFlowGenerator(VelocityGenerator):
    """Images by MeanFlow: u(z, r, t, class) is the mean velocity between t and r, so one step leads to the image.

    The network is told t and t - r. `evaluations` is the number of steps, 1 at first.

    Args:
        architecture: keywords of `ImageGenerator`.

    >>> model = MeanFlowGenerator(image_size=8, channels=1, patch_size=2, hidden_size=16, depth=1, num_heads=2,
    ...                           cond_size=16, num_classes=10)
    >>> model(torch.randn(2, 1, 8, 8), torch.tensor([0, 9]), torch.ones(2)).shape
    torch.Size([2, 1, 8, 8])
    """

    num_times = 2
    evaluations = 1

    def average_velocity(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """u [B, C, H, W] at z [B, C, H, W] between times r and t [B], of classes [B]."""
        return self.velocity(z, torch.stack((t, t - r), dim=1), label)

    def forward(self, noise: Tensor, label: Tensor, guidance_scale: Tensor, style: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] by z_r = z_t - (t - r) u(z_t, r, t) (Eq. 12); arguments as of `ImageGenerator`.

        Raises:
            ValueError: as `ImageGenerator`, and for an α other than 1: MeanFlow is guided in training.
        """
        self._check_inputs(noise, label, guidance_scale, label.new_empty((len(label), 0)) if style is None else style)
        if bool((guidance_scale != 1).any()):
            raise ValueError("guidance_scale: expected 1, since MeanFlow is guided in training, found another")
        z = noise
        for t, r in pairwise([1 - step / self.evaluations for step in range(self.evaluations)] + [0.0]):
            z = z - (t - r) * self.average_velocity(z, z.new_full((len(z),), r), z.new_full((len(z),), t), label)
        return z


@torch.no_grad()
def mean_flow_target(field: Field, z: Tensor, r: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """What the MeanFlow identity says u(z, r, t) should be: v - (t - r) du/dt (Eq. 6, 10), without gradient.

    du/dt = v ∂u/∂z + ∂u/∂t along the path (Eq. 8): one Jacobian-vector product with the tangents (v, 0, 1). Where r = t
    it has no weight, and is not computed: the target is v, that of flow matching.

    Args:
        field: u, of the samples that have r < t.
        z: points of the paths, [B, C, H, W].
        r, t: times r <= t, [B].
        velocity: v at z and t, [B, C, H, W].

    Returns:
        [B, C, H, W].

    >>> z, velocity, (r, t) = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([[0.0], [1.0]])
    >>> mean_flow_target(lambda z, r, t, chosen: 3 * z, z, r, t, velocity).item()  # du/dt = 3
    -2.0
    """
    target = velocity.clone()
    chosen = (r < t).nonzero().squeeze(1)  # [k]
    if len(chosen):
        z, r, t, velocity = z[chosen], r[chosen], t[chosen], velocity[chosen]
        tangents = (velocity, torch.zeros_like(r), torch.ones_like(t))
        # Of the attention's kernels only the plain one has a forward derivative.
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)  # which torch.func itself uses
            derivative = torch.func.jvp(lambda z, r, t: field(z, r, t, chosen), (z, r, t), tangents)[1]
        target[chosen] = velocity - (t - r)[:, None, None, None] * derivative
    return target


def adaptive_error(average: Tensor, target: Tensor, *, power: float, epsilon: float) -> Tensor:
    """w || u - target ||² of each sample, its weight w = (|| u - target ||² + ε)^-p without gradient (section 4.3).

    Args:
        average: u, [B, C, H, W].
        target: [B, C, H, W].
        power: p; 0 leaves the squared error.
        epsilon: ε.

    Returns:
        [B].

    >>> average, target = torch.full((1, 1, 1, 2), 3.0), torch.zeros(1, 1, 1, 2)
    >>> adaptive_error(average, target, power=0.0, epsilon=1e-3).item()
    18.0
    >>> adaptive_error(average, target, power=1.0, epsilon=0.0).item()
    1.0
    """
    squared = (average - target).square().sum((1, 2, 3))
    return squared * (squared.detach() + epsilon).pow(-power)


def guided_velocity(velocity: Tensor, of_class: Tensor, of_any: Tensor, *, omega: float, kappa: float) -> Tensor:
    """The velocity of a flow with guidance: ω v + κ u(class) + (1 - ω - κ) u(no class), u at r = t (appendix B.1).

    It is the flow of classifier-free guidance of scale ω / (1 - κ).

    Args:
        velocity: ε - x of each sample, [B, C, H, W].
        of_class, of_any: what the network says at r = t, [B, C, H, W].
        omega, kappa: ω and κ; (1, 0) is no guidance.

    >>> guided_velocity(*torch.tensor([1.0, 2.0, 4.0]), omega=1.0, kappa=0.5).item()
    0.0
    """
    return omega * velocity + kappa * of_class + (1 - omega - kappa) * of_any
