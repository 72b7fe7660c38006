"""Both halves of the loss as the equation has them, on whole matrices, and the gradient written down.

With s the logits, p their softmax, c what comes from above and W the positive mass,

    d/ds_ij sum_i c_i sum_j w_ij log p_ij = c_i (w_ij - W_i p_ij).

With weights of contrasts, p_ij is exp(s_ij) / sum_k weight_k exp(s_ik) in the logarithm and weight_j times that in the
derivative.

Where an anchor has but one positive, k, and q is the softmax of the others,

    log p_ik = log(1 / (1 + exp(lse_i - s_ik))),    d/ds_ij = c_i (1 - p_ik) ([j = k] - q_ij):

neither is a difference of large numbers when a model is trained and p_ik is all but one.

`log_likelihoods`, in plain operations, has derivatives of all kinds. `losses` has a first one of its own, in fewer
passes over matrices and fewer calls into torch, of which small batches consist; a second one goes through the former.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import logsigmoid

from genscl_loss._backends import dense, diagonals, scale_grad
from genscl_loss._checks import is_transformed
from genscl_loss._library import as_tensor, is_batched, without_autocast
from genscl_loss._likelihood import likelihood_grad, loss_of
from genscl_loss._unit import inverse_lengths, unit_and_factor, unit_pair, unit_rows_grad

_ROWS = 512  # of a part of a matrix beside the whole ones
_BLOCK = 256  # rows and columns of a part of a matrix that is added to its transpose


def losses(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor | float,
    contrast_weight: Tensor | None,
    similarities: Sequence[Tensor],
    self_offset: int | None,
    *,
    normalize: bool,
    is_probability: bool,
    partner: int | None = None,
    num_live: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """-sum_j w_ij log p_ij / (W_i + EPS) and W_i of each anchor, for each matrix w of label similarities.

    As often differentiable as wanted.

    Args:
        anchors: (A, D), of any length if they are to be normalised.
        contrasts: (M, D); None: the anchors themselves.
        scale: One over the temperature; a 0-dim tensor if it may have a gradient.
        contrast_weight: (M,), or None: one for all.
        similarities: Each (A, M), with zeros in the self terms.
        self_offset: anchor i is contrast i + self_offset; None if no anchor is a contrast.
        normalize: Whether rows are to be scaled to unit length.
        is_probability: No contrast has a weight but zero or one: a loss below zero is then rounding.
        partner: Contrast (i + partner) modulo M is all that anchor i has, with similarity one, and there are no others.
        num_live: Contrasts that can have a gradient, the first ones; None: all.
    """
    options = self_offset, normalize, partner
    if _needs_plain_operations(similarities):
        tensor = as_tensor(scale, anchors)
        found = log_likelihoods(anchors, contrasts, tensor, contrast_weight, similarities, *options)
        return [(loss_of(likelihood, mass, is_probability), mass) for likelihood, mass in found]
    if partner is None:
        masses = [w.sum(1) for w in similarities]
    else:
        similarities, masses = [_columns(partner, anchors, contrasts)], [anchors.new_ones(anchors.shape[0])]
    rest = contrast_weight, options, is_probability, num_live
    found = _Losses.apply(anchors, contrasts, scale, *rest, *similarities, *masses)  # type: ignore[no-untyped-call]
    return list(zip(found, masses, strict=True))


def log_likelihoods(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    contrast_weight: Tensor | None,
    similarities: Sequence[Tensor],
    self_offset: int | None,
    normalize: bool,
    partner: int | None,
) -> list[tuple[Tensor, Tensor]]:
    """sum_j w_ij log p_ij and W_i of each anchor; the arguments are those of `losses`."""
    if partner is not None:
        likelihood = _of_pairs_plainly(anchors, contrasts, scale, self_offset, normalize, partner)
        return [(likelihood, torch.ones_like(likelihood).detach())]
    z, others = unit_pair(anchors, contrasts, normalize)
    log_p = _log_softmax(z, z if others is None else others, scale, self_offset, contrast_weight)
    return [((w * log_p).sum(1), w.sum(1)) for w in similarities]


def _log_softmax(
    anchors: Tensor,
    contrasts: Tensor,
    scale: Tensor | float,
    self_offset: int | None,
    contrast_weight: Tensor | None,
    factor: Tensor | None = None,
) -> Tensor:
    """Logarithm of exp(s_ij) / sum_{k != self} c_k exp(s_ik), c the weights of contrasts, (A, M).

    Meaningless, but finite, in the self terms and where the weight is zero. `factor` is as in `dense.logits`.
    """
    s = dense.logits(anchors, contrasts, scale, diagonals(self_offset), factor)
    if contrast_weight is None:
        return s.log_softmax(1)
    lse = dense.lse_of(dense.weighted(s, contrast_weight))
    # Zero if no contrast is there, so that all that is multiplied by a mass of zero is a number.
    return s - torch.where(lse > 0.5 * torch.finfo(lse.dtype).min, lse, lse.detach() * 0)[:, None]


def _of_pairs_plainly(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    self_offset: int | None,
    normalize: bool,
    partner: int,
) -> Tensor:
    """The likelihood of the only positive of each anchor."""
    z, others = unit_pair(anchors, contrasts, normalize)
    others = z if others is None else others
    left_out = diagonals(self_offset, partner, z.shape[0], others.shape[0])
    lse = dense.row_lse(z, others, scale, None, left_out, normalize)
    positive = (z * _partners(others, partner, z.shape[0])).sum(1) * scale
    likelihood = logsigmoid(positive - lse)
    # Plus NaN if the logit is infinite: it would pass for one that is merely near.
    return likelihood if normalize else likelihood + positive.detach() * 0


def _partners(contrasts: Tensor, first: int, count: int) -> Tensor:
    """Rows (i + first) modulo M for i < count."""
    rows = contrasts.shape[0]
    if first + count <= rows:
        return contrasts.narrow(0, first, count)
    return contrasts.roll(-first, 0).expand(count // rows, -1, -1).reshape(count, -1)


def _needs_plain_operations(similarities: Sequence[Tensor]) -> bool:
    """Where a compiler wants to see them, labels have a gradient, or another kind of derivative is being taken."""
    if torch.compiler.is_compiling() or any(w.requires_grad for w in similarities):
        return True
    return forward_ad._current_level >= 0 or is_transformed()


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        contrasts: Tensor | None,
        scale: Tensor | float,
        contrast_weight: Tensor | None,
        options: tuple[int | None, bool, int | None],
        is_probability: bool,
        num_live: int | None,
        *similarities_and_masses: Tensor,
    ) -> tuple[Tensor, ...]:
        self_offset, normalize, partner = options
        similarities, masses = _halves(similarities_and_masses)
        of_pairs: tuple[Tensor | None, ...] = (None, None)
        with without_autocast(anchors.device):
            z, factor = unit_and_factor(anchors, normalize)
            # Where a set has more numbers than there are logits, these are multiplied, and it is not copied.
            others, other_factor, logit_factor = z, factor, None
            if contrasts is not None:
                has_set = num_live is not None or not ctx.needs_input_grad[1]
                if normalize and has_set and len(z) <= contrasts.shape[1]:
                    others, other_factor, logit_factor = contrasts, None, inverse_lengths(contrasts.detach())
                else:
                    others, other_factor = unit_and_factor(contrasts, normalize)
            if partner is None:
                kept = _log_softmax(z, others, scale, self_offset, contrast_weight, logit_factor)
                likelihoods = [(w * kept).sum(1) for w in similarities]
            else:
                likelihood, kept, total = _of_pairs(z, others, scale, self_offset, similarities[0], logit_factor)
                if not normalize:  # NaN if an entry is infinite: a logit may pass for one that is merely large
                    likelihood += (torch.linalg.vector_norm(others, torch.inf) + torch.linalg.vector_norm(z, 1, 1)) * 0
                likelihoods, of_pairs = [likelihood], (likelihood, total)
            found = tuple(loss_of(x, mass, is_probability) for x, mass in zip(likelihoods, masses, strict=True))
        ctx.known_scale, variable = (None, scale) if isinstance(scale, Tensor) else (scale, None)
        rows = anchors, contrasts, z, None if contrasts is None else others, factor, other_factor, logit_factor
        ctx.save_for_backward(*rows, variable, contrast_weight, kept, *of_pairs, *similarities_and_masses)
        ctx.options, ctx.is_probability, ctx.num_live = options, is_probability, num_live
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        anchors, contrasts, z, others, factor, other_factor, logit_factor, *saved = ctx.saved_tensors
        scale, contrast_weight, kept, likelihood, total, *similarities_and_masses = saved
        similarities, masses = _halves(similarities_and_masses)
        scale = ctx.known_scale if scale is None else scale
        wanted, none = ctx.needs_input_grad[:3], [None] * (len(ctx.needs_input_grad) - 3)
        with without_autocast(anchors.device):
            if torch.is_grad_enabled() or any(map(is_batched, grads)):
                inputs = anchors, contrasts, as_tensor(scale, anchors)
                return *_again(ctx, inputs, contrast_weight, similarities, grads), *none
            # Of log-likelihoods, times the scale.
            c = [likelihood_grad(grad, mass).mul_(scale) for grad, mass in zip(grads, masses, strict=True)]
            if likelihood is not None:
                excess = torch.expm1(likelihood).mul_(c[0])  # c (p - 1)
                d_logits = kept * (excess / total)[:, None]
                d_logits.scatter_(1, similarities[0], excess.neg_()[:, None])
            else:
                d_logits = _softmax_grad([x[:, None] for x in c], similarities, masses, kept, contrast_weight)
            d_others = None
            if contrasts is None:
                d_z = _times_symmetric(d_logits, z)
            else:
                if wanted[1]:
                    d_others = torch.empty_like(others) if ctx.num_live is None else torch.zeros_like(others)
                    live = slice(ctx.num_live)
                    torch.mm(d_logits[:, live].T, z, out=d_others[live])
                d_z = (d_logits if logit_factor is None else d_logits.mul_(logit_factor.T)) @ others
            d_scale = scale_grad(z, d_z, scale, is_self=contrasts is None).to(scale.dtype) if wanted[2] else None
            if factor is not None:
                unit_rows_grad(d_z, z, factor)
                if d_others is not None:
                    unit, own = others[live], other_factor if logit_factor is None else logit_factor
                    unit = unit if logit_factor is None else unit * own[live]
                    unit_rows_grad(d_others[live], unit, own[live])
        return d_z if wanted[0] else None, d_others, d_scale, *none


def _softmax_grad(
    c: Sequence[Tensor],
    similarities: Sequence[Tensor],
    masses: Sequence[Tensor],
    log_p: Tensor,
    contrast_weight: Tensor | None,
) -> Tensor:
    """sum_l c_l (w_l - W_l p): the derivative with respect to the logits, for all labels l; c is (A, 1)."""
    if contrast_weight is not None:
        p = (log_p + contrast_weight.log()).exp_()
        d = p.mul_(sum(factor * -mass[:, None] for factor, mass in zip(c, masses, strict=True)))
        return _plus(d, c, similarities)
    # The same in one pass, in which the sums of rows are taken again.
    if len(log_p) <= _ROWS:
        return torch._log_softmax_backward_data(_plus(None, c, similarities), log_p, 1, log_p.dtype)
    d = torch.empty_like(log_p)
    for first in range(0, len(log_p), _ROWS):  # without another matrix
        rows = slice(first, first + _ROWS)
        some = _plus(None, [factor[rows] for factor in c], [w[rows] for w in similarities])
        torch._log_softmax_backward_data(some, log_p[rows], 1, d.dtype, out=d[rows])
    return d


def _plus(d: Tensor | None, c: Sequence[Tensor], similarities: Sequence[Tensor]) -> Tensor:
    """Add sum_l c_l w_l to d, in place; a new tensor if d is None."""
    for factor, w in zip(c, similarities, strict=True):
        d = factor * w if d is None else d.addcmul_(w, factor)
    assert d is not None
    return d


def _halves(both: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return both[: len(both) // 2], both[len(both) // 2 :]


def _of_pairs(
    z: Tensor,
    others: Tensor,
    scale: Tensor | float,
    self_offset: int | None,
    columns: Tensor,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The likelihood of each positive; exponentials of the other logits, up to a factor of the row, and their sums.

    The exponential of the positive means nothing.
    """
    logits = dense.logits(z, others, scale, diagonals(self_offset), factor)
    positive = logits.gather(1, columns)
    logits.scatter_(1, columns, torch.finfo(logits.dtype).min)
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    likelihood = logsigmoid(positive.sub_(largest).sub_(total.log()))
    return likelihood[:, 0], logits, total[:, 0]


def _columns(partner: int, anchors: Tensor, contrasts: Tensor | None) -> Tensor:
    """Where in a matrix of pairs the positive of each anchor is, (A, 1)."""
    count = anchors.shape[0]
    return torch.arange(partner, partner + count, device=anchors.device).remainder_(
        count if contrasts is None else contrasts.shape[0]
    )[:, None]


def _times_symmetric(d_logits: Tensor, z: Tensor) -> Tensor:
    """(d_logits + d_logits^T) z: both sides of the logits of a self-contrast.

    By one product with the sum, or by two where z is narrow: they then cost less than reading the other way round.
    """
    count, width = z.shape
    if width < (128 if count <= 512 else 256):
        return torch.addmm(d_logits @ z, d_logits.T, z)
    if count <= 512:
        return (d_logits + d_logits.T) @ z
    blocks = [slice(first, first + _BLOCK) for first in range(0, count, _BLOCK)]
    out, both = torch.empty_like(z), z.new_empty(_BLOCK, count)
    for rows in blocks:
        some = both[: len(z[rows])]
        for columns in blocks:  # square, so that what is read against its order stays in cache
            torch.add(d_logits[rows, columns], d_logits[columns, rows].T, out=some[:, columns])
        torch.mm(some, z, out=out[rows])
    return out


def _again(
    ctx: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor],
    contrast_weight: Tensor | None,
    similarities: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradient as a function that can be differentiated, and taken for several upstream gradients at a time."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: derivatives are to stop here, also where one of these tensors was computed from another.
        views: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
        anchors, contrasts, scale = views
        found = log_likelihoods(anchors, contrasts, scale, contrast_weight, similarities, *ctx.options)
        losses = [loss_of(likelihood, mass, ctx.is_probability) for likelihood, mass in found]
    places = [k for k in range(3) if ctx.needs_input_grad[k]]
    results: list[Tensor | None] = [None] * 3
    wanted = [views[k] for k in places]
    for k, grad in zip(places, torch.autograd.grad(losses, wanted, grads, create_graph=again), strict=True):
        results[k] = grad
    return results
