"""The row log-sum-exp as an operator of torch, whichever backend computes it, and its derivative."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from genscl_loss._backends import dense, fused, tiled
from genscl_loss._library import define_operator, only_once, without_autocast


class Implementation(Protocol):
    """A backend of linear memory: pure functions in a file of its own, which a line of `_IMPLEMENTATIONS` names.

    `weight` and `unit` are as in `row_lse` below; `left_out` are the diagonals (i, i + d) of the logits that do not
    count. An implementation need not use all that it is given.
    """

    ENTRIES_UP_TO_ONE: bool  # rows with larger ones come multiplied by a power of two

    def row_lse(
        self,
        anchors: Tensor,
        contrasts: Tensor | None,
        scale: Tensor,
        weight: Tensor | None,
        left_out: Sequence[int],
        unit: bool,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The log-sum-exp, (A,); what it was made of, (2, A); anchors and contrasts as the gradient wants them.

        None where it wants those that were given.
        """

    def row_lse_grad(
        self,
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
        """Gradients of anchors and, if it is not 0, of so many contrasts, the first ones."""

    def kept_shape(self, num_rows: int, num_features: int, precision: str) -> tuple[int, ...] | None:
        """Shape of anchors or contrasts as `row_lse` returns them, in float16; None where it returns None."""

    def numbers_to_share(self, grad: Tensor, sums: Tensor) -> Tensor:
        """What owners of contrasts must know of each anchor for `mirrored_grad`, (A, k)."""

    def mirrored_grad(
        self,
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
        """The gradient of anchors that are some of the contrasts, each of which has a log-sum-exp and k numbers."""


_Rows = TypeVar("_Rows", Tensor, Tensor | None)
_IMPLEMENTATIONS: dict[str, Implementation] = {"tiled": tiled, "triton": fused}


def row_lse(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    self_offset: int | None,
    *,
    unit: bool,
    precision: str,
    backend: str,
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
        weight: (M,), what multiplies exponentials; zero leaves a contrast out. The upstream gradient of an anchor that
            is such a contrast has to be zero.

    Returns:
        (A,); -inf, or the lowest number, for an anchor that has no contrast; with weights zero, or the lowest number.
    """
    left_out = diagonals(self_offset)
    if backend == "dense":
        return dense.row_lse(anchors, anchors if contrasts is None else contrasts, scale, weight, left_out, unit)
    if _has_large_entries(unit, backend):
        anchors, contrasts, scale = _entries_up_to_one(anchors, contrasts, scale)
    lse: Tensor = _row_lse(anchors, contrasts, scale, weight, left_out, unit, precision, backend)[0]
    return lse


def diagonals(self_offset: int | None, partner: int | None = None, num_rows: int = 0, num_cols: int = 0) -> list[int]:
    """Diagonals of the logits that do not count: (i, i + self_offset), and (i, (i + partner) modulo columns)."""
    itself = [] if self_offset is None else [self_offset]
    if partner is None:
        return itself
    return itself + [partner - k * num_cols for k in range(-(-(partner + num_rows) // num_cols))]


def _has_large_entries(unit: bool, backend: str) -> bool:
    return not unit and _IMPLEMENTATIONS[backend].ENTRIES_UP_TO_ONE


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
    left_out: Sequence[int],
    unit: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the implementation returns; empty for None, which an operator cannot return."""
    compute = _IMPLEMENTATIONS[backend].row_lse
    lse, sums, rows, cols = compute(anchors, contrasts, scale, weight, left_out, unit, precision)
    rows, cols = (_no_rows(anchors) if kept is None else kept for kept in (rows, cols))
    return _finite(lse, weight), sums, rows, cols


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
    left_out: Sequence[int],
    unit: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def kept(rows: Tensor | None) -> Tensor:
        shape = None if rows is None else _IMPLEMENTATIONS[backend].kept_shape(rows.shape[0], rows.shape[1], precision)
        return _no_rows(anchors) if shape is None else anchors.new_empty(shape, dtype=torch.float16)

    n = anchors.shape[0]
    return anchors.new_empty(n), anchors.new_empty(2, n), kept(anchors), kept(contrasts)


def _kept_or_given(kept: Tensor, given: _Rows) -> _Rows:
    """Rows as the gradient wants them, whose memory is all that the backward pass then needs; else as they are."""
    return given if given is None or kept.dim() == 1 else kept


def _lse_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    anchors, contrasts, scale, weight, ctx.left_out, ctx.unit, _, ctx.backend = inputs
    lse, *made_of = output
    ctx.mark_non_differentiable(*made_of)
    ctx.set_materialize_grads(False)
    sums, rows, cols = made_of
    kept = _kept_or_given(rows, anchors), _kept_or_given(cols, contrasts)
    ctx.save_for_backward(lse, sums, *kept, scale, weight, anchors if scale.requires_grad else None)
    ctx.sizes = (anchors.shape[0] if contrasts is None else contrasts.shape[0], anchors.shape[1])


def _lse_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    lse, sums, rows, cols, scale, weight, anchors = ctx.saved_tensors
    _, contrasts_need_grad, scale_needs_grad, *rest = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    num_live = ctx.sizes[0] if contrasts_need_grad else 0
    with torch.no_grad():
        d_anchors, d_contrasts = _row_lse_grad(
            grad, sums, rows, cols, scale, weight, ctx.left_out, ctx.unit, *ctx.sizes, num_live, ctx.backend
        )
        is_self = cols is None
        d_scale = scale_grad(anchors, d_anchors, scale, is_self=is_self).to(scale.dtype) if scale_needs_grad else None
    found = d_anchors, d_contrasts if contrasts_need_grad else None, d_scale
    message = no_second_derivative(ctx.backend)
    return *(None if x is None else only_once(x, message, lse) for x in found), *[None] * len(rest)


def scale_grad(rows: Tensor, d_rows: Tensor, scale: Tensor | float, *, is_self: bool) -> Tensor:
    """The derivative with respect to the scale, of what depends on it through scale * rows only, from that of rows.

    In a self-contrast the latter holds both sides of each logit: count half.
    """
    return (rows * d_rows).sum() / (2 * scale if is_self else scale)


def _grad_kernel(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    compute = _IMPLEMENTATIONS[backend].row_lse_grad
    d_anchors, d_contrasts = compute(
        grad, sums, rows, cols, scale, weight, left_out, unit, num_contrasts, num_features, num_live
    )
    return d_anchors, grad.new_empty(0) if d_contrasts is None else d_contrasts


def _grad_fake(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (num_live, num_features) if cols is not None and num_live else (0,)
    return grad.new_empty(grad.shape[0], num_features), grad.new_empty(shape)


def no_second_derivative(backend: str) -> str:
    return f'backend "{backend}" has no second derivative; pass backend="dense" to differentiate the loss twice'


_row_lse = define_operator(
    "row_lse",
    "(Tensor anchors, Tensor? contrasts, Tensor scale, Tensor? weight, SymInt[] left_out,"
    " bool unit, str precision, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_lse_kernel,
    fake=_lse_fake,
    setup_context=_lse_setup_context,
    backward=_lse_backward,
)
_row_lse_grad = define_operator(
    "row_lse_grad",
    "(Tensor grad, Tensor sums, Tensor rows, Tensor? cols, Tensor scale, Tensor? weight, SymInt[] left_out,"
    " bool unit, SymInt num_contrasts, SymInt num_features, SymInt num_live, str backend)"
    " -> (Tensor, Tensor)",
    kernel=_grad_kernel,
    fake=_grad_fake,
)


# ---- Contrasts that are anchors of other processes ----


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
        if _has_large_entries(unit, backend):  # as `_entries_up_to_one`, with one factor for the two roles of a row
            ctx.factor = _power_of_two(every)
            given = (rows * ctx.factor, every * ctx.factor, scale.to(rows.device) / ctx.factor / ctx.factor)
        with without_autocast(rows.device):
            lse, sums, left, right = _lse_kernel(*given, weight, [self_offset], unit, precision, backend)
        kept = _kept_or_given(left, given[0]), _kept_or_given(right, given[1])
        ctx.save_for_backward(lse, sums, *kept, given[2], weight, scale, rows if ctx.needs_input_grad[2] else None)
        ctx.options = (self_offset, share, unit, backend, rows.shape)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse = ctx.saved_tensors[0]
        with torch.no_grad():
            d_rows, d_scale = _MirroredLse._gradients(ctx, grad)
        message = no_second_derivative(ctx.options[3])
        d_rows = only_once(d_rows, message, lse)
        d_scale = None if d_scale is None else only_once(d_scale, message, lse)
        return d_rows, None, d_scale, *[None] * (len(ctx.needs_input_grad) - 3)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the rows and the scale."""
        _, sums, left, right, inner_scale, weight, scale, rows = ctx.saved_tensors
        self_offset, share, unit, backend, (num_rows, num_features) = ctx.options
        implementation = _IMPLEMENTATIONS[backend]
        with without_autocast(grad.device):
            numbers = share(implementation.numbers_to_share(grad, sums))
            d_rows = implementation.mirrored_grad(
                numbers, left, right, inner_scale, weight, self_offset, unit, num_rows, num_features
            )
        if ctx.factor is not None:
            d_rows = d_rows * ctx.factor
        # Each pair counts in the gradient of both its rows, and once in that of the scale; summed over all owners.
        return d_rows, None if rows is None else scale_grad(rows, d_rows, scale, is_self=True).to(scale.dtype)


# ---- As a part of another operator ----


def pure_row_lse(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    left_out: Sequence[int],
    unit: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`row_lse` as a pure function: the result, and what `pure_row_lse_grad` wants of it. Not for "dense"."""
    if _has_large_entries(unit, backend):
        anchors, contrasts, scale = _entries_up_to_one(anchors, contrasts, scale)
    return _lse_kernel(anchors, contrasts, scale, weight, left_out, unit, precision, backend)


def fake_row_lse(anchors: Tensor, contrasts: Tensor | None, precision: str, backend: str) -> tuple[Tensor, ...]:
    """Empty tensors of the shapes that `pure_row_lse` returns."""
    return _lse_fake(anchors, contrasts, anchors, None, [], True, precision, backend)


def pure_row_lse_grad(
    grad: Tensor,
    kept: Sequence[Tensor],
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    left_out: Sequence[int],
    unit: bool,
    backend: str,
    num_live: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of anchors and, if it is not 0, of so many contrasts, from what `pure_row_lse` returned beside it."""
    sums, rows, cols = kept
    num_contrasts, num_features = anchors.shape if contrasts is None else contrasts.shape
    num_live = 0 if contrasts is None else num_live
    factor = None
    if _has_large_entries(unit, backend):
        factor, (_, _, scale) = _power_of_two(anchors), _entries_up_to_one(anchors, contrasts, scale)
    d_anchors, d_contrasts = _IMPLEMENTATIONS[backend].row_lse_grad(
        grad, sums, _kept_or_given(rows, anchors), _kept_or_given(cols, contrasts), scale, weight, left_out, unit,
        num_contrasts, num_features, num_live,
    )  # fmt: skip
    if factor is not None:
        d_anchors.mul_(factor)
        if contrasts is not None and d_contrasts is not None:
            d_contrasts.mul_(_power_of_two(contrasts))
    return d_anchors, d_contrasts
