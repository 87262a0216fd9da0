"""The trial that `backend="auto"` makes of a device lets the kernels of the loss pass."""

import pytest
import torch

from driftfield.backend import _disagreement
from driftfield.drift import Drift
from driftfield.fused.groups import GroupDrift
from driftfield.fused.tiles import TileDrift

# NumPy, which interprets the kernels, warns of what padding overflows to.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [GroupDrift, TileDrift])
def test_kernels_pass_their_trial(kernels: type[Drift], dtype: torch.dtype, device: torch.device) -> None:
    assert _disagreement(kernels, device, dtype) is None
