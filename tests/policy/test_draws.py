"""A row of a batch gets the same random numbers however the batch is spread over processes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from policy.diffusion_policy import DiffusionPolicy
from policy.draws import Draws
from policy.drifting_policy import DriftingPolicy
from policy.observation import ObservationEncoder
from policy.policy import Batch
from tests.policy.tiny_policies import draws_of, tiny, tiny_batch

PARTS = (range(0, 2), range(2, 5))  # of a batch of 5


def draws(part: range | None = None) -> Draws:
    return Draws(draws_of(3)[0], part, 5)


def rows(batch: Batch, part: range) -> Batch:
    where = slice(part.start, part.stop)
    return Batch({key: value[where] for key, value in batch.observation.items()}, batch.actions[where])


@pytest.mark.parametrize("parts", [PARTS, (range(0, 0), range(0, 5)), tuple(range(i, i + 1) for i in range(5))])
def test_parts_draw_what_the_whole_batch_does_one_kind_after_the_other(parts: tuple[range, ...]) -> None:
    whole = draws()
    expected = whole.normal((5, 2, 3)), whole.integers(7, (5,)), whole.normal((5, 4))
    assert expected[1].dtype == torch.int64 and 0 <= expected[1].min() and expected[1].max() < 7
    made: list[list[Tensor]] = [[], [], []]
    for part in parts:
        own, count = draws(part), len(part)
        for kind, numbers in zip(
            made, (own.normal((count, 2, 3)), own.integers(7, (count,)), own.normal((count, 4))), strict=True
        ):
            kind.append(numbers)
    assert all(torch.equal(torch.cat(kind), each) for kind, each in zip(made, expected, strict=True))


def test_alone_they_are_the_generator_s_own_or_those_of_the_global_one() -> None:
    assert torch.equal(Draws(draws_of(3)[0]).normal((4, 2)), torch.randn(4, 2, generator=draws_of(3)[0]))
    torch.manual_seed(8)
    free = Draws().normal((4, 2))
    torch.manual_seed(8)
    assert torch.equal(free, torch.randn(4, 2))


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^rows: expected a range within a batch of 5, found range\(3, 6\)$"):
        draws(range(3, 6))
    with pytest.raises(ValueError, match="^shape: expected 3 rows, found 2$"):
        draws(range(1, 4)).normal((2, 7))


def test_generated_chunks_of_a_row_do_not_depend_on_how_the_batch_is_spread() -> None:
    policy = tiny("drifting", generated=4)
    assert isinstance(policy, DriftingPolicy)
    batch = tiny_batch(policy)
    whole, _ = policy._groups(batch, draws())
    parts = [policy._groups(rows(batch, part), draws(part))[0] for part in PARTS]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_noise_and_step_of_a_row_do_not_depend_on_how_the_batch_is_spread() -> None:
    policy = tiny("diffusion", train_steps=7, steps=5)
    assert isinstance(policy, DiffusionPolicy)
    batch = tiny_batch(policy)
    whole = policy.loss(batch, draws()).loss
    parts = [policy.loss(rows(batch, part), draws(part)).loss for part in PARTS]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_crops_of_a_row_do_not_depend_on_how_the_batch_is_spread() -> None:
    encoder, seen = ObservationEncoder({"image": (48, 40, 3)}, crop=36), []
    encoder.encoders[0] = torch.nn.Flatten()
    encoder.encoders[0].weight = torch.nn.Parameter(torch.zeros(1))  # the encoder's dtype is asked for
    encoder.encoders[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images: Any = torch.randint(256, (5, 2, 48, 40, 3), dtype=torch.uint8, generator=draws_of(0)[0])
    encoder({"image": images}, draws=draws())
    for part in PARTS:
        encoder({"image": images[part.start : part.stop]}, draws=draws(part))
    whole, *parts = seen  # [10, 3, 36, 36], [4, ...], [6, ...]
    assert torch.equal(torch.cat(parts), whole) and len(whole) == 10
