"""Learning rate and temperature by the samples seen, so that a changed batch size does not change their meaning."""

import math


def warmup_constant(
    samples_seen: int,
    *,
    peak: float,
    warmup_samples: int,
    start: float = 1e-6,
    total_samples: int | None = None,
    cooldown_fraction: float = 0.0,
) -> float:
    """Linear from ``start`` to ``peak``, then constant (Table 8); optionally linear to 0 at the end of a short run.

    Args:
        samples_seen: samples trained on before this step.
        peak: the constant learning rate.
        warmup_samples: samples until the peak; 0 for none.
        start: learning rate of the first step.
        total_samples: length of the run; only a cool-down needs it.
        cooldown_fraction: last part of the run, in [0, 1], over which the rate falls to 0.

    Raises:
        ValueError: for a negative count, or a cool-down without ``total_samples`` or outside [0, 1].

    Returns:
        The learning rate of this step.

    >>> [warmup_constant(n, peak=1.0, warmup_samples=4, start=0.0) for n in (0, 1, 4, 100)]
    [0.0, 0.25, 1.0, 1.0]
    >>> warmup_constant(95, peak=1.0, warmup_samples=4, total_samples=100, cooldown_fraction=0.1)
    0.5
    """
    if samples_seen < 0 or warmup_samples < 0:
        raise ValueError(f"expected counts of 0 or more, found {samples_seen=}, {warmup_samples=}")
    if not 0 <= cooldown_fraction <= 1 or (cooldown_fraction and total_samples is None):
        raise ValueError(
            f"expected a fraction in [0, 1] of total_samples, found {cooldown_fraction=}, {total_samples=}"
        )
    rate = peak
    if samples_seen < warmup_samples:
        rate = start + (peak - start) * samples_seen / warmup_samples
    if cooldown_fraction and total_samples is not None:
        left = max(0, total_samples - samples_seen) / (cooldown_fraction * total_samples)
        rate *= min(1.0, left)
    return rate


def warmup_cosine(
    samples_seen: int, *, peak: float, warmup_samples: int, total_samples: int, start: float = 1e-6
) -> float:
    """Linear from ``start`` to ``peak``, then half a cosine down to 0 at the end (Diffusion Policy).

    Args:
        samples_seen, peak, warmup_samples, start: as for `warmup_constant`.
        total_samples: length of the run, longer than the warm-up.

    Raises:
        ValueError: for a negative count, or a run that ends within its warm-up.

    >>> [round(warmup_cosine(n, peak=1.0, warmup_samples=4, total_samples=12, start=0.0), 3) for n in (0, 2, 4, 8, 12)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if total_samples <= warmup_samples:
        raise ValueError(f"total_samples: expected more than warmup_samples = {warmup_samples}, found {total_samples}")
    if samples_seen < warmup_samples:
        return warmup_constant(samples_seen, peak=peak, warmup_samples=warmup_samples, start=start)
    done = min(1.0, (samples_seen - warmup_samples) / (total_samples - warmup_samples))
    return peak * (1 + math.cos(math.pi * done)) / 2


def annealed_factor(samples_seen: int, *, start: float, total_samples: int, fraction: float) -> float:
    """Geometrically from ``start`` to 1 over the first part of a run, then 1 (the annealing of arXiv 2603.09936).

    Args:
        samples_seen: samples trained on before this step.
        start: factor of the first step, > 0.
        total_samples: length of the run.
        fraction: first part of the run, in [0, 1], over which the factor changes.

    Raises:
        ValueError: for a negative count, a factor that is not positive, or a fraction outside [0, 1].

    Returns:
        What to multiply the temperatures of this step by.

    >>> [annealed_factor(n, start=4.0, total_samples=16, fraction=0.5) for n in (0, 4, 8, 16)]
    [4.0, 2.0, 1.0, 1.0]
    """
    if samples_seen < 0 or not start > 0 or not 0 <= fraction <= 1:
        raise ValueError(
            f"expected a count of 0 or more, a factor > 0 and a fraction in [0, 1], "
            f"found {samples_seen=}, {start=}, {fraction=}"
        )
    if samples_seen >= fraction * total_samples:
        return 1.0
    return float(start ** (1.0 - samples_seen / (fraction * total_samples)))
