"""Rows of unit length."""

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


def inverse_lengths(rows: Tensor) -> Tensor:
    """What `unit_rows` multiplies each row by, (N, 1)."""
    constant: Tensor = torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True)
    is_short = constant < 1e-18
    # A constant length of one where the row is too short, and that before the norm is taken, whose second derivative at
    # zeros is NaN. Plus NaN where squares overflow: divided by infinity, the row would pass for zeros.
    length: Tensor = torch.linalg.vector_norm(rows.masked_fill(is_short, 1), dim=1, keepdim=True)
    return (length.masked_fill(is_short, 1) + (constant - constant)).reciprocal()
