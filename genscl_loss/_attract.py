"""The label-weighted half of the loss: what pulls each anchor towards its positives, in O(N (C + 1) D) time.

For rows z_i, label similarity w, positives p_i and positive mass W_i are

    p_i = sum_{j != i} w_ij z_j,    W_i = sum_{j != i} w_ij,

and the loss needs z_i . p_i and W_i. Labels come in three kinds; only explicit weights are N x N, as their owner made
them. For the two others all that is linear in the loss is one operator, normalisation included: features and labels go
in, z, z . p and W come out. It keeps nothing but what it was given, holds p a few rows at a time, and its gradient
takes that of z along: no two gradients of the size of the batch exist to be added.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genscl_loss._library import define_operator, has_fast_float64, matmul, only_once
from genscl_loss._unit import inverse_lengths, unit_pair, unit_rows

_CHUNK = 2**16  # elements of a part of p on CPU, where it stays in cache (512 KiB)
_CHUNK_ELSEWHERE = 2**20  # where launches cost more (8 MiB)
_BLOCK = 128  # rows whose mutual similarities are formed where float64 is slow
_ALL = slice(None)


class ClassLabels(NamedTuple):
    """Classes, w_ij = [anchors_i == contrasts_j]: (A,) and (M,)."""

    anchors: Tensor
    contrasts: Tensor
    are_numbers: bool = False  # integers in [0, A + M), not just anything that can be compared


class VectorLabels(NamedTuple):
    """Label vectors, w_ij = anchors_i . contrasts_j / |anchors_i| |contrasts_j|: (A, C) and (M, C)."""

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
        left = unit_rows(labels.anchors)
        right = left if labels.contrasts is labels.anchors else unit_rows(labels.contrasts)
        weights = matmul(left, right.T).to(dtype)
    else:
        weights = labels.weights.to(dtype, copy=True)
    if self_offset is not None:
        weights.diagonal(self_offset).zero_()
    return weights


class Pull(NamedTuple):
    """Unit rows, how similar each anchor is to its positives, and how many it has."""

    anchors: Tensor  # (A, D)
    contrasts: Tensor | None  # (M, D)
    attraction: Tensor  # z_i . p_i, (A,)
    mass: Tensor  # W_i, (A,)


def attract(
    anchors: Tensor, contrasts: Tensor | None, labels: Labels, self_offset: int | None, *, normalize: bool
) -> Pull:
    """Normalise, and compare each anchor with its positives.

    Args:
        anchors: (A, D).
        contrasts: (M, D); None: the anchors themselves, each but for itself.
        labels: What makes positives.
        self_offset: anchor i is contrast i + self_offset and not its own positive; None if no anchor is a contrast.
        normalize: Whether rows are to be scaled to unit length.
    """
    if isinstance(labels, Similarity):
        z, others = unit_pair(anchors, contrasts, normalize)
        weights = similarity_matrix(labels, self_offset, z.dtype)
        return Pull(z, others, (z * matmul(weights, z if others is None else others)).sum(1), weights.sum(1))
    a, b = labels if isinstance(labels, VectorLabels) else _class_numbers(labels)
    right = None if contrasts is None else b
    factors = [_factor(x) if normalize else None for x in (anchors, contrasts)] + [_factor(y) for y in (a, right)]
    z, copy, attraction, mass = _attract(anchors, contrasts, a, right, *factors, self_offset)
    if a.requires_grad or b.requires_grad:  # rows apart from labels: no derivative of labels then passes through rows
        return Pull(*unit_pair(anchors, contrasts, normalize), attraction, mass)
    others = None if contrasts is None else copy
    return Pull(z, others, attraction, mass.detach())  # spares the backward pass a few small operations


def mirrored_attract(
    rows: Tensor, every: Tensor, classes: ClassLabels, self_offset: int, share: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`attract` of some rows among all rows; the arguments are those of `genscl_loss._backends.mirrored_row_lse`.

    Returns:
        z . p and W. The gradient is that of the sum over all owners.
    """
    attraction, mass = _MirroredAttraction.apply(rows, every, *_class_numbers(classes), self_offset, share)  # type: ignore[no-untyped-call]
    return attraction, mass


def _factor(rows: Tensor | None) -> Tensor | None:
    """What makes rows unit rows; class numbers have none. The operator knows its derivative."""
    return None if rows is None or rows.dim() == 1 else inverse_lengths(rows.detach())


def _class_numbers(labels: ClassLabels) -> tuple[Tensor, Tensor]:
    """Number the classes from zero. By sorting: `torch.unique` would make the host wait for a device."""
    a, b, are_numbers = labels
    if are_numbers:
        return a, b
    values, order = (a if a is b else torch.cat([a, b])).sort()
    number = torch.zeros_like(order).scatter_(0, order[1:], (values[1:] != values[:-1]).cumsum(0))
    return number[: a.shape[0]], number[number.shape[0] - b.shape[0] :]


# ---- p, a part at a time ----

Entries = Callable[[slice, slice], Tensor]  # some rows and columns of a matrix that need not exist as a whole


class _Side(NamedTuple):
    """Labels of all anchors or all contrasts: vectors, or class numbers, which stand for one-hot vectors."""

    entries: Entries  # (size, width), or (size,) for class numbers, whatever the columns asked for
    size: int
    width: int
    device: torch.device
    are_classes: bool = False
    may_subtract: bool = True  # whether sums have digits to spare


def _sides(
    a: Tensor, b: Tensor | None, a_factor: Tensor | None, b_factor: Tensor | None, rows: Tensor
) -> tuple[_Side, _Side]:
    """Labels of anchors and contrasts, as the sums of such rows want them."""
    dtype = _sum_dtype(rows)
    spare = dtype != rows.dtype
    given = [(a, a_factor)] if b is None else [(a, a_factor), (b, b_factor)]
    if a.dim() == 2:
        sides = [
            _Side(_entries(y, factor, dtype), y.shape[0], y.shape[1], y.device, may_subtract=spare)
            for y, factor in given
        ]
        return sides[0], sides[-1]
    # One more than the largest; off the CPU, where reading it would wait, as many as there could be.
    if a.device.type == "cpu":
        width = 1 + max(int(y.max()) if len(y) else 0 for y, _ in given)
    else:
        width = sum(len(y) for y, _ in given)
    sides = [_Side(lambda rows, _, y=y: y[rows], len(y), width, y.device, are_classes=True) for y, _ in given]  # type: ignore[misc]
    return sides[0], sides[-1]


def _entries(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Entries:
    """Rows of x, (n, d), multiplied by a factor of each if there is one, (n, 1)."""
    if factor is None:
        return _remember(lambda rows, cols: x[rows, cols].to(dtype))
    factor = factor.to(dtype)
    return _remember(lambda rows, cols: (x[rows, cols] * factor[rows]).to(dtype))


def _remember(make: Entries) -> Entries:
    """The same entries, but not made again if asked for twice in a row."""
    last: list[Any] = [None, None]

    def entries(rows: slice, cols: slice) -> Tensor:
        if last[0] != (rows, cols):
            last[1] = None  # its memory is free for the next
            last[:] = (rows, cols), make(rows, cols)
        result: Tensor = last[1]
        return result

    return entries


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if has_fast_float64(x.device) else x.dtype


def _sums(
    a: _Side, b: _Side, x: Entries, num_columns: int, self_offset: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, cols, sums), parts of sum_{j != i} w_ij x_j over contrasts j, for all anchors i.

    That is a_i^T (sum_j b_j x_j^T) less the self term. For sharp labels of many classes almost nothing is left after
    the subtraction, in float32 nothing but rounding error (up to 3e2 in the loss): it is done in float64, and for rows
    of float64, or where that is slow, not at all.
    """
    if not b.are_classes and not b.may_subtract:
        all_a, all_b = slice(0, a.size), slice(0, b.size)
        yield all_a, _ALL, _sums_by_blocks(a.entries(all_a, _ALL), b.entries(all_b, _ALL), x(all_b, _ALL), self_offset)
        return
    # There may be as many classes as rows: then a few columns at a time.
    for cols in _slices(num_columns, _chunk(b.width, b.device) if b.are_classes else num_columns):
        step = _chunk(cols.stop - cols.start + (0 if b.are_classes else b.width), b.device)
        for rows in _slices(b.size, step):
            part = x(rows, cols)
            if rows.start == 0:
                total = part.new_zeros(b.width, part.shape[1])
            _add_by_label(total, b.entries(rows, _ALL), part)
        for rows in _slices(a.size, step):
            left = a.entries(rows, _ALL)
            sums = total.index_select(0, left) if b.are_classes else left @ total
            selves, own = _self_rows(rows, b.size, self_offset)
            if own.start < own.stop:
                left, right = left[selves], b.entries(own, _ALL)
                weight = (left == right)[:, None] if b.are_classes else (left * right).sum(1, keepdim=True)
                sums[selves].addcmul_(weight, x(own, cols), value=-1)
            yield rows, cols, sums


def _chunk(size: int, device: torch.device) -> int:
    """Rows of this size that make a chunk."""
    return max(1, (_CHUNK if device.type == "cpu" else _CHUNK_ELSEWHERE) // size)


def _slices(size: int, step: int) -> Iterator[slice]:
    """At least one slice, which may be empty."""
    for first in range(0, max(1, size), step):
        yield slice(first, min(first + step, size))


def _add_by_label(total: Tensor, labels: Tensor, rows: Tensor) -> None:
    """Add labels^T rows to total, in an order that does not vary from run to run."""
    if labels.dim() == 2:
        total.addmm_(labels.T, rows)
    elif total.is_cuda:
        total.index_put_((labels,), rows, accumulate=True)  # sorts; index_add_ uses atomics there
    else:
        total.index_add_(0, labels, rows)


def _self_rows(rows: slice, num_contrasts: int, self_offset: int | None) -> tuple[slice, slice]:
    """Which of some anchors are contrasts, counted from the first of them, and which contrasts they are."""
    if self_offset is None:
        return slice(0, 0), slice(0, 0)
    first = max(rows.start, -self_offset)
    stop = max(first, min(rows.stop, num_contrasts - self_offset))
    return slice(first - rows.start, stop - rows.start), slice(first + self_offset, stop + self_offset)


def _sums_by_blocks(a: Tensor, b: Tensor, x: Tensor, self_offset: int | None) -> Tensor:
    """sum_{j != i} (a_i . b_j) x_j without subtracting anything, so that float32 suffices.

    All other blocks of contrasts enter through their sums, the block that holds the self term through its similarities,
    with a zero in the self place. Memory (M / block) C D.
    """
    (m, c), d = b.shape, x.shape[1]
    pad = -m % _BLOCK
    b_blocks = torch.nn.functional.pad(b, (0, 0, 0, pad)).view(-1, _BLOCK, c)
    x_blocks = torch.nn.functional.pad(x, (0, 0, 0, pad)).view(-1, _BLOCK, d)
    blocks = b_blocks.transpose(1, 2) @ x_blocks
    out = a @ blocks.sum(0)
    selves, own = _self_rows(slice(0, a.shape[0]), m, self_offset)
    if selves.start == selves.stop:
        return out
    # For each block the sum of all others. A product, because sums along a dimension are not repeatable on GPUs.
    all_but_one = 1 - torch.eye(len(blocks), dtype=x.dtype, device=x.device)
    others = (all_but_one @ blocks.flatten(1)).view_as(blocks)
    left = a.new_zeros(m + pad, c)  # anchors laid out as the contrasts that they are: anchor and self share a block
    left[own] = a[selves]
    left = left.view(-1, _BLOCK, c)
    inside = left @ b_blocks.transpose(1, 2)
    inside.diagonal(dim1=1, dim2=2).zero_()
    out[selves] = (left @ others + inside @ x_blocks).view(-1, d)[own]
    return out


# ---- The operator ----


def _kernel(
    anchors: Tensor,
    contrasts: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    factor: Tensor | None,
    contrast_factor: Tensor | None,
    a_factor: Tensor | None,
    b_factor: Tensor | None,
    self_offset: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of anchors and contrasts, times their factors (no contrasts if they are the anchors), z . p and W."""
    z = (anchors.clone() if factor is None else anchors * factor).contiguous()
    others = z
    if contrasts is not None:
        others = (contrasts.clone() if contrast_factor is None else contrasts * contrast_factor).contiguous()
    attraction, mass = _attraction(z, others, _sides(a, b, a_factor, b_factor, z), self_offset)
    return z, z.new_empty(0) if contrasts is None else others, attraction, mass


def _attraction(
    z: Tensor, others: Tensor, sides: tuple[_Side, _Side], self_offset: int | None
) -> tuple[Tensor, Tensor]:
    """What `_kernel` returns beside the rows: z . p and W."""
    dtype = _sum_dtype(z)
    attraction, mass = z.new_zeros(z.shape[0], dtype=dtype), z.new_empty(z.shape[0])
    with_one = _remember(lambda rows, cols: _with_one(others[rows, cols], dtype))
    for rows, cols, sums in _sums(*sides, with_one, z.shape[1], self_offset):
        attraction[rows].add_((sums[:, :-1] * z[rows, cols]).sum(1))
        mass[rows] = sums[:, -1]
    return attraction.to(z.dtype), mass


def _grad_kernel(
    grad: Tensor,
    grad_mass: Tensor | None,
    grad_anchors: Tensor | None,
    grad_contrasts: Tensor | None,
    anchors: Tensor,
    contrasts: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    factor: Tensor | None,
    contrast_factor: Tensor | None,
    a_factor: Tensor | None,
    b_factor: Tensor | None,
    self_offset: int | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of anchors, contrasts and their labels; empty where not wanted."""
    dtype, num_columns = _sum_dtype(anchors), anchors.shape[1]
    reverse = None if self_offset is None else -self_offset
    left, right = _sides(a, b, a_factor, b_factor, anchors)
    z = _entries(anchors, factor, dtype)
    others = z if contrasts is None else _entries(contrasts, contrast_factor, dtype)
    u = grad.to(dtype)[:, None]
    weighted = _remember(lambda rows, cols: z(rows, cols) * u[rows])
    results = [anchors.new_empty(0) for _ in wanted]

    if wanted[0] and contrasts is None:
        parts = _both_ways(left, left, z, u, u, num_columns, self_offset)
        results[0] = _gather(parts, grad_anchors, anchors, factor)
    elif wanted[0]:
        sums = _sums(left, right, others, num_columns, self_offset)
        parts = ((rows, cols, part * u[rows]) for rows, cols, part in sums)
        results[0] = _gather(parts, grad_anchors, anchors, factor)
    if wanted[1] and contrasts is not None:
        sums = _sums(right, left, weighted, num_columns, reverse)
        results[1] = _gather(sums, grad_contrasts, contrasts, contrast_factor)
    if wanted[2] or wanted[3]:
        v = torch.zeros_like(u) if grad_mass is None else grad_mass.to(dtype)[:, None]
        up = left._replace(entries=lambda rows, _: torch.cat([weighted(rows, _ALL), v[rows]], 1), width=num_columns + 1)
        down = right._replace(entries=lambda rows, _: _with_one(others(rows, _ALL), dtype), width=num_columns + 1)
        # Labels in the place of rows, and rows in that of labels.
        pull, back = (
            _sums(up, down, right.entries, right.width, self_offset),
            _sums(down, up, left.entries, left.width, reverse),
        )
        if wanted[2]:
            results[2] = _gather(pull, None, a, a_factor)
        if wanted[2] and b is None:
            results[2] += _gather(back, None, a, a_factor)
        if wanted[3] and b is not None:
            results[3] = _gather(back, None, b, b_factor)
    return results[0], results[1], results[2], results[3]


def _with_one(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A last column of ones, beside which sums of rows have sums of weights."""
    out = rows.new_ones(rows.shape[0], rows.shape[1] + 1, dtype=dtype)
    out[:, :-1] = rows
    return out


def _both_ways(
    a: _Side, b: _Side, x: Entries, u: Tensor, all_u: Tensor, num_columns: int, self_offset: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Parts of sum_j w_ij u_j x_j + u_i sum_j w_ij x_j: what row i is given as a contrast and as an anchor."""
    u_and_one = _with_one(all_u, all_u.dtype)[:, :, None]
    both = _remember(lambda rows, cols: (x(rows, cols)[:, None] * u_and_one[rows]).flatten(1))
    for rows, cols, sums in _sums(a, b, both, num_columns, self_offset):
        as_contrast, as_anchor = sums.tensor_split(2, dim=1)
        yield rows, cols, as_contrast.addcmul_(as_anchor, u[rows])


def _gather(
    parts: Iterator[tuple[slice, slice, Tensor]], upstream: Tensor | None, x: Tensor, factor: Tensor | None
) -> Tensor:
    """The gradient of x from parts of that of its rows times their factor, and from what else there is of it."""
    out = x.new_empty(x.shape)
    for rows, cols, part in parts:
        if upstream is None:
            out[rows, cols] = part
        else:
            torch.add(part, upstream[rows, cols], out=out[rows, cols])
    if factor is not None:  # z = x / |x|, so d_x = (d_z - z (z . d_z)) / |x|
        for rows in _slices(len(x), _chunk(x.shape[1], x.device)):
            z, dz = x[rows] * factor[rows], out[rows]
            dz.addcmul_(z, (z * dz).sum(1, keepdim=True), value=-1).mul_(factor[rows])
    return out


class _MirroredAttraction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, every: Tensor, a: Tensor, b: Tensor, self_offset: int, share: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        attraction, mass = _attraction(rows, every, _sides(a, b, None, None, rows), self_offset)
        ctx.save_for_backward(rows, every, a, b, attraction)
        ctx.self_offset, ctx.share = self_offset, share
        ctx.mark_non_differentiable(mass)
        return attraction, mass

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, every, a, b, attraction = ctx.saved_tensors
        with torch.no_grad():
            dtype = _sum_dtype(rows)
            u, all_u = grad.to(dtype)[:, None], ctx.share(grad[:, None]).to(dtype)
            x, sides = _entries(every, None, dtype), _sides(a, b, None, None, rows)
            d_rows = _gather(_both_ways(*sides, x, u, all_u, rows.shape[1], ctx.self_offset), None, rows, None)
        message = 'with group, only backend="dense" can be differentiated twice'
        return only_once(d_rows, message, attraction), None, None, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.self_offset = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_anchors: Tensor | None, grad_contrasts: Tensor | None, grad: Tensor | None, grad_mass: Tensor | None
) -> tuple[Tensor | None, ...]:
    anchors, *others = ctx.saved_tensors
    if grad is None:
        grad = anchors.new_zeros(anchors.shape[0])
    wanted = list(ctx.needs_input_grad[:4])
    results = _attract_grad(grad, grad_mass, grad_anchors, grad_contrasts, anchors, *others, ctx.self_offset, wanted)
    return *(result if want else None for result, want in zip(results, wanted, strict=True)), *[None] * 5


def _grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.self_offset, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _grad_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second derivatives: those of the forward kernel, which is made of torch operations."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: derivatives are to stop here, also where one of these tensors was computed from another.
        inputs: list[Any] = [x if x is None else x.view_as(x) for x in ctx.saved_tensors]
        grad, grad_mass, *grad_rows = inputs[:4]
        given = inputs[4:8]
        factors = (None if old is None else inverse_lengths(x) for x, old in zip(given, inputs[8:], strict=True))
        outputs = _kernel(*(*given, *factors, ctx.self_offset))
        first = _derivative(outputs, (*grad_rows, grad, grad_mass), given, create_graph=True)
    wanted = [g if want else None for g, want in zip(grads, ctx.wanted, strict=True)]
    return *_derivative(first, wanted, inputs[:8], create_graph=again), *[None] * 6


def _derivative(
    outputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    *,
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of those inputs that have one."""
    pairs = zip(outputs, grads, strict=True)
    ends = [(y, g) for y, g in pairs if y is not None and y.requires_grad and g is not None]
    starts = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if ends and starts:
        ys, gs = zip(*ends, strict=True)
        wrt: list[Any] = [inputs[i] for i in starts]
        result = torch.autograd.grad(ys, wrt, gs, create_graph=create_graph, allow_unused=True)
        for i, gradient in zip(starts, result, strict=True):
            found[i] = gradient
    return found


def _fake(anchors: Tensor, contrasts: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_anchor = anchors.new_empty(anchors.shape[0])
    others = anchors.new_empty(0 if contrasts is None else contrasts.shape)
    return anchors.new_empty(anchors.shape), others, per_anchor, torch.empty_like(per_anchor)


def _grad_fake(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    given = zip(rest[3:7], rest[-1], strict=True)
    return tuple(grad.new_empty(0) if x is None or not want else x.new_empty(x.shape) for x, want in given)


_ARGUMENTS = (
    "Tensor anchors, Tensor? contrasts, Tensor a, Tensor? b, Tensor? factor, Tensor? contrast_factor, "
    "Tensor? a_factor, Tensor? b_factor, SymInt? self_offset"
)
_attract = define_operator(
    "attract",
    f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_attract_grad = define_operator(
    "attract_grad",
    "(Tensor grad, Tensor? grad_mass, Tensor? grad_anchors, Tensor? grad_contrasts, "
    f"{_ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_grad_kernel,
    fake=_grad_fake,
    setup_context=_grad_setup_context,
    backward=_grad_backward,
)
