"""Registration with torch: every operator of the package is made here, and so has the same three properties.

It is opaque to `torch.compile` and `torch.export` (shapes come from a fake kernel), its derivative is an explicit
formula, and autocast is off inside both: similarities computed in half precision by accident cost two digits of the
gradient.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])
_library: Any = torch.library.Library("genscl_loss", "DEF")  # type: ignore[no-untyped-call]


def _autocast_is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # torch knows no autocast for meta tensors


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products keep their dtype, also inside a caller's autocast region."""
    if _autocast_is_on(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def define_operator(
    name: str,
    signature: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Register `genscl_loss::name` for every device.

    Args:
        name: Name of the operator.
        signature: Arguments and results in torch's schema language; the first argument is a tensor.
        kernel: Computes the result; writes to none of its arguments and returns none of them.
        fake: Returns an empty tensor of the result's shape, dtype and strides.
        setup_context: Saves what `backward` needs, at least one tensor, as in `torch.autograd.Function`.
        backward: The derivative, as in `torch.autograd.Function`.

    Returns:
        The operator, callable on tensors.
    """
    qualified = f"genscl_loss::{name}"
    _library.define(name + signature)
    _library.impl(name, _autocast_off(kernel, lambda first, *_: first.device), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(
        qualified,
        _autocast_off(backward, lambda ctx, *_: ctx.saved_tensors[0].device),
        setup_context=setup_context,
        lib=_library,
    )
    operator: Callable[..., Any] = getattr(torch.ops.genscl_loss, name).default
    return operator


def _autocast_off(function: _Function, device_of: Callable[..., torch.device]) -> _Function:
    @wraps(function)
    def run(*args: Any) -> Any:
        with _without_autocast(device_of(*args)):
            return function(*args)

    return run  # type: ignore[return-value]  # same signature, which `wraps` cannot express


def has_fast_float64(device: torch.device) -> bool:
    """Whether sums in float64 cost about what they cost in float32: true for CPUs and data-centre GPUs.

    Consumer GPUs run float64 at 1/64 of the rate and some devices (MPS) have none.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) in {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
    return device.type in {"cpu", "meta"}


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product a @ b, in both directions in the dtype that they have, whatever autocast says."""
    product: Tensor = _matmul(a, b) if _autocast_is_on(a.device) else a @ b
    return product


def _matmul_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    return _matmul(grad, b.T) if need_a else None, _matmul(a.T, grad) if need_b else None


_matmul = define_operator(
    "matmul",
    "(Tensor a, Tensor b) -> Tensor",
    kernel=lambda a, b: a @ b,
    fake=lambda a, b: a.new_empty(a.shape[0], b.shape[1]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=_matmul_derivative,
)
