"""The pairwise half and the label half of the loss where the contrasts of an anchor are those of all processes.

Rows of all processes are gathered, N_global D numbers, and each process looks at its own anchors only. What comes back:

- In a self-contrast, where each contrast is an anchor of its owner, nothing but two or three numbers of each anchor:
  logits are symmetric, so the owner can work out for itself what its rows did as contrasts of others.
- Otherwise the gradients of the contrasts, if they have any, summed over the processes.

Label vectors stay where they are: a class needs sum_j b_jc [z_j, 1] from each process, C (D + 1) numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from genscl_loss._backends import mirrored_row_lse, row_lse
from genscl_loss._batch import Batch
from genscl_loss._distributed import Members, gather, gather_with_gradient, sum_over
from genscl_loss._library import matmul
from genscl_loss._likelihood import log_likelihood, no_log_likelihoods
from genscl_loss._positives import (
    ClassLabels,
    Labels,
    Similarity,
    VectorLabels,
    has_gradient,
    mirrored_positives,
    positives,
    similarity_matrix,
)
from genscl_loss._unit import unit_pair, unit_rows


def facts(batch: Batch) -> dict[str, object]:
    """What all processes of a group must have in common: else they would communicate at cross purposes."""
    contrasts, weight = batch.contrasts, batch.sample_weight
    return {
        "views of features": batch.num_views,
        "D of features": batch.anchors.shape[1],
        "dtype of features": batch.feature_dtype,
        "gradient of features": _has_gradient(batch.anchors),
        "gradient of contrasts": contrasts is not None and _has_gradient(contrasts),
        "labels": _describe(batch.labels),
        "teacher_labels": batch.teacher_labels and _describe(batch.teacher_labels),
        "sample_weight": None if weight is None else "with gradient" if _has_gradient(weight) else "given",
        "normalize": batch.normalize,
    }


def _has_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _describe(labels: Labels) -> str:
    if isinstance(labels, VectorLabels):
        sides = [side for side in ("anchors", "contrasts") if _has_gradient(getattr(labels, side))]
        gradient = f", with gradient of {' and '.join(sides)}" if sides else ""
        return f"vectors of {labels.anchors.shape[1]} classes{gradient}"
    if isinstance(labels, ClassLabels):
        return "none" if labels.are_numbers else f"class numbers, {labels.anchors.dtype}"
    raise ValueError("label_similarity cannot be combined with group: it has no columns for the rows of others")


def global_log_likelihoods(
    batch: Batch, scale: Tensor, members: Members, counts: Sequence[int], *, precision: str, backend: str
) -> list[tuple[Tensor, Tensor]]:
    """sum_j w_ij log p_ij and W_i of each anchor of this process, for the labels and for the teacher's.

    Args:
        batch: Of this process.
        scale: 0-dim, one over the temperature.
        members: The processes.
        counts: How many contrasts each of them brings.
        precision: As in `genscl_loss._backends.row_lse`.
        backend: As there.
    """
    z, others = unit_pair(batch.anchors, batch.contrasts, batch.normalize)
    first = sum(counts[: members.rank])
    offset = None if batch.self_offset is None else first + batch.self_offset
    if sum(counts) <= (offset is not None):
        return no_log_likelihoods(z, others, scale, len(batch.all_labels))
    is_mirrored = others is None and backend != "dense"
    every = _gather_contrasts(batch, z if others is None else others, counts, members, is_mirrored)

    def share(numbers: Tensor) -> Tensor:
        return gather(numbers, counts, members)

    weight = None if batch.contrast_weight is None else share(batch.contrast_weight)
    unit = batch.normalize
    if is_mirrored:
        lse = mirrored_row_lse(
            z, every, scale, first, share, unit=unit, precision=precision, backend=backend, weight=weight
        )
    else:
        lse = row_lse(z, every, scale, offset, unit=unit, precision=precision, backend=backend, weight=weight)
    likelihoods = []
    for labels in batch.all_labels:
        if isinstance(labels, VectorLabels):
            alignment, mass = _positives_by_exchange(z, others, labels, batch.self_offset, members, backend)
        elif isinstance(labels, ClassLabels):
            classes = _classes_of_all(labels, first, counts, members)
            if is_mirrored:
                alignment, mass = mirrored_positives(z, every, classes, first, share)
            else:
                alignment, mass = _positives_here(z, every, classes, offset, backend)
        likelihoods.append((log_likelihood(alignment, mass, lse, scale), mass))
    return likelihoods


def _gather_contrasts(
    batch: Batch, contrasts: Tensor, counts: Sequence[int], members: Members, is_mirrored: bool
) -> Tensor:
    """The contrasts of all processes, of unit length if asked for."""
    if _has_gradient(contrasts) and not is_mirrored:
        return gather_with_gradient(contrasts, counts, members)
    if batch.feature_dtype == contrasts.dtype:
        return gather(contrasts, counts, members)
    rows = batch.anchors if batch.contrasts is None else batch.contrasts  # half precision: half the bytes
    every = gather(rows.to(batch.feature_dtype), counts, members).to(contrasts.dtype)
    return unit_pair(every, None, batch.normalize)[0]


def _positives_here(
    z: Tensor, contrasts: Tensor | None, labels: Labels, self_offset: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """`positives`, with second derivatives on the backend that has them."""
    if backend == "dense":
        return positives(z, contrasts, Similarity(similarity_matrix(labels, self_offset, z.dtype)), None)
    return positives(z, contrasts, labels, self_offset)


def _positives_by_exchange(
    z: Tensor, others: Tensor | None, labels: VectorLabels, self_offset: int | None, members: Members, backend: str
) -> tuple[Tensor, Tensor]:
    """What `positives` returns, over the contrasts of all processes.

    Sums by class are exchanged, and the self term is left out where it is: little may remain of a sum without it.
    """
    x = z if others is None else others
    here = matmul(unit_rows(labels.contrasts).T.to(x.dtype), torch.cat([x, x.new_ones(x.shape[0], 1)], 1)).double()
    total = sum_over(here, members)
    if self_offset is not None:  # those of others; `positives` knows how to leave the self term out of the rest
        total = total - here
    p = matmul(unit_rows(labels.anchors).to(z.dtype), total.to(z.dtype))
    alignment, mass = (z * p[:, :-1]).sum(1), p[:, -1]
    if self_offset is not None:
        alignment_here, mass_here = _positives_here(z, others, labels, self_offset, backend)
        alignment, mass = alignment + alignment_here, mass + mass_here
    return alignment, mass if has_gradient(labels) else mass.detach()


def _classes_of_all(labels: ClassLabels, first: int, counts: Sequence[int], members: Members) -> ClassLabels:
    """Classes of the anchors of this process and of the contrasts of all."""
    a, b, are_numbers, there = labels
    there = None if there is None else gather(there, counts, members)
    if are_numbers:  # of samples: those of other processes are others
        a, b = a + first, b + first
    dtype = torch.float64 if a.is_floating_point() else torch.int64
    return ClassLabels(a.to(dtype), gather(b.to(dtype), counts, members), are_numbers, there)
