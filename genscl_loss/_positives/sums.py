"""Sums over positives, sum_{j != i} w_ij x_j for every anchor i, without the matrix w.

With w_ij = left_i . right_j the sum is left_i^T (sum_j right_j x_j^T) less the self term: sums by class, which serve
every anchor, O((A + M) C k) for k columns of x. Class numbers stand for one-hot vectors there, and cost O((A + M) k).
What is left after the subtraction may be small, W_i against w_ii, and rounding that is relative to the whole is then
large (up to 3e2 in the loss, for sharp labels of many classes in float32). Four ways, each of which is exact:

- `by_class` subtracts one term of a sum that was taken in float64: W_i is a whole number, so that either nothing else
  is in the sum, and exactly nothing remains, or W_i >= w_ii, as below.
- `by_total` subtracts too: in float64, or, for gradients, in float32 where nothing is lost. With W_i >= w_ii the
  rounding of a sum that contains the self term, eps (W_i + w_ii), is at most twice that of one that does not, eps W_i.
- `by_sweep` subtracts nothing: each block of contrasts gives to those behind it on the way down, and to those before it
  on the way up, and its similarities with itself have a zero in the self place. Twice the work, in any dtype.
- `by_pairs` takes the similarities of all pairs, a tile at a time, O(A M (C + k)): little where there are few anchors,
  or where the sums by class would be larger than the labels and x themselves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genscl_loss._library import has_fast_float64

_CHUNK = 2**18  # numbers of a part of a matrix on CPU, where it stays in cache (2 MiB)
_CHUNK_ELSEWHERE = 2**20  # where launches cost more (8 MiB)
_CHUNK_OF_ALL = 2**20  # numbers of a part that has all rows, where that has many classes
_FEWEST = 256  # rows of a part, however wide: products of fewer are slow
_FEWEST_COLUMNS = 16  # of a part
_TABLE = 2**19  # numbers of sums by class number that exist at a time
_BLOCK = 256  # rows that are added up one after the other
FLOAT64_COSTS = 3.0  # times what float32 does, in products on a CPU; on a GPU that is fast at both, one
ALL = slice(None)

Part = Callable[[slice, slice], Tensor]  # some rows and columns of a matrix that need not exist as a whole


@dataclass(frozen=True)
class Matrix:
    """A matrix in the dtype of sums, made a part at a time."""

    part: Part
    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    copies: int = 1  # of each column in a part, one beside the other
    ones: int = 0  # columns of ones behind them

    def zeros(self, rows: int, cols: slice) -> Tensor:
        """Room for sums of those columns."""
        num_columns = self.columns if cols == ALL else cols.stop - cols.start
        return torch.zeros(rows, self.copies * num_columns + self.ones, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Classes:
    """Class numbers in [0, width), which stand for one-hot rows."""

    numbers: Tensor  # (rows,)
    width: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.numbers.shape[0]


@dataclass(frozen=True)
class Weights:
    """w_ij = left_i . right_j, but for zeros where j = i + self_offset."""

    left: Any  # Matrix, or Classes; of anchors
    right: Any  # of contrasts
    self_offset: int | None
    way: "Way"

    def of(self, x: Matrix) -> "Sums":
        """sum_{j != i} w_ij x_j."""
        return self.way(self, x)

    @property
    def transposed(self) -> "Weights":
        """w_ji: contrasts in the place of anchors."""
        offset = None if self.self_offset is None else -self.self_offset
        return replace(self, left=self.right, right=self.left, self_offset=offset)


Sums = Iterator[tuple[slice, slice, Tensor]]  # (rows, columns, sums): parts that together are the whole
Way = Callable[[Weights, Matrix], Sums]


# ---- The four ways ----


def by_class(weights: Weights, x: Matrix) -> Sums:
    """Sums for class numbers."""
    left, right = weights.left, weights.right
    width = max(left.width, right.width)
    for cols in slices(x.columns, max(_FEWEST_COLUMNS, _TABLE // (x.copies * width))):
        total = x.zeros(width, cols)
        total = total.to(sum_dtype(total))  # a class may be large
        step = chunk(total.shape[1], x.device)
        for rows in slices(right.rows, step):
            _add_by_class(total, right.numbers[rows], x.part(rows, cols).to(total.dtype))
        total = total.to(x.dtype)
        for rows in slices(left.rows, step):
            sums = total.index_select(0, left.numbers[rows])
            selves, own = self_rows(rows, right.rows, weights.self_offset)
            if left is right and weights.self_offset == 0:
                sums.sub_(x.part(own, cols))
            elif own.start < own.stop:
                same = left.numbers[rows][selves] == right.numbers[own]
                sums[selves].addcmul_(same[:, None], x.part(own, cols), value=-1)
            yield rows, cols, sums


def _add_by_class(total: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """Add each row to that of its class, in an order that does not vary from run to run."""
    if total.is_cuda:
        total.index_put_((numbers,), rows, accumulate=True)  # sorts; index_add_ uses atomics there
    else:
        total.index_add_(0, numbers, rows)


def by_total(weights: Weights, x: Matrix) -> Sums:
    """Sums for vectors, the self term subtracted."""
    left, right = weights.left, weights.right
    few = _CHUNK_OF_ALL // max(1, left.rows, right.rows)
    if max(_FEWEST_COLUMNS, x.copies * x.columns) <= few < right.columns:
        yield from _by_total_of_few_rows(weights, x, few)
        return
    step = chunk(max(right.columns, x.columns), x.device)
    products = (_product(right.part(rows, ALL), x.part(rows, ALL)) for rows in slices(right.rows, step))
    total = next(products)
    for product in products:
        total.add_(product)
    total = total.to(x.dtype)
    for rows in slices(left.rows, step):
        anchors = left.part(rows, ALL)
        sums = anchors @ total
        selves, own = self_rows(rows, right.rows, weights.self_offset)
        if own.start < own.stop:
            weight = (anchors[selves] * right.part(own, ALL)).sum(1, keepdim=True)
            sums[selves].addcmul_(weight, x.part(own, ALL), value=-1)
        yield rows, ALL, sums


def _by_total_of_few_rows(weights: Weights, x: Matrix, step: int) -> Sums:
    """The same, so many classes at a time: those of all rows are made once, and multiplied both ways."""
    left, right = weights.left, weights.right
    rows, others = slice(0, left.rows), slice(0, right.rows)
    selves, own = self_rows(rows, right.rows, weights.self_offset)
    values, sums = x.part(others, ALL), x.zeros(left.rows, ALL)
    weight = sums.new_zeros(own.stop - own.start, 1)
    for classes in slices(right.columns, step):
        a, b = left.part(rows, classes), right.part(others, classes)
        sums.addmm_(a, _product(b, values).to(sums.dtype))
        weight.add_((a[selves] * b[own]).sum(1, keepdim=True))
    sums[selves].addcmul_(weight, values[own], value=-1)
    yield rows, ALL, sums


def _product(labels: Tensor, rows: Tensor) -> Tensor:
    """labels^T rows, a block of rows at a time and then over blocks: rounding does not grow with the number of rows."""
    wide = sum_dtype(rows)
    end = len(rows) // _BLOCK * _BLOCK
    if wide == rows.dtype or end < 2 * _BLOCK:
        return labels.T @ rows
    blocks = (y[:end].reshape(-1, _BLOCK, y.shape[1]) for y in (labels, rows))
    total = (next(blocks).transpose(1, 2) @ next(blocks)).sum(0, dtype=wide)
    return total if end == len(rows) else total.add_(labels[end:].T @ rows[end:])


def by_sweep(weights: Weights, x: Matrix) -> Sums:
    """Sums for vectors, where each block gives to those behind it and to those before it; some anchor is a contrast."""
    left, right, offset = weights.left, weights.right, weights.self_offset
    assert offset is not None
    blocks = list(slices(right.rows, _BLOCK))
    for cols in slices(x.columns, max(_FEWEST_COLUMNS, _CHUNK // max(1, left.rows))):
        sums = x.zeros(left.rows, cols)
        for order in (blocks, blocks[::-1]):
            total = sums.new_zeros(right.columns, sums.shape[1])
            for own in order:
                _, rows = self_rows(own, left.rows, -offset)
                sums[rows].addmm_(left.part(rows, ALL), total)
                total.addmm_(right.part(own, ALL).T, x.part(own, cols))
        for own in blocks:
            _, rows = self_rows(own, left.rows, -offset)
            similarity = left.part(rows, ALL) @ right.part(own, ALL).T
            similarity.diagonal(rows.start + offset - own.start).zero_()
            sums[rows].addmm_(similarity, x.part(own, cols))
        first, stop = (min(left.rows, max(0, end)) for end in (-offset, right.rows - offset))
        for rows in (slice(0, first), slice(stop, left.rows)):  # anchors that are no contrasts
            sums[rows].addmm_(left.part(rows, ALL), total)
        yield ALL, cols, sums


def by_pairs(weights: Weights, x: Matrix) -> Sums:
    """Sums for vectors, from tiles of similarities."""
    left, right, offset = weights.left, weights.right, weights.self_offset
    for rows in slices(left.rows, max(_BLOCK, chunk(x.columns, x.device))):
        anchors = left.part(rows, ALL)
        sums = x.zeros(len(anchors), ALL)
        for own in slices(right.rows, max(_BLOCK, chunk(len(anchors), x.device))):
            similarity = anchors @ right.part(own, ALL).T
            if offset is not None and -len(anchors) < (start := rows.start + offset - own.start) < own.stop - own.start:
                similarity.diagonal(start).zero_()
            sums.addmm_(similarity, x.part(own, ALL))
        yield rows, ALL, sums


# ---- Parts ----


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums of such numbers have digits to spare, if there is one."""
    return torch.float64 if has_fast_float64(x.device) else x.dtype


def slices(size: int, step: int) -> Iterator[slice]:
    """At least one slice, which may be empty."""
    for first in range(0, max(1, size), step):
        yield slice(first, min(first + step, size))


def chunk(width: int, device: torch.device) -> int:
    """How many rows of this width make a part."""
    return max(_FEWEST, (_CHUNK if device.type == "cpu" else _CHUNK_ELSEWHERE) // max(1, width))


def self_rows(rows: slice, num_contrasts: int, self_offset: int | None) -> tuple[slice, slice]:
    """Which of some anchors are contrasts, counted from the first of them, and which contrasts they are."""
    if self_offset is None:
        return slice(0, 0), slice(0, 0)
    first = max(rows.start, -self_offset)
    stop = max(first, min(rows.stop, num_contrasts - self_offset))
    return slice(first - rows.start, stop - rows.start), slice(first + self_offset, stop + self_offset)


def matrix(x: Tensor, dtype: torch.dtype, factor: Tensor | None = None) -> Matrix:
    """x, (n, d), whose rows are multiplied by a factor of each if there is one, (n, 1)."""
    # In the wider dtype of both: rows of float64 may be longer than float32 has numbers for.
    wide = torch.promote_types(x.dtype, dtype)

    def part(rows: slice, cols: slice) -> Tensor:
        some = x[rows, cols]
        if factor is not None:
            some = some * factor[rows] if some.dtype == wide else some.to(wide).mul_(factor[rows])
        return some.to(dtype)

    return Matrix(remember(part), x.shape[0], x.shape[1], dtype, x.device)


def remember(make: Part) -> Part:
    """The same parts, but not made again if asked for twice in a row."""
    last: list[Any] = [None, None]

    def part(rows: slice, cols: slice) -> Tensor:
        if last[0] != (rows, cols):
            last[1] = None  # its memory is free for the next
            last[:] = (rows, cols), make(rows, cols)
        result: Tensor = last[1]
        return result

    return part
