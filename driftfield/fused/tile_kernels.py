"""Kernels of `tiles`: a program takes one tile of pairs, rows of x against targets, and no tile is stored but A.

Points come as float16 pairs, `points[0]` rounded to it and `points[1]` the remainder, with zeros up to a multiple of
the block of every product, and targets up to a multiple of the tile. The squared norms are those of the rounded points
and of the pairs; where there is no target they are infinite, and so is then every distance.

Distances between x and x are the same both ways: passes that only sum leave out the tiles below the diagonal of x, and
their mirror images provide what they would have added (`row_images`, `column_images`).
"""

import triton
import triton.language as tl

# Pairs nearer than this times their mean norm, squared: products are refined by the remainders of the points. Further
# apart, rounding points to 11 bits moves a distance by 5e-5 of itself or less.
NEAR_POINTS = tl.constexpr(2.0**-11)
# The same for the products of affinities and targets: further apart, rounding a target is nothing beside y - x.
NEAR_TARGETS = tl.constexpr(2.0**-4)
SAME_SHIFT = tl.constexpr(60.0)  # binary orders between the softmaxes of a tile that one exponential can serve

NEVER, WHERE_NEAR, ALWAYS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # products take the remainders


@triton.jit
def _product(left, right, rows, columns, total, dimension, BLOCK: tl.constexpr):
    """total + left[rows] @ right[columns].T, in float32."""
    part = tl.arange(0, BLOCK)
    left += rows.to(tl.int64)[:, None] * dimension + part[None, :]
    right += columns.to(tl.int64)[None, :] * dimension + part[:, None]
    for _ in range(0, dimension, BLOCK):
        total = tl.dot(tl.load(left), tl.load(right), total)
        left += BLOCK
        right += BLOCK
    return total


@triton.jit
def _squared_distances(
    points, norms, rows, columns, num_targets, dimension, lowest, rounding,
    REFINE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `kernel.distances` before the root, with the norms of rows and columns."""
    remainders = points + num_targets * dimension.to(tl.int64)
    total = _product(points, points, rows, columns, tl.zeros([ROWS, COLUMNS], tl.float32), dimension, BLOCK)
    refine = REFINE == ALWAYS
    if REFINE == WHERE_NEAR:
        mean_norm = 0.5 * (tl.load(norms + rows)[:, None] + tl.load(norms + columns)[None, :])
        near = total > mean_norm * (1.0 - 0.5 * NEAR_POINTS)
        refine = tl.max(tl.max(near.to(tl.int32), 1), 0) > 0
    if refine:
        total = _product(points, remainders, rows, columns, total, dimension, BLOCK)
        total = _product(remainders, points, rows, columns, total, dimension, BLOCK)
        norms += num_targets
    row_norm, column_norm = tl.load(norms + rows)[:, None], tl.load(norms + columns)[None, :]
    squared = row_norm + column_norm - 2.0 * total
    squared = tl.where((row_norm == column_norm) & (squared <= rounding * row_norm), lowest, squared)
    return tl.where(squared < lowest, lowest, squared), row_norm, column_norm  # NaN stays NaN


@triton.jit
def _place(first_row, num_rows, num_targets, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a tile; where its sums per row `[T/COLUMNS, rows]` and per column `[rows/ROWS, T]` begin.

    The latter are single numbers, as a thread holds many columns.
    """
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows = first_row + row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    of_rows = column_tile.to(tl.int64) * num_rows + row_tile * ROWS
    of_columns = row_tile.to(tl.int64) * num_targets + column_tile * COLUMNS
    return rows, columns, of_rows, of_columns


@triton.jit
def extremes(
    points, norms, weight, units, totals, row_nearest, column_nearest, row_images, column_images,
    first_row, num_rows, padded_samples, num_targets, dimension, rounding,
    REFINE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weighted sum of distances per tile; the smallest distance per row and tile, and per column and tile.

    Args:
        points: `[2, T, D]` float16. norms: `[2, T]`. weight: `[T]`. units: `[2]`, of points and the least squared.
        totals: `[rows/ROWS, T/COLUMNS]`. row_nearest: `[T/COLUMNS, rows]`. column_nearest: `[rows/ROWS, T]`.
        row_images, column_images: what tiles add to the rows and columns of their mirror images, `[rows/ROWS, T]` and
            `[T/COLUMNS, rows]`.
        first_row, num_rows: of the strip. padded_samples: where x ends.
    """
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    diagonal = (first_row + row_tile * ROWS) // COLUMNS
    if column_tile < diagonal:
        return
    rows, columns, of_rows, of_columns = _place(first_row, num_rows, num_targets, ROWS, COLUMNS)
    squared, row_norm, column_norm = _squared_distances(
        points, norms, rows, columns, num_targets, dimension, tl.load(units + 1), rounding, REFINE, ROWS, COLUMNS, BLOCK
    )
    distance = tl.sqrt(squared) * tl.load(units)
    is_pair = (row_norm != float("inf")) & (column_norm != float("inf"))
    total = tl.sum(tl.sum(tl.where(is_pair, distance, 0.0) * tl.load(weight + columns)[None, :], 1), 0)
    distance = tl.where(rows[:, None] == columns[None, :], float("inf"), distance)
    of_row, of_column = tl.min(distance, 1), tl.min(distance, 0)
    in_rows, in_columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(row_nearest + of_rows + in_rows, of_row)
    tl.store(column_nearest + of_columns + in_columns, of_column)
    if (column_tile > diagonal) & (column_tile * COLUMNS < padded_samples):
        total *= 2.0  # x has weight 1
        tl.store(row_images + of_columns + in_columns, of_column)
        tl.store(column_images + of_rows + in_rows, of_row)
    tl.store(totals + row_tile * (num_targets // COLUMNS) + column_tile, total)


@triton.jit
def exponentials(
    points, norms, units, rates, row_nearest, column_nearest, row_sums, column_sums, row_images, column_images,
    first_row, num_rows, padded_samples, num_targets, dimension, rounding,
    OVER_TARGETS: tl.constexpr, OVER_X: tl.constexpr, TEMPERATURES: tl.constexpr, REFINE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of exp((m - d) / τ) of the softmaxes for all temperatures, per row and tile, and per column and tile.

    Args:
        rates: `[temperatures]`, 1/τ over log 2. row_nearest, column_nearest: m, `[T]`, finite.
        row_sums, column_sums, row_images, column_images: `[temperatures, ...]`, else as in `extremes`.
    """
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    diagonal = (first_row + row_tile * ROWS) // COLUMNS
    if column_tile < diagonal:
        return
    has_image = (column_tile > diagonal) & (column_tile * COLUMNS < padded_samples)
    rows, columns, of_rows, of_columns = _place(first_row, num_rows, num_targets, ROWS, COLUMNS)
    in_rows, in_columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    lowest, highest = _bounds(row_nearest, column_nearest, rows, columns)
    squared, _, _ = _squared_distances(
        points, norms, rows, columns, num_targets, dimension, tl.load(units + 1), rounding, REFINE, ROWS, COLUMNS, BLOCK
    )
    distance = tl.sqrt(squared) * tl.load(units)
    distance = tl.where(rows[:, None] == columns[None, :], float("inf"), distance)
    for t in tl.static_range(TEMPERATURES):
        rate = tl.load(rates + t)
        # m where it is needed: held all the time, it would take the registers of the distances
        row_r, row_c = tl.load(row_nearest + rows), tl.load(column_nearest + rows)
        if (highest - lowest) * rate < SAME_SHIFT:  # then one exponential serves all sums, by factors
            kernel = tl.exp2((row_r[:, None] - distance) * rate)
            of_row = tl.sum(kernel, 1)
            of_column = tl.sum(kernel * tl.exp2((lowest - row_r) * rate)[:, None], 0)
            if OVER_TARGETS:
                tl.store(row_sums + of_rows + in_rows, of_row)
                factor = tl.exp2((tl.load(row_nearest + columns) - lowest) * rate)
                tl.store(row_images + of_columns + in_columns, of_column * factor, mask=has_image)
            if OVER_X:
                factor = tl.exp2((tl.load(column_nearest + columns) - lowest) * rate)
                tl.store(column_sums + of_columns + in_columns, of_column * factor)
                tl.store(column_images + of_rows + in_rows, of_row * tl.exp2((row_c - row_r) * rate), mask=has_image)
        else:
            if OVER_TARGETS:
                of_row = tl.sum(tl.exp2((row_r[:, None] - distance) * rate), 1)
                tl.store(row_sums + of_rows + in_rows, of_row)
                if has_image:
                    of_column = tl.sum(tl.exp2((tl.load(row_nearest + columns)[None, :] - distance) * rate), 0)
                    tl.store(row_images + of_columns + in_columns, of_column)
            if OVER_X:
                of_column = tl.sum(tl.exp2((tl.load(column_nearest + columns)[None, :] - distance) * rate), 0)
                tl.store(column_sums + of_columns + in_columns, of_column)
                if has_image:
                    of_row = tl.sum(tl.exp2((row_c[:, None] - distance) * rate), 1)
                    tl.store(column_images + of_rows + in_rows, of_row)
        of_rows += (num_targets // COLUMNS).to(tl.int64) * num_rows
        of_columns += (num_rows // ROWS).to(tl.int64) * num_targets


@triton.jit
def _bounds(row_nearest, column_nearest, rows, columns):
    """Of m of the rows and columns of a tile, as rows and as columns."""
    row_r, row_c = tl.load(row_nearest + rows), tl.load(column_nearest + rows)
    column_r, column_c = tl.load(row_nearest + columns), tl.load(column_nearest + columns)
    lowest = tl.minimum(tl.min(tl.minimum(row_r, row_c), 0), tl.min(tl.minimum(column_r, column_c), 0))
    highest = tl.maximum(tl.max(tl.maximum(row_r, row_c), 0), tl.max(tl.maximum(column_r, column_c), 0))
    return lowest, highest


@triton.jit
def affinities(
    points, norms, weight, units, rates, row_potential, column_potential, floor, out, sums, near_targets,
    gain, first_row, num_rows, num_targets, dimension, rounding,
    TEMPERATURES: tl.constexpr, REFINE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A of a strip for all temperatures, times 2**gain, and its weighted sums per row and tile.

    Args:
        row_potential, column_potential: u, v, `[temperatures, T]`. floor: of A, `[temperatures, T]`, times 2**gain.
        out: `[temperatures, rows, T]` float16. sums: `[temperatures, T/COLUMNS, rows]`.
        near_targets: `[rows/ROWS, T/COLUMNS]`, 1 where the products of a tile need the remainders of the targets.
    """
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows, columns, of_rows, _ = _place(first_row, num_rows, num_targets, ROWS, COLUMNS)
    squared, row_norm, column_norm = _squared_distances(
        points, norms, rows, columns, num_targets, dimension, tl.load(units + 1), rounding, REFINE, ROWS, COLUMNS, BLOCK
    )
    is_self = rows[:, None] == columns[None, :]
    if REFINE == WHERE_NEAR:
        near = (squared < (row_norm + column_norm) * (0.5 * NEAR_TARGETS)) & ~is_self & (column_norm != float("inf"))
        tl.store(
            near_targets + row_tile * (num_targets // COLUMNS) + column_tile, tl.max(tl.max(near.to(tl.int32), 1), 0)
        )
    # Infinite in the padding, and as good as infinite from x to itself, where the lower bound holds
    distance = tl.where(is_self, 3e38, tl.sqrt(squared) * tl.load(units))
    left, right = _halves(distance, ROWS, COLUMNS)
    HALF: tl.constexpr = COLUMNS // 2
    in_rows, in_columns = tl.arange(0, ROWS), tl.arange(0, HALF)
    out += (row_tile * ROWS).to(tl.int64) * num_targets + column_tile * COLUMNS
    weight += column_tile * COLUMNS + in_columns
    column_potential += column_tile * COLUMNS + in_columns
    for t in tl.static_range(TEMPERATURES):
        rate, u = tl.load(rates + t), tl.load(row_potential + t * num_targets + rows)
        least = tl.load(floor + t * num_targets + rows)
        place = out + in_rows[:, None] * num_targets + in_columns[None, :]
        total = _affinity_of_half(left, u, column_potential, weight, least, rate, gain, place)
        place = out + HALF + in_rows[:, None] * num_targets + in_columns[None, :]
        total += _affinity_of_half(right, u, column_potential + HALF, weight + HALF, least, rate, gain, place)
        tl.store(sums + of_rows + in_rows, total)
        out += num_rows.to(tl.int64) * num_targets
        column_potential += num_targets
        of_rows += (num_targets // COLUMNS).to(tl.int64) * num_rows


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right columns of a tile: what is made of a whole one would not fit the registers."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _affinity_of_half(distance, u, v, weight, least, rate, gain, out):
    """Store A of half a tile, return its weighted sums over the columns."""
    affinity = tl.exp2((u[:, None] + tl.load(v)[None, :] - distance) * rate + gain)
    affinity = tl.where(affinity < least[:, None], least[:, None], affinity)
    affinity = tl.where(distance == float("inf"), 0.0, affinity).to(tl.float16)
    tl.store(out, affinity)
    return tl.sum(affinity.to(tl.float32) * tl.load(weight)[None, :], 1)


@triton.jit
def add_remainders(
    weights, remainders, near_targets, moment, num_rows, num_targets, dimension, first_tile, num_tiles,
    TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add A @ remainders of the targets of some tiles of columns, where `near_targets` asks for it.

    Args:
        weights: `[temperatures, rows, T]` float16. remainders: `[T, D]` float16. moment: `[temperatures, rows, D]`.
    """
    row_tile, part, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    near_targets += row_tile * (num_targets // COLUMNS) + first_tile
    number = tl.arange(0, TILES)
    if tl.sum(tl.load(near_targets + number, mask=number < num_tiles, other=0), 0) == 0:
        return
    rows, part = (t * num_rows + row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64), part * BLOCK + tl.arange(0, BLOCK)
    moment += rows[:, None] * dimension + part[None, :]
    total = tl.load(moment)
    for tile in range(0, num_tiles):
        if tl.load(near_targets + tile) != 0:
            for step in range(0, COLUMNS, BLOCK):
                columns = ((first_tile + tile) * COLUMNS + step + tl.arange(0, BLOCK)).to(tl.int64)
                total = tl.dot(
                    tl.load(weights + rows[:, None] * num_targets + columns[None, :]),
                    tl.load(remainders + columns[:, None] * dimension + part[None, :]),
                    total,
                )
    tl.store(moment, total)


@triton.jit
def forces(
    points, attract, repel, attract_sum, repel_sum, row_factor, out, squares,
    attraction, repulsion, moment_unit, first_row, num_samples, num_rows, num_targets, dimension, out_dimension,
    out_temperature_stride, CROSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """F (Eq. 10-11) of a strip and its squares, summed per tile, from ΣA y and ΣA of both sides.

    Args:
        attract, repel: ΣA y, `[temperatures, rows, D]`; the latter over `moment_unit`, `[]`.
        attract_sum, repel_sum: ΣA, `[temperatures, rows]`. row_factor: `[temperatures, T]`, from what these are to F.
        out: F, `[temperatures, N, D]`, D without padding. squares: `[temperatures, D/BLOCK, rows/ROWS]`.
    """
    row_tile, block, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    local_rows, part = row_tile * ROWS + tl.arange(0, ROWS), block * BLOCK + tl.arange(0, BLOCK)
    rows = (first_row + local_rows).to(tl.int64)
    place = rows[:, None] * dimension + part[None, :]
    remainders = points + num_targets * dimension.to(tl.int64)
    x = tl.load(points + place).to(tl.float32) + tl.load(remainders + place).to(tl.float32)
    place = (t * num_rows + local_rows).to(tl.int64)[:, None] * dimension + part[None, :]
    positive_sum = tl.load(attract_sum + t * num_rows + local_rows)[:, None]
    negative_sum = tl.load(repel_sum + t * num_rows + local_rows)[:, None]
    towards = attraction * (tl.load(attract + place) - positive_sum * x)  # ΣA+ (y+ - x)
    away = repulsion * (tl.load(repel + place) * tl.load(moment_unit) - negative_sum * x)  # ΣA- (y- - x)
    if CROSS:
        towards *= negative_sum
        away *= positive_sum
    force = (towards - away) * tl.load(row_factor + t * num_targets + rows)[:, None]
    is_entry = (rows < num_samples)[:, None] & (part < out_dimension)[None, :]
    force = tl.where(is_entry, force, 0.0)
    out += t.to(tl.int64) * out_temperature_stride + rows[:, None] * out_dimension + part[None, :]
    tl.store(out, force, mask=is_entry)
    squares += (t * tl.num_programs(1) + block) * tl.num_programs(0) + row_tile
    tl.store(squares, tl.sum(tl.sum(force * force, 1), 0))
