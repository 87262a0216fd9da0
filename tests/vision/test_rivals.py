"""The rivals' mathematics: paths and targets, solvers, MeanFlow's identity, the GAN's losses and penalty."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from vision.generator import ImageGenerator
from vision.rivals.flow_matching import FlowMatchingGenerator, Sampler, Solver, flow_matching_error, integrate
from vision.rivals.gan import Discriminator, discriminator_loss, generator_loss, penalised_logits
from vision.rivals.mean_flow import MeanFlowGenerator, adaptive_error, guided_velocity, mean_flow_target
from vision.rivals.velocity import VelocityGenerator, drop_labels, interpolate, logit_normal
from vision.sample import sample

SIZES = {
    "image_size": 8, "channels": 1, "patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "cond_size": 16,
    "num_classes": 10, "num_context_tokens": 1,
}  # fmt: skip
GENERATORS = (FlowMatchingGenerator, MeanFlowGenerator)


def made(kind: type[VelocityGenerator]) -> VelocityGenerator:
    """A network whose every weight matters: none is zero as at the start of a training."""
    model = kind(**SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@contextmanager
def counted(model: VelocityGenerator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of the batches that pass through the transformer."""
    sizes: list[int] = []
    transform = model.transform

    def counting(z: Tensor, condition: Tensor) -> Tensor:
        sizes.append(len(z))
        return transform(z, condition)

    with monkeypatch.context() as patched:
        patched.setattr(model, "transform", counting)
        yield sizes


# Flow matching


def test_velocity_of_the_path_is_the_target() -> None:
    x, noise = torch.randn(2, 5, 1, 3, 3, dtype=torch.float64)
    t, step = torch.rand(5, dtype=torch.float64) * 0.8 + 0.1, 1e-6
    slope = (interpolate(x, noise, t + step) - interpolate(x, noise, t - step)) / (2 * step)
    assert flow_matching_error(lambda z, t: slope, x, noise, t).max() < 1e-15
    torch.testing.assert_close(interpolate(x, noise, torch.zeros(5, dtype=torch.float64)), x)
    torch.testing.assert_close(interpolate(x, noise, torch.ones(5, dtype=torch.float64)), noise)


def test_best_linear_velocity_is_that_of_the_gaussians() -> None:
    """Of N(m, s²) and N(0, 1), E[ε - x | z_t] is known; no linear field has a smaller expected error."""
    mean, std, count = 2.0, 0.5, 200_000
    x = (mean + std * torch.randn(count, dtype=torch.float64)).reshape(-1, 1, 1, 1)
    noise = torch.randn(count, 1, 1, 1, dtype=torch.float64)
    for time in (0.2, 0.7):
        t = torch.full((count,), time, dtype=torch.float64)
        z = interpolate(x, noise, t)
        design = torch.stack((torch.ones_like(z).flatten(), z.flatten()), dim=1)  # [count, 2]
        fitted = torch.linalg.lstsq(design, (noise - x).flatten()).solution
        velocity = gaussian_velocity(mean, std)
        intercept = velocity(torch.zeros(1, dtype=torch.float64), time)
        slope = velocity(torch.ones(1, dtype=torch.float64), time) - intercept
        torch.testing.assert_close(fitted, torch.cat((intercept, slope)), atol=0.02, rtol=0)
        best = velocity(z, time)
        errors = [flow_matching_error(lambda z, t, v=v: v, x, noise, t).mean() for v in (best, best + 0.1)]
        assert errors[0] < errors[1] - 0.005


def gaussian_velocity(mean: float, std: float) -> Callable[[Tensor, float], Tensor]:
    """Velocity of the straight paths between N(mean, std²) at t = 0 and N(0, 1) at t = 1, in closed form."""

    def velocity(z: Tensor, t: float) -> Tensor:
        variance = (1 - t) ** 2 * std**2 + t**2
        return -mean + (t - (1 - t) * std**2) / variance * (z - (1 - t) * mean)

    return velocity


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solver_carries_one_gaussian_to_the_other_with_the_error_of_its_order(solver: Solver, order: int) -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = 2.0 + 0.5 * z  # the flow between Gaussians on a line keeps their quantiles
    velocity = gaussian_velocity(2.0, 0.5)
    errors = [(integrate(velocity, z, solver=solver, steps=n) - exact).abs().max().item() for n in (40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    assert errors[-1] < 0.02


def test_integration_is_exact_where_the_solver_is() -> None:
    z = torch.zeros(1, dtype=torch.float64)
    assert integrate(lambda z, t: torch.ones_like(z), z, solver="euler", steps=3).item() == pytest.approx(-1)
    assert integrate(lambda z, t: z.new_full((1,), 2 * t), z, solver="heun", steps=3).item() == pytest.approx(-1)
    assert integrate(lambda z, t: z.new_full((1,), 2 * t), z, solver="euler", steps=1).item() == -2


@pytest.mark.parametrize(
    ("sampler", "scale"),
    [(Sampler("euler", 1), 1.0), (Sampler("euler", 6), 1.0), (Sampler("heun", 6), 1.0), (Sampler("euler", 6), 2.0),
     (Sampler("heun", 8), 3.0)],
)  # fmt: skip
def test_evaluations_are_the_passes_of_the_network(
    sampler: Sampler, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(FlowMatchingGenerator)
    model.sampler = sampler
    with torch.no_grad(), counted(model, monkeypatch) as sizes:
        model(torch.randn(3, 1, 8, 8), torch.arange(3), torch.full((3,), scale))
    assert sum(sizes) == 3 * sampler.evaluations


@pytest.mark.parametrize(("sampler", "guided"), [(Sampler("heun", 3), False), (Sampler("euler", 1), True)])
def test_evaluations_that_make_no_whole_step_are_refused(sampler: Sampler, guided: bool) -> None:
    with pytest.raises(ValueError, match=rf"multiple of 2.*{sampler.solver}.*found {sampler.evaluations}"):
        sampler.steps(guided=guided)


def test_guidance_extrapolates_from_no_class_to_the_class() -> None:
    model = made(FlowMatchingGenerator)
    model.sampler = Sampler("euler", 2)
    noise, label = torch.randn(3, 1, 8, 8), torch.tensor([1, 5, 7])
    with torch.no_grad():
        guided = model(noise, label, torch.full((3,), 2.5))
        start = torch.ones(3, 1)
        of_class = model.velocity(noise, start, label)
        of_any = model.velocity(noise, start, torch.full((3,), model.no_class))
        # two passes make one step, from noise to image
        torch.testing.assert_close(guided, noise - (2.5 * of_class - 1.5 * of_any), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(of_class, of_any)


def test_times_are_logit_normal() -> None:
    t = logit_normal(torch.randn(100_000), mean=-0.4, std=1.5)
    logit = torch.log(t / (1 - t))
    assert logit.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert logit.std().item() == pytest.approx(1.5, abs=0.02)


def test_share_of_labels_becomes_no_class() -> None:
    label, uniform = torch.arange(1000) % 10, torch.rand(1000)
    dropped = drop_labels(label, 10, share=0.3, uniform=uniform)
    assert torch.equal(dropped == 10, uniform < 0.3)
    assert torch.equal(dropped[dropped != 10], label[dropped != 10])
    assert torch.equal(drop_labels(label, 10, share=0.0, uniform=uniform), label)


# MeanFlow


def test_identity_holds_for_a_known_average_velocity() -> None:
    """dz/dt = a z from t to r: z_r = z exp(a (r - t)), so u = z (1 - exp(a (r - t))) / (t - r)."""
    rate = 1.7

    def average(z: Tensor, r: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        span = (t - r)[:, None, None, None]
        return -z * torch.expm1(-rate * span) / span

    z = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    r, t = torch.rand(2, 6, dtype=torch.float64).sort(0).values
    target = mean_flow_target(average, z, r, t, rate * z)
    torch.testing.assert_close(target, average(z, r, t, torch.arange(6)), rtol=1e-9, atol=1e-9)
    wrong = mean_flow_target(lambda z, r, t, chosen: 1.1 * average(z, r, t, chosen), z, r, t, rate * z)
    assert (wrong - 1.1 * average(z, r, t, torch.arange(6))).abs().max() > 0.01


def test_derivative_of_the_network_is_that_of_differences() -> None:
    model = made(MeanFlowGenerator)
    assert isinstance(model, MeanFlowGenerator)
    model.double()
    label = torch.tensor([0, 3, 10, 9])
    z, velocity = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)
    r, t = torch.tensor([[0.1, 0.0, 0.3, 0.5], [0.9, 1.0, 0.4, 0.5]], dtype=torch.float64)
    target = mean_flow_target(lambda z, r, t, chosen: model.average_velocity(z, r, t, label[chosen]), z, r, t, velocity)
    step = 1e-5
    with torch.no_grad():
        ahead = model.average_velocity(z + step * velocity, r, t + step, label)
        behind = model.average_velocity(z - step * velocity, r, t - step, label)
    derivative = (ahead - behind) / (2 * step)
    torch.testing.assert_close(target, velocity - (t - r)[:, None, None, None] * derivative, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(target[:3], velocity[:3], atol=1e-3)  # the derivative is there


def test_equal_times_are_flow_matching() -> None:
    def never(z: Tensor, r: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        raise AssertionError("no derivative is needed")

    x, noise = torch.randn(2, 4, 1, 8, 8)
    t = torch.rand(4)
    target = mean_flow_target(never, interpolate(x, noise, t), t, t, noise - x)
    assert torch.equal(target, noise - x)
    average = torch.randn(4, 1, 8, 8)
    error = adaptive_error(average, target, power=0.0, epsilon=1e-3) / (8 * 8)
    torch.testing.assert_close(error, flow_matching_error(lambda z, t: average, x, noise, t))


def test_only_samples_with_times_apart_are_differentiated() -> None:
    seen = []

    def field(z: Tensor, r: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        seen.append(chosen)
        return 2 * z

    z, velocity = torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1)
    r, t = torch.tensor([0.0, 0.5, 0.25]), torch.tensor([1.0, 0.5, 0.75])
    target = mean_flow_target(field, z, r, t, velocity).flatten()
    assert [chosen.tolist() for chosen in seen] == [[0, 2]]
    assert target.tolist() == [1 - 1 * 2, 1, 1 - 0.5 * 2]


def test_weight_of_the_adaptive_error_carries_no_gradient() -> None:
    average = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2).requires_grad_()
    loss = adaptive_error(average, torch.zeros(1, 1, 1, 2), power=1.0, epsilon=0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), average)
    torch.testing.assert_close(gradient.flatten(), 2 * torch.tensor([3.0, 4.0]) / 25)  # of ||u||² / 25


def test_guided_velocity_is_guidance_of_scale_omega_over_one_minus_kappa() -> None:
    """Where u(class) is the guided flow itself, v' = ω v + κ v' + (1 - ω - κ) v∅ gives v' = v∅ + s (v - v∅)."""
    velocity, of_any = torch.randn(2, 5, dtype=torch.float64)
    omega, kappa = 1.5, 0.25
    scale = omega / (1 - kappa)
    fixed_point = of_any + scale * (velocity - of_any)
    torch.testing.assert_close(guided_velocity(velocity, fixed_point, of_any, omega=omega, kappa=kappa), fixed_point)
    assert torch.equal(guided_velocity(velocity, fixed_point, of_any, omega=1.0, kappa=0.0), velocity)


@pytest.mark.parametrize("evaluations", [1, 3])
def test_mean_flow_takes_its_steps(evaluations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(MeanFlowGenerator)
    assert isinstance(model, MeanFlowGenerator)
    model.evaluations = evaluations
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([4, 2])
    with torch.no_grad(), counted(model, monkeypatch) as sizes:
        images = model(noise, label, torch.ones(2))
    assert sizes == [2] * evaluations
    z, times = noise, [1 - n / evaluations for n in range(evaluations + 1)]
    with torch.no_grad():
        for t, r in zip(times, times[1:], strict=False):
            z = z - (t - r) * model.average_velocity(z, torch.full((2,), r), torch.full((2,), t), label)
    torch.testing.assert_close(images, z)


def test_mean_flow_refuses_guidance_afterwards() -> None:
    with pytest.raises(ValueError, match="MeanFlow is guided in training"):
        made(MeanFlowGenerator)(torch.randn(1, 1, 8, 8), torch.tensor([0]), torch.tensor([2.0]))


# Networks


@pytest.mark.parametrize("kind", GENERATORS)
def test_sample_depends_on_seed_and_index_alone(kind: type[VelocityGenerator]) -> None:
    model, labels = made(kind), torch.arange(7) % 10
    whole = sample(model, labels, seed=3)
    part = sample(model, labels[4:6], seed=3, first_index=4, batch_size=2)
    torch.testing.assert_close(part, whole[4:6], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sample(model, labels, seed=4), whole, atol=0.1)
    assert not torch.allclose(sample(model, (labels + 1) % 10, seed=3), whole, atol=1e-3)


@pytest.mark.parametrize("kind", GENERATORS)
def test_every_time_and_the_class_reach_the_field(kind: type[VelocityGenerator]) -> None:
    model, z = made(kind), torch.randn(1, 1, 8, 8)
    times, label = torch.full((1, kind.num_times), 0.4), torch.tensor([3])
    with torch.no_grad():
        here = model.velocity(z, times, label)
        assert not torch.allclose(model.velocity(z, times, torch.tensor([model.no_class])), here, atol=1e-3)
        for which in range(kind.num_times):
            moved = times.clone()
            moved[0, which] += 0.1
            assert not torch.allclose(model.velocity(z, moved, label), here, atol=1e-3)


@pytest.mark.parametrize("kind", GENERATORS)
def test_model_is_read_back_as_it_was_written(
    kind: type[VelocityGenerator], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, model = tmp_path_factory.mktemp("model"), made(kind)
    model.save_pretrained(folder)
    labels = torch.arange(3)
    assert torch.equal(sample(kind.from_pretrained(folder), labels), sample(model, labels))


@pytest.mark.parametrize("kind", GENERATORS)
def test_as_many_weights_as_the_one_step_generator(kind: type[VelocityGenerator]) -> None:
    sizes = SIZES | {"hidden_size": 128, "cond_size": 128, "num_heads": 4, "num_styles": 8}

    def count(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    assert count(kind(**sizes)) == pytest.approx(count(ImageGenerator(**sizes)), rel=0.03)


# GAN


def test_penalty_is_the_squared_gradient() -> None:
    matrix = torch.randn(9, 9, dtype=torch.float64)
    matrix = matrix + matrix.T
    images = torch.randn(4, 1, 3, 3, dtype=torch.float64)

    def quadratic(images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return (flat @ matrix * flat).sum(1) / 2

    logits, squared = penalised_logits(quadratic, images)
    torch.testing.assert_close(logits, quadratic(images))
    torch.testing.assert_close(squared, (images.flatten(1) @ matrix).square().sum(1))  # ∇ of xᵀAx/2 is Ax


def test_penalty_of_the_discriminator_has_the_gradient_of_differences() -> None:
    discriminator = Discriminator(
        **{key: value for key, value in SIZES.items() if key != "num_context_tokens"}
    ).double()
    for parameter in discriminator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, label = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 5, 9])

    def penalty() -> Tensor:
        return penalised_logits(lambda images: discriminator(images, label), images).squared_gradient.sum()

    for name in ("patch_embedding.weight", "blocks.0.attention.qkv.weight", "projection.weight"):
        weight = discriminator.get_parameter(name)
        (gradient,) = torch.autograd.grad(penalty(), weight)
        direction = torch.randn_like(weight)
        expected = (gradient * direction).sum().item()
        moved = []
        for step in (1e-6, -2e-6, 1e-6):  # ahead, behind, back again
            weight.data += step * direction
            moved.append(penalty().item())
        assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(expected, rel=1e-4), name


def test_losses_are_logarithms_of_the_probabilities() -> None:
    real, generated = torch.randn(2, 6, dtype=torch.float64) * 3
    expected = -real.sigmoid().log() - (1 - generated.sigmoid()).log()
    torch.testing.assert_close(discriminator_loss(real, generated), expected)
    torch.testing.assert_close(generator_loss(generated), -generated.sigmoid().log())


def test_class_decides_the_logit() -> None:
    discriminator = Discriminator(**{key: value for key, value in SIZES.items() if key != "num_context_tokens"})
    image = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    first, second = discriminator(image, torch.tensor([0, 1])).tolist()
    assert first != second
