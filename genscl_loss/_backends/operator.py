"""The row log-sum-exp as an operator of torch, whichever backend computes it, and its derivative."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genscl_loss._backends import dense, fused, tiled
from genscl_loss._library import define_operator, only_once, without_autocast


def row_lse(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    self_offset: int | None,
    *,
    unit: bool,
    precision: str,
    backend: str,
    partner: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp over the contrasts of each anchor, without the anchor itself.

    Args:
        anchors: (A, D), float32 or float64.
        contrasts: (M, D) of the same dtype, M > 0; None contrasts the anchors with themselves (M = A, self_offset = 0).
        scale: 0-dim tensor, one over the temperature.
        self_offset: anchor i is contrast i + self_offset; None if no anchor is among the contrasts.
        unit: Whether no row is longer than one.
        precision: "highest" for all digits of float32; "high" and "medium" allow products of 10 bits. As in
            `torch.set_float32_matmul_precision`. On CPUs always "highest".
        backend: One of `BACKENDS` but "auto".
        partner: Leaves contrast (i + partner) modulo M out as well; not for "triton".
        weight: (M,), what multiplies exponentials; zero leaves a contrast out. The upstream gradient of an anchor that
            is such a contrast has to be zero.

    Returns:
        (A,); -inf, or the lowest number, for an anchor that has no contrast; with weights zero, or the lowest number.
    """
    others = anchors if contrasts is None else contrasts
    partners = _partners_of(anchors, contrasts, partner)
    if backend == "dense":
        lse: Tensor = dense.row_lse(anchors, others, scale, _left_out(self_offset, partners), weight)
        # Plus NaN if a contrast is infinite: at minus infinity it would pass for one that is merely far away.
        return lse if unit else lse + torch.linalg.vector_norm(others.detach(), torch.inf) * 0
    if backend == "triton" and not unit:
        anchors, contrasts, scale = _entries_up_to_one(anchors, contrasts, scale)
    lse = _row_lse(anchors, contrasts, scale, weight, self_offset, partners, unit, precision, backend)[0]
    return lse


def _diagonals(first: int, num_rows: int, num_cols: int) -> list[int]:
    """Where (i, (i + first) modulo columns) are."""
    return [first - k * num_cols for k in range(-(-(first + num_rows) // num_cols))]


def _left_out(self_offset: int | None, partners: list[int]) -> list[int]:
    """Diagonals of the logits that do not count."""
    return partners if self_offset is None else [self_offset, *partners]


def _entries_up_to_one(
    anchors: Tensor, contrasts: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The same logits from rows that fp16 can hold: anchors and contrasts each divided by a power of two."""
    factor = _power_of_two(anchors)
    other_factor = factor if contrasts is None else _power_of_two(contrasts)
    scale = scale.to(anchors.device) / factor / other_factor
    return anchors * factor, None if contrasts is None else contrasts * other_factor, scale


def _power_of_two(rows: Tensor) -> Tensor:
    """What brings the largest entry between a half and one."""
    largest = rows.detach().abs().amax() if rows.shape[0] else rows.new_ones(())
    return torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent)


def _lse_kernel(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    self_offset: int | None,
    partners: list[int],
    unit: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; then, as the backward pass wants them, what it was made of, anchors and contrasts.

    Empty where the anchors or the contrasts themselves are wanted.
    """
    if backend == "tiled":
        lse, sums = tiled.row_lse(anchors, contrasts, scale, _left_out(self_offset, partners), weight)
        return _finite(lse, weight), sums, _no_rows(anchors), _no_rows(anchors)
    lse, sums, rows, cols = fused.row_lse(anchors, contrasts, scale, self_offset, unit, precision, weight)
    return _finite(lse, weight), sums, rows, _no_rows(anchors) if cols is None else cols


def _finite(lse: Tensor, weight: Tensor | None) -> Tensor:
    """Zero where all contrasts of an anchor have a weight of zero: minus infinity times no mass would be NaN."""
    return lse if weight is None else lse.masked_fill_(lse == -torch.inf, 0)


def _no_rows(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float16)


def _lse_fake(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    self_offset: int | None,
    partners: list[int],
    unit: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def split(rows: Tensor | None) -> Tensor:
        if backend == "tiled" or rows is None:
            return _no_rows(anchors)
        return rows.new_empty(fused.split_shape(rows.shape[0], rows.shape[1], precision), dtype=torch.float16)

    n = anchors.shape[0]
    return anchors.new_empty(n), anchors.new_empty(2, n), split(anchors), split(contrasts)


def _lse_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    anchors, contrasts, scale, weight, ctx.self_offset, ctx.partners, ctx.unit, _, ctx.backend = inputs
    _, sums, rows, cols = output
    ctx.mark_non_differentiable(rows, cols)  # not the sums: through them a second derivative finds its refusal
    ctx.set_materialize_grads(False)
    # Split rows take the place of the rows themselves, whose memory is then free before the backward pass.
    kept = (anchors, contrasts) if ctx.backend == "tiled" else (rows, None if contrasts is None else cols)
    ctx.save_for_backward(sums, *kept, scale, weight, anchors if scale.requires_grad else None)
    ctx.sizes = (anchors.shape[0] if contrasts is None else contrasts.shape[0], anchors.shape[1])


def _lse_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    sums, rows, cols, scale, weight, anchors = ctx.saved_tensors
    _, contrasts_need_grad, scale_needs_grad, *_ = ctx.needs_input_grad
    if grad is None:
        return (None,) * 9
    d_anchors, d_contrasts = _row_lse_grad(
        grad, sums, rows, cols, scale, weight, ctx.self_offset, ctx.partners, ctx.unit, *ctx.sizes,
        ctx.sizes[0] if contrasts_need_grad else 0, ctx.backend,
    )  # fmt: skip
    d_scale = None
    if scale_needs_grad:
        # lse depends on scale through scale * anchors only. In a self-contrast d_anchors holds both sides: count half.
        d_scale = (anchors * d_anchors).sum() / (scale if cols is not None else 2 * scale)
        d_scale = d_scale.to(scale.dtype)
    return d_anchors, d_contrasts if contrasts_need_grad else None, d_scale, *[None] * 6


def _grad_kernel(
    grad: Tensor,
    sums: Tensor,
    rows: Tensor,
    cols: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    self_offset: int | None,
    partners: list[int],
    unit: bool,
    num_contrasts: int,
    num_features: int,
    num_grads: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "tiled":
        left_out = _left_out(self_offset, partners)
        d_anchors, d_contrasts = tiled.row_lse_grad(grad, sums, rows, cols, scale, left_out, num_grads, weight)
    else:
        d_anchors, d_contrasts = fused.row_lse_grad(
            grad, sums, rows, cols, scale, self_offset, unit, num_contrasts, num_features, num_grads, weight
        )
    return d_anchors, grad.new_empty(0) if d_contrasts is None else d_contrasts


def _grad_fake(
    grad: Tensor,
    sums: Tensor,
    rows: Tensor,
    cols: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    self_offset: int | None,
    partners: list[int],
    unit: bool,
    num_contrasts: int,
    num_features: int,
    num_grads: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (num_grads, num_features) if cols is not None and num_grads else (0,)
    return grad.new_empty(grad.shape[0], num_features), grad.new_empty(shape)


def _grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend = inputs[-1]


def _grad_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(no_second_derivative(ctx.backend))


def no_second_derivative(backend: str) -> str:
    return f'backend "{backend}" has no second derivative; pass backend="dense" to differentiate the loss twice'


_row_lse = define_operator(
    "row_lse",
    "(Tensor anchors, Tensor? contrasts, Tensor scale, Tensor? weight, SymInt? self_offset, SymInt[] partners,"
    " bool unit, str precision, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_lse_kernel,
    fake=_lse_fake,
    setup_context=_lse_setup_context,
    backward=_lse_backward,
)
_row_lse_grad = define_operator(
    "row_lse_grad",
    "(Tensor grad, Tensor sums, Tensor rows, Tensor? cols, Tensor scale, Tensor? weight, SymInt? self_offset,"
    " SymInt[] partners, bool unit, SymInt num_contrasts, SymInt num_features, SymInt num_grads, str backend)"
    " -> (Tensor, Tensor)",
    kernel=_grad_kernel,
    fake=_grad_fake,
    setup_context=_grad_setup_context,
    backward=_grad_backward,
)


# ---- Rows that have several owners ----


def mirrored_row_lse(
    rows: Tensor,
    every: Tensor,
    scale: Tensor,
    self_offset: int,
    share: Callable[[Tensor], Tensor],
    *,
    unit: bool,
    precision: str,
    backend: str,
    weight: Tensor | None = None,
) -> Tensor:
    """`row_lse` of some rows among all rows, others of which have owners that call this too.

    Logits are symmetric: the gradient of a row as a contrast of others needs only what is known of these others, their
    rows and two or three numbers each. It is one pass over the same pairs, and no gradient travels.

    Args:
        rows: (A, D).
        every: (M, D), rows i + self_offset of which are `rows`; no gradient.
        scale: 0-dim tensor.
        self_offset: Where `rows` begin.
        share: Takes numbers of these rows, (A, k), returns those of all, (M, k).
        unit: As in `row_lse`.
        precision: As in `row_lse`.
        backend: "tiled" or "triton".
        weight: (M,), as there.

    Returns:
        (A,). Its gradient is that of the sum over all owners.
    """
    lse: Tensor = _MirroredLse.apply(rows, every, scale, weight, self_offset, share, unit, precision, backend)  # type: ignore[no-untyped-call]
    return lse


class _MirroredLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        every: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        self_offset: int,
        share: Callable[[Tensor], Tensor],
        unit: bool,
        precision: str,
        backend: str,
    ) -> Tensor:
        ctx.factor, given = None, (rows, every, scale)
        if backend == "triton" and not unit:  # as `_entries_up_to_one`, with one factor for the two roles of a row
            ctx.factor = _power_of_two(every)
            given = (rows * ctx.factor, every * ctx.factor, scale.to(rows.device) / ctx.factor / ctx.factor)
        with without_autocast(rows.device):
            lse, sums, left, right = _lse_kernel(*given, weight, self_offset, [], unit, precision, backend)
        kept = given[:2] if backend == "tiled" else (left, right)
        ctx.save_for_backward(lse, sums, *kept, given[2], weight, scale, rows if ctx.needs_input_grad[2] else None)
        ctx.options = (self_offset, share, unit, backend, rows.shape)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse, *saved = ctx.saved_tensors
        with torch.no_grad():
            d_rows, d_scale = _MirroredLse._gradients(ctx, grad, *saved)
        message = no_second_derivative(ctx.options[3])
        d_rows = only_once(d_rows, message, lse)
        d_scale = None if d_scale is None else only_once(d_scale, message, lse)
        return d_rows, None, d_scale, *[None] * 6

    @staticmethod
    def _gradients(
        ctx: Any,
        grad: Tensor,
        sums: Tensor,
        left: Tensor,
        right: Tensor,
        inner_scale: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Of the rows and the scale."""
        self_offset, share, unit, backend, (num_rows, num_features) = ctx.options
        with without_autocast(grad.device):
            given = (left, right, inner_scale, self_offset)
            if backend == "tiled":
                factors, shifts = share(torch.stack([tiled.over_sums(grad, sums), sums[0]], 1)).unbind(1)
                d_rows = tiled.mirrored_grad(factors, shifts, *given, weight)
            else:
                grads, *all_sums = share(torch.stack([grad, *sums], 1)).unbind(1)
                all_sums = torch.stack(all_sums)
                d_rows = fused.mirrored_grad(grads.contiguous(), all_sums, *given, unit, num_rows, num_features, weight)
        if ctx.factor is not None:
            d_rows = d_rows * ctx.factor
        # Each pair counts in the gradient of both its rows, and once in that of the scale; summed over all owners.
        return d_rows, None if rows is None else ((rows * d_rows).sum() / (2 * scale)).to(scale.dtype)


# ---- As a part of another operator ----


def pairs(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    self_offset: int | None,
    partner: int | None,
    unit: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`row_lse` as a pure function: the result, and what `pairs_grad` wants of it. Not for "dense"."""
    if backend == "triton" and not unit:
        anchors, contrasts, scale = _entries_up_to_one(anchors, contrasts, scale)
    partners = _partners_of(anchors, contrasts, partner)
    return _lse_kernel(anchors, contrasts, scale, weight, self_offset, partners, unit, precision, backend)


def fake_pairs(anchors: Tensor, contrasts: Tensor | None, precision: str, backend: str) -> tuple[Tensor, ...]:
    """Empty tensors of the shapes that `pairs` returns."""
    return _lse_fake(anchors, contrasts, anchors, None, None, [], True, precision, backend)


def pairs_grad(
    grad: Tensor,
    kept: Sequence[Tensor],
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    self_offset: int | None,
    partner: int | None,
    unit: bool,
    backend: str,
    num_grads: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of anchors and, if it is not 0, of so many contrasts, from what `pairs` returned behind its result."""
    sums, rows, cols = kept
    m, d = anchors.shape if contrasts is None else contrasts.shape
    num_grads = 0 if contrasts is None else num_grads
    partners, factor = _partners_of(anchors, contrasts, partner), None
    if backend == "tiled":
        rows, right = anchors, contrasts
    else:
        right = None if contrasts is None else cols
        if not unit:
            factor, (_, _, scale) = _power_of_two(anchors), _entries_up_to_one(anchors, contrasts, scale)
    found = _grad_kernel(grad, sums, rows, right, scale, weight, self_offset, partners, unit, m, d, num_grads, backend)
    d_anchors, d_contrasts = found[0], found[1] if num_grads else None
    if factor is not None:
        d_anchors.mul_(factor)
        if contrasts is not None and d_contrasts is not None:
            d_contrasts.mul_(_power_of_two(contrasts))
    return d_anchors, d_contrasts


def _partners_of(anchors: Tensor, contrasts: Tensor | None, partner: int | None) -> list[int]:
    others = anchors if contrasts is None else contrasts
    return [] if partner is None else _diagonals(partner, anchors.shape[0], others.shape[0])
