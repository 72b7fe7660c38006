"""The kernels of `_linear_fused.py`: from the two halves to the loss of each row, and back."""

import triton
import triton.language as tl

from genscl_loss import _likelihood
from genscl_loss._backends.kernels import LN2, merged_sums
from genscl_loss._kernels import number

EPS = tl.constexpr(_likelihood.EPS)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def losses(
    PARTS, ALIGNED, SCALE, SUMS, LOSS, MASS, ALIGNMENT, num_rows, num_parts,
    NUM_LABELS: tl.constexpr, BLOCK: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, WEIGHTED: tl.constexpr,
    IS_PROBABILITY: tl.constexpr,
):  # fmt: skip
    """The loss of each row, one line for each kind of labels; the sums of exponentials of all splits of the columns."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    scale = number(SCALE, SCALE_ON_DEVICE)
    largest, total = merged_sums(PARTS, rows, inside, num_rows, num_parts, BLOCK)
    tl.store(SUMS + rows, largest, mask=inside)
    tl.store(SUMS + num_rows + rows, total, mask=inside)
    lse = ((largest + tl.log2(total)) * LN2).to(tl.float64)
    if WEIGHTED:
        lse = tl.where(lse == -float("inf"), 0.0, lse)  # minus infinity times no mass would be NaN
    for k in tl.static_range(NUM_LABELS):
        alignment = tl.load(ALIGNED + 2 * k * num_rows + rows, mask=inside, other=0.0)
        mass = tl.load(ALIGNED + (2 * k + 1) * num_rows + rows, mask=inside, other=0.0)
        loss = 0.0 - (alignment * scale - mass * lse) / (mass + EPS)  # zero has no sign
        if IS_PROBABILITY:
            loss = tl.where(loss < 0.0, 0.0, loss)  # rounding may have made it negative; NaN stays
        tl.store(LOSS + k * num_rows + rows, loss.to(tl.float32), mask=inside)
        tl.store(MASS + k * num_rows + rows, mass.to(tl.float32), mask=inside)
        tl.store(ALIGNMENT + k * num_rows + rows, alignment.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "stride_kind", "stride_row"])
def losses_grad(
    GRAD, MASS, SCALE, OUT, num_rows, stride_kind, stride_row,
    NUM_LABELS: tl.constexpr, BLOCK: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Derivatives with respect to each alignment, and behind them to the log-sum-exp.

    Without positives there is no alignment. Its derivative would be of the size 1 / EPS, beside which those of all
    other rows lose their digits in whole numbers.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    scale = number(SCALE, SCALE_ON_DEVICE)
    of_lse = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(NUM_LABELS):
        grad = tl.load(GRAD + k * stride_kind + rows.to(tl.int64) * stride_row, mask=inside, other=0.0)
        mass = tl.load(MASS + k * num_rows + rows, mask=inside, other=0.0)
        per_mass = grad / (mass + EPS)
        tl.store(OUT + k * num_rows + rows, tl.where(mass == 0.0, 0.0, -per_mass * scale), mask=inside)
        of_lse += per_mass * mass
    tl.store(OUT + NUM_LABELS * num_rows + rows, of_lse, mask=inside)
