"""Values: every form of every argument against the oracle, on every backend, and the documented edge cases."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from grids import covering
from hypothesis import given
from oracle import oracle_loss
from strategies import (
    MODES,
    generator,
    near_disjoint_rows,
    problems,
    random_features,
    rounding_of_half,
    run_loss,
    set_problems,
    soft_rows,
    to_numpy,
    tolerance,
)
from torch_reference import reference_loss

import genscl_loss
from genscl_loss import gen_supcon_loss

N, V, D, C = 9, 2, 6, 4  # N is no multiple of the patched tile edge 4
HARD = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, -5])  # 3 and -5 are lone classes


def expect(actual, features, options, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    """Our value equals the oracle's for the same call."""
    wanted = oracle_loss(to_numpy(features), **to_numpy(options))
    if actual.dtype == torch.float32 and to_numpy(features)[0].dtype == np.float64:  # a backend that has no float64
        rtol, atol = max(rtol, 1e-5), max(atol, tolerance(options, torch.float32))
    np.testing.assert_allclose(actual.detach().numpy(), wanted, rtol=rtol, atol=atol)


# --- the two references agree: nothing below is worth more than this ---------------------------------------------


@given(problem=problems())
def test_the_torch_reference_equals_the_oracle(problem):
    wanted = oracle_loss(problem.features.numpy(), **to_numpy(problem.options))
    actual = reference_loss(problem.features, **problem.options)
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-9, atol=1e-12 / problem.options["temperature"])


@given(problem=set_problems())
def test_the_torch_reference_equals_the_oracle_on_a_contrast_set(problem):
    wanted = oracle_loss(problem.features.numpy(), **to_numpy(problem.options))
    actual = reference_loss(problem.features, **problem.options)
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-9, atol=1e-12 / problem.options["temperature"])


def test_the_oracle_gives_a_loss_worked_out_by_hand():
    # Three unit vectors in the plane, tau = 1, no factor; samples 0 and 1 are a class, sample 2 is alone.
    # s01 = 0, s02 = 1, s12 = 0: loss_0 = log(e^0 + e^1) - 0, loss_1 = log(2) - 0, loss_2 = 0.
    features = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    options = {"labels": np.array([0, 0, 1]), "temperature": 1.0, "base_temperature": None}
    by_hand = [math.log(1 + math.e), math.log(2), 0.0]
    np.testing.assert_allclose(oracle_loss(features, reduction="none", **options), by_hand, rtol=2e-8)
    np.testing.assert_allclose(oracle_loss(features, **options), sum(by_hand) / 3, rtol=2e-8)
    ignoring = oracle_loss(features, empty_anchors="ignore", **options)
    np.testing.assert_allclose(ignoring, sum(by_hand) / 2, rtol=2e-8)


# --- forms of features and labels ----------------------------------------------------------------------------------


def feature_forms() -> dict:
    features = random_features(N, V, D, seed=0)
    return {
        "N,D": features[:, 0],
        "N,V,D": features,
        "N,3,D": random_features(N, 3, D, seed=0),
        "N,V,2,3": features.reshape(N, V, 2, 3),
        "tuple of one": (features[:, 0],),
        "tuple": tuple(features.unbind(1)),
        "list of three": list(random_features(N, 3, D, seed=0).unbind(1)),
        "non-contiguous": features.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": features[:, :1].expand(N, V, D),
    }


def label_forms(views: int) -> dict:
    soft = soft_rows(N, C, seed=1)
    per_view = torch.stack([soft_rows(N, C, seed=v) for v in range(views)], dim=1)
    hard_views = torch.stack([HARD.roll(v) for v in range(views)], dim=1)
    zero_rows = soft.clone()
    zero_rows[2] = zero_rows[5] = 0
    forms = {
        "int64": HARD,
        "int32": HARD.int(),
        "int8": HARD.to(torch.int8),
        "uint8": HARD.abs().to(torch.uint8),
        "bool": HARD > 0,
        "float": HARD.double() + 0.5,
        "views of ints": list(hard_views.unbind(1)),
        "N,C": soft,
        "N,C float32": soft.float(),
        "N,C int": torch.eye(C, dtype=torch.int64)[HARD.clamp_min(0)],
        "N,C bool": torch.eye(C, dtype=torch.bool)[HARD.clamp_min(0)],
        "scaled rows": soft * torch.arange(1, N + 1, dtype=torch.float64)[:, None],
        "zero rows": zero_rows,
        "all zero": torch.zeros(N, C, dtype=torch.float64),
        "multi-hot": torch.rand(N, C, generator=generator(3)) < 0.4,
        "near-disjoint": near_disjoint_rows(N, 1e-6, seed=4),
        "N,V,C": per_view,
        "tuple of N,C": tuple(per_view.unbind(1)),
    }
    if views > 1:
        forms["none"] = None
    return forms


FEW = pytest.mark.not_on_triton("about labels, which no kernel sees")  # but a few
FORMS = {
    (name, label_name, mode): (features, labels, mode)
    for name, features in feature_forms().items()
    for views in [1 if "N,D" in name or "one" in name else 3 if "3,D" in name or "three" in name else 2]
    for label_name, labels in label_forms(views).items()
    for mode in MODES
    if not (mode == "one" and views == 1)
    # memory layouts say nothing about labels: a few label forms are enough for them
    and (name not in ("N,V,2,3", "non-contiguous", "expanded") or label_name in ("int64", "N,C", "N,V,C"))
}
QUICK = covering([dict(enumerate(names)) for names in FORMS])
FORMS = [
    pytest.param(
        *arguments,
        id=f"features {name} - labels {label_name} - {mode}",
        marks=[
            *([] if label_name in ("int64", "N,V,C", "near-disjoint", "none") else [FEW]),
            *([] if number in QUICK else [pytest.mark.exhaustive]),
        ],
    )
    for number, ((name, label_name, mode), arguments) in enumerate(FORMS.items())
]


@pytest.mark.parametrize(("features", "labels", "mode"), FORMS)
def test_every_form_of_features_and_labels_gives_the_oracle_value(backend, small_tile, features, labels, mode):
    options = {"labels": labels, "contrast_mode": mode, "reduction": "none", "temperature": 0.1}
    actual = run_loss(features, **options, backend=backend)
    assert actual.dtype == (torch.float32 if backend == "triton" else torch.float64)
    # near-disjoint labels, W = 1e-6: the float64 label stage is good to 1e-16 / W
    expect(actual, features, options, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("empty_anchors", ["zero", "ignore"])
@pytest.mark.parametrize("weights", [None, "N", "N,V", "some zero", "all zero"])
@pytest.mark.parametrize("mode", MODES)
def test_reductions_weights_and_empty_anchors(backend, small_tile, mode, weights, empty_anchors, reduction):
    features = random_features(N, 3, D, seed=2)
    weight = torch.rand(N, 3, generator=generator(3), dtype=torch.float64)
    sample_weight = {
        None: None,
        "N": weight[:, 0],
        "N,V": weight,
        "some zero": weight * (weight > 0.5),
        "all zero": weight * 0,
    }[weights]
    labels = [HARD, HARD.roll(1), HARD.roll(2) + 20]  # view 2 shares no class with the others: empties in "one", too
    options = {
        "labels": labels,
        "contrast_mode": mode,
        "sample_weight": sample_weight,
        "empty_anchors": empty_anchors,
        "reduction": reduction,
    }
    actual = run_loss(features, **options, backend=backend)
    assert actual.shape == ((3 * N if mode == "all" else N,) if reduction == "none" else ())
    expect(actual, features, options)


@pytest.mark.not_on_triton("needs float64")
def test_the_two_policies_differ_by_exactly_the_share_of_empty_anchors(backend):
    features = random_features(N, 1, D, seed=2)
    zero = run_loss(features, HARD, backend=backend)
    ignore = run_loss(features, HARD, empty_anchors="ignore", backend=backend)
    assert ignore.item() == pytest.approx(zero.item() * N / (N - 2), rel=1e-12)  # two lone classes in HARD


@pytest.mark.parametrize("kind", ["similarity", "soft"])
def test_an_anchor_is_empty_up_to_a_positive_mass_of_1e_8(backend, small_tile, kind):
    # rounding and traces of a class must not count as positives; 5e-9 is out, 5e-8 is in
    features = random_features(N, 1, D, seed=3)
    if kind == "similarity":
        similarity = torch.full((N, N), 5e-9 / (N - 1), dtype=torch.float64)
        similarity[4:] *= 10
        options = {"label_similarity": similarity}
    else:  # pairs 2k and 2k + 1 with a cosine of 5e-9 and 5e-8, and a lone sample
        labels = torch.eye(N, dtype=torch.float64)
        labels[1, 0], labels[3, 2], labels[5, 4], labels[7, 6] = 5e-9, 5e-9, 5e-8, 5e-8
        options = {"labels": labels}
    each = run_loss(features, **options, reduction="none", backend=backend)
    mean = run_loss(features, **options, empty_anchors="ignore", backend=backend)
    full = slice(4, N) if kind == "similarity" else slice(4, 8)
    torch.testing.assert_close(mean, each[full].mean(), rtol=1e-10, atol=0)
    expect(mean, features, {**options, "empty_anchors": "ignore"}, rtol=1e-6)


@pytest.mark.parametrize("empty_anchors", ["zero", "ignore"])
def test_each_term_decides_about_its_own_empty_anchors(backend, empty_anchors):
    features = random_features(N, 1, D, seed=4)
    teacher = soft_rows(N, C, seed=5)
    teacher[:4] = 0
    options = {"labels": HARD, "teacher_labels": teacher, "teacher_weight": 0.3, "empty_anchors": empty_anchors}
    expect(run_loss(features, **options, backend=backend), features, options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labels", ["none", "ints", "soft", "per view"])
@pytest.mark.parametrize("teacher", ["N,C", "N,V,C", "tuple", "other class count"])
def test_teacher_labels_in_every_form(backend, small_tile, mode, labels, teacher):
    features = random_features(N, V, D, seed=6)
    per_view = torch.stack([soft_rows(N, C, seed=v) for v in range(V)], dim=1)
    own = {"none": None, "ints": HARD, "soft": per_view[:, 0], "per view": per_view}[labels]
    teacher_labels = {
        "N,C": soft_rows(N, C, seed=9),
        "N,V,C": per_view.flip(0),
        "tuple": tuple(per_view.flip(0).unbind(1)),
        "other class count": soft_rows(N, C + 3, seed=9),
    }[teacher]
    for reduction in ("mean", "sum", "none"):
        options = {
            "labels": own,
            "contrast_mode": mode,
            "teacher_labels": teacher_labels,
            "teacher_weight": 2.5,
            "reduction": reduction,
            "sample_weight": torch.linspace(0, 2, N, dtype=torch.float64),
        }
        expect(run_loss(features, **options, backend=backend), features, options)


# --- label_similarity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("form", ["N,N", "anchors,contrasts"])
def test_label_similarity_may_be_asymmetric_and_is_tiled_over_views(backend, small_tile, mode, views, form):
    if mode == "one" and views == 1:
        pytest.skip("mode 'one' needs a second view")
    features = random_features(N, views, D, seed=7)
    rows = N if form == "N,N" or mode != "all" else N * views
    columns = N if form == "N,N" or mode == "one" else N * views
    similarity = torch.rand(rows, columns, generator=generator(8), dtype=torch.float64)
    similarity = similarity * (similarity > 0.4)
    similarity[3] = 0  # an anchor without positives
    options = {"label_similarity": similarity, "contrast_mode": mode, "reduction": "none"}
    expect(run_loss(features, **options, backend=backend), features, options)


def test_the_self_column_of_label_similarity_is_ignored(backend, small_tile):
    features = random_features(N, 1, D, seed=7)
    similarity = torch.rand(N, N, generator=generator(8), dtype=torch.float64)
    other = similarity.clone().fill_diagonal_(1e6)
    value = run_loss(features, label_similarity=similarity, backend=backend)
    # 1e6 * 1e-16 = 1e-10 would still pass if the self column were subtracted in float64; it may not cost more
    assert run_loss(features, label_similarity=other, backend=backend).item() == pytest.approx(value.item())


@pytest.mark.not_on_triton("needs float64")
def test_sharp_label_vectors_in_float64_keep_the_digits_of_float64(backend):
    """The cosines are 1e-7 of the self term: taken away from a sum with it, they would have nine digits."""
    features = random_features(40, 1, D, seed=43)
    labels = near_disjoint_rows(40, 1e-7, seed=44)
    options = {"labels": labels, "reduction": "none"}
    expect(run_loss(features, **options, backend=backend), features, options, rtol=1e-12, atol=0)


def test_a_float32_label_similarity_with_a_small_positive_mass_keeps_its_precision(backend, small_tile):
    features = random_features(N, 1, D, seed=7)
    similarity = torch.rand(N, N, generator=generator(8)) * 1e-6
    similarity.fill_diagonal_(1.0)  # a cosine matrix has ones there: subtracting them in float32 would leave 1e-2
    options = {"label_similarity": similarity, "reduction": "none"}
    expect(run_loss(features, **options, backend=backend), features, options, rtol=1e-6, atol=1e-6)


# --- a separate contrast set ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 9, 17])
@pytest.mark.parametrize("kind", ["hard", "soft", "similarity N,M", "similarity anchors,M"])
def test_a_contrast_set_of_any_size_excludes_nothing(backend, small_tile, kind, size, views, mode):
    features = random_features(N, views, D, seed=10)
    contrast = random_features(size, 1, D, seed=11)[:, 0]
    contrast[: min(size, 2)] = features[: min(size, 2), 0]  # rows equal to an anchor stay contrasts
    options = {"contrast_features": contrast, "contrast_mode": mode, "reduction": "none"}
    if kind == "hard":
        options |= {"labels": HARD, "contrast_labels": torch.arange(size) % 4}
    elif kind == "soft":
        options |= {"labels": soft_rows(N, C, seed=1), "contrast_labels": soft_rows(size, C, seed=2)}
    else:
        rows = N * views if kind == "similarity anchors,M" and mode == "all" else N
        options["label_similarity"] = torch.rand(rows, size, generator=generator(3), dtype=torch.float64)
    actual = run_loss(features, **options, backend=backend)
    assert actual.shape == (N * views if mode == "all" else N,)
    if size == 0:
        assert torch.equal(actual, torch.zeros_like(actual))
    expect(actual, features, options)


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("views", [1, 3])
def test_without_labels_row_n_of_the_contrast_set_is_the_positive_of_sample_n(backend, small_tile, mode, views):
    images, texts = random_features(N, views, D, seed=12), random_features(N, 1, D, seed=13)[:, 0]
    options = {"contrast_features": texts, "contrast_mode": mode, "base_temperature": None, "reduction": "none"}
    actual = run_loss(images, **options, backend=backend)
    expect(actual, images, options)
    # InfoNCE is a cross entropy over the rows of the contrast set
    queries = torch.nn.functional.normalize(torch.cat(images.unbind(1))[: len(actual)], dim=1)
    logits = queries @ torch.nn.functional.normalize(texts, dim=1).T / 0.07
    target = torch.arange(N).repeat(len(actual) // N)
    wanted = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-7)  # ours has W / (W + 1e-8) with W = 1


def test_labels_per_view_meet_the_contrast_set(backend, small_tile):
    features, contrast = random_features(N, V, D, seed=14), random_features(5, 1, D, seed=15)[:, 0]
    soft = torch.stack([soft_rows(N, C, seed=v) for v in range(V)], dim=1)
    options = {
        "labels": soft,
        "contrast_features": contrast,
        "contrast_labels": soft_rows(5, C, seed=3),
        "teacher_labels": soft.flip(1),
        "contrast_teacher_labels": soft_rows(5, C, seed=4),
        "teacher_weight": 0.5,
        "sample_weight": torch.rand(N, V, generator=generator(1), dtype=torch.float64),
    }
    expect(run_loss(features, **options, backend=backend), features, options)
    options["labels"] = [HARD, HARD.roll(1)]
    options["contrast_labels"] = HARD[:5]
    expect(run_loss(features, **options, backend=backend), features, options)


def test_a_teacher_beside_label_similarity_and_a_contrast_set(backend, small_tile):
    features, contrast = random_features(N, V, D, seed=14), random_features(5, 1, D, seed=15)[:, 0]
    options = {
        "label_similarity": torch.rand(N, 5, generator=generator(1), dtype=torch.float64),
        "contrast_features": contrast,
        "teacher_labels": soft_rows(N, C, seed=3),
        "contrast_teacher_labels": soft_rows(5, C, seed=4),
    }
    expect(run_loss(features, **options, backend=backend), features, options)


# --- whatever hypothesis can think of ------------------------------------------------------------------------------


@given(problem=problems())
def test_any_valid_call_gives_the_oracle_value(backend, problem):
    with patch("genscl_loss._backends.tiled.TILE", problem.tile):
        actual = run_loss(problem.features, **problem.options, backend=backend)
    wanted = oracle_loss(problem.features.numpy(), **to_numpy(problem.options))
    scale = problem.number * problem.views if problem.options["reduction"] == "sum" else 1
    scale *= 1 + problem.options.get("teacher_weight", 0)
    atol = scale * tolerance(problem.options, actual.dtype)
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-9, atol=atol)


@given(problem=set_problems())
def test_any_valid_call_with_a_contrast_set_gives_the_oracle_value(backend, problem):
    with patch("genscl_loss._backends.tiled.TILE", problem.tile):
        actual = run_loss(problem.features, **problem.options, backend=backend)
    wanted = oracle_loss(problem.features.numpy(), **to_numpy(problem.options))
    scale = problem.number * problem.views if problem.options["reduction"] == "sum" else 1
    atol = scale * tolerance(problem.options, actual.dtype)
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("step", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_around_the_real_tile_edge(step, dtype):
    from genscl_loss._backends.tiled import TILE

    number = TILE + step
    features = random_features(number, 1, 8, seed=16).to(dtype)
    labels = torch.arange(number) % 10
    actual = gen_supcon_loss(features, labels, reduction="none", backend="tiled")
    wanted = reference_loss(features, labels, reduction="none")
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 600, 1100])
def test_a_contrast_set_across_real_tile_edges(size):
    features, contrast = random_features(520, 1, 8, seed=17), random_features(size, 1, 8, seed=18)[:, 0]
    options = {
        "labels": torch.arange(520) % 10,
        "contrast_features": contrast,
        "contrast_labels": torch.arange(size) % 10,
        "reduction": "none",
    }
    actual = gen_supcon_loss(features, **options, backend="tiled")
    torch.testing.assert_close(actual, reference_loss(features, **options), rtol=1e-10, atol=1e-10)


# --- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([2**62, 2**62 + 1, 2**62, 2**62 + 1]),  # equal in float32 and in float64, different as integers
        torch.tensor([2**24, 2**24 + 1, 2**24, 2**24 + 1], dtype=torch.int32),  # equal in float32
        torch.tensor([-(2**63), 2**63 - 1, -(2**63), 2**63 - 1]),
        torch.tensor([1.0, 1.0 + 2**-52, 1.0, 1.0 + 2**-52], dtype=torch.float64),
        torch.tensor([-1, -100, -1, -100]),
        torch.tensor([False, True, False, True]),
    ],
    ids=["int64", "int32", "extremes", "float64", "negative", "bool"],
)
def test_one_dimensional_labels_compare_by_equality_at_full_precision(backend, labels):
    features = random_features(4, 1, D, seed=19).float()
    wanted = run_loss(features, torch.tensor([0, 1, 0, 1]), backend=backend)
    assert torch.equal(run_loss(features, labels, backend=backend), wanted)


@pytest.mark.not_on_triton("needs float64")
def test_no_labels_two_views_is_nt_xent(backend, small_tile):
    features = random_features(N, 2, D, seed=20)
    z = torch.nn.functional.normalize(torch.cat(features.unbind(1)), dim=1)
    logits = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
    wanted = torch.nn.functional.cross_entropy(logits, torch.arange(2 * N).roll(N))
    actual = run_loss(features, temperature=0.5, base_temperature=None, backend=backend)
    torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=0)  # W / (W + 1e-8), W = 1


def test_a_zero_label_row_is_unlabelled_and_a_negative_for_all_others(backend, small_tile):
    features = random_features(N, 1, D, seed=21).requires_grad_()
    labels = torch.eye(C, dtype=torch.float64)[HARD.clamp_min(0)]
    labels[4] = 0
    loss = run_loss(features, labels, reduction="none", backend=backend)
    assert loss[4].item() == 0
    expect(loss, features, {"labels": labels, "reduction": "none"})
    loss.sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad[4].abs().max() > 0  # it is still pushed away by the others


@pytest.mark.not_on_triton("needs float64")
def test_float64_inputs_are_not_truncated_to_float32(backend):
    features, labels = random_features(N, 1, D, seed=22), soft_rows(N, C, seed=23)
    options = {"labels": labels}
    expect(run_loss(features, **options, backend=backend), features, options, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("place", ["labels", "teacher_labels", "contrast_labels"])
def test_the_dtype_of_multi_hot_labels_costs_no_precision(backend, place, dtype):
    # zeros and ones are exact in every dtype; their unit rows (1 / sqrt(2), 1 / sqrt(3)) must be made in float64
    features, contrast = random_features(N, 1, D, seed=22), random_features(5, 1, D, seed=23)[:, 0]
    rows = (torch.rand(N, 6, generator=generator(24)) < 0.6).to(dtype)
    options = {
        "labels": {"labels": rows},
        "teacher_labels": {"labels": HARD, "teacher_labels": rows},
        "contrast_labels": {"labels": rows, "contrast_features": contrast, "contrast_labels": rows[:5]},
    }[place]
    expect(run_loss(features, **options, backend=backend), features, options, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16])
def test_one_dimensional_labels_of_rare_dtypes(backend, dtype):
    features = random_features(N, 1, D, seed=25)
    labels = HARD.abs()
    wanted = run_loss(features, labels, backend=backend)
    assert torch.equal(run_loss(features, labels.to(dtype), backend=backend), wanted)


# --- edge cases of the contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "options"),
    [
        (torch.ones(1, 3), {"labels": torch.tensor([0])}),
        (torch.ones(1, 1, 3), {"labels": torch.tensor([0])}),
        (torch.ones(1, 3), {"labels": torch.tensor([[0.2, 0.8]])}),
        (torch.ones(1, 3), {"label_similarity": torch.ones(1, 1)}),
        (torch.ones(1, 3), {"labels": torch.tensor([0]), "empty_anchors": "ignore"}),
        (torch.ones(1, 3), {"labels": torch.tensor([0]), "contrast_mode": "first"}),
        (torch.ones(1, 3), {"labels": torch.tensor([[0.2, 0.8]]), "teacher_labels": torch.tensor([[0.2, 0.8]])}),
        (
            torch.ones(2, 3),
            {
                "labels": torch.tensor([0, 1]),
                "contrast_features": torch.ones(0, 3),
                "contrast_labels": torch.ones(0, dtype=torch.long),
            },
        ),
        (
            torch.ones(2, 2, 3),
            {"labels": torch.ones(2, 4), "contrast_features": torch.ones(0, 3), "contrast_labels": torch.ones(0, 4)},
        ),
        (torch.ones(2, 3), {"contrast_features": torch.ones(0, 3), "label_similarity": torch.ones(2, 0)}),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_contrast_left_gives_zero_with_a_zero_gradient(backend, features, options, reduction):
    features = features.clone().requires_grad_()
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = run_loss(features, **options, temperature=temperature, reduction=reduction, backend=backend)
    assert torch.equal(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))
    assert temperature.grad is None or temperature.grad.item() == 0


@pytest.mark.parametrize("mode", MODES)
def test_one_sample_with_two_views_has_one_contrast_and_no_loss(backend, mode):
    # the only contrast is the positive: softmax over one entry is 1, its log 0
    features = random_features(1, 2, D, seed=24).requires_grad_()
    loss = run_loss(features, contrast_mode=mode, backend=backend)
    loss.backward()
    assert abs(loss.item()) < 1e-6  # lse * W / (W + 1e-8) - s leaves 1e-8 * |s|
    assert features.grad.abs().max() < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_feature_row_has_similarity_zero_and_a_finite_gradient(backend, small_tile, dtype, mode):
    features = random_features(N, V, D, seed=25).to(dtype)
    features[3] = 0
    features.requires_grad_()
    options = {"labels": HARD, "contrast_mode": mode, "reduction": "none"}
    loss = run_loss(features, **options, backend=backend)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    expect(loss, features, options, rtol=rtol, atol=10 * rtol + rounding_of_half(backend, dtype, 0.07))
    loss.sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_equal_features_give_the_collapsed_loss(backend, scale):
    # zero rows count as equal features, too: every similarity is 0
    features = torch.ones(16, 2, D) * scale
    loss = run_loss(features, torch.arange(16) % 4, temperature=0.1, backend=backend)
    assert loss.item() == pytest.approx(math.log(31) * 0.1 / 0.07, rel=1e-5)
    assert genscl_loss.collapsed_loss(31, 0.1) == pytest.approx(math.log(31) * 0.1 / 0.07, rel=1e-12)
    assert genscl_loss.collapsed_loss(31, torch.tensor(0.5, requires_grad=True), 0.25) == 2 * math.log(31)
    assert genscl_loss.collapsed_loss(31, 0.1, None) == pytest.approx(math.log(31), rel=1e-12)


def test_one_class_batches_have_a_loss(backend, small_tile):
    # every pair is a positive: pytorch-metric-learning returns 0 here because nothing is a negative
    features = random_features(N, 1, D, seed=26)
    options = {"labels": torch.zeros(N, dtype=torch.long), "reduction": "none"}
    loss = run_loss(features, **options, backend=backend)
    assert (loss > 0).all()
    expect(loss, features, options)


def test_no_positive_anywhere_gives_zero_and_a_zero_gradient(backend, small_tile):
    features = random_features(N, 1, D, seed=27).requires_grad_()
    for policy in ("zero", "ignore"):
        loss = run_loss(features, torch.arange(N), empty_anchors=policy, backend=backend)
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1e9, 1e15])
def test_normalisation_survives_very_long_and_very_short_rows(backend, scale):
    features = random_features(N, 1, D, seed=28).float()
    wanted = run_loss(features, HARD, backend=backend)
    actual = run_loss(features * scale, HARD, backend=backend)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [1e25, 3e38])
def test_a_length_that_float32_cannot_hold_is_never_taken_for_zero(backend, value):
    # divided by an infinite length the row would be zeros, and the loss finite and wrong
    features = random_features(N, 1, D, seed=28).float()
    right = run_loss(features, HARD, backend=backend).item()
    features[0] = features[0] / features[0].abs().max() * value
    loss = run_loss(features, HARD, backend=backend).item()
    assert not math.isfinite(loss) or loss == pytest.approx(right, rel=1e-5)


def test_normalize_is_idempotent(backend):
    features = torch.nn.functional.normalize(random_features(N, 1, D, seed=28), dim=-1)
    raw = run_loss(features, HARD, normalize=False, backend=backend)
    torch.testing.assert_close(run_loss(features, HARD, backend=backend), raw, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_are_not_normalised_do_not_overflow(backend, small_tile, scale, dtype):
    features = (random_features(N, V, D, seed=29) * scale).to(dtype)
    options = {"labels": HARD, "normalize": False, "reduction": "none"}
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    loss = run_loss(features, **options, backend=backend)
    # s reaches |z|^2 / tau; the loss may be a difference of two such numbers
    largest = float(features.double().pow(2).sum(-1).max()) / 0.07
    expect(loss, features, options, rtol=rtol, atol=rtol * largest)


@pytest.mark.not_on_triton("needs float64")
@pytest.mark.parametrize(
    ("features_dtype", "labels_dtype", "result"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.int64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float64, torch.int64, torch.float64),
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_result_is_float32_and_float64_only_for_float64_features(
    backend, features_dtype, labels_dtype, result, reduction
):
    features = random_features(N, 1, D, seed=30).to(features_dtype).requires_grad_()
    labels = soft_rows(N, C, seed=31).mul(10).clamp(max=1).to(labels_dtype)  # integers are multi-hot
    loss = run_loss(features, labels, reduction=reduction, backend=backend)
    assert loss.dtype == result
    loss.sum().backward()
    assert features.grad.dtype == features_dtype


def test_inputs_are_left_as_they_were(backend, small_tile):
    tensors = {
        "features": random_features(N, V, D, seed=32),
        "labels": soft_rows(N, C, seed=33) * 3,
        "teacher_labels": soft_rows(N, C, seed=34) * 3,
        "sample_weight": torch.rand(N, generator=generator(35), dtype=torch.float64),
        "contrast_features": random_features(5, 1, D, seed=36)[:, 0],
        "contrast_labels": soft_rows(5, C, seed=37),
        "contrast_teacher_labels": soft_rows(5, C, seed=38),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["features"].requires_grad_()
    run_loss(**tensors, backend=backend).backward()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
    similarity = torch.rand(V * N, V * N, generator=generator(39), dtype=tensors["features"].dtype)
    given = similarity.clone()
    run_loss(tensors["features"], label_similarity=given, backend=backend)
    assert torch.equal(given, similarity)  # with its diagonal, which plays no part


def test_a_tuple_of_views_equals_the_stacked_tensor_bit_for_bit(backend, small_tile):
    features = random_features(N, 3, D, seed=39).float()
    stacked = run_loss(features, HARD, reduction="none", backend=backend)
    assert torch.equal(run_loss(features.unbind(1), HARD, reduction="none", backend=backend), stacked)


def test_calls_are_bitwise_reproducible(backend, small_tile):
    features = random_features(N, V, D, seed=40).float().requires_grad_()
    results = []
    for _ in range(3):
        loss = run_loss(features, soft_rows(N, C, seed=1).float(), backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss, features)[0]))
    assert all(torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1]) for loss, grad in results)


def test_no_state_is_kept_between_batches(backend):
    # a well-known loss caches its label mask and reuses it for the next batch of the same size
    features = random_features(N, 1, D, seed=41)
    run_loss(features, HARD, backend=backend)
    options = {"labels": HARD.roll(4)}
    expect(run_loss(features, **options, backend=backend), features, options)


def test_without_any_gradient_the_loss_needs_none(backend):
    features = random_features(N, 1, D, seed=42)
    assert not run_loss(features, HARD, backend=backend).requires_grad
    with torch.no_grad():
        assert not run_loss(features.requires_grad_(), HARD, backend=backend).requires_grad
    with torch.inference_mode():
        run_loss(features, HARD, backend=backend)


def test_a_zero_dim_tensor_temperature_equals_the_float(backend):
    features = random_features(N, V, D, seed=43)
    wanted = run_loss(features, HARD, temperature=0.2, backend=backend)
    for dtype in (torch.float64, torch.float32):
        actual = run_loss(features, HARD, temperature=torch.tensor(0.2, dtype=dtype), backend=backend)
        torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=0)


def test_available_backends_names_what_works():
    names = genscl_loss.available_backends()
    assert {"dense", "tiled"} <= set(names)
    for name in names:
        assert run_loss(random_features(N, 1, D, seed=44), HARD, backend=name).isfinite()


def test_tolerances_of_mix_builders_are_accepted(backend):
    # soft rows from other libraries sum to one only up to rounding, may be half precision, and hold explicit zeros
    labels = torch.eye(C)[HARD.clamp_min(0)] * 0.7 + torch.eye(C)[HARD.clamp_min(0)].flip(0) * 0.3
    features = random_features(N, 1, D, seed=45).float()
    wanted = run_loss(features, labels, backend=backend)
    actual = run_loss(features, labels * (1 + 1e-6), backend=backend)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=0)
    actual = run_loss(features, labels.half(), backend=backend)
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=0)


def test_contrast_labels_in_float64_are_not_rounded(backend):
    """Vectors that float32 has no numbers for."""
    features, contrasts = random_features(3, 1, 4, seed=0)[:, 0].float(), random_features(2, 1, 4, seed=1)[:, 0].float()
    labels, options = torch.tensor([[1.0, 0.5]] * 3), {"contrast_features": contrasts, "backend": backend}
    large = 1e60 * torch.tensor([[1.0, 0.0], [0.2, 1.0]], dtype=torch.float64)
    found = gen_supcon_loss(features, labels, contrast_labels=large, **options)
    wanted = gen_supcon_loss(features, labels, contrast_labels=(large / 1e60).float(), **options)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
