"""Rows that are spread over owners have together the results and gradients of all rows in one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscl_loss import available_backends
from genscl_loss._backends import fused, mirrored_row_lse
from genscl_loss._positives import ClassLabels, mirrored_positives

SIZES = [(70,), (1, 69), (33, 4, 90), (600, 1, 530)]


def rows(n: int, d: int, norm: float | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n + d), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1).to(dtype) if norm is None else (x * norm).to(dtype)


def exchange(sizes: tuple[int, ...], backward: Any) -> list[Any]:
    """What `backward(rank, share)` returns for each owner, where `share` has the numbers of all owners."""
    told: dict[int, list[torch.Tensor]] = {rank: [] for rank in range(len(sizes))}

    def note(rank: int, numbers: torch.Tensor) -> torch.Tensor:
        told[rank].append(numbers)
        return numbers.new_zeros(sum(sizes), numbers.shape[1])

    for rank in told:
        backward(rank, lambda numbers, rank=rank: note(rank, numbers))
    every = [torch.cat(numbers) for numbers in zip(*told.values(), strict=True)]

    def all_of(left: list[torch.Tensor], numbers: torch.Tensor, rank: int) -> torch.Tensor:
        result = left.pop(0)
        first = sum(sizes[:rank])
        assert torch.equal(result[first : first + sizes[rank]], numbers)
        return result

    return [backward(rank, lambda x, left=list(every), rank=rank: all_of(left, x, rank)) for rank in told]


def reference(z: torch.Tensor, scale: float, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leaf, s = z.double().requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    logits = (leaf @ leaf.T * s).fill_diagonal_(-torch.inf)
    lse = logits.logsumexp(1)
    return lse.detach(), *torch.autograd.grad(lse, (leaf, s), upstream.double())


def check(
    sizes: tuple[int, ...], z: torch.Tensor, scale: float, backend: str, bound: float, *, unit: bool, **options: Any
) -> None:
    n = sum(sizes)
    upstream = torch.linspace(-1, 2, n, dtype=z.dtype)

    def backward(rank: int, share: Any) -> tuple[torch.Tensor, ...]:
        first = sum(sizes[:rank])
        own = slice(first, first + sizes[rank])
        leaf, s = z[own].clone().requires_grad_(), torch.tensor(scale, dtype=z.dtype, requires_grad=True)
        lse = mirrored_row_lse(leaf, z, s, first, share, unit=unit, precision="highest", backend=backend, **options)
        return lse.detach(), *torch.autograd.grad(lse, (leaf, s), upstream[own])

    results = exchange(sizes, backward)
    lse, d_z, d_scale = reference(z, scale, upstream)
    for found, exact in (
        (torch.cat([result[0] for result in results]), lse),
        (torch.cat([result[1] for result in results]), d_z),
        (sum(result[2] for result in results), d_scale),
    ):
        assert (found.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_tiles(sizes, unit):
    """Over the edges of tiles, and where rows and columns of one tile are different parts of the same rows."""
    check(sizes, rows(sum(sizes), 5, None if unit else 1.5), 14.0, "tiled", 1e-12, unit=unit)


@pytest.mark.parametrize("norm", [10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_of_huge_logits(norm, dtype):
    """A logit is rounded in the row of either end, so that gradients are as good as the largest logit."""
    z = rows(127, 5, norm, dtype)
    largest = 14 * float(z.square().sum(1).max())
    check((33, 4, 90), z, 14.0, "tiled", torch.finfo(dtype).eps * largest, unit=False)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("sizes", SIZES[:3])
def test_kernels(sizes, unit):
    if "triton" not in available_backends() or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    check(sizes, rows(sum(sizes), 20, None if unit else 0.3, torch.float32), 14.0, "triton", 5e-6, unit=unit)


def test_kernels_with_split_columns(monkeypatch):
    if "triton" not in available_backends() or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(fused, "_multiprocessors", lambda device: 64)
    check((150, 300), rows(450, 20, None, torch.float32), 14.0, "triton", 5e-6, unit=True)


@pytest.mark.parametrize("sizes", [(70,), (1, 69), (33, 4, 90)])
def test_alignment(sizes):
    n = sum(sizes)
    z, upstream = rows(n, 6), torch.linspace(-1, 2, n, dtype=torch.float64)
    classes = torch.randint(-3, 3, (n,), generator=torch.Generator().manual_seed(1))

    def backward(rank: int, share: Any) -> tuple[torch.Tensor, ...]:
        first = sum(sizes[:rank])
        own = slice(first, first + sizes[rank])
        leaf = z[own].clone().requires_grad_()
        alignment, mass = mirrored_positives(leaf, z, ClassLabels(classes[own], classes), first, share)
        return alignment.detach(), mass, torch.autograd.grad(alignment, leaf, upstream[own])[0]

    results = exchange(sizes, backward)
    leaf = z.clone().requires_grad_()
    weights = (classes[:, None] == classes).double().fill_diagonal_(0)
    alignment = (leaf * (weights @ leaf)).sum(1)
    exact = alignment.detach(), weights.sum(1), torch.autograd.grad(alignment, leaf, upstream)[0]
    for index, value in enumerate(exact):
        torch.testing.assert_close(torch.cat([result[index] for result in results]), value, rtol=1e-12, atol=1e-12)
