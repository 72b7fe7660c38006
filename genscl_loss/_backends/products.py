"""Matrix products of tiles, by the faster of the two libraries that torch has on a CPU.

`torch.mm` goes to BLAS, and MKL, the usual one, leaves the AVX-512 units of CPUs that are not Intel's idle: on an AMD
EPYC oneDNN multiplies tiles of 512 rows at twice its rate. oneDNN is reached through the operator that torch's own
compiler uses for linear layers. It is internal to torch, so it is tried once against `torch.mm` and left alone if
anything is off.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_SHORTEST = 32  # entries of a row; below, oneDNN's preparations take longer than the product


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return a @ b, (m, k) by (k, n), where b is the transpose of a contiguous matrix; `out` may or may not hold it."""
    linear = _linear() if _suits(a) else None
    return torch.mm(a, b, out=out) if linear is None else linear(a, b.T)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total, (m, k) by (k, n), all contiguous."""
    linear = _linear() if _suits(total) else None
    if linear is None:
        total.addmm_(a, b)
    else:
        total += linear(a, b.T)


def _suits(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.shape[1] >= _SHORTEST


@cache
def _linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """(x, weight) -> x @ weight.T by oneDNN, or None where it is absent, slower or not what it was."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        return y

    try:
        x = torch.arange(160, dtype=torch.float32).reshape(5, 32)
        works = torch.equal(linear(x, x[1:]), x @ x[1:].T)  # small integers: exact in any order
    except Exception:  # whatever an internal operator of another torch release may raise
        return None
    return linear if works else None
