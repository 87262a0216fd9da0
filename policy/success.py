"""What a set of episodes says: success with an interval, scores, phases, and the numbers that papers report."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Final, NamedTuple

from policy.rollout import Episode

LAST: Final = 10  # evaluations that the average of the last ones takes


class Interval(NamedTuple):
    """A confidence interval of a probability."""

    low: float
    high: float


class Summary(NamedTuple):
    """Figures of a set of episodes.

    Attributes:
        episodes: how many.
        successes: how many completed every phase.
        success: their share.
        success_low, success_high: its 95 % interval.
        score: mean score, the task's own measure; for PushT the mean of the largest coverage, not a success rate.
        score_error: its standard error.
        phases: p1 .. pk, shares of episodes that completed at least 1 .. k phases.
        steps: mean number of control steps.
        diverged, failed: episodes whose physics ran away, and whose environment raised; both count with score 0.
        retried: episodes that were begun anew because their worker was lost.
        clipped: share of the actions' entries that lay outside the action's box.
    """

    episodes: int
    successes: int
    success: float
    success_low: float
    success_high: float
    score: float
    score_error: float
    phases: tuple[float, ...]
    steps: float
    diverged: int
    failed: int
    retried: int
    clipped: float


class BestAndLast(NamedTuple):
    """The two numbers that Diffusion Policy's tables give of a training, `max / last10`."""

    max: float  # over all evaluations; chosen on the very episodes that it reports, so too high
    last10: float  # mean of the last ten, or of all if there are fewer
    evaluations: int


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a probability: all p with |successes / n - p| <= z sqrt(p (1 - p) / n).

    Args:
        successes: in [0, n].
        n: independent trials, at least 1.
        confidence: in (0, 1).

    Raises:
        ValueError: a number outside its range.

    >>> low, high = wilson(43, 50)
    >>> round(low, 2), round(high, 2)
    (0.74, 0.93)
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes and n: expected 0 <= successes <= n and n >= 1, found {successes} and {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, found {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = successes / n, z**2 / n
    center = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    return Interval(
        0.0 if successes == 0 else max(0.0, center - half),  # exact at the ends, where rounding would blur them
        1.0 if successes == n else min(1.0, center + half),
    )


def summarize(episodes: Sequence[Episode]) -> Summary:
    """Figures of episodes of one task.

    Args:
        episodes: at least one; those that failed or diverged count as they are, with score 0.

    Raises:
        ValueError: there is none.
    """
    if not episodes:
        raise ValueError("episodes: expected at least one, found none")
    n = len(episodes)
    successes = sum(episode.success for episode in episodes)
    scores = [episode.score for episode in episodes]
    num_phases = max(episode.num_phases for episode in episodes)
    interval = wilson(successes, n)
    return Summary(
        episodes=n,
        successes=successes,
        success=successes / n,
        success_low=interval.low,
        success_high=interval.high,
        score=fmean(scores),
        score_error=stdev(scores) / math.sqrt(n) if n > 1 else 0.0,
        phases=tuple(sum(episode.phases >= k for episode in episodes) / n for k in range(1, num_phases + 1)),
        steps=fmean(episode.steps for episode in episodes),
        diverged=sum(episode.diverged for episode in episodes),
        failed=sum(episode.failure is not None for episode in episodes),
        retried=sum(episode.retries > 0 for episode in episodes),
        clipped=sum(episode.clipped for episode in episodes) / max(1, sum(e.actions.size for e in episodes)),
    )


def best_and_last(values: Sequence[float]) -> BestAndLast:
    """`max` and `last10` of a figure over the evaluations of one training.

    Args:
        values: in order of training, at least one.

    Raises:
        ValueError: there is none.

    >>> best_and_last([0.5, 1.0, 0.75])
    BestAndLast(max=1.0, last10=0.75, evaluations=3)
    """
    if not values:
        raise ValueError("values: expected at least one evaluation, found none")
    return BestAndLast(max(values), fmean(values[-LAST:]), len(values))


def table(rows: Sequence[tuple[str, Summary]]) -> str:
    """Figures as a Markdown table.

    Args:
        rows: name and figures of each policy, all on one task.

    >>> "| policy | success |" in table([])
    True
    """
    names = [f"p{k}" for k in range(1, 1 + max((len(row.phases) for _, row in rows), default=0))]
    columns = ["policy", "success", "95 % interval", "score", *(names if len(names) > 1 else ()), "steps", "failed"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for name, row in rows:
        shares = [f"{share:.2f}" for share in row.phases] if len(names) > 1 else []
        interval = f"[{row.success_low:.2f}, {row.success_high:.2f}]"
        ended = f"{row.failed} + {row.diverged} diverged" if row.diverged else f"{row.failed}"
        score = f"{row.score:.3f} ± {row.score_error:.3f}"
        success = f"{row.success:.2f} ({row.successes}/{row.episodes})"
        lines.append(_line([name, success, interval, score, *shares, f"{row.steps:.0f}", ended]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
