"""The operators behind the loss, one by one: against float64 on the plain equation, at tile edges, and by opcheck."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from genscl_loss import _linear as linear
from genscl_loss import gen_supcon_loss
from genscl_loss._backends import row_lse as any_row_lse
from genscl_loss._backends import tiled


def row_lse(anchors, contrasts, scale, self_offset, backend="tiled"):
    """Rows of any length, all digits."""
    options = {"unit": False, "precision": "highest", "backend": backend}
    return any_row_lse(anchors, contrasts, scale, self_offset, **options)


SHAPES = [  # (A, M, self_offset); M None: a self-contrast
    (1, None, 0),
    (2, None, 0),
    (9, None, 0),
    (8, 8, None),
    (3, 9, 0),
    (5, 9, 4),
    (9, 5, -3),
    (4, 9, -2),
    (4, 9, 7),
    (7, 1, None),
]


def make(a: int, m: int | None, dtype=torch.float64, scale: float = 3.0):
    generator = torch.Generator().manual_seed(a)
    anchors = torch.randn(a, 5, generator=generator, dtype=dtype)
    contrasts = None if m is None else torch.randn(m, 5, generator=generator, dtype=dtype)
    return anchors, contrasts, torch.tensor(scale, dtype=dtype)


def plain_lse(anchors, contrasts, scale, self_offset):
    """Log-sum-exp over an explicit list of contrasts for each anchor."""
    others = anchors if contrasts is None else contrasts
    rows = []
    for i, anchor in enumerate(anchors):
        logits = [scale * (anchor @ k) for j, k in enumerate(others) if self_offset is None or j != i + self_offset]
        rows.append(torch.stack(logits).logsumexp(0) if logits else torch.tensor(-math.inf, dtype=anchors.dtype))
    return torch.stack(rows)


@pytest.mark.parametrize("a, m, self_offset", SHAPES)
@pytest.mark.parametrize("scale", [3.0, 1e3], ids=["one shift", "running maximum"])
def test_row_lse_is_the_log_sum_exp_without_the_self_term(a, m, self_offset, scale, small_tile):
    anchors, contrasts, scale = make(a, m, scale=scale)
    assert (tiled._shift(anchors * scale, anchors, None) is None) == (scale == 1e3)
    value = row_lse(anchors, contrasts, scale, self_offset)
    torch.testing.assert_close(value, plain_lse(anchors, contrasts, scale, self_offset), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("a, m, self_offset", [shape for shape in SHAPES if shape[:2] != (1, None)])
@pytest.mark.parametrize("scale", [3.0, 1e3], ids=["one shift", "running maximum"])
def test_the_gradient_of_row_lse_is_that_of_the_plain_equation(a, m, self_offset, scale, small_tile):
    inputs = [x if x is None else x.requires_grad_() for x in make(a, m, scale=scale)]
    upstream = torch.linspace(-1, 2, a, dtype=torch.float64)
    wanted = [x for x in inputs if x is not None]
    gradients = torch.autograd.grad(row_lse(*inputs, self_offset) @ upstream, wanted)
    exact = torch.autograd.grad(plain_lse(*inputs, self_offset) @ upstream, wanted)
    for gradient, reference in zip(gradients, exact, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


def test_a_row_without_contrasts_is_minus_infinity():
    anchors, _, scale = make(1, None)
    assert row_lse(anchors, None, scale, 0).item() == -math.inf


@pytest.mark.parametrize("n", [tiled.TILE - 1, tiled.TILE, tiled.TILE + 1, 2 * tiled.TILE + 1])
def test_the_real_tile_edge_is_as_good_as_any(n):
    z = torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), dim=1)
    logits = (z.double() @ z.double().T / 0.07).fill_diagonal_(-math.inf)
    value = row_lse(z, None, torch.tensor(1 / 0.07), 0)
    torch.testing.assert_close(value.double(), logits.logsumexp(1), rtol=1e-6, atol=0)


def test_the_same_input_gives_the_same_bits():
    z = torch.nn.functional.normalize(torch.randn(1300, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(1300) % 7

    def once():
        features = z.clone().requires_grad_()
        loss = gen_supcon_loss(features, labels, backend="tiled")
        return loss.detach(), *torch.autograd.grad(loss, features)

    first = once()
    assert all(torch.equal(x, y) for _ in range(5) for x, y in zip(first, once(), strict=True))


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_no_row_hides_a_bad_entry(fill):
    anchors, _, scale = make(9, None)
    anchors[4, 2] = fill
    others = torch.arange(9) != 4
    lse = row_lse(anchors, None, scale, 0)
    plain = plain_lse(anchors, None, scale, 0)
    assert not (lse.isfinite() & ~plain.isfinite())[others].any()


@pytest.mark.parametrize("exponent", [0, 10, 30, 52, 60, 80, 100])
def test_terms_far_below_one_are_not_lost(exponent):
    """Anchor 0 sees only contrasts at cosine -1: all its terms are 2^-exponent, whatever the other rows need."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    scale = torch.tensor(exponent * math.log(2))
    value = row_lse(z, None, scale, 0)
    exact = torch.tensor([math.log(3) - exponent * math.log(2)])
    torch.testing.assert_close(value[:1], exact, rtol=1e-6, atol=1e-6)


# Registration


@pytest.mark.parametrize("a, m, self_offset", [(6, None, 0), (3, 9, 0), (3, 9, 5), (8, 8, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_lse_is_registered_correctly(a, m, self_offset, dtype):
    anchors, contrasts, scale = make(a, m, dtype)
    left_out = [2, -1] if self_offset is None else [self_offset, 2, -1]
    _, sums, *_ = tiled.row_lse(anchors, contrasts, scale, None, left_out, False, "highest")
    grad = torch.randn_like(sums[0])
    operators = torch.ops.genscl_loss
    leaves = [x if x is None else x.clone().requires_grad_() for x in (anchors, contrasts, scale)]
    opcheck(operators.row_lse.default, (*leaves, None, left_out, False, "highest", "tiled"))
    for wanted in (0, 2, a if m is None else m):
        sizes = (a if m is None else m, anchors.shape[1])
        saved = (sums, anchors, contrasts, scale, None, left_out, False, *sizes)
        opcheck(operators.row_lse_grad.default, (grad, *saved, wanted, "tiled"))


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("m, num_live", [(None, None), (9, None), (9, 4)])
def test_both_halves_are_registered_correctly(m, num_live, num_labels):
    """Labels travel as a list, one of each kind in a self-contrast and two elsewhere, and have no gradient."""
    anchors, contrasts, scale = make(6, m, torch.float64)
    leaves = [x if x is None else x.clone().requires_grad_() for x in (anchors, contrasts, scale)]
    sides = (6,) if m is None else (6, m)
    labels = [torch.rand(rows, 3, dtype=torch.float64) for _ in range(num_labels) for rows in sides]
    offset = 0 if m is None or num_live is not None else None
    options = (None, False, offset, None, num_live, True, True, "highest", "tiled")
    opcheck(torch.ops.genscl_loss.linear.default, (*leaves, None, labels, *options))


def test_operators_take_any_strides():
    anchors, contrasts = torch.randn(5, 7).T, torch.randn(10, 10)[::2, ::2]
    scale = torch.tensor(2.0)
    opcheck(
        torch.ops.genscl_loss.row_lse.default,
        (anchors.requires_grad_(), contrasts.requires_grad_(), scale, None, [], False, "highest", "tiled"),
    )
    a, b = torch.rand(6, 8).T, torch.rand(12, 10)[::2, ::2].T
    opcheck(torch.ops.genscl_loss.matmul.default, (a.requires_grad_(), b.T.requires_grad_()[:, :2]), test_utils=SCHEMA)


SCHEMA = ("test_schema", "test_faketensor")


# What other ways to differentiate, and to store, make of the operators


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in jvp
def test_forward_mode_works_on_dense_and_is_refused_on_tiled():
    x, labels = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    direction = torch.randn_like(x)

    def loss(features, name):
        return gen_supcon_loss(features, labels, backend=name)

    tangent = torch.func.jvp(lambda v: loss(v, "dense"), (x,), (direction,))[1]
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf, "dense"), leaf)[0]
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    with pytest.raises(RuntimeError, match='forward-mode .* backend="dense"'):
        torch.func.jvp(lambda v: loss(v, "tiled"), (x,), (direction,))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="outside autocast"):
        torch.func.jvp(lambda v: loss(v, "dense"), (x.float(),), (direction.float(),))


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpoints_change_nothing(backend, autocast):
    rows = 200 if backend == "triton" else 600  # several tiles, and whole tiles to threads
    features, labels = torch.randn(rows, 16, requires_grad=True), torch.softmax(torch.randn(rows, 7), 1)

    def gradient(run):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(run(features), features)[0]

    def loss(x):
        return gen_supcon_loss(x, labels, backend=backend)

    plain = gradient(loss)
    checkpointed = gradient(lambda x: torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False))
    assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("size", ["self", "rectangular"])
def test_gradients_hold_where_logits_are_huge(size):
    """Logits of 1e5: their rounding, and that of the log-sum-exp, are as large as the differences that count."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(600, 2048, generator=generator)
    labels = torch.arange(600) % 10
    queue = 3 * torch.randn(700, 2048, generator=generator)
    options = {} if size == "self" else {"contrast_features": queue, "contrast_labels": torch.arange(700) % 10}

    def gradient(features, name):
        features = features.clone().requires_grad_()
        given = {k: v.to(features.dtype) if v.is_floating_point() else v for k, v in options.items()}
        loss = gen_supcon_loss(features, labels, temperature=0.02, normalize=False, backend=name, **given)
        return torch.autograd.grad(loss, features)[0].double()

    exact = gradient(x.double(), "dense")
    assert (gradient(x, "tiled") - exact).norm() / exact.norm() < 1e-5


def test_an_infinite_contrast_is_never_merely_far_away(backend):
    features, contrasts = torch.ones(4, 2), torch.tensor([[1.0, 1.0], [-torch.inf, 1.0]])
    loss = gen_supcon_loss(
        features,
        torch.zeros(4, dtype=torch.long),
        contrast_features=contrasts,
        contrast_labels=torch.tensor([0, 1]),
        normalize=False,
        backend=backend,
    )
    assert not loss.isfinite()


def test_nan_shows_even_where_nothing_is_contrasted(backend):
    one = torch.full((1, 4), math.nan)
    assert gen_supcon_loss(one, torch.tensor([0]), backend=backend).isnan()
    empty = {"contrast_features": torch.zeros(0, 4), "contrast_labels": torch.zeros(0, dtype=torch.long)}
    assert gen_supcon_loss(one, torch.tensor([0]), backend=backend, **empty).isnan()


def test_one_shift_leaves_room_below_for_processors_without_subnormal_numbers():
    """Anchor 0 sees cosine -1 only. With a bound near the limit its terms are the smallest that the shift allows."""
    z = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    torch.set_flush_denormal(True)
    try:
        for tau in (0.0143, 0.0158, 0.0175, 0.0178, 0.018, 0.02):
            lse = row_lse(z, None, torch.tensor(1 / tau), 0)
            torch.testing.assert_close(lse[0].item(), math.log(3) - 1 / tau, rtol=1e-6, atol=0)
    finally:
        torch.set_flush_denormal(False)


def test_the_logits_of_a_self_contrast_are_symmetric_and_half_of_them_is_computed(small_tile):
    """Values do not show it: what serves logits of any size would give the same, at twice the cost and more."""
    z, _, scale = make(16, None)
    given = z, None, scale, None, [0], True
    lse, sums, *_ = tiled.row_lse(*given, "highest")
    with FlopCounterMode(display=False) as forward:
        tiled.row_lse(*given, "highest")
    with FlopCounterMode(display=False) as backward:  # logits only: it does not count what is added in place
        tiled.row_lse_grad(torch.ones_like(lse), sums, *given, 16, z.shape[1], 0)
    matrix, diagonal = 2 * 16 * 16 * z.shape[1], small_tile / 16  # one tile in four is on the diagonal
    assert 0 < forward.get_total_flops() <= matrix * (1 + diagonal) / 2
    assert 0 < backward.get_total_flops() <= matrix * (1 + diagonal) / 2


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ([torch.float16] * 2, "high"),
        ([torch.bfloat16] * 2, "high"),
        ([torch.float32] * 2, "highest"),
        ([torch.float16, torch.float32], "highest"),
        ([torch.float16, torch.bfloat16], "highest"),
    ],
)
def test_products_of_few_digits_are_for_features_that_all_have_few(dtypes, wanted):
    views = [torch.randn(6, 8).to(dtype) for dtype in dtypes]
    with patch("genscl_loss.functional.linear.losses", wraps=linear.losses) as called:
        gen_supcon_loss(views, backend="tiled")
    assert called.call_args.args[-1].precision == wanted


def test_the_dense_backend_hides_the_self_term_from_any_logits():
    x = torch.tensor([[200.0, 0.0], [-200.0, 1.0], [-200.0, 2.0], [-200.0, -2.0]])
    labels = torch.zeros(4, dtype=torch.long)
    options = {"temperature": 1.0, "base_temperature": None, "normalize": False, "reduction": "none"}
    dense, tiled_ = (gen_supcon_loss(x.double(), labels, backend=name, **options) for name in ("dense", "tiled"))
    torch.testing.assert_close(dense, tiled_)
    assert dense[0].item() == pytest.approx(math.log(3))  # three equal contrasts at -40000
