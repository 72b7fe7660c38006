"""`contrastive_accuracy` against its definition, pair by pair, in float64."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from genscl_loss import contrastive_accuracy, diagnostics, gen_supcon_loss

N, V, M, D, C = 21, 2, 7, 3, 4


def expected(
    features: Any,
    labels: Any = None,
    *,
    label_similarity: Any = None,
    contrast_mode: str = "all",
    contrast_features: Any = None,
    contrast_labels: Any = None,
    include_batch: bool = False,
    normalize: bool = True,
    min_similarity: float = 0.0,
) -> float:
    def numpy(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [numpy(one) for one in value]
        return None if value is None else value.double().numpy() if value.is_floating_point() else value.numpy()

    views = oracle.split_views(numpy(features))
    n, set_size = len(views[0]), None if contrast_features is None else len(contrast_features)
    rows = {(v, i): row for v, view in enumerate(views) for i, row in enumerate(view)}
    kinds = {
        (v, i): y for v, view in enumerate(oracle.label_rows(numpy(labels), n, len(views))) for i, y in enumerate(view)
    }
    anchors, contrasts = oracle.oracle_layout(n, len(views), contrast_mode, set_size, include_batch)
    if set_size is not None:
        if contrast_labels is None:
            of_set = oracle.numbers_of_samples(n, set_size, anchors, contrasts)
        else:
            of_set = numpy(contrast_labels)
        for j in range(set_size):
            rows[-1, j], kinds[-1, j] = numpy(contrast_features)[j], of_set[j]
    if normalize:
        rows = {place: oracle.unit(row) for place, row in rows.items()}
    right = total = 0
    for i, anchor in enumerate(anchors):
        found: dict[bool, list[float]] = {True: [], False: []}
        for j, contrast in enumerate(contrasts):
            if anchor != contrast:
                if label_similarity is not None:
                    full = tuple(label_similarity.shape) == (len(anchors), len(contrasts))
                    w = label_similarity[i, j] if full else label_similarity[anchor[1], contrast[1]]
                else:
                    w = oracle.label_weight(kinds[anchor], kinds[contrast])
                found[bool(w > min_similarity)].append(float(np.dot(rows[anchor], rows[contrast])))
        if found[True]:
            total += 1
            right += not found[False] or max(found[True]) > max(found[False])
    return right / total if total else math.nan


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft(*shape: int, seed: int = 1) -> Tensor:
    return (4 * random(*shape, C, seed=seed)).softmax(-1)


def classes(n: int, seed: int = 2) -> Tensor:
    return torch.randint(C, (n,), generator=torch.Generator().manual_seed(seed))


FORMS: dict[str, Tensor | list[Tensor]] = {
    "one view": random(N, D),
    "views": random(N, V, D),
    "sequence": [random(N, D), random(N, D, seed=5)],
    "images": random(N, V, 1, D),
}
LABELS: dict[str, dict[str, Any]] = {
    "classes": {"labels": classes(N)},
    "float classes": {"labels": classes(N) / 2 + 0.3},
    "vectors": {"labels": soft(N), "min_similarity": 0.5},
    "one-hot": {"labels": torch.eye(C, dtype=torch.float64)[classes(N)]},
    "unlabelled": {"labels": torch.eye(C, dtype=torch.float64)[classes(N)] * (torch.arange(N) % 3 > 0)[:, None]},
    "similarity": {"label_similarity": random(N, N, seed=3).abs(), "min_similarity": 0.7},
}


@pytest.fixture(params=[4, 1024], autouse=True)
def tile(request, monkeypatch) -> int:
    monkeypatch.setattr(diagnostics, "_TILE", request.param)
    return request.param


def check(features: Any, **options: Any) -> float:
    found = contrastive_accuracy(features, **options)
    assert (found.shape, found.dtype, found.requires_grad) == ((), torch.float64, False)
    assert found.item() == pytest.approx(expected(features, **options), rel=1e-12, nan_ok=True)
    return found.item()


@pytest.mark.parametrize("mode", ["all", "first", "one"])
@pytest.mark.parametrize("labels", list(LABELS))
@pytest.mark.parametrize("form", list(FORMS))
def test_all_forms(form, labels, mode):
    if form == "one view" and mode == "one":
        pytest.skip("needs two views")
    assert 0 < check(FORMS[form], contrast_mode=mode, **LABELS[labels]) < 1


@pytest.mark.parametrize("mode", ["all", "first", "one"])
def test_without_labels(mode):
    views = [random(N, D), random(N, D) + 0.5 * random(N, D, seed=9)]
    assert 0 < check(views, contrast_mode=mode) < 1
    assert 0 < check(views[0], contrast_features=views[1], contrast_mode="all") < 1


@pytest.mark.parametrize("mode", ["all", "first"])
@pytest.mark.parametrize("kind", ["classes", "vectors"])
def test_contrast_sets(kind, mode):
    own, others = (classes(N), classes(M, 4)) if kind == "classes" else (soft(N), soft(M, seed=6))
    options = {"contrast_features": random(M, D, seed=7), "contrast_labels": others, "contrast_mode": mode}
    assert 0 <= check(FORMS["views"], labels=own, min_similarity=0.5, **options) <= 1


@pytest.mark.parametrize("mode", ["all", "first", "one"])
@pytest.mark.parametrize("kind", ["none", "classes", "vectors"])
def test_the_batch_and_a_memory(kind, mode):
    options: dict[str, Any] = {"contrast_features": random(M, D, seed=7), "contrast_mode": mode, "include_batch": True}
    if kind == "classes":
        options |= {"labels": classes(N), "contrast_labels": classes(M, 4)}
    if kind == "vectors":
        options |= {"labels": soft(N), "contrast_labels": soft(M, seed=6), "min_similarity": 0.5}
    views = [random(N, D), random(N, D) + 0.5 * random(N, D, seed=9)]
    assert 0 < check(views, **options) < 1


def test_keys_and_then_negatives():
    keys = random(N, D) + 0.5 * random(N, D, seed=9)
    found = check(random(N, D), contrast_features=torch.cat([keys, random(M, D, seed=7)]))
    assert 0 < found < check(random(N, D), contrast_features=keys)


@pytest.mark.parametrize("held", [0.5, math.nan])
@pytest.mark.parametrize("mode", ["all", "first", "one"])
@pytest.mark.parametrize("kind", ["classes", "vectors", "none"])
def test_rows_that_are_not_there(kind, mode, held):
    there = torch.arange(N) % 4 != 1
    features = torch.where(there[:, None, None], FORMS["views"], held)
    labels, limit = {"classes": (classes(N), 0.0), "vectors": (soft(N), 0.5), "none": (None, 0.0)}[kind]
    options = {"contrast_mode": mode, "min_similarity": limit}
    weight = there * torch.rand(N).add(0.1)
    found = contrastive_accuracy(features, labels, contrast_weight=weight, **options)
    wanted = expected(features[there], None if labels is None else labels[there], **options)
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    if kind == "classes":
        found = contrastive_accuracy(features, torch.where(there, labels, -100), ignore_index=-100, **options)
        assert found.item() == pytest.approx(wanted, rel=1e-12)


def test_labels_of_their_own_for_views():
    check(FORMS["views"], labels=soft(N, V), min_similarity=0.6)
    check(FORMS["sequence"], labels=[classes(N), classes(N, 8)])


@pytest.mark.parametrize("seed", range(10))
def test_random_sizes(seed):
    generator = torch.Generator().manual_seed(seed)
    n, v, d = (int(torch.randint(1, most, (), generator=generator)) for most in (14, 4, 6))
    check(random(n, v, d, seed=seed), labels=classes(n, seed), normalize=bool(seed % 2))


def test_inner_products():
    features = torch.tensor([[1.0, 0], [3, 1], [0.9, 0]]).double()
    labels = torch.tensor([0, 1, 0])
    assert check(features, labels=labels) == 1
    assert check(features, labels=labels, normalize=False) == 0


# ---- Decided ----


def test_ties_are_wrong():
    x, y = [1.0, 0.0], [0.0, 1.0]
    assert check(torch.tensor([x, x, x, y]).double(), labels=torch.tensor([0, 0, 1, 1])) == 0
    assert check(torch.tensor([x, x, y, y]).double(), labels=torch.tensor([0, 0, 1, 1])) == 1
    assert check(torch.ones(8, 4).double(), labels=torch.arange(8) % 2) == 0  # a collapsed model


def test_anchors_without_positives_are_left_out():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert contrastive_accuracy(features, torch.tensor([0, 0, 1])) == 1
    assert contrastive_accuracy(features, torch.arange(3)).isnan()
    assert contrastive_accuracy(features[:1], torch.zeros(1)).isnan()
    empty = {"contrast_features": torch.zeros(0, 2), "contrast_labels": torch.zeros(0)}
    assert contrastive_accuracy(features, torch.zeros(3), **empty).isnan()
    assert contrastive_accuracy(features, torch.zeros(3)) == 1  # all are positives: nothing else could be nearer


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_not_hidden(bad):
    features = random(N, D)
    features[4, 1] = bad
    assert contrastive_accuracy(features, classes(N)).isnan()
    assert contrastive_accuracy(
        random(N, D), classes(N), contrast_features=features, contrast_labels=classes(N)
    ).isnan()


def test_large_numbers_are_finite():
    assert 0 < contrastive_accuracy(1e18 * random(N, D).float(), classes(N), normalize=False) < 1


def test_class_numbers_know_no_limit_below_one():
    found = [contrastive_accuracy(FORMS["views"], classes(N), min_similarity=limit) for limit in (0.0, 0.5, 0.99)]
    assert found[0] == found[1] == found[2]
    assert contrastive_accuracy(FORMS["views"], classes(N), min_similarity=1).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype):
    features = random(200, D).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_accuracy(features, classes(200))
    assert found.dtype == torch.float32
    assert abs(found.item() - expected(features, classes(200))) <= 0.01  # of 200 anchors, two near a tie


def test_no_matrix_exists(tile):
    if tile < 100:
        pytest.skip("small tiles are slow")
    n = 6000
    features, labels = torch.randn(n, 8), torch.randn(n, 5).softmax(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        contrastive_accuracy(features, labels)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    assert max(held) < 4 * n * n / 4


@pytest.mark.parametrize(
    "limit, error", [(-0.1, ValueError), (1.1, ValueError), (math.nan, ValueError), ("0", TypeError)]
)
def test_limits_that_are_none(limit, error):
    with pytest.raises(error, match="^min_similarity must be"):
        contrastive_accuracy(FORMS["views"], classes(N), min_similarity=limit)


def test_errors_are_those_of_the_loss():
    for arguments in ((FORMS["views"], classes(N - 1)), (FORMS["one view"],), ("features",)):
        with pytest.raises((ValueError, TypeError)) as ours:
            contrastive_accuracy(*arguments)
        with pytest.raises(type(ours.value)) as theirs:
            gen_supcon_loss(*arguments)
        assert str(ours.value) == str(theirs.value)


def test_arguments_have_the_names_and_defaults_of_the_loss():
    ours, theirs = (inspect.signature(function).parameters for function in (contrastive_accuracy, gen_supcon_loss))
    assert {name: theirs[name].default for name in ours if name != "min_similarity"} == {
        name: parameter.default for name, parameter in ours.items() if name != "min_similarity"
    }


@pytest.mark.parametrize("options", [{"contrast_weight": torch.tensor([1, 1, 0])}, {"ignore_index": 1}])
def test_rows_that_are_not_there_are_not_near(options):
    """Not even nearer than a positive on the other side."""
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert contrastive_accuracy(features, torch.tensor([0, 0, 1]), **options) == 1
