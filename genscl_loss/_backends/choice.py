"""The only place that chooses a backend.

"auto" takes the faster of the dense equation and the best backend of linear memory, by a small model of time. Both take
matrix products, both look at every logit, and either has operations whose number does not depend on sizes:

    dense     call + logit A M + row (A + M) (D + C) + product A M (2 D + C)
    linear    the same, with constants of its own, and product (2 A M D + labels), in small matrices

in a self-contrast, whose gradient is one product with a symmetric matrix (or two narrow ones). Labels cost
3 (A + M) C D products there, or what pairs cost, 3 A M (C + D), if that is less. Matrices of the dense equation are
taken while they are small, or not much larger than features and labels are; beyond a cache their logits count twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from genscl_loss._backends import fused
from genscl_loss._backends.plans import MAX_FEATURES
from genscl_loss._checks import is_transformed
from genscl_loss._choices import BACKENDS
from genscl_loss._library import constant, is_exporting

_MATRICES = 7  # halves of a matrix that the dense equation holds at its peak
_CACHED = 2**21  # logits of a matrix that stays in cache, or nearly
_SMALL = 2**26  # bytes of them that never matter
_SHARE = 8  # of the bytes of rows and label vectors, that they may take beyond


@dataclass(frozen=True)
class Costs:
    """Picoseconds, whole numbers: a compiler follows them through symbolic sizes."""

    dense_call: int
    dense_logit: int  # all passes over a matrix entry, forward and backward
    dense_row: int  # a number of a row or a label vector
    dense_product: int  # a thousand multiplications and additions of a matrix product
    linear_call: int
    linear_logit: int
    linear_row: int
    linear_product: int


# CPU: `python benchmarks/fit_choice.py` on two cores of an AMD EPYC (AVX2), torch 2.13.0; with AVX-512 most were within
# a third of these. CUDA: estimates from the number of launches and the rates of an H100, none of them measured.
_COSTS = {
    "cpu": {
        torch.float32: Costs(700_000_000, 8_000, 2_200, 14_500, 2_300_000_000, 3_500, 8_500, 20_000),
        torch.float64: Costs(700_000_000, 15_000, 4_000, 27_000, 2_400_000_000, 4_500, 14_500, 42_000),
    },
    "cuda": {
        torch.float32: Costs(110_000_000, 25, 10, 40, 200_000_000, 2, 20, 40),
        torch.float64: Costs(110_000_000, 50, 20, 40, 200_000_000, 40, 40, 40),
    },
}


@dataclass(frozen=True)
class Sizes:
    """What time depends on. Sizes may be symbolic."""

    anchors: int  # A
    contrasts: int  # M
    features: int  # D
    classes: int  # C of label vectors, of all of them together; 0 for class numbers
    is_self: bool  # contrasts are the anchors
    dtype: torch.dtype
    device: str

    @property
    def _passes(self) -> int:
        """Times that labels meet features: forward, and for gradients, which separate contrasts seldom have."""
        return 3 if self.is_self else 2

    @property
    def numbers(self) -> int:
        """Of rows and label vectors."""
        rows = self.anchors if self.is_self else self.anchors + self.contrasts
        return rows * (self.features + self.classes)

    def dense_work(self) -> tuple[int, int]:
        """Logits, each twice where matrices leave the cache, and thousands of products."""
        pairs = self.anchors * self.contrasts
        passes = 1 if pairs <= _CACHED else 2
        return passes * pairs, pairs * (2 * self.features + self.classes) // 1000

    def linear_work(self) -> tuple[int, int]:
        """Logits, and thousands of products."""
        a, m, d, c = self.anchors, self.contrasts, self.features, self.classes
        pairs, labels = a * m, (a + m) * c * d  # sums by class, or, where these are more, by pairs
        if labels > pairs * (c + d):
            labels = pairs * (c + d)
        # A tile of a self-contrast serves both its sides.
        logits, products = (pairs, 2 * pairs * d) if self.is_self else (2 * pairs, 3 * pairs * d)
        return logits, (products + self._passes * labels) // 1000

    def dense_is_best(self) -> bool:
        """Whether the dense equation is faster than a backend of linear memory, and not too large."""
        costs = _COSTS.get(self.device, _COSTS["cpu"])[self.dtype]
        itemsize = 8 if self.dtype == torch.float64 else 4
        matrices = _MATRICES * itemsize * self.anchors * self.contrasts // 2
        if matrices > _SMALL and matrices > _SHARE * itemsize * self.numbers:
            return False
        dense_logits, dense_products = self.dense_work()
        linear_logits, linear_products = self.linear_work()
        dense = costs.dense_call + costs.dense_logit * dense_logits + costs.dense_row * self.numbers
        linear = costs.linear_call + costs.linear_logit * linear_logits + costs.linear_row * self.numbers
        return dense + costs.dense_product * dense_products <= linear + costs.linear_product * linear_products


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
    missing = {"auto"} if fused.unavailable(device) is None else {"auto", "triton"}
    return tuple(name for name in BACKENDS if name not in missing)


def auto_backend(
    num_anchors: int,
    num_contrasts: int | None = None,
    *,
    num_features: int,
    num_classes: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> str:
    """The backend that `backend="auto"` takes for a batch of such sizes.

    Args:
        num_anchors: A, samples times views.
        num_contrasts: M, rows of `contrast_features`; None: the anchors are contrasted with each other.
        num_features: D.
        num_classes: C of label vectors; 0 for class numbers, and without labels. With a teacher, the sum of both.
        dtype: Of the computation: float64, or float32 for everything else.
        device: Of the features.

    Returns:
        One of `available_backends()`.

    Raises:
        ValueError: A number is negative.

    Example:
        >>> auto_backend(128, num_features=128, num_classes=100)
        'dense'
        >>> auto_backend(8192, num_features=128, num_classes=100)
        'tiled'
    """
    for name, number in (
        ("num_anchors", num_anchors),
        ("num_contrasts", num_contrasts or 0),
        ("num_features", num_features),
        ("num_classes", num_classes),
    ):
        if number < 0:
            raise ValueError(f"{name} must be >= 0; got {number}")
    where = torch.device(device)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    is_self = num_contrasts is None
    contrasts = max(num_anchors - 1, 0) if num_contrasts is None else num_contrasts  # each anchor but itself
    sizes = Sizes(num_anchors, contrasts, num_features, num_classes, is_self, computed, where.type)
    return "dense" if sizes.dense_is_best() else _linear(computed, num_features, where)


def choose(
    backend: str,
    anchors: Tensor,
    num_contrasts: int,
    num_classes: int = 0,
    *,
    is_self: bool = True,
    may_be_dense: bool = True,
) -> str:
    """Resolve "auto" as `auto_backend` does; refuse another of `BACKENDS` if it cannot be used."""
    num_anchors, num_features = anchors.shape
    if backend != "dense" and may_be_dense and is_transformed():
        if backend == "auto":
            return "dense"
        raise RuntimeError(
            f'backend "{backend}" has no rules for transforms of torch.func (grad, jacrev, vmap, forward-mode jvp); '
            f'pass backend="dense" there'
        )
    if backend == "auto":
        sizes = Sizes(
            num_anchors, num_contrasts, num_features, num_classes, is_self, anchors.dtype, anchors.device.type
        )
        if may_be_dense and not _is_symbolic(num_anchors, num_contrasts) and sizes.dense_is_best():
            return "dense"
        return _linear(anchors.dtype, num_features, anchors.device)
    if backend == "triton" and (reason := _why_not_triton(anchors.dtype, num_features, anchors.device)) is not None:
        raise ValueError(f'backend "triton" cannot be used here: {reason}; "auto" takes another one')
    return backend


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


def _linear(dtype: torch.dtype, num_features: int, device: torch.device) -> str:
    """The backend of linear memory."""
    return "triton" if device.type == "cuda" and _why_not_triton(dtype, num_features, device) is None else "tiled"


def _why_not_triton(dtype: torch.dtype, num_features: int, device: torch.device) -> str | None:
    if dtype != torch.float32:
        return f"it computes in float32, and the features ask for {dtype}"
    if num_features > MAX_FEATURES:
        return f"it takes up to {MAX_FEATURES} features in a row; got {num_features}"
    reason: str | None = _unavailable(device)
    return reason


def _is_symbolic(*sizes: int) -> bool:
    """Whether an exported program is to serve other sizes too. Traced by Dynamo, a size does not tell."""
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return True
    return is_exporting() and torch.compiler.is_dynamo_compiling()


_unavailable = constant(fused.unavailable)
