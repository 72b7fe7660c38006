"""The readable reference: the equation as it stands, on one A x M matrix of logits and one of label similarities.

Plain torch operations, so differentiable as often as wanted; fastest while the matrices are small, because both
halves of the loss then share every pass over them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from genscl_loss._library import matmul


def log_softmax(
    anchors: Tensor,
    contrasts: Tensor,
    scale: Tensor | float,
    self_offset: int | None,
    weight: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Logarithm of exp(s_ij) / sum_{k != self} c_k exp(s_ik) with s_ij = scale * anchors_i . contrasts_j.

    Args:
        anchors: (A, D).
        contrasts: (M, D).
        scale: 0-dim, one over the temperature.
        self_offset: anchor i is contrast i + self_offset; None if no anchor is a contrast.
        weight: c, (M,); None: one for all.
        factor: What makes contrasts unit rows, (M, 1), where they are not yet; None: they are what they are to be.

    Returns:
        (A, M); meaningless, but finite, in the self terms and where the weight is zero.
    """
    left_out = [] if self_offset is None else [self_offset]
    s = logits(anchors, contrasts, scale, left_out, factor)
    if weight is None:
        return s.log_softmax(1)
    lse = _row_lse(_weighted(s, weight))
    # Zero if no contrast is there, so that all that is multiplied by a mass of zero is a number.
    return s - torch.where(lse > 0.5 * torch.finfo(lse.dtype).min, lse, lse.detach() * 0)[:, None]


def row_lse(
    anchors: Tensor, contrasts: Tensor, scale: Tensor | float, left_out: Sequence[int], weight: Tensor | None = None
) -> Tensor:
    """Logarithm of sum_k c_k exp(s_ik), (A,), as in `log_softmax`, without k = i + d for each d of `left_out`."""
    s = logits(anchors, contrasts, scale, left_out)
    return _row_lse(s if weight is None else _weighted(s, weight))


def _weighted(s: Tensor, weight: Tensor) -> Tensor:
    """Logits plus log c; the lowest number, as in `logits`, instead of -inf."""
    return (s + weight.log()).clamp(min=torch.finfo(s.dtype).min)


def _row_lse(s: Tensor) -> Tensor:
    largest = s.detach().amax(1, keepdim=True)
    # As `torch.logsumexp`, whose derivative takes the exponentials again.
    return (s - largest).exp().sum(1).log() + largest[:, 0]


def log_likelihood(log_p: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of w_ij log p_ij and of w_ij over j, for weights (A, M) with zeros in the self terms."""
    return (weights * log_p).sum(1), weights.sum(1)


def logits(
    anchors: Tensor,
    contrasts: Tensor,
    scale: Tensor | float,
    left_out: Sequence[int],
    factor: Tensor | None = None,
) -> Tensor:
    """The logits s_ij, (A, M); the lowest number where j = i + d for one d of `left_out`."""
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
