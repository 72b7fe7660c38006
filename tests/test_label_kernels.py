"""The half about labels in Triton kernels, against float64 on matrices: on a GPU or in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from genscl_loss import available_backends, gen_supcon_loss
from genscl_loss._backends import fused as pairs
from genscl_loss._positives import fused
from genscl_loss._positives.labels import ClassLabels, class_numbers

if "triton" not in available_backends():
    pytest.skip('needs backend "triton"', allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(70, None, 0), (1, None, 0), (33, 33, 0), (9, 40, 0), (9, 40, 31), (40, 9, -20), (35, 36, None)]
RAGGED = [(1, 1), (3, 7), (65, 17), (130, 70)]  # features, classes


def make(n: int, d: int, c: int, kind: str, seed: int, sharp: float = 3.0) -> fused.Side:
    """Rows of any length with labels, and what makes both of unit length, by the definition."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator) * torch.rand(n, 1, generator=generator).add_(0.1)
    labels = torch.softmax(sharp * torch.randn(n, c, generator=generator), 1)
    if kind == "hard":
        labels = torch.randint(max(2, min(c, n)), (n,), generator=generator)
    if kind == "soft" and n > 2:
        labels[1] = 0  # a row without labels
    rows, labels = rows.to(DEVICE), labels.to(DEVICE)
    factor = 1 / rows.double().norm(dim=1)
    lengths = None if kind == "hard" else labels.double().norm(dim=1)
    return fused.Side(rows, factor, labels, None if lengths is None else torch.where(lengths > 0, 1 / lengths, 1))


def weights(a: fused.Side, b: fused.Side, self_offset: int | None) -> torch.Tensor:
    if a.is_hard:
        w = (a.labels[:, None] == b.labels).double()
    else:
        w = (a.labels.double() * a.label_factor[:, None]) @ (b.labels.double() * b.label_factor[:, None]).T
    if self_offset is not None:
        w.diagonal(self_offset).zero_()
    return w


def unit(side: fused.Side) -> torch.Tensor:
    """What the kernels make of a row, rounding included."""
    return (side.rows * side.factor.float()[:, None]).double()


def aligned(a: fused.Side, b: fused.Side | None, self_offset: int | None) -> torch.Tensor:
    out = a.factor.new_full((2, len(a.rows)), math.nan)
    fused.align(a, b, self_offset, out)
    return out


def check_align(a: fused.Side, b: fused.Side | None, self_offset: int | None, tolerance: float) -> None:
    others = a if b is None else b
    w = weights(a, others, self_offset)
    z, x = unit(a), unit(others)
    found = aligned(a, b, self_offset)
    torch.testing.assert_close(found[1], w.sum(1), rtol=tolerance, atol=1e-15)
    # Relative to the mass, which it is divided by.
    error = (found[0] - (z * (w @ x)).sum(1)).abs()
    assert (error <= tolerance * w.sum(1) + 1e-15).all(), (error / w.sum(1)).max()


def check_grad(a: fused.Side, b: fused.Side | None, self_offset: int | None, tolerance: float, is_last: bool) -> None:
    others = a if b is None else b
    n, d = a.rows.shape
    generator = torch.Generator().manual_seed(9)
    u = (torch.randn(n, generator=generator) * 1e-3).to(DEVICE)
    w, z, x = weights(a, others, self_offset), unit(a), unit(others)
    live = None if b is None else max(1, len(b.rows) - 3)
    for_anchors = torch.randn(3, n, d, generator=generator).to(DEVICE) * 1e-3
    for_contrasts = None if live is None else torch.zeros(1, live, d, device=DEVICE)
    expected_dots = (z * for_anchors.double().sum(0)).sum(1)
    d_anchors = for_anchors.double().sum(0) + u.double()[:, None] * (w @ x)
    d_contrasts = w.T @ (u.double()[:, None] * z)
    if b is None:
        d_anchors = d_anchors + d_contrasts
    dots = torch.empty_like(u)
    found = fused.align_grad(
        u, u.abs().max(), a, b, self_offset, (for_anchors, for_contrasts), is_last=is_last, dots=dots
    )
    torch.testing.assert_close(dots.double(), expected_dots, rtol=1e-5, atol=1e-8)

    def check(grad: torch.Tensor, exact: torch.Tensor, unit_rows: torch.Tensor, side: fused.Side) -> None:
        if is_last:
            exact = exact * side.factor[: len(exact), None]
        terms = exact.norm()  # of the difference that the normalisation is: of one feature nothing remains
        if is_last:
            exact = exact - unit_rows * (exact * unit_rows).sum(1, keepdim=True)
        assert (grad - exact).norm() <= tolerance * terms + 1e-12

    check(found[0], d_anchors, z, a)
    if b is None:
        assert found[1] is None
    else:
        check(found[1], d_contrasts[:live], x[:live], b)


@pytest.fixture(params=["whole", "parts"])
def parts(request, monkeypatch):
    """Sums over all rows in one part, or in several."""
    if request.param == "parts":
        monkeypatch.setattr(fused, "_PART", 32)


@pytest.fixture
def slow_float64(monkeypatch):
    monkeypatch.setattr(fused, "has_fast_float64", lambda device: False)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_the_matrix(shape, kind, parts):
    a, m, offset = shape
    check_align(make(a, 5, 7, kind, 0), None if m is None else make(m, 5, 7, kind, 1), offset, 1e-12)


@pytest.mark.parametrize("is_last", [True, False])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_matrix(shape, kind, is_last, parts):
    a, m, offset = shape
    check_grad(make(a, 5, 7, kind, 0), None if m is None else make(m, 5, 7, kind, 1), offset, 2e-6, is_last)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("d, c", RAGGED)
def test_any_number_of_features_and_classes(d, c, kind):
    side = make(40, d, c, kind, 0)
    check_align(side, None, 0, 1e-12)
    check_grad(side, None, 0, 2e-6, True)


@pytest.mark.strength(1)
@pytest.mark.parametrize("d, c", RAGGED)
@pytest.mark.parametrize("n", [1, 31, 70])
def test_where_float64_is_slow_nothing_is_subtracted(slow_float64, parts, n, d, c):
    side = make(n, d, c, "soft", 0)
    assert fused.suits(n, None, d, side.labels, 0, DEVICE)
    check_align(side, None, 0, 2e-6)
    check_grad(side, None, 0, 5e-6, True)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("c", [300, pytest.param(8192, marks=pytest.mark.exhaustive)])
def test_a_small_mass_keeps_its_digits(is_fast, c, monkeypatch):
    monkeypatch.setattr(fused, "has_fast_float64", lambda device: is_fast)
    monkeypatch.setattr(fused, "_PART", 32)
    side = make(70, 5, c, "soft", 0, sharp=15.0)
    mass = weights(side, side, 0).sum(1)
    assert mass[mass > 0].min() < 1e-6
    check_align(side, None, 0, 1e-5 if is_fast else 5e-6)


def test_labels_may_be_of_float64_and_longer_than_float32_has_numbers_for():
    side = make(20, 5, 7, "soft", 0)
    long = side._replace(labels=side.labels.double() * 1e50, label_factor=side.label_factor * 1e-50)
    torch.testing.assert_close(aligned(long, None, 0), aligned(side, None, 0), rtol=1e-12, atol=0)
    factor = torch.empty_like(long.label_factor)
    fused.label_factors(long.labels, factor)
    rows = torch.arange(20, device=DEVICE) != 1  # which has no labels
    torch.testing.assert_close(factor[rows], long.label_factor[rows], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(50, None, 0), (30, 20, None)])
def test_the_order_of_rows_does_not_change_a_bit_of_sums_by_class(shape):
    a, m, offset = shape
    sides = [make(a, 5, 7, "hard", 0), None if m is None else make(m, 5, 7, "hard", 1)]
    order = [torch.randperm(a), None if m is None else torch.randperm(m)]
    moved = [
        side and side._replace(rows=side.rows[some], factor=side.factor[some], labels=side.labels[some])
        for side, some in zip(sides, order, strict=True)
    ]
    assert torch.equal(aligned(*moved, offset), aligned(*sides, offset)[:, order[0]])


def test_a_row_alone_in_its_class_has_exactly_nothing():
    side = make(40, 5, 7, "hard", 0)
    alone = side._replace(labels=torch.arange(40, device=DEVICE))
    assert torch.equal(aligned(alone, None, 0), torch.zeros(2, 40, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_class_alone(bad):
    side = make(40, 65, 3, "hard", 0)
    side.rows[7, 64] = bad
    found = aligned(side, None, 0)
    same = side.labels == side.labels[7]
    assert found[0][same].isnan().all()
    assert found[:, ~same].isfinite().all()
    assert torch.equal(found[1], weights(side, side, 0).sum(1))
    u = torch.ones(40, device=DEVICE)
    u[8] = bad
    zeros = torch.zeros(1, 40, 65, device=DEVICE)
    grad, _ = fused.align_grad(u, u.abs().max(), side, None, 0, (zeros, None), is_last=True, dots=None)
    nan = same | (side.labels == side.labels[8])
    assert grad[nan].isnan().any(1).all()
    assert grad[~nan].isfinite().all()


DTYPES = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [None, 50])
def test_classes_as_numbers(dtype, m):
    a, b = (torch.randint(-2, 9, (size,), generator=torch.Generator().manual_seed(size)) for size in (150, 50))
    a, b = (x.abs() % 2 == 1 if dtype == torch.bool else x.to(dtype).to(DEVICE) for x in (a, b))
    left, right = fused.class_numbers(a, None if m is None else b)
    assert torch.equal(left[:, None] == left, a[:, None] == a)
    assert left.max() < 150
    if m is None:
        assert right is None
    else:
        assert torch.equal(left[:, None] == right, a[:, None] == b)
        assert right.max() <= 150
    far = torch.arange(150, device=DEVICE).to(a.dtype)
    if dtype in (torch.int64, torch.int32):
        assert (fused.class_numbers(far, far[:3] + 1000)[1] == 150).all()


def test_what_does_not_equal_itself_is_alone():
    classes = torch.tensor([math.nan, 1.0, math.nan, 1.0], device=DEVICE)
    assert fused.class_numbers(classes, None)[0].tolist() == [0, 1, 2, 1]


def test_so_many_rows_that_they_are_sorted(monkeypatch):
    features, labels = torch.randn(40, 8, device=DEVICE), torch.arange(40, device=DEVICE) % 5
    expected = gen_supcon_loss(features, labels, backend="triton")
    monkeypatch.setattr(fused, "_MOST_COMPARED", 30)
    assert fused.class_numbers(labels, None) is None
    torch.testing.assert_close(gen_supcon_loss(features, labels, backend="triton"), expected, rtol=1e-6, atol=0)


def test_contrasts_that_are_there_for_no_one_have_a_class_of_their_own():
    """One more than there are rows, if all others are of different classes: there has to be room for it."""
    classes, there = torch.arange(9), torch.arange(9) != 4
    numbers = class_numbers(ClassLabels(classes, classes, there=there))
    assert numbers[1].max() == 9
    features = torch.randn(9, 8, device=DEVICE)
    loss = gen_supcon_loss(features, classes.to(DEVICE), ignore_index=4, backend="triton")
    assert loss == 0


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_batches_whose_sums_would_be_too_large_are_left_to_others(kind, monkeypatch):
    features = torch.randn(30, 8, device=DEVICE).requires_grad_()
    soft = torch.softmax(torch.randn(30, 6, device=DEVICE), 1)
    labels = soft if kind == "soft" else soft.argmax(1)
    expected = gen_supcon_loss(features, labels, backend="triton")
    (gradient,) = torch.autograd.grad(expected, features)
    monkeypatch.setattr(fused, "_MOST_SUMS", 10)
    monkeypatch.setattr(pairs, "lse_parts", None)  # of the path that is not taken
    loss = gen_supcon_loss(features, labels, backend="triton")
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(loss, features)[0], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_an_anchor_without_positives_costs_the_others_no_digits(kind, weighted):
    """The derivative of its loss, which is zero, has the denominator 1e-8."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 16, generator=generator).to(DEVICE)
    labels = torch.arange(40, device=DEVICE) % 4
    labels[7] = 9
    if kind == "soft":
        labels = torch.rand(40, 6, generator=generator).to(DEVICE)
        labels[:, 4:] = 0
        labels[7] = torch.tensor([0, 0, 0, 0, 0.3, 0.7])
    weight = torch.arange(40, device=DEVICE) % 5 > 0 if weighted else None
    found = []
    for backend, z in (("triton", features), ("dense", features.double())):
        z = z.clone().requires_grad_()
        y = labels if kind == "hard" else labels.to(z.dtype)
        loss = gen_supcon_loss(z, y, contrast_weight=weight, reduction="none", backend=backend)
        assert loss[7] == 0
        found.append((loss.detach().double(), torch.autograd.grad(loss.sum(), z)[0].double()))
    (loss, grad), (exact_loss, exact_grad) = found
    torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=1e-6)
    assert (grad - exact_grad).norm() <= 2e-6 * exact_grad.norm()
