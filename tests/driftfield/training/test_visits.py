"""Visits: every epoch each sample once, the same wherever one starts to read."""

import pytest
import torch

from driftfield.training.visits import Epochs, sample_ids


@pytest.mark.parametrize(("num", "count"), [(7, 3), (7, 7), (3, 8), (1, 4)])
def test_every_epoch_visits_each_sample_once_however_it_is_read(num: int, count: int) -> None:
    whole = Epochs(num, seed=3)(0, 8 * num * count)
    epochs = whole.unflatten(0, (8 * count, num))
    assert all(sorted(epoch.tolist()) == list(range(k * num, (k + 1) * num)) for k, epoch in enumerate(epochs))
    parts = [Epochs(num, seed=3)(start, count) for start in range(0, 8 * num * count, count)]
    assert torch.equal(torch.cat(parts), whole)


def test_orders_differ_between_epochs_and_between_seeds() -> None:
    orders = [Epochs(50, seed=seed)(50 * epoch, 50) % 50 for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_a_visit_looks_at_the_same_sample_in_every_epoch() -> None:
    visits = torch.arange(12)
    assert sample_ids(visits, 4).tolist() == [0, 1, 2, 3] * 3
    assert sample_ids(visits[:0], 4).tolist() == []


@pytest.mark.parametrize(
    ("visits", "words"),
    [
        (torch.tensor([3, -1]), "expected numbers from 0 on, found -1"),
        (torch.tensor([1.0]), r"expected int64 \[k\], found torch.float32 \[1\]"),
        (torch.tensor([[1]]), r"expected int64 \[k\], found torch.int64 \[1, 1\]"),
    ],
)
def test_what_is_no_visit_is_refused(visits: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=f"^visits: {words}$"):
        sample_ids(visits, 4)
