"""Who computes the pairwise half of the loss.

- `dense` takes the equation as it stands, on whole matrices. Fastest on small batches, twice differentiable.
- `tiled` holds one tile of logits. Linear memory, fastest on all larger ones on a CPU.
- `triton` holds logits in registers. Linear memory, on NVIDIA GPUs.

Without a matrix, all that is left to compute over pairs is the row log-sum-exp without the self term,

    lse_i = log sum_{j != i + self_offset} exp(scale * anchors_i . contrasts_j),

one operator (`operator.py`) that knows nothing of labels (`genscl_loss._attract` is the other half). A backend for it
is a pair of pure functions, `row_lse` and `row_lse_grad`, in a file of its own. `choose` is the only place that
chooses; a backend asked for by name is used or refused, never replaced.
"""

from typing import Any

import torch
from torch import Tensor

from genscl_loss._backends import dense, fused
from genscl_loss._backends.operator import mirrored_row_lse, row_lse
from genscl_loss._backends.plans import MAX_FEATURES
from genscl_loss._choices import BACKENDS

__all__ = [
    "available_backends",
    "choose",
    "dense",
    "float32_precision",
    "mirrored_row_lse",
    "row_lse",
]

# Logits up to which both halves of the loss sharing each pass outweigh the memory traffic. On a GPU small batches cost
# the launches of their kernels, and the dense equation has the fewest. Found by measuring on a CPU, estimated on GPUs.
_DENSE_AT_MOST = {"cpu": 2**18, "cuda": 2**20}


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` accepts, besides "auto".

    "triton" is among them if there is an NVIDIA GPU that it runs on; it takes GPU tensors only.

    Returns:
        The names, the reference first.

    Example:
        >>> available_backends()
        ('dense', 'tiled'...)
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return BACKENDS[1:] if fused.unavailable(device) is None else BACKENDS[1:-1]


def choose(backend: str, anchors: Tensor, num_contrasts: int, *, may_be_dense: bool = True) -> str:
    """Resolve "auto" by the number of logits; refuse another of `BACKENDS` if it cannot be used."""
    if backend == "auto":
        limit = _DENSE_AT_MOST.get(anchors.device.type, _DENSE_AT_MOST["cpu"])
        if may_be_dense and anchors.shape[0] * num_contrasts <= limit:
            return "dense"
        return "triton" if anchors.is_cuda and _why_not_triton(anchors) is None else "tiled"
    if backend == "triton" and (reason := _why_not_triton(anchors)) is not None:
        raise ValueError(f'backend "triton" cannot be used here: {reason}; "auto" takes another one')
    return backend


def _why_not_triton(anchors: Tensor) -> str | None:
    if anchors.dtype != torch.float32:
        return f"it computes in float32, and the features ask for {anchors.dtype}"
    if anchors.shape[1] > MAX_FEATURES:
        return f"it takes up to {MAX_FEATURES} features in a row; got {anchors.shape[1]}"
    reason: str | None = _unavailable(anchors.device)
    return reason


def _constant(function: Any) -> Any:
    """Have `torch.compile` take the result as it is while tracing.

    What `torch.compiler.assume_constant_result` does, without importing the compiler.
    """
    function._dynamo_marked_constant = True
    return function


_unavailable = _constant(fused.unavailable)


@_constant
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
