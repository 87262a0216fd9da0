"""The loss: the release's own numbers, the float64 loops, gradients, symmetries, and gradient accumulation."""

from pathlib import Path
from typing import Any, NamedTuple, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from driftfield import DriftingBatch, DriftingLoss, drifting_field
from driftfield.kernel import NormalizeOver

from . import oracle

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "drift_loss.npz"))
GOLDEN_CASES = sorted({key.split("/")[0] for key in GOLDEN})
seeds = st.integers(0, 2**32 - 1)

# How far the release's float32 is from the float64 loops, relative. Its distance of a sample to itself, and of equal
# samples, is rounding of |x|², up to 1e-3 |x|, where exact arithmetic has 1e-4. That moves the scale a little always,
# more where a sample has few targets, and moves the affinities of duplicates; far from the origin every distance
# carries the rounding of squares of 1e4.
ORDINARY = 2e-5
RELEASE_ROUNDING = {"one_generated": 1e-4, "duplicates": 1e-3, "far": 2e-4}


class Result(NamedTuple):
    loss: np.ndarray
    gradient: np.ndarray
    squared_norm: np.ndarray
    scale: np.ndarray


def run(loss_fn: DriftingLoss, x: torch.Tensor, *others: torch.Tensor | None) -> Result:
    x = x.detach().requires_grad_()
    output = loss_fn(x, *others)
    output.loss.mean().backward()
    assert x.grad is not None
    values = output.loss.detach(), x.grad, output.drift_norm.square(), output.feature_scale
    return Result(*(value.double().numpy() for value in values))


def expected(x: torch.Tensor, *others: torch.Tensor | None, **options: Any) -> Result:
    arrays = (None if tensor is None else tensor.double().numpy() for tensor in others)
    found = oracle.drifting_loss(x.double().numpy(), *arrays, **options)
    return Result(found.loss, found.gradient, found.squared_norm, np.array(found.scale))


def assert_agree(found: Result, reference: Result, tolerance: float) -> None:
    errors = {name: oracle.relative_error(a, b) for name, a, b in zip(Result._fields, found, reference, strict=True)}
    assert max(errors.values()) < tolerance, errors


class GoldenCase(NamedTuple):
    temperatures: tuple[float, ...]
    arguments: tuple[torch.Tensor | None, ...]  # x, positives, unconditional, unconditional_weight
    release: Result


def golden_case(name: str) -> GoldenCase:
    def array(key: str) -> np.ndarray | None:
        return GOLDEN.get(f"{name}/{key}")

    temperatures = tuple(float(f"{temperature:.6g}") for temperature in GOLDEN[f"{name}/R"])
    for unused in ("w_gen", "w_pos"):  # the release can weigh these too; every case has them at 1
        weights = array(unused)
        assert weights is None or (weights == 1).all()
    found = (array(key) for key in ("gen", "pos", "neg", "w_neg"))
    squared_norm = np.array([GOLDEN[f"{name}/force_ms_{temperature}"] for temperature in temperatures])
    release = Result(GOLDEN[f"{name}/loss"], GOLDEN[f"{name}/grad_of_mean_loss"], squared_norm, GOLDEN[f"{name}/scale"])
    return GoldenCase(temperatures, tuple(None if a is None else torch.from_numpy(a) for a in found), release)


@pytest.mark.filterwarnings("ignore:one (generated sample|positive)")
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_cases_of_the_release(name: str) -> None:
    case = golden_case(name)
    found = run(DriftingLoss(case.temperatures), *case.arguments)
    assert_agree(found, case.release, RELEASE_ROUNDING.get(name, ORDINARY))


@pytest.mark.filterwarnings("ignore:one (generated sample|positive)")
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_cases_against_the_oracle(name: str) -> None:
    case = golden_case(name)
    reference = expected(*case.arguments, temperatures=case.temperatures)
    loss_fn = DriftingLoss(case.temperatures)
    assert_agree(run(loss_fn, *case.arguments), reference, 1e-5)
    doubles = [None if argument is None else argument.double() for argument in case.arguments]
    assert_agree(run(loss_fn, *doubles), reference, 1e-12)
    assert_agree(case.release, reference, RELEASE_ROUNDING.get(name, ORDINARY))  # the tolerances above are its own


def random_batch(seed: int, *, duplicates: bool = False) -> tuple[torch.Tensor, ...]:
    """x, positives, unconditional, weight of 2 groups in float64."""
    rng = np.random.default_rng(seed)
    num_samples, num_positives, num_unconditional, dimension = rng.integers([2, 2, 1, 1], [6, 6, 4, 6])
    sets = [rng.standard_normal((2, count, dimension)) for count in (num_samples, num_positives, num_unconditional)]
    if duplicates:
        sets[1][:, 1:] = sets[0][:, :1]  # positives repeat each other and equal a sample
    weight = 3.0 * rng.random((2, num_unconditional)) * (rng.random((2, num_unconditional)) < 0.7)
    return tuple(torch.from_numpy(array) for array in (*sets, weight))


@given(
    seeds,
    st.sampled_from(["official", "paper"]),
    st.sampled_from(get_args(NormalizeOver)),
    st.sampled_from([(1.0, 1.0), (1.5, 1.0), (1.0, 0.0)]),
    st.sampled_from([(None, None), (True, False), (False, True)]),
    st.booleans(),
    st.booleans(),
)
def test_loss_is_the_oracles(
    seed: int,
    recipe: Any,
    over: NormalizeOver,
    factors: tuple[float, float],
    normalized: tuple[bool | None, bool | None],
    duplicates: bool,
    guided: bool,
) -> None:
    x, positives, unconditional, weight = random_batch(seed, duplicates=duplicates)
    official = recipe == "official"
    features, drift = (official if flag is None else flag for flag in normalized)
    loss_fn = DriftingLoss(
        (0.05, 0.7),
        recipe=recipe,
        normalize_over=over,
        attraction=factors[0],
        repulsion=factors[1],
        normalize_features=normalized[0],
        normalize_drift=normalized[1],
    )
    others = (positives, unconditional, weight) if guided else (positives,)
    reference = expected(
        x,
        *others,
        temperatures=(0.05, 0.7),
        over=over,
        floor=1e-6 if official and over != "x" else 0.0,
        attraction=factors[0],
        repulsion=factors[1],
        normalize_features=features,
        normalize_drift=drift,
    )
    assert_agree(run(loss_fn, x, *others), reference, 1e-8)


@given(seeds, st.sampled_from(["official", "paper"]))
def test_gradient_of_the_mean_loss_is_the_drift(seed: int, recipe: Any) -> None:
    """∇ mean loss = -2 V / (numel · coordinate scale): a step of descent moves every sample along V  (Eq. 6)."""
    x, positives, *_ = random_batch(seed)
    found = run(DriftingLoss([0.5], recipe=recipe), x, positives)
    scale = found.scale / x.shape[-1] ** 0.5 if recipe == "official" else 1.0
    drift = torch.from_numpy(-0.5 * found.gradient * x.numel() * scale)
    np.testing.assert_allclose(drift.square().mean((1, 2)), found.loss, rtol=1e-9)  # loss = mean |V|² of a group

    # the field of field.py, in the units of the recipe
    unit = torch.from_numpy(found.scale) if recipe == "official" else torch.tensor(1.0)
    floor = 1e-6 if recipe == "official" else 0.0
    field = drifting_field(x, positives, x, temperature=float(0.5 * unit), mask_self=True, affinity_floor=floor)
    field = field / scale
    if recipe == "official":
        field = field / field.square().mean().sqrt()
    torch.testing.assert_close(drift, field, rtol=1e-7, atol=1e-9)


def test_mean_official_loss_is_one_per_temperature_and_at_most_their_square() -> None:
    x, positives = torch.randn(6, 16, 8), torch.randn(6, 16, 8) + 1.0
    for temperature in (0.02, 0.2, 1.0):
        assert abs(DriftingLoss([temperature])(x, positives).loss.mean() - 1.0) < 1e-5
    assert 3.0 < DriftingLoss()(x, positives).loss.mean() < 9.0


def test_paper_loss_falls_to_zero_at_equilibrium_and_the_official_one_does_not() -> None:
    positives = torch.randn(4, 128, 2)
    losses = {
        recipe: [
            DriftingLoss([0.5], recipe=recipe)(torch.randn(4, 128, 2) + shift, positives).loss.mean().item()
            for shift in (2.0, 1.0, 0.0)
        ]
        for recipe in ("official", "paper")
    }
    far, near, there = losses["paper"]
    assert far > near > 5.0 * there
    assert max(losses["official"]) - min(losses["official"]) < 1e-4


@given(seeds, st.floats(-50.0, 50.0))
def test_official_loss_ignores_translation_and_rotation(seed: int, offset: float) -> None:
    x, positives, unconditional, weight = random_batch(seed)
    reference = run(DriftingLoss(), x, positives, unconditional, weight)
    moved = run(DriftingLoss(), x + offset, positives + offset, unconditional + offset, weight)
    assert_agree(moved, reference, 1e-7)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((x.shape[-1],) * 2))
    turn = torch.from_numpy(rotation)
    turned = run(DriftingLoss(), x @ turn, positives @ turn, unconditional @ turn, weight)
    assert_agree(turned, reference._replace(gradient=reference.gradient @ rotation), 1e-7)


@given(seeds, st.sampled_from([7.0, 1e3]))
def test_official_loss_ignores_scale_above_its_floors(seed: int, factor: float) -> None:
    x, positives, unconditional, weight = random_batch(seed)
    points = [1e4 * points for points in (x, positives, unconditional)]
    reference = run(DriftingLoss(), *points, weight)
    scaled = run(DriftingLoss(), *(factor * points for points in points), weight)
    reference = reference._replace(gradient=reference.gradient / factor, scale=reference.scale * factor)
    assert_agree(scaled, reference, 1e-6)  # the distance of a sample to itself stays 1e-4


@given(seeds)
def test_official_loss_follows_permutations_of_groups_and_samples(seed: int) -> None:
    arguments = random_batch(seed)
    reference = run(DriftingLoss(), *arguments)
    flipped = run(DriftingLoss(), *(argument.flip(0, 1) for argument in arguments))
    assert_agree(flipped, reference._replace(loss=reference.loss[::-1], gradient=reference.gradient[::-1, ::-1]), 1e-9)


@given(seeds)
def test_unconditional_weights_act_linearly_on_the_drift(seed: int) -> None:
    x, positives, unconditional, first = random_batch(seed)
    second = torch.rand(first.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss_fn = DriftingLoss([0.5], normalize_features=False, normalize_drift=False)  # the scale depends on w as well

    def drift(weight: torch.Tensor) -> np.ndarray:
        return run(loss_fn, x, positives, unconditional, weight).gradient

    # x itself has weight 1 throughout, so V(w) is affine
    np.testing.assert_allclose(drift((first + second) / 2), (drift(first) + drift(second)) / 2, rtol=1e-8, atol=1e-12)
    weighed_by_default = run(loss_fn, x, positives, unconditional).gradient
    np.testing.assert_allclose(drift(torch.ones_like(first)), weighed_by_default, rtol=1e-12)


@given(seeds)
def test_weight_zero_leaves_the_scale_but_not_the_softmax(seed: int) -> None:
    """A.7's w = 0 (α = 1): no force, no part in the scale; the softmax over targets still sees the samples."""
    x, positives, unconditional, weight = random_batch(seed)
    loss_fn = DriftingLoss([0.5], affinity_floor=0.0)
    without = run(loss_fn, x, positives)
    zeroed = run(loss_fn, x, positives, unconditional, torch.zeros_like(weight))
    np.testing.assert_allclose(zeroed.scale, without.scale, rtol=1e-12)

    def direction(gradient: np.ndarray) -> np.ndarray:
        return gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)

    np.testing.assert_allclose(direction(zeroed.gradient), direction(without.gradient), rtol=1e-6, atol=1e-8)
    shorter = np.linalg.norm(zeroed.gradient, axis=-1) * np.sqrt(zeroed.squared_norm)
    assert (shorter <= np.linalg.norm(without.gradient, axis=-1) * np.sqrt(without.squared_norm) * (1 + 1e-9)).all()


def test_samples_equal_to_the_positives_are_at_rest_but_for_the_mask() -> None:
    points = torch.randn(3, 8, 4, dtype=torch.float64)
    field = drifting_field(points, points, points, temperature=0.5)
    assert field.abs().max() < 1e-12
    assert DriftingLoss([0.5])(points, points).drift_norm > 1e-3  # a sample does not repel itself


def test_leading_dimensions_are_groups_of_one_batch() -> None:
    x, positives = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 9, 4)
    unconditional, weight = torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5)
    flat = DriftingLoss()(x.flatten(0, 1), positives.flatten(0, 1), unconditional.flatten(0, 1), weight.flatten(0, 1))
    found = DriftingLoss()(x, positives, unconditional, weight)
    assert found.loss.shape == (2, 3)
    assert torch.equal(found.loss.flatten(), flat.loss)
    assert torch.equal(found.drift_norm, flat.drift_norm)
    ungrouped = DriftingLoss()(x[0, 0], positives[0, 0])
    assert ungrouped.loss.shape == ()
    assert torch.equal(ungrouped.loss, DriftingLoss()(x[:1, 0], positives[:1, 0]).loss[0])


def test_a_weight_of_size_one_repeats() -> None:
    x, positives, unconditional = torch.randn(3, 8, 4), torch.randn(3, 9, 4), torch.randn(3, 5, 4)
    weight = torch.tensor([[0.5], [0.0], [2.0]])
    found = DriftingLoss()(x, positives, unconditional, weight)
    assert torch.equal(found.loss, DriftingLoss()(x, positives, unconditional, weight.expand(3, 5)).loss)


def microbatches() -> list[DriftingBatch]:
    """Three of different spread, 4 + 2 + 2 groups."""
    parts = []
    for groups, spread in ((4, 1.0), (2, 3.0), (2, 0.3)):
        x, positives, unconditional = (spread * torch.randn(groups, n, 4) for n in (8, 6, 3))
        parts.append(DriftingBatch(x.requires_grad_(), positives, unconditional, torch.rand(groups, 3)))
    return parts


def whole_batch(parts: list[DriftingBatch]) -> list[torch.Tensor]:
    return [torch.cat([part[i].detach() for part in parts]) for i in range(4)]  # type: ignore[union-attr]


@pytest.mark.parametrize("recipe", ["official", "paper"])
def test_exact_accumulation_is_the_whole_batch(recipe: Any) -> None:
    parts, loss_fn = microbatches(), DriftingLoss(recipe=recipe)
    reference = run(loss_fn, *whole_batch(parts))
    statistics = loss_fn.statistics(parts)
    losses = [loss_fn(*part, statistics=statistics).loss for part in parts]
    for loss in losses:
        (loss.sum() / 8).backward()
    gradient = torch.cat([part.x.grad for part in parts if part.x.grad is not None])
    found = Result(
        torch.cat(losses).detach().numpy(),
        gradient.numpy(),
        statistics.drift_norm.square().numpy(),
        statistics.feature_scale.numpy(),
    )
    assert_agree(found, reference, 1e-6)


def test_accumulation_per_microbatch_uses_its_own_scalars() -> None:
    parts, loss_fn = microbatches(), DriftingLoss()
    whole = loss_fn(*whole_batch(parts)).loss
    alone = torch.cat([loss_fn(*part).loss for part in parts])
    assert oracle.relative_error(alone.detach().numpy(), whole.numpy()) > 0.1
    for part in parts:
        assert abs(DriftingLoss([0.2])(*part).loss.mean() - 1.0) < 1e-5  # each normalised by itself
    # the paper's recipe has no batch-wide scalar, so there it makes no difference
    paper = DriftingLoss(recipe="paper")
    alone = torch.cat([paper(*part).loss for part in parts])
    torch.testing.assert_close(alone, paper(*whole_batch(parts)).loss, rtol=1e-5, atol=0.0)


def test_statistics_refuse_what_the_loss_refuses() -> None:
    with pytest.raises(ValueError, match="microbatches is empty"):
        DriftingLoss().statistics([])
    parts = microbatches()
    parts[1] = parts[1]._replace(positives=parts[1].positives[:1])
    with pytest.raises(ValueError, match=r"positives \[1, 6, 4\] does not fit x \[2, 8, 4\]"):
        DriftingLoss().statistics(parts)


@pytest.mark.parametrize(("num_positives", "count", "words"), [(3, 1, "one generated sample"), (1, 4, "one positive")])
def test_regression_in_disguise_is_warned_of(num_positives: int, count: int, words: str) -> None:
    x, positives = torch.randn(2, count, 3), torch.randn(2, num_positives, 3)
    with pytest.warns(UserWarning, match=words) as warned:
        output = DriftingLoss()(x, positives)
    assert warned[0].filename == __file__  # where the loss is called
    if num_positives == 1:
        assert output.loss.mean() > 0.8 * 9  # the signature: near the square of the number of temperatures
    DriftingLoss(recipe="paper")(torch.randn(2, 2, 3), positives)  # no warning


@pytest.mark.parametrize("count", [2, 3])
def test_ordinary_small_groups_are_not_warned_of(count: int) -> None:
    DriftingLoss()(torch.randn(2, count, 3), torch.randn(2, 1, 3))
    DriftingLoss()(torch.randn(2, 1, 3), torch.randn(2, 3, 3), torch.randn(2, 2, 3))
