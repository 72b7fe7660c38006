"""The exact gradient of a batch that is larger than the encoder can take at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from genscl_loss._checks import check_count, check_number
from genscl_loss._distributed import refuse_in
from genscl_loss._library import without_autocast


def cached_backward(
    encoder: Callable[[Tensor], Tensor],
    inputs: Tensor | Sequence[Tensor],
    loss: Callable[[Any], Tensor],
    *,
    chunk_size: int,
    scale: float | Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""`loss(encoder(inputs)).backward()` for a batch whose graph does not fit: exact, in the memory of a chunk.

    With embeddings :math:`z_n = f_\theta(x_n)` and a loss :math:`L(z_1, \dots, z_N)` of all of them,

    .. math::
        \frac{\partial L}{\partial \theta} =
        \sum_n \frac{\partial L}{\partial z_n} \, \frac{\partial z_n}{\partial \theta}.

    The inputs are embedded chunk by chunk without a graph, the loss is differentiated at the embeddings, and the chunks
    are embedded again, each with a graph that lives until its share of the sum is in `.grad`. That is one forward pass
    of the encoder more than `backward()` takes, and at the peak the memory of the loss for N rows and of the encoder
    for `chunk_size` rows. Gradients are added to `.grad`, also those of parameters of the loss (a learnable
    temperature, a head), and hooks of parameters run, as with `backward()`.

    - *Randomness*: the second pass draws what the first drew from torch's default generators: of the CPU, of the
      devices of `inputs` and `encoder`, and of the current GPU. They end where one pass over the chunks, and then the
      loss, leave them.
    - *Buffers* of a module, such as running statistics, are updated by the second pass alone, once in each chunk.
    - *Batch normalisation* in training mode normalises each chunk by itself, as in any accumulation; a warning says so.
    - *Autocast*: call it inside the context. Forward passes run in it, backward passes outside.
    - *Several processes*: a module that is, or contains, DDP or FSDP averages gradients once, in the last chunk. Under
      DDP, processes may have different numbers of rows and chunks; under FSDP, and with `SyncBatchNorm`, each call of
      the encoder communicates, and numbers of chunks must agree. Parameters of the loss are not the encoder's: wrap the
      criterion in a DDP of its own.
    - *Errors of one process*: where the loss has a `group`, what a process raises before it calls the loss the others
      raise too; to tell them, it calls `loss` with zeros (N, 1) for embeddings. What it raises later (an encoder out of
      memory, say) is not told: the others wait until the timeout of their group.

    Args:
        encoder: From rows of inputs (n, ...) to floating-point embeddings (n, D), one for each input. A module, or a
            function, of which no buffers and no DDP are known. That the second pass repeats the first is checked in the
            first chunk, up to rounding; a GPU is waited for once.
        inputs: (N, ...), or a sequence of V views (N, ...), of different N if the loss takes them. N may be 0 if
            encoder and loss take no rows.
        loss: From embeddings, (N, D) or a list of V such tensors as `inputs` are, to a 0-dim loss, such as
            `lambda z: criterion(z, labels)`. Called once.
        chunk_size: Rows that the encoder takes at once, >= 1. The last chunk of a view may be smaller.
        scale: What to do to the loss before differentiating it: the method `scale` of a `torch.amp.GradScaler`, whose
            `step` and `update` then work as ever, or a number > 0 to multiply with.

    Returns:
        The loss, 0-dim, detached, without `scale`.

    Raises:
        ValueError: A shape or number is wrong, `inputs` have a graph, the encoder gives other embeddings in its second
            pass, or there is no gradient: of the encoder, of the loss, or under `torch.no_grad()`. Nothing was added to
            `.grad` then, except where the parameters of a loss have a gradient and the embeddings none.
        TypeError: A Python type or a dtype is wrong.

    Example:
        >>> import torch
        >>> from genscl_loss import GenSupConLoss
        >>> encoder, criterion = torch.nn.Linear(784, 128), GenSupConLoss(temperature=0.1)
        >>> images, labels = torch.rand(512, 784), torch.randint(0, 10, (512,))
        >>> loss = cached_backward(encoder, images, lambda z: criterion(z, labels), chunk_size=64)
        >>> cached = encoder.weight.grad.clone()
        >>> encoder.zero_grad()
        >>> criterion(encoder(images), labels).backward()  # the same, with the graph of the whole batch
        >>> torch.allclose(cached, encoder.weight.grad, atol=1e-6)
        True

    References:
        - Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
          https://arxiv.org/abs/2101.06983
    """
    try:
        if not torch.is_grad_enabled():
            raise ValueError("loss has no gradient under torch.no_grad() or torch.inference_mode(): leave that first")
        if not callable(loss):
            raise TypeError(f"loss must be a function of the embeddings; got {_type(loss)}")
        if getattr(parametrize, "_cache_enabled", 0):  # weights of the first pass, without gradient, would be kept
            raise ValueError("encoder must not run inside torch.nn.utils.parametrize.cached(): leave that first")
        scaled = _scaling(scale)
        chunk_size = check_count("chunk_size", chunk_size)
        views = _views(inputs)
        model = _Encoder.of(encoder, views)
        parts = [torch.split(view, chunk_size) for view in views]
        if max(map(len, parts)) > 1 and (layers := model.batch_norms()):
            warn(_BATCH_NORM.format(layers=layers, chunk_size=chunk_size), UserWarning, stacklevel=2)
        features, states = _embed_without_graph(model, parts)
        end = _RandomState.of(model.devices)
        chunks = list(chain(*parts))
        last = len(chunks) - 1
        states[0].restore()
        with model.averaging(last == 0):
            rows = model(chunks[0])
        _check_repeated(rows, features[0][: len(rows)], model.coarsest(rows))
        end.restore()
    except Exception as error:
        refuse_in(lambda: loss(_stand_in(inputs)), error)
        raise
    value, gradients = _differentiate(loss, features, isinstance(inputs, Tensor), scaled)
    del features
    end = _RandomState.of(model.devices)  # the loss may draw too
    for number, gradient in enumerate(chain(*(torch.split(whole, chunk_size) for whole in gradients))):
        with model.averaging(number == last):
            if number > 0:
                states[number].restore()
                rows = model(chunks[number])
            with without_autocast(rows.device):
                torch.autograd.backward([rows], [gradient])
        del rows  # before the next chunk: functions may keep more than what a backward pass frees
    end.restore()
    return value


_BATCH_NORM = (
    "encoder has batch normalisation in training mode ({layers}), which normalises each chunk of {chunk_size} rows by "
    "itself: the gradient is that of such an encoder, not of one that sees the batch. To use running statistics call "
    "eval() on these layers; layer and group normalisation do not depend on chunks"
)


def _stand_in(inputs: object) -> Tensor | list[Tensor]:
    """What the loss gets from a process that has no embeddings, to say so to others."""
    views = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    zeros = [torch.zeros(len(view) if isinstance(view, Tensor) and view.dim() else 1, 1) for view in views]
    return zeros if views is inputs else zeros[0]


def _scaling(scale: object) -> Callable[[Tensor], Tensor]:
    if scale is None:
        return lambda value: value
    if callable(scale):
        return scale
    if hasattr(scale, "scale"):
        raise TypeError(
            f"scale must be a number or a function of the loss: pass the method scale of the {_type(scale)}"
        )
    factor = check_number("scale", scale, positive=True)  # type: ignore[arg-type]
    return lambda value: value * factor


def _views(inputs: object) -> list[Tensor]:
    views = []
    for view in inputs if isinstance(inputs, (tuple, list)) else [inputs]:
        if not isinstance(view, Tensor):
            raise TypeError(f"inputs must be a tensor (N, ...) or a sequence of V of them; got {_type(view)}")
        if view.dim() == 0:
            raise ValueError("inputs must be (N, ...), with samples first; got a 0-dim tensor")
        if view.requires_grad and not view.is_leaf:
            raise ValueError("inputs must not have a graph: make what computes them a part of encoder, or detach them")
        views.append(view)
    if not views:
        raise ValueError("inputs must be a tensor (N, ...) or a sequence of V of them; got none")
    return views


# ---- The encoder ----


class _Encoder(NamedTuple):
    """What is known of an encoder; of a function less than of a module."""

    function: Callable[[Tensor], Tensor]
    modules: dict[str, nn.Module]
    averaging_modules: list[Any]  # the outermost ones
    devices: list[torch.device]  # on which numbers may be drawn, beside the CPU

    @staticmethod
    def of(function: object, views: Sequence[Tensor]) -> "_Encoder":
        if not callable(function):
            raise TypeError(f"encoder must be a module or a function of a tensor; got {_type(function)}")
        modules = dict(function.named_modules()) if isinstance(function, nn.Module) else {}
        averaging = list(_averaging(function)) if isinstance(function, nn.Module) else []
        own = chain(function.parameters(), function.buffers()) if isinstance(function, nn.Module) else ()
        devices = {tensor.device for tensor in chain(views, own) if tensor.device.type not in ("cpu", "meta")}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # where a function may take its inputs
            devices.add(torch.device("cuda", torch.cuda.current_device()))
        return _Encoder(function, modules, averaging, list(devices))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Embeddings, checked."""
        rows: object = self.function(inputs)
        expected = f"encoder must return embeddings (n, D), one row for each of its n = {len(inputs)} inputs"
        if not isinstance(rows, Tensor):
            raise TypeError(f"{expected}; got {_type(rows)}")
        if rows.dim() != 2 or len(rows) != len(inputs):
            raise ValueError(f"{expected}; got shape {tuple(rows.shape)}")
        if not rows.is_floating_point():
            raise TypeError(f"{expected}, floating-point; got {rows.dtype}")
        return rows

    def batch_norms(self) -> str:
        """Names of the layers that normalise by what they see; empty if there are none."""
        names = [
            name or type(module).__name__
            for name, module in self.modules.items()
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        ]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def coarsest(self, rows: Tensor) -> float:
        """The spacing of the coarsest numbers, relative to 1, that embeddings may come from."""
        dtypes = {parameter.dtype for module in self.modules.values() for parameter in module.parameters(False)}
        dtypes = {rows.dtype, *(dtype for dtype in dtypes if dtype.is_floating_point)}
        device = rows.device.type
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        spacing = max(torch.finfo(dtype).eps for dtype in dtypes)
        return spacing if device == "cpu" or dtypes == {torch.float64} else max(spacing, 2.0**-10)  # TF32

    @contextmanager
    def averaging(self, wanted: bool) -> Iterator[None]:
        """Have DDP and FSDP average gradients between processes, or not; a caller's own `no_sync` stays in force."""
        with ExitStack() as stack:
            for module in [] if wanted else self.averaging_modules:
                if hasattr(module, "no_sync"):
                    stack.enter_context(module.no_sync())
                else:
                    module.set_requires_gradient_sync(False)
                    stack.callback(module.set_requires_gradient_sync, True)
            yield

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo what calls do to buffers: running statistics, vectors of a spectral normalisation."""
        kept = [
            (module, name, buffer, buffer.detach().clone())
            for module in self.modules.values()
            for name, buffer in module.named_buffers(recurse=False)
            if not is_lazy(buffer)
        ]
        # Before its first call after a step DDP sends the buffers of the first process to the others. That is undone
        # too, and so has to be done again.
        name = "require_forward_param_sync"
        flags = [(module, getattr(module, name)) for module in self.averaging_modules if hasattr(module, name)]
        try:
            yield
        finally:
            for module, name, buffer, values in kept:
                setattr(module, name, buffer)  # it may have been replaced
                buffer.data.copy_(values)  # a version of its own: graphs that know the buffer stay valid
            for module, flag in flags:
                module.require_forward_param_sync = flag


def _averaging(module: nn.Module) -> Iterator[Any]:
    """The outermost modules that average gradients between processes."""
    if hasattr(module, "no_sync") or hasattr(module, "set_requires_gradient_sync"):
        yield module
    else:
        for child in module.children():
            yield from _averaging(child)


# ---- The two passes ----


class _RandomState(NamedTuple):
    """Of torch's generators on the CPU and on devices."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @staticmethod
    def of(devices: Sequence[torch.device]) -> "_RandomState":
        states = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
        return _RandomState(torch.get_rng_state(), states)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


def _embed_without_graph(model: _Encoder, parts: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[_RandomState]]:
    """Embeddings of each view, and the random state before each chunk."""
    features, states = [], []
    try:
        # Not `inference_mode`: what a module keeps for later calls has to be usable where there is a graph.
        with torch.no_grad(), model.unchanged():
            for part in parts:
                rows = []
                for chunk in part:
                    states.append(_RandomState.of(model.devices))
                    rows.append(model(chunk))
                if len({(one.shape[1], one.dtype, one.device) for one in rows}) > 1:
                    raise ValueError("encoder must return embeddings of one width, dtype and device for all chunks")
                features.append(torch.cat(rows))
    finally:
        torch.clear_autocast_cache()  # weights that were cast here have no gradient
    return features, states


def _check_repeated(rows: Tensor, first: Tensor, spacing: float) -> None:
    """Compare the embeddings of a chunk with those of the first pass, which may have taken other kernels."""
    if not rows.requires_grad:
        raise ValueError("encoder has nothing to learn: its embeddings have no gradient")
    if (rows.shape, rows.dtype) == (first.shape, first.dtype):
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        difference, size = (torch.linalg.vector_norm(x, dtype=dtype) for x in (rows.detach() - first, first))
        if not difference > spacing**0.5 * size:  # NaN in both passes is for the loss, and gradient scalers, to see
            return
    raise ValueError(
        "encoder must give the same embeddings twice, and gave others in its second pass: let it draw random numbers "
        "from torch's default generators only, and keep no state but buffers"
    )


def _differentiate(
    loss: Callable[[Any], Tensor], features: list[Tensor], is_single: bool, scaled: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The loss, detached, and its gradient, scaled, at the embeddings of each view."""
    for whole in features:
        whole.requires_grad_()
    value: object = loss(features[0] if is_single else list(features))
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a 0-dim tensor; got {_type(value)}")
    if value.dim() != 0:
        raise ValueError(f"loss must return a 0-dim tensor, a mean or a sum; got shape {tuple(value.shape)}")
    if not value.requires_grad:
        raise ValueError("loss has no gradient: compute it from the embeddings that it is given, as they are")
    multiplied: object = scaled(value)
    if not isinstance(multiplied, Tensor) or not multiplied.requires_grad:
        raise TypeError(f"scale must return the loss times a number, a tensor with a gradient; got {_type(multiplied)}")
    with without_autocast(value.device):
        torch.autograd.backward([multiplied])
    if all(whole.grad is None for whole in features):
        raise ValueError("loss has no gradient for the embeddings: compute it from those that it is given, as they are")
    return value.detach(), [torch.zeros_like(whole) if whole.grad is None else whole.grad for whole in features]


def _type(value: object) -> str:
    return type(value).__name__
