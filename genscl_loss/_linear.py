"""Both halves of the loss in one operator, in memory that is linear in the number of rows.

With the alignment and the positive mass of `_positives` and the log-sum-exp of `_backends`,

    sum_j w_ij log p_ij = alignment_i / tau - W_i lse_i.

Rows are scaled to unit length inside. A backward pass scales them again instead of having kept them, and adds the
gradients of both halves in one place. Labels have no gradient here: where they do, each half is an operator of its own.

Where an anchor has but one positive, j, the log-sum-exp leaves that out as well, and

    log p_ij = log(1 / (1 + exp(lse_i - s_ij))).

Of all losses this one goes to zero when a model is trained; here neither it nor its gradient is a difference of large
numbers.

On backend "triton" kernels of both halves share what they can (`_linear_fused.py`), where they take the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genscl_loss import _linear_fused as in_kernels
from genscl_loss._backends import (
    diagonals,
    fake_row_lse,
    no_second_derivative,
    pure_row_lse,
    pure_row_lse_grad,
    scale_grad,
)
from genscl_loss._library import as_tensor, define_operator, only_once
from genscl_loss._likelihood import EPS, likelihood_grad, log_likelihood, loss_of
from genscl_loss._positives import ClassLabels, VectorLabels, align, align_grad, labelled, numbered_by_kernel
from genscl_loss._unit import unit_and_factor, unit_rows_grad


@dataclass(frozen=True)
class Options:
    """What else the operator is told; see `genscl_loss._backends.row_lse`."""

    self_offset: int | None
    partner: int | None  # contrast (i + partner) modulo M is all that anchor i has
    num_live: int | None  # contrasts that can have a gradient, the first ones; None: all
    normalize: bool
    is_probability: bool  # no contrast has a weight but zero or one: a loss below zero is then rounding
    precision: str
    backend: str


def losses(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor | float,
    weight: Tensor | None,
    all_labels: Sequence[ClassLabels | VectorLabels],
    options: Options,
) -> list[tuple[Tensor, Tensor]]:
    """-sum_j w_ij log p_ij / (W_i + EPS) and W_i of each anchor, for labels and, if there are two, for a teacher's.

    Args:
        anchors: (A, D), of any length if they are to be normalised.
        contrasts: (M, D); None: the anchors themselves.
        scale: One over the temperature; a 0-dim tensor if it may have a gradient.
        weight: Of each contrast, (M,), or None.
        all_labels: One or two.
        options: The rest.
    """
    all_labels = [_numbered(y, contrasts is None, options.backend) for y in all_labels]
    tensors = [
        x.detach() for y in all_labels for x in ((y.contrasts,) if contrasts is None else (y.anchors, y.contrasts))
    ]
    are_numbers = isinstance(all_labels[0], ClassLabels) and all_labels[0].are_numbers
    # Field by field: not all versions of the compiler know `dataclasses.astuple`.
    sizes = options.self_offset, options.partner, options.num_live
    rest = options.normalize, options.is_probability, options.precision, options.backend
    variable, known = (scale, None) if isinstance(scale, Tensor) else (None, scale)
    loss, mass, *_ = _linear(anchors, contrasts, variable, weight, tensors, known, are_numbers, *sizes, *rest)
    if len(all_labels) == 1:
        return [(loss.view(-1), mass.view(-1))]
    return list(zip(loss.unbind(), mass.unbind(), strict=True))


def _numbered(labels: ClassLabels | VectorLabels, are_contrasts: bool, backend: str) -> ClassLabels | VectorLabels:
    """Classes as numbers where that is of use: to tell what is not there, or once for both passes of the kernels."""
    if not isinstance(labels, ClassLabels):
        return labels
    if labels.there is not None:
        return labels.numbered()
    if backend != "triton" or labels.are_numbers:
        return labels
    return numbered_by_kernel(labels, are_contrasts)


def _kernel(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    labels: list[Tensor],
    known_scale: float | None,
    are_numbers: bool,
    self_offset: int | None,
    partner: int | None,
    num_live: int | None,
    normalize: bool,
    is_probability: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """Losses, masses and alignments, (1, A) or (2, A); then what `pure_row_lse_grad` or the kernels want."""
    scale = _tensor_of(scale, known_scale, anchors)
    if backend == "triton":
        all_labels = _label_pairs(labels, contrasts)
        if in_kernels.suits(anchors, contrasts, all_labels, self_offset, normalize):
            return in_kernels.losses(
                anchors, contrasts, scale, weight, all_labels, self_offset, precision, is_probability
            )
    z, others = (_unit(rows, normalize)[0] for rows in (anchors, contrasts))
    left_out = diagonals(self_offset, partner, len(z), len(z if others is None else others))
    lse, *kept = pure_row_lse(z, others, scale, weight, left_out, normalize, precision, backend)
    results = []
    for own in _labels(labels, contrasts, are_numbers):
        alignment, mass = align(labelled(z, others, own, self_offset))
        likelihood = log_likelihood(alignment, mass, lse.to(mass.dtype), scale)
        if partner is not None:
            likelihood = logsigmoid(likelihood)
        loss = loss_of(likelihood, mass, is_probability)
        results.append([x.to(z.dtype)[None] for x in (loss, mass, alignment)])
    found = results[0] if len(results) == 1 else [torch.cat(each) for each in zip(*results, strict=True)]
    return *found, *kept, _factors(anchors, contrasts, len(results), backend, normalize)


def _tensor_of(scale: Tensor | None, known: float | None, like: Tensor) -> Tensor:
    one_of_both = known if scale is None else scale
    assert one_of_both is not None
    return as_tensor(one_of_both, like)


def _factors(anchors: Tensor, contrasts: Tensor | None, num_labels: int, backend: str, normalize: bool) -> Tensor:
    """Room for what the kernels keep; none where they are not used."""
    if backend != "triton" or not normalize:
        return anchors.new_empty(0, dtype=torch.float64)
    num_contrasts = 0 if contrasts is None else contrasts.shape[0]
    count = in_kernels.num_factors(anchors.shape[0], num_contrasts, num_labels)
    return anchors.new_empty(count, dtype=torch.float64)


def _fake(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    labels: list[Tensor],
    known_scale: float | None,
    are_numbers: bool,
    self_offset: int | None,
    partner: int | None,
    num_live: int | None,
    normalize: bool,
    is_probability: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, ...]:
    num_labels = len(_label_pairs(labels, contrasts))
    each = [anchors.new_empty(num_labels, anchors.shape[0]) for _ in range(3)]
    kept = fake_row_lse(anchors, contrasts, precision, backend)[1:]
    return *each, *kept, _factors(anchors, contrasts, num_labels, backend, normalize)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    anchors, contrasts, scale, weight, labels, *ctx.options = inputs
    ctx.save_for_backward(anchors, contrasts, scale, weight, *output, *labels)
    ctx.num_outputs = len(output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    anchors, contrasts, scale, weight, *saved = ctx.saved_tensors
    kept, labels = saved[: ctx.num_outputs], saved[ctx.num_outputs :]
    wanted = list(ctx.needs_input_grad[:3])
    with torch.no_grad():
        results = _linear_grad(grad, anchors, contrasts, scale, weight, labels, kept, *ctx.options, wanted)
    message = no_second_derivative(ctx.options[-1])
    grads = [only_once(x, message, kept[0]) if want else None for x, want in zip(results, wanted, strict=True)]
    return *grads, *[None] * (len(ctx.needs_input_grad) - 3)


def _grad_kernel(
    grad: Tensor,
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    labels: list[Tensor],
    kept: list[Tensor],
    known_scale: float | None,
    are_numbers: bool,
    self_offset: int | None,
    partner: int | None,
    num_live: int | None,
    normalize: bool,
    is_probability: bool,
    precision: str,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of anchors, contrasts and scale; the latter two empty where not wanted."""
    loss, mass, alignment, *kept, _ = kept_of_both = kept
    scale = _tensor_of(scale, known_scale, anchors)
    if contrasts is None or not wanted[1]:
        num_live = 0
    elif num_live is None:
        num_live = len(contrasts)
    if backend == "triton":
        all_labels = _label_pairs(labels, contrasts)
        if in_kernels.suits(anchors, contrasts, all_labels, self_offset, normalize):
            d_z, d_others, found = in_kernels.losses_grad(
                grad, anchors, contrasts, scale, weight, all_labels, kept_of_both[1:], self_offset, num_live, wanted[2]
            )
            return d_z, _with_zeros(d_others, contrasts, anchors), scale.new_empty(0) if found is None else found
    grad = likelihood_grad(grad, mass)  # of a loss that is taken for what it is without rounding
    if partner is not None:
        grad.mul_(torch.expm1(loss * (-EPS - mass)).neg_())
    (z, factor), (others, other_factor) = (_unit(rows, normalize) for rows in (anchors, contrasts))
    left_out = diagonals(self_offset, partner, len(z), len(z if others is None else others))
    of_lse = (grad * mass).sum(0).neg_()
    d_z, d_others = pure_row_lse_grad(of_lse, kept, z, others, scale, weight, left_out, normalize, backend, num_live)
    d_scale = scale.new_empty(0)
    if wanted[2]:
        of_pairs = scale_grad(z, d_z, scale, is_self=others is None)
        d_scale = (of_pairs + (grad * alignment).sum()).to(scale.dtype)
    for u, own in zip(grad * scale, _labels(labels, contrasts, are_numbers), strict=True):
        given = labelled(z, others, own, self_offset)
        align_grad(u, None, given, (True, num_live > 0, False, False), onto=(d_z, d_others))
    if normalize:
        unit_rows_grad(d_z, z, factor)
        if d_others is not None:
            unit_rows_grad(d_others, others[:num_live], other_factor[:num_live])
    return d_z, _with_zeros(d_others, contrasts, anchors), d_scale


def _with_zeros(some: Tensor | None, contrasts: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of all contrasts from that of the first ones; empty if there is none."""
    if some is None or contrasts is None:
        return like.new_empty(0)
    if len(some) == len(contrasts):
        return some
    whole = torch.zeros_like(contrasts)
    whole[: len(some)] = some
    return whole


def _label_pairs(labels: list[Tensor], contrasts: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Labels of anchors and contrasts, and a teacher's, from a list of all; a self-contrast has one of each kind."""
    if contrasts is None:
        return [(a, None) for a in labels]
    return list(zip(labels[::2], labels[1::2], strict=True))


def _labels(labels: list[Tensor], contrasts: Tensor | None, are_numbers: bool) -> list[ClassLabels | VectorLabels]:
    """The same as labels."""
    pairs = ((a, a if b is None else b) for a, b in _label_pairs(labels, contrasts))
    return [ClassLabels(a, b, are_numbers) if a.dim() == 1 else VectorLabels(a, b) for a, b in pairs]


def _unit(rows: Tensor | None, normalize: bool) -> tuple[Any, Any]:
    """Rows of unit length, or as they are, contiguous, and what they were multiplied by."""
    if rows is None:
        return None, None
    unit, factor = unit_and_factor(rows, normalize)
    return unit.contiguous(), factor


def _grad_fake(
    grad: Tensor, anchors: Tensor, contrasts: Tensor | None, scale: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = rest[-1]
    d_contrasts = anchors.new_empty(contrasts.shape if contrasts is not None and wanted[1] else 0)
    d_scale = (anchors if scale is None else scale).new_empty(() if wanted[2] else 0)
    return anchors.new_empty(anchors.shape), d_contrasts, d_scale


_OPTIONS = "float? known_scale, bool are_numbers, SymInt? self_offset, SymInt? partner, SymInt? num_live"
_OPTIONS += ", bool normalize, bool is_probability, str precision, str backend"
_linear = define_operator(
    "linear",
    "(Tensor anchors, Tensor? contrasts, Tensor? scale, Tensor? weight, Tensor[] labels, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_linear_grad = define_operator(
    "linear_grad",
    "(Tensor grad, Tensor anchors, Tensor? contrasts, Tensor? scale, Tensor? weight, Tensor[] labels, Tensor[] kept, "
    f"{_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    kernel=_grad_kernel,
    fake=_grad_fake,
)
