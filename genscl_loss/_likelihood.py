"""From the two halves to the log-likelihood of an anchor's positives, and from that to its loss."""

import torch
from torch import Tensor

EPS = 1e-8  # of the paper's code: an anchor with this much positive mass or less has no positives


def log_likelihood(alignment: Tensor, mass: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    """sum_j w_ij log p_ij = scale * alignment_i - W_i lse_i of each anchor, since log p_ij is s_ij - lse_i."""
    return torch.addcmul(alignment * scale, mass, lse, value=-1)


def no_log_likelihoods(
    z: Tensor, others: Tensor | None, scale: Tensor | float, num_labels: int
) -> list[tuple[Tensor, Tensor]]:
    """With the mass, where there is no anchor or no contrast: 0, zero gradient, except that what is NaN stays NaN."""
    zero = z.sum(1) * scale * 0
    if others is not None:
        zero = zero + others.sum() * 0
    return [(zero, zero.detach())] * num_labels


def loss_of(likelihood: Tensor, mass: Tensor, is_probability: bool) -> Tensor:
    """-sum_j w_ij log p_ij / (W_i + EPS); where that is below zero, which rounding may have made it, zero.

    The gradient is that of the likelihood in any case, and zero has no sign. With weights in its denominator the
    likelihood is no probability, and may well be positive.
    """
    loss = 0 - likelihood / (mass + EPS)
    if is_probability:
        (loss.detach() if loss.requires_grad else loss).relu_()  # behind autograd's back
    return loss


def likelihood_grad(grad: Tensor, mass: Tensor) -> Tensor:
    """The derivative with respect to the log-likelihood, from that with respect to the loss."""
    return grad / (-EPS - mass)
