"""Strips: the drift of `EagerDrift` to rounding, whatever the strips and the options, in the memory they promise."""

import os
import subprocess
import sys
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from driftfield.drift import Drift, DriftingBatch, EagerDrift
from driftfield.field import FieldOptions
from driftfield.kernel import NormalizeOver
from driftfield.tiled import TiledDrift, force, mask_self, pull, unsupported

from . import oracle

OFFICIAL = FieldOptions((0.02, 0.05, 0.2), True, 1e-6, "xy", 1.0, 1.0)
ONE_ROW = 1e-6  # MiB, less than any row needs: every strip is one row of one group


def make_batch(
    groups: tuple[int, ...], counts: tuple[int, int, int], dimension: int, dtype: torch.dtype = torch.float64
) -> DriftingBatch:
    """x, positives, unconditional samples (none for a count of 0) and their weights, some of them 0."""
    x, positives, unconditional = (torch.randn(*groups, count, dimension).to(dtype) for count in counts)
    if not counts[2]:
        return DriftingBatch(x, positives)
    weight = 3.0 * torch.rand(*groups, counts[2]) * (torch.rand(*groups, counts[2]) < 0.7)
    return DriftingBatch(x, positives, unconditional, weight)


def results(kind: Any, batch: DriftingBatch, options: FieldOptions, **limits: float) -> dict[str, Tensor]:
    """What the loss needs of a drift, with factors 1/λ, and the gradient of x."""
    x = batch.x.detach().requires_grad_()
    drift: Drift = kind(batch._replace(x=x), options, **limits)
    scale = drift.scale_sums[0] / drift.scale_sums[1]
    force_sums = drift.force_sums(scale)
    loss = drift.loss(scale, (force_sums[:-1] / force_sums[-1]).rsqrt())
    loss.sum().backward()
    assert x.grad is not None and x.grad.dtype == x.dtype
    return {
        "scale_sums": drift.scale_sums,
        "force_sums": force_sums,
        "loss": loss.detach(),
        "gradient": x.grad,
        "loss_of_sum": kind(batch, options, **limits).loss(scale, torch.ones_like(force_sums[:-1])),
    }


def assert_equal_drifts(batch: DriftingBatch, options: FieldOptions, memory_mib: float, tolerance: float) -> None:
    found = results(TiledDrift, batch, options, memory_mib=memory_mib)
    for name, expected in results(EagerDrift, batch, options).items():
        assert found[name].shape == expected.shape and found[name].dtype == expected.dtype, name
        error = oracle.relative_error(found[name].double().numpy(), expected.double().numpy())
        assert error < tolerance, (name, error)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(get_args(NormalizeOver)),
    st.sampled_from([0.0, 1e-6, 1e-2]),
    st.booleans(),
    st.sampled_from([(1.0, 1.0), (1.5, 0.5), (1.0, 0.0)]),
    st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)]),
    st.tuples(st.integers(2, 7), st.integers(1, 5), st.integers(0, 3)),
    st.sampled_from([ONE_ROW, 0.002, 0.004, 0.02, 64.0]),
)
def test_strips_are_eager(
    seed: int,
    over: NormalizeOver,
    floor: float,
    normalize: bool,
    factors: tuple[float, float],
    groups: tuple[int, ...],
    counts: tuple[int, int, int],
    memory_mib: float,
) -> None:
    torch.manual_seed(seed)
    options = FieldOptions((0.05, 0.7), normalize, floor, over, *factors)
    assert_equal_drifts(make_batch(groups, counts, 5), options, memory_mib, 1e-10)


@pytest.mark.parametrize("over", get_args(NormalizeOver))
@pytest.mark.parametrize("counts", [(1, 1, 0), (1, 3, 0), (1, 1, 2), (2, 1, 0)])
def test_groups_of_one_sample(over: NormalizeOver, counts: tuple[int, int, int]) -> None:
    """The column of the only sample holds nothing but a masked pair."""
    options = OFFICIAL._replace(normalize_over=over, affinity_floor=1e-6)
    assert_equal_drifts(make_batch((2,), counts, 3), options, ONE_ROW, 1e-10)


@pytest.mark.parametrize("memory_mib", [ONE_ROW, 0.3, 64.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_narrow_inputs(dtype: torch.dtype, tolerance: float, memory_mib: float) -> None:
    """Computed in float32; the tolerance is that of a gradient in the dtype of x."""
    assert_equal_drifts(make_batch((3,), (33, 17, 5), 40, dtype), OFFICIAL, memory_mib, tolerance)


def test_far_from_the_origin_duplicates_and_large_values() -> None:
    batch = make_batch((2,), (12, 9, 4), 16, torch.float32)
    assert_equal_drifts(batch._replace(x=batch.x + 100, positives=batch.positives + 100), OFFICIAL, ONE_ROW, 1e-4)
    repeated = batch.x[..., :1, :].expand_as(batch.positives)
    assert_equal_drifts(batch._replace(positives=repeated), OFFICIAL, ONE_ROW, 2e-5)
    assert_equal_drifts(DriftingBatch(*(points * 1e30 for points in batch[:2])), OFFICIAL, ONE_ROW, 2e-5)


def test_a_collapsed_batch_has_no_varying_coordinate() -> None:
    same = torch.full((4, 8, 3), 3.7)
    drift = TiledDrift(DriftingBatch(same, same), OFFICIAL, memory_mib=ONE_ROW)
    assert drift.scale_sums[2] == 0
    assert drift.force_sums(drift.scale_sums[0] / drift.scale_sums[1])[:-1].eq(0).all()


def test_transposed_views_and_weights_that_repeat() -> None:
    x, positives, unconditional = (torch.randn(3, count, 5, 4).transpose(1, 2) for count in (7, 6, 2))  # [3, 5, n, 4]
    batch = DriftingBatch(x, positives, unconditional, torch.rand(3, 1, 2))
    before = [tensor.clone() for tensor in batch]
    for memory_mib in (ONE_ROW, 0.005, 64.0):
        assert_equal_drifts(batch, OFFICIAL, memory_mib, 2e-5)
    assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))


def test_against_the_oracle() -> None:
    batch = make_batch((2,), (6, 5, 3), 4)
    found = results(TiledDrift, batch, OFFICIAL, memory_mib=ONE_ROW)
    expected = oracle.drifting_loss(*(tensor.numpy().astype(np.float64) for tensor in batch))
    assert oracle.relative_error(found["loss"].numpy(), expected.loss) < 1e-8
    assert oracle.relative_error(found["gradient"].numpy() / 2, expected.gradient) < 1e-8  # of the mean of 2 groups


def test_nan_stays_visible() -> None:
    batch = make_batch((2,), (6, 5, 0), 4)
    batch.positives[1, 2, 3] = torch.nan
    found = results(TiledDrift, batch, OFFICIAL, memory_mib=ONE_ROW)
    assert found["scale_sums"][0].isnan() and found["loss"].isnan().all()


def test_pulls_of_disjoint_targets_add_up() -> None:
    """So that targets may arrive in parts."""
    weights, targets, x = torch.rand(3, 5), torch.randn(5, 2), torch.randn(3, 2)
    whole, first, second = pull(weights, targets), pull(weights[:, :2], targets[:2]), pull(weights[:, 2:], targets[2:])
    for total, one, other in zip(whole, first, second, strict=True):
        torch.testing.assert_close(total, one + other)
    coefficients = weights * weights.sum(1, keepdim=True)
    towards_minus_away = force(x, whole, whole, OFFICIAL._replace(attraction=3.0, repulsion=1.0))
    torch.testing.assert_close(towards_minus_away, 2 * (coefficients @ targets - coefficients.sum(1, keepdim=True) * x))


def test_self_pairs_of_a_part_of_the_columns() -> None:
    whole = mask_self(torch.zeros(4, 7), 0)
    assert whole.isinf().nonzero().tolist() == [[i, i] for i in range(4)]
    for first_row, first_column in ((0, 3), (2, 0), (3, 5), (0, 4), (3, 0)):
        part = mask_self(torch.zeros(1, 2), first_row, first_column)
        torch.testing.assert_close(part, whole[first_row : first_row + 1, first_column : first_column + 2])


def test_refusals() -> None:
    batch = make_batch((), (2, 2, 0), 2)
    with pytest.raises(ValueError, match="memory_mib must be > 0, got 0"):
        TiledDrift(batch, OFFICIAL, memory_mib=0)
    assert unsupported(batch, OFFICIAL) is None


PEAK = """
import re, sys, torch
from pathlib import Path
from driftfield.drift import DriftingBatch, EagerDrift
from driftfield.field import FieldOptions
from driftfield.tiled import TiledDrift

torch.set_num_threads(1)
groups, samples, dimension, memory_mib = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
options = FieldOptions((0.02, 0.05, 0.2), True, 1e-6, "xy", 1.0, 1.0)

def step(x, positives):
    if memory_mib:
        drift = TiledDrift(DriftingBatch(x, positives), options, memory_mib=memory_mib)
    else:
        drift = EagerDrift(DriftingBatch(x, positives), options)
    scale = drift.scale_sums[0] / drift.scale_sums[1]
    drift.force_sums(scale)
    drift.loss(scale, torch.ones(3)).sum()

def resident_kib(of):
    return int(re.search(of + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))[1])

for few in (1, min(groups, 8)):  # loads what torch loads at its first products
    step(torch.randn(few, 64, dimension), torch.randn(few, 64, dimension))
x, positives = torch.randn(groups, samples, dimension), torch.randn(groups, samples, dimension)
Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew: a process inherits its parent's
before = resident_kib("VmRSS")
step(x, positives)
print((resident_kib("VmHWM") - before) / 2**10)
"""


def peak_mib(groups: int, samples: int, dimension: int, memory_mib: float) -> float:
    """What the largest resident size of a fresh process grows by, in MiB; 0: `EagerDrift`."""
    arguments = [str(number) for number in (groups, samples, dimension, memory_mib)]
    # what is freed goes back to the system at once
    at_once = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
    finished = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments],
        env=os.environ | at_once,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return float(finished.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_stays_within_its_bound() -> None:
    samples, memory_mib, drift_mib = 1800, 16, 0.1
    bounded = peak_mib(1, samples, 16, memory_mib)
    assert bounded < memory_mib + drift_mib + 4  # the allocator rounds
    assert peak_mib(1, samples, 16, 0) > 4 * bounded  # the measure sees matrices of pairs, and the bound binds


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_stays_within_its_bound_for_many_groups() -> None:
    pairs_mib, memory_mib, drift_mib = 1600 * 64 * 128 * 4 / 2**20, 16, 6.25
    bounded = peak_mib(1600, 64, 16, memory_mib)
    assert bounded < memory_mib + drift_mib + 4 < pairs_mib
    assert peak_mib(1600, 64, 16, 0) > 4 * bounded
