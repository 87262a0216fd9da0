"""The trial that `backend="auto"` makes of a device lets kernels pass; where and for what Triton they run."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from driftfield.backend import _disagreement, _outcome
from driftfield.drift import Drift, DriftingBatch
from driftfield.fused import group_kernels, moment_kernels, tile_kernels
from driftfield.fused.groups import GroupDrift
from driftfield.fused.patch_moments import patch_moments
from driftfield.fused.tiles import TileDrift

# NumPy, which interprets the kernels, warns of what padding overflows to.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [GroupDrift, TileDrift])
def test_kernels_pass_their_trial(kernels: type[Drift], dtype: torch.dtype, device: torch.device) -> None:
    with torch.inference_mode():  # the first to ask may be a validation
        assert _disagreement.__wrapped__(kernels, device, dtype) is None


def test_kernels_are_read_by_triton_without_knobs() -> None:
    """Triton 3.2 and 3.3, of torch 2.6 and 2.7: what they cannot compile, the trial finds out."""
    code = "import triton; vars(triton).pop('knobs', None); import driftfield.fused.group_kernels"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


class Watched:
    """A kernel that looks at whether its launch is within `torch.cuda.device_of`."""

    def __init__(self, kernel: Any, devices: list[Tensor]) -> None:
        self._kernel, self._devices = kernel, devices

    def __getitem__(self, grid: Any) -> Any:
        assert self._devices, "Triton launches on the current device, whatever device the tensors are on"
        return self._kernel[grid]


@pytest.mark.parametrize(
    "module, kernels",
    [
        (group_kernels, ["gram", "forces", "losses", "drift"]),
        (tile_kernels, ["extremes", "exponentials", "affinities", "add_remainders", "forces"]),
        (moment_kernels, ["_moments", "_gradient"]),
    ],
)
def test_kernels_run_on_the_device_of_their_tensors(
    module: Any, kernels: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[Tensor] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        devices.append(tensor)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in kernels:
        monkeypatch.setattr(module, name, Watched(getattr(module, name), devices))
    if module is moment_kernels:
        feature_map = torch.randn(1, 2, 4, 4, device=device, requires_grad=True)
        patch_moments(feature_map, backend="fused").whole.std.sum().backward()
    else:
        points = torch.randn(2, 3, 4, device=device)
        _outcome(GroupDrift if module is group_kernels else TileDrift, DriftingBatch(points, points + 1.0))
