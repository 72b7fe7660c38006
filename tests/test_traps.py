"""The six traps of this loss: each with the obvious code that falls into it, and ours that does not.

The naive versions below are what one writes first. Every test first asserts that the naive version fails on the
input, so that the input stays a real trap, and then that the package is right.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import oracle_loss
from strategies import generator, near_disjoint_rows, random_features, soft_rows, to_numpy
from torch_reference import reference_loss

from genscl_loss import GenSupConLoss, collapsed_loss, gen_supcon_loss

normalize = torch.nn.functional.normalize


def relative(actual, expected) -> float:
    """Relative error of a loss or, in the norm, of a gradient."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return float((actual - expected).norm() / expected.norm())


# --- 1. cancellation of the self term ------------------------------------------------------------------------------


def naive_linear_loss(features, labels, tau=0.07):
    """Identity (a) in float32: class sums first, then the self term subtracted."""
    z, y = normalize(features, dim=1), normalize(labels, dim=1)
    own = (y * y).sum(1)
    p = y @ (y.T @ z) - own[:, None] * z
    mass = y @ y.sum(0) - own
    logits = (z @ z.T / tau).fill_diagonal_(float("-inf"))
    losses = mass / (mass + 1e-8) * logits.logsumexp(1) - (z * p).sum(1) / (tau * (mass + 1e-8))
    return tau / 0.07 * losses.mean()


def two_hot(number: int, classes: int) -> torch.Tensor:
    """Mixup with a share of 1e-4 for the second class, everything in its own corner of 8192 classes."""
    rng = generator(0)
    rows = torch.zeros(number, classes)
    first = torch.randperm(classes, generator=rng)[:number]
    rows[torch.arange(number), first] = 1 - 1e-4
    rows[torch.arange(number), first.roll(1)] += 1e-4
    return rows


@pytest.mark.parametrize(
    ("labels", "naive_error"),
    [
        (near_disjoint_rows(64, 2e-5 / 64, seed=0).float(), 1e-3),
        (near_disjoint_rows(64, 1e-6 / 64, seed=0).float(), 1e-2),
        (two_hot(64, 8192), 1e-5),
    ],
    ids=["W = 2e-5", "W = 1e-6", "two-hot, C = 8192"],
)
def test_trap_1_a_small_positive_mass_does_not_cancel(backend, labels, naive_error):
    if backend == "triton" and labels.shape[1] == 8192:
        pytest.skip("interpreted, as many classes take most of a minute: once, in test_gradients.py")
    features = random_features(64, 1, 32, seed=1)[:, 0].float()
    wanted = features.double().requires_grad_()
    expected = reference_loss(wanted, labels)
    expected.backward()
    assert not relative(naive_linear_loss(features, labels).detach(), expected.detach()) < naive_error

    ours = features.clone().requires_grad_()
    loss = gen_supcon_loss(ours, labels, backend=backend)
    loss.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    assert relative(ours.grad, wanted.grad) < 1e-5


@pytest.fixture
def no_float64(monkeypatch):
    """A device where float64 is missing or slow: the label stage has to do without, in blocks of four rows."""
    monkeypatch.setattr("genscl_loss._positives.sums.has_fast_float64", lambda device: False)
    monkeypatch.setattr("genscl_loss._positives.sums._BLOCK", 4)


@pytest.mark.parametrize("mode", ["all", "first", "one"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("kind", ["W = 1e-6", "two-hot, C = 8192", "hard"])
def test_trap_1_nothing_cancels_without_float64_either(no_float64, kind, views, mode):
    if mode == "one" and views == 1:
        pytest.skip("mode 'one' needs a second view")
    number = 21  # no multiple of the block; with views, a block holds rows of two views
    features = random_features(number, views, 32, seed=4).float()
    labels = {
        "W = 1e-6": near_disjoint_rows(number, 1e-6 / number, seed=0).float(),
        "two-hot, C = 8192": two_hot(number, 8192),
        "hard": torch.arange(number) % 4,
    }[kind]
    ours, wanted = features.clone().requires_grad_(), features.double().requires_grad_()
    loss = gen_supcon_loss(ours, labels, contrast_mode=mode, backend="tiled")
    expected = reference_loss(wanted, labels, contrast_mode=mode)
    loss.backward()
    expected.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    assert relative(ours.grad, wanted.grad) < 1e-5


def test_trap_1_float64_keeps_its_digits(small_tile):
    """Where sums have no digits to spare, nothing is subtracted."""
    generator_ = generator(7)
    labels = torch.softmax(30 * torch.randn(300, 300, generator=generator_, dtype=torch.float64), 1)
    features = random_features(300, 1, 16, seed=5)[:, 0]
    ours, wanted = features.clone().requires_grad_(), features.clone().requires_grad_()
    found = gen_supcon_loss(ours, labels, backend="tiled", reduction="none")
    expected = gen_supcon_loss(wanted, labels, backend="dense", reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-9, atol=1e-11)


def test_trap_1_wide_labels_where_float64_is_slow(no_float64):
    features, labels = random_features(12, 2, 8, seed=6).float(), soft_rows(12, 5, seed=2)
    found = gen_supcon_loss(features, labels.double(), backend="tiled")
    torch.testing.assert_close(found, gen_supcon_loss(features, labels.float(), backend="dense"), rtol=1e-5, atol=1e-5)


def test_trap_1_labels_that_share_nothing_are_exactly_empty(backend):
    # rounding in W - w_ii must not make an empty anchor look like one with positives
    labels = torch.eye(64)[torch.randperm(64, generator=generator(2))] * 0.3
    features = random_features(64, 1, 32, seed=3)[:, 0].float()
    assert abs(gen_supcon_loss(features, labels, backend=backend).item()) < 1e-6
    assert gen_supcon_loss(features, labels, empty_anchors="ignore", backend=backend).item() == 0


# --- 2. the maximum over the excluded self term --------------------------------------------------------------------


def naive_masked_loss(features, labels, tau):
    """The reference codes: the row maximum is taken before the diagonal is masked out of the sum."""
    z = normalize(features, dim=1)
    logits = z @ z.T / tau
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), dtype=z.dtype)
    log_prob = logits - torch.log((logits.exp() * others).sum(1, keepdim=True))
    positive = (labels[:, None] == labels[None, :]) * others
    return tau / 0.07 * (-(positive * log_prob).sum(1) / positive.sum(1).clamp_min(1)).mean()


def test_trap_2_a_small_temperature_is_finite_and_right(backend):
    features = random_features(8, 1, 128, seed=4)[:, 0].float()
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert naive_masked_loss(features, labels, 0.005).isnan()
    for tau in (0.005, 0.001):
        loss = gen_supcon_loss(features, labels, temperature=tau, backend=backend)
        assert relative(loss, oracle_loss(features.numpy(), labels.numpy(), temperature=tau)) < 1e-5


@pytest.mark.parametrize("tau", [0.01, 0.001])
def test_trap_2_an_isolated_anchor_is_finite_and_right(backend, tau):
    # everything else sits at cosine -1: exp((-1 - 1) / .01) is 0 in float32
    features = torch.cat([torch.ones(1, 16), -torch.ones(7, 16)])
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert naive_masked_loss(features, labels, tau).isnan()
    options = {"labels": labels, "temperature": tau, "reduction": "none"}
    ours, wanted = features.clone().requires_grad_(), features.double().requires_grad_()
    loss, expected = gen_supcon_loss(ours, **options, backend=backend), reference_loss(wanted, **options)
    # all seven log-probabilities of each row are -log(number of contrasts at the maximum), up to s * 1e-7
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    assert ours.grad.isfinite().all()


# --- 3. a fixed maximum of 1 / tau ---------------------------------------------------------------------------------


def naive_fixed_max_lse(features, tau):
    """Unit rows have s <= 1 / tau, so shift every row by 1 / tau."""
    z = normalize(features, dim=1)
    shifted = ((z @ z.T - 1) / tau).fill_diagonal_(float("-inf"))
    return 1 / tau + shifted.exp().sum(1).log()


@pytest.mark.parametrize("tau", [0.01, 0.005, 0.001])
def test_trap_3_rows_far_below_the_bound_do_not_underflow(backend, tau):
    # an anchor whose contrasts all lie opposite, 2 / tau below the bound: exp(-200) is 0 in float32
    features = torch.tensor([[1.0, 0.0], [-1.0, 1e-3], [-1.0, -1e-3], [-1.0, 0.0]])
    assert not naive_fixed_max_lse(features, tau).isfinite().all()
    options = {"labels": torch.zeros(4, dtype=torch.long), "temperature": tau, "reduction": "none"}
    loss = gen_supcon_loss(features, **options, backend=backend)
    wanted = torch.from_numpy(oracle_loss(features.numpy(), **to_numpy(options)))
    # s = 1 / tau carries eps / tau, times the factor tau / base
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [3.0, 30.0, 300.0])
def test_trap_3_rows_that_are_not_normalised_break_the_bound_and_still_work(backend, length):
    features = random_features(12, 1, 8, seed=5)[:, 0].float() * length
    logits = features @ features.T / 0.07 - 1 / 0.07
    assert not logits.exp().sum(1).isfinite().all()  # exp overflows with the shift 1 / tau
    options = {"labels": torch.arange(12) % 3, "normalize": False, "reduction": "none"}
    ours, wanted = features.clone().requires_grad_(), features.double().requires_grad_()
    loss, expected = gen_supcon_loss(ours, **options, backend=backend), reference_loss(wanted, **options)
    loss.sum().backward()
    expected.sum().backward()
    largest = float((features.double() ** 2).sum(1).max()) / 0.07
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6 * largest)
    assert ours.grad.isfinite().all()


# --- 4. a learnable temperature with the factor tau / base ---------------------------------------------------------


def test_trap_4_a_learnable_temperature_does_not_run_away(backend):
    def naive_loss(features, labels, tau):
        # the factor takes part in the gradient: the loss falls with tau itself, and tau falls through zero
        return tau / 0.07 * gen_supcon_loss(features, labels, temperature=tau, base_temperature=None, backend="dense")

    features = random_features(32, 2, 16, seed=6).float()
    labels = torch.arange(32) % 4
    tau = torch.tensor(0.07, requires_grad=True)
    optimizer = torch.optim.Adam([tau], lr=1e-2)
    with pytest.raises(ValueError, match="^temperature"):  # the naive form leaves the range; ours says so
        for _ in range(200):
            optimizer.zero_grad()
            naive_loss(features, labels, tau).backward()
            optimizer.step()
    assert not tau.item() > 0

    loss = GenSupConLoss(learnable_temperature=True, backend=backend)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(20 if backend == "triton" else 200):  # interpreted
        optimizer.zero_grad()
        value = loss(features, labels)
        value.backward()
        optimizer.step()
    assert value.isfinite()
    assert 0.01 * (1 - 1e-6) <= loss.temperature.item() <= 1.0 + 1e-6


@pytest.mark.not_on_triton("needs float64")
def test_trap_4_the_factor_is_detached(backend):
    features, labels = random_features(16, 2, 8, seed=7), torch.arange(16) % 4
    gradients = []
    for base in (None, 0.07):
        tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        gen_supcon_loss(features, labels, temperature=tau, base_temperature=base, backend=backend).backward()
        gradients.append(tau.grad.item())
    assert gradients[1] == pytest.approx(gradients[0] * 0.2 / 0.07, rel=1e-9)


# --- 5. autocast ---------------------------------------------------------------------------------------------------


def naive_dense_loss(features, labels, tau=0.07):
    z, y = normalize(features, dim=1), normalize(labels, dim=1)
    others = ~torch.eye(len(z), dtype=torch.bool)
    logits, weights = z @ z.T / tau, (y @ y.T) * others
    log_prob = logits - logits.masked_fill(~others, float("-inf")).logsumexp(1, keepdim=True)
    return (-(weights * log_prob).sum(1) / weights.sum(1)).mean()


def test_trap_5_autocast_does_not_reach_the_similarities(backend):
    features = random_features(64, 1, 32, seed=8)[:, 0].float()
    labels = torch.rand(64, 10, generator=generator(9)).mul(5).softmax(1)
    wanted = features.double().requires_grad_()
    reference_loss(wanted, labels).backward()
    errors = []
    for function in (naive_dense_loss, lambda x, y: gen_supcon_loss(x, y, backend=backend)):
        leaf = features.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(leaf, labels)
        loss.backward()
        errors.append(relative(leaf.grad, wanted.grad))
    assert loss.dtype == torch.float32
    assert errors[0] > 1e-3
    assert errors[1] < 1e-5


# --- 6. collapse ---------------------------------------------------------------------------------------------------


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("tau", [0.01, 0.07, 0.5])
@pytest.mark.parametrize("base", [0.07, 1.0])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_trap_6_a_collapsed_model_has_exactly_the_documented_loss(backend, kind, views, base, tau):
    number = 32
    features = random_features(1, 1, 8, seed=10).expand(number, views, 8)
    rows = torch.rand(number, 5, generator=generator(11), dtype=torch.float64)
    labels = torch.arange(number) % 4 if kind == "hard" else rows
    loss = gen_supcon_loss(features, labels, temperature=tau, base_temperature=base, backend=backend)
    stuck = collapsed_loss(number * views - 1, tau, base)
    assert stuck == pytest.approx(math.log(number * views - 1) * tau / base, rel=1e-12)
    # W / (W + 1e-8) acts on lse = s + log(M - 1), s = 1 / tau, but not more than 1e-8 / W of it
    assert loss.item() == pytest.approx(stuck, rel=1e-6)
    # what a user would expect of 2N views, without the self term, is another number
    assert stuck != pytest.approx(math.log(number * views) * tau / base, rel=1e-3)


def test_trap_6_the_threads_about_a_stuck_loss():
    # 512 samples, two views: the 6.92 (and, with 3700 samples, the 8.909) of so many questions
    assert collapsed_loss(1023) == pytest.approx(6.930, abs=1e-3)
    assert collapsed_loss(1013) == pytest.approx(6.920, abs=1e-3)
