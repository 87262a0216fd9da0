"""The learning rate and the annealing of temperatures in closed form."""

import itertools
from typing import Any

import pytest

from driftfield.training import warmup_constant
from driftfield.training.schedule import annealed_factor


def test_warm_up_is_a_line_then_constant() -> None:
    rates = [warmup_constant(n, peak=4e-4, warmup_samples=1000) for n in range(0, 3001)]
    assert rates[0] == 1e-6
    for n, rate in enumerate(rates[:1001]):
        assert rate == pytest.approx(1e-6 + (4e-4 - 1e-6) * n / 1000, rel=1e-12)
    assert set(rates[1000:]) == {4e-4}


def test_the_batch_size_does_not_change_its_meaning() -> None:
    """Two half steps see what one whole step sees."""
    at = [warmup_constant(n, peak=1e-3, warmup_samples=640) for n in range(0, 2048, 64)]
    assert at[::2] == [warmup_constant(n, peak=1e-3, warmup_samples=640) for n in range(0, 2048, 128)]


def test_cool_down_is_a_line_to_zero_over_the_last_part() -> None:
    rates = [
        warmup_constant(n, peak=2.0, warmup_samples=10, total_samples=100, cooldown_fraction=0.25) for n in range(121)
    ]
    assert set(rates[10:76]) == {2.0}
    for n in range(75, 101):
        assert rates[n] == pytest.approx(2.0 * (100 - n) / 25, rel=1e-12)
    assert rates[100:] == [0.0] * 21
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_no_warm_up() -> None:
    assert warmup_constant(0, peak=0.5, warmup_samples=0) == 0.5


@pytest.mark.parametrize(
    ("samples_seen", "changes"),
    [
        (-1, {}),
        (0, {"warmup_samples": -1}),
        (0, {"cooldown_fraction": 0.1}),
        (0, {"cooldown_fraction": 1.1, "total_samples": 10}),
        (0, {"cooldown_fraction": float("nan"), "total_samples": 10}),
    ],
)
def test_what_makes_no_sense_is_refused(samples_seen: int, changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        warmup_constant(samples_seen, **({"peak": 1.0, "warmup_samples": 0} | changes))  # type: ignore[arg-type]


def test_temperatures_fall_by_equal_ratios_then_stay() -> None:
    factors = [annealed_factor(n, start=5.0, total_samples=100, fraction=0.4) for n in range(0, 101)]
    assert factors[0] == 5.0
    for earlier, later in itertools.pairwise(factors[:41]):
        assert later / earlier == pytest.approx(5.0 ** (-1 / 40), rel=1e-12)
    assert factors[40:] == [1.0] * 61


def test_temperatures_may_rise_or_stay() -> None:
    rising = [annealed_factor(n, start=0.25, total_samples=8, fraction=1.0) for n in (0, 4, 8)]
    assert rising == pytest.approx([0.25, 0.5, 1.0])
    for start, fraction in ((1.0, 0.5), (7.0, 0.0)):
        assert {annealed_factor(n, start=start, total_samples=8, fraction=fraction) for n in range(9)} == {1.0}


@pytest.mark.parametrize(
    "changes", [{"start": 0.0}, {"start": float("nan")}, {"fraction": 1.1}, {"fraction": -0.1}, {"samples_seen": -1}]
)
def test_no_annealing_without_sense(changes: dict[str, float]) -> None:
    arguments: dict[str, Any] = {"samples_seen": 0, "start": 2.0, "total_samples": 10, "fraction": 0.5, **changes}
    with pytest.raises(ValueError, match="expected a count of 0 or more, a factor > 0 and a fraction"):
        annealed_factor(arguments.pop("samples_seen"), **arguments)
