"""The loss does not depend on how a batch is divided among processes (gloo, world sizes 1, 2 and 4)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from . import distributed_worker as worker
from .oracle import relative_error

REPOSITORY = Path(__file__).parents[2]
Shares = list[dict[str, np.ndarray]]  # what each rank returned


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Shares]:
    """Every scenario in four processes and in two; `run(scenario, world)` then returns what each rank found."""
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, worker.__file__]
    processes = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(4)]
    try:
        codes = [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * 4

    def shares(scenario: Callable[[int, int], dict[str, np.ndarray]], world: int) -> Shares:
        return [dict(np.load(folder / f"{scenario.__name__}-{world}-{rank}.npz")) for rank in range(world)]

    return shares


def errors(shares: Shares, whole: dict[str, np.ndarray], joined: set[str]) -> dict[str, float]:
    """Relative errors: `joined` results come together from all ranks, the others must be right on every rank."""
    found = {
        name: [np.concatenate([share[name] for share in shares])] if name in joined else [s[name] for s in shares]
        for name in whole
    }
    return {name: max(relative_error(value, whole[name]) for value in values) for name, values in found.items()}


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_shares_make_the_whole_batch(run: Callable[..., Shares], world: int) -> None:
    whole = worker.one_call(1, 0)
    found = errors(run(worker.one_call, world), whole, {"loss", "gradient"})
    assert max(found["loss"], found["feature_scale"], found["drift_norm"]) < 1e-6, found
    assert found["gradient"] < 1e-5, found


@pytest.mark.parametrize("world", [2, 4])
def test_the_comparison_fails_without_the_reduction(run: Callable[..., Shares], world: int) -> None:
    whole = worker.one_call(1, 0)
    found = errors(run(worker.without_reduction, world), whole, {"loss", "gradient"})
    assert min(found["loss"], found["gradient"], found["feature_scale"], found["drift_norm"]) > 1e-2, found


@pytest.mark.parametrize("world", [2, 4])
def test_exact_accumulation_across_processes(run: Callable[..., Shares], world: int) -> None:
    whole = {name: value for name, value in worker.one_call(1, 0).items() if name != "gradient"}
    found = errors(run(worker.exact_accumulation, world), whole, {"loss"})
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel_training_has_the_gradient_of_one_process(run: Callable[..., Shares], world: int) -> None:
    whole = worker.data_parallel_network(1, 0)
    found = errors(run(worker.data_parallel_network, world), whole, {"loss"})
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("world", [2, 4])
def test_a_batch_is_degenerate_on_all_ranks_or_on_none(run: Callable[..., Shares], world: int) -> None:
    shares = run(worker.constant_on_rank_zero, world)
    assert not any(share["degenerate"] for share in shares)
    assert not shares[0]["loss"].any()  # groups of equal samples do not drift all the same
    assert all(share["loss"].all() for share in shares[1:])
    assert worker.constant_on_rank_zero(1, 0)["degenerate"]
