"""The operator of the labels: against the matrix of similarities, by opcheck, and where float64 would be slow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from genscl_loss import _attract

SHAPES = [(6, None, 0), (6, 6, 0), (3, 9, 0), (3, 9, 5), (5, 3, -2), (8, 8, None)]
D, C = 5, 4


def make(a: int, m: int | None, kind: str, dtype=torch.float64):
    """Rows and labels of anchors and of contrasts, if these are others."""
    generator = torch.Generator().manual_seed(a)
    given = []
    for n in (a, m):
        rows = None if n is None else torch.randn(n, D, generator=generator, dtype=dtype)
        labels = None if n is None else torch.rand(n, C, generator=generator, dtype=dtype)
        given.append((rows, labels if labels is None or kind == "soft" else labels.argmax(1)))
    (anchors, left), (contrasts, right) = given
    return anchors, contrasts, left, right


def attract(anchors, contrasts, a, b, self_offset, normalize):
    return torch.ops.genscl_loss.attract(*arguments(anchors, contrasts, a, b, self_offset, normalize))


def arguments(anchors, contrasts, a, b, self_offset, normalize):
    factors = [_attract._factor(x) if normalize else None for x in (anchors, contrasts)]
    return anchors, contrasts, a, b, *factors, *map(_attract._factor, (a, b)), self_offset


def plain(anchors, contrasts, a, b, self_offset, normalize):
    """Every similarity written down."""
    z, others = (x if x is None or not normalize else x / x.norm(dim=1, keepdim=True) for x in (anchors, contrasts))
    b = a if b is None else b
    if a.dim() == 1:
        weights = (a[:, None] == b).to(z.dtype)
    else:
        weights = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    if self_offset is not None:
        index = torch.arange(len(a))[:, None] + self_offset
        weights = weights.masked_fill(torch.arange(len(b)) == index, 0)
    right = z if others is None else others
    return z, z.new_empty(0) if others is None else others, (z * (weights @ right)).sum(1), weights.sum(1)


def differentiable(*tensors):
    return [x if x is None or not x.is_floating_point() else x.requires_grad_() for x in tensors]


@pytest.fixture(params=["whole", "parts"])
def parts(request, monkeypatch):
    """Sums a few rows, or columns, at a time."""
    if request.param == "parts":
        monkeypatch.setattr(_attract, "_CHUNK", 2 * (C + D))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("a, m, self_offset", SHAPES)
def test_values_and_derivatives_are_those_of_the_matrix(a, m, self_offset, kind, normalize, parts):
    inputs = differentiable(*make(a, m, kind))
    ours = attract(*inputs, self_offset, normalize)
    exact = plain(*inputs, self_offset, normalize)
    weights = [torch.randn_like(y) for y in exact]
    leaves = [x for x in inputs if x is not None and x.is_floating_point()]

    def gradients(outputs, **options):
        pairs = [(y * w).sum() for y, w in zip(outputs, weights, strict=True) if y.requires_grad and y.numel()]
        return torch.autograd.grad(sum(pairs), leaves, **options)

    for y, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(y, reference)
    first, exact_first = gradients(ours, create_graph=True), gradients(exact, create_graph=True)
    for gradient, reference in zip(first, exact_first, strict=True):
        torch.testing.assert_close(gradient, reference)
    if normalize or kind == "soft":
        second, exact_second = (
            torch.autograd.grad(sum((g**2).sum() for g in each), leaves) for each in (first, exact_first)
        )
        for gradient, reference in zip(second, exact_second, strict=True):
            torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("a, m, self_offset", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_are_registered_correctly(a, m, self_offset, kind, dtype, wanted):
    anchors, contrasts, left, right = make(a, m, kind, dtype)
    if wanted[0]:
        anchors, contrasts = differentiable(anchors, contrasts)
    if wanted[1]:
        left, right = differentiable(left, right)
    rest = arguments(anchors, contrasts, left, right, self_offset, True)
    opcheck(torch.ops.genscl_loss.attract.default, rest)
    flags = [x is not None and x.requires_grad for x in rest[:4]]
    rest = [x.detach() if isinstance(x, torch.Tensor) else x for x in rest]  # nothing compiled has second derivatives
    z, others, attraction, mass = torch.ops.genscl_loss.attract(*rest)
    upstream = (attraction, mass, z, None if contrasts is None else others)
    opcheck(torch.ops.genscl_loss.attract_grad.default, (*upstream, *rest, flags))
    opcheck(torch.ops.genscl_loss.attract_grad.default, (attraction, None, None, None, *rest, flags))


def test_the_operators_take_any_strides():
    anchors, labels = torch.randn(D, 6).T, torch.rand(12, 2 * C)[::2, ::2]
    opcheck(torch.ops.genscl_loss.attract.default, arguments(*differentiable(anchors, None, labels, None), 0, True))
    rows = torch.randn(1, D).expand(6, D)
    opcheck(
        torch.ops.genscl_loss.attract.default,
        arguments(rows, anchors.detach(), labels.detach(), labels.detach(), 0, False),
    )


# The sums over label vectors: float64 for devices where that is fast, blocks for the others


def sums(a, b, x, self_offset):
    """All parts put together."""
    sides = [_attract._Side(lambda rows, _, y=y: y[rows].double(), *y.shape, y.device) for y in (a, b)]
    out = x.new_empty(len(a), x.shape[1])
    columns = x.shape[1]
    for rows, cols, part in _attract._sums(*sides, lambda rows, cols: x[rows, cols].double(), columns, self_offset):
        out[rows, cols] = part
    return out


@given(
    a=st.integers(1, 300),
    m=st.integers(1, 300),
    classes=st.integers(1, 4),
    self_offset=st.none() | st.integers(-310, 310),
    seed=st.integers(0, 99),
)
def test_both_ways_to_sum_over_label_vectors_agree_with_the_matrix(a, m, classes, self_offset, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.rand(a, classes, generator=generator), torch.rand(m, classes, generator=generator)
    x = torch.randn(m, 3, generator=generator)
    weights = left.double() @ right.double().T
    if self_offset is not None:
        index = torch.arange(a)[:, None] + self_offset
        weights = weights.masked_fill(torch.arange(m) == index, 0)
    exact = weights @ x.double()
    for compute in (sums, _attract._sums_by_blocks):
        value = compute(left, right, x, self_offset).double()
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5 * float(weights.sum(1).max()))


@pytest.mark.parametrize("compute", [sums, _attract._sums_by_blocks])
def test_what_little_the_self_term_leaves_is_exact(compute):
    """Sharp softmax labels of 1000 classes: positive masses down to 1e-10, which a float32 subtraction would drown."""
    generator = torch.Generator().manual_seed(0)
    y = torch.nn.functional.normalize(torch.softmax(25 * torch.randn(256, 1000, generator=generator), 1), dim=1)
    x = torch.ones(256, 1)
    exact = (y.double() @ y.double().T).fill_diagonal_(0).sum(1)
    assert exact.min() < 1e-7
    mass = compute(y, y, x, 0)[:, 0].double()
    assert ((mass - exact).abs() / exact).max() < 1e-5
    naive = ((y @ (y.T @ x))[:, 0] - (y * y).sum(1)).double()
    assert ((naive - exact).abs() / exact).max() > 0.5  # else this test could not fail


def test_sums_over_a_large_class_are_exact():
    """50,000 equal rows: added up one by one in float32 their sum is off by 1e-3."""
    n = 50_000
    x = torch.full((n, 1), 0.1)
    same = torch.zeros(n, dtype=torch.long)
    _, _, attraction, mass = attract(x, None, same, None, 0, False)
    assert mass.unique().tolist() == [n - 1]
    torch.testing.assert_close(attraction.double(), (n - 1) * x[:, 0].double() ** 2, rtol=1e-6, atol=0)


# Rows of unit length


@pytest.mark.parametrize("row", [[0.0, 0.0], [1e-19, 0.0], [-1e-30, 1e-25]])
def test_a_row_too_short_stays_with_a_gradient_as_of_length_one(row):
    x = torch.tensor([row, [3.0, 4.0]], requires_grad=True)
    labels = torch.zeros(2, dtype=torch.long)
    z = attract(x, None, labels, None, 0, True)[0]
    torch.testing.assert_close(z.detach(), torch.tensor([row, [0.6, 0.8]]))
    upstream = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(torch.autograd.grad(z, x, upstream)[0], upstream)


def test_a_row_whose_squares_overflow_is_nan():
    x = torch.tensor([[1e30, 1.0], [3.0, 4.0]])
    z = attract(x, None, torch.zeros(2, dtype=torch.long), None, 0, True)[0]
    assert z[0].isnan().all()
    assert z[1].isfinite().all()


def test_a_second_derivative_does_not_pass_through_tensors_that_others_are_made_of():
    """The derivative with respect to rows ends there, also where the labels were computed from them."""
    rows = torch.rand(6, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def penalty(pull) -> torch.Tensor:
        attraction, mass = pull(rows, rows * 1.0 + rows.square())
        (first,) = torch.autograd.grad(attraction.square().sum() + mass.square().sum(), rows, create_graph=True)
        return torch.autograd.grad(first.square().sum(), rows)[0]

    found = penalty(lambda x, y: attract(x, None, y, None, 0, True)[2:])
    torch.testing.assert_close(found, penalty(lambda x, y: plain(x, None, y, None, 0, True)[2:]))
