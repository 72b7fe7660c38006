"""Linear memory: logits exist one tile at a time, and a tile stays in cache while it is exponentiated and used.

Everything is in base 2 (`exp2` is several times faster than `exp`): with s the logits times log2(e),

    lse_i = ln 2 * (shift_i + log2 t_i),    t_i = sum_j 2^{s_ij - shift_i}.

Sums run over the contrasts that are not left out. In a self-contrast s is symmetric, so each tile above the diagonal
serves its rows and, transposed, its columns, in both passes: half the products in the forward pass, three quarters in
the backward pass. The gradient of row i is

    dz_i = scale * sum_j (g_i / t_i 2^{s_ij - shift_i} + g_j / t_j 2^{s_ij - shift_j}) z_j.

Between the passes a row keeps its shift and its sum t, not the logarithm: that is rounded to a share of its size, and a
softmax of a trained model, where one probability is all but one, has no digits to spare for that. Both passes take the
same products in the same tiles, so that what rounding did to a logit is the same in a term and in the sum.

With weights c_j each exponential is multiplied by that of its column, or, where shifts differ, raised by its logarithm:
the forward pass sums 2^{s_ij} c_j, and the gradient's weights are (g_i / t_i) c_j + (g_j / t_j) c_i. Rows of weight
zero are not there; their upstream gradient is zero.

Where all logits provably fit (Cauchy-Schwarz, see `_shift`) one constant shift serves all rows, and the two
exponentials of the gradient become one. Elsewhere the shift of a row is its maximum, which is found as it goes, and no
tile is used twice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genscl_loss._backends.products import add_product, product
from genscl_loss._backends.threads import lanes_for, run

TILE = 512  # edge of a tile: 1 MiB in float32, which two cores hold in their level-2 caches

# Base-2 exponents, for each dtype: the largest that a term may have, which leaves room for sums over any number of
# terms, and the smallest, which leaves 24 (53) bits below the largest term of a row before numbers become subnormal.
_EXPONENT_RANGE = {torch.float32: (60.0, -102.0), torch.float64: (480.0, -960.0)}

# From so many multiplications on, a logit being worth some, each tile is left to one thread. Not before: the threads
# that share torch's operations wait for the next one for up to ten milliseconds, and are in the way of others then.
_WORK = 2**31
_LOGIT = 64
_CHAINS = 8  # of tiles, one after the other, that can then be under way at a time

ENTRIES_UP_TO_ONE = False  # it takes rows of any length

_Work = Callable[[int, slice, slice, Tensor, Tensor], None]


def row_lse(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    left_out: Sequence[int],
    unit: bool,
    precision: str,
) -> tuple[Tensor, Tensor, None, None]:
    """Log-sum-exp of each row of logits without some diagonals; see `genscl_loss._backends.row_lse`.

    Returns:
        The log-sum-exp, and what it was made of, (2, A): the shift of each row and its sum. Rows are taken as they are.
    """
    scaled = anchors * (scale * math.log2(math.e))
    others = anchors if contrasts is None else contrasts
    shift = _shift(scaled, others, weight)
    tiles = _Tiles.of(scaled, others, left_out, is_self=contrasts is None, half=contrasts is None and shift is not None)
    parts = scaled.new_zeros(2, tiles.parts, scaled.shape[0])
    shifts, totals = parts.fill_(-torch.inf if shift is None else shift)[0], parts[1].zero_()

    def add(part: int, rows: slice, cols: slice, tile: Tensor, _: Tensor) -> None:
        if shift is None:
            _add_online(shifts[part, rows], totals[part, rows], tile)
            return
        terms = _exp2(tile, shift)
        totals[part, rows] += terms.sum(1) if weight is None else terms.mv(weight[cols])
        if tiles.half and rows != cols:
            totals[part, cols] += terms.sum(0) if weight is None else terms.T.mv(weight[rows])

    tiles.each(add, weight=weight if shift is None else None, onto_cols=tiles.half)
    sums = _put_together(parts)
    # Plus NaN if a contrast is infinite: at minus infinity it would pass for one that is merely far away.
    sums[1] += torch.linalg.vector_norm(others, torch.inf) * 0
    return sums[1].log2().add_(sums[0]).mul_(math.log(2)), sums, None, None


def kept_shape(num_rows: int, num_features: int, precision: str) -> None:
    return None


def row_lse_grad(
    grad: Tensor,
    sums: Tensor,
    rows: Tensor,
    cols: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    left_out: Sequence[int],
    unit: bool,
    num_contrasts: int,
    num_features: int,
    num_live: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `row_lse` with respect to anchors and, if not 0, so many contrasts, the first ones."""
    anchors, contrasts = rows, cols
    scaled = anchors * (scale * math.log2(math.e))
    others = anchors if contrasts is None else contrasts
    shift = _shift(scaled, others, weight)
    factors = _over_sums(grad, sums)
    if contrasts is None and shift is not None:
        return _symmetric_grad(factors, anchors, scaled, left_out, shift, weight).mul_(scale), None
    in_tiles, weight = (weight, None) if shift is None else (None, weight)
    weighted = others if weight is None else others * weight[:, None]
    tiles = _Tiles.of(scaled, others, left_out, is_self=contrasts is None)
    parts = anchors.new_zeros(tiles.parts, *anchors.shape)
    d_contrasts = parts[0] if contrasts is None else torch.zeros_like(contrasts[:num_live]) if num_live else None

    def add(part: int, rows: slice, cols: slice, tile: Tensor, _: Tensor) -> None:
        powers = tile.sub_(sums[0, rows, None]).exp2_() if shift is None else _exp2(tile, shift)
        weights = powers.mul_(factors[rows, None])
        add_product(parts[part, rows], weights, weighted[cols])
        if d_contrasts is not None and len(some := d_contrasts[cols]):
            some.addmm_(weights[:, : len(some)].T, anchors[rows])

    tiles.each(add, weight=in_tiles, onto_cols=d_contrasts is not None)
    d_anchors = (parts[0] if tiles.parts == 1 else parts.sum(0)).mul_(scale)
    if contrasts is None or d_contrasts is None:
        return d_anchors, None
    if weight is not None:
        d_contrasts.mul_(weight[:num_live, None])
    return d_anchors, d_contrasts.mul_(scale)


def numbers_to_share(grad: Tensor, sums: Tensor) -> Tensor:
    """Of each anchor its upstream gradient over its sum, and its shift, (A, 2)."""
    return torch.stack([_over_sums(grad, sums), sums[0]], 1)


def mirrored_grad(
    numbers: Tensor,
    rows: Tensor,
    cols: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    self_offset: int,
    unit: bool,
    num_anchors: int,
    num_features: int,
) -> Tensor:
    """Gradient with respect to the anchors, where they are some of the contrasts, all of which have a log-sum-exp."""
    anchors, contrasts, (factors, shifts) = rows, cols, numbers.unbind(1)
    scaled = anchors * (scale * math.log2(math.e))
    own = slice(self_offset, self_offset + anchors.shape[0])
    shift, others = _shift(scaled, contrasts, weight), contrasts
    log_weight = None if weight is None else weight.log2()
    if weight is not None and shift is not None:
        factors, others = _over(factors, weight), contrasts * weight[:, None]
    if shift is not None:  # that of all rows, which owners may not have had
        factors = factors * (shift - shifts).exp2()
    tiles = _Tiles.of(scaled, contrasts, [self_offset])
    parts = anchors.new_zeros(tiles.parts, *anchors.shape)

    def add(part: int, rows: slice, cols: slice, tile: Tensor, spare: Tensor) -> None:
        left, right = factors[own][rows, None], factors[cols]
        if shift is None:
            mirrored = torch.sub(tile, shifts[cols], out=spare)
            if log_weight is not None:
                mirrored += log_weight[own][rows, None]
                tile += log_weight[cols]
            weights = mirrored.exp2_().mul_(right)
            weights += tile.sub_(shifts[own][rows, None]).exp2_().mul_(left)
        else:
            weights = _exp2(tile, shift).mul_(torch.add(left, right, out=spare))
        add_product(parts[part, rows], weights, others[cols])

    tiles.each(add)
    dz = parts[0] if tiles.parts == 1 else parts.sum(0)
    if weight is not None and shift is not None:
        dz.mul_(weight[own, None])
    return dz.mul_(scale)


def _over_sums(grad: Tensor, sums: Tensor) -> Tensor:
    """Upstream gradient of each row over its sum; zero for a row that has no contrast."""
    return grad / sums[1].masked_fill(sums[1] == 0, torch.inf)


def _over(factors: Tensor, weight: Tensor) -> Tensor:
    """Factors over weights: what is symmetric, f_i c_j + f_j c_i, is then c_i (f_i / c_i + f_j / c_j) c_j."""
    return factors / weight.masked_fill(weight == 0, torch.inf)  # the gradient of such a row is zero: it is not there


def _symmetric_grad(
    factors: Tensor, z: Tensor, scaled: Tensor, left_out: Sequence[int], shift: float, weight: Tensor | None
) -> Tensor:
    dz, others = torch.zeros_like(z), z
    if weight is not None:
        factors, others = _over(factors, weight), z * weight[:, None]
    tiles = _Tiles.of(scaled, z, left_out, is_self=True, half=True)

    def add(_: int, rows: slice, cols: slice, tile: Tensor, spare: Tensor) -> None:
        weights = _exp2(tile, shift).mul_(torch.add(factors[rows, None], factors[cols], out=spare))
        add_product(dz[rows], weights, others[cols])
        if rows != cols:
            dz[cols].addmm_(weights.T, others[rows])

    tiles.each(add, onto_cols=True)
    return dz if weight is None else dz.mul_(weight[:, None])


def _add_online(largest: Tensor, total: Tensor, tile: Tensor) -> None:
    """Add to the sum of each row over 2^largest, the maximum so far, for logits of any size."""
    new = torch.maximum(largest, tile.amax(1))
    safe = new.masked_fill(new == -torch.inf, 0)  # only what is left out so far: nothing to shift by
    total.mul_((largest - safe).exp2_()).add_(tile.sub_(safe[:, None]).exp2_().sum(1))
    largest.copy_(new)


def _put_together(parts: Tensor) -> Tensor:
    """Shifts and sums, (2, A), from those of the parts of each row, (2, parts, A)."""
    shifts, totals = parts
    largest = shifts.amax(0)
    largest.masked_fill_(largest == -torch.inf, 0)  # of a row without contrasts
    return torch.stack([largest, (totals * (shifts - largest).exp2_()).sum(0)])


def _shift(scaled: Tensor, others: Tensor, weight: Tensor | None) -> float | None:
    """One shift under which no exponential overflows and no row's largest term underflows; None if there is none.

    |s_ij| <= max_i |scaled_i| * max_j |others_j|. The shift is zero as long as it can be: subtracting a large one costs
    accuracy. Also None where reading the bound would make the host wait for a device, and for NaN and infinity.
    """
    if scaled.device.type != "cpu":
        return None
    bound = _largest_norm(scaled) * _largest_norm(others)
    if weight is not None:  # twice: the gradient divides by weights, and multiplies by them
        bound += 2 * float(weight.masked_fill(weight == 0, 1).log2().abs().max())
    largest, smallest = _EXPONENT_RANGE[scaled.dtype]
    shift = max(0.0, bound - largest)
    return shift if -bound - shift >= smallest else None


def _largest_norm(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).max()) if len(rows) else 0.0


def _exp2(tile: Tensor, shift: float) -> Tensor:
    return (tile.sub_(shift) if shift else tile).exp2_()


@dataclass(frozen=True)
class _Tiles:
    """How a matrix of logits is cut, which depends on nothing but its sizes: both passes take the same tiles."""

    scaled: Tensor
    others: Tensor
    left_out: Sequence[int]
    rows: list[slice]
    cols: list[slice]
    order: list[tuple[int, int]]  # of rows and columns: those that are near each other share neither
    parts: int  # sums of each row, which groups of columns have of their own: few rows keep all threads busy
    is_self: bool  # rows and columns are the same
    half: bool  # only the tiles on and above the main diagonal
    alone: bool  # each is computed by one thread; otherwise all threads share all operations

    @staticmethod
    def of(
        scaled: Tensor, others: Tensor, left_out: Sequence[int], *, is_self: bool = False, half: bool = False
    ) -> "_Tiles":
        n, m = scaled.shape[0], others.shape[0]
        edge = TILE if scaled.device.type == "cpu" else 8 * TILE  # elsewhere launches cost more than caches give
        alone = scaled.device.type == "cpu" and n * m * (scaled.shape[1] + _LOGIT) >= _WORK
        if is_self:
            height = width = max(edge // 4, min(edge, -(-n // _CHAINS))) if alone else edge
        else:
            height = max(1, min(n, edge // 2 if alone else edge))
            width = edge * max(1, edge // height)
        rows, cols = _slices(n, height), _slices(m, width)
        if is_self:
            pairs = _pairs(len(rows))
            order = pairs if half else pairs + [(j, i) for i, j in pairs if i != j]
        else:
            order = _rounds(len(rows), len(cols))
        parts = min(len(cols), -(-_CHAINS // len(rows))) if alone and not is_self else 1
        return _Tiles(scaled, others, left_out, rows, cols, order, parts, is_self, half, alone)

    def each(self, work: _Work, *, weight: Tensor | None = None, onto_cols: bool = False) -> None:
        """Call the work for each tile: with its part, its rows and columns, its logits, and room for as many numbers.

        Entries (i, i + d) are -inf for each d of `left_out`. With a `weight` of each column, its logarithm is added.
        The work adds to numbers of the part of its rows, and, with `onto_cols`, to numbers of its columns.
        """
        log_weight = None if weight is None else weight.log2()

        def compute(number: int, lane: int) -> None:
            part, rows, cols = place(number)
            shape = (rows.stop - rows.start, cols.stop - cols.start)
            room, spare = buffers[lane, :, : shape[0] * shape[1]].view(2, *shape).unbind()
            tile = product(self.scaled[rows], self.others[cols].T, room)
            if log_weight is not None:
                tile += log_weight[cols]
            for offset in self.left_out:  # one diagonal of the tile, or none of it
                if -shape[0] < (diagonal := rows.start + offset - cols.start) < shape[1]:
                    tile.diagonal(diagonal).fill_(-torch.inf)
            work(part, rows, cols, tile, spare)

        def place(number: int) -> tuple[int, slice, slice]:
            i, j = self.order[number]
            return j * self.parts // len(self.cols), self.rows[i], self.cols[j]

        def adds_to(i: int, j: int) -> tuple[int, ...]:
            """Numbers of what has rows i as anchors, in each part, and of what has columns j as contrasts."""
            own = i * self.parts + j * self.parts // len(self.cols)
            return (own, j if self.is_self else -1 - j) if onto_cols else (own,)

        lanes = lanes_for(len(self.order)) if self.alone else 1
        height, width = (max((x.stop - x.start for x in slices), default=0) for slices in (self.rows, self.cols))
        buffers = self.scaled.new_empty(lanes, 2, height * width)
        run([adds_to(i, j) for i, j in self.order], compute, lanes)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def _pairs(count: int) -> list[tuple[int, int]]:
    """(i, j) with i <= j < count: first those of equals, then rounds of a tournament, in which each has one partner."""
    pairs = [(k, k) for k in range(count)]
    last = count - 1 + count % 2  # as a partner, whoever else would have none
    for turn in range(last):
        for k in range(last // 2 + 1):
            i, j = (turn + k) % last, (turn - k) % last if k else last
            if max(i, j) < count:
                pairs.append((min(i, j), max(i, j)))
    return pairs


def _rounds(num_rows: int, num_cols: int) -> list[tuple[int, int]]:
    """All (i, j), in rounds that share no row and no column."""
    if num_rows <= num_cols:
        return [(i, (i + turn) % num_cols) for turn in range(num_cols) for i in range(num_rows)]
    return [(i, j) for j, i in _rounds(num_cols, num_rows)]
