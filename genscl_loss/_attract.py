"""The label-weighted half of the loss: what pulls each anchor towards its positives, in O(N (C + 1) D) time and memory.

For label similarity w, positives p_i and positive mass W_i are

    p_i = sum_{j != i} w_ij z_j,    W_i = sum_{j != i} w_ij.

Labels come in three kinds, each with its own sum; only explicit weights are N x N, as their owner made them. Each sum
is multilinear, and its derivatives are the same sum with the arguments in other places: differentiable as often as
wanted.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genscl_loss._library import define_operator, has_fast_float64, matmul

_CHUNK = 2**18  # float64 elements (2 MiB) that a sum holds beyond its arguments and result
_BLOCK = 128  # rows whose mutual similarities are formed where float64 is slow


class ClassLabels(NamedTuple):
    """Class numbers, w_ij = [anchors_i == contrasts_j]: (A,) and (M,), integers in [0, A + M)."""

    anchors: Tensor
    contrasts: Tensor


class VectorLabels(NamedTuple):
    """Unit label vectors, w_ij = anchors_i . contrasts_j: (A, C) and (M, C)."""

    anchors: Tensor
    contrasts: Tensor


class Similarity(NamedTuple):
    """The weights themselves: (A, M)."""

    weights: Tensor


Labels = ClassLabels | VectorLabels | Similarity


def similarity_matrix(labels: Labels, self_offset: int | None, dtype: torch.dtype) -> Tensor:
    """w, (A, M), with zeros in the self terms."""
    if isinstance(labels, ClassLabels):
        weights = (labels.anchors[:, None] == labels.contrasts).to(dtype)
    elif isinstance(labels, VectorLabels):
        weights = matmul(labels.anchors, labels.contrasts.T).to(dtype)
    else:
        weights = labels.weights.to(dtype, copy=True)
    if self_offset is not None:
        weights.diagonal(self_offset).zero_()
    return weights


def attract(anchors: Tensor, contrasts: Tensor, labels: Labels, self_offset: int | None) -> tuple[Tensor, Tensor]:
    """How similar each anchor is to its positives, and how many it has.

    Args:
        anchors: (A, D).
        contrasts: (M, D).
        labels: What makes positives.
        self_offset: anchor i is contrast i + self_offset and not its own positive; None if no anchor is a contrast.

    Returns:
        z_i . p_i and W_i, both (A,).
    """
    if isinstance(labels, ClassLabels):
        positives, mass = _class_sum(labels.anchors, labels.contrasts, contrasts, self_offset)
    elif isinstance(labels, VectorLabels):
        positives, mass = _vector_sum(labels.anchors, labels.contrasts, contrasts, self_offset)
    else:
        weights = similarity_matrix(labels, self_offset, contrasts.dtype)
        positives, mass = matmul(weights, contrasts), weights.sum(1)
    if not any(tensor.requires_grad for tensor in labels):
        mass = mass.detach()  # spares the usual case a dozen small operations in the backward pass
    return (anchors * positives).sum(1), mass


def _reverse(self_offset: int | None) -> int | None:
    return None if self_offset is None else -self_offset


def _self_rows(num_anchors: int, num_contrasts: int, self_offset: int | None) -> tuple[slice, slice]:
    """Rows of anchors that are contrasts, and rows of contrasts that they are."""
    if self_offset is None:
        return slice(0, 0), slice(0, 0)
    first = max(0, -self_offset)
    stop = max(first, min(num_anchors, num_contrasts - self_offset))
    return slice(first, stop), slice(first + self_offset, stop + self_offset)


def _chunks(num_rows: int, row_size: int, device: torch.device) -> Iterator[slice]:
    """Rows a few at a time on CPU, where chunks stay in cache; all at once elsewhere, where launches cost more."""
    step = max(1, _CHUNK // row_size) if device.type == "cpu" else num_rows
    for first in range(0, num_rows, max(1, step)):
        yield slice(first, min(first + step, num_rows))


# Label vectors: p_i = sum_j (a_i . b_j) x_j = (B^T X)^T a_i and W_i = (B^T 1) . a_i, less the self term.


def _vector_sum_kernel(a: Tensor, b: Tensor, x: Tensor, self_offset: int | None) -> tuple[Tensor, Tensor]:
    summands = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)  # the mass comes out beside the positives
    compute = _vector_sum_float64 if has_fast_float64(x.device) else _vector_sum_blocks
    sums = compute(a, b, summands, self_offset)
    return sums[:, :-1].contiguous(), sums[:, -1].contiguous()


def _vector_sum_float64(a: Tensor, b: Tensor, x: Tensor, self_offset: int | None) -> Tensor:
    """Over all contrasts, then without the self term.

    In float64, because for sharp labels of many classes almost nothing is left after the subtraction: in float32 what
    is left is rounding error (up to 3e2 in the loss).
    """
    total = x.new_zeros(b.shape[1], x.shape[1], dtype=torch.float64)
    row_size = b.shape[1] + x.shape[1]
    for rows in _chunks(b.shape[0], row_size, x.device):
        total.addmm_(b[rows].double().T, x[rows].double())
    out = x.new_empty(a.shape[0], x.shape[1])
    selves, own = _self_rows(a.shape[0], b.shape[0], self_offset)
    for rows in _chunks(a.shape[0], row_size, x.device):
        left = a[rows].double()
        sums = left @ total
        first, stop = max(rows.start, selves.start), min(rows.stop, selves.stop)
        if first < stop:
            here = slice(first - rows.start, stop - rows.start)
            there = slice(first - selves.start + own.start, stop - selves.start + own.start)
            weight = (left[here] * b[there]).sum(1, keepdim=True)
            sums[here].addcmul_(weight, x[there].double(), value=-1)
        out[rows] = sums
    return out


def _vector_sum_blocks(a: Tensor, b: Tensor, x: Tensor, self_offset: int | None) -> Tensor:
    """Without subtracting anything, so that float32 suffices.

    All other blocks of contrasts enter through their sums, the block that holds the self term through its similarities,
    with a zero in the self place. Memory (M / block) C D.
    """
    (m, c), d, dtype = b.shape, x.shape[1], x.dtype
    a, b = a.to(dtype), b.to(dtype)
    pad = -m % _BLOCK
    b_blocks = torch.nn.functional.pad(b, (0, 0, 0, pad)).view(-1, _BLOCK, c)
    x_blocks = torch.nn.functional.pad(x, (0, 0, 0, pad)).view(-1, _BLOCK, d)
    blocks = b_blocks.transpose(1, 2) @ x_blocks
    out = a @ blocks.sum(0)
    selves, own = _self_rows(a.shape[0], m, self_offset)
    if selves.start == selves.stop:
        return out
    none = torch.zeros_like(blocks[:1])
    # Exclusive prefix sums plus exclusive suffix sums: for each block the sum of all others.
    others = torch.cat([none, blocks[:-1].cumsum(0)]) + torch.cat([blocks[1:].flip(0).cumsum(0).flip(0), none])
    left = a.new_zeros(m + pad, c)  # anchors laid out as the contrasts that they are: anchor and self share a block
    left[own] = a[selves]
    left = left.view(-1, _BLOCK, c)
    inside = left @ b_blocks.transpose(1, 2)
    inside.diagonal(dim1=1, dim2=2).zero_()
    out[selves] = (left @ others + inside @ x_blocks).view(-1, d)[own]
    return out


def _vector_sum_derivative(ctx: Any, grad: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, x = ctx.saved_tensors
    reverse = _reverse(ctx.self_offset)
    need_a, need_b, need_x, _ = ctx.needs_input_grad
    if grad is None:
        grad = x.new_zeros(a.shape[0], x.shape[1])
    d_a = d_b = None
    if need_a or need_b:  # p and W together are one sum of x with a last column of ones
        ones = x.new_ones(x.shape[0], 1)
        grad_ones = x.new_zeros(a.shape[0]) if grad_mass is None else grad_mass
        left, right = torch.cat([grad, grad_ones[:, None]], 1), torch.cat([x, ones], 1)
        d_a = _vector_sum(left, right, b, ctx.self_offset)[0] if need_a else None
        d_b = _vector_sum(right, left, a, reverse)[0] if need_b else None
    return d_a, d_b, _vector_sum(b, a, grad, reverse)[0] if need_x else None, None


# Classes: sums and counts by class, less the self term.


def _class_sum_kernel(a: Tensor, b: Tensor, x: Tensor, self_offset: int | None) -> tuple[Tensor, Tensor]:
    # In float64 sums over large classes stay exact; counts are exact in either.
    dtype = torch.float64 if has_fast_float64(x.device) else x.dtype
    summands = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)
    # One row for each class; off the CPU, where counting them would wait, one for each class that there could be.
    num_classes = 1 + max(int(a.max()), int(b.max())) if a.device.type == "cpu" else a.shape[0] + b.shape[0]
    total = x.new_zeros(num_classes, summands.shape[1], dtype=dtype)
    for rows in _chunks(b.shape[0], x.shape[1], x.device):
        _add_rows(total, b[rows], summands[rows].to(dtype))
    sums = x.new_empty(a.shape[0], summands.shape[1])
    for rows in _chunks(a.shape[0], x.shape[1], x.device):
        sums[rows] = total.index_select(0, a[rows]).to(x.dtype)
    selves, own = _self_rows(a.shape[0], b.shape[0], self_offset)
    sums[selves] -= summands[own] * (a[selves] == b[own])[:, None]
    return sums[:, :-1].contiguous(), sums[:, -1].contiguous()


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows, in an order that does not vary from run to run."""
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)  # sorts; index_add_ uses atomics there
    else:
        total.index_add_(0, index, rows)


def _class_sum_derivative(ctx: Any, grad: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, _ = ctx.saved_tensors
    return None, None, None if grad is None else _class_sum(b, a, grad, _reverse(ctx.self_offset))[0], None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, x, ctx.self_offset = inputs
    ctx.save_for_backward(a, b, x)
    ctx.set_materialize_grads(False)


def _empty_sum(a: Tensor, b: Tensor, x: Tensor, self_offset: int | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(a.shape[0], x.shape[1]), x.new_empty(a.shape[0])


_vector_sum = define_operator(
    "vector_sum",
    "(Tensor a, Tensor b, Tensor x, SymInt? self_offset) -> (Tensor, Tensor)",
    kernel=_vector_sum_kernel,
    fake=_empty_sum,
    setup_context=_save_sum,
    backward=_vector_sum_derivative,
)
_class_sum = define_operator(
    "class_sum",
    "(Tensor a, Tensor b, Tensor x, SymInt? self_offset) -> (Tensor, Tensor)",
    kernel=_class_sum_kernel,
    fake=_empty_sum,
    setup_context=_save_sum,
    backward=_class_sum_derivative,
)
