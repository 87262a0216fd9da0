"""The sample queue (A.8): a ring per class, draws without replacement, state that resumes, errors with the class."""

from collections import Counter, deque
from typing import Any

import hypothesis.strategies as st
import pytest
import scipy.stats
import torch
from hypothesis import given

from driftfield import SampleQueue

NUM_CLASSES, CAPACITY = 3, 4
pushes = st.lists(st.lists(st.integers(0, NUM_CLASSES - 1), max_size=15), max_size=6)  # labels of each push


def held(queue: SampleQueue, label: int) -> list[int]:
    """All samples of a class, drawn."""
    count = int(queue.counts[label])
    if count == 0:
        return []
    return queue.sample(torch.tensor([label]), count, generator=torch.Generator()).flatten().tolist()


@given(pushes)
def test_a_class_holds_its_newest_samples(history: list[list[int]]) -> None:
    queue = SampleQueue(NUM_CLASSES, CAPACITY)
    rings: list[deque[int]] = [deque(maxlen=CAPACITY) for _ in range(NUM_CLASSES)]
    next_sample = 100
    for labels in history:
        samples = list(range(next_sample, next_sample + len(labels)))
        next_sample += len(labels)
        queue.push(torch.tensor(samples, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))
        for sample, label in zip(samples, labels, strict=True):
            rings[label].append(sample)
        for label, ring in enumerate(rings):
            assert sorted(held(queue, label)) == sorted(ring)
    assert queue.counts.tolist() == [len(ring) for ring in rings]


@given(pushes, st.integers(0, 100))
def test_a_queue_goes_on_where_its_state_was_saved(history: list[list[int]], seed: int) -> None:
    original, other = SampleQueue(NUM_CLASSES, CAPACITY), SampleQueue(NUM_CLASSES, CAPACITY)
    other.push(torch.tensor([7]), torch.tensor([0]))  # to be forgotten
    for labels in history:
        samples = torch.randint(100, (len(labels),))
        original.push(samples, torch.tensor(labels, dtype=torch.int64))
    other.load_state_dict(original.state_dict())
    more = torch.arange(9), torch.arange(9) % NUM_CLASSES
    original.push(*more)
    other.push(*more)
    drawn = [
        queue.sample(torch.arange(NUM_CLASSES), 3, generator=torch.Generator().manual_seed(seed))
        for queue in (original, other)
    ]
    assert torch.equal(*drawn)


def test_state_is_a_copy() -> None:
    queue = filled()
    state = queue.state_dict()
    queue.push(torch.tensor([99]), torch.tensor([0]))
    assert 99 not in state["samples"]
    assert state["pushed"].tolist() == [CAPACITY] * NUM_CLASSES
    queue.load_state_dict(state)
    queue.push(torch.tensor([98]), torch.tensor([0]))
    assert 98 not in state["samples"]


def filled(per_class: int = CAPACITY) -> SampleQueue:
    """Class c holds 10 c, 10 c + 1, ..."""
    queue = SampleQueue(NUM_CLASSES, CAPACITY)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(per_class)
    queue.push(10 * labels + torch.arange(per_class).repeat(NUM_CLASSES), labels)
    return queue


@pytest.mark.parametrize("count", [1, 2, CAPACITY])
def test_draws_are_of_the_class_and_without_replacement(count: int) -> None:
    labels = torch.tensor([2, 0, 2, 1] * 50)
    drawn = filled().sample(labels, count, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (200, count)
    assert torch.equal(drawn // 10, labels[:, None].expand(200, count))
    assert all(len(set(row)) == count for row in drawn.tolist())


@pytest.mark.parametrize("per_class", [3, CAPACITY])
def test_draws_are_uniform_over_pairs(per_class: int) -> None:
    num_draws = 12_000
    labels = torch.ones(num_draws, dtype=torch.int64)
    drawn = filled(per_class).sample(labels, 2, generator=torch.Generator().manual_seed(0))
    pairs = Counter(map(tuple, drawn.tolist()))
    assert len(pairs) == per_class * (per_class - 1)  # in every order
    assert scipy.stats.chisquare(list(pairs.values())).pvalue > 0.01


def test_generator_decides() -> None:
    queue, labels = filled(), torch.arange(NUM_CLASSES)
    first, again, other = (
        queue.sample(labels.repeat(20), 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_of_any_shape_and_dtype() -> None:
    queue = SampleQueue(2, 3, sample_shape=(2, 5), dtype=torch.float16)
    images = torch.randn(4, 2, 5).half()
    queue.push(images, torch.tensor([1, 0, 1, 1]))
    drawn = queue.sample(torch.tensor([0, 1]), 1, generator=torch.Generator())
    assert drawn.shape == (2, 1, 2, 5)
    assert torch.equal(drawn[0, 0], images[1])
    assert any(torch.equal(drawn[1, 0], images[i]) for i in (0, 2, 3))


def bad_calls() -> dict[str, tuple[Any, str]]:
    generator, one = torch.Generator(), torch.tensor([1])
    return {
        "no class": (lambda: SampleQueue(0, 4), "at least 1 class and capacity 1, got 0 and 4"),
        "no capacity": (lambda: SampleQueue(4, 0), "at least 1 class and capacity 1, got 4 and 0"),
        "label too large": (lambda: filled().push(one, torch.tensor([3])), r"labels must lie in \[0, 3\), got 3 to 3"),
        "negative label": (
            lambda: filled().push(one, torch.tensor([-1])),
            r"labels must lie in \[0, 3\), got -1 to -1",
        ),
        "label to draw": (lambda: filled().sample(torch.tensor([5]), 1, generator=generator), "got 5 to 5"),
        "float labels": (
            lambda: filled().push(one, torch.tensor([1.0])),
            r"labels must be \[K\] of torch.int64, got \[1\]",
        ),
        "2-D labels": (lambda: filled().push(one, one[None]), r"labels must be \[K\] of torch.int64, got \[1, 1\]"),
        "other count": (
            lambda: filled().push(one.repeat(2), one),
            r"expected samples \[1, \*\[\]\] of torch.int64, got \[2\]",
        ),
        "other dtype": (lambda: filled().push(one.float(), one), "got \\[1\\] of torch.float32"),
        "none to draw": (lambda: filled().sample(one, 0, generator=generator), "expected count >= 1, got 0"),
        "too few held": (
            lambda: filled(3).sample(torch.tensor([0, 1]), 4, generator=generator),
            "class 0 holds 3 samples in the queue, expected at least 4",
        ),
        "empty class": (
            lambda: SampleQueue(2, 3).sample(one, 1, generator=generator),
            "class 1 holds 0 samples in the queue, expected at least 1",
        ),
        "other state": (
            lambda: filled().load_state_dict(SampleQueue(2, 4).state_dict()),
            r"queue state 'samples': expected \[3, 4\] of torch.int64, found \[2, 4\]",
        ),
        "no state": (lambda: filled().load_state_dict({}), "queue state 'samples': .* found nothing"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_calls_are_named(name: str) -> None:
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()
