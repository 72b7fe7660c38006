"""What makes positives: three kinds of labels, and the similarity w that each of them states."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from genscl_loss._checks import is_transformed, may_look_at
from genscl_loss._library import has_tangent, matmul
from genscl_loss._unit import inverse_lengths, unit_rows


class ClassLabels(NamedTuple):
    """Classes, w_ij = [anchors_i == contrasts_j]: (A,) and (M,)."""

    anchors: Tensor
    contrasts: Tensor
    are_numbers: bool = False  # integers in [0, A + M), not just anything that can be compared
    there: Tensor | None = None  # (M,), bool: contrasts that are positives of no one where it is False; None: all are

    def numbered(self) -> "ClassLabels":
        """The same in numbers, which tell what is not there."""
        return ClassLabels(*class_numbers(self), are_numbers=True)


class VectorLabels(NamedTuple):
    """Label vectors, w_ij = anchors_i . contrasts_j / |anchors_i| |contrasts_j|: (A, C) and (M, C)."""

    anchors: Tensor
    contrasts: Tensor


class Similarity(NamedTuple):
    """The weights themselves: (A, M)."""

    weights: Tensor


Labels = ClassLabels | VectorLabels | Similarity

# From so many pairs on, classes are compared in the dtype of weights if that has a number for each. A comparison in one
# dtype takes a tenth to a half of the time of one that makes another; to see whether it is exact takes 20 us.
_MANY_PAIRS = 2**16


def num_classes(labels: Labels) -> int:
    """C of label vectors, 0 of other labels."""
    return labels.anchors.shape[1] if isinstance(labels, VectorLabels) else 0


def has_gradient(labels: Labels) -> bool:
    """Whether anything is to be differentiated with respect to them."""
    tensors = [x for x in labels if isinstance(x, Tensor)]
    return (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or any(map(has_tangent, tensors))


def similarity_matrix(labels: Labels, self_offset: int | None, dtype: torch.dtype) -> Tensor:
    """w, (A, M), with zeros in the self terms."""
    if isinstance(labels, ClassLabels):
        weights = _equal(labels.anchors, labels.contrasts, dtype)
        if labels.there is not None:
            weights *= labels.there
    elif isinstance(labels, VectorLabels):
        left, right = unit_rows(labels.anchors), labels.contrasts
        if right is labels.anchors:
            weights = matmul(left, left.T)
        elif len(left) <= left.shape[1] and not (right.requires_grad or torch.compiler.is_compiling()):
            weights = matmul(left, right.T).mul_(inverse_lengths(right).T)  # without a copy of many rows
        else:
            weights = matmul(left, unit_rows(right).T)
        weights = weights.to(dtype)
    else:
        weights = labels.weights.to(dtype, copy=True)
    if self_offset is not None:
        weights.diagonal(self_offset).zero_()
    return weights


def _equal(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """One where a_i is b_j, zero elsewhere, (A, M)."""
    if torch.compiler.is_compiling() or is_transformed():
        return (a.unsqueeze(1) == b).to(dtype)
    if a.dtype != dtype and a.shape[0] * b.shape[0] >= _MANY_PAIRS and may_look_at(a):
        own = a.to(dtype)
        others = own if b is a else b.to(dtype)
        if torch.equal(own.to(a.dtype), a) and (b is a or torch.equal(others.to(b.dtype), b)):
            a, b = own, others
    # Without a matrix of another type between.
    return torch.eq(a.unsqueeze(1), b, out=a.new_empty(a.shape[0], b.shape[0], dtype=dtype))


def class_numbers(labels: ClassLabels) -> tuple[Tensor, Tensor]:
    """Classes as numbers: those of anchors from zero, those of contrasts the same, or one more if no anchor has it.

    By sorting the anchors' alone, for contrasts may be many more. `torch.unique` would make the host wait for a device.
    """
    a, b, are_numbers, there = labels
    if are_numbers:
        return _without(a, b, None if there is None else pad(a, (1, 0)).amax() + 1, there)
    left = a.contiguous()
    values = left.sort().values
    # How many classes come before each place, and before the end.
    number = pad((values[1:] != values[:-1]).long(), (1, 1), value=1).cumsum(0) - 1
    if b is a:
        same = number[torch.searchsorted(values, left)]
        return _without(same, same, number[-1], there)
    right = b.contiguous()
    first, last = torch.searchsorted(values, right), torch.searchsorted(values, right, right=True)
    right = torch.where(first == last, number[-1], number[first])
    return _without(number[torch.searchsorted(values, left)], right, number[-1], there)


def _without(a: Tensor, b: Tensor, nobody: Tensor | None, there: Tensor | None) -> tuple[Tensor, Tensor]:
    """Class numbers, but that of nobody for contrasts that are not there."""
    if there is None or nobody is None:
        return a, b
    return a, torch.where(there, b, nobody)
