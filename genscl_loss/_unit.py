"""Rows of unit length."""

import math

import torch
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """Scale each row to length one; a row of zeros stays as it is, with a gradient as of length one.

    A row is as good as zeros below a length of 1e-18, where squares in float32 lose their digits.
    """
    return rows * inverse_lengths(rows)


def unit_pair(anchors: Tensor, contrasts: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Unit rows of both, or both as they are; contrasts of None are the anchors themselves."""
    if not normalize:
        return anchors, contrasts
    return unit_rows(anchors), None if contrasts is None else unit_rows(contrasts)


def unit_and_factor(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Unit rows, or rows as they are, and what each was multiplied by, (N, 1): for a gradient that is written down."""
    if not normalize:
        return rows, None
    factor = inverse_lengths(rows.detach())
    return rows * factor, factor


def inverse_lengths(rows: Tensor) -> Tensor:
    """What `unit_rows` multiplies each row by, (N, 1)."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not rows.requires_grad:  # the same, in fewer calls
        return torch.threshold(torch.threshold(length, 1e-18, 1).reciprocal_(), 0, math.nan)
    constant = length.detach()
    is_short = constant < 1e-18
    # One where the row is too short. NaN where its squares overflow: divided by infinity, it would pass for zeros.
    correction = (constant - constant).add_(is_short)
    # The second derivative of the norm is NaN at zeros: no such row is to reach it.
    length = torch.linalg.vector_norm(rows.masked_fill(is_short, 1), dim=1, keepdim=True).masked_fill(is_short, 0)
    return (length + correction).reciprocal()


def unit_rows_grad(grad: Tensor, unit: Tensor, factor: Tensor) -> Tensor:
    """The gradient of rows from that of `rows * factor`, their unit rows z; in place.

    With d_z for the latter, d = (d_z - z (z . d_z)) * factor.
    """
    step = max(256, 2**18 // max(1, unit.shape[1]))  # a part that stays in cache
    if len(unit) <= step:
        return grad.addcmul_(unit, (unit * grad).sum(1, keepdim=True), value=-1).mul_(factor)
    for first in range(0, len(unit), step):
        some = slice(first, first + step)
        unit_rows_grad(grad[some], unit[some], factor[some])
    return grad
