"""The loss in float64 NumPy with explicit loops: slow, readable, and sharing no code with the package.

Every number that the tests expect comes from here (or from `torch_reference.py`, which is checked against this file).
It follows the definition, anchor by anchor and contrast by contrast, and uses none of the identities that make the
package fast: no class sums, no shared log-sum-exp, no tiles.

Arguments have the names and defaults of `gen_supcon_loss`; tensors are NumPy arrays (a sequence of views is a list).
"""

from __future__ import annotations

import math

import numpy as np

EPS = 1e-8  # added to the positive mass W, and the mass up to which an anchor counts as empty


def split_views(array) -> list[np.ndarray]:
    """(N, D), (N, V, ...) or a list of V arrays (N, D) -> list of V arrays (N, D) in float64."""
    if isinstance(array, (list, tuple)):
        return [np.asarray(view, dtype=np.float64) for view in array]
    array = np.asarray(array, dtype=np.float64)
    if array.ndim == 2:
        return [array]
    number, views = array.shape[:2]
    return [array[:, v].reshape(number, math.prod(array.shape[2:])) for v in range(views)]


def unit(row: np.ndarray) -> np.ndarray:
    """The row at length one; a zero row stays zero."""
    largest = np.max(np.abs(row)) if row.size else 0.0
    if largest == 0.0:
        return np.zeros_like(row)
    row = row / largest  # so that squares neither overflow nor underflow
    return row / math.sqrt(float(np.dot(row, row)))


def log_sum_exp(values: list[float]) -> float:
    """log sum exp of a non-empty list, with the maximum taken out."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def label_rows(labels, number: int, views: int) -> list[list]:
    """Labels in any of the forms -> rows[v][n], each a scalar (1-D labels) or a vector (label vectors)."""
    if labels is None:
        return [list(range(number)) for _ in range(views)]
    if isinstance(labels, (list, tuple)):
        return [list(np.asarray(view)) for view in labels]
    labels = np.asarray(labels)
    if labels.ndim == 3:
        return [list(labels[:, v]) for v in range(views)]
    return [list(labels) for _ in range(views)]


def label_weight(left, right) -> float:
    """Scalars: one if equal. Vectors: their cosine, zero if one of them is a zero vector."""
    if np.ndim(left) == 0:
        return 1.0 if left == right else 0.0
    return float(np.dot(unit(np.asarray(left, dtype=np.float64)), unit(np.asarray(right, dtype=np.float64))))


def oracle_layout(number: int, views: int, contrast_mode: str, set_size: int | None, include_batch: bool = False):
    """Anchors and contrasts as (view, sample) pairs in flat, view-major order; a separate contrast set is view -1."""
    everything = [(v, n) for v in range(views) for n in range(number)]
    first = [(0, n) for n in range(number)]
    anchors = everything if contrast_mode == "all" else first
    batch = [(1, n) for n in range(number)] if contrast_mode == "one" else everything
    if set_size is None:
        return anchors, batch
    return anchors, [*(batch if include_batch else []), *((-1, m) for m in range(set_size))]


def numbers_of_samples(number: int, set_size: int, anchors: list, contrasts: list) -> list[int]:
    """What stands for the labels of a contrast set if there are none.

    Its row n is of sample n, unless the batch has another view of the samples among the contrasts.
    """
    if any(contrast != anchor and contrast[0] >= 0 for anchor in anchors[:1] for contrast in contrasts[::number]):
        return [-1] * set_size
    if anchors and set_size < number:
        raise AssertionError("nothing is a positive")
    return [m if m < number else -1 for m in range(set_size)]


def weights_of_rows(contrast_weight, anchors: list, contrasts: list, of_batch: bool) -> dict:
    """(N,), (N, V) or (contrasts,) -> the weight of each row that has one."""
    if contrast_weight is None:
        return {}
    weights = np.asarray(contrast_weight, dtype=np.float64)
    if of_batch:
        return {(v, n): weights[n] if weights.ndim == 1 else weights[n, v] for v, n in {*anchors, *contrasts}}
    return dict(zip(contrasts, weights, strict=True))


def oracle_anchors(
    features,
    labels=None,
    *,
    label_similarity=None,
    temperature=0.07,
    base_temperature=0.07,
    contrast_mode="all",
    contrast_features=None,
    contrast_labels=None,
    include_batch=False,
    contrast_weight=None,
    absent=frozenset(),
    normalize=True,
) -> tuple[np.ndarray, np.ndarray]:
    """Per anchor: the loss and the positive mass W, in view-major order; rows (view, sample) of `absent` are not."""
    feature_views = split_views(features)
    views, number = len(feature_views), feature_views[0].shape[0]
    prepare = unit if normalize else np.asarray
    rows = {(v, n): prepare(feature_views[v][n]) for v in range(views) for n in range(number)}
    label_views = label_rows(labels, number, views)
    kinds = {(v, n): label_views[v][n] for v in range(views) for n in range(number)}
    set_size = None
    if contrast_features is not None:
        contrast_features = np.asarray(contrast_features, dtype=np.float64)
        set_size = contrast_features.shape[0]
        rows.update({(-1, m): prepare(contrast_features[m]) for m in range(set_size)})
    anchors, contrasts = oracle_layout(number, views, contrast_mode, set_size, include_batch)
    if set_size is not None and label_similarity is None:
        if contrast_labels is None:
            set_labels = numbers_of_samples(number, set_size, anchors, contrasts)
        else:
            set_labels = list(np.asarray(contrast_labels))
        kinds.update({(-1, m): set_labels[m] for m in range(set_size)})
    of_rows = weights_of_rows(contrast_weight, anchors, contrasts, set_size is None)
    if label_similarity is not None:
        label_similarity = np.asarray(label_similarity, dtype=np.float64)
        tiled = label_similarity.shape != (len(anchors), len(contrasts))

    factor = 1.0 if base_temperature is None else temperature / base_temperature
    losses, masses = [], []
    for i, anchor in enumerate(anchors):
        logits, weights, logs = [], [], []
        for j, contrast in enumerate(contrasts):
            if anchor == contrast:  # never true in mode "one" and for a separate contrast set
                continue
            if any(row in absent or of_rows.get(row, 1.0) == 0 for row in (anchor, contrast)):
                continue
            logits.append(float(np.dot(rows[anchor], rows[contrast])) / temperature)
            logs.append(math.log(of_rows.get(contrast, 1.0)))
            if label_similarity is None:
                weights.append(label_weight(kinds[anchor], kinds[contrast]))
            elif not tiled:
                weights.append(float(label_similarity[i, j]))
            else:  # columns of samples, if there are any, then of the set
                column = contrast[1] + (number if contrast[0] < 0 and include_batch else 0)
                weights.append(float(label_similarity[anchor[1], column]))
        mass = math.fsum(weights)
        value = 0.0
        if logits:
            spread = log_sum_exp([s + log for s, log in zip(logits, logs, strict=True)])
            value = -math.fsum(w * (s - spread) for w, s in zip(weights, logits, strict=True)) / (mass + EPS)
        losses.append(factor * value)
        masses.append(mass)
    return np.array(losses), np.array(masses)


def ignored_rows(labels, contrast_labels, ignore_index, number: int, views: int) -> frozenset:
    """Rows of that class, as (view, sample)."""
    if ignore_index is None:
        return frozenset()
    of_views = label_rows(labels, number, views)
    found = {(v, n) for v in range(views) for n in range(number) if of_views[v][n] == ignore_index}
    of_set = [] if contrast_labels is None else list(np.asarray(contrast_labels))
    return frozenset(found | {(-1, m) for m, kind in enumerate(of_set) if kind == ignore_index})


def anchor_weights(sample_weight, number: int, views: int, contrast_mode: str) -> np.ndarray:
    """(N,) or (N, V) sample weights -> one weight per anchor, view-major."""
    if sample_weight is None:
        sample_weight = np.ones(number)
    sample_weight = np.asarray(sample_weight, dtype=np.float64)
    anchors, _ = oracle_layout(number, views, contrast_mode, None)
    return np.array([sample_weight[n] if sample_weight.ndim == 1 else sample_weight[n, v] for v, n in anchors])


def reduce(losses, masses, weights, empty_anchors: str, reduction: str):
    """Sum, weighted mean (over the anchors that count), or the weighted anchors themselves."""
    if reduction == "none":
        return weights * losses
    if reduction == "sum":
        return math.fsum(weights * losses)
    numerator = denominator = 0.0
    for loss, mass, weight in zip(losses, masses, weights, strict=True):
        if empty_anchors == "ignore" and mass <= EPS:
            continue
        numerator += weight * loss
        denominator += weight
    return numerator / denominator if denominator > 0 else 0.0


def oracle_loss(
    features,
    labels=None,
    *,
    label_similarity=None,
    temperature=0.07,
    base_temperature=0.07,
    contrast_mode="all",
    contrast_features=None,
    contrast_labels=None,
    include_batch=False,
    contrast_weight=None,
    ignore_index=None,
    teacher_labels=None,
    contrast_teacher_labels=None,
    teacher_weight=1.0,
    sample_weight=None,
    empty_anchors="zero",
    normalize=True,
    reduction="mean",
):
    """The whole contract: L(labels) + teacher_weight * L(teacher_labels), each reduced on its own."""
    feature_views = split_views(features)
    number, views = feature_views[0].shape[0], len(feature_views)
    absent = ignored_rows(labels, contrast_labels, ignore_index, number, views)
    shared = {
        "temperature": temperature,
        "base_temperature": base_temperature,
        "contrast_mode": contrast_mode,
        "contrast_features": contrast_features,
        "include_batch": include_batch,
        "contrast_weight": contrast_weight,
        "absent": absent,
        "normalize": normalize,
    }
    set_size = None if contrast_features is None else len(contrast_features)
    anchors, contrasts = oracle_layout(number, views, contrast_mode, set_size, include_batch)
    of_rows = weights_of_rows(contrast_weight, anchors, contrasts, set_size is None)
    counts = np.array([row not in absent and of_rows.get(row, 1.0) > 0 for row in anchors], dtype=bool)
    weights = np.where(counts, anchor_weights(sample_weight, number, views, contrast_mode), 0.0)
    losses, masses = oracle_anchors(
        features, labels, label_similarity=label_similarity, contrast_labels=contrast_labels, **shared
    )
    total = reduce(losses, masses, weights, empty_anchors, reduction)
    if teacher_labels is not None:
        losses, masses = oracle_anchors(features, teacher_labels, contrast_labels=contrast_teacher_labels, **shared)
        total = total + teacher_weight * reduce(losses, masses, weights, empty_anchors, reduction)
    return total
