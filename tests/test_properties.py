"""Properties that hold for every input: symmetries, equivalent ways to say the same thing, and no silent NaN."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Problem, generator, problems, run_loss, seeds, set_problems, soft_rows, tolerance
from torch import Tensor


def loss_of(problem: Problem, backend: str, features=None, **changes) -> Tensor:
    """Our loss for the problem, with tiles of the drawn size."""
    features = problem.features if features is None else features
    with patch("genscl_loss._backends.tiled.TILE", problem.tile):
        return run_loss(features, **problem.but(**changes), backend=backend)


def same(actual: Tensor, expected: Tensor, problem: Problem, dtype: torch.dtype = torch.float64) -> None:
    if torch.float32 in (actual.dtype, expected.dtype):
        dtype = torch.float32
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=1e-9, atol=tolerance(problem.options, dtype), equal_nan=False
    )


def permuted(labels, order: Tensor):
    return labels if labels is None else labels[order]


# --- symmetries ----------------------------------------------------------------------------------------------------


@given(problem=problems(extras=False), seed=seeds)
def test_permuting_the_samples_permutes_the_anchor_losses(backend, problem, seed):
    order = torch.randperm(problem.number, generator=generator(seed))
    labels = problem.options["labels"]
    before = loss_of(problem, backend, reduction="none").reshape(-1, problem.number)
    after = loss_of(problem, backend, problem.features[order], labels=permuted(labels, order), reduction="none")
    same(after.reshape(-1, problem.number), before[:, order], problem)


@given(problem=problems(extras=False), seed=seeds)
def test_rotating_all_features_changes_nothing(backend, problem, seed):
    dim = problem.features.shape[-1]
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator(seed), dtype=torch.float64))
    same(loss_of(problem, backend, problem.features @ rotation), loss_of(problem, backend), problem)


@given(problem=problems(modes=("all",), kinds=("none", "hard", "soft", "multihot"), extras=False), seed=seeds)
def test_with_all_views_as_anchors_the_order_of_views_does_not_matter(backend, problem, seed):
    order = torch.randperm(problem.views, generator=generator(seed))
    same(loss_of(problem, backend, problem.features[:, order]), loss_of(problem, backend), problem)


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@given(problem=problems(modes=("all",), kinds=("per_view",), extras=False), seed=seeds)
def test_views_may_change_order_together_with_their_labels(backend, problem, seed):
    order = torch.randperm(problem.views, generator=generator(seed))
    labels = problem.options["labels"][:, order]
    same(loss_of(problem, backend, problem.features[:, order], labels=labels), loss_of(problem, backend), problem)


@given(problem=problems(), seed=seeds)
def test_the_length_of_a_feature_row_does_not_matter(backend, problem, seed):
    scale = 10.0 ** (torch.rand(problem.number, problem.views, 1, generator=generator(seed)).double() * 12 - 6)
    actual, expected = loss_of(problem, backend, problem.features * scale), loss_of(problem, backend)
    spread = problem.number * problem.views * (1 + problem.options.get("teacher_weight", 0))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=spread * tolerance(problem.options))


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@given(problem=problems(kinds=("onehot", "soft", "per_view", "near_disjoint"), extras=False), seed=seeds)
def test_the_length_of_a_label_row_does_not_matter(backend, problem, seed):
    labels = problem.options["labels"]
    shape = labels.shape[:-1] + (1,)
    scale = 10.0 ** (torch.rand(shape, generator=generator(seed)).double() * 8 - 4)
    same(loss_of(problem, backend, labels=labels * scale), loss_of(problem, backend), problem)


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@given(problem=problems(extras=False))
def test_duplicating_a_tuple_into_a_tensor_changes_nothing(backend, problem):
    assert torch.equal(loss_of(problem, backend, tuple(problem.features.unbind(1))), loss_of(problem, backend))


# --- equivalent ways to say the same thing -------------------------------------------------------------------------


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@given(problem=problems(kinds=("hard",)))
def test_one_hot_rows_and_integers_are_the_same_labels(backend, problem):
    labels = problem.options["labels"]
    onehot = torch.eye(10, dtype=torch.float64)[labels + 2]
    spread = problem.number * problem.views
    actual, expected = loss_of(problem, backend, labels=onehot), loss_of(problem, backend)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=spread * tolerance(problem.options))


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@given(problem=problems(kinds=("none",)))
def test_no_labels_means_every_sample_is_its_own_class(backend, problem):
    with_numbers = loss_of(problem, backend, labels=torch.arange(problem.number))
    spread = problem.number * problem.views
    torch.testing.assert_close(
        with_numbers, loss_of(problem, backend), rtol=1e-9, atol=spread * tolerance(problem.options)
    )


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@given(problem=problems(kinds=("hard", "one_class", "lone")), offset=st.integers(-(2**40), 2**40))
def test_the_names_of_the_classes_do_not_matter(backend, problem, offset):
    labels = problem.options["labels"] * 3 + offset
    same_bits = loss_of(problem, backend, labels=labels)
    spread = problem.number * problem.views
    torch.testing.assert_close(
        same_bits, loss_of(problem, backend), rtol=1e-9, atol=spread * tolerance(problem.options)
    )


def cosine(left: Tensor, right: Tensor) -> Tensor:
    left, right = left.double(), right.double()
    lengths = left.norm(dim=-1)[:, None] * right.norm(dim=-1)[None, :]
    return torch.where(lengths > 0, left @ right.T / lengths.clamp_min(1e-300), 0.0)


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@given(problem=problems(kinds=("onehot", "soft", "multihot", "near_disjoint"), extras=False))
def test_label_similarity_set_to_the_cosine_of_the_labels_equals_the_labels(backend, problem):
    similarity = cosine(problem.options["labels"], problem.options["labels"])
    actual = loss_of(problem, backend, labels=None, label_similarity=similarity)
    same(actual, loss_of(problem, backend), problem)


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@given(problem=problems(kinds=("per_view",), extras=False))
def test_a_full_label_similarity_equals_labels_per_view(backend, problem):
    flat = torch.cat(problem.options["labels"].unbind(1))
    similarity = cosine(flat, flat)
    count = problem.number
    rows = slice(None) if problem.options["contrast_mode"] == "all" else slice(0, count)
    columns = slice(count, 2 * count) if problem.options["contrast_mode"] == "one" else slice(None)
    actual = loss_of(problem, backend, labels=None, label_similarity=similarity[rows, columns])
    same(actual, loss_of(problem, backend), problem)


@given(problem=problems(modes=("one",), kinds=("soft",), extras=False))
def test_mode_one_is_a_contrast_set_made_of_view_one(backend, problem):
    labels = problem.options["labels"]
    rows = problem.features
    actual = loss_of(problem, backend, rows[:, 0], contrast_features=rows[:, 1], contrast_labels=labels)
    same(actual, loss_of(problem, backend), problem)


@given(problem=problems(modes=("all",), extras=False))
def test_mode_first_gives_the_first_rows_of_mode_all(backend, problem):
    every = loss_of(problem, backend, reduction="none")
    first = loss_of(problem, backend, contrast_mode="first", reduction="none")
    same(first, every[: problem.number], problem)


@given(problem=set_problems())
def test_all_backends_agree_with_dense(problem):
    values = [loss_of(problem, name) for name in ("dense", "tiled", "auto")]
    spread = problem.number * problem.views
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-9, atol=spread * tolerance(problem.options))


# --- reductions and the teacher ------------------------------------------------------------------------------------


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@given(problem=problems(kinds=("hard", "soft", "per_view")), alpha=st.sampled_from([0.0, 0.3, 1.0, 7.0]), seed=seeds)
def test_the_teacher_term_is_added_linearly(backend, problem, alpha, seed):
    teacher = soft_rows(problem.number, 4, seed)
    changes = {"teacher_labels": None, "teacher_weight": 1.0}
    student_only = loss_of(problem, backend, **changes)
    teacher_only = loss_of(problem, backend, **changes | {"labels": teacher})
    both = loss_of(problem, backend, teacher_labels=teacher, teacher_weight=alpha)
    spread = problem.number * problem.views * (1 + alpha)
    torch.testing.assert_close(
        both, student_only + alpha * teacher_only, rtol=1e-9, atol=spread * tolerance(problem.options)
    )


@pytest.mark.not_on_triton("needs float64")
@given(problem=problems(extras=True))
def test_sum_and_mean_follow_from_none(backend, problem):
    each = loss_of(problem, backend, reduction="none")
    total = loss_of(problem, backend, reduction="sum")
    torch.testing.assert_close(total, each.sum(), rtol=1e-9, atol=1e-9)
    weight = problem.options.get("sample_weight")
    if weight is None:
        weight = torch.ones(problem.number, dtype=torch.float64)
    weight = weight if weight.dim() == 2 else weight[:, None].expand(-1, problem.views)
    weight = weight.T.flatten()[: len(each)]
    mean = loss_of(problem, backend, reduction="mean", empty_anchors="zero")
    expected = each.sum() / weight.sum() if weight.sum() > 0 else torch.zeros_like(mean)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.not_on_triton("needs float64")
@given(problem=problems(extras=False), factor=st.floats(0.01, 100.0), seed=seeds)
def test_the_mean_does_not_depend_on_the_scale_of_the_sample_weights(backend, problem, factor, seed):
    weight = torch.rand(problem.number, generator=generator(seed), dtype=torch.float64) + 0.01
    same(
        loss_of(problem, backend, sample_weight=weight * factor),
        loss_of(problem, backend, sample_weight=weight),
        problem,
    )


@pytest.mark.not_on_triton("needs float64")
@given(problem=problems(extras=False), base=st.floats(0.01, 10.0))
def test_the_base_temperature_only_scales(backend, problem, base):
    plain = loss_of(problem, backend, base_temperature=None)
    scaled = loss_of(problem, backend, base_temperature=base)
    torch.testing.assert_close(scaled, plain * problem.options["temperature"] / base, rtol=1e-9, atol=1e-12)


# --- no silent NaN -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normalize", [True, False])
@given(problem=problems(max_views=2, extras=False), data=st.data())
def test_one_bad_feature_entry_never_gives_a_finite_mean_loss(backend, poison, normalize, problem, data):
    assume(problem.number * problem.views > 1)
    index = tuple(data.draw(st.integers(0, size - 1)) for size in problem.features.shape)
    features = problem.features.clone().float()
    features[index] = poison
    loss = loss_of(problem, backend, features, normalize=normalize)
    assert not loss.isfinite(), f"{poison} at {index} gave {loss.item()}"


@pytest.mark.not_on_triton("about labels, which no kernel sees")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@given(problem=problems(kinds=("lone",), modes=("all",), max_views=1, extras=False), data=st.data())
def test_ignoring_empty_anchors_does_not_hide_a_bad_feature_entry(backend, poison, problem, data):
    # every anchor is empty, so the mean runs over nothing: the one place where a NaN could drop out
    assume(problem.number > 1)
    index = tuple(data.draw(st.integers(0, size - 1)) for size in problem.features.shape)
    features = problem.features.clone()
    features[index] = poison
    assert not loss_of(problem, backend, features, empty_anchors="ignore").isfinite()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@given(problem=set_problems(), data=st.data())
def test_one_bad_entry_in_the_contrast_set_never_gives_a_finite_loss(backend, poison, problem, data):
    contrast = problem.options["contrast_features"].clone()
    assume(len(contrast) > 0)
    index = tuple(data.draw(st.integers(0, size - 1)) for size in contrast.shape)
    contrast[index] = poison
    assert not loss_of(problem, backend, contrast_features=contrast, reduction="mean").isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(problem=problems())
def test_finite_inputs_give_a_finite_loss_and_a_finite_gradient(backend, dtype, problem):
    features = problem.features.to(dtype).requires_grad_()
    loss = loss_of(problem, backend, features)
    assert loss.isfinite().all()
    # the mean keeps half-precision gradients in range: a sum of 1/tau = 1000 over rows of small norm need not fit
    (loss.mean() * (1e-2 if dtype == torch.float16 else 1.0)).backward()
    assert features.grad.isfinite().all()


@given(problem=set_problems())
def test_finite_inputs_with_a_contrast_set_give_finite_gradients(backend, problem):
    features = problem.features.float().requires_grad_()
    contrast = problem.options["contrast_features"].float().requires_grad_()
    loss = loss_of(problem, backend, features, contrast_features=contrast)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert features.grad.isfinite().all()
    assert len(contrast) == 0 or contrast.grad.isfinite().all()


@given(problem=problems(degenerate=True, kinds=("hard", "onehot", "soft", "near_disjoint")))
def test_the_loss_is_never_negative_beyond_rounding(backend, problem):
    # every log-probability is <= 0 when the anchor's positives are among its contrasts; W / (W + 1e-8) keeps the sign
    loss = loss_of(problem, backend)
    slack = problem.number * problem.views * 10 * tolerance(problem.options)
    assert (loss >= -slack).all()
