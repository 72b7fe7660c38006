"""Both halves of the loss in one operator, in memory that is linear in the number of rows.

With the alignment and the positive mass of `_positives` and the log-sum-exp of `_backends`,

    sum_j w_ij log p_ij = alignment_i / tau - W_i lse_i.

Rows are scaled to unit length inside. A backward pass scales them again instead of having kept them, and adds the
gradients of both halves in one place. Labels have no gradient here: where they do, each half is an operator of its own.

Where an anchor has but one positive, j, the log-sum-exp leaves that out as well, and

    log p_ij = log(1 / (1 + exp(lse_i - s_ij))).

Of all losses this one goes to zero when a model is trained; here neither it nor its gradient is a difference of large
numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genscl_loss._backends.operator import fake_pairs, no_second_derivative, pairs, pairs_grad
from genscl_loss._library import define_operator, only_once
from genscl_loss._positives import ClassLabels, VectorLabels, align, align_grad, labelled
from genscl_loss._unit import inverse_lengths, unit_rows_grad


@dataclass(frozen=True)
class Options:
    """What else the operator is told; see `genscl_loss._backends.row_lse`."""

    self_offset: int | None
    partner: int | None  # contrast (i + partner) modulo M is all that anchor i has
    num_live: int | None  # contrasts that can have a gradient, the first ones; None: all
    normalize: bool
    precision: str
    backend: str


def log_likelihoods(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    all_labels: Sequence[ClassLabels | VectorLabels],
    options: Options,
) -> list[tuple[Tensor, Tensor]]:
    """sum_j w_ij log p_ij and W_i of each anchor, for labels and, if there are two, for a teacher's.

    Args:
        anchors: (A, D), of any length if they are to be normalised.
        contrasts: (M, D); None: the anchors themselves.
        scale: 0-dim, one over the temperature.
        weight: Of each contrast, (M,), or None.
        all_labels: One or two.
        options: The rest.
    """
    both: list[Tensor | None] = [None] * 4
    all_labels = [y.numbered() if isinstance(y, ClassLabels) and y.there is not None else y for y in all_labels]
    for k, labels in enumerate(all_labels):
        a, b = labels.anchors.detach(), labels.contrasts.detach()
        both[2 * k : 2 * k + 2] = [b, None] if contrasts is None else [a, b]
    are_numbers = isinstance(all_labels[0], ClassLabels) and all_labels[0].are_numbers
    # Field by field: not all versions of the compiler know `dataclasses.astuple`.
    rest = options.self_offset, options.partner, options.num_live, options.normalize, options.precision, options.backend
    likelihood, mass, *_ = _linear(anchors, contrasts, scale, weight, *both, are_numbers, *rest)
    return list(zip(likelihood.unbind(), mass.unbind(), strict=True))


def _kernel(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    teacher_a: Tensor | None,
    teacher_b: Tensor | None,
    are_numbers: bool,
    self_offset: int | None,
    partner: int | None,
    num_live: int | None,
    normalize: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, ...]:
    """Log-likelihoods, masses and alignments, (1, A) or (2, A); then what `pairs_grad` wants."""
    z, others = (_unit(rows, normalize)[0] for rows in (anchors, contrasts))
    lse, *kept = pairs(z, others, scale, weight, self_offset, partner, normalize, precision, backend)
    results = []
    for labels in _labels(a, b, teacher_a, teacher_b, are_numbers=are_numbers):
        alignment, mass = align(labelled(z, others, labels, self_offset))
        likelihood = torch.addcmul(alignment * scale, mass, lse.to(mass.dtype), value=-1)
        if partner is not None:
            likelihood = logsigmoid(likelihood)
        results.append([x.to(z.dtype)[None] for x in (likelihood, mass, alignment)])
    found = results[0] if len(results) == 1 else [torch.cat(each) for each in zip(*results, strict=True)]
    return *found, *kept


def _fake(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    teacher_a: Tensor | None,
    teacher_b: Tensor | None,
    are_numbers: bool,
    self_offset: int | None,
    partner: int | None,
    num_live: int | None,
    normalize: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, ...]:
    each = [anchors.new_empty(1 if teacher_a is None else 2, anchors.shape[0]) for _ in range(3)]
    return *each, *fake_pairs(anchors, contrasts, precision, backend)[1:]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    anchors, contrasts, scale, weight, a, b, teacher_a, teacher_b, *ctx.options = inputs
    ctx.save_for_backward(anchors, contrasts, scale, weight, a, b, teacher_a, teacher_b, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    anchors, contrasts, scale, weight, *saved = ctx.saved_tensors
    labels, kept = saved[:4], saved[4:]
    wanted = list(ctx.needs_input_grad[:3])
    with torch.no_grad():
        results = _linear_grad(grad, anchors, contrasts, scale, weight, labels, kept, *ctx.options, wanted)
    message = no_second_derivative(ctx.options[-1])
    grads = [only_once(x, message, kept[0]) if want else None for x, want in zip(results, wanted, strict=True)]
    return *grads, *[None] * 12


def _grad_kernel(
    grad: Tensor,
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    labels: list[Tensor | None],
    kept: list[Tensor],
    are_numbers: bool,
    self_offset: int | None,
    partner: int | None,
    num_live: int | None,
    normalize: bool,
    precision: str,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of anchors, contrasts and scale; empty where not wanted."""
    likelihood, mass, alignment, *kept = kept
    if partner is not None:
        grad = grad * torch.expm1(likelihood).neg_()
    (z, factor), (others, other_factor) = (_unit(rows, normalize) for rows in (anchors, contrasts))
    live = 0 if contrasts is None or not wanted[1] else len(contrasts) if num_live is None else num_live
    d_z, d_others = pairs_grad(
        (grad * mass).sum(0).neg_(), kept, z, others, scale, weight, self_offset, partner, normalize, backend, live
    )
    d_scale = scale.new_empty(0)
    if wanted[2]:
        # The log-sum-exp depends on scale through scale * z only; in a self-contrast d_z holds both sides: count half.
        of_pairs = (z * d_z).sum() / (2 * scale if others is None else scale)
        d_scale = (of_pairs + (grad * alignment).sum()).to(scale.dtype)
    for u, own in zip(grad * scale, _labels(*labels, are_numbers=are_numbers), strict=True):
        given = labelled(z, others, own, self_offset)
        align_grad(u, None, given, (True, live > 0, False, False), onto=(d_z, d_others))
    if normalize:
        unit_rows_grad(d_z, anchors, factor)
        if contrasts is not None and d_others is not None:
            unit_rows_grad(d_others, contrasts[:live], other_factor[:live])
    if d_others is None or contrasts is None:
        return d_z, anchors.new_empty(0), d_scale
    if live < len(contrasts):
        some, d_others = d_others, torch.zeros_like(contrasts)
        d_others[:live] = some
    return d_z, d_others, d_scale


def _labels(*both: Tensor | None, are_numbers: bool) -> list[ClassLabels | VectorLabels]:
    """Labels, and a teacher's, from those of anchors and contrasts each."""
    pairs = ((a, a if b is None else b) for a, b in zip(both[::2], both[1::2], strict=True) if a is not None)
    return [ClassLabels(a, b, are_numbers) if a.dim() == 1 else VectorLabels(a, b) for a, b in pairs]


def _unit(rows: Tensor | None, normalize: bool) -> tuple[Any, Any]:
    """Rows of unit length, or as they are, and what they were multiplied by."""
    if rows is None or not normalize:
        return rows if rows is None else rows.contiguous(), None
    factor = inverse_lengths(rows.detach())
    return (rows * factor).contiguous(), factor


def _grad_fake(
    grad: Tensor, anchors: Tensor, contrasts: Tensor | None, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = rest[-1]
    d_contrasts = anchors.new_empty(contrasts.shape if contrasts is not None and wanted[1] else 0)
    return anchors.new_empty(anchors.shape), d_contrasts, scale.new_empty(() if wanted[2] else 0)


_OPTIONS = "bool are_numbers, SymInt? self_offset, SymInt? partner, SymInt? num_live, bool normalize"
_OPTIONS += ", str precision, str backend"
_linear = define_operator(
    "linear",
    "(Tensor anchors, Tensor? contrasts, Tensor scale, Tensor? weight, Tensor a, Tensor? b, Tensor? teacher_a, "
    "Tensor? teacher_b, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_linear_grad = define_operator(
    "linear_grad",
    "(Tensor grad, Tensor anchors, Tensor? contrasts, Tensor scale, Tensor? weight, Tensor?[] labels, Tensor[] kept, "
    f"{_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    kernel=_grad_kernel,
    fake=_grad_fake,
)
