"""What every method is checked against: the same quantity in float64, a block of rows at a time.

- "loss": the mean of the loss over the anchors that count, as a function of the features;
- "lse": per anchor, the log-sum-exp of its logits without the self term, as a function of the unit rows z;
- "lse_with_self": per anchor, the log-sum-exp of all its logits minus the self term, likewise. It is what Inf-CL
  computes when z is contrasted with itself. Its gradient error is relative to the gradient of the log-sum-exp: the self
  term, which it subtracts, nearly cancels that, and would make any error look large.
- "clip": the mean of that, CLIP's loss of z with itself, which is the same in both directions.

The gradient of the last three is that of their mean over the anchors that count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import Problem, unit_rows
from torch import Tensor

WITH_SELF = ("lse_with_self", "clip")


class Reference(NamedTuple):
    value: Tensor  # 0-dim, or one for each anchor that counts; float64
    gradient: Tensor  # (N, D), float64
    norm: float  # what errors of the gradient are relative to
    nonempty: float  # share of the anchors that have positives


def float64_reference(problem: Problem, quantity: str) -> Reference:
    everyone = torch.arange(problem.case.n, device=problem.device)
    x = (problem.features.detach() if quantity == "loss" else unit_rows(problem)).double().requires_grad_()
    z = F.normalize(x, dim=1) if quantity == "loss" else x
    leaf = z.detach().requires_grad_()
    y = F.normalize(problem.labels.double(), dim=1) if problem.labels.is_floating_point() else problem.labels
    values, nonempty = [], 0
    for rows in problem.anchors.split(max(1, 2**23 // problem.case.n)):
        itself = rows[:, None] == everyone
        s = (leaf[rows] / problem.case.temperature) @ leaf.T
        value = (s if quantity in WITH_SELF else s.masked_fill(itself, -torch.inf)).logsumexp(1)
        if quantity == "loss":
            w = (y[rows] @ y.T if y.dim() == 2 else (y[rows, None] == y).double()).masked_fill_(itself, 0)
            mass = w.sum(1)
            value = (mass * value - (w * s).sum(1)) / (mass + 1e-8)
            nonempty += (mass > 1e-8).sum().item()
        (value.sum() / len(problem.anchors)).backward()
        values.append(value.detach())
    value, gradient = torch.cat(values), leaf.grad
    if quantity == "loss":
        z.backward(gradient)
        return Reference(value.mean(), x.grad, x.grad.norm().item(), nonempty / len(problem.anchors))
    norm = gradient.norm().item()
    if quantity in WITH_SELF:
        own = leaf.detach()[problem.anchors] / problem.case.temperature
        value = value - (own * leaf.detach()[problem.anchors]).sum(1)
        gradient = gradient.index_add(0, problem.anchors, own, alpha=-2 / len(problem.anchors))
    return Reference(value.mean() if quantity == "clip" else value, gradient, norm, 1.0)


class Errors(NamedTuple):
    loss: float | None  # relative
    row: float | None  # absolute, the largest over the anchors
    gradient: float  # relative, in norm


def errors(problem: Problem, reference: Reference, output: Tensor, gradient: Tensor, share: float = 1.0) -> Errors:
    """How far a method's output and gradient are from the reference, whose mean is over `share` of the anchors."""
    output, gradient = output.detach().double(), gradient.double() / problem.loss_scale
    value, expected = reference.value / share, reference.gradient / share
    gradient_error = ((gradient - expected).norm() / (reference.norm / share)).item()
    if value.dim() == 0:
        return Errors(((output - value).abs() / value.abs()).item(), None, gradient_error)
    return Errors(None, (output[problem.anchors] - reference.value).abs().max().item(), gradient_error)
