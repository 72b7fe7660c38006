"""What the log-likelihood of an anchor's positives makes its loss."""

from torch import Tensor

EPS = 1e-8  # of the paper's code: an anchor with this much positive mass or less has no positives


def loss_of(likelihood: Tensor, mass: Tensor, is_probability: bool) -> Tensor:
    """-sum_j w_ij log p_ij / (W_i + EPS); where that is below zero, which rounding may have made it, zero.

    The gradient is that of the likelihood in any case, and zero has no sign. With weights in its denominator the
    likelihood is no probability, and may well be positive.
    """
    loss = 0 - likelihood / (mass + EPS)
    if is_probability:
        (loss.detach() if loss.requires_grad else loss).relu_()  # behind autograd's back
    return loss
