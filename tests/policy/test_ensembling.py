"""Temporal ensembling: the weighted mean, what it leaves alone, and what it does to two modes."""

from typing import Any

import numpy as np
import pytest

from policy.ensembling import TemporalEnsemble

B, T, A = 3, 4, 2


def chunks(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(number, B, T, A))


def play(ensemble: TemporalEnsemble, every_chunk: np.ndarray) -> np.ndarray:
    """Actions [steps, B, A], one chunk added at each step."""
    actions = []
    for chunk in every_chunk:
        ensemble.add(chunk)
        actions.append(ensemble.action())
    return np.stack(actions)


@pytest.mark.parametrize("decay", [0.01, 0.0, 0.5, -0.5])
def test_mean_of_all_chunks_that_reach_the_step_oldest_first(decay: float) -> None:
    every_chunk = chunks(7)
    actions = play(TemporalEnsemble(decay), every_chunk)
    for step in range(7):
        made = range(max(0, step - T + 1), step + 1)  # chunk made at step m says action step - m about this one
        weights = [np.exp(-decay * i) for i in range(len(made))]
        terms = [weight * every_chunk[m, :, step - m] for weight, m in zip(weights, made, strict=True)]
        np.testing.assert_allclose(actions[step], sum(terms) / sum(weights), rtol=1e-12)


@pytest.mark.parametrize("decay", [0.01, 3.0, -3.0])
def test_chunks_of_one_trajectory_give_that_trajectory(decay: float) -> None:
    trajectory = np.random.default_rng(1).normal(size=(10, B, A))
    every_chunk = np.stack([trajectory[step : step + T].swapaxes(0, 1) for step in range(10 - T)])
    np.testing.assert_allclose(play(TemporalEnsemble(decay), every_chunk), trajectory[: 10 - T], rtol=1e-12)


def test_a_large_decay_keeps_the_oldest_chunk_and_its_opposite_the_newest() -> None:
    every_chunk = chunks(6)
    oldest = [every_chunk[max(0, step - T + 1), :, min(step, T - 1)] for step in range(6)]
    np.testing.assert_allclose(play(TemporalEnsemble(1e4), every_chunk), oldest)
    np.testing.assert_allclose(play(TemporalEnsemble(-1e4), every_chunk), every_chunk[:, :, 0])


def test_a_single_chunk_is_executed_as_it_is_until_its_end() -> None:
    (chunk,) = chunks(1)
    ensemble = TemporalEnsemble()
    ensemble.add(chunk)
    np.testing.assert_array_equal(np.stack([ensemble.action() for _ in range(T)], axis=1), chunk)
    with pytest.raises(ValueError, match="no chunk"):
        ensemble.action()


def test_a_chunk_may_come_every_few_steps() -> None:
    first, second = chunks(2)
    ensemble = TemporalEnsemble(decay=np.log(3.0))  # weights 1 and 1/3
    ensemble.add(first)
    ensemble.action(), ensemble.action()
    ensemble.add(second)
    np.testing.assert_allclose(ensemble.action(), 0.75 * first[:, 2] + 0.25 * second[:, 0])
    np.testing.assert_allclose(ensemble.action(), 0.75 * first[:, 3] + 0.25 * second[:, 1])
    np.testing.assert_allclose(ensemble.action(), second[:, 2])


def test_a_row_does_not_depend_on_the_others() -> None:
    every_chunk = chunks(5)
    together = play(TemporalEnsemble(0.1), every_chunk)
    np.testing.assert_allclose(play(TemporalEnsemble(0.1), every_chunk[:, 1:2]), together[:, 1:2], rtol=1e-12)


def test_reset_forgets_and_chunks_are_copied() -> None:
    every_chunk = chunks(2)
    ensemble = TemporalEnsemble()
    ensemble.add(every_chunk[0])
    ensemble.reset()
    changed = every_chunk[1].copy()
    ensemble.add(changed)
    changed[:] = np.nan
    np.testing.assert_array_equal(ensemble.action(), every_chunk[1][:, 0])


def test_the_mean_of_two_modes_belongs_to_neither() -> None:
    ensemble = TemporalEnsemble(0.0)
    ensemble.add(np.full((1, 2, 1), -1.0))  # left around an obstacle at 0
    ensemble.action()
    ensemble.add(np.full((1, 2, 1), 1.0))  # right around it
    assert ensemble.action().item() == 0.0


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros((T, A)), r"expected actions \[B, T, A\], found shape \(4, 2\)"),
        (np.zeros((B, 0, A)), r"found shape \(3, 0, 2\)"),
        (np.full((B, T, A), np.nan), "finite"),
        (np.zeros((B + 1, T, A)), r"expected \[3, T, 2\] as before, found shape \(4, 4, 2\)"),
        (np.zeros((B, T, A + 1)), r"expected \[3, T, 2\] as before"),
    ],
)
def test_bad_chunks_are_refused(chunk: Any, message: str) -> None:
    ensemble = TemporalEnsemble()
    ensemble.add(np.zeros((B, T, A)))
    with pytest.raises(ValueError, match=message):
        ensemble.add(chunk)


@pytest.mark.parametrize("decay", [np.nan, np.inf])
def test_a_decay_is_finite(decay: float) -> None:
    with pytest.raises(ValueError, match="decay: expected a finite number"):
        TemporalEnsemble(decay)
