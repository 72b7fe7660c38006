"""The Triton kernels against float64 on explicit matrices: on a GPU if there is one, else in Triton's interpreter.

Nothing here shares code with the package: `oracle` is NumPy. The operator is called as the loss calls it, so what a
test sees is the kernels plus what prepares their inputs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import genscl_loss
from genscl_loss import GenSupConLoss, gen_supcon_loss
from genscl_loss._backends import choose, fused, operator, plans, row_lse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if (REASON := fused.unavailable(DEVICE)) is not None:
    pytest.skip(f'backend "triton": {REASON}', allow_module_level=True)

ROOT = Path(genscl_loss.__file__).parents[1]
KERNELS = Path(fused.__file__).parent / "kernels.py"
ON_GPU = DEVICE.type == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


# ---- The oracle ----


def oracle(anchors, contrasts, scale: float, self_offset: int | None, upstream=None) -> SimpleNamespace:
    """Row log-sum-exp and its gradients by the definition, in float64; also how large the terms of a gradient are."""
    a = anchors.detach().double().cpu().numpy()
    c = a if contrasts is None else contrasts.detach().double().cpu().numpy()
    logits = scale * (a @ c.T)
    if self_offset is not None:
        logits[np.arange(len(c))[None, :] == np.arange(len(a))[:, None] + self_offset] = -np.inf
    largest = logits.max(1)
    safe = np.where(np.isneginf(largest), 0, largest)
    with np.errstate(divide="ignore"):
        lse = safe + np.log(np.exp(logits - safe[:, None]).sum(1))
    p = np.where(np.isneginf(logits), 0, np.exp(logits - np.where(np.isneginf(lse), 0, lse)[:, None]))
    result = SimpleNamespace(lse=lse, largest=np.abs(logits[np.isfinite(logits)]).max(initial=0.0))
    if upstream is None:
        return result
    weights = upstream.detach().double().cpu().numpy()[:, None] * p
    result.d_anchors, result.d_contrasts = scale * (weights @ c), scale * (weights.T @ a)
    result.d_scale = (result.d_anchors * a).sum() / scale
    norms = np.linalg.norm(c, axis=1)
    result.anchor_terms = scale * (np.abs(weights) @ norms)
    result.contrast_terms = scale * (np.abs(weights).T @ np.linalg.norm(a, axis=1))
    if contrasts is None:  # the rows are anchors and contrasts
        result.d_anchors += result.d_contrasts
        result.anchor_terms += result.contrast_terms
    return result


def compute(
    anchors,
    contrasts=None,
    scale: float | torch.Tensor = 1 / 0.1,
    self_offset: int | None = 0,
    upstream=None,
    *,
    unit: bool = True,
    precision: str = "highest",
    contrasts_need_grad: bool = True,
) -> SimpleNamespace:
    """The same by the kernels."""
    scale = torch.as_tensor(scale, dtype=torch.float32)
    a = anchors.detach().requires_grad_()
    c = None if contrasts is None else contrasts.detach().requires_grad_(contrasts_need_grad)
    leaves = {"d_anchors": a}
    if c is not None and contrasts_need_grad:
        leaves["d_contrasts"] = c
    if scale.requires_grad:
        leaves["d_scale"] = scale
    lse = row_lse(a, c, scale, self_offset, unit=unit, precision=precision, backend="triton")
    result = SimpleNamespace(lse=lse.detach())
    if upstream is not None:
        gradients = torch.autograd.grad(lse, list(leaves.values()), upstream)
        vars(result).update(zip(leaves, gradients, strict=True))
    return result


def relative(actual: torch.Tensor, exact: np.ndarray) -> float:
    """Error of a whole gradient in units of its length."""
    difference = np.linalg.norm(actual.double().cpu().numpy() - exact)
    return float(difference if difference == 0 else difference / np.linalg.norm(exact))


def lse_error(actual: torch.Tensor, exact: np.ndarray) -> float:
    """Largest absolute error of rows; rows without contrasts must be minus infinity."""
    actual = actual.double().cpu().numpy()
    assert np.array_equal(np.isneginf(actual), np.isneginf(exact))
    finite = np.isfinite(exact)
    return float(np.abs(actual[finite] - exact[finite]).max(initial=0.0))


def check(
    anchors,
    contrasts=None,
    scale: float = 1 / 0.1,
    self_offset: int | None = 0,
    upstream=None,
    *,
    lse_bound: float = 1e-5,
    grad_bound: float = 5e-6,
    **options,
) -> None:
    """Values and all gradients to the precision of float32."""
    if upstream is None:
        upstream = torch.linspace(-1, 2, len(anchors), device=anchors.device)
    ours = compute(anchors, contrasts, scale, self_offset, upstream, **options)
    exact = oracle(anchors, contrasts, float(np.float32(scale)), self_offset, upstream)
    assert lse_error(ours.lse, exact.lse) <= lse_bound
    assert ours.d_anchors.shape == anchors.shape
    assert relative(ours.d_anchors, exact.d_anchors) <= grad_bound
    if hasattr(ours, "d_contrasts"):
        assert relative(ours.d_contrasts, exact.d_contrasts) <= grad_bound


def rows(number: int, dim: int, seed: int = 0, *, unit: bool = True) -> torch.Tensor:
    x = torch.randn(number, dim, generator=torch.Generator().manual_seed(1000 * seed + number), dtype=torch.float64)
    return (torch.nn.functional.normalize(x, dim=1) if unit else x).float().to(DEVICE)


@contextlib.contextmanager
def matmul_precision(name: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- Sizes ----

SIZES = sorted({1, 2, 3, 300, 513, *(edge + near for edge in (16, 32, 64, 128, 256) for near in (-1, 0, 1))})
DIMS = [1, 2, 3, 15, 16, 17, 32, 33, 48, 65, 96, 127, 128, 129, 192, 256, 384, 500, 512, 600, 768, 1000, 1024]


def test_the_sizes_meet_every_tile_edge_and_every_width():
    terms = (1, 2)
    chip = fused._chip(DEVICE)
    widths = {plans.width(dim) for dim in range(1, plans.MAX_FEATURES + 1)}
    shapes = [plans.forward_plan(chip, width, count) for width in widths for count in terms]
    shapes += [plans.backward_plan(chip, width, count)[0] for width in widths for count in terms]
    edges = {edge for plan in shapes for edge in (plan.block_m, plan.block_n, plan.block_edge)} | {plans.PAD}
    assert {edge + near for edge in edges for near in (-1, 0, 1)} <= set(SIZES)
    assert {plans.width(dim) for dim in DIMS} == widths


def test_padded_rows_hold_whole_blocks():
    """Kernels load without masks: what they load must be there."""
    for table in (plans._FORWARD, plans._BACKWARD):
        for lines in table.values():
            for plan in lines.values():
                for block in (plan.block_m, plan.block_n, plan.block_edge):
                    assert plans.PAD % block == 0, plan


def test_features_of_different_dtypes_are_multiplied_with_all_digits():
    """Half precision allows products of ten bits where all features have it, not where one has."""
    x, y = rows(20, 16), rows(20, 16, seed=1).half()
    labels = torch.arange(20, device=DEVICE) % 3
    found = gen_supcon_loss([x, y], labels, backend="triton")
    exact = gen_supcon_loss([x.double(), y.double()], labels, backend="dense")
    assert abs(found.double() - exact) < 1e-6 * exact


def test_a_constant_temperature_needs_no_rows_for_its_gradient():
    x, sizes = rows(600, 64).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.dtype, t.numel())) or t, lambda t: t):
        operator.row_lse(x, None, torch.tensor(10.0), 0, unit=True, precision="highest", backend="triton")
    assert not [size for dtype, size in sizes if dtype == torch.float32 and size >= x.numel()]


@pytest.mark.parametrize("number", SIZES)
def test_any_number_of_rows(number):
    check(rows(number, 16))


@pytest.mark.parametrize("number", SIZES)
def test_any_number_of_contrasts(number):
    check(rows(70, 16), rows(number, 16, seed=1), self_offset=None)


@pytest.mark.strength(1)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dim", DIMS)
def test_any_number_of_features(dim, precision):
    z = rows(70 if dim > 256 else 150, dim)
    if precision == "highest":
        check(z)
    else:
        check_one_product(z)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dim", [65, 300])
def test_rectangles_of_any_number_of_features(dim, precision):
    anchors, contrasts = rows(70, dim), rows(140, dim, seed=1)
    if precision == "highest":
        check(anchors, contrasts, self_offset=60)
    else:
        check_one_product(anchors, contrasts, self_offset=60)


RECTANGLES = [  # (A, M, self_offset)
    (70, 200, None),
    (200, 70, None),
    (70, 200, 0),
    (70, 200, 1),
    (70, 200, 63),
    (70, 200, 130),  # the last anchor is the last contrast
    (70, 200, 131),
    (70, 200, 199),
    (70, 200, 200),  # misses
    (70, 200, 5000),
    (70, 200, -1),
    (70, 200, -69),
    (70, 200, -70),  # misses
    (70, 200, -5000),
    (200, 70, -130),
    (200, 70, -64),
    (200, 70, -128),
    (200, 70, 69),
    (130, 390, 127),
    (130, 390, 128),
    (130, 390, 129),
    (130, 390, 260),
    (257, 514, 257),
    (257, 514, -128),
    (300, 300, 7),
    (300, 300, -7),
    (1, 1, None),
    (1, 1, 0),  # nothing is left
    (1, 1, 1),
    (3, 1, 0),
    (1, 3, 2),
    (3, 1, -2),
]


@pytest.mark.parametrize("a, m, self_offset", RECTANGLES)
def test_the_self_term_is_wherever_the_offset_says(a, m, self_offset):
    check(rows(a, 16), rows(m, 16, seed=1), self_offset=self_offset)


@pytest.mark.parametrize("a, m, self_offset", [(200, 330, 130), (330, 200, -130), (70, 200, 180), (3, 1, 0)])
def test_the_self_term_with_a_running_maximum(a, m, self_offset):
    """The self terms are the largest of their rows by far: one that is not left out shows."""
    anchors, contrasts = rows(a, 16), rows(m, 16, seed=1)
    for i in range(max(0, -self_offset), min(a, m - self_offset)):
        contrasts[i + self_offset] = anchors[i]
    check(anchors, contrasts, 100.0, self_offset, lse_bound=1e-4, grad_bound=5e-5)


def test_contrasts_that_need_no_gradient_get_none():
    anchors, contrasts, upstream = rows(70, 16), rows(200, 16, seed=1), torch.linspace(-1, 2, 70, device=DEVICE)
    both = compute(anchors, contrasts, 10.0, 5, upstream)
    one = compute(anchors, contrasts, 10.0, 5, upstream, contrasts_need_grad=False)
    assert not hasattr(one, "d_contrasts")
    assert torch.equal(one.d_anchors, both.d_anchors)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded row", "expanded feature", "reversed storage"])
def test_any_strides(layout):
    base = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE) / 8
    anchors, contrasts = {
        "transposed": (base[:20, :90].T, base[20:40, :150].T),
        "sliced": (base[::3, 5:165:8], base[1::2, 6:166:8]),
        "expanded row": (base[:1, :20].expand(90, 20), base[:150, 20:40]),
        "expanded feature": (base[:90, :1].expand(90, 20), base[:150, 1:2].expand(150, 20)),
        "reversed storage": (base[210:, 280:], base[:150, 280:]),
    }[layout]
    assert not (anchors.is_contiguous() and contrasts.is_contiguous())
    check(anchors, contrasts, 3.0, None, unit=False)
    check(contrasts, None, 3.0, unit=False)
    upstream = torch.ones((), device=DEVICE).expand(len(anchors))  # stride 0, as the gradient of a sum
    check(anchors, contrasts, 3.0, None, upstream, unit=False)


# ---- Temperatures ----


def last_scale_of_one_shift() -> float:
    """Where the kernels change from one shift for all rows to a running maximum."""
    low, high = 1.0, 1e4
    assert fused._fits(low)
    assert not fused._fits(high)
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fused._fits(middle) else (low, middle)
    return low


SWITCH = 1 / last_scale_of_one_shift()
TAUS = [0.5, 0.1, 0.07, 0.05, 0.03, 0.02, 0.0155, SWITCH * 1.0001, SWITCH * 0.9999, 0.012, 0.01, 0.007, 0.005]


def hard_rows(name: str) -> torch.Tensor:
    """150 unit rows that are difficult for exponents."""
    z = rows(150, 48)
    if name == "duplicates":
        z = z[torch.arange(150) % 40]
    elif name == "collapsed":
        z = z[:1].repeat(150, 1)
    elif name == "antipodal":
        z = torch.cat([z[:75], -z[:75]])
    elif name == "two points":
        z = torch.cat([z[:1].repeat(20, 1), -z[:1].repeat(130, 1)])
    elif name == "one against the rest":
        z = torch.cat([z[:1], -z[:1].repeat(149, 1)])
    return z


SETS = ["random", "duplicates", "collapsed", "antipodal", "two points", "one against the rest"]


def float32_bounds(tau: float) -> dict[str, float]:
    """A logit is good to some 2^-24 of the largest, one over tau; exponentials, and so gradients, inherit that."""
    factor = max(1.0, 0.05 / tau)
    return {"lse_bound": 1e-5 * factor, "grad_bound": 5e-6 * factor}


def test_the_temperatures_are_on_both_sides_of_the_switch():
    assert 0.012 < SWITCH < 0.0155
    assert [fused._fits(1 / tau) for tau in TAUS] == [True] * 8 + [False] * 5


@pytest.mark.strength(1)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("tau", TAUS)
def test_any_temperature(tau, name):
    check(hard_rows(name), scale=1 / tau, **float32_bounds(tau))


@pytest.mark.strength(1)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("tau", [0.05, SWITCH * 1.0001, SWITCH * 0.9999, 0.005])
def test_any_temperature_in_a_rectangle(tau, name):
    z = hard_rows(name)
    check(z[:30], z, 1 / tau, 0, **float32_bounds(tau))
    check(z[:30], -z, 1 / tau, None, **float32_bounds(tau))


@pytest.mark.strength(1)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("tau", [0.05, SWITCH * 1.0001, SWITCH * 0.9999, 0.005])
def test_any_temperature_with_one_product(tau, name):
    check_one_product(hard_rows(name), scale=1 / tau)


def test_a_single_row_far_from_all_others_is_found_by_the_running_maximum():
    """The largest logit comes last, then first: all before it must be scaled down, and none after it overflow."""
    z = rows(300, 16)
    for place in (1, 299):
        z[0], z[place] = z[2], z[2]
        check(z, scale=300.0, **float32_bounds(1 / 300))


# ---- Rows that are not normalised ----


@pytest.mark.strength(1)
@pytest.mark.parametrize("norm", [1e-3, 0.1, 1.0, 4.0, 30.0, 1e6])
@pytest.mark.parametrize("m", [None, 200])
def test_rows_of_any_length(norm, m):
    """The bounds are relative to the largest logit, as those of float32 itself."""
    anchors = rows(150, 16) * norm
    contrasts = None if m is None else rows(m, 16, seed=1) * norm
    scale = 1 / 0.07
    bounds = float32_bounds(1 / max(norm * norm * scale, 20.0))
    if norm > 1e3:  # where the softmax of float32 numbers says little
        lse = compute(anchors, contrasts, scale, None if m else 0, unit=False).lse
        exact = oracle(anchors, contrasts, float(np.float32(scale)), None if m else 0)
        assert lse_error(lse, exact.lse) <= bounds["lse_bound"]
    else:
        check(anchors, contrasts, scale, None if m else 0, unit=False, **bounds)


@pytest.mark.parametrize("lengths", [(1e-3, 30.0), (1e-2, 1.0), (1e-3, 1e3)])
def test_rows_of_mixed_lengths(lengths):
    spread = torch.logspace(*(math.log10(length) for length in lengths), 150, device=DEVICE)
    z = rows(150, 16) * spread[:, None]
    largest = max(lengths) ** 2 / 0.07
    check(z, None, 1 / 0.07, unit=False, **float32_bounds(1 / max(largest, 20.0)))


@pytest.mark.parametrize("anchor_norm, contrast_norm", [(30.0, 1e-2), (1e-2, 30.0), (1e3, 1e-3), (1e6, 1e-6)])
def test_anchors_and_contrasts_of_different_lengths(anchor_norm, contrast_norm):
    """Logits are as small as those of unit rows, and so are their errors."""
    anchors, contrasts = rows(70, 16) * anchor_norm, rows(150, 16, seed=1) * contrast_norm
    check(anchors, contrasts, 1 / 0.07, None, unit=False)


@pytest.mark.parametrize("m", [None, 200])
@pytest.mark.parametrize("norm", [10.0, 30.0, 100.0])
def test_gradients_of_huge_logits(norm, m):
    """A logit is computed in both passes, and in a self-contrast in the row of either end: roundings may differ."""
    anchors, contrasts = rows(150, 16) * norm, None if m is None else rows(m, 16, seed=1) * norm
    upstream = torch.linspace(-1, 2, 150, device=DEVICE)
    ours = compute(anchors, contrasts, 1 / 0.07, None if m else 0, upstream, unit=False)
    exact = oracle(anchors, contrasts, float(np.float32(1 / 0.07)), None if m else 0, upstream)
    bound = max(1e-5, 2**-23 * norm**2 / 0.07)
    assert relative(ours.d_anchors, exact.d_anchors) <= bound
    if m is not None:
        assert relative(ours.d_contrasts, exact.d_contrasts) <= bound


def test_rows_of_zeros():
    z = rows(150, 16)
    z[3] = z[149] = 0
    check(z)
    check(z * 0, unit=False)
    check(z * 0)


# ---- One fp16 product: 10 mantissa bits ----

HALF_ULP = 2.0**-11  # what rounding to 10 mantissa bits may do to a number


def check_one_product(anchors, contrasts=None, scale: float = 1 / 0.1, self_offset: int | None = 0) -> None:
    """Precision "high", exact but for its two roundings: entries of the rows, and weights in the gradient.

    Rounded entries are within half an ulp, so a logit is within 2^-10 scale |a| |b|. On entries that fp16 holds there
    is only the rounding of weights, at most half an ulp of each term of the gradient.
    """
    upstream = torch.linspace(-1, 2, len(anchors), device=anchors.device)
    ours = compute(anchors, contrasts, scale, self_offset, precision="high")
    exact = oracle(anchors, contrasts, float(np.float32(scale)), self_offset)
    assert lse_error(ours.lse, exact.lse) <= 2 * HALF_ULP * scale + 1e-5

    anchors, contrasts = (None if x is None else x.half().float() for x in (anchors, contrasts))
    ours = compute(anchors, contrasts, scale, self_offset, upstream, precision="high")
    exact = oracle(anchors, contrasts, float(np.float32(scale)), self_offset, upstream)
    bounds = float32_bounds(1 / scale)
    assert lse_error(ours.lse, exact.lse) <= bounds["lse_bound"]
    slack = HALF_ULP + 2 * bounds["grad_bound"]
    for name, terms in (("d_anchors", exact.anchor_terms), ("d_contrasts", exact.contrast_terms)):
        if hasattr(ours, name):
            errors = np.linalg.norm(getattr(ours, name).double().cpu().numpy() - getattr(exact, name), axis=1)
            assert (errors <= slack * terms + HALF_ULP * 2.0**-18 * terms.max()).all()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_less_than_highest_is_one_product(precision):
    """Else "highest" would be no better than it."""
    z = rows(300, 128)
    exact = oracle(z, None, float(np.float32(1 / 0.07)), 0)
    error = lse_error(compute(z, None, 1 / 0.07, precision=precision).lse, exact.lse)
    assert 2e-5 < error < 2e-3  # 8.9e-4 at 2048 rows


@pytest.mark.parametrize("number", [1, 2, 127, 129, 257])
def test_one_product_of_any_number_of_rows(number):
    check_one_product(rows(number, 16))


@pytest.mark.parametrize("a, m, self_offset", RECTANGLES[::3])
def test_one_product_of_rectangles(a, m, self_offset):
    check_one_product(rows(a, 16), rows(m, 16, seed=1), self_offset=self_offset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_features(dtype, normalize):
    """Normalised in float32 first, then one product; rows given as fp16 are taken as they are."""
    features = rows(150, 64).to(dtype)
    labels = torch.arange(150, device=DEVICE) % 7
    ours, wanted = features.clone().requires_grad_(), features.double().requires_grad_()
    loss = gen_supcon_loss(ours, labels, normalize=normalize, backend="triton")
    exact = gen_supcon_loss(wanted, labels, normalize=normalize, backend="dense")
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) <= 2 * HALF_ULP / 0.07
    loss.backward()
    exact.backward()
    assert ours.grad.dtype == dtype
    assert relative(ours.grad, wanted.grad.cpu().numpy()) <= 2 * HALF_ULP / 0.07 + torch.finfo(dtype).eps


# ---- Upstream gradients ----


def upstreams(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(number, generator=generator)
    one_hot = torch.zeros(number)
    one_hot[number // 2] = 1.0
    return {
        "mean": torch.full((number,), 1 / number),
        "random signs": normal.sign(),
        "one row": one_hot,
        "a few rows": one_hot + one_hot.roll(7),
        "tiny": normal * 1e-25,
        "huge": normal * 1e20,
        "just below a power of two": torch.full((number,), 2.0 - 2.0**-23),
        "a power of two": torch.full((number,), 2.0),
        "many magnitudes": normal * torch.logspace(-8, 0, number),
    }


@pytest.mark.strength(1)
@pytest.mark.parametrize("kind", upstreams(2))
@pytest.mark.parametrize("tau", [0.07, 0.01])
def test_any_upstream_gradient(kind, tau):
    upstream = upstreams(150)[kind].to(DEVICE)
    check(rows(150, 16), None, 1 / tau, 0, upstream, **float32_bounds(tau))
    check(rows(150, 16), rows(70, 16, seed=1), 1 / tau, -3, upstream, **float32_bounds(tau))


@pytest.mark.parametrize("m", [None, 70])
def test_no_upstream_gradient_gives_exactly_none(m):
    contrasts = None if m is None else rows(m, 16, seed=1)
    ours = compute(rows(150, 16), contrasts, 10.0, 0, torch.zeros(150, device=DEVICE))
    assert ours.d_anchors.count_nonzero() == 0
    assert m is None or ours.d_contrasts.count_nonzero() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("m", [None, 70])
def test_a_bad_upstream_gradient_does_not_become_a_good_one(bad, m):
    """Gradient scalers rely on it."""
    contrasts = None if m is None else rows(m, 16, seed=1)
    upstream = torch.ones(150, device=DEVICE)
    upstream[5] = bad
    ours = compute(rows(150, 16), contrasts, 10.0, 0, upstream)
    assert not ours.d_anchors[5].isfinite().any()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_small_weights_are_not_lost(precision):
    """1/N^2 = 1.5e-8 for each product of the mean's gradient and softmax: below what fp16 holds, unless scaled."""
    number = 8192
    anchors, contrasts = rows(128, 16).half().float(), rows(number, 16, seed=1).half().float()
    upstream = torch.full((128,), 1 / number, device=DEVICE)
    ours = compute(anchors, contrasts, 2.0, None, upstream, precision=precision)
    exact = oracle(anchors, contrasts, 2.0, None, upstream)
    bound = 5e-6 if precision == "highest" else HALF_ULP
    assert relative(ours.d_contrasts, exact.d_contrasts) <= bound
    errors = np.linalg.norm(ours.d_anchors.double().cpu().numpy() - exact.d_anchors, axis=1)
    assert (errors <= 1.01 * bound * exact.anchor_terms).all()


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("tau", [SWITCH * 1.0001, 0.005])
@pytest.mark.parametrize("number", [2, 3, 129])
def test_no_weight_overflows(number, tau, precision):
    """Pairs of opposite rows: of self terms and padding, exponentials of +400 must not reach the sums."""
    z = rows(1, 16)
    z = torch.cat([z, -z.repeat(number - 1, 1)])
    upstream = torch.ones(number, device=DEVICE)
    ours = compute(z, None, 1 / tau, 0, upstream, precision=precision)
    exact = oracle(z, None, 1 / tau, 0, upstream)
    assert relative(ours.d_anchors, exact.d_anchors) <= (1e-4 if precision == "highest" else 2 * HALF_ULP)


# ---- What is not finite ----


@pytest.mark.strength(1)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("unit", [True, False], ids=["one shift", "running maximum"])
@pytest.mark.parametrize("place", [0, 131, 149])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_a_bad_row_shows_in_every_row_that_sees_it(bad, unit, place, precision):
    z = rows(150, 16)
    z[place, 7] = bad
    upstream = torch.ones(150, device=DEVICE)
    ours = compute(z, None, 10.0, 0, upstream, unit=unit, precision=precision)
    assert ours.lse.isnan().all()  # its own too: it is not a number whatever it is multiplied by
    assert ours.d_anchors.isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_anchor_is_its_own_affair(bad):
    anchors = rows(150, 16)
    anchors[140, 3] = bad
    lse = compute(anchors, rows(70, 16, seed=1), 10.0, None, precision="high").lse
    assert lse.isnan().nonzero().tolist() == [[140]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_an_anchor_does_not_see_does_not_matter(bad):
    contrasts = rows(150, 16, seed=1)
    contrasts[140, 3] = bad
    lse = compute(rows(70, 16), contrasts, 10.0, 100).lse
    assert lse.isfinite().nonzero().tolist() == [[40]]


# ---- Bits ----


@pytest.mark.parametrize("m", [None, 200])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_same_input_gives_the_same_bits(m, precision):
    anchors = rows(300, 48)
    contrasts = None if m is None else rows(m, 48, seed=1)
    upstream = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def once():
        return vars(compute(anchors, contrasts, 1 / 0.07, 0, upstream, precision=precision)).values()

    first = list(once())
    for _ in range(100 if ON_GPU else 2):
        assert all(torch.equal(x, y) for x, y in zip(first, once(), strict=True))


# ---- Columns in several parts ----


@pytest.fixture
def many_multiprocessors(monkeypatch) -> list[int]:
    """A device so large that columns are split; the numbers of parts, as they are chosen."""
    monkeypatch.setattr(fused, "_multiprocessors", lambda device: 64)
    chosen, share = [], fused._share

    def spy(*args):
        result = share(*args)
        chosen.append(result[0])
        return result

    monkeypatch.setattr(fused, "_share", spy)
    return chosen


@pytest.mark.strength(1)
@pytest.mark.parametrize("number", [129, 256, 257, 385, 700])
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_parts_of_the_columns_add_up(many_multiprocessors, number, tau):
    """With 129 or 385 rows, the last row of the last part sees only itself there: a sum of zero over 2^-inf."""
    check(rows(number, 16), None, 1 / tau, **float32_bounds(tau))
    assert len(many_multiprocessors) == 2
    assert min(many_multiprocessors) > 1


@pytest.mark.strength(1)
@pytest.mark.parametrize("a, m, self_offset", [(70, 700, 600), (3, 700, None), (700, 300, -500), (200, 700, 650)])
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_parts_of_a_rectangle_add_up(many_multiprocessors, a, m, self_offset, tau):
    check(rows(a, 16), rows(m, 16, seed=1), 1 / tau, self_offset, **float32_bounds(tau))
    assert len(many_multiprocessors) == 3
    assert max(many_multiprocessors) > 1


@pytest.mark.parametrize("m", [None, pytest.param(300, marks=pytest.mark.exhaustive)])
def test_parts_add_up_where_each_row_is_read_piece_by_piece(many_multiprocessors, m):
    if m is None:
        check(rows(300, 600))
    else:
        check(rows(150, 600), rows(m, 600, seed=1), self_offset=40)
    assert min(many_multiprocessors) > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("unit", [True, False], ids=["one shift", "running maximum"])
def test_no_part_hides_a_bad_row(many_multiprocessors, bad, unit):
    z = rows(300, 16)
    z[200, 7] = bad
    ours = compute(z, None, 10.0, 0, torch.ones(300, device=DEVICE), unit=unit)
    assert min(many_multiprocessors) > 1
    assert ours.lse.isnan().all()
    assert ours.d_anchors.isnan().all()


# ---- Wide rows, whose gradient is made in chunks by the library's matrix product ----


@pytest.fixture(params=[(128, 1 << 20), (128, 128)], ids=["rows", "rows and columns"])
def chunks(request, monkeypatch) -> list[tuple[int, int]]:
    """Few rows at a time, and few columns; the chunks of each gradient, as they are chosen."""
    chosen = []

    def few(padded_rows, padded_cols, *_):
        chosen.append((min(padded_rows, request.param[0]), min(padded_cols, request.param[1])))
        return chosen[-1]

    monkeypatch.setattr(fused, "_FEW_PAIRS", 0)
    monkeypatch.setattr(fused, "_chunk", few)
    return chosen


@pytest.mark.strength(1)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("tau", [0.1, 0.01])
@pytest.mark.parametrize("a, m, self_offset", [(150, None, 0), (5, 140, None), (130, 150, 75), (140, 9, -100)])
def test_chunks_add_up(chunks, a, m, self_offset, tau, precision):
    contrasts = None if m is None else rows(m, 500, seed=1)
    bounds = float32_bounds(tau) if precision == "highest" else {"lse_bound": 1.0, "grad_bound": 0.02}
    upstream = torch.linspace(-1, 2, a, device=DEVICE)
    check(rows(a, 500), contrasts, 1 / tau, self_offset, upstream, precision=precision, **bounds)
    assert len(chunks) == (1 if m is None else 2)


@pytest.mark.strength(1)
@pytest.mark.parametrize(("tau", "weighted"), [(0.1, False), (0.01, True)])
def test_chunks_where_only_the_device_knows_the_temperature(chunks, tau, weighted, monkeypatch):
    monkeypatch.setattr(fused, "is_known", lambda scale: False)
    features = rows(130, 257).requires_grad_()
    labels = torch.arange(130, device=DEVICE) % 5
    weight = torch.rand(130, generator=torch.Generator().manual_seed(0)).to(DEVICE) if weighted else None
    options = {"contrast_weight": weight, "temperature": tau}
    losses = [gen_supcon_loss(features, labels, backend=name, **options) for name in ("triton", "dense")]
    found = [torch.autograd.grad(loss, features)[0] for loss in losses]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6 / tau)
    assert len(chunks) == 1


def test_chunks_of_a_share_of_the_batch(chunks):
    """The gradient of anchors that are some of the contrasts, as one of several processes has it."""
    z, scale, own = rows(150, 257), torch.tensor(10.0), slice(10, 145)
    upstream = torch.linspace(-1, 2, 150, device=DEVICE)
    _, sums, cols, _ = fused.row_lse(z, None, scale, None, [0], True, "highest")
    whole, _ = fused.row_lse_grad(upstream, sums, cols, None, scale, None, [0], True, 150, 257, 0)
    anchors = fused._split_rows(z[own], "highest")
    numbers = fused.numbers_to_share(upstream, sums)
    share = fused.mirrored_grad(numbers, anchors, cols, scale, None, 10, True, 135, 257)
    torch.testing.assert_close(share, whole[own], rtol=1e-5, atol=1e-6)
    assert len(chunks) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_chunk_hides_a_bad_row(chunks, bad):
    z = rows(150, 257)
    z[140, 7] = bad
    ours = compute(z, None, 10.0, 0, torch.ones(150, device=DEVICE), precision="high")
    assert ours.d_anchors.isnan().all()
    assert chunks


def test_chunks_give_the_same_bits(chunks):
    one, other = (compute(rows(150, 257), None, 10.0, 0, torch.ones(150, device=DEVICE)).d_anchors for _ in range(2))
    assert torch.equal(one, other)
    assert chunks


@pytest.mark.parametrize("chip", plans._WEIGHTS)
def test_chunks_are_whole_blocks_within_their_memory(chip):
    sizes = [256, 512, 4096, 5120, 1 << 15, 1 << 17, 1 << 20, 1 << 24]
    for n, m, (width, terms), plan in (
        (n, m, line, plan) for n in sizes for m in sizes for line, plan in plans._WEIGHTS[chip].items()
    ):
        height, columns = fused._chunk(n, m, width, terms, plan)
        assert 0 < height <= n
        assert 0 < columns <= m
        assert height % plan.block_m == 0
        assert columns % plan.block_n == 0
        assert 2 * terms * height * columns + 4 * height * width <= 2**26
        assert height >= min(n, 4096)
        assert columns >= min(m, 2048)  # many enough for a matrix product to be worth its launch
        assert -(-columns // plan.block_n) < 2**16  # blocks of the second kind that a device takes


def test_only_wide_rows_and_many_pairs_are_worth_chunks(chunks, monkeypatch):
    def differentiate(n, d):
        compute(rows(n, d), None, 10.0, 0, torch.ones(n, device=DEVICE), precision="high")
        return len(chunks)

    assert differentiate(20, 256) == 0
    monkeypatch.setattr(fused, "_FEW_PAIRS", 20**2)
    assert differentiate(20, 257) == 0
    assert differentiate(21, 257) == 1


def test_the_library_multiplies_only_as_the_kernels_do(monkeypatch):
    device, options = torch.device("cuda"), torch.backends.cuda.matmul
    has_product = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
    assert fused._library_multiplies(device) == has_product
    assert fused._library_multiplies(torch.device("cpu"))
    if hasattr(options, "allow_fp16_accumulation"):
        options.allow_fp16_accumulation = True
        try:
            assert not fused._library_multiplies(device)
        finally:
            options.allow_fp16_accumulation = False
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not fused._library_multiplies(device)


def test_splits_cover_all_columns_once():
    plan = plans.forward_plan(fused._chip(DEVICE), 128, 1)
    for blocks, columns, most in itertools.product(
        (1, 3, 64, 500), (1, 127, 128, 129, 1000, 5000, 100_000), (1, 5, 32)
    ):
        splits, length = fused._share(blocks, columns, plan, most, DEVICE)
        assert 1 <= splits <= most
        assert length % plan.block_n == 0
        assert (splits - 1) * length < columns <= splits * length


# ---- A temperature that only the device knows ----


@pytest.fixture
def unread_scale(monkeypatch):
    """Treat every temperature as if it were on a GPU."""
    monkeypatch.setattr(fused, "is_known", lambda scale: False)


@pytest.mark.strength(1)
@pytest.mark.parametrize("tau", [0.5, 0.05, SWITCH * 1.0001, SWITCH * 0.9999, 0.005])
@pytest.mark.parametrize("name", ["random", "one against the rest"])
def test_the_device_chooses_what_suits_the_temperature(unread_scale, tau, name):
    z = hard_rows(name)
    assert len(fused._variants(torch.tensor(1.0), True)) == 2
    scale = torch.tensor(1 / tau).to(DEVICE)
    upstream = torch.linspace(-1, 2, 150, device=DEVICE)
    ours = compute(z, None, scale, 0, upstream)
    exact = oracle(z, None, float(scale), 0, upstream)
    bounds = float32_bounds(tau)
    assert lse_error(ours.lse, exact.lse) <= bounds["lse_bound"]
    assert relative(ours.d_anchors, exact.d_anchors) <= bounds["grad_bound"]


def test_the_device_chooses_as_the_host_would(unread_scale, monkeypatch):
    """On both sides of the switch and at it: exactly one of the two variants writes, and it is the same one."""
    scales = np.float32(1 / SWITCH) * np.linspace(0.99999, 1.00001, 21, dtype=np.float32)
    for scale in scales.tolist():
        unread = compute(rows(9, 16), None, torch.tensor(scale).to(DEVICE)).lse
        with monkeypatch.context() as patch:
            patch.setattr(fused, "is_known", lambda scale: True)
            known = compute(rows(9, 16), None, scale).lse
        torch.testing.assert_close(unread, known, rtol=0, atol=1e-4)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("m", [None, 70])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_the_gradient_of_the_temperature(monkeypatch, on_device, m, unit, tau):
    if on_device:
        monkeypatch.setattr(fused, "is_known", lambda scale: False)
    z, contrasts = rows(150, 16), None if m is None else rows(m, 16, seed=1)
    scale = torch.tensor(1 / tau).to(DEVICE if on_device else "cpu").requires_grad_()
    upstream = torch.linspace(-1, 2, 150, device=DEVICE)
    ours = compute(z, contrasts, scale, 0, upstream, unit=unit)
    exact = oracle(z, contrasts, scale.item(), 0, upstream)
    assert ours.d_scale.shape == ()
    assert ours.d_scale.item() == pytest.approx(exact.d_scale, rel=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_learnable_temperature_trains_as_on_the_dense_backend(unread_scale, normalize):
    features, labels = rows(60, 16), torch.arange(60, device=DEVICE) % 5
    gradients = {}
    for backend in ("dense", "triton"):
        criterion = GenSupConLoss(0.1, learnable_temperature=True, normalize=normalize, backend=backend).to(DEVICE)
        leaf = features.clone().requires_grad_()
        criterion(leaf, labels).backward()
        gradients[backend] = leaf.grad, criterion.log_temperature.grad
    for ours, theirs in zip(gradients["triton"], gradients["dense"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class NoReads(TorchDispatchMode):
    """Raise where the host would have to wait for the device: where it reads a number, or a size depends on one."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.READS:
            raise AssertionError(f"reads {name}")
        return func(*args, **(kwargs or {}))


def test_the_test_for_reads_can_fail():
    for read in (float, bool, torch.Tensor.item, torch.nonzero, torch.unique, lambda x: torch.equal(x, x)):
        with pytest.raises(AssertionError, match="reads"), NoReads():
            read(torch.ones((), device=DEVICE))


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("m", [None, 70])
def test_the_host_reads_nothing_that_the_device_computed(unread_scale, many_multiprocessors, unit, m):
    """Around the operators, and inside: where the mode does not look while it runs an operator."""
    anchors, contrasts = rows(150, 16), None if m is None else rows(m, 16, seed=1)
    scale, upstream = torch.tensor(10.0).to(DEVICE), torch.ones(150, device=DEVICE)
    with NoReads():
        compute(anchors, contrasts, scale.clone().requires_grad_(), 0, upstream, unit=unit)
        _, sums, left, right = fused.row_lse(anchors, contrasts, scale, None, [0], unit, "highest")
        fused.row_lse_grad(upstream, sums, left, right, scale, None, [0], unit, m or 150, 16, m or 150)


@needs_gpu
def test_a_training_step_never_waits_for_the_device():
    criterion = GenSupConLoss(learnable_temperature=True, backend="triton").to(DEVICE)
    features, labels = rows(300, 64).requires_grad_(), torch.arange(300, device=DEVICE) % 7
    criterion(features, labels).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(features, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("learnable", [False, True])
def test_a_training_step_can_be_captured_in_a_graph(learnable):
    criterion = GenSupConLoss(learnable_temperature=learnable, backend="triton").to(DEVICE)
    features, labels = rows(300, 64).requires_grad_(), torch.arange(300, device=DEVICE) % 7
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            criterion(features, labels).backward()
    torch.cuda.current_stream().wait_stream(stream)
    features.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(features, labels)
        loss.backward()
    other = rows(300, 64, seed=5)
    with torch.no_grad():
        features.copy_(other)
    graph.replay()
    eager = other.clone().requires_grad_()
    expected = criterion(eager, labels)
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(features.grad, eager.grad)


# ---- What torch makes of the operators ----


@pytest.mark.strength(1)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("a, m, self_offset", [(6, None, 0), (3, 9, 5), (8, 8, None)])
def test_the_operators_are_registered_correctly(a, m, self_offset, precision):
    anchors, contrasts = rows(a, 20), None if m is None else rows(m, 20, seed=1)
    operators, left_out = torch.ops.genscl_loss, [] if self_offset is None else [self_offset]
    for scale in (torch.tensor(5.0), torch.tensor(5.0).to(DEVICE).requires_grad_()):
        leaves = [x if x is None else x.clone().requires_grad_() for x in (anchors, contrasts)]
        opcheck(operators.row_lse.default, (*leaves, scale, None, left_out, True, precision, "triton"))
    scale = scale.detach()
    lse, sums, left, right = operators.row_lse(anchors, contrasts, scale, None, left_out, True, precision, "triton")
    right = None if m is None else right
    for wanted in (False, True):
        rows_of = a if m is None else m
        saved = (torch.ones_like(lse), sums, left, right, scale, None, left_out, True, rows_of, 20)
        opcheck(operators.row_lse_grad.default, (*saved, wanted, "triton"))


def test_operators_take_any_strides():
    anchors, contrasts = torch.randn(20, 7, device=DEVICE).T, torch.randn(10, 40, device=DEVICE)[::2, ::2]
    options = (torch.tensor(2.0), None, [], False, "highest", "triton")
    opcheck(torch.ops.genscl_loss.row_lse.default, (anchors.requires_grad_(), contrasts.requires_grad_(), *options))


@pytest.mark.strength(1)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("learnable", [True, False])
def test_one_graph_serves_all_batch_sizes(normalize, learnable):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    criterion = GenSupConLoss(normalize=normalize, learnable_temperature=learnable, backend="triton").to(DEVICE)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend="aot_eager")
    for number in (9, 40, 150):
        labels = torch.arange(number, device=DEVICE) % 5
        ours, eager = rows(number, 20).requires_grad_(), rows(number, 20).requires_grad_()
        loss, expected = compiled(ours, labels), criterion(eager, labels)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, eager.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_graph_is_traced_anew_when_the_precision_changes():
    torch._dynamo.reset()
    features, labels = rows(150, 20), torch.arange(150, device=DEVICE) % 5

    def loss(features):
        return gen_supcon_loss(features, labels, backend="triton")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = {}
    for precision in ("highest", "high", "highest"):
        with matmul_precision(precision):
            values[precision] = loss(features)
            assert torch.equal(compiled(features), values[precision])
    assert not torch.equal(values["highest"], values["high"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    features, labels = rows(150, 20), torch.arange(150, device=DEVICE) % 5

    def step():
        leaf = features.clone().requires_grad_()
        loss = gen_supcon_loss(leaf, labels, backend="triton")
        return loss, torch.autograd.grad(loss, leaf)[0]

    plain = step()
    with torch.autocast(DEVICE.type, dtype=dtype):
        mixed = step()
    for ours, theirs in zip(mixed, plain, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_activation_checkpoints_change_nothing():
    features, labels = rows(150, 20).requires_grad_(), torch.arange(150, device=DEVICE) % 5

    def loss(x):
        return gen_supcon_loss(x, labels, backend="triton")

    plain = torch.autograd.grad(loss(features), features)[0]
    checkpointed = torch.utils.checkpoint.checkpoint(loss, features, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(checkpointed, features)[0], plain)


def test_the_precision_of_the_backward_pass_is_that_of_the_forward_pass():
    """A setting that changes in between must not make one half of the rows meet another half."""
    z, upstream = rows(150, 20), torch.ones(150, device=DEVICE)
    with matmul_precision("high"):
        leaf = z.clone().requires_grad_()
        loss = gen_supcon_loss(leaf, torch.zeros(150, device=DEVICE), backend="triton", reduction="none")
    gradient = torch.autograd.grad(loss, leaf, upstream)[0]
    with matmul_precision("high"):
        again = z.clone().requires_grad_()
        loss = gen_supcon_loss(again, torch.zeros(150, device=DEVICE), backend="triton", reduction="none")
        assert torch.equal(torch.autograd.grad(loss, again, upstream)[0], gradient)


def test_a_second_derivative_is_refused():
    leaf = rows(9, 16).requires_grad_()
    loss = gen_supcon_loss(leaf, torch.arange(9, device=DEVICE) % 2, backend="triton")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match='"triton" has no second derivative.*backend="dense"'):
        gradient.sum().backward()


# ---- Who may use it ----


def refused(reason: str):
    return pytest.raises(ValueError, match=f'^backend "triton" cannot be used here: .*{reason}')


def test_what_it_does_not_take_is_refused_by_name_and_left_to_others_by_auto():
    z, labels = rows(9, 16), torch.arange(9, device=DEVICE) % 2
    with refused("float32.*float64"):
        gen_supcon_loss(z.double(), labels, backend="triton")
    wide = rows(9, plans.MAX_FEATURES + 1)
    with refused(f"up to {plans.MAX_FEATURES} features.*got {plans.MAX_FEATURES + 1}"):
        gen_supcon_loss(wide, labels, backend="triton")
    for features in (z.double(), wide):
        assert gen_supcon_loss(features, labels).isfinite()
        assert choose("auto", features, 10**6) in {"dense", "tiled"}


def test_without_triton_it_is_refused_by_name_and_not_listed(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find_spec(name))
    with refused("Triton is not installed"):
        gen_supcon_loss(rows(9, 16), torch.arange(9, device=DEVICE) % 2, backend="triton")
    assert genscl_loss.available_backends() == ("dense", "tiled")


def test_it_is_listed_where_it_works():
    assert genscl_loss.available_backends() == ("dense", "tiled", "triton")


def run_python(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    search = os.pathsep.join([str(path) for path in paths] + [str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=inherited | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"} | environment,
    )


def test_importing_the_package_does_not_import_triton():
    code = """
import sys, torch
before = set(sys.modules)
import genscl_loss
features = torch.randn(4, 3, requires_grad=True)
genscl_loss.available_backends()
for backend in ("auto", "dense", "tiled"):
    genscl_loss.gen_supcon_loss(features, torch.arange(4) % 2, backend=backend).backward()
sys.exit(any(name.split(".")[0] == "triton" for name in set(sys.modules) - before))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_cpu_tensor_is_refused_without_the_interpreter():
    code = """
import torch, genscl_loss
print(genscl_loss.available_backends())
genscl_loss.gen_supcon_loss(torch.randn(4, 3), torch.arange(4) % 2, backend="triton")
"""
    done = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout == "('dense', 'tiled')\n"
    assert 'ValueError: backend "triton" cannot be used here: it needs an NVIDIA GPU' in done.stderr


# ---- Offsets beyond 32 bits ----


@pytest.mark.skipif(ON_GPU, reason="needs the interpreter, which looks for it")
def test_integers_that_do_not_fit_are_noticed():
    """So are those of the kernels, where a 32-bit offset would have to be a 64-bit one."""
    from overflow import squares

    squares[(1,)](left := torch.tensor([46340], dtype=torch.int32))
    assert left.item() == 46340**2
    with pytest.raises(Exception, match="overflow"):
        squares[(1,)](torch.tensor([46341], dtype=torch.int32))


FAR_ROWS = """
import mmap
import torch
MAP_NORESERVE = 0x4000  # which Python names only in new releases
from genscl_loss._backends import fused
if KERNELS:
    import importlib.util
    spec = importlib.util.spec_from_file_location("changed_kernels", KERNELS)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    fused._kernels = lambda: kernels
rows, stride, features = 200, 2**24, 8
memory = mmap.mmap(-1, 4 * rows * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
x = torch.frombuffer(memory, dtype=torch.float32).as_strided((rows, features), (stride, 1))
values = torch.randn(rows, features)
for row, value in zip(x, values):
    row.copy_(value)
out = fused._split_rows(x, "highest")[:, :rows, :features].float().sum(0) / 64
print("right" if torch.allclose(out, values, rtol=1e-6, atol=1e-7) else "wrong")
"""


@pytest.mark.skipif(ON_GPU, reason="needs the interpreter, which reads memory of the host")
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved but not used")
@pytest.mark.parametrize("bits", [64, 32])
def test_rows_may_be_further_apart_than_32_bits_can_say(bits, tmp_path):
    """13 GB of addresses, 1 MB of memory. With 32 bits it crashes or is wrong: the test can fail."""
    changed = ""
    if bits == 32:
        changed = tmp_path / "changed_kernels.py"
        changed.write_text(re.sub(r"(rows|features)\.to\(tl\.int64\)\[", r"\1[", KERNELS.read_text()))
        assert changed.read_text() != KERNELS.read_text()
    code = f"KERNELS = {str(changed)!r}\n" + FAR_ROWS
    done = run_python(code, TRITON_INTERPRET="1")
    assert (done.stdout == "right\n") == (bits == 64), done.stderr
