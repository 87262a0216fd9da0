"""Few large groups as kernels: within 1e-3 of the formulas in float64, for every option and awkward set of points."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from driftfield.drift import Drift, DriftingBatch, EagerDrift
from driftfield.field import FieldOptions
from driftfield.fused import tiles
from driftfield.fused.tiles import OLDER_TILE, Tile, TileDrift, unsupported
from driftfield.kernel import NormalizeOver

from .. import oracle
from .conftest import SHARED_BYTES

OFFICIAL = FieldOptions((0.02, 0.05, 0.2), True, 1e-6, "xy", 1.0, 1.0)
SMALL = Tile(rows=16, columns=32, block=16, warps=4, stages=2)  # so that few points are several tiles
WIDE = SMALL._replace(columns=64, block=64)
TOLERANCE = 1e-3
SPILLED_BYTES = 512  # of a thread, of the largest tile

# NumPy, in which kernels are interpreted, warns of what is infinite on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero|All-NaN slice) encountered:RuntimeWarning"
)


def make_batch(counts: tuple[int, int, int], dimension: int, *groups: int) -> DriftingBatch:
    """x, positives, unconditional samples (none for a count of 0) and their weights, some of them 0."""
    x, positives, unconditional = (torch.randn(*groups, count, dimension) for count in counts)
    if not counts[2]:
        return DriftingBatch(x, positives)
    weight = 3.0 * torch.rand(*groups, counts[2]) * (torch.rand(*groups, counts[2]) < 0.7)
    return DriftingBatch(x, positives, unconditional, weight)


def results(kind: Any, batch: DriftingBatch, options: FieldOptions, **how: Any) -> dict[str, Tensor]:
    """Scale, λ, loss per group and gradient of x, with factors 1/λ."""
    x = batch.x.detach().requires_grad_()
    drift: Drift = kind(batch._replace(x=x), options, **how)
    scale = drift.scale_sums[0] / drift.scale_sums[1]
    force_sums = drift.force_sums(scale)
    drift_norm = (force_sums[:-1] / force_sums[-1]).sqrt()
    loss = drift.loss(scale, 1.0 / drift_norm)
    loss.sum().backward()
    assert x.grad is not None and x.grad.dtype == x.dtype
    assert drift.scale_sums[2] > 0
    return {"scale": scale, "drift_norm": drift_norm, "loss": loss.detach(), "gradient": x.grad}


def on(device: torch.device, batch: DriftingBatch, dtype: torch.dtype | None = None) -> DriftingBatch:
    return DriftingBatch(*(None if tensor is None else tensor.to(device, dtype) for tensor in batch))


def errors(device: torch.device, batch: DriftingBatch, options: FieldOptions, tile: Tile) -> dict[str, float]:
    found = results(TileDrift, on(device, batch), options, tile=tile)
    expected = results(EagerDrift, on(torch.device("cpu"), batch, torch.float64), options)
    assert all(found[name].shape == expected[name].shape for name in expected)
    return {
        name: oracle.relative_error(found[name].double().cpu().numpy(), expected[name].numpy()) for name in expected
    }


def assert_close(
    device: torch.device,
    batch: DriftingBatch,
    options: FieldOptions = OFFICIAL,
    tile: Tile = SMALL,
    tolerance: float = TOLERANCE,
) -> None:
    found = errors(device, batch, options, tile)
    assert all(error < tolerance for error in found.values()), found  # of NaN, max would say nothing


@pytest.mark.parametrize("over", get_args(NormalizeOver))
@pytest.mark.parametrize(
    ("normalize", "floor"),
    [
        (True, 1e-6),
        pytest.param(True, 0.0, marks=pytest.mark.slow),
        (False, 0.0),
        pytest.param(False, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_options(device: torch.device, over: NormalizeOver, normalize: bool, floor: float) -> None:
    temperatures = (0.1, 0.5) if normalize else (0.3, 2.0)
    options = FieldOptions(temperatures, normalize, floor, over, 1.5, 0.5)
    counts = (40, 21, 5) if floor == 1e-6 else (16, 11, 5)
    assert_close(device, make_batch(counts, 6), options)


@pytest.mark.parametrize(
    ("counts", "groups"),
    [((70, 1, 0), ()), ((17, 33, 3), (2,)), ((1, 3, 2), (1, 2)), ((2, 1, 0), ()), ((1, 1, 0), (2,))],
)
def test_shapes(device: torch.device, counts: tuple[int, int, int], groups: tuple[int, ...]) -> None:
    """Nothing is a multiple of a tile; x alone is several tiles, or a column holds nothing but x itself."""
    assert_close(device, make_batch(counts, 10, *groups))


def test_against_the_oracle(device: torch.device) -> None:
    batch = make_batch((9, 8, 3), 4, 1)
    found = results(TileDrift, on(device, batch), OFFICIAL, tile=SMALL)
    expected = oracle.drifting_loss(*(tensor.double().numpy() for tensor in batch))
    assert oracle.relative_error(found["loss"].cpu().numpy(), expected.loss) < TOLERANCE
    assert oracle.relative_error(found["gradient"].cpu().numpy(), expected.gradient) < TOLERANCE
    assert oracle.relative_error(found["drift_norm"].cpu().numpy(), expected.squared_norm**0.5) < TOLERANCE


def test_many_coordinates_need_no_remainders(device: torch.device) -> None:
    assert_close(device, make_batch((40, 20, 0), 512), tile=WIDE)


def near_points() -> dict[str, DriftingBatch]:
    """Sets of points with neighbours at a small part of their distance from the origin."""
    x, positives = torch.randn(16, 512), torch.randn(16, 512)
    centres = torch.randn(4, 512).repeat_interleave(4, 0)
    return {
        "near duplicates": DriftingBatch(x, torch.cat([x[:8] + 3e-3 * positives[8:], positives[:8]])),
        "collapsed": DriftingBatch(x[:1] + 1e-2 * x, positives),
        "clusters": DriftingBatch(centres + 1e-2 * x, centres + 1e-2 * positives),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["near duplicates", "collapsed"])
def test_near_points(device: torch.device, name: str) -> None:
    assert_close(device, near_points()[name], tile=WIDE)


def test_clusters(device: torch.device) -> None:
    assert_close(device, near_points()["clusters"], tile=WIDE)


@pytest.mark.slow
def test_clusters_need_remainders(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `test_clusters` shows is not true of the rounded points alone."""
    monkeypatch.setattr(tiles, "WHERE_NEAR", tiles.NEVER)
    monkeypatch.setattr(tiles.tile_kernels, "add_remainders", defaultdict(lambda: lambda *_, **__: None))
    assert max(errors(device, near_points()["clusters"], OFFICIAL, WIDE).values()) > TOLERANCE


def test_duplicates_and_points_far_from_the_origin(device: torch.device) -> None:
    batch = make_batch((16, 18, 3), 12)
    assert_close(device, batch._replace(positives=batch.x[:1].expand(18, 12), unconditional=batch.x[3:6]))
    assert_close(device, DriftingBatch(batch.x + 1e3, batch.positives + 1e3))
    assert_close(device, DriftingBatch(batch.x * 1e-2, batch.positives * 1e-2))


def test_very_large_values(device: torch.device) -> None:
    """Squares of these overflow float32."""
    batch = make_batch((20, 18, 0), 12)
    large = DriftingBatch(batch.x * 2.0**80, batch.positives * 2.0**80)
    found, expected = (results(TileDrift, on(device, part), OFFICIAL, tile=SMALL) for part in (large, batch))
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(found["scale"], expected["scale"] * 2.0**80, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("over", ["xy", "x", "y"])
def test_outliers(device: torch.device, over: NormalizeOver) -> None:
    """The nearest distances of a tile differ by more than exponentials can: no sum may underflow for it."""
    batch = make_batch((40, 7, 0), 6)
    batch.x[5] += 50.0
    batch.positives[3] -= 50.0
    assert_close(device, batch, OFFICIAL._replace(normalize_over=over, affinity_floor=0.0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, TOLERANCE)])
def test_narrow_inputs(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    """The tolerance of bfloat16 is that of a gradient rounded to it."""
    assert_close(device, on(torch.device("cpu"), make_batch((16, 15, 0), 20), dtype), tolerance=tolerance)


def test_strides_weights_that_repeat_and_untouched_input(device: torch.device) -> None:
    x, positives, unconditional = (torch.randn(count, 3, 8).transpose(0, 1) for count in (20, 17, 4))  # [3, n, 8]
    batch = DriftingBatch(x, positives, unconditional, torch.tensor([[0.0], [7.5], [1.0]]))
    before = [tensor.clone() for tensor in batch]
    assert_close(device, batch)
    assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))


def test_strips_change_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = on(device, make_batch((40, 20, 0), 16))
    whole = results(TileDrift, batch, OFFICIAL, tile=SMALL)
    monkeypatch.setattr(tiles, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(tiles, "MOST_STRIP_ROWS", 32)
    strips = results(TileDrift, batch, OFFICIAL, tile=SMALL)
    for name, expected in whole.items():
        # Sums in another order, and so here and there an affinity that rounds the other way
        assert oracle.relative_error(strips[name].cpu().numpy(), expected.cpu().numpy()) < 2e-4, name


def test_equal_input_gives_equal_bits_and_loss_needs_no_force_sums(device: torch.device) -> None:
    batch = on(device, make_batch((20, 18, 3), 12))
    first, second = (TileDrift(batch, OFFICIAL, tile=SMALL) for _ in range(2))
    scale, factor = first.scale_sums[0] / first.scale_sums[1], torch.ones(3, device=device)
    assert torch.equal(first.scale_sums, second.scale_sums)
    assert torch.equal(first.force_sums(scale), second.force_sums(scale))
    assert torch.equal(first.loss(scale, factor), TileDrift(batch, OFFICIAL, tile=SMALL).loss(scale, factor))


def test_nan_stays_visible(device: torch.device) -> None:
    batch = make_batch((6, 5, 0), 4)
    batch.positives[2, 3] = torch.nan
    drift = TileDrift(on(device, batch), OFFICIAL, tile=SMALL)
    scale = drift.scale_sums[0] / drift.scale_sums[1]
    assert scale.isnan() and drift.loss(scale, torch.ones_like(scale.expand(3))).isnan()


def test_unsupported() -> None:
    batch = make_batch((4, 3, 0), 2, 65)
    assert unsupported(batch, OFFICIAL) == "65 groups, expected at most 64"
    part = DriftingBatch(batch.x[:64], batch.positives[:64])
    assert unsupported(part, OFFICIAL) is None
    assert unsupported(on(torch.device("cpu"), part, torch.float64), OFFICIAL) == "float64, expected a narrower dtype"


@pytest.mark.slow
def test_large_tiles(device: torch.device) -> None:
    """As on a GPU, where `SMALL` is for tests alone."""
    assert_close(device, make_batch((300, 280, 40), 600), tile=Tile())


def compile_ahead(kernels: list[tuple[str, dict[str, int]]], capability: int, folder: Path) -> list[dict[str, Any]]:
    """What the kernels need of a GPU that need not be there, in the tiles that they run in."""
    from driftfield.fused import tile_kernels

    tile = Tile() if capability >= 90 else OLDER_TILE
    kinds = dict.fromkeys(("rounding", "gain", "attraction", "repulsion"), "fp32")
    kinds |= dict.fromkeys(("points", "weights", "remainders"), "*fp16") | {"near_targets": "*i32"}
    integers = "first_row num_rows num_samples padded_samples num_targets dimension out_dimension first_tile num_tiles"
    kinds |= dict.fromkeys([*integers.split(), "out_temperature_stride"], "i32")
    wanted = []
    for name, constants in kernels:
        function = getattr(tile_kernels, name)
        names = list(function.signature.parameters) if hasattr(function, "signature") else function.arg_names
        sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "BLOCK": tile.block}
        constants = constants | {key: value for key, value in sizes.items() if key in names}
        signature = {key: "constexpr" if key in constants else kinds.get(key, "*fp32") for key in names}
        if name == "affinities":
            signature["out"] = "*fp16"
        wanted.append(
            {
                "module": "driftfield.fused.tile_kernels",
                "kernel": name,
                "capability": capability,
                "signature": signature,
                "constants": constants,
                "num_warps": 4 if name in ("add_remainders", "forces") else tile.warps,
                "num_stages": tile.stages,
            }
        )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py"))]
    process = subprocess.run(command, input=json.dumps(wanted), env=environment, capture_output=True, encoding="utf-8")
    assert process.returncode == 0, process.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(process.stdout)
    return found


REFINED = {"TEMPERATURES": 3, "REFINE": 1}
SOFTMAXES = {"OVER_TARGETS": True, "OVER_X": True}


ALL_KERNELS: list[tuple[str, dict[str, int]]] = [
    ("extremes", {"REFINE": 0}),
    ("exponentials", REFINED | SOFTMAXES),
    ("affinities", REFINED),
    ("add_remainders", {"TILES": 64}),
    ("forces", {"CROSS": True}),
]


@pytest.mark.parametrize(
    ("kernels", "capability"),
    [
        (ALL_KERNELS[-1:], 90),
        pytest.param(ALL_KERNELS, 90, marks=pytest.mark.slow),
        pytest.param(ALL_KERNELS, 80, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_gpus(kernels: list[tuple[str, dict[str, int]]], capability: int, tmp_path: Path) -> None:
    for usage in compile_ahead(kernels, capability, tmp_path):
        assert usage["shared"] <= SHARED_BYTES[capability], usage
        assert usage["spilled"] <= SPILLED_BYTES, usage
