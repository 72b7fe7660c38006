"""Linear memory: logits exist one tile at a time, and a tile stays in cache while it is exponentiated and used.

Everything is in base 2 (`exp2` is several times faster than `exp`): with s the logits times log2(e),

    lse_i = ln 2 * log2 sum_j 2^{s_ij}.

In a self-contrast s is symmetric, so each tile above the diagonal serves its rows and, transposed, its columns, in both
passes: half the products in the forward pass, three quarters in the backward pass. The gradient of row i is

    dz_i = scale * sum_{j != i} (g_i 2^{s_ij - lse_i} + g_j 2^{s_ij - lse_j}) z_j.

Exponentials need a shift. Where all logits provably fit (Cauchy-Schwarz, see `_shift`) one constant serves all rows
and the two exponentials of the gradient become one. Elsewhere each row keeps its running maximum, no tile is used
twice, and the gradient sums each row once more: to large logits the rounding of lse, and of s_ij against s_ji, is not
small.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from genscl_loss._backends.products import add_product, product

TILE = 512  # edge of a tile: 1 MiB in float32, which two cores hold in their level-2 caches

# Base-2 exponents, for each dtype: the largest that a term may have, which leaves room for sums over any number of
# terms, and the smallest, which leaves 24 (53) bits below the largest term of a row before numbers become subnormal.
_EXPONENT_RANGE = {torch.float32: (60.0, -102.0), torch.float64: (480.0, -960.0)}


def row_lse(anchors: Tensor, contrasts: Tensor | None, scale: Tensor, self_offset: int | None) -> Tensor:
    """Log-sum-exp of each row of logits without the self term; see `genscl_loss._backends.row_lse`."""
    scaled = anchors * (scale * math.log2(math.e))
    others = anchors if contrasts is None else contrasts
    shift = _shift(scaled, others)
    if shift is None:
        lse = _online_lse(scaled, others, self_offset)
    else:
        lse = scaled.new_zeros(scaled.shape[0])
        for rows, cols, tile in _tiles(scaled, others, self_offset, half=contrasts is None):
            terms = _exp2(tile, shift)
            lse[rows] += terms.sum(1)
            if contrasts is None and rows != cols:
                lse[cols] += terms.sum(0)
        lse = lse.log2_().add_(shift)
    # Plus NaN if a contrast is infinite: at minus infinity it would pass for one that is merely far away.
    return lse.mul_(math.log(2)).add_(torch.linalg.vector_norm(others, torch.inf) * 0)


def row_lse_grad(
    grad: Tensor,
    lse: Tensor,
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    self_offset: int | None,
    contrasts_need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `row_lse` with respect to anchors and, if wanted, contrasts."""
    scaled = anchors * (scale * math.log2(math.e))
    others = anchors if contrasts is None else contrasts
    lse = lse * math.log2(math.e)
    shift = _shift(scaled, others)
    if contrasts is None and shift is not None:
        return _symmetric_grad(grad, lse, anchors, scaled, shift).mul_(scale), None
    d_anchors = torch.zeros_like(anchors)
    d_contrasts = d_anchors if contrasts is None else torch.zeros_like(contrasts) if contrasts_need_grad else None
    if shift is None:
        grad = grad / _row_sums(lse, scaled, others, self_offset)
    for rows, cols, tile in _tiles(scaled, others, self_offset):
        weights = tile.sub_(lse[rows, None]).exp2_().mul_(grad[rows, None])
        add_product(d_anchors[rows], weights, others[cols])
        if d_contrasts is not None:
            d_contrasts[cols].addmm_(weights.T, anchors[rows])
    d_anchors.mul_(scale)
    if contrasts is None or d_contrasts is None:
        return d_anchors, None
    return d_anchors, d_contrasts.mul_(scale)


def mirrored_grad(
    grads: Tensor, lses: Tensor, anchors: Tensor, contrasts: Tensor, scale: Tensor, self_offset: int
) -> Tensor:
    """Gradient with respect to the anchors, where they are some of the contrasts, all of which have a log-sum-exp."""
    scaled = anchors * (scale * math.log2(math.e))
    lses = lses * math.log2(math.e)
    own = slice(self_offset, self_offset + anchors.shape[0])
    shift = _shift(scaled, contrasts)
    factors = grads if shift is None else grads * (shift - lses).exp2()
    dz = torch.zeros_like(anchors)
    for rows, cols, tile in _tiles(scaled, contrasts, self_offset):
        left, right = factors[own][rows, None], factors[cols]
        if shift is None:
            weights = (tile - lses[cols]).exp2_().mul_(right)
            weights += tile.sub_(lses[own][rows, None]).exp2_().mul_(left)
        else:
            weights = _exp2(tile, shift).mul_(left + right)
        add_product(dz[rows], weights, contrasts[cols])
    return dz.mul_(scale)


def settled(
    grad: Tensor, lse: Tensor, anchors: Tensor, contrasts: Tensor, scale: Tensor, self_offset: int | None
) -> Tensor:
    """The upstream gradient, made good for the rounding of lse where that is not small."""
    scaled = anchors * (scale * math.log2(math.e))
    if _shift(scaled, contrasts) is not None:
        return grad
    return grad / _row_sums(lse * math.log2(math.e), scaled, contrasts, self_offset)


def _symmetric_grad(grad: Tensor, lse: Tensor, z: Tensor, scaled: Tensor, shift: float) -> Tensor:
    factor = grad * (shift - lse).exp2()
    dz = torch.zeros_like(z)
    for rows, cols, tile in _tiles(scaled, z, 0, half=True):
        weights = _exp2(tile, shift).mul_(factor[rows, None] + factor[cols])
        add_product(dz[rows], weights, z[cols])
        if rows != cols:
            dz[cols].addmm_(weights.T, z[rows])
    return dz


def _row_sums(lse: Tensor, scaled: Tensor, others: Tensor, self_offset: int | None) -> Tensor:
    """sum_j 2^{s_ij - lse_i}: one, but for the rounding of lse."""
    total = torch.zeros_like(lse)
    for rows, _, tile in _tiles(scaled, others, self_offset):
        total[rows] += tile.sub_(lse[rows, None]).exp2_().sum(1)
    return total


def _online_lse(scaled: Tensor, others: Tensor, self_offset: int | None) -> Tensor:
    """Base-2 log-sum-exp of each row with a running maximum, for logits of any size."""
    largest = scaled.new_full(scaled.shape[:1], -torch.inf)
    total = torch.zeros_like(largest)
    for rows, _, tile in _tiles(scaled, others, self_offset):
        new = torch.maximum(largest[rows], tile.amax(1))
        safe = new.masked_fill(new == -torch.inf, 0)  # only the self term so far: nothing to shift by
        total[rows] = total[rows] * (largest[rows] - safe).exp2_() + tile.sub_(safe[:, None]).exp2_().sum(1)
        largest[rows] = new
    return total.log2_().add_(largest)


def _shift(scaled: Tensor, others: Tensor) -> float | None:
    """One shift under which no exponential overflows and no row's largest term underflows; None if there is none.

    |s_ij| <= max_i |scaled_i| * max_j |others_j|. The shift is zero as long as it can be: subtracting a large one costs
    accuracy. Also None where reading the bound would make the host wait for a device, and for NaN and infinity.
    """
    if scaled.device.type != "cpu":
        return None
    bound = _largest_norm(scaled) * _largest_norm(others)
    largest, smallest = _EXPONENT_RANGE[scaled.dtype]
    shift = max(0.0, bound - largest)
    return shift if -bound - shift >= smallest else None


def _largest_norm(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).max()) if len(rows) else 0.0


def _exp2(tile: Tensor, shift: float) -> Tensor:
    return (tile.sub_(shift) if shift else tile).exp2_()


def _tiles(
    scaled: Tensor, others: Tensor, self_offset: int | None, *, half: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, cols, logits of that tile), the self term being -inf; a tile may overwrite the one before it.

    With `half`, only the tiles on and above the diagonal.
    """
    n, m = scaled.shape[0], others.shape[0]
    edge = TILE if scaled.device.type == "cpu" else 8 * TILE  # elsewhere launches cost more than caches give
    buffer = scaled.new_empty(min(edge, n) * min(edge, m))
    for i in range(0, n, edge):
        rows = slice(i, min(i + edge, n))
        for j in range(i if half else 0, m, edge):
            cols = slice(j, min(j + edge, m))
            shape = (rows.stop - i, cols.stop - j)
            tile = product(scaled[rows], others[cols].T, buffer[: shape[0] * shape[1]].view(shape))
            # Within the tile the self terms lie on one diagonal, which may miss it altogether.
            if self_offset is not None and -shape[0] < (diagonal := i + self_offset - j) < shape[1]:
                tile.diagonal(diagonal).fill_(-torch.inf)
            yield rows, cols, tile
