"""Who computes the pairwise half of the loss.

- `dense` takes the equation as it stands, on whole matrices. Fastest on small batches, twice differentiable.
- `tiled` holds one tile of logits. Linear memory, fastest on all larger ones on a CPU.
- `triton` holds logits in registers. Linear memory, on NVIDIA GPUs.

Without a matrix, all that is left to compute over pairs is the row log-sum-exp without the self term,

    lse_i = log sum_{j != i + self_offset} exp(scale * anchors_i . contrasts_j),

one operator (`operator.py`) that knows nothing of labels (`genscl_loss._positives` is the other half). A backend for it
is a pair of pure functions, `row_lse` and `row_lse_grad`, in a file of its own. `choice.py` is the only place
that chooses; a backend asked for by name is used or refused, never replaced.
"""

import torch

from genscl_loss._backends import dense
from genscl_loss._backends.choice import auto_backend, available_backends, choose
from genscl_loss._backends.operator import mirrored_row_lse, row_lse
from genscl_loss._library import constant

__all__ = [
    "auto_backend",
    "available_backends",
    "choose",
    "dense",
    "float32_precision",
    "mirrored_row_lse",
    "row_lse",
]


@constant
def float32_precision(device_type: str) -> str:
    """How exact products of float32 numbers have to be: "highest", "high" or "medium", as torch was told.

    It can be told by `torch.set_float32_matmul_precision`, or, since torch 2.9, for each library that multiplies; the
    second way sees what the first one sets, and asking the first way raises once the second was used. A compiled graph
    is traced anew when either changes.
    """
    library = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device_type)
    told = getattr(getattr(library, "matmul", None), "fp32_precision", None)
    if not isinstance(told, str):
        return torch.get_float32_matmul_precision()
    return {"tf32": "high", "bf16": "medium"}.get(told, "highest")
