"""Both halves of the loss in Triton kernels, from rows of any length to the loss of each, and back.

What `_linear.py` puts together from the implementations of either half, in few launches: a batch of a few thousand rows
takes a GPU less time than its host needs for a dozen. Rows are made of unit length where they are split for the tensor
cores, splits of the columns are merged where the loss is made of them, and the gradients of both halves are added up
and go through the normalisation in one place.
"""

from types import ModuleType

import torch
from torch import Tensor

from genscl_loss._backends import fused as pairs
from genscl_loss._library import LAUNCH, on_device
from genscl_loss._positives import fused as positives
from genscl_loss._positives.fused import Side

_BLOCK = 128
LabelPair = tuple[Tensor, Tensor | None]  # of anchors and contrasts; class numbers, or label vectors


def suits(
    anchors: Tensor, contrasts: Tensor | None, all_labels: list[LabelPair], self_offset: int | None, normalize: bool
) -> bool:
    """Whether the kernels take such a batch."""
    (n, d), m = anchors.shape, None if contrasts is None else len(contrasts)
    return normalize and all(positives.suits(n, m, d, a, self_offset, anchors.device) for a, _ in all_labels)


def num_factors(num_anchors: int, num_contrasts: int, num_labels: int) -> int:
    """Numbers that the backward pass finds in `factors`: of rows, then of each kind of labels."""
    return (num_anchors + num_contrasts) * (1 + num_labels)


def losses(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    all_labels: list[LabelPair],
    self_offset: int | None,
    precision: str,
    is_probability: bool,
) -> tuple[Tensor, ...]:
    """Losses, masses and alignments, (kinds of labels, A); then sums, rows, columns and factors for `losses_grad`."""
    n, m = len(anchors), 0 if contrasts is None else len(contrasts)
    count = len(all_labels)
    with on_device(anchors.device):
        factors = anchors.new_empty(num_factors(n, m, count), dtype=torch.float64)
        sides = _sides(anchors, contrasts, all_labels, factors)
        rows = pairs.split_unit_rows(anchors, precision, sides[0][0].factor)
        cols = None if contrasts is None else pairs.split_unit_rows(contrasts, precision, _other(sides[0]).factor)
        for both in sides:
            for side in both:
                if side is not None and side.label_factor is not None:
                    positives.label_factors(side.labels, side.label_factor)
        parts = pairs.lse_parts(rows, rows if cols is None else cols, n, m or n, scale, weight, self_offset)
        aligned = factors.new_empty(count, 2, n)
        for (left, right), out in zip(sides, aligned, strict=True):
            positives.align(left, right, self_offset, out)
        sums, loss, mass, alignment = (parts.new_empty(k, n) for k in (2, count, count, count))
        _kernels().losses[-(-n // _BLOCK),](
            parts, aligned, pairs.argument(scale), sums, loss, mass, alignment, n, len(parts),
            count, _BLOCK, not pairs.is_known(scale), weight is not None, is_probability, **LAUNCH,
        )  # fmt: skip
    return loss, mass, alignment, sums, rows, rows.new_empty(0) if cols is None else cols, factors


def losses_grad(
    grad: Tensor,
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    all_labels: list[LabelPair],
    kept: list[Tensor],
    self_offset: int | None,
    num_live: int,
    scale_needs_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of anchors, of so many contrasts, None if it is 0, and of the scale, if it is needed."""
    mass, alignment, sums, rows, cols, factors = kept
    n, d = anchors.shape
    count, m = len(all_labels), 0 if contrasts is None else len(contrasts)
    with on_device(anchors.device):
        sides = _sides(anchors, contrasts, all_labels, factors)
        upstream = mass.new_empty(count + 1, n)
        _kernels().losses_grad[-(-n // _BLOCK),](
            grad, mass, pairs.argument(scale), upstream, n, *grad.stride(), count, _BLOCK, not pairs.is_known(scale),
            **LAUNCH,
        )  # fmt: skip
        largest = torch.linalg.vector_norm(upstream, torch.inf, dim=1)
        parts = pairs.grad_parts(
            upstream[count], largest[count], sums, rows, None if contrasts is None else cols, scale, weight,
            self_offset, True, m or n, d, num_live,
        )  # fmt: skip
        dots = mass.new_empty(n) if scale_needs_grad else None
        for k, (left, right) in enumerate(sides):
            is_first, is_last = k == 0, k == count - 1
            d_anchors, d_contrasts = positives.align_grad(
                upstream[k], largest[k], left, right, self_offset, parts,
                is_last=is_last, dots=dots if is_first else None,
            )  # fmt: skip
            parts = d_anchors[None], None if d_contrasts is None else d_contrasts[None]
        d_scale = None
        if dots is not None:
            # The log-sum-exp depends on scale through scale * z only; in a self-contrast `dots` holds both sides.
            of_pairs = dots.sum() if contrasts is not None else dots.sum() / 2
            d_scale = ((of_pairs + (upstream[:count] * alignment).sum()) / scale).to(scale.dtype)
    return d_anchors, d_contrasts, d_scale


def _sides(
    anchors: Tensor, contrasts: Tensor | None, all_labels: list[LabelPair], factors: Tensor
) -> list[tuple[Side, Side | None]]:
    """Anchors and contrasts with each kind of labels; their factors lie one behind the other."""
    n, m = len(anchors), 0 if contrasts is None else len(contrasts)
    x, others = anchors.contiguous(), None if contrasts is None else contrasts.contiguous()
    of_anchors, of_contrasts, *rest = factors.split_with_sizes([n, m] * (1 + len(all_labels)))
    sides: list[tuple[Side, Side | None]] = []
    for k, (a, b) in enumerate(all_labels):
        left = Side(x, of_anchors, _of_float(a), rest[2 * k] if a.dim() == 2 else None)
        right = None
        if others is not None and b is not None:
            right = Side(others, of_contrasts, _of_float(b), rest[2 * k + 1] if b.dim() == 2 else None)
        sides.append((left, right))
    return sides


def _other(sides: tuple[Side, Side | None]) -> Side:
    assert sides[1] is not None
    return sides[1]


def _of_float(labels: Tensor) -> Tensor:
    """Label vectors in a dtype that sums of squares fit into."""
    is_fine = labels.dim() == 1 or labels.dtype in (torch.float32, torch.float64)
    return (labels if is_fine else labels.float()).contiguous()


def _kernels() -> ModuleType:
    from genscl_loss import _linear_kernels  # Triton is loaded when first used

    return _linear_kernels
