"""What is measured: sizes, labels and dtypes, and the tensors made from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Up to this many samples every anchor is checked against float64, beyond it a random thousand: all of them would take
# longer than all else.
CHECK_ALL_UP_TO = {"cpu": 16384, "cuda": 65536}
SAMPLE = 1024


@dataclass(frozen=True)
class Case:
    n: int
    d: int = 128
    c: int = 100
    labels: str = "soft"
    dtype: str = "float32"
    temperature: float = TEMPERATURE

    def __str__(self) -> str:
        tau = "" if self.temperature == TEMPERATURE else f"  temperature {self.temperature:g}"
        return f"N={self.n}  D={self.d}  C={self.c}  {self.labels} labels  {self.dtype}{tau}"


@dataclass(frozen=True)
class Problem:
    case: Case
    features: Tensor  # (N, D), a leaf
    labels: Tensor  # (N,) integers, or (N, C) whose rows sum to one
    sample: Tensor | None = None  # numbers of the anchors that count; None: all do

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def anchors(self) -> Tensor:
        return torch.arange(self.case.n, device=self.device) if self.sample is None else self.sample

    @property
    def weight(self) -> Tensor | None:
        """(N,), one for the anchors that count and zero for others; None if all count."""
        if self.sample is None:
            return None
        return torch.zeros(self.case.n, device=self.device).index_fill_(0, self.sample, 1)

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass: a mean's gradient would underflow in float16."""
        return float(self.case.n) if self.features.dtype == torch.float16 else 1.0


def make_problem(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(case.n, case.d, generator=generator).to(device, DTYPES[case.dtype]).requires_grad_()
    if case.labels == "hard":
        labels = torch.randint(case.c, (case.n,), generator=generator)
    else:
        labels = torch.softmax(3 * torch.randn(case.n, case.c, generator=generator), 1)
        labels = labels.to(compute_dtype(features))
    return Problem(case, features, labels.to(device))


def sampled(problem: Problem) -> Problem:
    """The same problem where it is small enough to be checked as a whole; else with a few anchors that count."""
    if problem.case.n <= CHECK_ALL_UP_TO[problem.device.type]:
        return problem
    order = torch.randperm(problem.case.n, generator=torch.Generator().manual_seed(1))
    return replace(problem, sample=order[:SAMPLE].to(problem.device))


def compute_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def unit_rows(problem: Problem) -> Tensor:
    x = problem.features.detach()
    return F.normalize(x.to(compute_dtype(x)), dim=1)
