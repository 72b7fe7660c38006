"""Checks of arguments: each error begins with the name of the argument and says what was expected and what came."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real

import torch
from torch import Tensor

# Types in which torch finds the smallest and largest entry; others, wide unsigned integers and eight-bit floats, go
# through float64.
_HAVE_EXTREMES = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool}
_HAVE_EXTREMES |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

_validating: ContextVar[bool] = ContextVar("genscl_loss_validating", default=False)


@contextmanager
def validate(enabled: bool = True) -> Iterator[None]:
    """Check the values of all tensors inside this context, on every device, and features for NaN and infinity too.

    Outside it, values of labels, similarities, weights and temperature (negative, NaN, infinite) are checked where
    that is free, on CPU tensors; on a GPU each check makes the host wait for the device. Shapes, dtypes and devices
    are always checked. Values are never checked while `torch.compile` or `torch.export` traces. The context is that of
    the current thread.

    Args:
        enabled: False switches the checks of an enclosing `validate()` off again.

    Yields:
        Nothing.

    Raises:
        ValueError: From calls inside: NaN, infinite or negative entries, with the name of the argument.

    Example:
        >>> import torch
        >>> from genscl_loss import gen_supcon_loss, validate
        >>> features = torch.full((4, 8), float("nan"))
        >>> with validate():
        ...     gen_supcon_loss(features, torch.tensor([0, 0, 1, 1]))
        Traceback (most recent call last):
            ...
        ValueError: features has NaN or infinite entries
    """
    token = _validating.set(enabled)
    try:
        yield
    finally:
        _validating.reset(token)


def check_number(name: str, value: float, *, positive: bool = False, at_most: float = math.inf) -> float:
    """A finite Python number that is not negative (or positive), and not above a limit."""
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):  # the first two spare a slow look at Real
        raise TypeError(f"{name} must be a number; got {kind(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (number > 0 if positive else number >= 0) or number > at_most or number == math.inf:
        limit = "" if at_most == math.inf else f" and <= {at_most:g}"
        raise ValueError(f"{name} must be finite and {'> 0' if positive else '>= 0'}{limit}; got {value}")
    return number


def check_count(name: str, value: int) -> int:
    """A positive Python integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {kind(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return int(value)


def may_look_at(values: Tensor) -> bool:
    """Whether values may be read: for free on the CPU, elsewhere only if asked for, never in a trace or transform."""
    if torch.compiler.is_compiling() or is_transformed() or torch._C._len_torch_dispatch_stack() > 0:
        return False  # the last: fake tensors, or a graph that is being recorded
    return values.device.type == "cpu" or _validating.get()


def is_transformed() -> bool:
    """Whether this runs within `torch.func.grad`, `vmap` and the like, where tensors stand for others."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def check_values(
    name: str, values: Tensor, *, positive: bool = False, signed: bool = False, only_if_asked: bool = False
) -> None:
    """Finite and, unless signed, not negative (or positive), where looking at values is free or asked for."""
    if not may_look_at(values) or (only_if_asked and not _validating.get()):
        return
    if values.numel() == 0 or (signed and not values.is_floating_point()):
        return
    smallest, largest = extremes(values)
    if not -math.inf < smallest <= largest < math.inf:
        raise ValueError(f"{name} has NaN or infinite entries")
    if not signed and (smallest <= 0 if positive else smallest < 0):
        hint = _negative_labels(values) if "labels" in name else ""
        raise ValueError(f"{name} must be {'> 0' if positive else '>= 0'}; the smallest entry is {smallest}{hint}")


def extremes(values: Tensor) -> tuple[float, float]:
    """The smallest and the largest entry; NaN if any entry is."""
    values = values.detach()
    if values.dtype not in _HAVE_EXTREMES:
        values = values.double()
    smallest, largest = (extreme.item() for extreme in values.aminmax())
    return smallest, largest


def _negative_labels(vectors: Tensor) -> str:
    """What negative entries of label vectors most likely are."""
    if vectors.requires_grad:
        return "; are these embeddings? Two views go into one argument, features=[view0, view1]"
    if not vectors.is_floating_point():
        return "; -1 or -100 for what is to be ignored is a class number, (N,): leave such rows out of all arguments"
    return "; label vectors are weights or probabilities: apply softmax to logits first"


def check_bool(name: str, value: object) -> bool:
    """True or False, nothing that is merely true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {type(value).__name__}")
    return value


def check_index(name: str, value: object) -> int | None:
    """A class number, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name} must be an integer, a class number, or None; got {type(value).__name__}")
    if value is None:
        return None
    index = int(value)
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"{name} must be in the range of torch.int64; got {value}")
    return index


def check_tensor(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """A real, dense tensor that is all here, on the device of the features."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {kind(value)}")
    if value.is_nested:
        raise TypeError(
            f"{name} must be dense; got a nested tensor: torch.cat({name}.unbind()) puts its rows below each other"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense; got {value.layout}: {name}.to_dense() makes it so")
    if type(value) is not Tensor and hasattr(value, "placements"):
        raise TypeError(
            f"{name} must be a tensor of one process; got a DTensor: pass {name}.full_tensor(), or "
            f"{name}.to_local() of all that are sharded together with group="
        )
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on the device of features, {device}; got {value.device}")
    if value.is_complex():
        raise TypeError(f"{name} must be real; got {value.dtype}")
    return value


def unknown_arguments(
    function: Callable[..., object],
    more: tuple[object, ...],
    unknown: Mapping[str, object],
    options: Callable[..., object] | None = None,
) -> TypeError:
    """The error for arguments that a function does not have: it says where they go.

    Args:
        function: It takes features and labels by position, all else by name.
        more: Positional arguments that came behind those two.
        unknown: Arguments under names that it does not have.
        options: Where some of these names belong instead.
    """
    if more:
        return TypeError(
            f"labels is the last argument by position; got {len(more)} more. Views go into one argument, "
            "features=[view0, view1], a mask is label_similarity=, negatives are contrast_features="
        )
    name = next(iter(unknown))
    known = _named(function)
    if name in _ELSEWHERE:
        hint = _ELSEWHERE[name]
    elif options is not None and name in _named(options):
        hint = "it is an option of the module, given when that is made"
    elif close := difflib.get_close_matches(name, known, n=1):
        hint = f"did you mean {close[0]}?"
    else:
        hint = f"there are {', '.join(known)}"
    return TypeError(f"{name} is no argument here: {hint}")


def _named(function: Callable[..., object]) -> list[str]:
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.name != "self" and parameter.kind not in several]


# What other packages call it.
_ELSEWHERE = {
    "mask": "pass label_similarity=mask",
    "ref_emb": "pass contrast_features=",
    "ref_labels": "pass contrast_labels=",
    "indices_tuple": "pass label_similarity=, one weight for each pair",
    "positive_key": "pass the two views as features=[query, positive_key]",
    "negative_keys": "pass contrast_features=",
    "weight": "pass sample_weight=, one number for each sample",
    "n_views": "the number of views is that of features, (N, V, D)",
}


def kind(value: object) -> str:
    """What to call a value of the wrong type, and how to make a tensor of it."""
    name = type(value).__name__
    if name == "ndarray":
        return f"{name}: torch.from_numpy makes a tensor of it" if _becomes_tensor(value) else f"{name}, {_NUMBER}"
    if not isinstance(value, (list, tuple)) or not value:
        return name
    kinds = {type(entry).__name__ for entry in value}
    if all(isinstance(entry, Tensor) for entry in value):
        return f"{name} of tensors: torch.cat, or torch.stack, makes one tensor of them"
    if kinds == {"ndarray"}:
        return f"{name} of arrays: torch.from_numpy makes a tensor of each"
    if kinds == {"str"}:
        return f"{name} of strings, {_NUMBER}"
    if _becomes_tensor(value):
        return f"{name}: torch.tensor makes a tensor of it"
    return f"{name} of {', '.join(sorted(kinds))}"


_NUMBER = "which have to be numbered: numpy.unique(names, return_inverse=True)[1] does that"


def _becomes_tensor(value: object) -> bool:
    try:
        torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
