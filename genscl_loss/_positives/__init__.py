"""The half of the loss about labels: how much each anchor is aligned with its positives.

For rows z_i and the similarity of labels w (`labels.py`) the loss needs, of each anchor,

    alignment_i = z_i . sum_{j != i} w_ij z_j    and the positive mass    W_i = sum_{j != i} w_ij,

and no matrix w: one operator (`operator.py`) that knows nothing of temperatures or exponentials, which are the other
half (`genscl_loss._backends`). An implementation is a pair of pure functions in a file of its own, as `align` and
`align_grad` are, and those of `fused.py` in Triton kernels. `sums.py` has four
ways to sum over positives; `alignment.py` takes the cheapest that is exact.
"""

from genscl_loss._positives.alignment import Labelled, align, align_grad
from genscl_loss._positives.labels import (
    ClassLabels,
    Labels,
    Similarity,
    VectorLabels,
    has_gradient,
    num_classes,
    similarity_matrix,
)
from genscl_loss._positives.operator import compared, labelled, mirrored_positives, positives

__all__ = [
    "ClassLabels",
    "Labelled",
    "Labels",
    "Similarity",
    "VectorLabels",
    "align",
    "align_grad",
    "compared",
    "has_gradient",
    "labelled",
    "mirrored_positives",
    "num_classes",
    "positives",
    "similarity_matrix",
]
