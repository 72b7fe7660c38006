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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from genscl_loss._backends.products import add_product, product

TILE = 512  # edge of a tile: 1 MiB in float32, which two cores hold in their level-2 caches

# Base-2 exponents, for each dtype: the largest that a term may have, which leaves room for sums over any number of
# terms, and the smallest, which leaves 24 (53) bits below the largest term of a row before numbers become subnormal.
_EXPONENT_RANGE = {torch.float32: (60.0, -102.0), torch.float64: (480.0, -960.0)}


def row_lse(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    left_out: Sequence[int],
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row of logits without some diagonals; see `genscl_loss._backends.row_lse`.

    Returns:
        The log-sum-exp, and what it was made of, (2, A): the shift of each row and its sum.
    """
    scaled = anchors * (scale * math.log2(math.e))
    others = anchors if contrasts is None else contrasts
    sums = scaled.new_zeros(2, scaled.shape[0])
    shifts, totals = sums
    shift = _shift(scaled, others, weight)
    if shift is None:
        _add_online(shifts.fill_(-torch.inf), totals, scaled, others, left_out, weight)
    else:
        shifts.fill_(shift)
        for rows, cols, tile in _tiles(scaled, others, left_out, half=contrasts is None):
            terms = _exp2(tile, shift)
            totals[rows] += terms.sum(1) if weight is None else terms.mv(weight[cols])
            if contrasts is None and rows != cols:
                totals[cols] += terms.sum(0) if weight is None else terms.T.mv(weight[rows])
    # Plus NaN if a contrast is infinite: at minus infinity it would pass for one that is merely far away.
    totals.add_(torch.linalg.vector_norm(others, torch.inf) * 0)
    return totals.log2().add_(shifts).mul_(math.log(2)), sums


def row_lse_grad(
    grad: Tensor,
    sums: Tensor,
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    left_out: Sequence[int],
    num_grads: int,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `row_lse` with respect to anchors and, if not 0, so many contrasts, the first ones."""
    scaled = anchors * (scale * math.log2(math.e))
    others = anchors if contrasts is None else contrasts
    shift = _shift(scaled, others, weight)
    factors = over_sums(grad, sums)
    if contrasts is None and shift is not None:
        return _symmetric_grad(factors, anchors, scaled, left_out, shift, weight).mul_(scale), None
    in_tiles, weight = (weight, None) if shift is None else (None, weight)
    weighted = others if weight is None else others * weight[:, None]
    d_anchors = torch.zeros_like(anchors)
    d_contrasts = d_anchors if contrasts is None else torch.zeros_like(contrasts[:num_grads]) if num_grads else None
    for rows, cols, tile in _tiles(scaled, others, left_out, weight=in_tiles):
        weights = tile.sub_(sums[0, rows, None]).exp2_().mul_(factors[rows, None])
        add_product(d_anchors[rows], weights, weighted[cols])
        if d_contrasts is not None and len(some := d_contrasts[cols]):
            some.addmm_(weights[:, : len(some)].T, anchors[rows])
    d_anchors.mul_(scale)
    if contrasts is None or d_contrasts is None:
        return d_anchors, None
    if weight is not None:
        d_contrasts.mul_(weight[:num_grads, None])
    return d_anchors, d_contrasts.mul_(scale)


def mirrored_grad(
    factors: Tensor,
    shifts: Tensor,
    anchors: Tensor,
    contrasts: Tensor,
    scale: Tensor,
    self_offset: int,
    weight: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the anchors, where they are some of the contrasts, all of which have a log-sum-exp.

    Of each contrast its upstream gradient `over_sums` and its shift are known.
    """
    scaled = anchors * (scale * math.log2(math.e))
    own = slice(self_offset, self_offset + anchors.shape[0])
    shift, others = _shift(scaled, contrasts, weight), contrasts
    log_weight = None if weight is None else weight.log2()
    if weight is not None and shift is not None:
        factors, others = _over(factors, weight), contrasts * weight[:, None]
    if shift is not None:  # that of all rows, which owners may not have had
        factors = factors * (shift - shifts).exp2()
    dz = torch.zeros_like(anchors)
    for rows, cols, tile in _tiles(scaled, contrasts, [self_offset]):
        left, right = factors[own][rows, None], factors[cols]
        if shift is None:
            mirrored = tile - shifts[cols]
            if log_weight is not None:
                mirrored += log_weight[own][rows, None]
                tile += log_weight[cols]
            weights = mirrored.exp2_().mul_(right)
            weights += tile.sub_(shifts[own][rows, None]).exp2_().mul_(left)
        else:
            weights = _exp2(tile, shift).mul_(left + right)
        add_product(dz[rows], weights, others[cols])
    if weight is not None and shift is not None:
        dz.mul_(weight[own, None])
    return dz.mul_(scale)


def over_sums(grad: Tensor, sums: Tensor) -> Tensor:
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
    for rows, cols, tile in _tiles(scaled, z, left_out, half=True):
        weights = _exp2(tile, shift).mul_(factors[rows, None] + factors[cols])
        add_product(dz[rows], weights, others[cols])
        if rows != cols:
            dz[cols].addmm_(weights.T, others[rows])
    return dz if weight is None else dz.mul_(weight[:, None])


def _add_online(
    largest: Tensor,
    total: Tensor,
    scaled: Tensor,
    others: Tensor,
    left_out: Sequence[int],
    weight: Tensor | None,
) -> None:
    """Sum of each row over 2^largest with a running maximum, for logits of any size."""
    for rows, _, tile in _tiles(scaled, others, left_out, weight=weight):
        new = torch.maximum(largest[rows], tile.amax(1))
        safe = new.masked_fill(new == -torch.inf, 0)  # only what is left out so far: nothing to shift by
        total[rows] = total[rows] * (largest[rows] - safe).exp2_() + tile.sub_(safe[:, None]).exp2_().sum(1)
        largest[rows] = new
    largest.masked_fill_(largest == -torch.inf, 0)  # of a row without contrasts


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


def _tiles(
    scaled: Tensor,
    others: Tensor,
    left_out: Sequence[int],
    *,
    half: bool = False,
    weight: Tensor | None = None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, cols, logits of that tile); a tile may overwrite the one before it.

    Entries (i, i + d) are -inf for each d of `left_out`. With `half`, only the tiles on and above the main diagonal.
    With a `weight` of each column, its logarithm is added.
    """
    n, m = scaled.shape[0], others.shape[0]
    log_weight = None if weight is None else weight.log2()
    edge = TILE if scaled.device.type == "cpu" else 8 * TILE  # elsewhere launches cost more than caches give
    buffer = scaled.new_empty(min(edge, n) * min(edge, m))
    for i in range(0, n, edge):
        rows = slice(i, min(i + edge, n))
        for j in range(i if half else 0, m, edge):
            cols = slice(j, min(j + edge, m))
            shape = (rows.stop - i, cols.stop - j)
            tile = product(scaled[rows], others[cols].T, buffer[: shape[0] * shape[1]].view(shape))
            if log_weight is not None:
                tile += log_weight[cols]
            for offset in left_out:  # one diagonal of the tile, or none of it
                if -shape[0] < (diagonal := i + offset - j) < shape[1]:
                    tile.diagonal(diagonal).fill_(-torch.inf)
            yield rows, cols, tile
