"""Registration with torch: every operator of the package is made here, and so has the same three properties.

It is opaque to `torch.compile` and `torch.export` (shapes come from a fake kernel), its derivative is an explicit
formula, and autocast is off inside both: similarities computed in half precision by accident cost two digits of the
gradient.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _new_library() -> tuple[str, Any]:
    """A namespace for operators and the library that defines them; another one for each copy that is imported."""
    for number in range(1, 100):
        namespace = "genscl_loss" if number == 1 else f"genscl_loss_{number}"
        try:
            # torch leaves this class without types, as it does `autograd.Function.apply` and a few others.
            return namespace, torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
        except RuntimeError:  # taken: a namespace has one library that defines it
            continue
    raise ImportError("genscl_loss cannot register its operators: 99 copies of it are loaded")


_namespace, _library = _new_library()


def _autocast_is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # torch knows no autocast for meta tensors


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products keep their dtype, also inside a caller's autocast region."""
    if _autocast_is_on(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which kernels are launched on this device, not on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Of every launch of a Triton kernel. Fused multiply-adds are asked for by name: Triton 3.9 warns that 3.10 will make
# none unasked.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}


def define_operator(
    name: str,
    signature: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an operator of the package for every device.

    Args:
        name: Name of the operator.
        signature: Arguments and results in torch's schema language; the first argument is a tensor. Those in a list of
            tensors have no gradient.
        kernel: Computes the result; writes to none of its arguments and returns none of them.
        fake: Returns an empty tensor of the result's shape, dtype and strides.
        setup_context: Saves what `backward` needs, as in `torch.autograd.Function`.
        backward: The derivative, as in `torch.autograd.Function`. None: it is called without gradients only.

    Returns:
        The operator, callable on tensors.
    """
    qualified = f"{_namespace}::{name}"

    def run_kernel(*args: Any) -> Any:
        with without_autocast(args[0].device):
            return kernel(*args)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.device = inputs[0].device
        ctx.lists = {k: len(x) for k, x in enumerate(inputs) if isinstance(x, list) and x and isinstance(x[0], Tensor)}
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def run_backward(ctx: Any, *grads: Any) -> Any:
        if any(map(is_batched, grads)):
            raise RuntimeError('several gradients at a time (is_grads_batched, vectorize) need backend="dense"')
        with without_autocast(ctx.device):
            return None if backward is None else backward(ctx, *grads)

    def run_registered_backward(ctx: Any, *grads: Any) -> Any:
        """Torch wants a gradient for each tensor of a list here, and one for the list of a function."""
        results = run_backward(ctx, *grads)
        if not ctx.lists:
            return results
        return tuple([None] * ctx.lists[k] if k in ctx.lists else grad for k, grad in enumerate(results))

    _library.define(name + signature)
    _library.impl(name, run_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, run_registered_backward, setup_context=save, lib=_library)
    operator = getattr(getattr(torch.ops, _namespace), name).default

    return _shortest_way(operator, run_kernel, None if backward is None else _function(run_kernel, save, run_backward))


def _shortest_way(
    operator: Callable[..., Any], kernel: Callable[..., Any], function: Callable[..., Any] | None
) -> Callable[..., Any]:
    """The operator; or, where nobody would notice, the function with its derivative, or, without gradients, the kernel.

    Through the dispatcher a call takes three times as long, which is most of the time of a small batch.
    """

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(args)
        if not _are_plain(args):
            return operator(*args)
        if function is not None and torch.is_grad_enabled():
            return function(*args)
        with torch.no_grad():
            return kernel(*args)

    return call


def _function(
    kernel: Callable[..., Any], setup_context: Callable[..., None], derivative: Callable[..., Any]
) -> Callable[..., Any]:
    """A kernel with its derivative, as registered with the operator."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = kernel(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return derivative(ctx, *grads)

    apply: Callable[..., Any] = Direct.apply
    return apply


def _are_plain(args: tuple[Any, ...]) -> bool:
    """Whether tensors are just that, and nobody records or transforms what happens to them."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    tensors = [x for value in args for x in (value if type(value) is list else (value,)) if isinstance(x, Tensor)]
    return all(type(x) in _PLAIN and x.device.type != "meta" for x in tensors)


_PLAIN = {Tensor, torch.nn.Parameter}


def _refuse_tangents(args: tuple[Any, ...]) -> None:
    """Raise where forward-mode differentiation would pass an operator by and take its derivative for zero."""
    if any(isinstance(value, Tensor) and has_tangent(value) for value in args):
        raise RuntimeError(
            'forward-mode differentiation of the loss needs backend="dense", outside autocast; reverse mode does not'
        )


def has_tangent(tensor: Tensor) -> bool:
    """Whether it is differentiated in forward mode."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    unpack: Any = forward_ad.unpack_dual
    return unpack(tensor).tangent is not None


def only_once(result: Tensor, message: str, *outputs: Tensor) -> Tensor:
    """Make the derivative of a gradient raise, instead of passing by what the gradient was computed from.

    Args:
        result: The gradient, in the backward pass of an `torch.autograd.Function`.
        message: What to raise.
        outputs: Results of its forward pass, through which a second derivative reaches all that they depend on.
    """
    once: Tensor = _Once.apply(result, message, *outputs) if torch.is_grad_enabled() else result  # type: ignore[no-untyped-call]
    return once


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, message: str, *outputs: Tensor) -> Tensor:
        ctx.message = message
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ctx.message)


def is_batched(gradient: Tensor | None) -> bool:
    """Whether it stands for several gradients, as `is_grads_batched` of `torch.autograd.grad` makes them."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def constant(function: Any) -> Any:
    """Have `torch.compile` take the result as it is while tracing.

    What `torch.compiler.assume_constant_result` does, without importing the compiler.
    """
    function._dynamo_marked_constant = True
    return function


def is_exporting() -> bool:
    """Whether `torch.export` traces what calls this."""
    return torch.compiler.is_exporting() if _CAN_TELL_EXPORTS else _is_exporting()


_CAN_TELL_EXPORTS = hasattr(torch.compiler, "is_exporting")


@constant
def _is_exporting() -> bool:
    """As above with torch 2.6, which keeps it to itself: it notes how it exports, as long as it does."""
    return getattr(sys.modules.get("torch.export._trace"), "_EXPORT_FLAGS", None) is not None


def as_tensor(number: Tensor | float, like: Tensor) -> Tensor:
    """0-dim, on the CPU, wherever others are: it goes with tensors of any device and is free to read there."""
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=like.dtype, device="cpu")


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
