"""The half of the loss about labels: how much each anchor is aligned with its positives.

For rows z_i and the similarity of labels w (`labels.py`) the loss needs, of each anchor,

    alignment_i = z_i . sum_{j != i} w_ij z_j    and the positive mass    W_i = sum_{j != i} w_ij,

and no matrix w: one operator (`operator.py`) that knows nothing of temperatures or exponentials, which are the other
half (`genscl_loss._backends`). `alignment.py` has the pair of pure functions, `align` and `align_grad`, which take the
cheapest of four ways to sum over positives (`sums.py`) that is exact. `fused.py` is that pair in Triton kernels, with
what these share with the kernels of the other half: `_linear_fused.py` calls it, where `suits` says that it may.
"""

from genscl_loss._positives.alignment import align, align_grad
from genscl_loss._positives.labels import (
    ClassLabels,
    Labels,
    Similarity,
    VectorLabels,
    has_gradient,
    num_classes,
    similarity_matrix,
)
from genscl_loss._positives.operator import labelled, mirrored_positives, numbered_by_kernel, positives

__all__ = [
    "ClassLabels",
    "Labels",
    "Similarity",
    "VectorLabels",
    "align",
    "align_grad",
    "has_gradient",
    "labelled",
    "mirrored_positives",
    "num_classes",
    "numbered_by_kernel",
    "positives",
    "similarity_matrix",
]
