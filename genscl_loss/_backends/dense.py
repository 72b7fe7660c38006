"""The readable reference of the pairwise half: one A x M matrix of logits.

Plain torch operations, so differentiable as often as rows are; fastest while the matrix is small.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from genscl_loss._library import matmul


def row_lse(
    anchors: Tensor,
    contrasts: Tensor,
    scale: Tensor | float,
    weight: Tensor | None,
    left_out: Sequence[int],
    unit: bool,
) -> Tensor:
    """Logarithm of sum_k c_k exp(s_ik), (A,), without k = i + d for each d of `left_out`."""
    s = logits(anchors, contrasts, scale, left_out)
    lse = lse_of(s if weight is None else weighted(s, weight))
    # Plus NaN if a contrast is infinite: at minus infinity it would pass for one that is merely far away.
    return lse if unit else lse + torch.linalg.vector_norm(contrasts.detach(), torch.inf) * 0


def logits(
    anchors: Tensor,
    contrasts: Tensor,
    scale: Tensor | float,
    left_out: Sequence[int],
    factor: Tensor | None = None,
) -> Tensor:
    """The logits s_ij = scale * anchors_i . contrasts_j, (A, M); the lowest number where j = i + d, d of `left_out`.

    `factor` is what makes contrasts unit rows, (M, 1), where they are not yet; None: they are what they are to be.
    """
    if factor is None:
        s = matmul(anchors * scale, contrasts.T)
    else:
        s = matmul(anchors, contrasts.T).mul_((factor * scale).T)
    for offset in left_out:
        # Before the maximum is taken: the self term is the largest of its row, and with it in the maximum all others
        # underflow at small temperature. The lowest number instead of -inf, which times a weight of zero would be NaN.
        # Behind autograd's back: probability and weight are zero there, and so is every derivative.
        # By slices: an offset in `diagonal` would be a constant of a compiled graph.
        entries = s.detach()
        entries = entries[max(0, -offset) :, max(0, offset) :] if offset != 0 else entries
        entries.diagonal().fill_(torch.finfo(s.dtype).min)
    return s


def weighted(s: Tensor, weight: Tensor) -> Tensor:
    """Logits plus log c; the lowest number, as in `logits`, instead of -inf."""
    return (s + weight.log()).clamp(min=torch.finfo(s.dtype).min)


def lse_of(s: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials of each row of logits, (A,)."""
    largest = s.detach().amax(1, keepdim=True)
    # As `torch.logsumexp`, whose derivative takes the exponentials again.
    return (s - largest).exp().sum(1).log() + largest[:, 0]
