"""The equation as it stands, on whole matrices, and its gradient written down.

With s the logits, p their softmax, c what comes from above and W the positive mass,

    d/ds_ij sum_i c_i sum_j w_ij log p_ij = c_i (w_ij - W_i p_ij).

With weights of contrasts, p_ij is exp(s_ij) / sum_k weight_k exp(s_ik) in the logarithm and weight_j times that in the
derivative.

Where an anchor has but one positive, k, and q is the softmax of the others,

    log p_ik = log(1 / (1 + exp(lse_i - s_ik))),    d/ds_ij = c_i (1 - p_ik) ([j = k] - q_ij):

neither is a difference of large numbers when a model is trained and p_ik is all but one.

`equation` and `equation_of_pairs` are what has second derivatives; `log_likelihoods` gives the same with a first one
that takes fewer passes over matrices and fewer calls into torch, of which small batches consist. A second derivative
goes through the first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import logsigmoid

from genscl_loss._backends import dense, row_lse
from genscl_loss._checks import is_transformed
from genscl_loss._library import is_batched, without_autocast
from genscl_loss._unit import inverse_lengths, unit_pair, unit_rows_grad


def log_likelihoods(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    weights: Sequence[Tensor],
    self_offset: int | None,
    normalize: bool,
    partner: int | None = None,
    num_live: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """sum_j w_ij log p_ij and W_i of each anchor, for each matrix of weights; as often differentiable as wanted.

    Args:
        anchors: (A, D), of any length if they are to be normalised.
        contrasts: (M, D); None: the anchors themselves.
        scale: 0-dim, one over the temperature.
        weight: Of each contrast, (M,), or None.
        weights: (A, M), with zeros in the self terms.
        self_offset: anchor i is contrast i + self_offset; None if no anchor is a contrast.
        normalize: Whether rows are to be scaled to unit length.
        partner: Contrast (i + partner) modulo M is all that anchor i has, with weight one, and there are no weights.
        num_live: Contrasts that can have a gradient, the first ones; None: all.
    """
    if partner is not None:
        if _needs_plain_operations(()):
            likelihood = equation_of_pairs(anchors, contrasts, scale, self_offset, partner, normalize)
        else:
            likelihood = _Equation.apply(  # type: ignore[no-untyped-call]
                anchors, contrasts, scale, None, self_offset, normalize, partner, num_live
            )[0]
        return [(likelihood, torch.ones_like(likelihood).detach())]
    if _needs_plain_operations(weights):
        return list(zip(*equation(anchors, contrasts, scale, weight, weights, self_offset, normalize), strict=True))
    masses = [w.sum(1) for w in weights]
    found = _Equation.apply(  # type: ignore[no-untyped-call]
        anchors, contrasts, scale, weight, self_offset, normalize, None, num_live, *weights, *masses
    )
    return list(zip(found, masses, strict=True))


def equation(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    weights: Sequence[Tensor],
    self_offset: int | None,
    normalize: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The likelihoods and the masses, in plain operations."""
    z, others = unit_pair(anchors, contrasts, normalize)
    log_p = dense.log_softmax(z, z if others is None else others, scale, self_offset, weight)
    found = [dense.log_likelihood(log_p, w) for w in weights]
    return [likelihood for likelihood, _ in found], [mass for _, mass in found]


def equation_of_pairs(
    anchors: Tensor, contrasts: Tensor | None, scale: Tensor, self_offset: int | None, partner: int, normalize: bool
) -> Tensor:
    """The likelihood of the only positive of each anchor, in plain operations."""
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


class _Equation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        contrasts: Tensor | None,
        scale: Tensor,
        weight: Tensor | None,
        self_offset: int | None,
        normalize: bool,
        partner: int | None,
        num_live: int | None,
        *weights_and_masses: Tensor,
    ) -> tuple[Tensor, ...]:
        weights = weights_and_masses[: len(weights_and_masses) // 2]
        with without_autocast(anchors.device):
            z, factor = _unit(anchors, normalize)
            others, other_factor = (z, factor) if contrasts is None else _unit(contrasts, normalize)
            if partner is None:
                log_p = dense.log_softmax(z, others, scale, self_offset, weight)
                likelihoods, kept = tuple((w * log_p).sum(1) for w in weights), log_p
            else:
                likelihood, kept = _of_pairs(z, others, scale, self_offset, partner)
                if not normalize:  # NaN if an entry is infinite: a logit may pass for one that is merely large
                    likelihood += (torch.linalg.vector_norm(others, torch.inf) + torch.linalg.vector_norm(z, 1, 1)) * 0
                likelihoods = (likelihood,)
        rows = (anchors, contrasts, z, None if contrasts is None else others)
        of_pairs = None if partner is None else likelihoods[0]
        ctx.save_for_backward(*rows, scale, weight, kept, of_pairs, factor, other_factor, *weights_and_masses)
        ctx.options = self_offset, normalize, partner
        ctx.num_live = num_live
        return likelihoods

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        anchors, contrasts, z, others, scale, weight, kept, of_pairs, factor, other_factor, *rest = ctx.saved_tensors
        weights, masses, wanted = rest[: len(rest) // 2], rest[len(rest) // 2 :], ctx.needs_input_grad[:3]
        none = [None] * (5 + len(rest))
        with without_autocast(anchors.device):
            if torch.is_grad_enabled() or any(map(is_batched, grads)):
                return *_again(ctx, (anchors, contrasts, scale), weight, weights, grads), *none
            d_logits = kept.exp() if weight is None else (kept + weight.log()).exp_()
            if of_pairs is not None:
                missing = grads[0] * torch.expm1(of_pairs)  # minus (1 - p)
                d_logits.mul_(missing[:, None])
                _fill(d_logits, ctx.options[2], missing.neg())
            else:
                d_logits.mul_(sum(c * mass for c, mass in zip(grads, masses, strict=True)).neg()[:, None])
                for c, w in zip(grads, weights, strict=True):
                    d_logits.addcmul_(w, c[:, None])
            d_z = d_logits @ (z if others is None else others)
            d_scale = (z * d_z).sum().to(scale.dtype) if wanted[2] else None
            d_others = None
            if contrasts is None:
                d_z.addmm_(d_logits.T, z).mul_(scale)
            else:
                d_z.mul_(scale)
                if wanted[1]:
                    d_others = torch.empty_like(others) if ctx.num_live is None else torch.zeros_like(others)
                    live = slice(ctx.num_live)
                    torch.mm(d_logits[:, live].T, z, out=d_others[live])
                    d_others[live].mul_(scale)
            if factor is not None:
                unit_rows_grad(d_z, anchors, factor)
                if d_others is not None:
                    unit_rows_grad(d_others[live], contrasts[live], other_factor[live])
        return d_z if wanted[0] else None, d_others, d_scale, *none


def _of_pairs(z: Tensor, others: Tensor, scale: Tensor, self_offset: int | None, partner: int) -> tuple[Tensor, Tensor]:
    """The likelihood of each positive, and the logarithms of the softmax of the others, zero at the positive."""
    logits = dense.logits(z, others, scale, [] if self_offset is None else [self_offset])
    columns = _columns(partner, logits)
    positive = logits.gather(1, columns)
    logits.scatter_(1, columns, torch.finfo(logits.dtype).min)
    lse = logits.logsumexp(1, keepdim=True)
    return logsigmoid(positive - lse).squeeze(1), logits.sub_(lse)


def _columns(partner: int, matrix: Tensor) -> Tensor:
    """Where in a matrix of pairs the positive of each anchor is, (A, 1)."""
    num_anchors, num_contrasts = matrix.shape
    return torch.arange(partner, partner + num_anchors, device=matrix.device).remainder_(num_contrasts)[:, None]


def _fill(matrix: Tensor, partner: int, values: Tensor) -> None:
    """Put a value of each anchor where its positive is."""
    matrix.scatter_(1, _columns(partner, matrix), values[:, None])


def _unit(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    if not normalize:
        return rows, None
    factor = inverse_lengths(rows.detach())
    return rows * factor, factor


def _again(
    ctx: Any,
    inputs: Sequence[Tensor | None],
    weight: Tensor | None,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradient as a function that can be differentiated, and taken for several upstream gradients at a time."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: derivatives are to stop here, also where one of these tensors was computed from another.
        views = [x if x is None else x.view_as(x) for x in inputs]
        anchors, contrasts, scale = views
        assert anchors is not None and scale is not None
        self_offset, normalize, partner = ctx.options
        if partner is None:
            likelihoods, _ = equation(anchors, contrasts, scale, weight, weights, self_offset, normalize)
        else:
            likelihoods = [equation_of_pairs(anchors, contrasts, scale, self_offset, partner, normalize)]
    places = [k for k in range(3) if ctx.needs_input_grad[k]]
    wanted: list[Any] = [views[k] for k in places]
    found: list[Tensor | None] = [None] * 3
    for k, grad in zip(places, torch.autograd.grad(likelihoods, wanted, grads, create_graph=again), strict=True):
        found[k] = grad
    return found
