"""The half about labels: against the matrix of similarities, by opcheck, and each way to sum for itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.library import opcheck

from genscl_loss._positives import ClassLabels, alignment, sums
from genscl_loss._positives.labels import class_numbers, similarity_matrix
from genscl_loss._unit import unit_rows

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


def positives(anchors, contrasts, a, b, self_offset):
    return torch.ops.genscl_loss.positives(anchors, contrasts, a, b, self_offset)


def plain(anchors, contrasts, a, b, self_offset):
    """Every similarity written down."""
    b = a if b is None else b
    if a.dim() == 1:
        weights = (a[:, None] == b).to(anchors.dtype)
    else:
        weights = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    if self_offset is not None:
        index = torch.arange(len(a))[:, None] + self_offset
        weights = weights.masked_fill(torch.arange(len(b)) == index, 0)
    return (anchors * (weights @ (anchors if contrasts is None else contrasts))).sum(1), weights.sum(1)


def differentiable(*tensors):
    return [x if x is None or not x.is_floating_point() else x.requires_grad_() for x in tensors]


@pytest.fixture(params=["whole", "parts", "smallest parts"])
def parts(request, monkeypatch):
    """Sums a few rows, or columns, at a time."""
    if request.param != "whole":
        for name, size in (
            ("_CHUNK", 2 * (C + D) if request.param == "parts" else 1),
            ("_FEWEST", 2),
            ("_BLOCK", 2),
            ("_TABLE", 1),
            ("_FEWEST_COLUMNS", 2),
        ):
            monkeypatch.setattr(sums, name, size)


def three_classes(weights, x):
    """`by_total` of many classes, at a time three of them."""
    return sums._by_total_of_few_rows(weights, x, 3)


@pytest.fixture(params=["chosen", "by_total", "three_classes", "by_sweep", "by_pairs"])
def way(request, monkeypatch):
    """Each way to sum over label vectors, in the place of the one that would be chosen."""
    if request.param != "chosen":
        chosen = three_classes if request.param == "three_classes" else getattr(sums, request.param)
        of_all = three_classes if chosen is three_classes else sums.by_total

        def choose(num_anchors, num_contrasts, width, columns, like, self_offset, is_kept):
            return of_all if self_offset is None else chosen, torch.float64

        monkeypatch.setattr(alignment, "_cheapest_way", choose)
    return request.param


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("a, m, self_offset", SHAPES)
def test_values_and_derivatives_are_those_of_the_matrix(a, m, self_offset, kind, way, parts):
    if kind == "hard" and way != "chosen":
        pytest.skip("class numbers have one way")
    inputs = differentiable(*make(a, m, kind))
    ours = positives(*inputs, self_offset)
    exact = plain(*inputs, self_offset)
    weights = [torch.randn_like(y) for y in exact]
    leaves = [x for x in inputs if x is not None and x.is_floating_point()]

    def gradients(outputs):
        return torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), leaves)

    for y, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(y, reference)
    for gradient, reference in zip(gradients(ours), gradients(exact), strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("count", [200, 128, 100])
def test_many_classes_of_few_rows_are_taken_some_at_a_time(count, monkeypatch):
    monkeypatch.setattr(sums, "_CHUNK_OF_ALL", 6 * 64)
    a, z = torch.rand(6, count, dtype=torch.float64), torch.randn(6, D, dtype=torch.float64)
    taken = []

    def part(rows, classes):
        taken.append(classes.stop - classes.start)
        return a[rows, classes]

    labels = sums.Matrix(part, 6, count, a.dtype, a.device)
    weights = sums.Weights(labels, labels, 0, sums.by_total)
    ((rows, columns, found),) = weights.of(sums.matrix(z, z.dtype))
    assert max(taken) == 64
    assert sum(taken) == 2 * count
    torch.testing.assert_close(found, (a @ a.T).fill_diagonal_(0) @ z)


@pytest.mark.strength(1)
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
    given = (anchors, contrasts, left, right, self_offset)
    opcheck(torch.ops.genscl_loss.positives.default, given)
    flags = [x is not None and x.requires_grad for x in given[:4]]
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    u, v = torch.ops.genscl_loss.positives(*given)
    opcheck(torch.ops.genscl_loss.positives_grad.default, (u, v, *given, flags))
    opcheck(torch.ops.genscl_loss.positives_grad.default, (u, None, *given, flags))


def test_the_operators_take_any_strides():
    anchors, labels = torch.randn(D, 6).T, torch.rand(12, 2 * C)[::2, ::2]
    opcheck(torch.ops.genscl_loss.positives.default, (*differentiable(anchors, None, labels, None), 0))
    rows = torch.randn(1, D).expand(6, D)
    opcheck(torch.ops.genscl_loss.positives.default, (rows, anchors.detach(), labels.detach(), labels.detach(), 0))


def test_a_second_derivative_is_refused():
    inputs = differentiable(*make(6, None, "soft"))
    (first,) = torch.autograd.grad(positives(*inputs, 0)[0].sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='pass backend="dense"'):
        first.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float32, torch.float64])
def test_class_numbers_are_equal_where_classes_are(dtype):
    generator = torch.Generator().manual_seed(0)
    anchors, contrasts = (torch.randint(0, 9, (n,), generator=generator).to(dtype) for n in (5, 40))
    for a, b in ((anchors, contrasts), (anchors, anchors), (contrasts, anchors), (anchors[:0], contrasts)):
        left, right = class_numbers(ClassLabels(a, b))
        assert torch.equal(left[:, None] == right, a[:, None] == b)
        assert ((left >= 0) & (left < max(1, len(a)))).all()
        assert ((right >= 0) & (right <= max(1, len(a)))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [
    torch.arange(300) % 7,
    torch.arange(300) % 7 + 2**24,
    torch.arange(300) % 7 + 2**53,
    (torch.arange(300) % 7 + 2**24).double(),
    torch.where(torch.arange(300) % 7 > 2, torch.nan, 1.5),
    torch.arange(300) % 2 == 0,
    torch.tensor([2**63 - 1, -(2**63), 2**63 - 2] * 100),
])  # fmt: skip
def test_classes_of_many_pairs_are_compared_as_they_are(classes, dtype):
    """Also where they would be equal in the dtype of the weights."""
    for others in (classes, classes.flip(0)[:250]):
        weights = similarity_matrix(ClassLabels(classes, others), None, dtype)
        assert weights.dtype == dtype
        assert torch.equal(weights, (classes[:, None] == others).to(dtype))


# The ways to sum over label vectors


def summed(way, a, b, x, self_offset, dtype=torch.float64):
    """All parts put together."""
    left, right, rows = (sums.matrix(y, dtype) for y in (a, b, x))
    out = x.new_empty(len(a), x.shape[1], dtype=dtype)
    for some, cols, part in sums.Weights(left, right, self_offset, way).of(rows):
        out[some, cols] = part
    return out


@given(
    a=st.integers(1, 300),
    m=st.integers(1, 300),
    classes=st.integers(1, 4),
    self_offset=st.none() | st.integers(-310, 310),
    seed=st.integers(0, 99),
)
@example(a=513, m=520, classes=3, self_offset=2, seed=0)
@example(a=1, m=1, classes=1, self_offset=0, seed=0)  # nothing but the self term
def test_all_ways_to_sum_over_label_vectors_agree_with_the_matrix(a, m, classes, self_offset, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.rand(a, classes, generator=generator), torch.rand(m, classes, generator=generator)
    x = torch.randn(m, 3, generator=generator)
    weights = left.double() @ right.double().T
    rounding = 1e-15 * float(weights.sum(1).max() * x.abs().max())  # of a sum that still has the self term
    if self_offset is not None:
        index = torch.arange(a)[:, None] + self_offset
        weights = weights.masked_fill(torch.arange(m) == index, 0)
    exact = weights @ x.double()
    for way in [sums.by_total, sums.by_pairs, *([] if self_offset is None else [sums.by_sweep])]:
        value = summed(way, left, right, x, self_offset)
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5 * float(weights.sum(1).max()) + rounding)


def sharp_labels(sharpness: float, number: int = 256, classes: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    y = torch.softmax(sharpness * torch.randn(number, classes, generator=generator), 1)
    return torch.nn.functional.normalize(y, dim=1)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(sums.by_total, torch.float64), (sums.by_pairs, torch.float32), (sums.by_sweep, torch.float32)],
)
def test_what_little_the_self_term_leaves_is_exact(way, dtype):
    """Sharp softmax labels of 1000 classes: positive masses down to 1e-10, which a float32 subtraction would drown."""
    y, x = sharp_labels(25.0), torch.ones(256, 1)
    exact = (y.double() @ y.double().T).fill_diagonal_(0).sum(1)
    assert exact.min() < 1e-7
    mass = summed(way, y, y, x, 0, dtype)[:, 0].double()
    assert ((mass - exact).abs() / exact).max() < 1e-5
    naive = summed(sums.by_total, y, y, x, 0, torch.float32)[:, 0].double()
    assert ((naive - exact).abs() / exact).max() > 0.5  # else this test could not fail


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0, 8.0, 25.0])
@pytest.mark.parametrize("number", [40, 2500])
def test_the_bound_for_float32_sums_holds(sharpness, number):
    """Whatever is chosen, alignment and mass are exact; and both answers about float32 occur."""
    y = sharp_labels(sharpness, number, 30)
    z = torch.nn.functional.normalize(torch.randn(number, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    found = positives(z, None, y, None, 0)
    exact = plain(z.double(), None, y.double(), None, 0)
    assert ((found[0].double() - exact[0]).abs() / exact[1]).max() < 1e-6
    assert ((found[1].double() - exact[1]).abs() / exact[1]).max() < 1e-6
    factor = torch.ones(number, 1)
    suffices = alignment._float32_suffices(y, y, factor, factor)
    assert suffices == bool((exact[1] >= 1).all())
    assert suffices == (sharpness < 5 or number > 1000)


def test_the_cheapest_way_is_taken_and_bounds_the_memory():
    like, never, always = torch.empty(0), lambda: False, lambda: True
    cheapest = alignment._cheapest_way
    assert cheapest(8192, 8192, 100, 129, like, 0, always) == (sums.by_total, torch.float32)
    assert cheapest(8192, 8192, 100, 129, like, 0, never) == (sums.by_total, torch.float64)
    assert cheapest(8192, 8192, 100, 129, like.double(), 0, always) == (sums.by_sweep, torch.float64)
    assert cheapest(64, 65536, 100, 129, like, None, never) == (sums.by_total, torch.float32)
    assert cheapest(1, 65536, 100, 129, like, None, never) == (sums.by_pairs, torch.float32)
    for columns in (4097, 8192):  # sums by class of 20,000 x 4,096 numbers would be 650 MB
        assert cheapest(520, 520, 20000, columns, like, 0, always) == (sums.by_pairs, torch.float32)
        assert cheapest(520, 520, 20000, columns, like.double(), 0, always) == (sums.by_pairs, torch.float64)


def test_sums_over_a_large_class_are_exact():
    """50,000 equal rows: added up one by one in float32 their sum is off by 1e-3."""
    n = 50_000
    x = torch.full((n, 1), 0.1)
    exact = (n - 1) * x[:, 0].double() ** 2
    total, mass = positives(x, None, torch.zeros(n, dtype=torch.long), None, 0)
    assert mass.unique().tolist() == [n - 1]
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
    total, mass = positives(x, None, torch.full((n, 1), 0.3), None, 0)
    torch.testing.assert_close(mass.double(), torch.full((n,), n - 1.0).double(), rtol=5e-6, atol=0)
    torch.testing.assert_close(total.double(), exact, rtol=5e-6, atol=0)


# Rows of unit length


@pytest.mark.parametrize("row", [[0.0, 0.0], [1e-19, 0.0], [-1e-30, 1e-25]])
def test_a_row_too_short_stays_with_a_gradient_as_of_length_one(row):
    x = torch.tensor([row, [3.0, 4.0]], requires_grad=True)
    z = unit_rows(x)
    torch.testing.assert_close(z.detach(), torch.tensor([row, [0.6, 0.8]]))
    upstream = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(torch.autograd.grad(z, x, upstream)[0], upstream)


def test_a_row_whose_squares_overflow_is_nan():
    z = unit_rows(torch.tensor([[1e30, 1.0], [3.0, 4.0]]))
    assert z[0].isnan().all()
    assert z[1].isfinite().all()
