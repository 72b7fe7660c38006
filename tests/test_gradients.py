"""Gradients: finite differences in float64, float32 against a float64 reference, half precision, autocast."""

from __future__ import annotations

import contextlib

import pytest
import torch
from oracle import oracle_loss
from strategies import MODES, generator, near_disjoint_rows, random_features, rounding_of_half, soft_rows, to_numpy
from torch_reference import reference_loss

from genscl_loss import GenSupConLoss, gen_supcon_loss

N, V, D, C = 6, 2, 3, 3  # finite differences cost two calls per entry; N spans two of the patched tiles
HARD = torch.tensor([0, 0, 1, 1, 1, 2])


def check(function, *inputs, **options) -> None:
    # gradcheck compares with central differences of step 1e-6, good to about 1e-6 / tau^2
    assert torch.autograd.gradcheck(function, inputs, rtol=1e-4, atol=1e-6, **options)


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_()


# --- finite differences --------------------------------------------------------------------------------------------


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("labels", ["none", "hard", "soft"])
def test_gradcheck_features(backend, small_tile, mode, reduction, labels):
    features = leaf(random_features(N, V, D, seed=0))
    chosen = {"none": None, "hard": HARD, "soft": soft_rows(N, C, seed=1)}[labels]
    options = {"contrast_mode": mode, "reduction": reduction, "temperature": 0.3, "backend": backend}
    check(lambda x: gen_supcon_loss(x, chosen, **options), features)


@pytest.mark.not_on_triton("needs float64")
def test_gradcheck_features_that_are_not_normalised(backend, small_tile):
    features = leaf(random_features(N, V, D, seed=0))
    check(lambda x: gen_supcon_loss(x, HARD, normalize=False, temperature=1.0, backend=backend), features)


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", ["hard", "soft", "similarity", "none"])
def test_gradcheck_contrast_features(backend, small_tile, mode, labels):
    size = N if labels == "none" else 5
    features, contrast = leaf(random_features(N, V, D, seed=2)), leaf(random_features(size, 1, D, seed=3)[:, 0])
    options = {
        "none": {},
        "hard": {"labels": HARD, "contrast_labels": torch.arange(size) % 3},
        "soft": {"labels": soft_rows(N, C, seed=1), "contrast_labels": soft_rows(size, C, seed=2)},
        "similarity": {"label_similarity": torch.rand(N, size, generator=generator(4), dtype=torch.float64)},
    }[labels]
    check(
        lambda x, k: gen_supcon_loss(
            x, contrast_features=k, **options, contrast_mode=mode, temperature=0.3, backend=backend
        ),
        features,
        contrast,
    )


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["N,C", "N,V,C"])
def test_gradcheck_labels(backend, small_tile, mode, form):
    features = leaf(random_features(N, V, D, seed=5))
    labels = soft_rows(N, C, seed=6) if form == "N,C" else soft_rows(N * V, C, seed=6).reshape(N, V, C)
    check(
        lambda x, y: gen_supcon_loss(x, y, contrast_mode=mode, temperature=0.3, backend=backend), features, leaf(labels)
    )


@pytest.mark.not_on_triton("needs float64")
def test_gradcheck_labels_of_a_single_view(backend, small_tile):
    features, labels = leaf(random_features(N, 1, D, seed=5)), leaf(soft_rows(N, C, seed=6))
    check(lambda x, y: gen_supcon_loss(x, y, temperature=0.3, backend=backend), features, labels)


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("differentiable", ["both", "those of anchors", "those of contrasts"])
def test_gradcheck_contrast_labels(backend, small_tile, differentiable):
    features, contrast = random_features(N, V, D, seed=7), random_features(5, 1, D, seed=8)[:, 0]
    own, others = soft_rows(N, C, seed=9), soft_rows(5, C, seed=10)
    check(
        lambda y, k: gen_supcon_loss(
            features, y, contrast_features=contrast, contrast_labels=k, temperature=0.3, backend=backend
        ),
        own if differentiable == "those of contrasts" else leaf(own),
        others if differentiable == "those of anchors" else leaf(others),
    )


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("form", ["N,N", "anchors,contrasts"])
def test_gradcheck_label_similarity(backend, small_tile, form):
    features = leaf(random_features(N, V, D, seed=11))
    size = N if form == "N,N" else N * V
    similarity = torch.rand(size, size, generator=generator(12), dtype=torch.float64) + 0.1
    check(
        lambda x, w: gen_supcon_loss(x, label_similarity=w, temperature=0.3, backend=backend),
        features,
        leaf(similarity),
    )


@pytest.mark.not_on_triton("needs float64")
def test_gradcheck_teacher_labels(backend, small_tile):
    features = leaf(random_features(N, V, D, seed=13))
    check(
        lambda x, y, t: gen_supcon_loss(x, y, teacher_labels=t, teacher_weight=0.7, temperature=0.3, backend=backend),
        features,
        leaf(soft_rows(N, C, seed=14)),
        leaf(soft_rows(N, C + 1, seed=15)),
    )


@pytest.mark.not_on_triton("needs float64")
def test_gradcheck_contrast_teacher_labels(backend, small_tile):
    features, contrast = leaf(random_features(N, V, D, seed=7)), leaf(random_features(5, 1, D, seed=8)[:, 0])
    check(
        lambda x, k, t, u: gen_supcon_loss(
            x,
            HARD,
            contrast_features=k,
            contrast_labels=HARD[:5],
            teacher_labels=t,
            contrast_teacher_labels=u,
            temperature=0.3,
            backend=backend,
        ),
        features,
        contrast,
        leaf(soft_rows(N, C, seed=9)),
        leaf(soft_rows(5, C, seed=10)),
    )


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("shape", ["N", "N,V"])
@pytest.mark.parametrize("empty_anchors", ["zero", "ignore"])
def test_gradcheck_sample_weight(backend, small_tile, shape, empty_anchors):
    features = leaf(random_features(N, V, D, seed=16))
    weight = torch.rand((N,) if shape == "N" else (N, V), generator=generator(17), dtype=torch.float64) + 0.1
    labels = [HARD, HARD + torch.tensor([0, 0, 0, 0, 0, 9])]  # sample 5 is empty in both views
    check(
        lambda x, u: gen_supcon_loss(
            x, labels, sample_weight=u, empty_anchors=empty_anchors, temperature=0.3, backend=backend
        ),
        features,
        leaf(weight),
    )


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_temperature_without_the_factor(backend, small_tile, mode, normalize):
    # with the factor tau / base finite differences would see the factor, which is detached on purpose
    features, tau = leaf(random_features(N, V, D, seed=18)), leaf(torch.tensor(0.4, dtype=torch.float64))
    options = {"contrast_mode": mode, "base_temperature": None, "normalize": normalize, "backend": backend}
    check(lambda x, t: gen_supcon_loss(x, HARD, temperature=t, **options), features, tau)


@pytest.mark.not_on_triton("needs float64")
def test_gradcheck_temperature_with_a_contrast_set(backend, small_tile):
    features, contrast = leaf(random_features(N, V, D, seed=18)), leaf(random_features(N, 1, D, seed=19)[:, 0])
    check(
        lambda x, k, t: gen_supcon_loss(x, contrast_features=k, temperature=t, base_temperature=None, backend=backend),
        features,
        contrast,
        leaf(torch.tensor(0.4, dtype=torch.float64)),
    )


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("base", [None, 0.07, 1.0])
@pytest.mark.parametrize("labels", ["none", "hard", "soft"])
def test_the_gradient_of_the_temperature_leaves_the_factor_out(backend, small_tile, base, labels):
    features = random_features(N, V, D, seed=20)
    chosen = {"none": None, "hard": HARD, "soft": soft_rows(N, C, seed=1)}[labels]
    gradients = []
    for function, extra in ((gen_supcon_loss, {"backend": backend}), (reference_loss, {})):
        tau = leaf(torch.tensor(0.2, dtype=torch.float64))
        function(features, chosen, temperature=tau, base_temperature=base, **extra).backward()
        gradients.append(tau.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


# --- double backward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", ["none", "hard", "soft"])
def test_gradgradcheck_features_on_dense(mode, labels):
    features = leaf(random_features(4, V, D, seed=21))
    chosen = {"none": None, "hard": HARD[:4], "soft": soft_rows(4, C, seed=1)}[labels]
    assert torch.autograd.gradgradcheck(
        lambda x: gen_supcon_loss(x, chosen, contrast_mode=mode, temperature=0.5, backend="dense"),
        (features,),
        rtol=1e-4,
        atol=1e-5,
    )


def test_gradgradcheck_on_dense_with_a_contrast_set_soft_labels_and_temperature():
    inputs = (
        leaf(random_features(4, 1, D, seed=22)),
        leaf(random_features(3, 1, D, seed=23)[:, 0]),
        leaf(soft_rows(4, C, seed=24)),
        leaf(torch.tensor(0.5, dtype=torch.float64)),
    )
    contrast_labels = soft_rows(3, C, seed=25)
    assert torch.autograd.gradgradcheck(
        lambda x, k, y, t: gen_supcon_loss(
            x,
            y,
            contrast_features=k,
            contrast_labels=contrast_labels,
            temperature=t,
            base_temperature=None,
            backend="dense",
        ),
        inputs,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("contrast_set", [False, True])
def test_double_backward_on_tiled_raises_and_names_the_way_out(small_tile, contrast_set):
    features = leaf(random_features(N, V, D, seed=26))
    extra = {"contrast_features": random_features(N, 1, D, seed=27)[:, 0]} if contrast_set else {}

    def double_backward():
        loss = gen_supcon_loss(features, **extra, backend="tiled")
        (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
        gradient.pow(2).sum().backward()

    with pytest.raises(RuntimeError, match='backend="dense"|backend=.dense.'):
        double_backward()


# --- single precision against float64 ------------------------------------------------------------------------------


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((actual.double() - expected).norm() / expected.norm())


def mixed_rows(number: int, classes: int, seed: int, share: float) -> torch.Tensor:
    """Two-hot rows, as mixup makes them: every sample mixed with a random other one."""
    rng = generator(seed)
    first = torch.randint(0, classes, (number,), generator=rng)
    other = first[torch.randperm(number, generator=rng)]
    rows = torch.zeros(number, classes)
    rows.scatter_add_(1, first[:, None], torch.full((number, 1), share))
    rows.scatter_add_(1, other[:, None], torch.full((number, 1), 1 - share))
    return rows


def sharp_rows(number: int, classes: int, seed: int, sharpness: float) -> torch.Tensor:
    return (torch.randn(number, classes, generator=generator(seed)) * sharpness).softmax(dim=1)


def label_regimes(number: int) -> dict[str, torch.Tensor]:
    hard = torch.randint(0, 5, (number,), generator=generator(1))
    onehot = torch.eye(10)[hard]
    return {
        "hard": hard,
        "one-hot": onehot,
        "smoothed": onehot * 0.9 + 0.01,
        "mixup, C = 8192": mixed_rows(number, 8192, seed=2, share=0.7),
        "mixup, C = 500": mixed_rows(number, 500, seed=2, share=0.7),
        "mixup with a small share": mixed_rows(number, 8192, seed=2, share=1 - 1e-4),
        "sharp softmax": sharp_rows(number, 2000, seed=3, sharpness=12.0),
        "positive mass 1e-6": near_disjoint_rows(number, 1e-6 / number, seed=4).float(),
    }


TAUS = [0.005, 0.01, 0.02, 0.07, 0.5, 1.0, 10.0]


def is_slow(backend: str, tau: float) -> bool:
    """In Triton's interpreter 8192 classes take most of a minute, and kernels for labels know no temperature."""
    return backend == "triton" and tau != 0.07


NUMBER = 24


def test_the_label_regimes_reach_the_masses_they_claim():
    masses = {}
    for name, labels in label_regimes(NUMBER).items():
        if labels.dim() == 2:
            rows = torch.nn.functional.normalize(labels.double(), dim=1)
            masses[name] = (rows @ rows.T).fill_diagonal_(0).sum(1)
    assert 2e-7 < masses["positive mass 1e-6"].min() < 5e-6
    assert masses["sharp softmax"].min() < 1e-3
    assert 1e-5 < masses["mixup with a small share"][masses["mixup with a small share"] > 0].min() < 1e-3


@pytest.mark.parametrize("regime", list(label_regimes(2)))
@pytest.mark.parametrize("tau", TAUS)
def test_float32_loss_and_gradient_are_within_1e_5_of_float64(backend, small_tile, tau, regime):
    if is_slow(backend, tau) and label_regimes(2)[regime].shape[-1] > 2000:
        pytest.skip("the sums over labels are those of another temperature")
    features = random_features(NUMBER, 1, 32, seed=5).float()
    labels = label_regimes(NUMBER)[regime]
    options = {"labels": labels, "temperature": tau}
    ours, wanted = leaf(features), leaf(features.double())
    loss = gen_supcon_loss(ours, **options, backend=backend)
    expected = reference_loss(wanted, **options)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) <= 1e-5
    assert error(ours.grad, wanted.grad) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tau", TAUS)
def test_float32_views_and_teacher_are_within_1e_5_of_float64(backend, small_tile, tau, mode):
    features = random_features(NUMBER, 2, 32, seed=6).float()
    regimes = label_regimes(NUMBER)
    options = {
        "labels": regimes["mixup, C = 500" if backend == "triton" else "mixup, C = 8192"],
        "teacher_labels": regimes["one-hot" if backend == "triton" else "sharp softmax"],
        "temperature": tau,
        "contrast_mode": mode,
    }
    ours, wanted = leaf(features), leaf(features.double())
    loss = gen_supcon_loss(ours, **options, backend=backend)
    expected = reference_loss(wanted, **options)
    loss.backward()
    expected.backward()
    assert abs(loss.item() / expected.item() - 1) <= 1e-5
    assert error(ours.grad, wanted.grad) <= 1e-5


@pytest.mark.parametrize("tau", TAUS)
def test_float32_with_a_contrast_set_is_within_1e_5_of_float64(backend, small_tile, tau):
    features, contrast = (
        random_features(NUMBER, 1, 32, seed=7).float(),
        random_features(50, 1, 32, seed=8)[:, 0].float(),
    )
    labels, contrast_labels = sharp_rows(NUMBER, 100, 9, 4.0), sharp_rows(50, 100, 10, 4.0)
    leaves = []
    for function, extra, dtype in (
        (gen_supcon_loss, {"backend": backend}, torch.float32),
        (reference_loss, {}, torch.float64),
    ):
        x, k = leaf(features.to(dtype)), leaf(contrast.to(dtype))
        loss = function(x, labels, contrast_features=k, contrast_labels=contrast_labels, temperature=tau, **extra)
        loss.backward()
        leaves.append((loss.item(), x.grad, k.grad))
    (loss, x, k), (loss64, x64, k64) = leaves
    assert abs(loss / loss64 - 1) <= 1e-5
    assert error(x, x64) <= 1e-5
    assert error(k, k64) <= 1e-5


@pytest.mark.parametrize("tau", [0.02, 0.07, 1.0])
@pytest.mark.parametrize("name", ["labels", "temperature", "sample_weight", "teacher_labels"])
def test_float32_gradients_of_the_other_arguments_are_close_to_float64(backend, small_tile, name, tau):
    features = random_features(NUMBER, 2, 32, seed=11).float()
    tensors = {
        "labels": sharp_rows(NUMBER, 20, 12, 1.0),
        "temperature": torch.tensor(tau),
        "sample_weight": torch.rand(NUMBER, generator=generator(13)),
        "teacher_labels": sharp_rows(NUMBER, 20, 14, 1.0),
    }
    gradients = []
    for function, extra, dtype in (
        (gen_supcon_loss, {"backend": backend}, torch.float32),
        (reference_loss, {}, torch.float64),
    ):
        wanted = leaf(tensors[name].to(dtype))
        function(features.to(dtype), **{**tensors, name: wanted}, **extra).backward()
        assert wanted.grad.dtype == dtype
        gradients.append(wanted.grad)
    # these gradients are differences of losses: they lose digits that the losses have
    assert error(gradients[0], gradients[1]) <= 1e-4


@pytest.mark.parametrize("number", [700, 1025])
@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0])
def test_float32_gradient_across_real_tiles_is_within_1e_5_of_float64(number, tau):
    features = random_features(number, 1, 32, seed=15).float()
    labels = torch.arange(number) % 10
    ours, wanted = leaf(features), leaf(features.double())
    gen_supcon_loss(ours, labels, temperature=tau, backend="tiled").backward()
    reference_loss(wanted, labels, temperature=tau).backward()
    assert error(ours.grad, wanted.grad) <= 1e-5


@pytest.mark.parametrize(("rows", "width"), [(40, 20), (40, 200), (530, 20), (530, 300)])
@pytest.mark.parametrize("teacher", [False, True])
def test_both_sides_of_the_dense_logits_by_one_product_or_two(rows, width, teacher):
    features = random_features(rows, 1, width, seed=31)[:, 0]
    soft, teacher_labels = soft_rows(rows, C, seed=32), soft_rows(rows, C, seed=33) if teacher else None
    arguments = {"temperature": 0.1, "teacher_labels": teacher_labels}
    ours, exact = leaf(features), leaf(features)
    gen_supcon_loss(ours, soft, backend="dense", **arguments).backward()
    reference_loss(exact, soft, **arguments).backward()
    torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.not_on_triton("needs float64")
def test_the_upstream_gradient_reaches_every_anchor(backend, small_tile):
    # reduction="none" with a different upstream gradient per anchor, negative and zero among them
    features = random_features(NUMBER, 2, 8, seed=16)
    upstream = torch.randn(2 * NUMBER, generator=generator(17), dtype=torch.float64)
    upstream[::5] = 0
    labels = torch.arange(NUMBER) % 4
    ours, wanted = leaf(features), leaf(features)
    (gen_supcon_loss(ours, labels, reduction="none", backend=backend) * upstream).sum().backward()
    (reference_loss(wanted, labels, reduction="none") * upstream).sum().backward()
    assert error(ours.grad, wanted.grad) <= 1e-12


@pytest.mark.not_on_triton("needs float64")
def test_a_shared_encoder_output_collects_the_gradient_of_both_roles(backend, small_tile):
    # the same tensor as features and as contrast set (a CLIP tower fed with itself)
    rows = random_features(NUMBER, 1, 8, seed=18)[:, 0]
    ours, wanted = leaf(rows), leaf(rows)
    gen_supcon_loss(ours, contrast_features=ours, backend=backend).backward()
    reference_loss(wanted, contrast_features=wanted).backward()
    assert error(ours.grad, wanted.grad) <= 1e-10


@pytest.mark.not_on_triton("needs float64")
def test_only_the_tensors_that_ask_for_a_gradient_get_one(backend, small_tile):
    features, contrast = random_features(N, 1, D, seed=19), leaf(random_features(N, 1, D, seed=20)[:, 0])
    gen_supcon_loss(features, contrast_features=contrast, backend=backend).backward()
    assert features.grad is None
    wanted = leaf(contrast.detach())
    reference_loss(features, contrast_features=wanted).backward()
    assert error(contrast.grad, wanted.grad) <= 1e-10


# --- half precision and autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tau", [0.01, 0.02, 0.07, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_lose_nothing_but_their_own_rounding(backend, small_tile, dtype, tau, mode):
    features = random_features(NUMBER, 2, 32, seed=21).to(dtype)
    labels = torch.arange(NUMBER) % 5
    options = {"labels": labels, "temperature": tau, "contrast_mode": mode}
    ours, wanted = leaf(features), leaf(features.double())
    loss = gen_supcon_loss(ours, **options, backend=backend)
    expected = reference_loss(wanted, **options)
    assert loss.dtype == torch.float32
    rounding = rounding_of_half(backend, dtype, tau)
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item() + rounding * tau / 0.07  # else it is float32
    loss.backward()
    expected.backward()
    # the gradient comes back in the input's type: half a unit in its last place, once
    assert error(ours.grad, wanted.grad) <= torch.finfo(dtype).eps + rounding


def test_an_isolated_anchor_in_float16_is_finite(backend, small_tile):
    # all others at cosine -1: float16 codes return NaN here at the default temperature
    features = torch.cat([torch.ones(1, 8), -torch.ones(7, 8)]).half()
    options = {"labels": torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]), "temperature": 0.07, "reduction": "none"}
    loss = gen_supcon_loss(features, **options, backend=backend)
    wanted = torch.from_numpy(oracle_loss(to_numpy(features), **to_numpy(options)))
    rounding = rounding_of_half(backend, features.dtype, 0.07)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5 + rounding)


@pytest.mark.parametrize("where", ["forward", "forward and backward"])
@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("labels", ["hard", "soft", "similarity", "teacher", "contrast set"])
def test_autocast_changes_neither_value_nor_gradient(backend, small_tile, labels, amp_dtype, where):
    features = random_features(NUMBER, 2, 32, seed=22).float()
    options = {
        "hard": {"labels": torch.arange(NUMBER) % 5},
        "soft": {"labels": sharp_rows(NUMBER, 50, 23, 3.0)},
        "similarity": {"label_similarity": torch.rand(NUMBER, NUMBER, generator=generator(24))},
        "teacher": {"labels": torch.arange(NUMBER) % 5, "teacher_labels": sharp_rows(NUMBER, 50, 23, 3.0)},
        "contrast set": {
            "labels": sharp_rows(NUMBER, 50, 23, 3.0),
            "contrast_features": random_features(30, 1, 32, seed=25)[:, 0].float(),
            "contrast_labels": sharp_rows(30, 50, 26, 3.0),
        },
    }[labels]
    plain, mixed = leaf(features), leaf(features)
    expected = gen_supcon_loss(plain, **options, backend=backend)
    expected.backward()
    with torch.autocast("cpu", dtype=amp_dtype):
        loss = gen_supcon_loss(mixed, **options, backend=backend)
        inside = contextlib.nullcontext() if where == "forward and backward" else torch.autocast("cpu", enabled=False)
        with inside:
            loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) <= 1e-6
    assert error(mixed.grad, plain.grad.double()) <= 1e-6


def test_autocast_features_enter_at_their_own_precision(backend, small_tile):
    # the encoder's output is bf16 under autocast: the loss is the one of those rounded rows
    weight = torch.randn(32, 16, generator=generator(27))
    inputs = random_features(NUMBER, 1, 32, seed=28)[:, 0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = inputs @ weight
        assert features.dtype == torch.bfloat16
        loss = gen_supcon_loss(features, torch.arange(NUMBER) % 5, backend=backend)
    expected = reference_loss(features, torch.arange(NUMBER) % 5)
    assert loss.dtype == torch.float32
    rounding = rounding_of_half(backend, features.dtype, 0.07)
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item() + rounding


def test_a_scaled_loss_gives_a_scaled_gradient(backend, small_tile):
    # GradScaler multiplies by 65536: nothing may overflow on the way back in float32
    features = random_features(NUMBER, 2, 32, seed=29).float()
    labels = torch.arange(NUMBER) % 5
    plain, scaled = leaf(features), leaf(features)
    gen_supcon_loss(plain, labels, backend=backend).backward()
    (gen_supcon_loss(scaled, labels, backend=backend) * 65536.0).backward()
    torch.testing.assert_close(scaled.grad / 65536.0, plain.grad, rtol=1e-5, atol=1e-8)


# --- rows of zeros, twice differentiated ---------------------------------------------------------------------------


def unit_or_zeros(rows: torch.Tensor) -> torch.Tensor:
    """The convention: a row of zeros has the derivatives of a row whose length is a constant, one."""
    zeros = (rows == 0).all(1, keepdim=True)
    return torch.where(zeros, rows, rows / torch.where(zeros, 1.0, rows).norm(dim=1, keepdim=True))


def penalised(loss, *leaves):
    """What a gradient penalty differentiates, and its gradient."""
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    return penalty, *gradients, *torch.autograd.grad(penalty, leaves)


@pytest.mark.parametrize("labels", ["none", "hard", "soft"])
def test_a_gradient_penalty_is_finite_behind_a_dead_relu(labels):
    a, b = random_features(N, 2, D, seed=30).unbind(1)
    a = torch.cat([torch.zeros(1, D, dtype=a.dtype), a[1:]])  # the unit row of sample 0 is dead in view 0
    chosen = {"none": None, "hard": HARD, "soft": soft_rows(N, C, seed=31)}[labels]
    options = {"temperature": 0.3, "base_temperature": None}
    ours, wanted = leaf(a), leaf(a)
    found = penalised(gen_supcon_loss([ours, b], chosen, backend="dense", **options), ours)
    rows = torch.cat([unit_or_zeros(wanted), unit_or_zeros(b)])
    y = torch.arange(N) if chosen is None else chosen
    y = torch.cat([y, y])
    w = (y[:, None] == y).double() if y.dim() == 1 else unit_or_zeros(y) @ unit_or_zeros(y).T
    itself = torch.eye(2 * N, dtype=torch.bool)
    w = w.masked_fill(itself, 0)
    log_q = (rows @ rows.T / 0.3).masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
    exact = penalised((-(w * log_q).sum(1) / (w.sum(1) + 1e-8)).mean(), wanted)
    for value, reference in zip(found, exact, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-12)


def test_a_gradient_penalty_is_finite_for_a_label_row_of_zeros():
    x, y = random_features(N, 1, D, seed=32)[:, 0], soft_rows(N, C, seed=33)
    y[2] = 0
    leaves = [leaf(x), leaf(y)]
    others = torch.arange(N) != 2
    # the loss of the unlabelled row itself, 0 / 1e-8, has enormous derivatives of the labels: leave it out
    options = {"temperature": 0.3, "base_temperature": None, "reduction": "none", "backend": "dense"}
    losses = gen_supcon_loss(leaves[0], [leaves[1]], **options)  # of as many classes as there are features
    found = penalised(losses[others].sum(), *leaves)
    copies = [leaf(x), leaf(y)]
    z, u = unit_or_zeros(copies[0]), unit_or_zeros(copies[1])
    itself = torch.eye(N, dtype=torch.bool)
    w = (u @ u.T).masked_fill(itself, 0)
    log_q = (z @ z.T / 0.3).masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
    exact = penalised((-(w * log_q).sum(1) / (w.sum(1) + 1e-8))[others].sum(), *copies)
    for value, reference in zip(found, exact, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [1e-30, 1e-19, 0.0])
def test_a_short_row_counts_as_zeros_in_both_derivatives(length):
    from genscl_loss._unit import unit_rows

    direction = torch.tensor([[0.6, 0.8]])
    x = (length * direction).requires_grad_()
    z = unit_rows(x)
    assert torch.equal(z, x)
    upstream = torch.tensor([[3.0, -1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(z, x, upstream, create_graph=True)
    torch.testing.assert_close(gradient, upstream, rtol=0, atol=1e-15)
    second = torch.autograd.grad(gradient.sum(), x, allow_unused=True)[0]
    assert second is None or second.abs().max() <= 1e-10


# --- several at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["hard", "soft", "none"])
def test_a_jacobian_is_taken_at_once_or_row_by_row(labels):
    x = leaf(random_features(6, 2, D, seed=40))
    chosen = {"hard": torch.arange(6) % 3, "soft": soft_rows(6, C, seed=41), "none": None}[labels]

    def losses(backend: str) -> torch.Tensor:
        return gen_supcon_loss(x, chosen, reduction="none", backend=backend)

    value = losses("dense")
    directions = torch.eye(len(value), dtype=value.dtype)
    (found,) = torch.autograd.grad(value, x, directions, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(value, x, one, retain_graph=True)[0] for one in directions]
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match='several gradients at a time .* need backend="dense"'):
        torch.autograd.grad(losses("tiled"), x, directions, is_grads_batched=True)


def test_every_argument_may_be_mapped_over():
    x, soft = torch.randn(3, 12, 8), torch.rand(3, 12, 5).softmax(2)
    found = torch.func.vmap(gen_supcon_loss)(x, soft)
    torch.testing.assert_close(found, torch.stack([gen_supcon_loss(a, b) for a, b in zip(x, soft, strict=True)]))
    classes, temperatures = torch.arange(12) % 4, torch.tensor([0.05, 0.1, 1.0])
    found = torch.func.vmap(lambda t: gen_supcon_loss(x[0], classes, temperature=t))(temperatures)
    wanted = [gen_supcon_loss(x[0], classes, temperature=float(t)) for t in temperatures]
    torch.testing.assert_close(found, torch.stack(wanted))
    criterion = GenSupConLoss(base_temperature=None, learnable_temperature=True)
    logs = {"log_temperature": temperatures.log()}
    found = torch.func.vmap(lambda p: torch.func.functional_call(criterion, p, (x[0], classes)))(logs)
    wanted = [gen_supcon_loss(x[0], classes, temperature=float(t), base_temperature=None) for t in temperatures]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in make_dual
@pytest.mark.parametrize("name", ["labels", "teacher_labels"])
def test_a_forward_derivative_of_labels_is_refused_where_there_is_none(name):
    """In linear memory labels without a gradient are constants: a tangent must not pass for that."""
    features, labels = torch.randn(6, 4), torch.rand(6, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(labels, torch.ones_like(labels))
        given = {"labels": labels, name: dual}
        with pytest.raises(RuntimeError, match='forward-mode differentiation of the loss needs backend="dense"'):
            gen_supcon_loss(features, backend="tiled", **given)
        loss = gen_supcon_loss(features, backend="dense", **given)
        assert torch.autograd.forward_ad.unpack_dual(loss).tangent is not None
