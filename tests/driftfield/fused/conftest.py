"""What tests of kernels get: a device they run on, and the compiler for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what one block may have, by compute capability
SPILLED_BYTES = {80: 128, 90: 0}  # of a thread; the products of capability 80 keep both factors in registers

Compile = Callable[[Sequence[dict[str, Any]]], None]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; without one the CPU, where kernels are interpreted (see tests/conftest.py)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def assert_compiles(tmp_path: Path) -> Compile:
    """Compiles kernels for GPUs that need not be there, and asserts that they fit and spill next to nothing.

    Takes a list of kernels: `module`, `kernel`, `signature` (of every argument: "*fp32", "i32", "constexpr", "1" for an
    integer that is 1), `constants` and, where they differ from Triton's, `num_warps` and `num_stages`.
    """

    def assert_compiles(kernels: Sequence[dict[str, Any]]) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path)
        wanted = [{"capability": capability, **kernel} for kernel in kernels for capability in SHARED_BYTES]
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("compile_ahead.py"))],
            input=json.dumps(
                [{"capability": capability, **kernel} for kernel in kernels for capability in SHARED_BYTES]
            ),
            env=environment,
            capture_output=True,
            encoding="utf-8",
        )
        assert process.returncode == 0, process.stderr[-4000:]
        found = json.loads(process.stdout)
        assert len(found) == len(wanted)
        for usage in found:
            assert usage["shared"] <= SHARED_BYTES[usage["capability"]], usage
            assert usage["spilled"] <= SPILLED_BYTES[usage["capability"]], usage

    return assert_compiles
