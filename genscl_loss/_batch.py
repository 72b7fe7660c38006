"""Input handling: every form that users have becomes one canonical batch, or an error that names the argument.

Nothing behind this file asks how many views there were, which contrast mode was chosen or what the labels looked like.
Rows are view-major throughout: row v * N + n is view v of sample n.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genscl_loss._checks import check_tensor, check_values, extremes, kind, may_look_at
from genscl_loss._choices import CONTRAST_MODES
from genscl_loss._positives import ClassLabels, Labels, Similarity, VectorLabels, num_classes


@dataclass(frozen=True)  # not a tuple: `torch.compile` finds no properties of those before torch 2.10
class Batch:
    """Anchors, what they are contrasted with, and what makes positives."""

    anchors: Tensor  # (A, D), float32 or float64
    contrasts: Tensor | None  # (M, D); None: the anchors themselves
    # Anchor i is contrast i + self_offset: 0, of this process; None: no anchor is a contrast.
    self_offset: int | None
    given_labels: Labels | Callable[[], Labels]  # a function that makes those of samples: `partner` may say as much
    teacher_labels: Labels | None
    sample_weight: Tensor | None  # (A,)
    normalize: bool  # rows are to be scaled to unit length
    feature_dtype: torch.dtype  # as given, if all have the same; otherwise that of the computation
    num_views: int
    # Without labels, where each anchor has but one positive: anchor i has contrast (i + partner) modulo M.
    partner: int | None = None
    num_live: int | None = None  # contrasts that can have a gradient, the first ones; None: all
    # What multiplies exponentials, (M,); None: nothing. Rows and label vectors without weight are zero, and anchors
    # that are such rows have a sample weight of zero.
    contrast_weight: Tensor | None = None

    @property
    def half(self) -> bool:
        """Whether products of half precision are all that the features deserve."""
        return self.feature_dtype in (torch.float16, torch.bfloat16)

    @property
    def labels(self) -> Labels:
        """Of all kinds; those of samples if none were given."""
        return self.given_labels() if callable(self.given_labels) else self.given_labels

    @property
    def all_labels(self) -> list[Labels]:
        """The labels, and the teacher's if there are any."""
        return [self.labels] if self.teacher_labels is None else [self.labels, self.teacher_labels]

    @property
    def num_classes(self) -> int:
        """C of label vectors, of all of them together."""
        return 0 if self.partner is not None else sum(map(num_classes, self.all_labels))

    @property
    def num_contrast_rows(self) -> int:
        """Contrasts, an anchor itself included."""
        return (self.anchors if self.contrasts is None else self.contrasts).shape[0]

    @property
    def num_contrasts(self) -> int:
        """Contrasts that each anchor sees; none if there is no anchor."""
        if self.anchors.shape[0] == 0:
            return 0
        return self.num_contrast_rows - (0 if self.self_offset is None else 1)

    def without_empty_set(self) -> "Batch":
        """The same, as a self-contrast if it is one: a contrast set beside the batch may have no rows."""
        rows = self.anchors.shape[0]
        if self.self_offset is None or not self.num_live == rows == self.num_contrast_rows:
            return self
        teacher = None if self.teacher_labels is None else _of_anchors(self.teacher_labels)
        own = _of_anchors(self.labels)
        return replace(self, contrasts=None, given_labels=own, teacher_labels=teacher, num_live=None)


def _of_anchors(labels: Labels) -> Labels:
    if isinstance(labels, ClassLabels):  # field by field: PyTorch 2.6 does not compile `_replace`
        return ClassLabels(labels.anchors, labels.anchors, labels.are_numbers, labels.there)
    return labels if isinstance(labels, Similarity) else VectorLabels(labels.anchors, labels.anchors)


def make_batch(
    features: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor] | None,
    *,
    label_similarity: Tensor | None,
    contrast_mode: str,
    contrast_features: Tensor | None,
    contrast_labels: Tensor | None,
    include_batch: bool = False,
    teacher_labels: Tensor | Sequence[Tensor] | None,
    contrast_teacher_labels: Tensor | None,
    sample_weight: Tensor | None,
    contrast_weight: Tensor | None = None,
    ignore_index: int | None = None,
    normalize: bool,
) -> Batch:
    """Check the arguments of `gen_supcon_loss` and bring them into canonical form."""
    if not isinstance(contrast_mode, str) or contrast_mode not in CONTRAST_MODES:
        raise ValueError(
            f'contrast_mode must be "all", "one" (view 0 against view 1) or "first" (view 0 against all views, '
            f'which SupContrast calls "one"); got {contrast_mode!r}'
        )
    views = _Views.of(features, contrast_mode, contrast_features, include_batch)
    if normalize:
        _check_not_signs(features)
    if contrast_labels is None:  # whose presence says that labels are labels
        _check_not_a_view(features, labels)
    if label_similarity is not None:
        if labels is not None or contrast_labels is not None:
            raise ValueError("label_similarity replaces labels and contrast_labels: give one or the other")
        own: Labels | None = _similarity(label_similarity, views)
    else:
        own = _labels("labels", labels, "contrast_labels", contrast_labels, views)
    teacher = None
    if teacher_labels is not None:
        names = ("teacher_labels", "contrast_teacher_labels")
        teacher = _labels(names[0], teacher_labels, names[1], contrast_teacher_labels, views)
        if isinstance(teacher, ClassLabels):
            raise ValueError("teacher_labels must be label vectors, (N, C), (N, V, C) or V of (N, C); got classes")
    elif contrast_teacher_labels is not None:
        raise ValueError("teacher_labels is missing: contrast_teacher_labels came without it")
    anchors, contrasts = views.rows()
    weight = _sample_weight(sample_weight, views)
    there = _There.of(contrast_weight, ignore_index, own, views)
    if there is not None:
        anchors, contrasts = _without(anchors, there.anchors), _without(contrasts, there.contrasts)
        own = there.labels(views.sample_labels() if own is None else own)
        teacher = None if teacher is None else there.labels(teacher)
        weight = _without(anchors.new_ones(anchors.shape[0]) if weight is None else weight, there.anchors)
    views.check_values(anchors, contrasts)
    is_paired = own is None and teacher is None and there is None
    return Batch(
        anchors,
        contrasts,
        views.self_offset,
        views.sample_labels if own is None else own,
        teacher,
        weight,
        normalize,
        views.feature_dtype,
        views.num_given,
        views.partner if is_paired else None,
        views.num_live,
        None if there is None else there.weight,
    )


@dataclass(frozen=True)
class _Views:
    """Views of N samples, and which of them are anchors and contrasts."""

    features: tuple[Tensor, ...]  # (N, D) each; those that the mode uses
    num_given: int  # views that the caller gave, for labels and weights that cover them all
    num_anchor_views: int
    contrast_views: slice  # of `features`; what is behind them among the contrasts is `contrast_features`
    contrast_features: Tensor | None
    self_offset: int | None

    @staticmethod
    def of(
        features: Tensor | Sequence[Tensor], mode: str, contrast_features: Tensor | None, include_batch: bool
    ) -> "_Views":
        views = _split_views(features)
        count = len(views)
        if contrast_features is None and include_batch:
            raise ValueError(
                "include_batch adds the batch to contrast_features, which is missing: without them the batch is all "
                "there is"
            )
        if contrast_features is not None:
            _check_contrast_features(contrast_features, views[0])
            if not include_batch:
                kept = views if mode == "all" else views[:1]
                return _Views(kept, count, len(kept), slice(0, 0), contrast_features, None)
        if mode == "one":
            if count < 2:
                raise ValueError('contrast_mode "one" contrasts view 0 with view 1; features has one view only')
            return _Views(views[:2], count, 1, slice(1, 2), contrast_features, None)
        return _Views(views, count, count if mode == "all" else 1, slice(0, count), contrast_features, 0)

    @property
    def num_samples(self) -> int:
        return self.features[0].shape[0]

    @property
    def num_anchors(self) -> int:
        return self.num_anchor_views * self.num_samples

    @property
    def num_contrast_views(self) -> int:
        return len(self.features[self.contrast_views])

    @property
    def num_batch_rows(self) -> int:
        """Contrasts that are rows of the batch, an anchor itself included."""
        return self.num_contrast_views * self.num_samples

    @property
    def num_set_rows(self) -> int:
        return 0 if self.contrast_features is None else self.contrast_features.shape[0]

    @property
    def num_contrast_rows(self) -> int:
        return self.num_batch_rows + self.num_set_rows

    @property
    def num_live(self) -> int | None:
        """Contrasts, the first ones, that can have a gradient, if a memory beside the batch has none."""
        fixed = self.contrast_features is not None and not self.contrast_features.requires_grad
        return self.num_batch_rows if fixed and self.num_contrast_views else None

    @property
    def have_other_views(self) -> bool:
        """Whether the batch has another view of an anchor's sample among the contrasts."""
        return self.num_contrast_views > (0 if self.self_offset is None else 1)

    @property
    def partner(self) -> int | None:
        """Where, behind an anchor and modulo M, the only other view of its sample is; None if nowhere in all cases."""
        n = self.num_samples
        if not self.have_other_views:  # the rows of the set are views, too
            is_in_step = self.num_anchor_views == 1 or self.num_contrast_rows == n
            return self.num_batch_rows if is_in_step else None
        if self.self_offset is None:
            return 0
        is_in_step = self.num_anchor_views == 1 or self.num_set_rows == 0
        return n if len(self.features) == 2 and is_in_step else None

    def check_samples(self) -> None:
        """Refuse what has no positives without labels."""
        if self.have_other_views:
            return
        n, m = self.num_samples, self.num_set_rows
        if self.contrast_features is None:
            raise ValueError(
                "labels is missing and features has one view: nothing could be a positive. Give labels (a teacher's "
                "alone, too, go there), a second view, or contrast_features"
            )
        if m < n:
            raise ValueError(
                f"labels is missing: row n of contrast_features is then the positive of sample n, which needs at least "
                f"{n} rows; got {m}"
            )

    def sample_labels(self) -> ClassLabels:
        """Each sample is its own class, of which row n of the set is one if the batch has no other."""
        n, m = self.num_samples, self.num_set_rows
        sample = torch.arange(n, device=self.device)
        anchors = sample.repeat(self.num_anchor_views)
        if self.are_self_contrast:
            return ClassLabels(anchors, anchors, are_numbers=True)
        if self.contrast_features is None:
            of_set = None
        elif self.have_other_views:
            of_set = sample.new_full((m,), n)  # negatives of all
        else:
            of_set = torch.cat([sample, sample.new_full((m - n,), n)])
        contrasts = self.contrast_rows([sample] * len(self.features), of_set)
        return ClassLabels(anchors, contrasts, are_numbers=True)

    @property
    def are_self_contrast(self) -> bool:
        """Whether anchors and contrasts are the same rows."""
        is_whole = self.self_offset is not None and self.num_anchor_views == self.num_contrast_views
        return is_whole and self.contrast_features is None

    @property
    def device(self) -> torch.device:
        return self.features[0].device

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the features as given."""
        given = self.features if self.contrast_features is None else (*self.features, self.contrast_features)
        return [rows.dtype for rows in given]

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    @property
    def feature_dtype(self) -> torch.dtype:
        """The dtype of all features, if they have but one; otherwise that of the computation."""
        dtypes = set(self.dtypes)
        return dtypes.pop() if len(dtypes) == 1 else self.dtype

    def anchor_rows(self, per_view: Sequence[Tensor]) -> Tensor:
        return _stack(per_view[: self.num_anchor_views])

    def contrast_rows(self, per_view: Sequence[Tensor], of_set: Tensor | None) -> Tensor:
        """What goes with each contrast: with the views, and then with the rows of the set."""
        return _stack([*per_view[self.contrast_views], *([] if of_set is None else [of_set])])

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Anchors and contrasts (None for a self-contrast) in the dtype of the computation."""
        rows = _stack(self.features).to(self.dtype)
        if self.are_self_contrast:
            return rows, None
        first = self.contrast_views.start * self.num_samples
        parts = [rows[first : first + self.num_batch_rows]] if self.num_contrast_views else []
        parts += [] if self.contrast_features is None else [self.contrast_features.to(self.dtype)]
        return rows[: self.num_anchors], _stack(parts)

    def check_values(self, anchors: Tensor, contrasts: Tensor | None) -> None:
        """If asked: NaN in the loss is what gradient scalers look for."""
        of_batch = [anchors] if contrasts is None else [anchors, contrasts[: self.num_batch_rows]]
        for rows in of_batch:
            check_values("features", rows, signed=True, only_if_asked=True)
        if contrasts is not None:
            of_set = contrasts[self.num_batch_rows :]
            check_values("contrast_features", of_set, signed=True, only_if_asked=True)


class _There(NamedTuple):
    """Which rows are there at all, and what they weigh as contrasts."""

    anchors: Tensor  # (A,), bool
    contrasts: Tensor  # (M,), bool
    weight: Tensor  # (M,), zero for those that are not there
    are_self_contrast: bool  # whether anchors and contrasts are the same rows

    @staticmethod
    def of(
        contrast_weight: Tensor | None, ignore_index: int | None, labels: Labels | None, views: "_Views"
    ) -> "_There | None":
        """None: all of them, and they weigh the same."""
        if contrast_weight is None and ignore_index is None:
            return None
        counts = views.num_anchors, views.num_contrast_rows
        anchors, weight = (torch.ones(count, dtype=views.dtype, device=views.device) for count in counts)
        if contrast_weight is not None:
            anchors, weight = _check_contrast_weight(contrast_weight, anchors, views)
        if ignore_index is not None:
            numbers = _numbers_to_ignore(labels)
            anchors, weight = (_without(x, y != ignore_index) for x, y in ((anchors, numbers[0]), (weight, numbers[1])))
        return _There(anchors > 0, weight > 0, weight, views.are_self_contrast)

    def labels(self, labels: Labels) -> Labels:
        """The same, but rows that are not there are nobody's positives."""
        if isinstance(labels, ClassLabels):
            return ClassLabels(labels.anchors, labels.contrasts, labels.are_numbers, self.contrasts)
        if isinstance(labels, Similarity):
            return Similarity(torch.where(self.anchors[:, None] & self.contrasts, labels.weights, 0))
        left = _without(labels.anchors, self.anchors)
        # Of two views of the same samples one may be there and the other not, though their labels are one tensor.
        return VectorLabels(left, left if self.are_self_contrast else _without(labels.contrasts, self.contrasts))


def _without(rows: Any, there: Tensor) -> Any:
    """Rows, with zeros where they are not there. A choice, not a product: NaN must not spread."""
    if rows is None:
        return None
    return torch.where(there if rows.dim() == 1 else there[:, None], rows, 0)


def _stack(views: Sequence[Tensor]) -> Tensor:
    return views[0] if len(views) == 1 else torch.cat(list(views))


def _split_views(features: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    # No samples are a batch like any other: that of a process, or of a mask, that happens to have none.
    expected = "features must be (N, D), (N, V, ...) or a sequence of V tensors (N, D)"
    if isinstance(features, Tensor):
        check_tensor("features", features)
        if features.dim() < 2 or 0 in features.shape[1:]:
            raise ValueError(f"{expected}, V and D at least 1; got shape {tuple(features.shape)}")
        views = (features,) if features.dim() == 2 else features.flatten(2).unbind(1)
    elif isinstance(features, (tuple, list)) and all(isinstance(view, Tensor) for view in features):
        views = tuple(features)
        for view in views:
            check_tensor("features", view, views[0].device)
        if not views or any(view.dim() != 2 or view.shape != views[0].shape or not view.shape[1] for view in views):
            shapes = [tuple(view.shape) for view in views]
            raise ValueError(f"{expected}, all of one shape, V and D at least 1; got shapes {shapes}")
    else:
        raise TypeError(f"{expected}; got {kind(features)}")
    for view in views:
        if not view.is_floating_point():
            raise TypeError(f"features must be floating-point; got {view.dtype}")
    return views


def _check_not_signs(features: Tensor | Sequence[Tensor]) -> None:
    """Refuse views of one number each, which unit length leaves nothing but a sign of: most likely a pooled map."""
    if (
        isinstance(features, Tensor)
        and features.dim() > 2
        and features.shape[1] > 1
        and all(size == 1 for size in features.shape[2:])
    ):
        raise ValueError(
            f"features of shape {tuple(features.shape)} would be {features.shape[1]} views of one number, all 1 or -1 "
            "once they are normalised; for a pooled map pass features.flatten(1), for such views features.unbind(1)"
        )


def _check_not_a_view(features: object, labels: object) -> None:
    """Refuse a second view in the place of label vectors: nothing but its shape tells where values are not read."""
    if not isinstance(features, Tensor) or not isinstance(labels, Tensor) or labels.is_nested:
        return
    if labels.is_floating_point() and labels.dim() == 2 and labels.shape == features.shape and labels.shape[1] > 1:
        raise ValueError(
            "labels has the shape of features: two views go into one argument, features=[view0, view1]; label vectors "
            "of as many classes as there are features go in as a sequence of one, labels=[labels]"
        )


def _check_contrast_features(contrast_features: Tensor, view: Tensor) -> None:
    check_tensor("contrast_features", contrast_features, view.device)
    if not contrast_features.is_floating_point():
        raise TypeError(f"contrast_features must be floating-point; got {contrast_features.dtype}")
    if contrast_features.dim() != 2 or contrast_features.shape[1] != view.shape[1]:
        raise ValueError(
            f"contrast_features must be (M, D) with D = {view.shape[1]} as in features; "
            f"got shape {tuple(contrast_features.shape)}"
        )


def _labels(
    name: str,
    labels: Tensor | Sequence[Tensor] | None,
    contrast_name: str,
    contrast_labels: Tensor | None,
    views: _Views,
) -> Labels | None:
    """Classes or label vectors of anchors and contrasts; None if there are none, and samples are their own classes."""
    if (labels is None) != (contrast_labels is None) and views.contrast_features is not None:
        missing, given = (name, contrast_name) if labels is None else (contrast_name, name)
        raise ValueError(f"{missing} is missing: with contrast_features, {name} and {contrast_name} come together")
    if contrast_labels is not None and views.contrast_features is None:
        raise ValueError(f"{contrast_name} describes contrast_features, which is missing")
    if labels is None:
        views.check_samples()
        return None
    per_view = _split_labels(name, labels, views)[: len(views.features)]
    anchors = views.anchor_rows(per_view)
    of_set = None
    if views.contrast_features is not None:
        of_set = _check_contrast_labels(contrast_name, contrast_labels, name, anchors, views)
    if anchors.dim() == 1:
        per_view, of_set = [_class_values(y) for y in per_view], None if of_set is None else _class_values(of_set)
        left = views.anchor_rows(per_view)
        return ClassLabels(left, left if views.are_self_contrast else views.contrast_rows(per_view, of_set))
    dtypes = [views.dtype, *(y.dtype for y in per_view), *([] if of_set is None else [of_set.dtype])]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    per_view, of_set = [y.to(dtype) for y in per_view], None if of_set is None else of_set.to(dtype)
    left = views.anchor_rows(per_view)
    return VectorLabels(left, left if views.are_self_contrast else views.contrast_rows(per_view, of_set))


def _class_values(labels: Tensor) -> Tensor:
    """Integers of all types compare by value."""
    return labels.detach() if labels.is_floating_point() else labels.to(torch.int64)


def _split_labels(name: str, labels: Tensor | Sequence[Tensor], views: _Views) -> Sequence[Tensor]:
    """One tensor (N,) or (N, C) for each view that the caller gave."""
    n, v = views.num_samples, views.num_given
    # Messages are put together only to be raised: to print a size fixes it for `torch.compile`.
    expected = f"{name} must be (N,), (N, C), (N, V, C) or a sequence of V tensors (N,) or (N, C)"
    if isinstance(labels, Tensor):
        _check_label_tensor(name, labels, v, views.device)
        if labels.dim() not in (1, 2, 3) or labels.shape[0] != n or (labels.dim() == 3 and labels.shape[1] != v):
            hint = _hint(labels.shape[0], n, v) if labels.dim() else ""
            raise ValueError(f"{expected}, with N = {n} and V = {v}; got shape {tuple(labels.shape)}{hint}")
        return labels.unbind(1) if labels.dim() == 3 else [labels] * v
    if not isinstance(labels, (tuple, list)) or not all(isinstance(view, Tensor) for view in labels):
        raise TypeError(f"{expected}; got {kind(labels)}")
    for tensor in labels:
        _check_label_tensor(name, tensor, 1, views.device)
        if tensor.dim() == 1 and not _are_comparable(tensor, labels[0]):
            raise TypeError(f"{name} must be of one dtype in all views; got {labels[0].dtype} and {tensor.dtype}")
    if len(labels) != v or any(y.dim() not in (1, 2) or y.shape[0] != n or y.shape != labels[0].shape for y in labels):
        shapes = [tuple(y.shape) for y in labels]
        raise ValueError(f"{expected}, with N = {n} and V = {v}; got {len(labels)} of shapes {shapes}")
    return labels


def _hint(num_labels: int, n: int, v: int) -> str:
    """What a wrong number of labels most likely comes from."""
    if v > 1 and num_labels == n * v:
        return "; give a label for each sample, not for each row, or a sequence of V tensors"
    if v > 1 and num_labels == v:
        return "; are the views first in features? They come second, features.transpose(0, 1)"
    if v == 1 and 1 < num_labels < n and n % num_labels == 0:
        views = n // num_labels
        return (
            f"; are views in the rows of features? Pass features.chunk({views}) if each view is one block of rows, "
            f"features.view({num_labels}, {views}, -1) if the views of a sample follow each other"
        )
    return ""


def _check_label_tensor(name: str, labels: object, num_views: int, device: torch.device) -> Tensor:
    """Classes (N,) or vectors (..., C) that can be read in one way only.

    Integers are vectors, multi-hot, if they are (N, C) with C not the number of views; whatever else they could mean is
    refused by its shape, on every device.
    """
    labels = check_tensor(name, labels, device)
    if labels.dim() < 2:
        check_values(name, labels, signed=True)
        return labels
    shown, width = f"{name} of shape {tuple(labels.shape)} and dtype {labels.dtype}", labels.shape[-1]
    if width == 0:
        raise ValueError(f"{name} has no classes; got shape {tuple(labels.shape)}")
    if width == 1:
        raise ValueError(
            f"{shown} could mean class numbers, or vectors of one class, which are all alike; use {name}.squeeze(-1) "
            f"for class numbers, torch.nn.functional.pad({name}, (0, 1)).float() for vectors"
        )
    if labels.is_floating_point():
        check_values(name, labels)
        return labels
    if labels.dim() > 2:
        raise ValueError(
            f"{shown} could mean class numbers or label vectors; for class numbers of pixels or tokens pass a row for "
            f"each in features and {name}.flatten(), for label vectors of views {name}.float()"
        )
    if 1 < width == num_views:
        raise ValueError(
            f"{shown} could mean a class number of each view or label vectors; for class numbers pass a sequence, "
            f"{name}.unbind(1), for label vectors {name}.float()"
        )
    check_values(name, labels)
    if labels.dtype != torch.bool and labels.numel() and may_look_at(labels) and extremes(labels)[1] > 1:
        raise ValueError(
            f"{shown} must be 0 or 1; the largest entry is {extremes(labels)[1]}. For counts and weights pass "
            f"{name}.float(), for class numbers of several levels the one_hot of each, side by side"
        )
    return labels


def _are_comparable(labels: Tensor, others: Tensor) -> bool:
    """Integers are by value, whatever their types; 2^24 + 1 and 2^24 are one number in float32."""
    if labels.dtype == others.dtype:
        return True
    wide = torch.uint64 in (labels.dtype, others.dtype)
    return not (labels.is_floating_point() or others.is_floating_point() or wide)


def _check_contrast_labels(
    name: str, labels: Tensor | None, anchor_name: str, anchors: Tensor, views: _Views
) -> Tensor:
    expected = (views.num_set_rows, *anchors.shape[1:])
    labels = _check_label_tensor(name, labels, 1, views.device)
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"{name} must have shape {expected}, as {anchor_name} and contrast_features ask for; "
            f"got {tuple(labels.shape)}"
        )
    if labels.dim() == 1 and not _are_comparable(labels, anchors):
        raise TypeError(f"{name} must have the dtype of {anchor_name}, {anchors.dtype}; got {labels.dtype}")
    return labels


def _similarity(weights: Tensor, views: _Views) -> Similarity:
    name = "label_similarity"
    check_tensor(name, weights, views.device)
    full = (views.num_anchors, views.num_contrast_rows)
    own = views.num_samples if views.num_contrast_views else 0
    tiled = (views.num_samples, own + views.num_set_rows)
    shape = tuple(weights.shape)
    if shape not in (full, tiled):
        raise ValueError(f"{name} must be {full}, anchors by contrasts, or {tiled}, tiled over views; got {shape}")
    check_values(name, weights)
    if shape != full:
        parts = [weights[:, :own].repeat(1, views.num_contrast_views), weights[:, own:]] if own else [weights]
        weights = torch.cat(parts, 1).repeat(views.num_anchor_views, 1)
    return Similarity(weights)


def _sample_weight(weight: Tensor | None, views: _Views) -> Tensor | None:
    if weight is None:
        return None
    name, n, v = "sample_weight", views.num_samples, views.num_given
    check_tensor(name, weight, views.device)
    if tuple(weight.shape) not in ((n,), (n, v)):
        raise ValueError(f"{name} must be (N,) or (N, V) with N = {n} and V = {v}; got shape {tuple(weight.shape)}")
    check_values(name, weight)
    return views.anchor_rows([weight] * v if weight.dim() == 1 else weight.unbind(1))


def _check_contrast_weight(weight: Tensor, ones: Tensor, views: _Views) -> tuple[Tensor, Tensor]:
    """Those of anchors, one if they have none, and of contrasts."""
    name, n, v = "contrast_weight", views.num_samples, views.num_given
    check_tensor(name, weight, views.device)
    is_of_batch, rows = views.contrast_features is None, views.num_contrast_rows
    if tuple(weight.shape) not in (((n,), (n, v)) if is_of_batch else ((rows,),)):
        expected = f"(N,) or (N, V) with N = {n} and V = {v}"
        if not is_of_batch:
            order = ", those of the batch first" if views.num_contrast_views else ""
            expected = f"({rows},), one for each contrast{order}"
        raise ValueError(f"{name} must be {expected}; got shape {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError(f"{name} gets no gradient from the loss, and asks for one: pass {name}.detach()")
    check_values(name, weight)
    given, weight = weight, weight.to(views.dtype)
    # Rounded to zero they would say that a row is not there.
    if (
        weight.dtype != given.dtype
        and may_look_at(weight)
        and not torch.equal(weight.isfinite() & (weight > 0), given > 0)
    ):
        raise ValueError(f"{name} has entries too small or too large to compute with in {views.dtype}")
    if is_of_batch:
        per_view = [weight] * v if weight.dim() == 1 else weight.unbind(1)
        return views.anchor_rows(per_view), views.contrast_rows(per_view, None)
    return ones if views.self_offset is None else weight[: views.num_anchors], weight


def _numbers_to_ignore(labels: Labels | None) -> tuple[Tensor, Tensor]:
    """The class numbers of anchors and contrasts."""
    if not isinstance(labels, ClassLabels):
        given = {VectorLabels: "label vectors", Similarity: "label_similarity"}.get(type(labels), "no labels")
        raise ValueError(
            f"ignore_index is a class number, and goes with labels (N,); got {given}: leave rows out by "
            "contrast_weight, which may be zero"
        )
    return labels.anchors, labels.contrasts
