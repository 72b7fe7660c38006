"""The equation as it stands, on whole matrices, and its gradient written down.

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

from genscl_loss._backends import dense, row_lse
from genscl_loss._checks import is_transformed
from genscl_loss._library import as_tensor, is_batched, without_autocast
from genscl_loss._likelihood import EPS, loss_of
from genscl_loss._unit import inverse_lengths, unit_pair, unit_rows_grad

_ROWS = 512  # of a part of a matrix beside the whole ones
_BLOCK = 256  # rows and columns of a part of a matrix that is added to its transpose


def losses(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor | float,
    weight: Tensor | None,
    weights: Sequence[Tensor],
    self_offset: int | None,
    *,
    normalize: bool,
    is_probability: bool,
    partner: int | None = None,
    num_live: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """-sum_j w_ij log p_ij / (W_i + EPS) and W_i of each anchor, for each matrix of weights.

    As often differentiable as wanted.

    Args:
        anchors: (A, D), of any length if they are to be normalised.
        contrasts: (M, D); None: the anchors themselves.
        scale: One over the temperature; a 0-dim tensor if it may have a gradient.
        weight: Of each contrast, (M,), or None.
        weights: (A, M), with zeros in the self terms.
        self_offset: anchor i is contrast i + self_offset; None if no anchor is a contrast.
        normalize: Whether rows are to be scaled to unit length.
        is_probability: No contrast has a weight but zero or one: a loss below zero is then rounding.
        partner: Contrast (i + partner) modulo M is all that anchor i has, with weight one, and there are no weights.
        num_live: Contrasts that can have a gradient, the first ones; None: all.
    """
    options = self_offset, normalize, partner
    if _needs_plain_operations(weights):
        found = log_likelihoods(anchors, contrasts, as_tensor(scale, anchors), weight, weights, *options)
        return [(loss_of(likelihood, mass, is_probability), mass) for likelihood, mass in found]
    if partner is None:
        masses = [w.sum(1) for w in weights]
    else:
        weights, masses = [_columns(partner, anchors, contrasts)], [anchors.new_ones(anchors.shape[0])]
    rest = options, is_probability, num_live
    found = _Losses.apply(anchors, contrasts, scale, weight, *rest, *weights, *masses)  # type: ignore[no-untyped-call]
    return list(zip(found, masses, strict=True))


def log_likelihoods(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    weights: Sequence[Tensor],
    self_offset: int | None,
    normalize: bool,
    partner: int | None,
) -> list[tuple[Tensor, Tensor]]:
    """sum_j w_ij log p_ij and W_i of each anchor; the arguments are those of `losses`."""
    if partner is not None:
        likelihood = _of_pairs_plainly(anchors, contrasts, scale, self_offset, normalize, partner)
        return [(likelihood, torch.ones_like(likelihood).detach())]
    z, others = unit_pair(anchors, contrasts, normalize)
    log_p = dense.log_softmax(z, z if others is None else others, scale, self_offset, weight)
    return [dense.log_likelihood(log_p, w) for w in weights]


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
    lse = row_lse(z, others, scale, self_offset, unit=normalize, precision="highest", backend="dense", partner=partner)
    positive = (z * _partners(z if others is None else others, partner, z.shape[0])).sum(1) * scale
    likelihood = logsigmoid(positive - lse)
    # Plus NaN if the logit is infinite: it would pass for one that is merely near.
    return likelihood if normalize else likelihood + positive.detach() * 0


def _partners(contrasts: Tensor, first: int, count: int) -> Tensor:
    """Rows (i + first) modulo M for i < count."""
    rows = contrasts.shape[0]
    if first + count <= rows:
        return contrasts.narrow(0, first, count)
    return contrasts.roll(-first, 0).expand(count // rows, -1, -1).reshape(count, -1)


def _needs_plain_operations(weights: Sequence[Tensor]) -> bool:
    """Where a compiler wants to see them, labels have a gradient, or another kind of derivative is being taken."""
    if torch.compiler.is_compiling() or any(w.requires_grad for w in weights):
        return True
    return forward_ad._current_level >= 0 or is_transformed()


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        contrasts: Tensor | None,
        scale: Tensor | float,
        weight: Tensor | None,
        options: tuple[int | None, bool, int | None],
        is_probability: bool,
        num_live: int | None,
        *weights_and_masses: Tensor,
    ) -> tuple[Tensor, ...]:
        self_offset, normalize, partner = options
        weights, masses = _halves(weights_and_masses)
        of_pairs: tuple[Tensor | None, ...] = (None, None)
        with without_autocast(anchors.device):
            z, factor = _unit(anchors, normalize)
            others, other_factor, of_logits = z, factor, None
            if contrasts is not None:
                # Where a set has more numbers than there are logits, these are multiplied, and it is not copied.
                has_set = num_live is not None or not ctx.needs_input_grad[1]
                if normalize and has_set and len(z) <= contrasts.shape[1]:
                    others, other_factor = contrasts, inverse_lengths(contrasts.detach())
                    of_logits = other_factor
                else:
                    others, other_factor = _unit(contrasts, normalize)
            if partner is None:
                kept = dense.log_softmax(z, others, scale, self_offset, weight, of_logits)
                likelihoods = [(w * kept).sum(1) for w in weights]
            else:
                likelihood, kept, total = _of_pairs(z, others, scale, self_offset, weights[0], of_logits)
                if not normalize:  # NaN if an entry is infinite: a logit may pass for one that is merely large
                    likelihood += (torch.linalg.vector_norm(others, torch.inf) + torch.linalg.vector_norm(z, 1, 1)) * 0
                likelihoods, of_pairs = [likelihood], (likelihood, total)
            found = tuple(loss_of(x, mass, is_probability) for x, mass in zip(likelihoods, masses, strict=True))
        ctx.known_scale, variable = (None, scale) if isinstance(scale, Tensor) else (scale, None)
        rows = anchors, contrasts, z, None if contrasts is None else others, factor, other_factor
        ctx.save_for_backward(*rows, variable, weight, kept, *of_pairs, *weights_and_masses)
        ctx.options, ctx.is_probability, ctx.num_live = options, is_probability, num_live
        ctx.scales_logits = of_logits is not None
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        anchors, contrasts, z, others, factor, other_factor, *saved = ctx.saved_tensors
        scale, weight, kept, likelihood, total, *weights_and_masses = saved
        (weights, masses), wanted = _halves(weights_and_masses), ctx.needs_input_grad[:3]
        scale = ctx.known_scale if scale is None else scale
        none = [None] * (4 + len(weights_and_masses))
        with without_autocast(anchors.device):
            if torch.is_grad_enabled() or any(map(is_batched, grads)):
                return *_again(ctx, (anchors, contrasts, as_tensor(scale, anchors)), weight, weights, grads), *none
            # Of likelihoods, times the scale; the loss is minus a likelihood over its mass.
            c = [(grad / (-EPS - mass)).mul_(scale) for grad, mass in zip(grads, masses, strict=True)]
            if likelihood is not None:
                excess = torch.expm1(likelihood).mul_(c[0])  # c (p - 1)
                d_logits = kept * (excess / total)[:, None]
                d_logits.scatter_(1, weights[0], excess.neg_()[:, None])
            else:
                d_logits = _softmax_grad([x[:, None] for x in c], weights, masses, kept, weight)
            d_others = None
            if contrasts is None:
                d_z = _times_symmetric(d_logits, z)
            else:
                if wanted[1]:
                    d_others = torch.empty_like(others) if ctx.num_live is None else torch.zeros_like(others)
                    live = slice(ctx.num_live)
                    torch.mm(d_logits[:, live].T, z, out=d_others[live])
                d_z = (d_logits.mul_(other_factor.T) if ctx.scales_logits else d_logits) @ others
            d_scale = None
            if wanted[2]:  # in a self-contrast d_z holds both sides of each logit: count half
                d_scale = ((z * d_z).sum() / (2 * scale if contrasts is None else scale)).to(scale.dtype)
            if factor is not None:
                unit_rows_grad(d_z, z, factor)
                if d_others is not None:
                    some, factor = others[live], other_factor[live]
                    unit_rows_grad(d_others[live], some * factor if ctx.scales_logits else some, factor)
        return d_z if wanted[0] else None, d_others, d_scale, *none


def _softmax_grad(
    c: Sequence[Tensor], weights: Sequence[Tensor], masses: Sequence[Tensor], log_p: Tensor, weight: Tensor | None
) -> Tensor:
    """sum_l c_l (w_l - W_l p): the derivative with respect to the logits, for all labels l; c is (A, 1)."""
    if weight is not None:
        p = (log_p + weight.log()).exp_()
        d = p.mul_(sum(factor * -mass[:, None] for factor, mass in zip(c, masses, strict=True)))
        return _plus(d, c, weights)
    # The same in one pass, in which the sums of rows are taken again.
    if len(log_p) <= _ROWS:
        return torch._log_softmax_backward_data(_plus(None, c, weights), log_p, 1, log_p.dtype)
    d = torch.empty_like(log_p)
    for first in range(0, len(log_p), _ROWS):  # without another matrix
        rows = slice(first, first + _ROWS)
        some = _plus(None, [factor[rows] for factor in c], [w[rows] for w in weights])
        torch._log_softmax_backward_data(some, log_p[rows], 1, d.dtype, out=d[rows])
    return d


def _plus(d: Tensor | None, c: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Add sum_l c_l w_l to d, in place; a new tensor if d is None."""
    for factor, w in zip(c, weights, strict=True):
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
    logits = dense.logits(z, others, scale, [] if self_offset is None else [self_offset], factor)
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


def _unit(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    if not normalize:
        return rows, None
    factor = inverse_lengths(rows.detach())
    return rows * factor, factor


def _again(
    ctx: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor],
    weight: Tensor | None,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradient as a function that can be differentiated, and taken for several upstream gradients at a time."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: derivatives are to stop here, also where one of these tensors was computed from another.
        views: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
        anchors, contrasts, scale = views
        found = log_likelihoods(anchors, contrasts, scale, weight, weights, *ctx.options)
        losses = [loss_of(likelihood, mass, ctx.is_probability) for likelihood, mass in found]
    places = [k for k in range(3) if ctx.needs_input_grad[k]]
    results: list[Tensor | None] = [None] * 3
    wanted = [views[k] for k in places]
    for k, grad in zip(places, torch.autograd.grad(losses, wanted, grads, create_graph=again), strict=True):
        results[k] = grad
    return results
