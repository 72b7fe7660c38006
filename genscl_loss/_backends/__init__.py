"""Who computes the pairwise half of the loss.

- `dense` takes the equation as it stands, on whole matrices. Fastest on small batches, twice differentiable.
- `tiled` holds one tile of logits. Linear memory, fastest on all larger ones on a CPU.
- `triton` holds logits in registers. Linear memory, on NVIDIA GPUs.

Without a matrix, all that is left to compute over pairs is the row log-sum-exp without the self term,

    lse_i = log sum_{j != i + self_offset} exp(scale * anchors_i . contrasts_j),

one operator (`operator.py`) that knows nothing of labels (`genscl_loss._positives` is the other half). A backend of
linear memory is a file of pure functions, `row_lse`, `row_lse_grad` and what goes with them where contrasts are
anchors of other processes; `operator.py` states them and has a table of the files. `choice.py` is the only place that
chooses; a backend asked for by name is used or refused, never replaced.
"""

from genscl_loss._backends import dense
from genscl_loss._backends.choice import auto_backend, available_backends, choose, float32_precision
from genscl_loss._backends.operator import (
    diagonals,
    fake_row_lse,
    mirrored_row_lse,
    no_second_derivative,
    pure_row_lse,
    pure_row_lse_grad,
    row_lse,
    scale_grad,
)

__all__ = [
    "auto_backend",
    "available_backends",
    "choose",
    "dense",
    "diagonals",
    "fake_row_lse",
    "float32_precision",
    "mirrored_row_lse",
    "no_second_derivative",
    "pure_row_lse",
    "pure_row_lse_grad",
    "row_lse",
    "scale_grad",
]
