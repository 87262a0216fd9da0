"""Which way computes the drift of a batch, and that all of them compute the same."""

import logging
import subprocess
import sys

import pytest
import torch

from driftfield import DriftingLoss
from driftfield.backend import choose_drift, pair_mib
from driftfield.drift import DriftingBatch, EagerDrift
from driftfield.field import FieldOptions
from driftfield.tiled import TiledDrift

ON_CPU = torch.device("cpu")


def batch(*groups: int, num: int = 6, dimension: int = 3) -> DriftingBatch:
    draw = torch.Generator().manual_seed(0)
    x, positives, unconditional = (torch.randn(*groups, k, dimension, generator=draw) for k in (num, num + 1, 2))
    return DriftingBatch(x, positives, unconditional, torch.rand(*groups, 2, generator=draw))


def test_on_a_cpu_auto_is_eager_and_imports_no_triton() -> None:
    program = (
        "import sys, torch; from driftfield import DriftingLoss;"
        "DriftingLoss()(torch.randn(2, 4, 3), torch.randn(2, 4, 3)); print('triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    assert isinstance(choose_drift(batch(2), DriftingLoss().options, backend="auto", memory_mib=None), EagerDrift)


def test_fused_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='fused' cannot serve this batch: x is on cpu, expected a CUDA"):
        DriftingLoss(backend="fused")(*batch(2))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'eager', 'fused', got 'cuda'"):
        DriftingLoss(backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("memory_mib", [0.0, -1.0])
def test_no_memory_is_refused(memory_mib: float) -> None:
    with pytest.raises(ValueError, match="memory_mib must be > 0"):
        DriftingLoss(memory_mib=memory_mib)


@pytest.mark.parametrize("groups", [(), (5,), (2, 3)])
def test_a_bound_of_memory_changes_how_and_not_what(groups: tuple[int, ...]) -> None:
    whole = batch(*groups)
    limit = pair_mib(whole) / 2
    options = DriftingLoss().options
    assert isinstance(choose_drift(whole, options, backend="auto", memory_mib=limit), TiledDrift)
    assert isinstance(choose_drift(whole, options, backend="auto", memory_mib=2.5 * limit), EagerDrift)

    outputs, gradients = [], []
    for loss_fn in (DriftingLoss(), DriftingLoss(memory_mib=limit)):
        x = whole.x.clone().requires_grad_()
        outputs.append(loss_fn(*whole._replace(x=x)))
        gradients += torch.autograd.grad(outputs[-1].loss.sum(), x)
    for found, expected in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_statistics_of_microbatches_keep_to_the_bound_too() -> None:
    whole = batch(4)
    loss_fn, bounded = DriftingLoss(), DriftingLoss(memory_mib=pair_mib(whole) / 8)
    parts = [DriftingBatch(*(None if each is None else each[i : i + 2] for each in whole)) for i in (0, 2)]  # type: ignore[arg-type]
    for found, expected in zip(bounded.statistics(parts), loss_fn.statistics([whole]), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_strips_cannot_do_is_refused_where_memory_is_short() -> None:
    whole = batch(2)
    with pytest.raises(ValueError, match=r"memory_mib=\S+: eager needs \S+ MiB, and strips cannot: field='sinkhorn'"):
        DriftingLoss(field="sinkhorn", memory_mib=1e-6)(*whole)


def test_the_kernels_serve_where_they_agree_and_eager_where_they_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The trial of a device, with the strips of `TiledDrift` in the place of kernels, and with broken ones."""
    from driftfield import backend, fused

    class Strips(TiledDrift):
        def __init__(self, batch: DriftingBatch, options: FieldOptions) -> None:
            super().__init__(batch, options, memory_mib=0.01)

    class WrongNorm(Strips):
        def force_sums(self, scale: torch.Tensor) -> torch.Tensor:
            return 1.1 * super().force_sums(scale)

    class WrongGradient(Strips):
        def loss(self, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            loss = super().loss(scale, factor)
            return loss.detach() + 1.1 * (loss - loss.detach())

    class Broken(Strips):
        def force_sums(self, scale: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of resources\nshared memory")

    backend._disagreement.cache_clear()
    for dtype in (torch.float32, torch.bfloat16):
        assert backend._disagreement(Strips, ON_CPU, dtype) is None
        for kind, reason in (
            (WrongNorm, "differ from eager by 0.1"),
            (WrongGradient, "differ from eager by 0.1"),
            (Broken, "RuntimeError: out of resources"),
        ):
            with pytest.warns(UserWarning, match=f"the kernels of {kind.__name__} are not used on cpu: {reason}"):
                found = backend._disagreement(kind, ON_CPU, dtype)
            assert found == reason
    backend._disagreement.cache_clear()
    monkeypatch.setattr(backend, "_kernels_are_worth_a_look", lambda x: True)
    monkeypatch.setattr(fused, "unsupported", lambda batch, options: "a reason")
    with caplog.at_level(logging.DEBUG, logger="driftfield"):
        drift = choose_drift(batch(2), DriftingLoss().options, backend="auto", memory_mib=None)
    assert isinstance(drift, EagerDrift)
    assert "takes eager for x [2, 6, 3] torch.float32: a reason" in caplog.text


def test_groups_shared_by_one_process_are_ordinary_groups() -> None:
    whole = batch(2)
    for found, expected in zip(DriftingLoss(share_groups=True)(*whole), DriftingLoss()(*whole), strict=True):
        torch.testing.assert_close(found, expected)


def test_shared_groups_have_no_kernels() -> None:
    with pytest.raises(ValueError, match="share_groups works without kernels: backend must be 'auto' or 'eager'"):
        DriftingLoss(share_groups=True, backend="fused")
