"""What to look at beside the loss."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genscl_loss._batch import Batch, make_batch
from genscl_loss._checks import check_bool, check_index, check_number
from genscl_loss._choices import ContrastMode
from genscl_loss._library import without_autocast
from genscl_loss._positives import ClassLabels, Labels, Similarity
from genscl_loss._unit import unit_pair, unit_rows

_TILE = 1024  # edge of what is compared at once

# For two slices, of anchors and of contrasts, which pairs are positive.
Pairs = Callable[[slice, slice], Tensor]


@torch.no_grad()
def contrastive_accuracy(
    features: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor] | None = None,
    *,
    label_similarity: Tensor | None = None,
    contrast_mode: ContrastMode = "all",
    contrast_features: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    include_batch: bool = False,
    contrast_weight: Tensor | None = None,
    ignore_index: int | None = None,
    normalize: bool = True,
    min_similarity: float = 0.0,
) -> Tensor:
    r"""Share of anchors whose nearest contrast is a positive: the accuracy of a nearest-neighbour classifier.

    With the similarities :math:`z_i \cdot z_j` and the label similarities :math:`w_{ij}` of `gen_supcon_loss`, contrast
    j is a positive of anchor i if :math:`w_{ij} > w_{\min}`, and the anchor counts as right if

    .. math::
        \max_{j : w_{ij} > w_{\min}} z_i \cdot z_j \; > \; \max_{j : w_{ij} \le w_{\min}} z_i \cdot z_j,

    j running over its contrasts, itself left out. A tie is wrong: a collapsed model, whose embeddings are all equal,
    has accuracy 0, up to rounding. Anchors without any positive can be neither right nor wrong, and are left out of the
    share. The temperature plays no part. Memory is linear in the number of rows. There is no gradient, and a GPU is not
    waited for. Of several processes, each has the accuracy of its own rows.

    Args:
        features: (N, D), (N, V, ...) or a sequence of V tensors (N, D), as in `gen_supcon_loss`, and so are the
            following.
        labels: (N,), (N, C), (N, V, C), a sequence of V tensors, or None.
        label_similarity: (N, N) or (anchors, contrasts), instead of labels.
        contrast_mode: "all", "one" or "first".
        contrast_features: (M, D).
        contrast_labels: (M,) or (M, C).
        include_batch: Whether the batch is contrasted with, too.
        contrast_weight: A row of weight zero is not there, neither as anchor nor as contrast; other weights do not
            matter here.
        ignore_index: A class whose rows are not there.
        normalize: Compare by cosine; otherwise by inner product.
        min_similarity: w_min in [0, 1]: what the similarity of labels has to exceed. Mixed and smoothed labels, and a
            teacher's, are similar to all others a little: 0.5 is a sensible limit for those. With class numbers every
            value below 1 says the same.

    Returns:
        0-dim, float32 or float64; NaN if no anchor has a positive, or if features have NaN or infinite entries.

    Raises:
        ValueError: As `gen_supcon_loss`, or `min_similarity` is out of range.
        TypeError: As `gen_supcon_loss`, or `min_similarity` is not a number.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.6]])
        >>> contrastive_accuracy(features, torch.tensor([0, 0, 1, 0]))  # nothing else is of class 1: it does not count
        tensor(0.6667)

    References:
        - Khosla et al., "Supervised Contrastive Learning", https://arxiv.org/abs/2004.11362
    """
    limit = check_number("min_similarity", min_similarity, at_most=1.0)
    batch = make_batch(
        features,
        labels,
        label_similarity=label_similarity,
        contrast_mode=contrast_mode,
        contrast_features=contrast_features,
        contrast_labels=contrast_labels,
        include_batch=check_bool("include_batch", include_batch),
        teacher_labels=None,
        contrast_teacher_labels=None,
        sample_weight=None,
        contrast_weight=contrast_weight,
        ignore_index=check_index("ignore_index", ignore_index),
        normalize=check_bool("normalize", normalize),
    )
    z, others = unit_pair(batch.anchors, batch.contrasts, batch.normalize)
    others = z if others is None else others
    with without_autocast(z.device):
        nearest = _nearest(z, others, batch, _pairs(batch.labels, limit))
    has_positives = nearest[0] != -math.inf
    if batch.sample_weight is not None:  # zero of anchors that are not there, one of the others
        has_positives &= batch.sample_weight > 0
    right = (nearest[0] > nearest[1]) & has_positives
    share = right.sum().to(z.dtype) / has_positives.sum()
    return share + (z * 0).sum() + (others * 0).sum()  # NaN if an entry is not finite, which comparisons would hide


def _pairs(labels: Labels, limit: float) -> Pairs:
    if isinstance(labels, Similarity):
        weights = labels.weights
        return lambda rows, cols: weights[rows, cols] > limit
    if isinstance(labels, ClassLabels):
        a, b = labels.anchors, labels.contrasts
        equal = limit < 1
        return lambda rows, cols: (a[rows, None] == b[cols]) & equal
    left, right = unit_rows(labels.anchors), unit_rows(labels.contrasts)
    return lambda rows, cols: left[rows] @ right[cols].T > limit


def _nearest(z: Tensor, others: Tensor, batch: Batch, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Similarity of each anchor to its nearest positive and to its nearest other contrast; -inf if there is none."""
    nearest = z.new_full((2, len(z)), -math.inf)
    self_offset, weight = batch.self_offset, batch.contrast_weight
    absent = None if weight is None else weight == 0
    for rows in _slices(len(z)):
        for cols in _slices(len(others)):
            similarity = z[rows] @ others[cols].T
            if self_offset is not None:
                diagonal = rows.start + self_offset - cols.start
                if -similarity.shape[0] < diagonal < similarity.shape[1]:
                    similarity.diagonal(diagonal).fill_(-math.inf)
            if absent is not None:
                similarity.masked_fill_(absent[cols], -math.inf)
            positive = pairs(rows, cols)
            for best, hidden in zip(nearest[:, rows], (~positive, positive), strict=True):
                torch.maximum(best, similarity.masked_fill(hidden, -math.inf).amax(1), out=best)
    return nearest[0], nearest[1]


def _slices(size: int) -> list[slice]:
    return [slice(start, min(start + _TILE, size)) for start in range(0, size, _TILE)]
