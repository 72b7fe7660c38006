"""The equation as it stands, on whole matrices, and its gradient written down.

With s the logits, p their softmax, c what comes from above and W the positive mass,

    d/ds_ij sum_i c_i sum_j w_ij log p_ij = c_i (w_ij - W_i p_ij).

With weights of contrasts, p_ij is exp(s_ij) / sum_k weight_k exp(s_ik) before the derivative and weight_j times that
in it.

`equation` is what has second derivatives; `log_likelihoods` gives the same with a first one that takes fewer passes
over matrices and fewer calls into torch, of which small batches consist. A second derivative goes through the first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genscl_loss._backends import dense
from genscl_loss._library import without_autocast
from genscl_loss._unit import inverse_lengths, unit_pair, unit_rows_grad


def log_likelihoods(
    anchors: Tensor,
    contrasts: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    weights: Sequence[Tensor],
    self_offset: int | None,
    normalize: bool,
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
    """
    if _needs_plain_operations(weights):
        return list(zip(*equation(anchors, contrasts, scale, weight, weights, self_offset, normalize), strict=True))
    masses = [w.sum(1) for w in weights]
    found = _Equation.apply(  # type: ignore[no-untyped-call]
        anchors, contrasts, scale, weight, self_offset, normalize, *weights, *masses
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


def _needs_plain_operations(weights: Sequence[Tensor]) -> bool:
    """Where a compiler wants to see them, labels have a gradient, or another kind of derivative is being taken."""
    if torch.compiler.is_compiling() or any(w.requires_grad for w in weights):
        return True
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


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
        *weights_and_masses: Tensor,
    ) -> tuple[Tensor, ...]:
        weights = weights_and_masses[: len(weights_and_masses) // 2]
        with without_autocast(anchors.device):
            z, factor = _unit(anchors, normalize)
            others, other_factor = (z, factor) if contrasts is None else _unit(contrasts, normalize)
            log_p = dense.log_softmax(z, others, scale, self_offset, weight)
            likelihoods = tuple((w * log_p).sum(1) for w in weights)
        rows = (anchors, contrasts, z, None if contrasts is None else others)
        ctx.save_for_backward(*rows, scale, weight, log_p, factor, other_factor, *weights_and_masses)
        ctx.self_offset, ctx.normalize = self_offset, normalize
        return likelihoods

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        anchors, contrasts, z, others, scale, weight, log_p, factor, other_factor, *rest = ctx.saved_tensors
        weights, masses, wanted = rest[: len(grads)], rest[len(grads) :], ctx.needs_input_grad[:3]
        none = [None] * (3 + len(rest))
        with without_autocast(anchors.device):
            if torch.is_grad_enabled():
                return *_again(ctx, (anchors, contrasts, scale), weight, weights, grads), *none
            total = sum(c * mass for c, mass in zip(grads, masses, strict=True))
            softmax = log_p.exp() if weight is None else (log_p + weight.log()).exp_()
            d_logits = softmax.mul_(total.neg()[:, None])
            for c, w in zip(grads, weights, strict=True):
                d_logits.addcmul_(w, c[:, None])
            d_z = d_logits @ (z if others is None else others)
            d_scale = (z * d_z).sum().to(scale.dtype) if wanted[2] else None
            d_others = None
            if contrasts is None:
                d_z.addmm_(d_logits.T, z).mul_(scale)
            else:
                d_z.mul_(scale)
                d_others = (d_logits.T @ z).mul_(scale) if wanted[1] else None
            if factor is not None:
                unit_rows_grad(d_z, anchors, factor)
                if d_others is not None:
                    unit_rows_grad(d_others, contrasts, other_factor)
        return d_z if wanted[0] else None, d_others, d_scale, *none


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
    """The gradient as a function that can be differentiated."""
    # Views: derivatives are to stop here, also where one of these tensors was computed from another.
    views = [x if x is None else x.view_as(x) for x in inputs]
    anchors, contrasts, scale = views
    assert anchors is not None and scale is not None
    likelihoods, _ = equation(anchors, contrasts, scale, weight, weights, ctx.self_offset, ctx.normalize)
    places = [k for k in range(3) if ctx.needs_input_grad[k]]
    wanted: list[Any] = [views[k] for k in places]
    found: list[Tensor | None] = [None] * 3
    for k, grad in zip(places, torch.autograd.grad(likelihoods, wanted, grads, create_graph=True), strict=True):
        found[k] = grad
    return found
