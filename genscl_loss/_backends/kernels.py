"""The kernels of `fused.py`, which says what they compute together.

Logits are in base 2, s_ij = slope * (row_i . column_j), and exist one tile at a time, in registers. Rows and columns
come from `split_rows`: fp16, contiguous, padded with zeros, in one or two planes (TERMS). Two planes hold x = high +
low, and a product is high.high + high.low + low.high: what float32 gives, at three times the price of fp16.

A program owns BLOCK_M rows and walks over columns, BLOCK_N at a time. No two programs add to the same number, so
results do not vary from run to run. Tiles that hold self terms or padding are left out of the main loop, which is
therefore free of masks; a second loop over narrower tiles, BLOCK_EDGE columns each, takes care of them.

FIXED takes exponentials as they are, which suits rows of unit length unless the temperature is tiny. Otherwise each row
keeps its running maximum. Where only the device knows the temperature both variants are launched (CHECK), and the one
that does not apply returns at once.

WEIGHTED adds the logarithm of a column's weight to its logits, minus infinity for columns that are not there; never
with FIXED, since weights have any size.
"""

import triton
import triton.language as tl

from genscl_loss._kernels import exponent_of, inverse_length, number, power_of_two

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Entries are at most one: times 2^6 they are far above the small end of fp16, where digits get lost, and a product
# of two rows is still far below the large end of float32.
STRETCH = tl.constexpr(64.0)

# Base-2 exponents, positive or negative, that FIXED takes. Sums of 2^27 such terms are still numbers, and the smallest
# term keeps 24 bits above the subnormal numbers, which are taken for zero.
LARGEST = tl.constexpr(100.0)
SLACK = tl.constexpr(1.002)  # rows of unit length may be a little longer in fp16, and logits that much larger


@triton.jit
def _fits(scale):
    """Whether FIXED applies: no base-2 logit of rows of unit length is larger."""
    return scale * (LOG2E * SLACK) <= LARGEST


# ---- Rows and columns as the tensor cores take them ----


@triton.jit(do_not_specialize=["num_rows"])
def split_rows(
    X,
    OUT,
    FACTOR,
    num_rows,
    num_features,
    stride_row,
    stride_feature,
    plane,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Float32 rows of any strides to TERMS planes of fp16 rows, (padded rows, WIDTH), times STRETCH.

    NORMALIZE makes them of unit length, by factors that are kept: those of `genscl_loss._unit.inverse_lengths`.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    features = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    row_pointers = X + rows.to(tl.int64)[:, None] * stride_row
    inside = (rows < num_rows)[:, None] & (features < num_features)[None, :]
    x = tl.load(row_pointers + features.to(tl.int64)[None, :] * stride_feature, mask=inside, other=0.0)
    if NORMALIZE:
        squares = tl.zeros((BLOCK_ROWS,), tl.float32)
        for first in range(0, num_features, BLOCK_FEATURES):
            some = first + tl.arange(0, BLOCK_FEATURES)
            is_there = (rows < num_rows)[:, None] & (some < num_features)[None, :]
            part = tl.load(row_pointers + some.to(tl.int64)[None, :] * stride_feature, mask=is_there, other=0.0)
            squares += tl.sum(part * part, 1)
        factor = inverse_length(squares)
        if tl.program_id(1) == 0:
            tl.store(FACTOR + rows, factor, mask=rows < num_rows)
        x *= factor.to(tl.float32)[:, None]
    x *= STRETCH
    x += x - x  # infinity to NaN: a logit of minus infinity would pass for a contrast that is merely far away
    high = x.to(tl.float16)
    out = OUT + rows.to(tl.int64)[:, None] * WIDTH + features[None, :]
    tl.store(out, high)
    if TERMS == 2:
        tl.store(out + plane, (x - high.to(tl.float32)).to(tl.float16))


@triton.jit
def _pointers(X, first, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr):
    """To the first BLOCK_K features of BLOCK rows."""
    start = X + first.to(tl.int64) * WIDTH
    return start + tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def _load(pointers, plane, TERMS: tl.constexpr):
    """High and low part; the high part twice if there is no low one."""
    high = tl.load(pointers)
    if TERMS == 2:
        return high, tl.load(pointers + plane)
    else:
        return high, high


@triton.jit
def _add_product(total, a, a_low, b, b_low, TERMS: tl.constexpr):
    """Total + a @ b, small terms first."""
    if TERMS == 2:
        total = tl.dot(a_low, b, total)
        total = tl.dot(a, b_low, total)
    return tl.dot(a, b, total)


@triton.jit
def _logits(
    rows,
    rows_low,
    row_pointers,
    col_pointers,
    out_pointers,
    row_plane,
    col_plane,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
):
    """A tile of products, still to be multiplied by the slope, and its columns as the gradient wants them.

    Rows of more than BLOCK_K features cannot be held: they, and the columns, are then read piece by piece, and what the
    gradient wants, a range of features of the columns, is at `out_pointers`.
    """
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WIDTH == BLOCK_K:
        cols, cols_low = _load(col_pointers, col_plane, TERMS)
        tile = _add_product(tile, rows, rows_low, tl.trans(cols), tl.trans(cols_low), TERMS)
    else:
        for feature in range(0, WIDTH, BLOCK_K):
            part, part_low = _load(row_pointers + feature, row_plane, TERMS)
            other, other_low = _load(col_pointers + feature, col_plane, TERMS)
            tile = _add_product(tile, part, part_low, tl.trans(other), tl.trans(other_low), TERMS)
        cols, cols_low = _load(out_pointers, col_plane, TERMS)
    return tile, cols, cols_low


# ---- The walk over the columns ----


@triton.jit
def _split(num_cols, cols_per_split):
    """Columns of this program: a share of them if there are too few rows to keep the device busy."""
    start = tl.program_id(1) * cols_per_split
    return start, tl.minimum(cols_per_split, num_cols - start)


@triton.jit
def _edges(own, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SELF: tl.constexpr):
    """Number of tiles without padding, and which of them hold self terms: the first, and how many.

    The walk is over `count` columns, and the self term of the first row is in column `own`.
    """
    full = count // BLOCK_N
    if HAS_SELF:
        first = tl.minimum(tl.maximum(own, 0) // BLOCK_N, full)
        stop = tl.minimum(tl.cdiv(tl.maximum(own + BLOCK_M, 0), BLOCK_N), full)
        return full, first, stop - first
    else:
        return full, full, 0


@triton.jit
def _plain_tile(t, first_own, num_own, BLOCK_N: tl.constexpr):
    """First column of the t-th tile without masks."""
    return tl.where(t < first_own, t, t + num_own) * BLOCK_N


@triton.jit
def _edge_tile(t, full, first_own, num_own, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr):
    """First column of the t-th narrow tile: those with self terms first, those with padding behind them."""
    with_self = num_own * (BLOCK_N // BLOCK_EDGE)
    return tl.where(t < with_self, first_own * BLOCK_N + t * BLOCK_EDGE, full * BLOCK_N + (t - with_self) * BLOCK_EDGE)


@triton.jit
def _num_edge_tiles(count, full, num_own, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr):
    return num_own * (BLOCK_N // BLOCK_EDGE) + tl.cdiv(count - full * BLOCK_N, BLOCK_EDGE)


@triton.jit
def _is_contrast(col, own, count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SELF: tl.constexpr):
    """Which entries of the tile from column `col` on are neither self terms nor padding."""
    index = col + tl.arange(0, BLOCK_N)[None, :]
    inside = index < count
    if HAS_SELF:
        inside = inside & (index != own + tl.arange(0, BLOCK_M)[:, None])
    return inside


# ---- Log-sum-exp ----


@triton.jit
def _add_exp(
    largest, total, tile, slope, inside, LOG_WEIGHTS, col,
    BLOCK_N: tl.constexpr, FIXED: tl.constexpr, MASK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Add the exponentials of a tile to `total`, the sum of each row over 2^largest; largest is zero where FIXED."""
    if FIXED:
        terms = tl.exp2(tile * slope)
        if MASK:
            terms = tl.where(inside, terms, 0.0)
        return largest, total + tl.sum(terms, 1)
    else:
        tile *= slope
        if WEIGHTED:
            tile += tl.load(LOG_WEIGHTS + col + tl.arange(0, BLOCK_N))[None, :]
        if MASK:
            tile = tl.where(inside, tile, -float("inf"))
        new = tl.maximum(largest, tl.max(tile, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)  # nothing yet to shift by
        return new, total * tl.exp2(largest - safe) + tl.sum(tl.exp2(tile - safe[:, None]), 1)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "self_offset"])
def row_lse(
    ROWS,
    COLS,
    LSE,
    SUMS,
    LOG_WEIGHTS,
    SCALE,
    num_rows,
    num_cols,
    self_offset,
    cols_per_split,
    row_plane,
    col_plane,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_SELF: tl.constexpr,
    FIXED: tl.constexpr,
    CHECK: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    PARTIAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Log-sum-exp of each row, unless PARTIAL, and what it was made of: `largest` and `total` of each split."""
    scale = number(SCALE, SCALE_ON_DEVICE)
    if CHECK:
        if _fits(scale) != FIXED:
            return
    slope = scale * (LOG2E / (STRETCH * STRETCH))
    first_row = tl.program_id(0) * BLOCK_M
    start, count = _split(num_cols, cols_per_split)
    own = first_row + self_offset - start
    row_pointers = _pointers(ROWS, first_row, BLOCK_M, BLOCK_K, WIDTH)
    rows, rows_low = _load(row_pointers, row_plane, TERMS)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = total + (0.0 if FIXED else -float("inf"))
    full, first_own, num_own = _edges(own, count, BLOCK_M, BLOCK_N, HAS_SELF)
    LOG_WEIGHTS += start

    pointers = _pointers(COLS, start, BLOCK_N, BLOCK_K, WIDTH)
    for t in range(0, full - num_own):
        col = _plain_tile(t, first_own, num_own, BLOCK_N)
        here = pointers + col.to(tl.int64) * WIDTH
        tile, _, _ = _logits(
            rows, rows_low, row_pointers, here, here, row_plane, col_plane, BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, TERMS
        )
        largest, total = _add_exp(largest, total, tile, slope, None, LOG_WEIGHTS, col, BLOCK_N, FIXED, False, WEIGHTED)

    pointers = _pointers(COLS, start, BLOCK_EDGE, BLOCK_K, WIDTH)
    for t in range(0, _num_edge_tiles(count, full, num_own, BLOCK_N, BLOCK_EDGE)):
        col = _edge_tile(t, full, first_own, num_own, BLOCK_N, BLOCK_EDGE)
        here = pointers + col.to(tl.int64) * WIDTH
        tile, _, _ = _logits(
            rows, rows_low, row_pointers, here, here, row_plane, col_plane, BLOCK_M, BLOCK_EDGE, BLOCK_K, WIDTH, TERMS
        )
        inside = _is_contrast(col, own, count, BLOCK_M, BLOCK_EDGE, HAS_SELF)
        largest, total = _add_exp(
            largest, total, tile, slope, inside, LOG_WEIGHTS, col, BLOCK_EDGE, FIXED, True, WEIGHTED
        )

    if WEIGHTED and not PARTIAL:
        largest = tl.where(largest == -float("inf"), 0.0, largest)  # of a row that has no contrast
    index = first_row + tl.arange(0, BLOCK_M)
    sums = SUMS + tl.program_id(1).to(tl.int64) * 2 * num_rows + index
    tl.store(sums, largest, mask=index < num_rows)
    tl.store(sums + num_rows, total, mask=index < num_rows)
    if not PARTIAL:
        tl.store(LSE + index, (largest + tl.log2(total)) * LN2, mask=index < num_rows)


@triton.jit
def merged_sums(PARTS, rows, inside, num_rows, num_parts, BLOCK: tl.constexpr):
    """`largest` and `total` of all columns, from those that `row_lse` found in each split of them."""
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for split in range(num_parts):
        part = tl.load(PARTS + split * 2 * num_rows + rows, mask=inside, other=0.0)
        largest = tl.maximum(largest, part)
    safe = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(num_parts):
        part = PARTS + split * 2 * num_rows + rows
        lowered = tl.load(part, mask=inside, other=0.0) - safe
        total += tl.load(part + num_rows, mask=inside, other=0.0) * tl.exp2(lowered)
    return safe, total


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def merge_lse(PARTS, LSE, SUMS, num_rows, num_parts, BLOCK: tl.constexpr):
    """What `row_lse` would have found in one go, from what it found in each split of the columns."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    largest, total = merged_sums(PARTS, rows, inside, num_rows, num_parts, BLOCK)
    tl.store(SUMS + rows, largest, mask=inside)
    tl.store(SUMS + num_rows + rows, total, mask=inside)
    tl.store(LSE + rows, (largest + tl.log2(total)) * LN2, mask=inside)


# ---- Gradient ----


@triton.jit(do_not_specialize=["num_rows"])
def gradient_weights(GRAD, SUMS, LARGEST_GRAD, OUT, num_rows, padded, BLOCK: tl.constexpr):
    """Upstream gradient of each row over the sum of its exponentials, and the exponent that these were lowered by.

    Their product with an exponential is softmax times upstream gradient. Not by way of the log-sum-exp, whose rounding
    is not small where logits are large. All weights are multiplied by a power of two that brings such products to the
    middle of fp16. For padding, weights are zero and exponentials vanish.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    largest = tl.load(SUMS + rows, mask=inside, other=float("inf"))
    total = tl.load(SUMS + num_rows + rows, mask=inside, other=0.0)
    weight = tl.load(GRAD + rows, mask=inside, other=0.0) * power_of_two(12 - exponent_of(LARGEST_GRAD))
    tl.store(OUT + rows, tl.where(total == 0.0, 0.0, weight / total))
    tl.store(OUT + padded + rows, largest)


@triton.jit
def _softmax_weights(
    tile, slope, row_weight, row_largest, row_log, COL_WEIGHTS, LOG_WEIGHTS, padded, col,
    BLOCK_N: tl.constexpr, ROW_TERM: tl.constexpr, COL_TERM: tl.constexpr, FIXED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """What each column of the tile counts in the gradient of each row, from the rows' softmax and the columns' own."""
    index = col + tl.arange(0, BLOCK_N)
    if COL_TERM:
        col_weight = tl.load(COL_WEIGHTS + index)[None, :]
    if FIXED:
        terms = tl.exp2(tile * slope)
        if ROW_TERM and COL_TERM:
            return terms * (row_weight + col_weight)
        elif ROW_TERM:
            return terms * row_weight
        else:
            return terms * col_weight
    else:
        tile *= slope
        as_anchor = tile
        as_contrast = tile
        if WEIGHTED and ROW_TERM:
            as_anchor += tl.load(LOG_WEIGHTS + index)[None, :]
        if WEIGHTED and COL_TERM:
            as_contrast += row_log
        if ROW_TERM and COL_TERM:
            col_largest = tl.load(COL_WEIGHTS + padded + index)[None, :]
            return row_weight * tl.exp2(as_anchor - row_largest) + col_weight * tl.exp2(as_contrast - col_largest)
        elif ROW_TERM:
            return row_weight * tl.exp2(as_anchor - row_largest)
        else:
            return col_weight * tl.exp2(as_contrast - tl.load(COL_WEIGHTS + padded + index)[None, :])


@triton.jit
def _add_weighted(total, weights, cols, cols_low, TERMS: tl.constexpr):
    """Total + weights @ columns, with the weights split as the columns are."""
    high = weights.to(tl.float16)
    if TERMS == 2:
        low = (weights - high.to(tl.float32)).to(tl.float16)
    else:
        low = high
    return _add_product(total, high, low, cols, cols_low, TERMS)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "self_offset"])
def row_lse_grad(
    ROWS,
    COLS,
    ROW_WEIGHTS,
    COL_WEIGHTS,
    ROW_LOG_WEIGHTS,
    LOG_WEIGHTS,
    OUT,
    SCALE,
    LARGEST_GRAD,
    num_rows,
    num_cols,
    num_features,
    self_offset,
    cols_per_split,
    row_plane,
    col_plane,
    padded_rows,
    padded_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_SELF: tl.constexpr,
    ROW_TERM: tl.constexpr,
    COL_TERM: tl.constexpr,
    FIXED: tl.constexpr,
    CHECK: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Gradient with respect to the rows, BLOCK_OUT features of it: scale * sum_j (softmax weights)_ij column_j.

    ROW_TERM counts the log-sum-exps of the rows, COL_TERM those of the columns: both in a self-contrast.
    """
    scale = number(SCALE, SCALE_ON_DEVICE)
    if CHECK:
        if _fits(scale) != FIXED:
            return
    slope = scale * (LOG2E / (STRETCH * STRETCH))
    first_row = tl.program_id(0) * BLOCK_M
    first_feature = tl.program_id(2) * BLOCK_OUT
    start, count = _split(num_cols, cols_per_split)
    own = first_row + self_offset - start
    row_pointers = _pointers(ROWS, first_row, BLOCK_M, BLOCK_K, WIDTH)
    rows, rows_low = _load(row_pointers, row_plane, TERMS)
    index = first_row + tl.arange(0, BLOCK_M)
    if ROW_TERM:
        row_weight = tl.load(ROW_WEIGHTS + index)[:, None]
        row_largest = tl.load(ROW_WEIGHTS + padded_rows + index)[:, None]
    else:
        row_weight = None
        row_largest = None
    if WEIGHTED and COL_TERM:
        row_log = tl.load(ROW_LOG_WEIGHTS + index)[:, None]
    else:
        row_log = None
    COL_WEIGHTS += start
    LOG_WEIGHTS += start
    total = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    full, first_own, num_own = _edges(own, count, BLOCK_M, BLOCK_N, HAS_SELF)

    pointers = _pointers(COLS, start, BLOCK_N, BLOCK_K, WIDTH)
    out_pointers = _pointers(COLS + first_feature, start, BLOCK_N, BLOCK_OUT, WIDTH)
    for t in range(0, full - num_own):
        col = _plain_tile(t, first_own, num_own, BLOCK_N)
        offset = col.to(tl.int64) * WIDTH
        tile, cols, cols_low = _logits(
            rows, rows_low, row_pointers, pointers + offset, out_pointers + offset, row_plane, col_plane,
            BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, TERMS,
        )  # fmt: skip
        weights = _softmax_weights(
            tile, slope, row_weight, row_largest, row_log, COL_WEIGHTS, LOG_WEIGHTS, padded_cols, col,
            BLOCK_N, ROW_TERM, COL_TERM, FIXED, WEIGHTED,
        )  # fmt: skip
        total = _add_weighted(total, weights, cols, cols_low, TERMS)

    pointers = _pointers(COLS, start, BLOCK_EDGE, BLOCK_K, WIDTH)
    out_pointers = _pointers(COLS + first_feature, start, BLOCK_EDGE, BLOCK_OUT, WIDTH)
    for t in range(0, _num_edge_tiles(count, full, num_own, BLOCK_N, BLOCK_EDGE)):
        col = _edge_tile(t, full, first_own, num_own, BLOCK_N, BLOCK_EDGE)
        offset = col.to(tl.int64) * WIDTH
        tile, cols, cols_low = _logits(
            rows, rows_low, row_pointers, pointers + offset, out_pointers + offset, row_plane, col_plane,
            BLOCK_M, BLOCK_EDGE, BLOCK_K, WIDTH, TERMS,
        )  # fmt: skip
        weights = _softmax_weights(
            tile, slope, row_weight, row_largest, row_log, COL_WEIGHTS, LOG_WEIGHTS, padded_cols, col,
            BLOCK_EDGE, ROW_TERM, COL_TERM, FIXED, WEIGHTED,
        )  # fmt: skip
        weights = tl.where(_is_contrast(col, own, count, BLOCK_M, BLOCK_EDGE, HAS_SELF), weights, 0.0)
        total = _add_weighted(total, weights, cols, cols_low, TERMS)

    total *= scale / STRETCH * power_of_two(exponent_of(LARGEST_GRAD) - 12)
    features = first_feature + tl.arange(0, BLOCK_OUT)
    out = OUT + (tl.program_id(1).to(tl.int64) * num_rows + index)[:, None] * num_features + features[None, :]
    tl.store(out, total, mask=(index < num_rows)[:, None] & (features < num_features)[None, :])


# ---- Gradient of wide rows, through the library's matrix product ----


@triton.jit(do_not_specialize=["first_row", "stop_row", "first_col", "num_cols", "self_offset"])
def softmax_weights(
    ROWS, COLS, ROW_WEIGHTS, COL_WEIGHTS, ROW_LOG_WEIGHTS, LOG_WEIGHTS, OUT, SCALE,
    first_row, stop_row, first_col, num_cols, self_offset, row_plane, col_plane, padded_rows, padded_cols,
    out_plane, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr,
    HAS_SELF: tl.constexpr, ROW_TERM: tl.constexpr, COL_TERM: tl.constexpr, FIXED: tl.constexpr, CHECK: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """What each column counts in the gradient of each row, in fp16 and TERMS planes: that of `row_lse_grad`.

    Of rows from `first_row` and columns from `first_col` on.
    """
    scale = number(SCALE, SCALE_ON_DEVICE)
    if CHECK:
        if _fits(scale) != FIXED:
            return
    slope = scale * (LOG2E / (STRETCH * STRETCH))
    row = first_row + tl.program_id(0) * BLOCK_M
    col = first_col + tl.program_id(1) * BLOCK_N
    index = row + tl.arange(0, BLOCK_M)
    if ROW_TERM:
        row_weight = tl.load(ROW_WEIGHTS + index)[:, None]
        row_largest = tl.load(ROW_WEIGHTS + padded_rows + index)[:, None]
    else:
        row_weight = None
        row_largest = None
    if WEIGHTED and COL_TERM:
        row_log = tl.load(ROW_LOG_WEIGHTS + index)[:, None]
    else:
        row_log = None
    row_pointers = _pointers(ROWS, row, BLOCK_M, BLOCK_K, WIDTH)
    col_pointers = _pointers(COLS, col, BLOCK_N, BLOCK_K, WIDTH)
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for feature in range(0, WIDTH, BLOCK_K):
        part, part_low = _load(row_pointers + feature, row_plane, TERMS)
        other, other_low = _load(col_pointers + feature, col_plane, TERMS)
        tile = _add_product(tile, part, part_low, tl.trans(other), tl.trans(other_low), TERMS)
    weights = _softmax_weights(
        tile, slope, row_weight, row_largest, row_log, COL_WEIGHTS, LOG_WEIGHTS, padded_cols, col,
        BLOCK_N, ROW_TERM, COL_TERM, FIXED, WEIGHTED,
    )  # fmt: skip
    weights = tl.where(_is_contrast(col, row + self_offset, num_cols, BLOCK_M, BLOCK_N, HAS_SELF), weights, 0.0)
    high = weights.to(tl.float16)
    place = (index - first_row).to(tl.int64)[:, None] * out_stride + (col - first_col + tl.arange(0, BLOCK_N))[None, :]
    inside = (index < stop_row)[:, None]
    tl.store(OUT + place, high, mask=inside)
    if TERMS == 2:
        tl.store(OUT + out_plane + place, (weights - high.to(tl.float32)).to(tl.float16), mask=inside)


@triton.jit(do_not_specialize=["size"])
def rescale(OUT, SCALE, LARGEST_GRAD, size, BLOCK: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr):
    """In place, products of weights and columns to the gradient: what `row_lse_grad` does at its end."""
    factor = number(SCALE, SCALE_ON_DEVICE) / STRETCH * power_of_two(exponent_of(LARGEST_GRAD) - 12)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    tl.store(OUT + place, tl.load(OUT + place, mask=inside, other=0.0) * factor, mask=inside)
