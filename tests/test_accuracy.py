"""What rounding leaves of a trained model: losses near zero, gradients that cancel, and no loss below zero."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from torch_reference import reference_loss

from genscl_loss import gen_supcon_loss

EPS = torch.finfo(torch.float32).eps
N, D = 257, 32


def two_views(noise: float, n: int = N, seed: int = 0) -> list[torch.Tensor]:
    """Embeddings of samples that a model has learned to tell apart, up to some noise."""
    g = torch.Generator().manual_seed(seed)
    x = normalize(torch.randn(n, D, generator=g), dim=1)
    return [normalize(x + noise * torch.randn(n, D, generator=g) / D**0.5, dim=1) for _ in range(2)]


def logarithm_of_one_plus(anchors, contrasts, tau, partner, itself) -> torch.Tensor:
    """Mean of log(1 + sum_k exp(s_ik - s_ip)), k running over all but the partner p and the anchor itself."""
    z, k = normalize(anchors, dim=1), normalize(contrasts, dim=1)
    logits = z @ k.T / tau
    count = torch.arange(len(z))
    positive = logits[count, partner]
    negatives = logits.scatter(1, partner[:, None], -torch.inf)
    if itself:
        negatives = negatives.masked_fill(torch.eye(len(z), len(k), dtype=torch.bool), -torch.inf)
    return (negatives - positive[:, None]).exp().sum(1).log1p().mean()


PAIRS = ["all", "first", "one", "contrasts", "contrasts of two views"]


def pairs(kind: str, views: list[torch.Tensor], tau: float):
    """Arguments of the loss, and the same loss of the same views in float64."""
    a, b = views
    n, same = len(a), torch.arange(len(a))
    arguments = {"features": [a, b], "temperature": tau, "base_temperature": None}
    if kind == "all":
        rows = torch.cat([a, b]).double()
        return arguments, logarithm_of_one_plus(rows, rows, tau, torch.cat([same + n, same]), True)
    rows = torch.cat([a, b]).double()
    if kind == "first":
        return arguments | {"contrast_mode": "first"}, logarithm_of_one_plus(rows[:n], rows, tau, same + n, True)
    if kind == "one":
        return arguments | {"contrast_mode": "one"}, logarithm_of_one_plus(rows[:n], rows[n:], tau, same, False)
    if kind == "contrasts":
        wanted = logarithm_of_one_plus(rows[:n], rows[n:], tau, same, False)
        return arguments | {"features": a, "contrast_features": b}, wanted
    wanted = logarithm_of_one_plus(torch.cat([rows[:n]] * 2), rows[n:], tau, same.repeat(2), False)
    return arguments | {"features": [a, a], "contrast_features": b}, wanted


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("tau", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_one_positive_each_is_accurate_however_small_the_loss(kind, backend, tau, noise):
    """Down to 1e-20 loss and gradient have the digits that float32 leaves a logit, eps / tau."""
    views = [view.requires_grad_() for view in two_views(noise)]
    arguments, exact = pairs(kind, views, tau)
    wanted = torch.autograd.grad(exact, views)
    loss = gen_supcon_loss(**arguments, backend=backend)
    gradients = torch.autograd.grad(loss, views)
    assert exact > 0 and (tau > 0.05 or exact < 3e-2)
    assert abs(loss.item() / exact.item() - 1) <= 2 * EPS / tau
    for gradient, reference in zip(gradients, wanted, strict=True):
        assert (gradient - reference).norm() <= 4 * EPS / tau * reference.norm()


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("kind", PAIRS)
def test_one_positive_each_is_the_loss_of_its_labels(kind, backend, small_tile):
    """The way of pairs and that of labels agree, in float64 to all digits."""
    a, b = (view[:11].double().requires_grad_() for view in two_views(1.0))
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    arguments, _ = pairs(kind, [a, b], 0.3)
    arguments |= {"temperature": tau, "reduction": "none", "backend": backend}
    label = torch.arange(11)
    labelled = arguments | {"labels": label} | ({"contrast_labels": label} if "contrast_features" in arguments else {})
    upstream = torch.linspace(-1, 2, 22 if kind in ("all", "contrasts of two views") else 11, dtype=torch.float64)
    results = []
    for given in (arguments, labelled):
        loss = gen_supcon_loss(**given)
        results.append((loss, *torch.autograd.grad(loss @ upstream, (a, b, tau))))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_a_pair_without_negatives_has_no_loss(backend):
    a, b = (view[:1].requires_grad_() for view in two_views(1.0))
    loss = gen_supcon_loss([a, b], backend=backend)
    assert str(loss.item()) == "0.0"
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (a, b)))
    assert gen_supcon_loss([a * math.nan, b], backend=backend).isnan()


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("where", ["features", "contrast_features"])
def test_an_infinite_row_of_pairs_is_never_merely_far_away(backend, where):
    features, contrasts = torch.ones(3, 2), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    (features if where == "features" else contrasts)[1, 0] = -math.inf
    loss = gen_supcon_loss(features, contrast_features=contrasts, normalize=False, backend=backend)
    assert not loss.isfinite()
    alone = gen_supcon_loss([torch.tensor([[math.inf]]), torch.tensor([[1.0]])], normalize=False, backend=backend)
    assert not alone.isfinite()  # and nothing that it could be far from


@pytest.mark.parametrize("tau", [0.01, 0.07])
def test_probabilities_sum_to_one_between_the_passes(tau):
    """The gradient of a log-sum-exp along its rows: what they have in common, times a sum of probabilities."""
    from genscl_loss._backends import row_lse

    g = torch.Generator().manual_seed(0)
    z = normalize(torch.randn(1, D, generator=g) + 0.3 * torch.randn(700, D, generator=g), dim=1)
    z[:, 0] = 1.0  # the same in all rows, so that this column of the gradient is (tau^-1) times such sums
    lse = row_lse(z.requires_grad_(), None, torch.tensor(1 / tau), 0, unit=False, precision="highest", backend="tiled")
    upstream = torch.zeros(700)
    upstream[::7] = 1
    sums = torch.autograd.grad(lse @ upstream, z)[0][:, 0].double() * tau
    assert abs(sums.sum() / 100 - 2) <= 2e-7 * 2


# ---- No loss below zero ----


def equal_views(reduction: str, backend: str, **options) -> torch.Tensor:
    a, _ = two_views(0.5, n=40)
    return gen_supcon_loss([a, a], torch.arange(40), temperature=0.01, reduction=reduction, backend=backend, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_never_negative(backend, reduction):
    loss = equal_views(reduction, backend)
    assert (loss >= 0).all()
    assert not loss.signbit().any()
    assert (equal_views(reduction, backend, sample_weight=torch.zeros(40)) == 0).all()
    both = equal_views(reduction, backend, teacher_labels=torch.eye(40), teacher_weight=2.0)
    assert (both >= 0).all()


def test_what_keeps_a_loss_from_being_negative_leaves_its_gradient_alone():
    from genscl_loss._likelihood import loss_of

    likelihood = torch.tensor([-2.0, -0.0, 0.0, 1e-6, math.nan, -math.inf], requires_grad=True)
    loss = loss_of(likelihood, torch.ones(6), True)
    assert [str(value) for value in loss.tolist()] == ["2.0", "0.0", "0.0", "0.0", "nan", "inf"]
    (gradient,) = torch.autograd.grad(loss.sum(), likelihood)
    assert (gradient == -1).all()
    assert (loss_of(likelihood, torch.ones(6), False) < 0).any()  # weights in its denominator: no probability


def test_where_the_loss_would_be_negative_the_gradient_is_that_of_the_formula():
    """Rows a little longer than one, which is what makes rounded losses negative, and more of it."""
    a, _ = two_views(0.5, n=40)
    x = (1.0 + 1e-4 * torch.arange(40)[:, None]) * a
    options = {"temperature": 0.05, "base_temperature": None}
    gradients = []
    for function, dtype in ((gen_supcon_loss, torch.float32), (reference_loss, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        loss = function([leaf, leaf], torch.arange(40), **options)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_zero_has_no_sign(backend, reduction):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    no_positives = gen_supcon_loss(x, torch.arange(6), reduction=reduction, backend=backend)
    options = {"contrast_features": torch.zeros(0, 4), "contrast_labels": torch.zeros(0, dtype=torch.long)}
    empty_queue = gen_supcon_loss(x, torch.arange(6), **options, reduction=reduction, backend=backend)
    for loss in (no_positives, empty_queue):
        assert (loss == 0).all()
        assert not loss.signbit().any()
    assert gen_supcon_loss(x * math.nan, torch.arange(6), **options, backend=backend).isnan()


def test_the_graph_of_a_compiled_loss_is_not_negative_either():
    def compiled(labels):
        options = {"temperature": 0.01, "reduction": "none", "backend": "tiled"}
        return torch.compile(lambda x: gen_supcon_loss(x, labels, **options), fullgraph=True, backend="aot_eager")

    x = two_views(0.5, n=20)[0].repeat(2, 1)
    assert (compiled(torch.arange(20).repeat(2))(x) >= 0).all()
    assert not compiled(torch.arange(40))(x).signbit().any()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in jvp
@pytest.mark.parametrize("labels", [None, torch.arange(7)])
def test_every_derivative_of_dense_passes_what_keeps_the_loss_from_being_negative(labels):
    a, b = (view[:7].double() for view in two_views(1.0))
    direction = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(x):
        return gen_supcon_loss([x, b], labels, temperature=0.3, backend="dense")

    leaf = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.jvp(loss, (a,), (direction,))[1], (gradient * direction).sum())
    (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    step = 1e-6 * direction
    ends = []
    for x in (a + step, a - step):
        end = x.requires_grad_()
        ends.append(torch.autograd.grad(loss(end), end)[0])
    torch.testing.assert_close(second, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


# ---- The table ----


def test_the_table_of_errors_is_made_and_keeps_its_bounds(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    table = importlib.import_module("accuracy")
    assert table.main(["--smoke", "--backends", "dense", "tiled", "--out", str(tmp_path)]) == 0
    entries = json.loads((tmp_path / "accuracy.json").read_text())["accuracy"]
    assert {entry["labels"] for entry in entries} == set(table.KINDS)
    assert capsys.readouterr().out.count("labels  ") >= 1
    for entry in entries:
        assert entry["above"] * 0.9 <= entry["loss"]
        for found in entry["errors"].values():
            assert found["row"] <= 4
            assert found["loss"] <= 4 * EPS / entry["temperature"]
            if entry["labels"] == "views":
                assert found["gradient"] <= 4 * EPS / entry["temperature"]
