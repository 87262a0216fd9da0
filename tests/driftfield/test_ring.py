"""Groups shared by all processes have the loss of their concatenation (gloo, world sizes 1, 2 and 3)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from driftfield import DriftingLoss

from . import ring_worker as worker
from .oracle import relative_error

pytestmark = pytest.mark.timeout(400)  # a machine with other work: the processes wait for each other at every block

REPOSITORY = Path(__file__).parents[2]
Shares = list[dict[str, np.ndarray]]  # what each rank returned


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Shares]:
    """Every scenario in three processes and in two; `run(name, world)` then returns what each rank found."""
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, worker.__file__]
    processes = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(3)]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * 3
    return lambda name, world: [dict(np.load(folder / f"{name}-{world}-{rank}.npz")) for rank in range(world)]


def joined(shares: Shares) -> np.ndarray:
    """The gradient of the concatenated groups."""
    return np.concatenate([share["gradient"] for share in shares], -2)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", worker.EQUAL)
def test_shared_groups_have_the_loss_of_their_concatenation(
    run: Callable[[str, int], Shares], name: str, world: int
) -> None:
    whole, shares = worker.EQUAL[name](1, 0), run(name, world)
    # Rounding of distances, divided by τ = 0.02; the gradient in bfloat16 is rounded to that dtype.
    bound = {"float64": 1e-12, "bfloat16": 2e-3}.get(name, 1e-5)
    assert relative_error(joined(shares), whole["gradient"]) < bound
    for share in shares:
        for scalar in ("loss", "drift_norm", "feature_scale"):
            assert relative_error(share[scalar], whole[scalar]) < bound, scalar
            assert np.array_equal(share[scalar], shares[0][scalar]), scalar
        assert np.array_equal(share["degenerate"], whole["degenerate"])


@pytest.mark.parametrize("world", [2, 3])
def test_the_comparison_fails_for_separate_groups(run: Callable[[str, int], Shares], world: int) -> None:
    whole, shares = worker.own_part(1, 0), run("without sharing", world)
    assert relative_error(joined(shares), whole["gradient"]) > 0.1
    assert relative_error(shares[0]["loss"], whole["loss"]) > 1e-2
    assert relative_error(shares[0]["drift_norm"], whole["drift_norm"]) > 1e-2


def test_equal_samples_in_all_processes_are_degenerate(run: Callable[[str, int], Shares]) -> None:
    for share in run("equal samples", 2):
        assert share["degenerate"] and not share["loss"].any() and not share["gradient"].any()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_differ_are_told_so(run: Callable[[str, int], Shares], world: int) -> None:
    for share in run("disagreement", world):
        groups, dtype, dimension, options = share["messages"]
        last = f"process {world - 1} has groups"
        assert ": process 0 has groups [2], dimension 3, torch.float32" in groups
        assert f"{last} [1], dimension 3, torch.float32" in groups
        assert f"{last} [2], dimension 3, torch.float64" in dtype
        assert f"{last} [2], dimension 2, torch.float32" in dimension
        assert "temperatures=(0.2,)" in options and "temperatures=(0.1,)" in options


@pytest.mark.parametrize("memory_mib", [1e-4, 1e-3, 1.0])
@pytest.mark.parametrize("options", [{}, {"normalize_over": "x", "repulsion": 0.0}, {"recipe": "paper"}])
def test_one_process_alone_in_tiles_of_any_size(memory_mib: float, options: dict[str, Any]) -> None:
    expected = worker.compute(DriftingLoss(**options), worker.whole_batch())
    found = worker.compute(DriftingLoss(**options, share_groups=True, memory_mib=memory_mib), worker.whole_batch())
    assert relative_error(found["loss"], expected["loss"]) < 1e-5
    assert relative_error(found["gradient"], expected["gradient"]) < 1e-5


def test_a_sample_that_nothing_repels_is_refused() -> None:
    with pytest.raises(ValueError, match="one generated sample has nothing that repels it"):
        DriftingLoss(affinity_floor=0.0, share_groups=True)(torch.randn(1, 2), torch.randn(3, 2))


def test_fields_that_need_whole_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="shared by all processes: bias_correction=True is not computed in strips"):
        DriftingLoss(bias_correction=True, share_groups=True)(torch.randn(4, 2), torch.randn(3, 2))


class LargestTensor(TorchDispatchMode):
    """Remembers how many entries the largest result of any operation had."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_no_matrix_of_the_size_of_a_group_is_made() -> None:
    x, positives, memory_mib = torch.randn(1, 100, 2), torch.randn(1, 100, 2), 4e-3
    sizes = []
    for loss_fn in (DriftingLoss((0.2,), share_groups=True, memory_mib=memory_mib), DriftingLoss((0.2,))):
        with LargestTensor() as largest:
            loss_fn(x, positives)
        sizes.append(largest.entries)
    assert sizes[0] <= memory_mib * 2**20 / 4  # numbers of float32
    assert sizes[1] == 100 * 200  # all distances
