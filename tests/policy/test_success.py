"""Wilson intervals by their definition, and what a set of episodes is summarised to."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from policy.rollout import Episode
from policy.success import best_and_last, summarize, table, wilson


def episode(**changes: object) -> Episode:
    standard: dict[str, object] = {
        "seed": 0,
        "score": 1.0,
        "success": True,
        "phases": 3,
        "num_phases": 3,
        "steps": 10,
        "diverged": False,
        "clipped": 0,
        "failure": None,
        "retries": 0,
        "latencies": (),
        "actions": np.zeros((10, 2), np.float32),
    }
    return Episode(**(standard | changes))  # type: ignore[arg-type]


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy(counts: tuple[int, int]) -> None:
    expected = binomtest(*counts).proportion_ci(0.95, method="wilson")
    assert wilson(*counts) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(1, 3), (43, 50), (19, 50), (430, 500)])
def test_the_ends_of_wilson_s_interval_are_where_the_share_lies_z_deviations_away(successes: int, n: int) -> None:
    for p in wilson(successes, n):
        assert abs(successes / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-5)


def test_wilson_gives_the_known_figures() -> None:
    known = {(43, 50): (0.74, 0.93), (19, 50): (0.26, 0.52), (50, 50): (0.93, 1.0), (430, 500): (0.83, 0.89)}
    assert {counts: tuple(round(end, 2) for end in wilson(*counts)) for counts in known} == known


def test_wilson_reaches_the_ends_and_is_symmetric() -> None:
    assert wilson(0, 7).low == 0.0 and wilson(7, 7).high == 1.0
    assert wilson(2, 9).low == pytest.approx(1 - wilson(7, 9).high)
    assert wilson(3, 9, 0.99).low < wilson(3, 9, 0.5).low < 3 / 9


@pytest.mark.parametrize("arguments", [(1, 0), (-1, 5), (6, 5), (1, 5, 0.0), (1, 5, 1.0), (1, 5, math.nan)])
def test_wilson_refuses_what_is_no_count(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson(*arguments)


def test_a_summary_counts_everything_once() -> None:
    nothing = np.zeros((0, 2), np.float32)
    episodes = [
        episode(seed=0),
        episode(seed=1, score=0.5, success=False, phases=1, clipped=10, retries=2),
        episode(seed=2, score=0.0, success=False, phases=0, diverged=True, steps=4),
        episode(
            seed=3,
            score=0.0,
            success=False,
            phases=0,
            failure="Traceback",
            steps=0,
            actions=nothing,
        ),
    ]
    summary = summarize(episodes)
    assert (summary.episodes, summary.successes, summary.success) == (4, 1, 0.25)
    assert (summary.success_low, summary.success_high) == wilson(1, 4)
    assert summary.score == 0.375
    assert summary.score_error == pytest.approx(np.std([1, 0.5, 0, 0], ddof=1) / 2)
    assert summary.phases == (0.5, 0.25, 0.25)
    assert summary.steps == 6
    assert (summary.diverged, summary.failed, summary.retried) == (1, 1, 1)
    assert summary.clipped == 10 / 60


def test_one_episode_has_a_summary_and_none_has_not() -> None:
    assert summarize([episode()]).score_error == 0
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


def test_the_last_ten_evaluations_are_averaged_and_the_best_of_all_is_named() -> None:
    values = [1.0, *np.linspace(0, 0.9, 10).tolist()]
    assert best_and_last(values) == (1.0, pytest.approx(0.45), 11)
    with pytest.raises(ValueError, match="at least one"):
        best_and_last([])


def test_the_table_shows_phases_only_where_there_are_several() -> None:
    several = summarize([episode(), episode(success=False, phases=1, diverged=True)])
    text = table([("model", several)])
    assert "| policy | success | 95 % interval | score | p1 | p2 | p3 | steps | failed |" in text
    assert "| model | 0.50 (1/2) | [0.09, 0.91] | 1.000 ± 0.000 | 1.00 | 0.50 | 0.50 | 10 | 0 + 1 diverged |" in text
    assert "p1" not in table([("model", summarize([episode(phases=1, num_phases=1)]))])
