"""Moments of patches against loops in float64, by both backends; without a GPU the kernels are interpreted."""

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from driftfield.fused import patch_moments as module
from driftfield.fused.patch_moments import VARIANCE_FLOOR, Backend, MapMoments, patch_moments
from tests.driftfield.fused.conftest import Compile

BACKENDS: list[Backend] = ["eager", "fused"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def make_map(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.contiguous(memory_format=layout)


def flatten(moments: MapMoments) -> list[Tensor]:
    return [tensor for pair in [*moments.patches, moments.whole] for tensor in pair]


def by_loops(feature_map: Tensor, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Means and standard deviations [B, L, C] of patches of each size and of the map, patches in row order."""
    values = feature_map.double().cpu().numpy()
    batch, channels, rows, columns = values.shape
    found = []
    for height, width in [*((size, size) for size in sizes), (rows, columns)]:
        corners = list(itertools.product(range(0, rows, height), range(0, columns, width)))
        means, stds = np.zeros((2, batch, len(corners), channels))
        for b, (place, (row, column)), c in itertools.product(range(batch), enumerate(corners), range(channels)):
            patch = [float(value) for value in values[b, c, row : row + height, column : column + width].flat]
            mean = math.fsum(patch) / len(patch)
            means[b, place, c] = mean
            stds[b, place, c] = math.sqrt(math.fsum((x - mean) ** 2 for x in patch) / len(patch) + VARIANCE_FLOOR)
        found += [means, stds]
    return found


def assert_close(moments: MapMoments, expected: list[np.ndarray], rtol: float = 2e-6) -> None:
    for found, wanted in zip(flatten(moments), expected, strict=True):
        np.testing.assert_allclose(found.detach().cpu(), wanted, rtol=rtol, atol=1e-6)


def gradient_in_float64(feature_map: Tensor, sizes: tuple[int, ...], weights: list[Tensor]) -> Tensor:
    exact = feature_map.detach().double().requires_grad_()
    tensors = flatten(patch_moments(exact, sizes, backend="eager"))
    total = sum((tensor * weight).sum() for tensor, weight in zip(tensors, weights, strict=True))
    return torch.autograd.grad(total, exact)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2, 3, 8, 8), (2, 4)),
        ((1, 5, 4, 12), (4,)),  # of the smaller patches within, nothing is asked for
        ((2, 2, 8, 4), (2,)),
        ((2, 3, 8, 8), ()),
        ((1, 3, 6, 10), (2,)),  # 4 x 4 does not tile
        ((2, 2, 7, 5), ()),  # nor 2 x 2
        ((1, 2, 1, 1), ()),
    ],
)
def test_moments_and_their_gradient(
    backend: Backend, layout: torch.memory_format, shape: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> None:
    feature_map = make_map(*shape, layout=layout).to(device).requires_grad_()
    moments = patch_moments(feature_map, sizes, backend=backend)
    assert_close(moments, by_loops(feature_map.detach(), sizes))
    weights = [torch.randn_like(tensor) for tensor in flatten(moments)]
    total = sum((tensor * weight).sum() for tensor, weight in zip(flatten(moments), weights, strict=True))
    (gradient,) = torch.autograd.grad(total, feature_map)
    expected = gradient_in_float64(feature_map, sizes, weights).float()
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert gradient.stride() == feature_map.stride()


def test_gradient_is_the_derivative() -> None:
    feature_map = make_map(1, 2, 4, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(flatten(patch_moments(x))), feature_map)
    assert patch_moments(feature_map).whole.mean.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bit_maps_are_taken_in_float32(
    dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> None:
    narrow = make_map(2, 3, 4, 8, layout=layout).to(device, dtype).requires_grad_()
    moments = patch_moments(narrow, backend="fused")
    assert {tensor.dtype for tensor in flatten(moments)} == {torch.float32}
    assert_close(moments, by_loops(narrow.detach(), (2, 4)))
    weights = [torch.randn_like(tensor) for tensor in flatten(moments)]
    sum((tensor * weight).sum() for tensor, weight in zip(flatten(moments), weights, strict=True)).backward()
    assert narrow.grad is not None
    expected = gradient_in_float64(narrow, (2, 4), weights).to(dtype)  # rounded once
    torch.testing.assert_close(narrow.grad, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 1050, 4, 4), (2, 4)),  # more channels than a tile holds
        ((1, 3, 4, 140), (2, 4)),  # more patches in a row than a tile holds, and the last tile is not full
        ((2, 33, 14, 14), (2,)),
    ],
)
def test_maps_larger_than_a_tile(shape: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> None:
    feature_map = make_map(*shape, layout=torch.channels_last).to(device).requires_grad_()
    moments = patch_moments(feature_map, sizes, backend="fused")
    assert_close(moments, [tensor.detach().numpy() for tensor in flatten(patch_moments(feature_map.double(), sizes))])
    weights = [torch.randn_like(tensor) for tensor in flatten(moments)]
    sum((tensor * weight).sum() for tensor, weight in zip(flatten(moments), weights, strict=True)).backward()
    expected = gradient_in_float64(feature_map, sizes, weights).float()
    torch.testing.assert_close(feature_map.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["every other channel", "turned", "expanded", "cut out"])
def test_any_strides(name: str, device: torch.device) -> None:
    base = make_map(2, 4, 8, 8).to(device)
    feature_map = {
        "every other channel": base[:, ::2],
        "turned": base.mT,
        "expanded": base[:, :1].expand(-1, 3, -1, -1),
        "cut out": base[:, 1:, 2:6, 4:],
    }[name].detach()
    feature_map.requires_grad_()
    moments = patch_moments(feature_map, backend="fused")
    assert_close(moments, by_loops(feature_map.detach(), (2, 4)))
    moments.patches[0].std.sum().backward()
    assert feature_map.grad is not None
    weights = [torch.full_like(tensor, float(i == 1)) for i, tensor in enumerate(flatten(moments))]
    expected = gradient_in_float64(feature_map, (2, 4), weights).float()
    torch.testing.assert_close(feature_map.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_spread_far_from_zero_survives(backend: Backend, device: torch.device) -> None:
    """E[x^2] - E[x]^2 in float32 would be off by more than the whole variance here."""
    feature_map = 1000 + 0.05 * make_map(1, 2, 8, 8, layout=torch.channels_last).to(device)
    assert_close(patch_moments(feature_map, backend=backend), by_loops(feature_map, (2, 4)), rtol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_map_has_a_finite_gradient(backend: Backend, device: torch.device) -> None:
    feature_map = torch.full((1, 2, 8, 8), 3.7, device=device, requires_grad=True)
    moments = patch_moments(feature_map, backend=backend)
    torch.testing.assert_close(moments.whole.std, torch.full((1, 1, 2), VARIANCE_FLOOR**0.5, device=device))
    sum(tensor.sum() for tensor in flatten(moments)).backward()
    # The mean of a patch moves by 1/n with each of its locations, its standard deviation not at all.
    torch.testing.assert_close(feature_map.grad, torch.full_like(feature_map, 1 / 4 + 1 / 16 + 1 / 64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_has_empty_moments(backend: Backend, device: torch.device) -> None:
    moments = patch_moments(torch.zeros(0, 3, 4, 4, device=device), backend=backend)
    assert [list(tensor.shape) for tensor in flatten(moments)] == [[0, n, 3] for n in (4, 4, 1, 1, 1, 1)]


def test_a_map_without_gradient_keeps_nothing(device: torch.device) -> None:
    with torch.no_grad():
        moments = patch_moments(make_map(1, 2, 4, 4).to(device).requires_grad_(), backend="fused")
    assert not any(tensor.requires_grad for tensor in flatten(moments))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_the_operator_is_what_torch_compile_takes_it_for(device: torch.device) -> None:
    for layout in LAYOUTS:
        feature_map = make_map(1, 2, 4, 8, layout=layout).to(device).requires_grad_()
        torch.library.opcheck(torch.ops.driftfield.patch_moments.default, (feature_map, True, True))


@pytest.fixture
def asked_anew() -> Iterator[None]:
    module._disagreement.cache_clear()
    yield
    module._disagreement.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_agree_with_eager_are_trusted(dtype: torch.dtype, asked_anew: None, device: torch.device) -> None:
    assert module._why_not_trusted(device, dtype) is None

    def doubled_where_trusted(x: Tensor) -> Tensor:
        return 2 * x if module._why_not_trusted(x.device, x.dtype) is None else x

    x = torch.ones(2, device=device, dtype=dtype)
    assert torch.equal(torch.compile(doubled_where_trusted, backend="eager", fullgraph=True)(x), 2 * x)


@pytest.mark.parametrize("problem", ["wrong", "raises"])
def test_kernels_that_do_not_agree_are_not_trusted(
    problem: str, asked_anew: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient(feature_map: Tensor, *_: object) -> Tensor:
        if problem == "raises":
            raise RuntimeError("PTX was made by a newer compiler")
        return torch.zeros_like(feature_map)

    monkeypatch.setattr("driftfield.fused.moment_kernels.gradient", gradient)
    expected = "RuntimeError: PTX was made" if problem == "raises" else "differ from eager by"
    with pytest.warns(UserWarning, match=f"the kernels of patch_moments are not used on .*: {expected}"):
        reason = module._why_not_trusted(device, torch.float32)
    assert reason is not None and reason.startswith(expected)
    assert module._why_not_trusted(device, torch.float32) == reason  # remembered, without another warning


def test_other_sizes_are_for_eager_alone() -> None:
    feature_map = make_map(1, 2, 9, 9)
    assert_close(patch_moments(feature_map, (3, 9)), by_loops(feature_map, (3, 9)))
    with pytest.raises(ValueError, match=r"backend 'fused': expected patches of \(2, 4\), found \[3\]"):
        patch_moments(feature_map, (3,), backend="fused")
    with pytest.raises(ValueError, match="backend 'fused': expected a map of float16, bfloat16 or float32"):
        patch_moments(feature_map.double(), (), backend="fused")


def test_kernels_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend 'fused': expected a map on a GPU, found one on cpu"):
        patch_moments(make_map(1, 2, 4, 4), backend="fused")


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'eager', 'fused', got 'triton'"):
        patch_moments(make_map(1, 2, 4, 4), backend="triton")  # type: ignore[arg-type]
    for shape in ((3, 4, 4), (1, 2, 0, 4)):
        with pytest.raises(ValueError, match="feature_map: expected .B, C, H, W. with locations, found"):
            patch_moments(torch.zeros(shape))
    feature_map = make_map(1, 2, 12, 12)
    for sizes in ((0,), (5,), (2, 8)):
        with pytest.raises(ValueError, match="patch_sizes: expected sides that tile a map of 12 x 12, found"):
            patch_moments(feature_map, sizes)
    for sizes in ((4, 2), (2, 2), (2, 3)):
        with pytest.raises(ValueError, match="patch_sizes: expected each a larger multiple of the one before, found"):
            patch_moments(feature_map, sizes)


def test_triton_is_imported_only_where_a_kernel_runs() -> None:
    code = (
        "import sys, torch, vision.features as features\n"
        "features.multi_scale_features({'m': torch.zeros(1, 1, 4, 4)})\n"
        "assert 'driftfield.fused.patch_moments' in sys.modules\n"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.slow
def test_kernels_compile_for_gpus(assert_compiles: Compile) -> None:
    def kernel(name: str, pointer: str, last: bool, side: int, patches: int, channels: int) -> dict[str, object]:
        strides = [f"{of}_{dim}" for of in ("stride", "result") for dim in "bchw"]
        one = "_c" if last else "_w"
        moments = [f"{to}{of}{size}" for to in ("", "to_") for of in ("mean", "std") for size in ("", "_2", "_4")]
        constants = {
            "HAS_2": side > 1, "HAS_4": side == 4, "SIDE": side, "P": patches, "C": channels, "CHANNELS_LAST": last,
        }  # fmt: skip
        signature = {
            **dict.fromkeys(("feature_map", "result"), f"*{pointer}"),
            **dict.fromkeys(moments, "*fp32"),
            **dict.fromkeys(("channels", "height", "width"), "i32"),
            **{stride: "1" if stride.endswith(one) else "i32" for stride in strides},
            **dict.fromkeys(constants, "constexpr"),
            "floor": "fp32",
        }
        only_of_one = {"_moments": {"result", *moments[6:], *strides[4:]}, "_gradient": {"floor"}}[name]
        return {
            "module": "driftfield.fused.moment_kernels",
            "kernel": name,
            "signature": {key: kind for key, kind in signature.items() if key not in only_of_one},
            "constants": constants,
            "num_warps": 4,
        }

    assert_compiles(
        [
            kernel(name, *case)
            for name in ("_moments", "_gradient")
            for case in (
                ("fp32", True, 4, 8, 64),  # 32 x 32
                ("bf16", True, 4, 1, 1024),  # 4 x 4
            )
        ]
    )
