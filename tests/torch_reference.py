"""The loss as one differentiable N x N expression in float64 torch: the reference for gradients.

Written from the definition with whole matrices (the oracle next door loops), and checked against that oracle in
`test_loss.py`. It imports nothing of the package. Memory is N x N and nothing is fast; float64 makes it exact enough
to judge float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _view_list(features) -> list[Tensor]:
    if isinstance(features, (list, tuple)):
        return [view.double() for view in features]
    if features.dim() == 2:
        return [features.double()]
    return [view.flatten(1).double() for view in features.unbind(1)]


def _flat_labels(labels, number: int, views: int, device) -> Tensor:
    """Labels of all views stacked view-major: (V*N,) or (V*N, C)."""
    if labels is None:
        return torch.arange(number, device=device).repeat(views)
    if isinstance(labels, (list, tuple)):
        return torch.cat(list(labels))
    if labels.dim() == 3:
        return torch.cat(labels.unbind(1))
    return torch.cat([labels] * views)


def _unit(rows: Tensor) -> Tensor:
    zero = (rows == 0).all(dim=1, keepdim=True)
    # A zero row is replaced before the division: a where() after it would leave NaN in the gradient.
    safe = torch.where(zero, torch.ones_like(rows), rows)
    return torch.where(zero, torch.zeros_like(rows), safe / safe.norm(dim=1, keepdim=True))


def _weights(left: Tensor, right: Tensor) -> Tensor:
    if left.dim() == 1:
        return (left[:, None] == right[None, :]).double()
    return _unit(left.double()) @ _unit(right.double()).T


def _term(queries, keys, weights, keep, temperature, base_temperature):
    if keys.shape[0] == 0 or not keep.any():
        return (queries * 0).sum(dim=1), queries.new_zeros(queries.shape[0])
    logits = queries @ keys.T / temperature
    weights = torch.where(keep, weights, torch.zeros_like(weights))
    log_prob = logits - torch.logsumexp(logits.masked_fill(~keep, float("-inf")), dim=1, keepdim=True)
    mass = weights.sum(dim=1)
    losses = -(weights * log_prob).sum(dim=1) / (mass + 1e-8)
    if base_temperature is not None:
        tau = temperature.detach() if isinstance(temperature, Tensor) else temperature
        losses = losses * (tau / base_temperature)
    return losses, mass


def _reduce(losses, mass, weights, empty_anchors, reduction):
    if reduction == "none":
        return weights * losses
    if reduction == "sum":
        return (weights * losses).sum()
    if empty_anchors == "ignore":
        keep = mass > 1e-8
        losses, weights = losses[keep], weights[keep]
    total = weights.sum()
    if total == 0:
        return (weights * losses).sum()
    return (weights * losses).sum() / total


def reference_loss(
    features,
    labels=None,
    *,
    label_similarity=None,
    temperature=0.07,
    base_temperature=0.07,
    contrast_mode="all",
    contrast_features=None,
    contrast_labels=None,
    teacher_labels=None,
    contrast_teacher_labels=None,
    teacher_weight=1.0,
    sample_weight=None,
    empty_anchors="zero",
    normalize=True,
    reduction="mean",
) -> Tensor:
    """Names and defaults of `gen_supcon_loss`; every tensor argument may require a gradient."""
    views = _view_list(features)
    number, device = views[0].shape[0], views[0].device
    rows = torch.cat(views)
    rows = _unit(rows) if normalize else rows
    count = len(rows) if contrast_mode == "all" else number  # anchors: the first `count` rows of the flat order
    if contrast_features is not None:
        keys = _unit(contrast_features.double()) if normalize else contrast_features.double()
        chosen = None
    else:
        chosen = slice(number, 2 * number) if contrast_mode == "one" else slice(None)
        keys = rows[chosen]
    queries = rows[:count]
    keep = torch.ones(count, len(keys), dtype=torch.bool, device=device)
    if contrast_features is None and contrast_mode != "one":
        keep.fill_diagonal_(False)

    def weigh(own, others):
        flat = _flat_labels(own, number, len(views), device)
        if chosen is not None:
            return _weights(flat[:count], flat[chosen])
        return _weights(flat[:count], torch.arange(len(keys), device=device) if others is None else others)

    if label_similarity is not None:
        weights = label_similarity.double()
        if weights.shape != keep.shape:
            weights = weights.repeat(count // weights.shape[0], len(keys) // max(weights.shape[1], 1))
    else:
        weights = weigh(labels, contrast_labels)

    if sample_weight is None:
        per_anchor = torch.ones(count, dtype=torch.float64, device=device)
    elif sample_weight.dim() == 1:
        per_anchor = sample_weight.double().repeat(len(views))[:count]
    else:
        per_anchor = sample_weight.double().T.flatten()[:count]

    losses, mass = _term(queries, keys, weights, keep, temperature, base_temperature)
    total = _reduce(losses, mass, per_anchor, empty_anchors, reduction)
    if teacher_labels is not None:
        weights = weigh(teacher_labels, contrast_teacher_labels)
        losses, mass = _term(queries, keys, weights, keep, temperature, base_temperature)
        total = total + teacher_weight * _reduce(losses, mass, per_anchor, empty_anchors, reduction)
    return total
