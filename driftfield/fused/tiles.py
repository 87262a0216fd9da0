"""The drift of few large groups: three passes over tiles of pairs as in `driftfield.tiled`, on tensor cores.

Points are kept as float16 pairs, rounded and remainder, in a unit that puts them into its range. float16 has the 11
bits of TF32 at twice its rate, and a distance is that of the rounded points, exact but for the accumulation: the norms
are those of the rounded points too, so that nothing cancels. Where points are so near each other that 11 bits are not
enough, or have so few coordinates that their rounding does not average out, the products take the remainders too. Sums
go through partial sums per tile, in a fixed order: equal input gives equal bits.

Operations and bytes for x `[N, D]` and as many positives, 3 temperatures (H100: 766 TFLOP/s in float16, 3.0 TB/s, 3.6 T
exponentials or roots a second; a product by these kernels at 3/4 of that rate). With u = 4 N² D, one product of all
pairs, at N = 16384, D = 1024: u = 1.1 TFLOP. A prediction, not a measurement:

    distances for the scale        3/4 u (x against x once)                    1.4 ms, roots and minima   0.2 ms
    distances for both softmaxes   3/4 u                                       1.4 ms, exponentials       0.6 ms
    distances for A                1 u                                         1.9 ms, exponentials       0.6 ms
    A, one strip after another     12 N² bytes written                         1.1 ms
    products of A                  3 u, by cuBLAS, which reads A as it goes    4.3 ms
    centring, F, V                 70 N D bytes                                0.8 ms
                                                                              12.3 ms
"""

from collections.abc import Callable, Iterator
from itertools import product
from math import ceil, log2
from typing import NamedTuple

import torch
from torch import Tensor

from driftfield.drift import SCALE_FLOOR, DriftingBatch, coordinate_scale, regress, target_weight
from driftfield.field import FieldOptions
from driftfield.fused import tile_kernels
from driftfield.fused.tile_kernels import ALWAYS, NEVER, WHERE_NEAR
from driftfield.kernel import SQUARED_DISTANCE_FLOOR, centre
from driftfield.normalization import count_varying
from driftfield.tiled import Softmax, potentials
from driftfield.tiled import unsupported as unsupported_by_tiled

MOST_GROUPS = 64  # which go one after the other
LARGEST_COORDINATE = 1024.0  # of points in their unit: squares add up in float32, and small ones stay normal in float16
SMALLEST_EXTENT = 1e-12  # of a group, below which all distances are the least one
FINEST_TEMPERATURE = 0.45  # τ √D, below which the rounding of points does not average out of d/τ
SMALLEST_GAINED_FLOOR = 2.0**-14  # A over its lower bound must stay within float16
PARTIAL_BYTES = 2**28  # of the partial sums of a strip
STRIP_BYTES = 9 * 2**29  # of A of a strip
MOST_STRIP_ROWS = 4096
PRODUCT_TILE = 128 * 256  # of the result of a product, which one processor works on at a time
LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Of pairs, and how a program works on it."""

    rows: int = 128
    columns: int = 256  # a multiple of `rows` and of `block`
    block: int = 64  # coordinates at a time
    warps: int = 8
    stages: int = 3


OLDER_TILE = Tile(columns=128)


def tile_for(device: torch.device) -> Tile:
    """What fits into the registers of a GPU: before Hopper the products keep both factors in them."""
    is_older = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return OLDER_TILE if is_older else Tile()


class _Group(NamedTuple):
    """The targets of one group: x, unconditional and positives, each with padding up to a multiple of the tile."""

    points: Tensor  # rounded, and remainders  [2, T, D] float16
    values: Tensor  # the negatives' times w over `weight_unit`, where there are weights  [2, T, D] float16
    norms: Tensor  # of the rounded points, and of both together; infinite in the padding  [2, T]
    weight: Tensor  # w, 0 in the padding  [T]
    units: Tensor  # of the points, and the least squared distance in it  [2]
    weight_unit: Tensor  # a power of two, no smaller than any weight  []
    padded_samples: int  # where x ends
    num_negatives: int  # where the positives begin
    sums: Tensor  # `scale_sums`  [3]
    nearest: tuple[Tensor, Tensor]  # the smallest distance in every row and column  [T], [T]


class _Partials(NamedTuple):
    """Of the tiles of a strip, before they are added up; `images` are those of mirror images."""

    rows: Tensor  # [..., T/COLUMNS, rows]
    columns: Tensor  # [..., rows/ROWS, T]
    row_images: Tensor  # [..., rows/ROWS, T]
    column_images: Tensor  # [..., T/COLUMNS, rows]


def unsupported(batch: DriftingBatch, options: FieldOptions) -> str | None:
    """Why these kernels cannot serve a batch; None: they can."""
    num_groups = batch.x.shape[:-2].numel()
    if batch.x.dtype == torch.float64:
        return "float64, expected a narrower dtype"
    if num_groups > MOST_GROUPS:
        return f"{num_groups} groups, expected at most {MOST_GROUPS}"
    if not hasattr(torch.ops.aten.mm, "dtype"):
        return f"torch {torch.__version__} cannot keep the product of float16 matrices in float32, expected 2.8"
    return unsupported_by_tiled(batch, options)


class TileDrift:
    """`Drift` of few large groups by Triton and cuBLAS, within 1e-3 of `EagerDrift`; no memory grows as N².

    Args:
        batch: checked, on a GPU.
        options: of the field.
        tile: other sizes than `tile_for` the device.
    """

    def __init__(self, batch: DriftingBatch, options: FieldOptions, *, tile: Tile | None = None) -> None:
        self._x, self._options, self._tile = batch.x, options, tile_for(batch.x.device) if tile is None else tile
        self._num_samples, self._dimension = batch.x.shape[-2:]
        # Under "paper" τ is no multiple of the mean distance, and may be small beside it.
        coarse = options.normalize_features and min(options.temperatures) * self._dimension**0.5 >= FINEST_TEMPERATURE
        self._refine = (WHERE_NEAR if coarse else ALWAYS).value
        self._forces: Tensor | None = None
        x, positives, unconditional, weight = batch
        if unconditional is not None and weight is not None:
            weight = weight.expand(unconditional.shape[:-1])
        with torch.no_grad(), torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            self._groups = [
                self._first_pass(
                    DriftingBatch(
                        x[i],
                        positives[i],
                        None if unconditional is None else unconditional[i],
                        None if weight is None else weight[i],
                    )
                )
                for i in product(*map(range, x.shape[:-2]))
            ]
        self.scale_sums = torch.stack([group.sums for group in self._groups]).sum(0)

    @torch.no_grad()
    def force_sums(self, scale: Tensor) -> Tensor:
        """See `Drift`."""
        self._forces, squares = self._compute_forces(scale)
        return torch.cat([squares, squares.new_full((1,), self._x.numel())])

    def loss(self, scale: Tensor, factor: Tensor) -> Tensor:
        """See `Drift`."""
        with torch.no_grad():
            forces = self._compute_forces(scale)[0] if self._forces is None else self._forces
            drift = forces[0] * factor[0]  # V  [..., N, D]
            for i in range(1, len(forces)):
                drift.addcmul_(forces[i], factor[i])
        return regress(self._x, drift, coordinate_scale(scale, self._dimension, self._options))

    def _first_pass(self, part: DriftingBatch) -> _Group:
        group = self._make_group(part)
        rows, columns = group.nearest
        total = torch.zeros_like(group.sums[0])
        for strip in self._strips_of_sums(group, 1):
            grid = self._grid(group, strip)
            totals, partials = rows.new_zeros(grid), self._partials(group, strip, (), torch.inf)
            tile_kernels.extremes[grid](
                group.points, group.norms, group.weight, group.units, totals, *partials,
                strip.start, strip.stop - strip.start, group.padded_samples, *self._sizes(group),
                REFINE=self._refine if self._refine == ALWAYS.value else NEVER.value, **self._constants(),
            )  # fmt: skip
            total += totals.sum()
            _gather(rows, columns, partials, strip, torch.amin, torch.minimum)
        group.sums[0] = total
        # Shifts of the exponentials must be finite, also in the padding and where a column holds nothing but x itself
        rows[group.padded_samples :] = columns[group.padded_samples :]
        lowest = torch.minimum(rows.min(), columns.min())
        for nearest in group.nearest:
            nearest.copy_(torch.where(nearest == torch.inf, lowest, nearest))
        return group

    def _make_group(self, part: DriftingBatch) -> _Group:
        """Everything but the first pass itself: `sums[0]` is 0 and `nearest` infinite."""
        x, positives, unconditional, unconditional_weight = part
        sets = [x, positives] if unconditional is None else [x, unconditional, positives]
        centred = centre(torch.cat(sets, -2).detach().float())
        extent = ((centred.highest - centred.lowest) / centred.unit).amax().clamp(min=SMALLEST_EXTENT)
        unit = torch.exp2(torch.ceil(torch.log2(extent))) / LARGEST_COORDINATE
        units = torch.stack(
            [centred.unit.view(()) * unit, SQUARED_DISTANCE_FLOOR / (centred.unit.view(()) * unit) ** 2]
        )
        given = target_weight(part, torch.float32)

        counts = [len(points) for points in sets]
        padded = [self._tile.columns * ceil(count / self._tile.columns) for count in counts]
        num_negatives = sum(padded[:-1])
        shape = (2, sum(padded), self._tile.block * ceil(self._dimension / self._tile.block))
        points, weight = torch.zeros(shape, dtype=torch.float16, device=x.device), given.new_zeros(shape[1])
        is_padding = torch.ones_like(weight, dtype=torch.bool)
        weight_unit = torch.exp2(torch.ceil(torch.log2(given.max().clamp(min=1.0))))
        values = points if unconditional_weight is None else torch.zeros_like(points)
        start, padded_start = 0, 0
        for count, padded_count in zip(counts, padded, strict=True):
            given_place, place = slice(start, start + count), slice(padded_start, padded_start + count)
            some = centred.points[given_place] / unit
            points[:, place, : self._dimension] = _in_two(some)
            if unconditional_weight is not None:  # a factor of the targets: A itself fills the range of float16
                factor = given[given_place, None] / weight_unit if padded_start < num_negatives else 1.0
                values[:, place, : self._dimension] = _in_two(some * factor)
            weight[place] = given[given_place]
            is_padding[place] = False
            start, padded_start = start + count, padded_start + padded_count
        # In one piece for all targets: those of equal points are equal to the bit.
        rounded = points[0].float()
        norms = torch.stack([rounded.square().sum(-1), rounded.add_(points[1]).square_().sum(-1)])
        varying = count_varying(centred, x.dtype)
        return _Group(
            points=points,
            values=values,
            norms=norms.masked_fill(is_padding, torch.inf),
            weight=weight,
            units=units,
            weight_unit=weight_unit,
            padded_samples=padded[0],
            num_negatives=num_negatives,
            sums=torch.stack([torch.zeros_like(varying), self._num_samples * given.sum(), varying]),
            nearest=(torch.full_like(weight, torch.inf), torch.full_like(weight, torch.inf)),
        )

    def _softmax_sums(self, group: _Group, rates: Tensor) -> tuple[Softmax, Softmax]:
        """The second pass: both softmaxes, where `normalize_over` has them."""
        over, num_temperatures = self._options.normalize_over, len(rates)
        rows, columns = (Softmax(m, m.new_zeros(num_temperatures, *m.shape)) for m in group.nearest)
        if over == "none":
            return rows, columns
        for strip in self._strips_of_sums(group, num_temperatures):
            partials = self._partials(group, strip, (num_temperatures,), 0.0)
            tile_kernels.exponentials[self._grid(group, strip)](
                group.points, group.norms, group.units, rates, *group.nearest, *partials,
                strip.start, strip.stop - strip.start, group.padded_samples, *self._sizes(group),
                OVER_TARGETS=over in ("xy", "y"), OVER_X=over in ("xy", "x"), TEMPERATURES=num_temperatures,
                REFINE=self._refine, **self._constants(),
            )  # fmt: skip
            _gather(rows.sums, columns.sums, partials, strip, torch.sum, torch.add)
        return rows, columns

    def _compute_forces(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """F `[temperatures, ..., N, D]` in normalised coordinates, and the sums of its squares `[temperatures]`."""
        shape = (len(self._options.temperatures), *self._x.shape)
        forces = torch.empty(shape, dtype=torch.float32, device=self._x.device)
        of_groups = forces.view(len(forces), -1, *shape[-2:]).unbind(1)
        with torch.cuda.device_of(self._x):  # type: ignore[no-untyped-call]
            squares = [self._forces_of(*pair, scale) for pair in zip(self._groups, of_groups, strict=True)]
        return forces, torch.stack(squares).sum(0)

    def _forces_of(self, group: _Group, out: Tensor, scale: Tensor) -> Tensor:
        """The second and third pass: writes F of one group `[temperatures, N, D]`, returns the sums of its squares."""
        options, (num_targets, dimension, _) = self._options, self._sizes(group)
        temperatures = scale.new_tensor(options.temperatures)
        if options.normalize_features:
            temperatures = temperatures * scale.clamp(min=SCALE_FLOOR)  # τ multiplies the mean distance (Eq. 22)
        rates = LOG2_E / temperatures
        u, v = potentials(options.normalize_over, *self._softmax_sums(group, rates), temperatures)
        u, v, floor, gain, factor = self._in_float16(group, rates, u, v)
        factor = factor * (group.units[0] / coordinate_scale(scale, self._dimension, options))  # [temperatures, T]

        num_temperatures, split = len(rates), group.num_negatives
        squares = []
        for strip in self._strips_of_affinities(group, num_temperatures):
            num_rows, grid = strip.stop - strip.start, self._grid(group, strip)
            weights = torch.empty(num_temperatures, num_rows, num_targets, dtype=torch.float16, device=out.device)
            sums = rates.new_empty(num_temperatures, grid[1], num_rows)
            near_targets = torch.ones(grid, dtype=torch.int32, device=out.device)
            tile_kernels.affinities[grid](
                group.points, group.norms, group.weight, group.units, rates, u, v, floor, weights, sums, near_targets,
                gain, strip.start, num_rows, *self._sizes(group),
                TEMPERATURES=num_temperatures, REFINE=self._refine, **self._constants(),
            )  # fmt: skip
            repel, attract = (
                self._moment(group, weights, near_targets, side)
                for side in (slice(0, split), slice(split, num_targets))
            )
            split_tile = split // self._tile.columns
            blocks = (grid[0], dimension // self._tile.block, num_temperatures)
            squares.append(rates.new_empty(blocks[::-1]))
            tile_kernels.forces[blocks](
                group.points, attract, repel, sums[:, split_tile:].sum(1), sums[:, :split_tile].sum(1), factor, out,
                squares[-1], options.attraction, options.repulsion, group.weight_unit,
                strip.start, self._num_samples, num_rows, num_targets, dimension, self._dimension, out.stride(0),
                CROSS=options.normalize_over != "x", ROWS=self._tile.rows, BLOCK=self._tile.block,
            )  # fmt: skip
        return torch.cat(squares, -1).sum((-2, -1))

    def _in_float16(
        self, group: _Group, rates: Tensor, u: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
        """What puts A into the range of float16: u, v and the lower bound, `[temperatures, T]`; gain; factor of F.

        A softmax is at most 1. The bare kernel may be tiny for a whole row: its largest entry becomes 1 by u.
        """
        floor, over = self._options.affinity_floor**0.5, self._options.normalize_over
        zeros = rates.new_zeros(len(rates), len(group.weight))
        row_unit = zeros  # binary logarithm of the unit of a row of A
        if over == "none":
            row_unit = -group.nearest[0] * rates[:, None]
            if floor > 0:
                row_unit = row_unit.clamp(min=log2(floor))
            u = -row_unit / rates[:, None]
        exact_floor = over != "none" and floor >= SMALLEST_GAINED_FLOOR  # then the lower bound becomes 1
        gain = -log2(floor) if exact_floor else 14.0
        least = torch.exp2(-row_unit) * (1.0 if exact_floor else floor * 2.0**gain)
        powers = 1.0 if over == "x" else 2.0
        return (
            zeros if u is None else u.contiguous(),
            zeros if v is None else v.contiguous(),
            least,
            gain,
            torch.exp2((row_unit - gain) * powers),
        )

    def _moment(self, group: _Group, weights: Tensor, near_targets: Tensor, side: slice) -> Tensor:
        """ΣA y over one side of the targets, `[temperatures, rows, D]`."""
        num_temperatures, num_rows, num_targets = weights.shape
        flat, (rounded, remainders) = weights.view(-1, num_targets), group.values
        moment = _product(flat[:, side], rounded[side]).view(num_temperatures, num_rows, -1)
        first, count = side.start // self._tile.columns, (side.stop - side.start) // self._tile.columns
        grid = num_rows // self._tile.rows, moment.shape[-1] // self._tile.block, num_temperatures
        tile_kernels.add_remainders[grid](
            weights, remainders, near_targets, moment,
            num_rows, num_targets, moment.shape[-1], first, count,
            TILES=1 << (count - 1).bit_length(),
            ROWS=self._tile.rows, COLUMNS=self._tile.columns, BLOCK=self._tile.block, num_warps=4,
        )  # fmt: skip
        return moment

    def _sizes(self, group: _Group) -> tuple[int, int, float]:
        """Targets and coordinates with padding; rounding of a squared distance, relative to the squared norm."""
        _, num_targets, dimension = group.points.shape
        # Tensor cores cut off what they add, where `kernel.distances` allows for rounding.
        return num_targets, dimension, 4 * (8.0 + self._dimension**0.5) * torch.finfo(torch.float32).eps

    def _constants(self) -> dict[str, int]:
        tile = self._tile
        return {
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "BLOCK": tile.block,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def _grid(self, group: _Group, strip: slice) -> tuple[int, int]:
        return (strip.stop - strip.start) // self._tile.rows, len(group.weight) // self._tile.columns

    def _partials(self, group: _Group, strip: slice, leading: tuple[int, ...], neutral: float) -> _Partials:
        row_tiles, column_tiles = self._grid(group, strip)
        per_row, per_column = (column_tiles, strip.stop - strip.start), (row_tiles, len(group.weight))
        shapes = (per_row, per_column, per_column, per_row)
        return _Partials(*(group.weight.new_full((*leading, *shape), neutral) for shape in shapes))

    def _strips(self, group: _Group, num_rows: int) -> Iterator[slice]:
        for start in range(0, group.padded_samples, num_rows):
            yield slice(start, min(start + num_rows, group.padded_samples))

    def _strips_of_sums(self, group: _Group, num_sums: int) -> Iterator[slice]:
        """Rows whose `_partials` fit PARTIAL_BYTES."""
        row = 8 * num_sums * len(group.weight) * (1 / self._tile.rows + 1 / self._tile.columns)
        return self._strips(group, self._tile.rows * max(1, int(PARTIAL_BYTES / row) // self._tile.rows))

    def _strips_of_affinities(self, group: _Group, num_temperatures: int) -> Iterator[slice]:
        """Rows whose A fits STRIP_BYTES, so many that products keep all processors busy to the end."""
        rows, processors = self._tile.rows, _processors(self._x.device)
        row = 2 * num_temperatures * len(group.weight)
        most = min(MOST_STRIP_ROWS, group.padded_samples, max(rows, STRIP_BYTES // row))
        tiles_per_row = num_temperatures * group.points.shape[-1] / PRODUCT_TILE

        def waves(num_rows: int) -> int:
            strips = self._strips(group, num_rows)
            return sum(ceil(ceil((strip.stop - strip.start) * tiles_per_row) / processors) for strip in strips)

        return self._strips(group, min(range(rows, most + 1, rows), key=waves))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _in_two(points: Tensor) -> Tensor:
    """Rounded to float16, and what that leaves, `[2, ...]`."""
    rounded = points.half()
    return torch.stack([rounded, (points - rounded.float()).half()])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of float16 matrices, in float32, whatever torch is set to for products of float32."""
    if left.device.type != "cuda":  # where kernels are interpreted
        return left.float() @ right.float()
    result: Tensor = torch.ops.aten.mm.dtype(left, right, torch.float32)
    return result


def _gather(
    rows: Tensor,
    columns: Tensor,
    partials: _Partials,
    strip: slice,
    reduce: Callable[[Tensor, int], Tensor],
    join: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Take the partial results of a strip into those of all rows and all columns, `[..., T]`, in place."""
    for total, in_strip, everywhere in (
        (rows, partials.rows, partials.row_images),
        (columns, partials.column_images, partials.columns),
    ):
        total[..., strip] = join(total[..., strip], reduce(in_strip, -2))
        total.copy_(join(total, reduce(everywhere, -2)))
