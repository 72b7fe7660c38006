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
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    constant = length.detach()
    is_short = constant < 1e-18
    if rows.requires_grad:  # the norm again, without zeros: its second derivative there is NaN
        length = torch.linalg.vector_norm(rows + is_short, dim=1, keepdim=True)
    # A constant one where the row is too short. NaN where its squares overflow: divided by infinity, it would pass for
    # zeros.
    return (length.masked_fill(is_short, 1) + (constant - constant)).reciprocal()
