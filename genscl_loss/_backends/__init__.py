"""Who computes the pairwise half of the loss.

- `dense` takes the equation as it stands, on whole matrices. Fastest on small batches, twice differentiable.
- `tiled` holds one tile of logits. Linear memory, fastest on all larger ones.

Without a matrix, all that is left to compute over pairs is the row log-sum-exp without the self term,

    lse_i = log sum_{j != i + self_offset} exp(scale * anchors_i . contrasts_j),

one operator that knows nothing of labels (`genscl_loss._attract` is the other half). A backend for it is a pair of pure
functions, `row_lse` and `row_lse_grad`, in a file of its own. `choose` is the only place that chooses; a backend asked
for by name is used or refused, never replaced.
"""

from typing import Any

from torch import Tensor

from genscl_loss._backends import tiled
from genscl_loss._library import define_operator

_ROW_LSE = {"tiled": tiled}  # who computes the operator below, by name

_DENSE_AT_MOST = 2**18  # logits; up to here both halves of the loss sharing each pass outweigh the memory traffic


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` accepts, besides "auto".

    Returns:
        The names, the reference first.

    Example:
        >>> available_backends()
        ('dense', 'tiled')
    """
    return ("dense", *_ROW_LSE)


def choose(backend: str, num_anchors: int, num_contrasts: int) -> str:
    """Resolve "auto" by the number of logits; check any other name."""
    if backend == "auto":
        return "dense" if num_anchors * num_contrasts <= _DENSE_AT_MOST else "tiled"
    if backend not in available_backends():
        names = ", ".join(repr(name) for name in ("auto", *available_backends()))
        raise ValueError(f"backend must be one of {names}; got {backend!r}")
    return backend


def row_lse(anchors: Tensor, contrasts: Tensor | None, scale: Tensor, self_offset: int | None, backend: str) -> Tensor:
    """Log-sum-exp over the contrasts of each anchor, without the anchor itself.

    Args:
        anchors: (A, D), float32 or float64.
        contrasts: (M, D) of the same dtype; None contrasts the anchors with themselves (M = A, self_offset = 0).
        scale: 0-dim tensor, one over the temperature.
        self_offset: anchor i is contrast i + self_offset; None if no anchor is among the contrasts.
        backend: A key of `_ROW_LSE`.

    Returns:
        (A,); -inf for an anchor that has no contrast.
    """
    lse: Tensor = _row_lse(anchors, contrasts, scale, self_offset, backend)
    return lse


def _lse_kernel(
    anchors: Tensor, contrasts: Tensor | None, scale: Tensor, self_offset: int | None, backend: str
) -> Tensor:
    lse: Tensor = _ROW_LSE[backend].row_lse(anchors, contrasts, scale, self_offset)
    return lse


def _lse_fake(
    anchors: Tensor, contrasts: Tensor | None, scale: Tensor, self_offset: int | None, backend: str
) -> Tensor:
    return anchors.new_empty(anchors.shape[0])


def _lse_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    anchors, contrasts, scale, ctx.self_offset, ctx.backend = inputs
    ctx.save_for_backward(anchors, contrasts, scale, output)


def _lse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    anchors, contrasts, scale, lse = ctx.saved_tensors
    _, contrasts_need_grad, scale_needs_grad, *_ = ctx.needs_input_grad
    d_anchors, d_contrasts = _row_lse_grad(
        grad, lse, anchors, contrasts, scale, ctx.self_offset, contrasts_need_grad, ctx.backend
    )
    d_scale = None
    if scale_needs_grad:
        # lse depends on scale through scale * anchors only. In a self-contrast d_anchors holds both sides: count half.
        d_scale = (anchors * d_anchors).sum() / (scale if contrasts is not None else 2 * scale)
        d_scale = d_scale.to(scale.dtype)
    return d_anchors, d_contrasts if contrasts_need_grad else None, d_scale, None, None


def _grad_kernel(
    grad: Tensor,
    lse: Tensor,
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    self_offset: int | None,
    contrasts_need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    compute = _ROW_LSE[backend].row_lse_grad
    d_anchors, d_contrasts = compute(grad, lse, anchors, contrasts, scale, self_offset, contrasts_need_grad)
    return d_anchors, anchors.new_empty(0) if d_contrasts is None else d_contrasts


def _grad_fake(
    grad: Tensor,
    lse: Tensor,
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    self_offset: int | None,
    contrasts_need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = contrasts.shape if contrasts is not None and contrasts_need_grad else (0,)
    return anchors.new_empty(anchors.shape), anchors.new_empty(shape)


def _grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend = inputs[-1]


def _grad_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        f'backend "{ctx.backend}" has no second derivative; pass backend="dense" to differentiate the loss twice'
    )


_row_lse = define_operator(
    "row_lse",
    "(Tensor anchors, Tensor? contrasts, Tensor scale, SymInt? self_offset, str backend) -> Tensor",
    kernel=_lse_kernel,
    fake=_lse_fake,
    setup_context=_lse_setup_context,
    backward=_lse_backward,
)
_row_lse_grad = define_operator(
    "row_lse_grad",
    "(Tensor grad, Tensor lse, Tensor anchors, Tensor? contrasts, Tensor scale, SymInt? self_offset,"
    " bool contrasts_need_grad, str backend) -> (Tensor, Tensor)",
    kernel=_grad_kernel,
    fake=_grad_fake,
    setup_context=_grad_setup_context,
    backward=_grad_backward,
)
