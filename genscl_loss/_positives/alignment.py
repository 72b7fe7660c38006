"""How much each anchor is aligned with its positives, z_i . sum_j w_ij z_j, and the gradient: two pure functions.

Both are made of sums over positives (`sums.py`). With u and v for the derivatives with respect to alignment and mass,

    dz_i  = u_i sum_j w_ij z_j     as an anchor,    + sum_j w_ji u_j z_j     as a contrast,
    dy_i  = sum_j (u_i z_i . z_j + v_i) y_j         as an anchor, y of unit length: labels change places with rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genscl_loss._positives.sums import (
    ALL,
    FLOAT64_COSTS,
    Classes,
    Matrix,
    Sums,
    Way,
    Weights,
    by_class,
    by_pairs,
    by_sweep,
    by_total,
    matrix,
    remember,
    sum_dtype,
)
from genscl_loss._unit import inverse_lengths, unit_rows_grad


@dataclass(frozen=True)
class Labelled:
    """Rows, of unit length if similarity is the cosine, and class numbers or label vectors for them."""

    anchors: Tensor  # (A, D)
    contrasts: Tensor | None  # (M, D); None: the anchors themselves
    anchor_labels: Tensor  # (A,), numbers, or (A, C), of any length
    contrast_labels: Tensor | None  # None with contrasts
    self_offset: int | None  # anchor i is contrast i + self_offset, and not its own positive; None: none is

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Of anchors and contrasts."""
        return self.anchors, self.anchors if self.contrasts is None else self.contrasts

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Of anchors and contrasts."""
        a, b = self.anchor_labels, self.contrast_labels
        return a, a if b is None else b


def align(given: Labelled) -> tuple[Tensor, Tensor]:
    """Alignment z_i . sum_j w_ij z_j and positive mass W_i = sum_j w_ij of each anchor, (A,) and (A,)."""
    z, others = given.rows
    # In float64 where there is a choice: equal labels round alike, and the loss is off by ten times its own rounding.
    weights, dtype = _weights(given, z.shape[1] + 1, may_be_float32=False)
    total, mass = (z.new_empty(z.shape[0], dtype=dtype) for _ in range(2))
    for rows, cols, sums in weights.of(_with_one(matrix(others, dtype))):
        mass[rows] = sums[:, -1]
        part = sums[:, :-1].mul_(z[rows, cols])
        if cols == ALL or cols.start == 0:
            torch.sum(part, 1, out=total[rows])
        else:
            total[rows] += part.sum(1)
    return total, mass


def align_grad(
    u: Tensor,
    v: Tensor | None,
    given: Labelled,
    wanted: Sequence[bool],
    *,
    all_u: Tensor | None = None,
    onto: tuple[Tensor | None, Tensor | None] = (None, None),
) -> list[Tensor | None]:
    """Gradients of anchors, contrasts, and the labels of each, where they are wanted.

    Args:
        u: Derivative with respect to the alignment, (A,).
        v: The same of the mass; None: zero.
        given: As in `align`.
        wanted: Which of the four; contrasts of None have none, and their part is in that of the anchors.
        all_u: u of the contrasts, (M,), where these are anchors of others: the gradient of a row is then that of both.
        onto: Gradients of anchors and contrasts from elsewhere, which these are added to, in place. Of contrasts they
            may be those of the first ones, which are then all that there are.
    """
    z, others = given.rows
    num_columns = z.shape[1]
    results: list[Tensor | None] = [None] * 4
    if wanted[0] and (given.contrasts is None or all_u is not None):
        weights, dtype = _weights(given, 2 * num_columns)
        both = _times_u_and_one(matrix(others, dtype), (u if all_u is None else all_u).to(dtype))
        results[0] = _put_together(_of_both(weights.of(both), u.to(dtype)), z, onto[0])
    elif wanted[0]:
        weights, dtype = _weights(given, num_columns)
        sums, factor = weights.of(matrix(others, dtype)), u.to(dtype)[:, None]
        results[0] = _put_together(((rows, cols, part.mul_(factor[rows])) for rows, cols, part in sums), z, onto[0])
    if wanted[1] and given.contrasts is not None:
        weights, dtype = _weights(given, num_columns)
        weighted = matrix(z, dtype, u[:, None])
        results[1] = _put_together(_first(weights.transposed, onto[1]).of(weighted), others, onto[1])
    if wanted[2] or wanted[3]:
        results[2:] = _label_grads(u, v, given, wanted[2:])
    return results


def _first(weights: Weights, sums: Tensor | None) -> Weights:
    """The weights of as many rows as sums are wanted for."""
    if sums is None:
        return weights
    left, count = weights.left, len(sums)
    if isinstance(left, Classes):
        return replace(weights, left=replace(left, numbers=left.numbers[:count]))
    return replace(weights, left=replace(left, rows=count))


def _label_grads(
    u: Tensor, v: Tensor | None, given: Labelled, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The weights of these sums, u_i z_i . z_j + v_i, are inner products as those of labels are."""
    (z, others), (a, b), offset = given.rows, given.labels, given.self_offset
    way, dtype = _cheapest_way(len(z), len(others), z.shape[1] + 1, a.shape[1], z, offset, lambda: False)
    last = (torch.zeros_like(u) if v is None else v).to(dtype)
    left = _with_column(matrix(z, dtype, u[:, None]), last)
    right = _with_column(matrix(others, dtype), last.new_ones(len(others)))
    weights = Weights(left, right, offset, way)
    a_factor = inverse_lengths(a.detach())
    b_factor = a_factor if given.contrast_labels is None else inverse_lengths(b.detach())
    d_a = d_b = None
    if wanted[0]:
        d_a = _put_together(weights.of(matrix(b, dtype, b_factor)), a)
        unit_rows_grad(d_a, a * a_factor, a_factor)
    if wanted[1] or (wanted[0] and given.contrast_labels is None):
        d_b = _put_together(weights.transposed.of(matrix(a, dtype, a_factor)), b)
        unit_rows_grad(d_b, b * b_factor, b_factor)
    return (d_a, d_b) if given.contrast_labels is not None else (d_a if d_a is None or d_b is None else d_a + d_b, None)


# ---- The choice of a way to sum ----


def _weights(given: Labelled, columns: int, *, may_be_float32: bool = True) -> tuple[Weights, torch.dtype]:
    """The weights, with the way that sums so many columns in the least time, and the dtype that it needs."""
    (z, _), (a, b), offset = given.rows, given.labels, given.self_offset
    itself = given.contrast_labels is None
    if a.dim() == 1:
        sides = [a] if itself else [a, b]
        # One more than the largest; off the CPU, where reading it would wait, as many as there could be.
        on_cpu = a.device.type == "cpu"
        # And one for the class of contrasts that are there for no one.
        width = 1 + (max((int(y.max()) for y in sides if len(y)), default=0) if on_cpu else sum(map(len, sides)))
        left = Classes(a, width)
        return Weights(left, left if itself else Classes(b, width), offset, by_class), z.dtype
    a_factor = inverse_lengths(a.detach())
    b_factor = a_factor if itself else inverse_lengths(b.detach())
    way, dtype = _cheapest_way(
        len(a),
        len(b),
        a.shape[1],
        columns,
        z,
        offset,
        lambda: may_be_float32 and _float32_suffices(a, b, a_factor, b_factor),
    )
    left_rows = matrix(a, dtype, a_factor)
    return Weights(left_rows, left_rows if itself else matrix(b, dtype, b_factor), offset, way), dtype


def _cheapest_way(
    num_anchors: int,
    num_contrasts: int,
    width: int,
    columns: int,
    like: Tensor,
    self_offset: int | None,
    is_kept: Callable[[], bool],
) -> tuple[Way, torch.dtype]:
    """The way to sum columns with weights that are inner products of `width` numbers, and the dtype to do it in.

    Products are what it costs. Sums by class that would be larger than the labels and rows cost more than pairs do, so
    the choice bounds the memory too. `is_kept` tells whether the dtype of `like` survives a subtraction.
    """
    total, pairs = (num_anchors + num_contrasts) * width * columns, num_anchors * num_contrasts * (width + columns)
    wide, dtype = sum_dtype(like), like.dtype
    if self_offset is None or (total < pairs and wide != dtype and is_kept()):
        return (by_total if total < pairs else by_pairs), dtype
    if wide == dtype:
        return (by_sweep if 2 * total < pairs else by_pairs), dtype
    costs = FLOAT64_COSTS if like.device.type == "cpu" else 1
    return (by_total, wide) if costs * total < pairs else (by_pairs, dtype)


def _float32_suffices(a: Tensor, b: Tensor, a_factor: Tensor, b_factor: Tensor) -> bool:
    """Whether W_i >= w_ii for every anchor, so that subtracting w_ii loses a digit at most; see `sums.py`.

    w_ii is 1, or 0 for a row of zeros. Off the CPU the answer would make the host wait for a device.
    """
    if a.device.type != "cpu":
        return False
    with_self = (a @ (b_factor.T @ b).T) * a_factor
    return bool(((with_self >= 2) | (with_self == 0)).all())


# ---- Rows and gradients ----


def _with_one(x: Matrix) -> Matrix:
    """A last column of ones, beside which sums of rows have sums of weights."""

    def part(rows: slice, cols: slice) -> Tensor:
        given = x.part(rows, cols)
        out = given.new_ones(given.shape[0], given.shape[1] + 1)
        out[:, :-1] = given
        return out

    return replace(x, part=remember(part), ones=1)


def _with_column(x: Matrix, last: Tensor) -> Matrix:
    """One column more."""
    part = remember(lambda rows, cols: torch.cat([x.part(rows, ALL), last[rows, None]], 1)[:, cols])
    return replace(x, part=part, columns=x.columns + 1)


def _times_u_and_one(x: Matrix, u: Tensor) -> Matrix:
    """Two copies of each row beside each other, the first multiplied by its u."""

    def part(rows: slice, cols: slice) -> Tensor:
        given = x.part(rows, cols)
        return torch.cat([given * u[rows, None], given], 1)

    return replace(x, part=remember(part), copies=2)


def _of_both(parts: Sums, u: Tensor) -> Sums:
    """Parts of sum_j w_ij u_j x_j + u_i sum_j w_ij x_j: what row i is given as a contrast and as an anchor."""
    for rows, cols, sums in parts:
        as_contrast, as_anchor = sums.tensor_split(2, dim=1)
        yield rows, cols, as_contrast.addcmul_(as_anchor, u[rows, None])


def _put_together(parts: Sums, like: Tensor, onto: Tensor | None = None) -> Tensor:
    out = like.new_empty(like.shape) if onto is None else onto
    for rows, cols, part in parts:
        if onto is None:
            out[rows, cols] = part
        else:
            out[rows, cols] += part
    return out
