"""Alignment and positive mass on NVIDIA GPUs: the pair of functions of `alignment.py` in Triton kernels.

The same sums, in few launches: one over all rows, one that hands each row its own. Rows come as they are, with what
makes each of unit length beside them, and the gradient leaves as that of the rows: nothing of the size of rows exists
in between. `kernels.py` says in which numbers the sums are taken, so that they are exact and every run gives the same.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genscl_loss._library import LAUNCH, has_fast_float64

_MOST_SUMS = 2**23  # numbers of sums by class that may exist: 64 MB
_MOST_PARTS = 2**21  # of sums that are still to be added up
_MOST_ROWS = 2**20  # that whole numbers of 64 bits have room for, and the mark for what is not finite
_MOST_COMPARED = 2**14  # rows whose classes are compared with each other; more are sorted
_PART = 512  # rows of a part, at least
_PROGRAMS = 264  # that keep a large GPU busy, two on each multiprocessor
_BLOCK_M = 32  # rows of a program


class Side(NamedTuple):
    """Anchors, or contrasts: rows and labels, and what makes them of unit length. All of it contiguous."""

    rows: Tensor  # (n, D), float32
    factor: Tensor  # (n,), float64
    labels: Tensor  # (n,) class numbers, or (n, C)
    label_factor: Tensor | None  # (n,), float64, of label vectors

    @property
    def is_hard(self) -> bool:
        """Whether labels are class numbers."""
        return self.labels.dim() == 1

    @property
    def num_classes(self) -> int:
        """C of label vectors."""
        return 0 if self.is_hard else self.labels.shape[1]


def suits(
    num_anchors: int,
    num_contrasts: int | None,
    num_features: int,
    labels: Tensor,
    self_offset: int | None,
    device: torch.device,
) -> bool:
    """Whether sums by class are of a size to exist, and can be taken in the numbers that this device is fast in."""
    rows = num_anchors + (num_contrasts or 0)
    if labels.dim() == 1:
        return rows <= _MOST_ROWS and (rows + 1) * (num_features + 1) <= _MOST_SUMS
    parts = 1
    if not has_fast_float64(device) and self_offset is not None:
        if num_contrasts is not None:
            return False
        parts = 2 * num_parts(num_anchors)
    return parts * labels.shape[1] * (num_features + 1) <= _MOST_SUMS


def num_parts(num_rows: int) -> int:
    """Blocks of rows where nothing is to be subtracted."""
    return -(-num_rows // block_rows(num_rows))


def block_rows(num_rows: int) -> int:
    """Rows of such a block: as few as sums for at most 32 blocks allow."""
    return max(_PART, -(-num_rows // (32 * _BLOCK_M)) * _BLOCK_M)


def class_numbers(anchors: Tensor, contrasts: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Class numbers of anchors and contrasts in [0, A]: the first anchor of the class; None if there are too many rows.

    A is the number of a class that no anchor has.
    """
    rows = len(anchors) + (0 if contrasts is None else len(contrasts))
    if rows > _MOST_COMPARED:
        return None
    anchors = anchors.contiguous()
    others = None if contrasts is None else contrasts.contiguous()
    return _first_of_class(anchors, anchors), None if others is None else _first_of_class(anchors, others)


def label_factors(labels: Tensor, out: Tensor) -> None:
    """What makes label vectors of unit length, (n,) float64."""
    n, c = labels.shape
    _kernels().inverse_lengths[-(-n // 32),](labels, out, n, c, 32, min(128, _power_of_two(c)), **LAUNCH)


def align(anchors: Side, contrasts: Side | None, self_offset: int | None, out: Tensor) -> None:
    """Write z_i . sum_j w_ij z_j and W_i = sum_j w_ij of each anchor to `out`, (2, A) float64."""
    others = anchors if contrasts is None else contrasts
    n, d = anchors.rows.shape
    grid = (-(-n // _BLOCK_M),)
    shared = (len(others.rows), d)
    offset, has_self = self_offset or 0, self_offset is not None
    if anchors.is_hard:
        table, table_rows = _class_sums(anchors, contrasts, others, None, None)
        _kernels().align_classes[grid](
            *_rows(anchors), *_rows(others), anchors.labels, others.labels, table, out, n, *shared, table_rows, offset,
            _BLOCK_M, _block_of(d), has_self, num_warps=8, **LAUNCH,
        )  # fmt: skip
        return
    blocks = _block_length(others, self_offset)
    sums = _label_sums(others, None, blocks, plain=True)
    _kernels().align[grid](
        *_rows(anchors), *_rows(others), *_labels(anchors), *_labels(others), sums, out,
        n, *shared, anchors.num_classes, offset, blocks or n, _BLOCK_M, _block_of(d), 16,
        has_self, blocks is not None, _wide(others), num_warps=4 if blocks is None else 8, maxnreg=248, **LAUNCH,
    )  # fmt: skip


def align_grad(
    u: Tensor,
    largest_u: Tensor,
    anchors: Side,
    contrasts: Side | None,
    self_offset: int | None,
    parts: tuple[Tensor, Tensor | None],
    *,
    is_last: bool,
    dots: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Add up parts of gradients of unit rows, and that of the alignment.

    Args:
        u: Derivative with respect to the alignment, (A,) float32.
        largest_u: The largest of them, 0-dim.
        anchors: As in `align`.
        contrasts: As there.
        self_offset: As there.
        parts: Gradients of anchors, (parts, A, D), and of the first contrasts, (parts, live, D), or None.
        is_last: Whether the result goes through the normalisation.
        dots: Where to write z . sum of parts of the anchors, (A,), if it is wanted.
    """
    for_anchors, for_contrasts = parts
    if contrasts is None:
        sums = _all_sums(anchors, None, anchors, u, largest_u, self_offset, plain=True, weighted=True)
        return _apply(sums, u, largest_u, anchors, anchors, self_offset, for_anchors, (True, True), is_last, dots), None
    sums = _all_sums(anchors, contrasts, contrasts, None, None, self_offset, plain=True, weighted=False)
    d_anchors = _apply(
        sums, u, largest_u, anchors, contrasts, self_offset, for_anchors, (True, False), is_last, dots
    )  # fmt: skip
    if for_contrasts is None:
        return d_anchors, None
    sums = _all_sums(anchors, contrasts, anchors, u, largest_u, self_offset, plain=False, weighted=True)
    reverse = None if self_offset is None else -self_offset
    d_contrasts = _apply(
        sums, u, largest_u, contrasts, anchors, reverse, for_contrasts, (False, True), is_last, None
    )  # fmt: skip
    return d_anchors, d_contrasts


# ---- Sums over all rows ----


def _all_sums(
    anchors: Side,
    contrasts: Side | None,
    over: Side,
    u: Tensor | None,
    largest_u: Tensor | None,
    self_offset: int | None,
    *,
    plain: bool,
    weighted: bool,
) -> tuple[Tensor, Tensor, int, int | None]:
    """Plain sums and those with u, how long either is, and the rows of a block where they are of other blocks."""
    d = anchors.rows.shape[1]
    if anchors.is_hard:
        table, rows = _class_sums(anchors, contrasts, over, u if weighted else None, largest_u, plain=plain)
        size = rows * (d + 1)
        return table, table[size:] if plain else table, rows, None
    blocks = _block_length(over, self_offset)
    sums = _label_sums(over, u if weighted else None, blocks, plain=plain)
    size = over.num_classes * (d + 1)
    return sums, sums[size:] if plain else sums, size * plain + over.num_classes * d * weighted, blocks


def _class_sums(
    anchors: Side,
    contrasts: Side | None,
    over: Side,
    u: Tensor | None,
    largest_u: Tensor | None,
    *,
    plain: bool = True,
) -> tuple[Tensor, int]:
    """A table of sums, and one of sums with u behind it; how many classes there can be."""
    n, d = over.rows.shape
    table_rows = 1 + len(anchors.rows) + (0 if contrasts is None else len(contrasts.rows))
    table = over.labels.new_zeros(table_rows * (d + 1) * (plain + (u is not None)))
    block = min(128, _power_of_two(d))
    _kernels().class_sums[-(-n // 32), -(-d // block)](
        *_rows(over), over.labels, over.factor if u is None else u, over.factor if largest_u is None else largest_u,
        table, n, d, table_rows, 32, block, plain, u is not None, num_warps=8, **LAUNCH,
    )  # fmt: skip
    return table, table_rows


def _label_sums(over: Side, u: Tensor | None, blocks: int | None, *, plain: bool) -> Tensor:
    """C x D sums and C sums of labels, C x D sums with u behind them; as often as there are blocks."""
    n, d = over.rows.shape
    c = over.num_classes
    wide = _wide(over)
    size = c * (d + 1) * plain + c * d * (u is not None)
    block_d = _block_of(d)
    programs = -(-c // 64) * -(-d // block_d)
    each = blocks
    if each is None:
        count = max(1, min(-(-n // _PART), -(-_PROGRAMS // programs), _MOST_PARTS // size))
        each = -(-n // count)
    count = -(-n // each)
    dtype = torch.float64 if wide is _kernels().tl.float64 else torch.float32
    parts = over.rows.new_empty(count, size, dtype=dtype)
    _kernels().label_sums[-(-c // 64), -(-d // block_d), count](
        *_rows(over), *_labels(over), over.factor if u is None else u, parts, n, d, c, each,
        64, block_d, 16, plain, u is not None, wide, num_warps=8, **LAUNCH,
    )  # fmt: skip
    if blocks is not None and count > 1:
        others = torch.empty_like(parts)
        _kernels().sums_of_others[-(-size // 256),](parts, others, count, size, 256, **LAUNCH)
        return others.view(-1)
    if blocks is not None:
        return parts.zero_().view(-1)
    return parts.view(-1) if count == 1 else parts.sum(0)


# ---- What each row gets of them ----


def _apply(
    sums: tuple[Tensor, Tensor, int, int | None],
    u: Tensor,
    largest_u: Tensor,
    rows: Side,
    others: Side,
    self_offset: int | None,
    parts: Tensor,
    roles: tuple[bool, bool],
    is_last: bool,
    dots: Tensor | None,
) -> Tensor:
    plain, weighted, size, blocks = sums
    num_parts, n, d = parts.shape
    out = parts.new_empty(n, d) if num_parts > 1 else parts[0]
    grid = (-(-n // _BLOCK_M),)
    offset, has_self = self_offset or 0, self_offset is not None
    options = {"LAST": is_last, "WITH_DOTS": dots is not None}
    some_dots = u if dots is None else dots  # any tensor stands for what is not written
    block = _block_of(d)
    if rows.is_hard:
        _kernels().align_classes_grad[grid](
            parts, *_rows(rows), *_rows(others), rows.labels, others.labels, plain, weighted, u, u, largest_u, out,
            some_dots, num_parts, n, len(others.rows), d, size, offset, _BLOCK_M, block, *roles, has_self,
            num_warps=4, **options, **LAUNCH,
        )  # fmt: skip
        return out
    # Few rows where blocks are summed over too, and all registers, for without being asked the assembler saves some.
    block_m = _BLOCK_M if blocks is None else _BLOCK_M // 2
    _kernels().align_grad[-(-n // block_m),](
        parts, *_rows(rows), *_rows(others), *_labels(rows), *_labels(others), plain, weighted, u, u, out, some_dots,
        num_parts, n, len(others.rows), d, rows.num_classes, offset, blocks or n, size,
        block_m, block, 16, *roles, has_self, blocks is not None, _wide(others),
        num_warps=8 if blocks is None else 4, maxnreg=248, **options, **LAUNCH,
    )  # fmt: skip
    return out


# ---- Parts ----


def _rows(side: Side) -> tuple[Tensor, Tensor]:
    return side.rows, side.factor


def _labels(side: Side) -> tuple[Tensor, Tensor | None]:
    return side.labels, side.label_factor


def _block_length(over: Side, self_offset: int | None) -> int | None:
    """Rows of a block where nothing may be subtracted; None where it may, or there is nothing to subtract."""
    is_exact = self_offset is None or has_fast_float64(over.rows.device)
    return None if is_exact else block_rows(len(over.rows))


def _wide(over: Side) -> Any:
    """The numbers to sum in."""
    tl = _kernels().tl
    return tl.float64 if has_fast_float64(over.rows.device) else tl.float32


def _block_of(num_features: int) -> int:
    """Features at a time, so few that no GPU runs out of registers: addresses of rows that begin anywhere take some."""
    return max(16, min(32 if num_features % 16 == 0 else 16, _power_of_two(num_features)))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _first_of_class(anchors: Tensor, others: Tensor) -> Tensor:
    out = anchors.new_empty(len(others), dtype=torch.int64)
    _kernels().first_of_class[-(-len(others) // 32),](
        anchors, others, out, len(anchors), len(others), others is anchors, 32, 128, **LAUNCH
    )  # fmt: skip
    return out


def _kernels() -> ModuleType:
    from genscl_loss._positives import kernels  # Triton is loaded when first used

    return kernels
