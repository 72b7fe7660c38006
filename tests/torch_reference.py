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


def _term(queries, keys, weights, keep, log_weight, temperature, base_temperature):
    if keys.shape[0] == 0 or not keep.any():
        return (queries * 0).sum(dim=1), queries.new_zeros(queries.shape[0])
    logits = queries @ keys.T / temperature
    weights = torch.where(keep, weights, torch.zeros_like(weights))
    some = keep.any(dim=1, keepdim=True)  # an anchor without contrasts is left out of all below
    weighted = torch.where(keep, logits + log_weight, torch.where(some, float("-inf"), 0.0))
    log_prob = logits - torch.where(some, torch.logsumexp(weighted, dim=1, keepdim=True), 0.0)
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
    include_batch=False,
    contrast_weight=None,
    ignore_index=None,
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
    count = len(rows) if contrast_mode == "all" else number  # anchors: the first `count` rows of the flat order
    if contrast_features is not None and not include_batch:
        own = slice(0, 0)
    else:
        own = slice(number, 2 * number) if contrast_mode == "one" else slice(0, len(rows))
    memory = rows.new_zeros(0, rows.shape[1]) if contrast_features is None else contrast_features.double()
    excluded = own.stop > 0 and contrast_mode != "one"

    # Which rows are there, and the weights of contrasts.
    there, there_too = (torch.ones(len(x), dtype=torch.bool, device=device) for x in (rows, memory))
    log_weight = torch.zeros(own.stop - own.start + len(memory), dtype=torch.float64, device=device)
    if ignore_index is not None:
        there = _flat_labels(labels, number, len(views), device) != ignore_index
        if contrast_labels is not None:
            there_too = contrast_labels != ignore_index
    if contrast_weight is not None:
        if contrast_features is None:
            of_rows = contrast_weight if contrast_weight.dim() == 2 else contrast_weight[:, None].expand(-1, len(views))
            of_rows = of_rows.T.flatten()
            there, log_weight = there & (of_rows > 0), of_rows.double()[own].log()
        else:
            log_weight = contrast_weight.double().log()
            if excluded:
                there = there & (contrast_weight[: len(rows)] > 0)
    rows, memory = (
        torch.where(kept[:, None], x, torch.zeros_like(x)) for kept, x in ((there, rows), (there_too, memory))
    )
    rows, memory = (_unit(x) if normalize else x for x in (rows, memory))
    queries, keys = rows[:count], torch.cat([rows[own], memory])
    keep = (torch.cat([there[own], there_too]) & (log_weight > float("-inf"))).expand(count, -1).clone()
    if excluded:
        keep.fill_diagonal_(False)
    keep &= there[:count, None]

    def weigh(of_batch, others):
        flat = _flat_labels(of_batch, number, len(views), device)
        if contrast_features is None:
            return _weights(flat[:count], flat[own])
        if others is None:
            others = torch.full((len(memory),), -1, device=device)
            if own.stop - own.start <= (number if excluded else 0):  # no other view of a sample
                others[:number] = torch.arange(number, device=device)
        return _weights(flat[:count], torch.cat([flat[own].to(others.dtype), others]) if include_batch else others)

    if label_similarity is not None:
        weights = label_similarity.double()
        if weights.shape != keep.shape:
            columns = [weights[:, :number].repeat(1, (own.stop - own.start) // max(number, 1)), weights[:, number:]]
            weights = torch.cat(columns, 1) if own.stop > 0 else weights
            weights = weights.repeat(count // weights.shape[0], 1)
    else:
        weights = weigh(labels, contrast_labels)

    if sample_weight is None:
        per_anchor = torch.ones(count, dtype=torch.float64, device=device)
    elif sample_weight.dim() == 1:
        per_anchor = sample_weight.double().repeat(len(views))[:count]
    else:
        per_anchor = sample_weight.double().T.flatten()[:count]

    per_anchor = torch.where(there[:count], per_anchor, torch.zeros_like(per_anchor))
    shared = (keep, log_weight, temperature, base_temperature)
    losses, mass = _term(queries, keys, weights, *shared)
    total = _reduce(losses, mass, per_anchor, empty_anchors, reduction)
    if teacher_labels is not None:
        weights = weigh(teacher_labels, contrast_teacher_labels)
        losses, mass = _term(queries, keys, weights, *shared)
        total = total + teacher_weight * _reduce(losses, mass, per_anchor, empty_anchors, reduction)
    return total
