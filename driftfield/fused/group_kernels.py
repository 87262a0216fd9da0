"""The kernels of `groups`: one program per group, whose pairs of points stay in registers.

Products run on tensor cores in parts: a float32 number is the sum of two or three 16-bit ones, and the products of the
parts add up in float32. With three parts nothing of float32's precision is lost; the parts are taken here rather than
by `tl.dot(input_precision=...)` so that what is tested where there is no GPU is what runs on one.

The targets of a group are three blocks, [x, unconditional, positives], each padded to a power of two: X, U (0 where
there are none) and P. `rows` holds the Gram matrix of x with every block, [X, X], [X, U], [X, P]; `others` that of the
rest, [U, U], [P, U], [P, P]; both float32, padding 0. `norms` holds the squared norms, [X + U + P].
"""

import os

import triton
import triton.language as tl

FAR = tl.constexpr(2.0**120)  # distance to what is masked: times a rate it does not overflow
LARGEST = tl.constexpr(3e38)
SQUARED_DISTANCE_FLOOR = tl.constexpr(1e-8)  # driftfield.kernel's
HALF_RANGE = tl.constexpr(2.0**15)  # numbers up to 1 times this use all of float16's range
GRAM_RANGE = tl.constexpr(2.0**14)  # likewise, twice the number
EPSILON = tl.constexpr(2.0**-23)  # of float32
HUGE_UNIT = tl.constexpr(2.0**80)  # coordinates of points whose squares overflow are divided by it

# The environment, as driftfield.fused asks it: Triton before 3.4 has no knobs.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

DONE, CLOSE, OVERFLOWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # states of a group


@triton.jit
def _tile(
    base,
    row_stride,
    column_stride,
    start,
    NUM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Coordinates of all points of one set, float32, 0 where there is none, and where there are."""
    row = tl.arange(0, ROWS)[:, None]
    column = start + tl.arange(0, COLUMNS)[None, :]
    pointers = base + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    valid = (row < NUM) & (column < D)
    if NUM == ROWS and D % COLUMNS == 0:
        return tl.load(pointers).to(tl.float32), valid
    return tl.load(pointers, mask=valid, other=0.0).to(tl.float32), valid


@triton.jit
def _anchor(base, column_stride, start, D: tl.constexpr, COLUMNS: tl.constexpr):
    column = start + tl.arange(0, COLUMNS)
    return tl.load(base + column.to(tl.int64) * column_stride, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def _relative(points, valid, anchor, FULL: tl.constexpr):
    """Points relative to the first x, and 0 where there is none."""
    points -= anchor[None, :]
    if FULL:
        return points
    return tl.where(valid, points, 0.0)


@triton.jit
def _centred(
    x, unconditional, positives,
    x_row, x_column, u_row, u_column, p_row, p_column,
    start, inverse_unit,
    NUM_X: tl.constexpr, NUM_U: tl.constexpr, NUM_P: tl.constexpr, D: tl.constexpr,
    X: tl.constexpr, U: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some coordinates of all points of a group relative to their mean, 0 in padding, and of the first x as they are.

    First the first x is taken off: then equal points are exactly 0, and those far from the origin lose no digits.
    """
    anchor = _anchor(x, x_column, start, D, COLUMNS) * inverse_unit
    x_points, x_valid = _tile(x, x_row, x_column, start, NUM_X, D, X, COLUMNS)
    p_points, p_valid = _tile(positives, p_row, p_column, start, NUM_P, D, P, COLUMNS)
    x_points = _relative(x_points * inverse_unit, x_valid, anchor, NUM_X == X and D % COLUMNS == 0)
    p_points = _relative(p_points * inverse_unit, p_valid, anchor, NUM_P == P and D % COLUMNS == 0)
    if X == P:
        total = tl.sum(x_points + p_points, 0)
    else:
        total = tl.sum(x_points, 0) + tl.sum(p_points, 0)
    u_points = x_points  # not used
    if U > 0:
        u_points, u_valid = _tile(unconditional, u_row, u_column, start, NUM_U, D, U, COLUMNS)
        u_points = _relative(u_points * inverse_unit, u_valid, anchor, NUM_U == U and D % COLUMNS == 0)
        total += tl.sum(u_points, 0)
    mean = total * (1.0 / (NUM_X + NUM_U + NUM_P))
    if x.dtype.element_ty != tl.float32:  # a short mean keeps differences of short numbers short
        mean = mean.to(x.dtype.element_ty).to(tl.float32)
    x_points = _relative(x_points, x_valid, mean, NUM_X == X and D % COLUMNS == 0)
    p_points = _relative(p_points, p_valid, mean, NUM_P == P and D % COLUMNS == 0)
    if U > 0:
        u_points = _relative(u_points, u_valid, mean, NUM_U == U and D % COLUMNS == 0)
    return x_points, u_points, p_points, anchor


@triton.jit
def _parts(values, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    """16-bit numbers whose sum is `values` up to rounding: COUNT of them (the last is not used where COUNT is 2)."""
    high = values.to(DTYPE)
    rest = values - high.to(tl.float32)
    middle = rest.to(DTYPE)
    low = middle
    if COUNT == 3:
        low = (rest - middle.to(tl.float32)).to(DTYPE)
    return high, middle, low


@triton.jit
def _dot(left, right, total):
    if INTERPRETED:  # it takes the bits of bfloat16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total)


@triton.jit
def _add_product(left, right, total, PRODUCTS: tl.constexpr):
    """total + left @ right of `_parts`; the smallest products come first. 3 and 4 products: 2 parts; 6: 3 parts."""
    if PRODUCTS == 6:
        total = _dot(left[2], right[0], total)
        total = _dot(left[0], right[2], total)
    if PRODUCTS > 3:
        total = _dot(left[1], right[1], total)
    total = _dot(left[1], right[0], total)
    total = _dot(left[0], right[1], total)
    return _dot(left[0], right[0], total)


@triton.jit
def _transposed(parts):
    return tl.trans(parts[0]), tl.trans(parts[1]), tl.trans(parts[2])


@triton.jit
def _diagonal(matrix, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    return tl.sum(tl.where(index[:, None] == index[None, :], matrix, 0.0), 1)


@triton.jit
def _squared(gram, row_norms, column_norms, ROUNDING: tl.constexpr):
    """Squared distances; what is left of those of equal points is rounding (driftfield.kernel.distances)."""
    row_norms, column_norms = row_norms[:, None], column_norms[None, :]
    squared = row_norms + column_norms - 2.0 * gram
    coincide = (tl.abs(row_norms - column_norms) <= row_norms * (4.0 * EPSILON)) & (squared <= row_norms * ROUNDING)
    return tl.where(coincide, 0.0, squared)


@triton.jit
def _root(squared, unit):
    """Distances in the unit of the points as they were given; NaN stays NaN."""
    floor = (1.0 / unit) * (1.0 / unit) * SQUARED_DISTANCE_FLOOR
    return tl.sqrt(tl.maximum(squared, floor, propagate_nan=tl.PropagateNan.ALL)) * unit


@triton.jit
def _pair_valid(NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (tl.arange(0, ROWS) < NUM_ROWS)[:, None] & (tl.arange(0, COLUMNS) < NUM_COLUMNS)[None, :]


@triton.jit
def _not_self(SIZE: tl.constexpr):
    return tl.arange(0, SIZE)[:, None] != tl.arange(0, SIZE)[None, :]


@triton.jit
def _bounds(
    base,
    row_stride,
    column_stride,
    start,
    inverse_unit,
    low,
    high,
    NUM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    points, valid = _tile(base, row_stride, column_stride, start, NUM, D, ROWS, COLUMNS)
    points *= inverse_unit
    low = tl.minimum(low, tl.min(tl.where(valid, points, LARGEST), 0))
    high = tl.maximum(high, tl.max(tl.where(valid, points, -LARGEST), 0))
    return low, high


@triton.jit
def _store_block(base, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tl.store(base + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], block)


@triton.jit
def _load_block(base, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.load(base + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _weight(weight, sample_stride, NUM_U: tl.constexpr, U: tl.constexpr, WEIGHTED: tl.constexpr):
    """w of the unconditional samples, 0 in padding."""
    index = tl.arange(0, U)
    if WEIGHTED:
        return tl.load(weight + index.to(tl.int64) * sample_stride, mask=index < NUM_U, other=0.0).to(tl.float32)
    return tl.where(index < NUM_U, 1.0, 0.0)


@triton.jit
def gram(
    x, unconditional, positives, weight,
    rows, others, norms, units, sums, states,
    x_outer, x_inner, x_row, x_column,
    u_outer, u_inner, u_row, u_column,
    p_outer, p_inner, p_row, p_column,
    w_outer, w_inner, w_row, w_column,
    num_inner,
    NUM_X: tl.constexpr, NUM_U: tl.constexpr, NUM_P: tl.constexpr, D: tl.constexpr,
    X: tl.constexpr, U: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr, ROUNDING: tl.constexpr, INPUT_EPSILON: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Gram matrix of every group's centred points, and what the group adds to `scale_sums` [groups, 3].

    A second launch (AGAIN) serves the rare groups that the first one leaves: whose squares overflow, or whose points
    are so close that their bounds must tell whether they differ at all.
    """
    group = tl.program_id(0).to(tl.int64)
    inverse_unit = 1.0
    unit = 1.0
    if AGAIN:
        state = tl.load(states + group)
        if state == DONE:
            return
        unit = tl.where(state == OVERFLOWN, HUGE_UNIT, 1.0)
        inverse_unit = 1.0 / unit
    outer, inner = group // num_inner, group % num_inner
    x += outer * x_outer + inner * x_inner
    unconditional += outer * u_outer + inner * u_inner
    positives += outer * p_outer + inner * p_inner
    weight += outer * w_outer + inner * w_inner
    rows += group * (X * (X + U + P))
    others += group * (U * U + P * U + P * P)
    norms += group * (X + U + P)

    xx = tl.zeros([X, X], tl.float32)
    xp = tl.zeros([X, P], tl.float32)
    pp = tl.zeros([P, P], tl.float32)
    if U > 0:
        xu = tl.zeros([X, U], tl.float32)
        uu = tl.zeros([U, U], tl.float32)
        pu = tl.zeros([P, U], tl.float32)
    # float32: the differences of 16-bit numbers fit into two parts
    COUNT: tl.constexpr = 3 if x.dtype.element_ty == tl.float32 else 2
    PRODUCTS: tl.constexpr = 6 if x.dtype.element_ty == tl.float32 else 4
    magnitude = tl.zeros([COLUMNS], tl.float32)
    square = tl.zeros([COLUMNS], tl.float32)
    excess = tl.full([COLUMNS], -LARGEST, tl.float32)
    for start in range(0, D, COLUMNS):
        x_points, u_points, p_points, anchor = _centred(
            x, unconditional, positives, x_row, x_column, u_row, u_column, p_row, p_column, start, inverse_unit,
            NUM_X, NUM_U, NUM_P, D, X, U, P, COLUMNS,
        )  # fmt: skip
        x_parts = _parts(x_points, tl.bfloat16, COUNT)
        p_parts = _parts(p_points, tl.bfloat16, COUNT)
        p_transposed = _transposed(p_parts)
        xx = _add_product(x_parts, _transposed(x_parts), xx, PRODUCTS)
        xp = _add_product(x_parts, p_transposed, xp, PRODUCTS)
        pp = _add_product(p_parts, p_transposed, pp, PRODUCTS)
        if U > 0:
            u_parts = _parts(u_points, tl.bfloat16, COUNT)
            u_transposed = _transposed(u_parts)
            xu = _add_product(x_parts, u_transposed, xu, PRODUCTS)
            pu = _add_product(p_parts, u_transposed, pu, PRODUCTS)
            uu = _add_product(u_parts, u_transposed, uu, PRODUCTS)
        if AGAIN:
            low = tl.full([COLUMNS], LARGEST, tl.float32)
            high = tl.full([COLUMNS], -LARGEST, tl.float32)
            low, high = _bounds(x, x_row, x_column, start, inverse_unit, low, high, NUM_X, D, X, COLUMNS)
            low, high = _bounds(positives, p_row, p_column, start, inverse_unit, low, high, NUM_P, D, P, COLUMNS)
            if U > 0:
                low, high = _bounds(
                    unconditional, u_row, u_column, start, inverse_unit, low, high, NUM_U, D, U, COLUMNS
                )
            real = start + tl.arange(0, COLUMNS) < D
            largest = tl.where(real, tl.maximum(tl.abs(low), tl.abs(high)), 0.0)
            magnitude += largest
            excess = tl.maximum(excess, tl.where(real, high - low - largest * INPUT_EPSILON, -LARGEST))
        else:
            magnitude += tl.abs(anchor)
            square += anchor * anchor

    x_norms, p_norms = _diagonal(xx, X), _diagonal(pp, P)
    x_squared = tl.where(_not_self(X), _squared(xx, x_norms, x_norms, ROUNDING), 0.0)
    p_squared = _squared(xp, x_norms, p_norms, ROUNDING)
    x_valid, p_valid = _pair_valid(NUM_X, NUM_X, X, X), _pair_valid(NUM_X, NUM_P, X, P)
    total = tl.sum(tl.where(x_valid, _root(x_squared, unit), 0.0)) + tl.sum(
        tl.where(p_valid, _root(p_squared, unit), 0.0)
    )
    weights = NUM_X + NUM_P + 0.0
    widest = tl.maximum(tl.max(tl.where(x_valid, x_squared, 0.0)), tl.max(tl.where(p_valid, p_squared, 0.0)))
    trace = tl.sum(x_norms) + tl.sum(p_norms)
    tl.store(norms + tl.arange(0, X), x_norms)
    tl.store(norms + X + U + tl.arange(0, P), p_norms)
    _store_block(rows, xx, X, X)
    _store_block(rows + X * (X + U), xp, X, P)
    _store_block(others + U * U + P * U, pp, P, P)
    if U > 0:
        u_norms = _diagonal(uu, U)
        w = _weight(weight, w_row, NUM_U, U, WEIGHTED)
        u_squared = _squared(xu, x_norms, u_norms, ROUNDING)
        u_valid = _pair_valid(NUM_X, NUM_U, X, U)
        total += tl.sum(tl.where(u_valid, _root(u_squared, unit) * w[None, :], 0.0))
        weights += tl.sum(w)
        trace += tl.sum(u_norms)
        tl.store(norms + X + tl.arange(0, U), u_norms)
        _store_block(rows + X * X, xu, X, U)
        _store_block(others, uu, U, U)
        _store_block(others + U * U, pu, P, U)
    finite = trace < LARGEST  # NaN is not
    typical = tl.sum(magnitude) / D
    if AGAIN:
        varying = (tl.max(excess) > typical * (64.0 * EPSILON)) | ~finite
    else:
        # Two points this far apart differ in some coordinate by more than `count_varying` calls rounding. Where none
        # do, or where squares overflow, the second launch decides.
        doubt = 5.0 * (tl.sum(square) * (INPUT_EPSILON * INPUT_EPSILON) + typical * typical * (1e-10 * D))
        varying = finite & (widest > doubt)
        tl.store(states + group, tl.where(varying, DONE, tl.where(finite, CLOSE, OVERFLOWN)))
    tl.store(units + group, unit)
    sums += group * 3
    tl.store(sums, total)
    tl.store(sums + 1, weights * NUM_X)
    tl.store(sums + 2, varying.to(tl.float32))


@triton.jit
def _affinity(distance, row_term, column_term, rate, FLOOR: tl.constexpr, OVER: tl.constexpr):
    """A of one block (Eq. 12, Table 11); 0 where there is no pair."""
    exponent = distance * -rate
    if OVER == "y":
        exponent += row_term[:, None]
    elif OVER == "x":
        exponent += column_term[None, :]
    elif OVER == "xy":  # the geometric mean of both, without the underflow of either
        exponent += 0.5 * (row_term[:, None] + column_term[None, :])
    affinity = tl.maximum(tl.exp2(exponent), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(distance < FAR, affinity, 0.0)


@triton.jit
def _row_sum(distance, nearest, rate):
    return tl.sum(tl.exp2((nearest[:, None] - distance) * rate), 1)


@triton.jit
def _column_term(distance, rate):
    """-log2 of the sum over x of exp(-distance / τ)."""
    nearest = tl.min(distance, 0)
    return nearest * rate - tl.log2(tl.sum(tl.exp2((nearest[None, :] - distance) * rate), 0))


@triton.jit
def _terms(x_distance, u_distance, p_distance, rate, U: tl.constexpr, OVER: tl.constexpr):
    """-log2 of the denominators of the softmax over targets and of that over x, of each block."""
    nearest = tl.minimum(tl.min(x_distance, 1), tl.min(p_distance, 1))
    if U > 0:
        nearest = tl.minimum(nearest, tl.min(u_distance, 1))
    total = _row_sum(x_distance, nearest, rate) + _row_sum(p_distance, nearest, rate)
    if U > 0:
        total += _row_sum(u_distance, nearest, rate)
    of_u = nearest  # not used
    if U > 0:
        of_u = _column_term(u_distance, rate)
    return nearest * rate - tl.log2(total), _column_term(x_distance, rate), of_u, _column_term(p_distance, rate)


@triton.jit
def _store_terms(terms, values, X: tl.constexpr, U: tl.constexpr, P: tl.constexpr):
    tl.store(terms + tl.arange(0, X), values[0])
    tl.store(terms + X + tl.arange(0, X), values[1])
    if U > 0:
        tl.store(terms + 2 * X + tl.arange(0, U), values[2])
    tl.store(terms + 2 * X + U + tl.arange(0, P), values[3])


@triton.jit
def _load_terms(terms, X: tl.constexpr, U: tl.constexpr, P: tl.constexpr):
    of_row = tl.load(terms + tl.arange(0, X))
    of_u = of_row  # not used
    if U > 0:
        of_u = tl.load(terms + 2 * X + tl.arange(0, U))
    of_x, of_p = tl.load(terms + X + tl.arange(0, X)), tl.load(terms + 2 * X + U + tl.arange(0, P))
    return of_row, of_x, of_u, of_p


@triton.jit
def _distances(
    rows, norms, unit, scale,
    NUM_X: tl.constexpr, NUM_U: tl.constexpr, NUM_P: tl.constexpr,
    X: tl.constexpr, U: tl.constexpr, P: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Distances over `scale` of x to the three blocks (Eq. 22), FAR where there is no pair or x meets itself."""
    x_norms = tl.load(norms + tl.arange(0, X))
    p_norms = tl.load(norms + X + U + tl.arange(0, P))
    squared = _squared(_load_block(rows, X, X), x_norms, x_norms, ROUNDING)
    x_distance = tl.where(_pair_valid(NUM_X, NUM_X, X, X) & _not_self(X), _root(squared, unit) / scale, FAR)
    squared = _squared(_load_block(rows + X * (X + U), X, P), x_norms, p_norms, ROUNDING)
    p_distance = tl.where(_pair_valid(NUM_X, NUM_P, X, P), _root(squared, unit) / scale, FAR)
    u_distance = x_distance  # not used
    if U > 0:
        u_norms = tl.load(norms + X + tl.arange(0, U))
        squared = _squared(_load_block(rows + X * X, X, U), x_norms, u_norms, ROUNDING)
        u_distance = tl.where(_pair_valid(NUM_X, NUM_U, X, U), _root(squared, unit) / scale, FAR)
    return x_distance, u_distance, p_distance


@triton.jit
def _coefficients(
    x_distance, u_distance, p_distance, terms, w, rate,
    X: tl.constexpr, U: tl.constexpr, FLOOR: tl.constexpr, OVER: tl.constexpr,
    ATTRACTION: tl.constexpr, REPULSION: tl.constexpr,
):  # fmt: skip
    """What each target counts in F = Σ coefficient · target (Eq. 10-11), less the sum of all at the sample itself."""
    of_row, of_x, of_u, of_p = terms
    to_x = _affinity(x_distance, of_row, of_x, rate, FLOOR, OVER)
    to_p = _affinity(p_distance, of_row, of_p, rate, FLOOR, OVER)
    to_u = u_distance  # not used
    if U > 0:
        to_u = _affinity(u_distance, of_row, of_u, rate, FLOOR, OVER) * w[None, :]
    if OVER == "x":
        to_x *= -REPULSION
        to_p *= ATTRACTION
        if U > 0:
            to_u *= -REPULSION
    else:
        negative = tl.sum(to_x, 1) + FLOOR  # the sample's affinity to itself is the floor
        if U > 0:
            negative += tl.sum(to_u, 1)
        positive = tl.sum(to_p, 1) * -REPULSION
        to_p *= (negative * ATTRACTION)[:, None]
        to_x *= positive[:, None]
        if U > 0:
            to_u *= positive[:, None]
    total = tl.sum(to_x, 1) + tl.sum(to_p, 1)
    if U > 0:
        total += tl.sum(to_u, 1)
    return tl.where(_not_self(X), to_x, -total[:, None]), to_u, to_p


@triton.jit
def _combined(
    x_distance, u_distance, p_distance, terms, w, factors, rates,
    X: tl.constexpr, U: tl.constexpr, P: tl.constexpr, TEMPERATURES: tl.constexpr,
    FLOOR: tl.constexpr, OVER: tl.constexpr, ATTRACTION: tl.constexpr, REPULSION: tl.constexpr,
):  # fmt: skip
    """Σ_τ factor_τ · `_coefficients` (Eq. 26)."""
    to_x = tl.zeros([X, X], tl.float32)
    to_p = tl.zeros([X, P], tl.float32)
    to_u = to_x  # not used
    if U > 0:
        to_u = tl.zeros([X, U], tl.float32)
    for t in range(0, TEMPERATURES):
        factor = tl.load(factors + t)
        of_t = _load_terms(terms + t * (2 * X + U + P), X, U, P)
        more_x, more_u, more_p = _coefficients(
            x_distance, u_distance, p_distance, of_t, w, tl.load(rates + t),
            X, U, FLOOR, OVER, ATTRACTION, REPULSION,
        )  # fmt: skip
        to_x += factor * more_x
        to_p += factor * more_p
        if U > 0:
            to_u += factor * more_u
    return to_x, to_u, to_p


@triton.jit
def _largest(to_x, to_u, to_p, U: tl.constexpr):
    """The largest coefficient of each row; 1 where all are next to 0."""
    largest = tl.maximum(tl.max(tl.abs(to_x), 1), tl.max(tl.abs(to_p), 1))
    if U > 0:
        largest = tl.maximum(largest, tl.max(tl.abs(to_u), 1))
    return tl.where(largest > 1e-30, largest, 1.0)


@triton.jit
def _largest_norm(norms, X: tl.constexpr, U: tl.constexpr, P: tl.constexpr):
    """The largest squared norm of a group's points, which bounds the Gram matrix; 1 where all are next to 0."""
    largest = tl.max(tl.load(norms + tl.arange(0, X)))
    largest = tl.maximum(largest, tl.max(tl.load(norms + X + U + tl.arange(0, P))))
    if U > 0:
        largest = tl.maximum(largest, tl.max(tl.load(norms + X + tl.arange(0, U))))
    return tl.where(largest > 1e-30, largest, 1.0)


@triton.jit
def _gram_parts(rows, others, largest_norm, X: tl.constexpr, U: tl.constexpr, P: tl.constexpr):
    """The Gram matrix for `_square`. Each two different blocks meet once, so that they count twice."""
    to_range = (1.0 / largest_norm) * GRAM_RANGE
    xx = _parts(_load_block(rows, X, X) * to_range, tl.float16, 2)
    xp = _parts(_load_block(rows + X * (X + U), X, P) * (2.0 * to_range), tl.float16, 2)
    pp = _parts(_load_block(others + U * U + P * U, P, P) * to_range, tl.float16, 2)
    xu, uu, pu = xx, xx, xx  # not used
    if U > 0:
        xu = _parts(_load_block(rows + X * X, X, U) * (2.0 * to_range), tl.float16, 2)
        uu = _parts(_load_block(others, U, U) * to_range, tl.float16, 2)
        pu = _parts(_load_block(others + U * U, P, U) * (2.0 * to_range), tl.float16, 2)
    return xx, xp, pp, xu, uu, pu


@triton.jit
def _square(to_x, to_u, to_p, gram_parts, largest_norm, factor, X: tl.constexpr, U: tl.constexpr, P: tl.constexpr):
    """Σ|F|² over the samples of a group: cᵀ G c, in coordinates multiplied by `factor`."""
    xx, xp, pp, xu, uu, pu = gram_parts
    largest = _largest(to_x, to_u, to_p, U)
    share = ((1.0 / largest) * HALF_RANGE)[:, None]
    x_parts = _parts(to_x * share, tl.float16, 2)
    p_parts = _parts(to_p * share, tl.float16, 2)
    at_x = _add_product(x_parts, xx, tl.zeros([X, X], tl.float32), 3)
    squares = tl.sum(at_x * to_x, 1)
    at_p = _add_product(x_parts, xp, tl.zeros([X, P], tl.float32), 3)
    at_p = _add_product(p_parts, pp, at_p, 3)
    squares += tl.sum(at_p * to_p, 1)
    if U > 0:
        u_parts = _parts(to_u * share, tl.float16, 2)
        at_u = _add_product(x_parts, xu, tl.zeros([X, U], tl.float32), 3)
        at_u = _add_product(p_parts, pu, at_u, 3)
        at_u = _add_product(u_parts, uu, at_u, 3)
        squares += tl.sum(at_u * to_u, 1)
    back = largest_norm * (1.0 / (GRAM_RANGE * HALF_RANGE)) * factor * factor  # in this order within float32's range
    total = tl.sum(squares * (largest * back))
    return tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def forces(
    rows, others, norms, units, weight, scales, terms, squares,
    w_outer, w_inner, w_row, w_column, num_inner,
    NUM_X: tl.constexpr, NUM_U: tl.constexpr, NUM_P: tl.constexpr,
    X: tl.constexpr, U: tl.constexpr, P: tl.constexpr,
    WEIGHTED: tl.constexpr, ROUNDING: tl.constexpr, TEMPERATURES: tl.constexpr,
    FLOOR: tl.constexpr, OVER: tl.constexpr, ATTRACTION: tl.constexpr, REPULSION: tl.constexpr,
):  # fmt: skip
    """ΣF² over the samples of every group, [groups, temperatures], and the softmax terms for the kernels to come.

    |F|² = cᵀ G c: the points are not read. `scales` holds what distances and coordinates are divided by, then log2(e)/τ
    of every temperature.
    """
    # One program for each temperature of a group: one for all of them would need more registers than there are.
    group = tl.program_id(0).to(tl.int64) // TEMPERATURES
    t = tl.program_id(0) % TEMPERATURES
    rate = tl.load(scales + 2 + t)
    unit = tl.load(units + group)
    scale, coordinate_scale = tl.load(scales), tl.load(scales + 1)
    rows += group * (X * (X + U + P))
    others += group * (U * U + P * U + P * P)
    norms += group * (X + U + P)
    terms += group * (TEMPERATURES * (2 * X + U + P))
    weight += (group // num_inner) * w_outer + (group % num_inner) * w_inner
    x_distance, u_distance, p_distance = _distances(
        rows, norms, unit, scale, NUM_X, NUM_U, NUM_P, X, U, P, ROUNDING
    )  # fmt: skip
    w = unit  # not used
    if U > 0:
        w = _weight(weight, w_row, NUM_U, U, WEIGHTED)
    largest_norm = _largest_norm(norms, X, U, P)
    factor = unit / coordinate_scale
    of_t = _terms(x_distance, u_distance, p_distance, rate, U, OVER)
    _store_terms(terms + t * (2 * X + U + P), of_t, X, U, P)
    to_x, to_u, to_p = _coefficients(
        x_distance, u_distance, p_distance, of_t, w, rate,
        X, U, FLOOR, OVER, ATTRACTION, REPULSION,
    )  # fmt: skip
    gram_parts = _gram_parts(rows, others, largest_norm, X, U, P)
    square = _square(to_x, to_u, to_p, gram_parts, largest_norm, factor, X, U, P)
    tl.store(squares + group * TEMPERATURES + t, square)


@triton.jit
def losses(
    rows, others, norms, units, weight, scales, terms, factors, squares,
    w_outer, w_inner, w_row, w_column, num_inner,
    NUM_X: tl.constexpr, NUM_U: tl.constexpr, NUM_P: tl.constexpr,
    X: tl.constexpr, U: tl.constexpr, P: tl.constexpr,
    WEIGHTED: tl.constexpr, ROUNDING: tl.constexpr, TEMPERATURES: tl.constexpr,
    FLOOR: tl.constexpr, OVER: tl.constexpr, ATTRACTION: tl.constexpr, REPULSION: tl.constexpr,
):  # fmt: skip
    """Σ|V|² over the samples of every group [groups], V = Σ_τ factor_τ F_τ (Eq. 26)."""
    group = tl.program_id(0).to(tl.int64)
    unit = tl.load(units + group)
    scale, coordinate_scale = tl.load(scales), tl.load(scales + 1)
    rows += group * (X * (X + U + P))
    others += group * (U * U + P * U + P * P)
    norms += group * (X + U + P)
    terms += group * (TEMPERATURES * (2 * X + U + P))
    weight += (group // num_inner) * w_outer + (group % num_inner) * w_inner
    x_distance, u_distance, p_distance = _distances(
        rows, norms, unit, scale, NUM_X, NUM_U, NUM_P, X, U, P, ROUNDING
    )  # fmt: skip
    w = unit  # not used
    if U > 0:
        w = _weight(weight, w_row, NUM_U, U, WEIGHTED)
    largest_norm = _largest_norm(norms, X, U, P)
    gram_parts = _gram_parts(rows, others, largest_norm, X, U, P)
    factor = unit / coordinate_scale
    to_x, to_u, to_p = _combined(
        x_distance, u_distance, p_distance, terms, w, factors, scales + 2,
        X, U, P, TEMPERATURES, FLOOR, OVER, ATTRACTION, REPULSION,
    )  # fmt: skip
    tl.store(squares + group, _square(to_x, to_u, to_p, gram_parts, largest_norm, factor, X, U, P))


@triton.jit
def drift(
    x, unconditional, positives, weight, gradient,
    rows, norms, units, scales, terms, factors, upstream,
    x_outer, x_inner, x_row, x_column,
    u_outer, u_inner, u_row, u_column,
    p_outer, p_inner, p_row, p_column,
    w_outer, w_inner, w_row, w_column,
    g_outer, g_inner, g_row, g_column,
    num_inner,
    NUM_X: tl.constexpr, NUM_U: tl.constexpr, NUM_P: tl.constexpr, D: tl.constexpr,
    X: tl.constexpr, U: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr, ROUNDING: tl.constexpr, TEMPERATURES: tl.constexpr,
    FLOOR: tl.constexpr, OVER: tl.constexpr, ATTRACTION: tl.constexpr, REPULSION: tl.constexpr,
):  # fmt: skip
    """Gradient of the loss to x: -2 V / (N D c) times what comes from above, V = Σ_τ factor_τ F_τ (Eq. 6, 26)."""
    group = tl.program_id(0).to(tl.int64)
    unit = tl.load(units + group)
    scale, coordinate_scale = tl.load(scales), tl.load(scales + 1)
    outer, inner = group // num_inner, group % num_inner
    x += outer * x_outer + inner * x_inner
    unconditional += outer * u_outer + inner * u_inner
    positives += outer * p_outer + inner * p_inner
    gradient += outer * g_outer + inner * g_inner
    weight += outer * w_outer + inner * w_inner
    rows += group * (X * (X + U + P))
    norms += group * (X + U + P)
    terms += group * (TEMPERATURES * (2 * X + U + P))

    x_distance, u_distance, p_distance = _distances(
        rows, norms, unit, scale, NUM_X, NUM_U, NUM_P, X, U, P, ROUNDING
    )  # fmt: skip
    w = unit  # not used
    if U > 0:
        w = _weight(weight, w_row, NUM_U, U, WEIGHTED)
    to_x, to_u, to_p = _combined(
        x_distance, u_distance, p_distance, terms, w, factors, scales + 2,
        X, U, P, TEMPERATURES, FLOOR, OVER, ATTRACTION, REPULSION,
    )  # fmt: skip
    largest = _largest(to_x, to_u, to_p, U)
    share = ((1.0 / largest) * HALF_RANGE)[:, None]
    to_x = _parts(to_x * share, tl.float16, 2)
    to_p = _parts(to_p * share, tl.float16, 2)
    if U > 0:
        to_u = _parts(to_u * share, tl.float16, 2)

    bound = tl.sqrt(_largest_norm(norms, X, U, P))  # of any coordinate
    to_range = (1.0 / bound) * HALF_RANGE
    back = largest * (bound * (1.0 / (HALF_RANGE * HALF_RANGE))) * (unit / coordinate_scale)
    back *= tl.load(upstream + group) * (-2.0 / (NUM_X * D)) / coordinate_scale
    row = tl.arange(0, X)[:, None]
    for start in range(0, D, COLUMNS):
        x_points, u_points, p_points, _ = _centred(
            x, unconditional, positives, x_row, x_column, u_row, u_column, p_row, p_column, start, 1.0 / unit,
            NUM_X, NUM_U, NUM_P, D, X, U, P, COLUMNS,
        )  # fmt: skip
        total = tl.zeros([X, COLUMNS], tl.float32)
        total = _add_product(to_x, _parts(x_points * to_range, tl.float16, 2), total, 3)
        total = _add_product(to_p, _parts(p_points * to_range, tl.float16, 2), total, 3)
        if U > 0:
            total = _add_product(to_u, _parts(u_points * to_range, tl.float16, 2), total, 3)
        column = start + tl.arange(0, COLUMNS)[None, :]
        pointers = gradient + row.to(tl.int64) * g_row + column.to(tl.int64) * g_column
        tl.store(pointers, total * back[:, None], mask=(row < NUM_X) & (column < D))
