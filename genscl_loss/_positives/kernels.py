"""The kernels of `fused.py`, which says what they compute together.

Rows x are float32 and as they came, with what makes each of unit length beside them: z = factor * x, yhat likewise. All
matrices are contiguous.

Sums over label vectors are matrix products in float64 (WIDE), for which data-centre GPUs have tensor cores, and a self
term is then subtracted. Where float64 is slow nothing is: rows are in blocks (IN_BLOCKS), a row gets the sums over all
other blocks, and those over its own block from similarities with a zero in the self place.

Sums over class numbers are whole numbers, 2^40 for one: any order of additions gives the same, so that atomic
ones are repeatable, and what is left of a class after the subtraction of its only row is exactly zero. A row that is
not finite has no such number; it counts POISON times, which shows in all that gets the sum.
"""

import triton
import triton.language as tl

from genscl_loss._kernels import exponent_of, inverse_length, power_of_two

ONE = tl.constexpr(1099511627776.0)  # 2^40: with entries of at most one there is room for 2^22 rows
POISON = tl.constexpr(1 << 40)

# Of what was subtracted: what is left of it in float64 where nothing should be. Beside the 1e-8 in the denominator of
# the loss it would count.
ROUNDING = tl.constexpr(1e-15)


# ---- Parts of rows and labels ----


@triton.jit
def _rows_at(X, FACTOR, rows, features, inside, num_features):
    """Unit rows, float32; zeros outside."""
    mask = inside[:, None] & (features < num_features)[None, :]
    x = tl.load(X + rows.to(tl.int64)[:, None] * num_features + features[None, :], mask=mask, other=0.0)
    return x * tl.load(FACTOR + rows, mask=inside, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _labels_at(Y, FACTOR, rows, classes, inside, num_classes, WIDE: tl.constexpr):
    """Unit label rows in WIDE; zeros outside."""
    mask = inside[:, None] & (classes < num_classes)[None, :]
    y = tl.load(Y + rows.to(tl.int64)[:, None] * num_classes + classes[None, :], mask=mask, other=0.0)
    factor = tl.load(FACTOR + rows, mask=inside, other=0.0)
    if (Y.dtype.element_ty == tl.float64) or (WIDE == tl.float64):
        return (y.to(tl.float64) * factor[:, None]).to(WIDE)
    else:
        return y * factor.to(tl.float32)[:, None]


@triton.jit
def _integers(x):
    """The nearest whole numbers; zero for what is not finite."""
    return tl.where(tl.abs(x) < 4e18, tl.floor(x + 0.5), 0.0).to(tl.int64)


@triton.jit(do_not_specialize=["num_rows"])
def inverse_lengths(X, OUT, num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """As `genscl_loss._unit.inverse_lengths`."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    total = tl.zeros((BLOCK_ROWS,), X.dtype.element_ty)
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = inside[:, None] & (columns < num_columns)[None, :]
        x = tl.load(X + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(x * x, 1)
    tl.store(OUT + rows, inverse_length(total), mask=inside)


# ---- Classes as numbers ----


@triton.jit(do_not_specialize=["num_anchors", "num_others"])
def first_of_class(
    CLASSES, OTHERS, OUT, num_anchors, num_others, IS_ANCHOR: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_ANCHORS: tl.constexpr,
):  # fmt: skip
    """The first anchor of the class of each row, `num_anchors` if there is none."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_others
    own = tl.load(OTHERS + rows, mask=inside, other=0)
    first = tl.where(IS_ANCHOR, rows, num_anchors)  # an anchor is of its own class, whatever equals itself
    for start in range(0, num_anchors, BLOCK_ANCHORS):
        anchors = start + tl.arange(0, BLOCK_ANCHORS)
        is_anchor = anchors < num_anchors
        classes = tl.load(CLASSES + anchors, mask=is_anchor, other=0)
        same = (own[:, None] == classes[None, :]) & is_anchor[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, anchors[None, :], num_anchors), 1))
    tl.store(OUT + rows, first.to(tl.int64), mask=inside)


# ---- Sums over all rows ----


@triton.jit(do_not_specialize=["num_rows", "rows_per_part"])
def label_sums(
    X, X_FACTOR, Y, Y_FACTOR, U, OUT,
    num_rows, num_features, num_classes, rows_per_part,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    PLAIN: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of a part of the rows; PLAIN: sum_j yhat_j z_j^T and sum_j yhat_j, WEIGHTED: behind it sum_j yhat_j u_j z_j^T."""
    classes = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.program_id(2) * rows_per_part
    stop = tl.minimum(start + rows_per_part, num_rows)
    plain = tl.zeros((BLOCK_C, BLOCK_D), WIDE)
    weighted = tl.zeros((BLOCK_C, BLOCK_D), WIDE)
    labels = tl.zeros((BLOCK_C,), WIDE)
    for first in range(start, stop, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        inside = rows < stop
        y = _labels_at(Y, Y_FACTOR, rows, classes, inside, num_classes, WIDE)
        z = _rows_at(X, X_FACTOR, rows, features, inside, num_features).to(WIDE)
        if PLAIN:
            plain = tl.dot(tl.trans(y), z, plain, input_precision="ieee", out_dtype=WIDE)
            labels += tl.sum(y, 0)
        if WEIGHTED:
            u = tl.load(U + rows, mask=inside, other=0.0).to(WIDE)
            weighted = tl.dot(tl.trans(y), z * u[:, None], weighted, input_precision="ieee", out_dtype=WIDE)
    mask = (classes < num_classes)[:, None] & (features < num_features)[None, :]
    place = classes[:, None] * num_features + features[None, :]
    size = num_classes * num_features
    out = OUT + tl.program_id(2).to(tl.int64) * (PLAIN * (size + num_classes) + WEIGHTED * size)
    if PLAIN:
        tl.store(out + place, plain, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(out + size + classes, labels, mask=classes < num_classes)
        out += size + num_classes
    if WEIGHTED:
        tl.store(out + place, weighted, mask=mask)


@triton.jit(do_not_specialize=["num_parts", "size"])
def sums_of_others(PARTS, OUT, num_parts, size, BLOCK: tl.constexpr):
    """The sum of all other parts, for each: of those before it, and of those behind it. Nothing is subtracted."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), PARTS.dtype.element_ty)
    for part in range(0, num_parts):
        here = part * size.to(tl.int64) + place
        tl.store(OUT + here, total, mask=inside)
        total += tl.load(PARTS + here, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), PARTS.dtype.element_ty)
    for step in range(0, num_parts):
        here = (num_parts - 1 - step) * size.to(tl.int64) + place
        tl.store(OUT + here, tl.load(OUT + here, mask=inside, other=0.0) + total, mask=inside)
        total += tl.load(PARTS + here, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "table_rows"])
def class_sums(
    X, X_FACTOR, NUMBERS, U, LARGEST_U, TABLE,
    num_rows, num_features, table_rows,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PLAIN: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """As `label_sums`, by class number: a table of D sums for each class, their counts behind it, then that with u."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    mask = inside[:, None] & (features < num_features)[None, :]
    number = tl.load(NUMBERS + rows, mask=inside, other=0)
    z = _rows_at(X, X_FACTOR, rows, features, inside, num_features).to(tl.float64)
    place = number[:, None] * num_features + features[None, :]
    size = table_rows.to(tl.int64) * num_features
    is_first = tl.program_id(1) == 0
    if PLAIN:
        tl.atomic_add(TABLE + place, _integers(z * ONE), mask=mask, sem="relaxed")
        # Each block of features finds what of its own is not finite; the first one counts.
        bad = tl.max(tl.where((z - z) == 0.0, 0, 1), 1).to(tl.int64) * POISON
        count = tl.where(is_first, 1, 0).to(tl.int64) + bad
        tl.atomic_add(TABLE + size + number, count, mask=inside & (count > 0), sem="relaxed")
        TABLE += size + table_rows
    if WEIGHTED:
        lowering = power_of_two(-exponent_of(LARGEST_U)).to(tl.float64)
        u = tl.load(U + rows, mask=inside, other=0.0).to(tl.float64) * lowering
        x = z * u[:, None]
        tl.atomic_add(TABLE + place, _integers(x * ONE), mask=mask, sem="relaxed")
        bad = tl.max(tl.where((x - x) == 0.0, 0, 1), 1).to(tl.int64) * POISON
        tl.atomic_add(TABLE + size + number, bad, mask=inside & (bad > 0), sem="relaxed")


# ---- What each row gets of them ----


@triton.jit
def _selves(rows, inside, self_offset, num_others, HAS_SELF: tl.constexpr):
    """The row among the others that is the same sample, and whether there is one."""
    other = rows + self_offset
    if HAS_SELF:
        return other, inside & (other >= 0) & (other < num_others)
    else:
        return other, rows < 0


@triton.jit
def _similarity_to_self(
    Y, Y_FACTOR, OTHER_Y, OTHER_Y_FACTOR, rows, inside, other, is_there, num_classes,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    own = tl.zeros((BLOCK_M,), WIDE)
    for first in range(0, num_classes, BLOCK_K):
        classes = first + tl.arange(0, BLOCK_K)
        a = _labels_at(Y, Y_FACTOR, rows, classes, inside, num_classes, WIDE)
        own += tl.sum(a * _labels_at(OTHER_Y, OTHER_Y_FACTOR, other, classes, is_there, num_classes, WIDE), 1)
    return own


@triton.jit
def _of_sums(
    Y, Y_FACTOR, SUMS, rows, inside, features, num_features, num_classes,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """yhat_i^T sums, for a range of features."""
    total = tl.zeros((BLOCK_M, BLOCK_D), WIDE)
    for first in range(0, num_classes, BLOCK_K):
        classes = first + tl.arange(0, BLOCK_K)
        y = _labels_at(Y, Y_FACTOR, rows, classes, inside, num_classes, WIDE)
        mask = (classes < num_classes)[:, None] & (features < num_features)[None, :]
        sums = tl.load(SUMS + classes[:, None] * num_features + features[None, :], mask=mask, other=0.0)
        total = tl.dot(y, sums, total, input_precision="ieee", out_dtype=WIDE)
    return total


@triton.jit
def _in_block(
    X, X_FACTOR, Y, Y_FACTOR, U, rows, inside, features, num_rows, num_features, num_classes, block_rows,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Sums over the others of a row's own block, sum_j w_ij z_j or sum_j w_ij (u_i + u_j) z_j, and sum_j w_ij."""
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    start = (tl.program_id(0) * BLOCK_M) // block_rows * block_rows
    for first in range(start, tl.minimum(start + block_rows, num_rows), BLOCK_N):
        others = first + tl.arange(0, BLOCK_N)
        is_row = others < num_rows
        weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first_class in range(0, num_classes, BLOCK_K):
            classes = first_class + tl.arange(0, BLOCK_K)
            a = _labels_at(Y, Y_FACTOR, rows, classes, inside, num_classes, tl.float32)
            b = _labels_at(Y, Y_FACTOR, others, classes, is_row, num_classes, tl.float32)
            weights = tl.dot(a, tl.trans(b), weights, input_precision="ieee")
        weights = tl.where(rows[:, None] == others[None, :], 0.0, weights)
        mass += tl.sum(weights, 1)
        if WEIGHTED:
            u = tl.load(U + rows, mask=inside, other=0.0)[:, None]
            weights *= u + tl.load(U + others, mask=is_row, other=0.0)[None, :]
        z = _rows_at(X, X_FACTOR, others, features, is_row, num_features)
        total = tl.dot(weights, z, total, input_precision="ieee")
    return total, mass


@triton.jit(do_not_specialize=["num_rows", "num_others", "self_offset", "block_rows"])
def align(
    X, X_FACTOR, OTHER_X, OTHER_X_FACTOR, Y, Y_FACTOR, OTHER_Y, OTHER_Y_FACTOR, SUMS, OUT,
    num_rows, num_others, num_features, num_classes, self_offset, block_rows,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_SELF: tl.constexpr, IN_BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Alignment and, behind it, the positive mass, from PLAIN sums over label vectors."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    if IN_BLOCKS:
        block = (tl.program_id(0) * BLOCK_M) // block_rows
        SUMS += block.to(tl.int64) * (num_classes * num_features + num_classes)
    other, is_there = _selves(rows, inside, self_offset, num_others, HAS_SELF)
    mass = tl.zeros((BLOCK_M,), WIDE)
    for first in range(0, num_classes, BLOCK_K):
        classes = first + tl.arange(0, BLOCK_K)
        y = _labels_at(Y, Y_FACTOR, rows, classes, inside, num_classes, WIDE)
        total = tl.load(SUMS + num_classes * num_features + classes, mask=classes < num_classes, other=0.0)
        mass += tl.sum(y * total[None, :], 1)
    if HAS_SELF and not IN_BLOCKS:
        own = _similarity_to_self(
            Y, Y_FACTOR, OTHER_Y, OTHER_Y_FACTOR, rows, inside, other, is_there, num_classes, BLOCK_M, BLOCK_K, WIDE
        )
        mass -= own
        mass = tl.where(tl.abs(mass) < own * ROUNDING, 0.0, mass)
    alignment = tl.zeros((BLOCK_M,), WIDE)
    for first in range(0, num_features, BLOCK_D):
        features = first + tl.arange(0, BLOCK_D)
        sums = _of_sums(
            Y, Y_FACTOR, SUMS, rows, inside, features, num_features, num_classes, BLOCK_M, BLOCK_D, BLOCK_K, WIDE
        )
        if IN_BLOCKS:
            more, more_mass = _in_block(
                X, X_FACTOR, Y, Y_FACTOR, X_FACTOR, rows, inside, features, num_rows, num_features, num_classes,
                block_rows, BLOCK_M, BLOCK_D, BLOCK_M, BLOCK_K, False,
            )  # fmt: skip
            sums += more
            mass += tl.where(first == 0, more_mass, 0.0)
        elif HAS_SELF:
            z = _rows_at(OTHER_X, OTHER_X_FACTOR, other, features, is_there, num_features)
            sums -= own[:, None] * z.to(WIDE)
        z = _rows_at(X, X_FACTOR, rows, features, inside, num_features)
        alignment += tl.sum(sums * z.to(WIDE), 1)
    alignment = tl.where(mass == 0.0, 0.0, alignment)
    tl.store(OUT + rows, alignment.to(tl.float64), mask=inside)
    tl.store(OUT + num_rows + rows, mass.to(tl.float64), mask=inside)


@triton.jit
def _counted(TABLE, number, other_number, inside, is_there, table_rows, num_features):
    """Where the plain sums of a row's class are poisoned, how many rows they have but itself, and if it is in them."""
    is_same = is_there & (number == other_number)
    count = tl.load(TABLE + table_rows.to(tl.int64) * num_features + number, mask=inside, other=0)
    mass = (count & (POISON - 1)) - is_same.to(tl.int64)
    return tl.where(count >= POISON, float("nan"), 0.0).to(tl.float64), mass.to(tl.float64), is_same


@triton.jit(do_not_specialize=["num_rows", "num_others", "table_rows", "self_offset"])
def align_classes(
    X, X_FACTOR, OTHER_X, OTHER_X_FACTOR, NUMBERS, OTHER_NUMBERS, TABLE, OUT,
    num_rows, num_others, num_features, table_rows, self_offset,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SELF: tl.constexpr,
):  # fmt: skip
    """As `align`, from PLAIN sums by class number."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    other, is_there = _selves(rows, inside, self_offset, num_others, HAS_SELF)
    number = tl.load(NUMBERS + rows, mask=inside, other=0)
    other_number = tl.load(OTHER_NUMBERS + other, mask=is_there, other=-1)
    nan, mass, is_same = _counted(TABLE, number, other_number, inside, is_there, table_rows, num_features)
    alignment = nan
    for first in range(0, num_features, BLOCK_D):
        features = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (features < num_features)[None, :]
        sums = tl.load(TABLE + number[:, None] * num_features + features[None, :], mask=mask, other=0)
        z = _rows_at(OTHER_X, OTHER_X_FACTOR, other, features, is_same, num_features)
        sums -= _integers(z.to(tl.float64) * ONE)
        z = _rows_at(X, X_FACTOR, rows, features, inside, num_features)
        alignment += tl.sum(sums.to(tl.float64) * (1 / ONE) * z.to(tl.float64), 1)
    tl.store(OUT + rows, alignment, mask=inside)
    tl.store(OUT + num_rows + rows, mass, mask=inside)


# ---- Gradient ----


@triton.jit
def _of_parts(
    PARTS, num_parts, rows, features, mask, num_rows, num_features, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """What is there already: the sum of so many gradients."""
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in range(0, num_parts):
        here = (part * num_rows.to(tl.int64) + rows)[:, None] * num_features + features[None, :]
        total += tl.load(PARTS + here, mask=mask, other=0.0)
    return total


@triton.jit
def _through_unit_rows(X, X_FACTOR, OUT, along, rows, inside, num_features, BLOCK_D: tl.constexpr):
    """In place, the gradient of rows x from that of z = factor * x: (d_z - z (z . d_z)) * factor."""
    factor = tl.load(X_FACTOR + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    for first in range(0, num_features, BLOCK_D):
        features = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (features < num_features)[None, :]
        out = OUT + rows.to(tl.int64)[:, None] * num_features + features[None, :]
        z = _rows_at(X, X_FACTOR, rows, features, inside, num_features)
        tl.store(out, (tl.load(out, mask=mask, other=0.0) - z * along.to(tl.float32)[:, None]) * factor, mask=mask)


@triton.jit(do_not_specialize=["num_parts", "num_rows", "num_others", "self_offset", "block_rows", "part_size"])
def align_grad(
    PARTS, X, X_FACTOR, OTHER_X, OTHER_X_FACTOR, Y, Y_FACTOR, OTHER_Y, OTHER_Y_FACTOR, SUMS, WEIGHTED_SUMS,
    U, OTHER_U, OUT, DOTS,
    num_parts, num_rows, num_others, num_features, num_classes, self_offset, block_rows, part_size,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    AS_ANCHOR: tl.constexpr, AS_CONTRAST: tl.constexpr, HAS_SELF: tl.constexpr, IN_BLOCKS: tl.constexpr,
    WIDE: tl.constexpr, LAST: tl.constexpr, WITH_DOTS: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows: what PARTS add up to, and what they get as anchors, u_i yhat_i^T sums, and as contrasts.

    LAST takes it through the normalisation. WITH_DOTS keeps z . PARTS, the part of the temperature.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    if IN_BLOCKS:
        block = ((tl.program_id(0) * BLOCK_M) // block_rows).to(tl.int64)
        SUMS += block * part_size
        WEIGHTED_SUMS += block * part_size
    other, is_there = _selves(rows, inside, self_offset, num_others, HAS_SELF)
    u = tl.zeros((BLOCK_M,), WIDE)
    factor = tl.zeros((BLOCK_M,), WIDE)
    if AS_ANCHOR:
        u = tl.load(U + rows, mask=inside, other=0.0).to(WIDE)
        factor += u
    if AS_CONTRAST:
        factor += tl.load(OTHER_U + other, mask=is_there, other=0.0).to(WIDE)
    if HAS_SELF and not IN_BLOCKS:
        factor *= _similarity_to_self(
            Y, Y_FACTOR, OTHER_Y, OTHER_Y_FACTOR, rows, inside, other, is_there, num_classes, BLOCK_M, BLOCK_K, WIDE
        )
    along = tl.zeros((BLOCK_M,), tl.float32)
    dots = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, num_features, BLOCK_D):
        features = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (features < num_features)[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_D), WIDE)
        if AS_ANCHOR:
            sums += u[:, None] * _of_sums(
                Y, Y_FACTOR, SUMS, rows, inside, features, num_features, num_classes, BLOCK_M, BLOCK_D, BLOCK_K, WIDE
            )
        if AS_CONTRAST:
            sums += _of_sums(
                Y, Y_FACTOR, WEIGHTED_SUMS, rows, inside, features, num_features, num_classes,
                BLOCK_M, BLOCK_D, BLOCK_K, WIDE,
            )  # fmt: skip
        if IN_BLOCKS:
            more, _ = _in_block(
                X, X_FACTOR, Y, Y_FACTOR, U, rows, inside, features, num_rows, num_features, num_classes,
                block_rows, BLOCK_M, BLOCK_D, BLOCK_M, BLOCK_K, True,
            )  # fmt: skip
            sums += more
        elif HAS_SELF:
            z = _rows_at(OTHER_X, OTHER_X_FACTOR, other, features, is_there, num_features)
            sums -= factor[:, None] * z.to(WIDE)
        z = _rows_at(X, X_FACTOR, rows, features, inside, num_features)
        total = _of_parts(PARTS, num_parts, rows, features, mask, num_rows, num_features, BLOCK_M, BLOCK_D)
        if WITH_DOTS:
            dots += tl.sum(total * z, 1)
        total += sums.to(tl.float32)
        along += tl.sum(total * z, 1)
        tl.store(OUT + rows.to(tl.int64)[:, None] * num_features + features[None, :], total, mask=mask)
    if WITH_DOTS:
        tl.store(DOTS + rows, dots, mask=inside)
    if LAST:
        tl.debug_barrier()  # what is read again was written by other threads of the program, if layouts differ
        _through_unit_rows(X, X_FACTOR, OUT, along, rows, inside, num_features, BLOCK_D)


@triton.jit(do_not_specialize=["num_parts", "num_rows", "num_others", "table_rows", "self_offset"])
def align_classes_grad(
    PARTS, X, X_FACTOR, OTHER_X, OTHER_X_FACTOR, NUMBERS, OTHER_NUMBERS, TABLE, WEIGHTED_TABLE,
    U, OTHER_U, LARGEST_U, OUT, DOTS,
    num_parts, num_rows, num_others, num_features, table_rows, self_offset,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    AS_ANCHOR: tl.constexpr, AS_CONTRAST: tl.constexpr, HAS_SELF: tl.constexpr,
    LAST: tl.constexpr, WITH_DOTS: tl.constexpr,
):  # fmt: skip
    """As `align_grad`, from sums by class number."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    other, is_there = _selves(rows, inside, self_offset, num_others, HAS_SELF)
    number = tl.load(NUMBERS + rows, mask=inside, other=0)
    is_same = is_there & (number == tl.load(OTHER_NUMBERS + other, mask=is_there, other=-1))
    size = table_rows.to(tl.int64) * num_features
    bad = tl.zeros((BLOCK_M,), tl.int64)
    if AS_ANCHOR:
        u = tl.load(U + rows, mask=inside, other=0.0).to(tl.float64)
        bad += tl.load(TABLE + size + number, mask=inside, other=0)
    if AS_CONTRAST:
        exponent = exponent_of(LARGEST_U)
        lowering = power_of_two(-exponent).to(tl.float64)
        # Of no effect unless `is_same`, which is left to the rows: as a mask of both it breaks a pass of Triton 3.6.
        other_u = tl.load(OTHER_U + other, mask=is_there, other=0.0).to(tl.float64) * lowering
        bad += tl.load(WEIGHTED_TABLE + size + number, mask=inside, other=0)
    nan = tl.where(bad >= POISON, float("nan"), 0.0)[:, None]
    along = tl.zeros((BLOCK_M,), tl.float32)
    dots = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, num_features, BLOCK_D):
        features = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (features < num_features)[None, :]
        place = number[:, None] * num_features + features[None, :]
        own = _rows_at(OTHER_X, OTHER_X_FACTOR, other, features, is_same, num_features).to(tl.float64)
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float64)
        if AS_ANCHOR:
            plain = tl.load(TABLE + place, mask=mask, other=0) - _integers(own * ONE)
            sums += u[:, None] * (plain.to(tl.float64) * (1 / ONE))
        if AS_CONTRAST:
            weighted = tl.load(WEIGHTED_TABLE + place, mask=mask, other=0) - _integers(own * other_u[:, None] * ONE)
            sums += weighted.to(tl.float64) * ((1 / ONE) * power_of_two(exponent).to(tl.float64))
        z = _rows_at(X, X_FACTOR, rows, features, inside, num_features)
        total = _of_parts(PARTS, num_parts, rows, features, mask, num_rows, num_features, BLOCK_M, BLOCK_D)
        if WITH_DOTS:
            dots += tl.sum(total * z, 1)
        total += sums.to(tl.float32) + nan
        along += tl.sum(total * z, 1)
        tl.store(OUT + rows.to(tl.int64)[:, None] * num_features + features[None, :], total, mask=mask)
    if WITH_DOTS:
        tl.store(DOTS + rows, dots, mask=inside)
    if LAST:
        tl.debug_barrier()  # as above
        _through_unit_rows(X, X_FACTOR, OUT, along, rows, inside, num_features, BLOCK_D)
