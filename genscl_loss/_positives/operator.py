"""Alignment and positive mass as an operator of torch, and its derivative."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genscl_loss._library import define_operator, matmul, on_device, only_once, without_autocast
from genscl_loss._positives import fused
from genscl_loss._positives.alignment import Labelled, align, align_grad
from genscl_loss._positives.labels import (
    ClassLabels,
    Labels,
    Similarity,
    VectorLabels,
    class_numbers,
    has_gradient,
    similarity_matrix,
)

_ONCE = 'only backend="dense" can be differentiated twice; pass backend="dense" for that'


def positives(
    anchors: Tensor, contrasts: Tensor | None, labels: Labels, self_offset: int | None
) -> tuple[Tensor, Tensor]:
    """Alignment and positive mass of each anchor.

    Args:
        anchors: (A, D), of unit length if similarity is to be the cosine.
        contrasts: (M, D); None: the anchors themselves, each but for itself.
        labels: What makes positives.
        self_offset: anchor i is contrast i + self_offset and not its own positive; None if no anchor is a contrast.

    Returns:
        z_i . sum_j w_ij z_j and sum_j w_ij, (A,) and (A,).
    """
    if isinstance(labels, Similarity):
        others = anchors if contrasts is None else contrasts
        weights = similarity_matrix(labels, self_offset, anchors.dtype)
        return (anchors * matmul(weights, others)).sum(1), weights.sum(1)
    given = labelled(anchors, contrasts, labels, self_offset)
    a, b = given.anchor_labels, given.contrast_labels
    alignment, mass = _positives(anchors, contrasts, a, b, self_offset)
    return alignment, mass if has_gradient(labels) else mass.detach()  # spares the backward pass a few small operations


def labelled(
    anchors: Tensor, contrasts: Tensor | None, labels: ClassLabels | VectorLabels, self_offset: int | None
) -> Labelled:
    """Rows with labels as the pure functions want them."""
    a, b = labels if isinstance(labels, VectorLabels) else class_numbers(labels)
    if contrasts is None:  # those of contrasts say which are not there
        return Labelled(anchors, None, b, None, self_offset)
    return Labelled(anchors, contrasts, a, b, self_offset)


def _kernel(
    anchors: Tensor, contrasts: Tensor | None, a: Tensor, b: Tensor | None, self_offset: int | None
) -> tuple[Tensor, Tensor]:
    alignment, mass = align(Labelled(anchors, contrasts, a, b, self_offset))
    return alignment.to(anchors.dtype), mass.to(anchors.dtype)


def _fake(anchors: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    per_anchor = anchors.new_empty(anchors.shape[0])
    return per_anchor, torch.empty_like(per_anchor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.self_offset = inputs
    ctx.save_for_backward(*tensors, output[0])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
    anchors, *others, alignment = ctx.saved_tensors
    if u is None:
        u = anchors.new_zeros(anchors.shape[0])
    wanted = list(ctx.needs_input_grad[:4])
    with torch.no_grad():
        results = _positives_grad(u, v, anchors, *others, ctx.self_offset, wanted)
    grads = (only_once(x, _ONCE, alignment) if want else None for x, want in zip(results, wanted, strict=True))
    return *grads, None


def _grad_kernel(
    u: Tensor,
    v: Tensor | None,
    anchors: Tensor,
    contrasts: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    self_offset: int | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of anchors, contrasts and their labels; empty where not wanted."""
    grads = align_grad(u, v, Labelled(anchors, contrasts, a, b, self_offset), wanted)
    return tuple(u.new_empty(0) if grad is None else grad for grad in grads)


def _grad_fake(u: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    given = zip(rest[:4], rest[-1], strict=True)
    return tuple(u.new_empty(0) if x is None or not want else x.new_empty(x.shape) for x, want in given)


_ARGUMENTS = "Tensor anchors, Tensor? contrasts, Tensor a, Tensor? b, SymInt? self_offset"
_positives = define_operator(
    "positives",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_positives_grad = define_operator(
    "positives_grad",
    f"(Tensor u, Tensor? v, {_ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_grad_kernel,
    fake=_grad_fake,
)


# ---- Class numbers for kernels ----


def numbered_by_kernel(classes: ClassLabels, are_contrasts: bool) -> ClassLabels:
    """Classes as numbers of a kernel that compares them; `are_contrasts`: the anchors are the contrasts."""
    a, b = _class_numbers(classes.anchors, None if are_contrasts else classes.contrasts)
    return ClassLabels(a, a if are_contrasts else b, are_numbers=True)


def _class_numbers_kernel(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    with on_device(a.device):
        numbers = fused.class_numbers(a, b)
    left, right = class_numbers(ClassLabels(a, a if b is None else b)) if numbers is None else numbers
    return left, left.new_empty(0) if b is None or right is None else right


def _class_numbers_fake(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    sizes = (a.shape[0], 0 if b is None else b.shape[0])
    left, right = (a.new_empty(size, dtype=torch.int64) for size in sizes)
    return left, right


_class_numbers = define_operator(
    "class_numbers",
    "(Tensor a, Tensor? b) -> (Tensor, Tensor)",
    kernel=_class_numbers_kernel,
    fake=_class_numbers_fake,
)


# ---- Contrasts that are anchors of other processes ----


def mirrored_positives(
    rows: Tensor, every: Tensor, classes: ClassLabels, self_offset: int, share: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`positives` of some rows among all rows; the arguments are those of `genscl_loss._backends.mirrored_row_lse`.

    The gradient is that of the sum over all owners.
    """
    given = labelled(rows, every, classes, self_offset)
    alignment, mass = _MirroredPositives.apply(rows, given, share)  # type: ignore[no-untyped-call]
    return alignment, mass


class _MirroredPositives(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, given: Labelled, share: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with without_autocast(anchors.device):
            alignment, mass = (x.to(anchors.dtype) for x in align(given))
        ctx.save_for_backward(anchors, given.contrasts, *given.labels, alignment)
        ctx.self_offset, ctx.share = given.self_offset, share
        ctx.mark_non_differentiable(mass)
        return alignment, mass

    @staticmethod
    def backward(ctx: Any, u: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        anchors, every, a, b, alignment = ctx.saved_tensors
        with torch.no_grad(), without_autocast(u.device):
            given = Labelled(anchors, every, a, b, ctx.self_offset)
            all_u = ctx.share(u[:, None])[:, 0]
            grads = align_grad(u, None, given, (True, False, False, False), all_u=all_u)
        message = f"with group, {_ONCE}"
        return None if grads[0] is None else only_once(grads[0], message, alignment), None, None
