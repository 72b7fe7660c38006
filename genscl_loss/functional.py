"""The generalized supervised contrastive loss."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from genscl_loss import _dense as dense
from genscl_loss import _linear as linear
from genscl_loss._backends import auto_backend, available_backends, choose, float32_precision, row_lse
from genscl_loss._batch import Batch, make_batch
from genscl_loss._checks import (
    check_bool,
    check_index,
    check_number,
    check_tensor,
    check_values,
    may_look_at,
    unknown_arguments,
    validate,
)
from genscl_loss._choices import (
    BACKENDS,
    EMPTY_ANCHORS,
    REDUCTIONS,
    Backend,
    ContrastMode,
    EmptyAnchors,
    Reduction,
    check_choice,
)
from genscl_loss._distributed import Members, sum_over
from genscl_loss._global import facts, global_log_likelihoods
from genscl_loss._library import as_tensor
from genscl_loss._likelihood import EPS, log_likelihood, loss_of, no_log_likelihoods
from genscl_loss._positives import Similarity, has_gradient, positives, similarity_matrix
from genscl_loss._unit import unit_pair

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["auto_backend", "available_backends", "collapsed_loss", "gen_supcon_loss", "validate"]


def gen_supcon_loss(
    features: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor] | None = None,
    *more: NoReturn,
    label_similarity: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = 0.07,
    contrast_mode: ContrastMode = "all",
    contrast_features: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    include_batch: bool = False,
    teacher_labels: Tensor | Sequence[Tensor] | None = None,
    contrast_teacher_labels: Tensor | None = None,
    teacher_weight: float = 1.0,
    sample_weight: Tensor | None = None,
    contrast_weight: Tensor | None = None,
    ignore_index: int | None = None,
    empty_anchors: EmptyAnchors = "zero",
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: "ProcessGroup | Literal['world'] | None" = None,
    backend: Backend = "auto",
    **unknown: NoReturn,
) -> Tensor:
    r"""Cross-entropy between the similarity of (soft) labels and the similarity of embeddings: the loss of GenSCL.

    With anchors :math:`z_i` and contrasts :math:`z_j` (embeddings of unit length), logits
    :math:`s_{ij} = z_i \cdot z_j / \tau` and label similarity :math:`w_{ij} \ge 0`, :math:`j` running over the
    contrasts without the anchor itself,

    .. math::
        \ell_i = -\frac{\tau}{\tau_{\mathrm{base}}} \, \frac{1}{W_i + 10^{-8}} \sum_j w_{ij}
                 \Big( s_{ij} - \log \sum_k e^{s_{ik}} \Big), \qquad W_i = \sum_j w_{ij}.

    Label vectors :math:`y` (mixup, cutmix, label smoothing, a teacher's probabilities, multi-hot) have cosine
    similarity, :math:`w_{ij} = y_i \cdot y_j / (\|y_i\| \, \|y_j\|)`. Class numbers have similarity 1 if equal and 0
    otherwise: the loss is then SupCon. Without labels the views of a sample are its positives, and the loss is
    NT-Xent (SimCLR). Memory is linear in the number of rows, for every kind of label but an explicit
    `label_similarity`.

    Rows are view-major in what follows: row v * N + n is view v of sample n.

    Args:
        features: Embeddings of N samples in V views: (N, D), (N, V, ...) with the dots flattened to D, or a sequence
            of V tensors (N, D). Samples first, then views. Floating-point; half precision is computed in float32.
        labels: Class numbers (N,) of any real dtype, compared by equality (none of them, -1 neither, means
            "unlabelled"); label vectors (N, C), not negative, rows of any length from 1e-18 to 1e19, a row of zeros
            meaning "unlabelled"; (N, V, C) or a sequence of V tensors (N,) or (N, C) where views have labels of their
            own. None: the other views of a sample are its positives; if the contrasts have none, row n of
            `contrast_features`, of N rows or more, is the positive of sample n. What could be read in two ways is
            refused by its shape, and the message names both: integers that are not (N,) or, multi-hot, (N, C) with C
            other than V; a single class, (N, 1); and vectors of exactly the shape of 2-D features, which could be a
            second view: as a sequence, `[labels]`, they pass.
        *more: Refused, with the name under which such an argument goes.
        label_similarity: w itself, instead of labels, not negative, not necessarily symmetric: (anchors, contrasts), or
            (N, N), with `contrast_features` (N, M), with both (N, N + M), which is tiled over views. The entry of an
            anchor with itself is ignored, but has to be finite and not negative, too.
        temperature: tau > 0, a number or a 0-dim tensor, which may be learnable.
        base_temperature: tau_base > 0. None leaves the factor tau / tau_base out. The factor has no gradient: it would
            reward small temperatures, not good embeddings.
        contrast_mode: "all": every view is an anchor, against all other rows. "first": view 0 is the anchor, against
            all other rows (SupContrast calls this "one"). "one": view 0 is the anchor, against view 1, nothing
            excluded (as in the paper's code); further views take no part.
        contrast_features: (M, D), a contrast set of its own (a queue, another modality) instead of the batch. Nothing
            is excluded. Anchors are all views in mode "all", otherwise view 0. M may be 0.
        contrast_labels: Labels of `contrast_features`, (M,) of the dtype of `labels`, or (M, C).
        include_batch: Contrast with the batch and `contrast_features`, in that order: a memory beside the batch
            (XBM). What is excluded, and which mode means what, is as without `contrast_features`.
        teacher_labels: A teacher's label vectors, in any form that `labels` has for vectors. Adds `teacher_weight`
            times the loss with these in place of `labels`; both share one log-sum-exp. For the teacher alone pass its
            vectors as `labels`: without `labels` they are added to the loss of the views.
        contrast_teacher_labels: The teacher's labels of `contrast_features`.
        teacher_weight: alpha >= 0 of the paper.
        sample_weight: (N,) or (N, V), not negative, multiplies the losses of its anchors. The mean is a weighted one:
            divided by the sum of the weights, and 0 if that is 0.
        contrast_weight: c_j >= 0, multiplies :math:`e^{s_{ij}}` in the sum over contrasts, and nothing else: (N,) or
            (N, V) for the batch; with `contrast_features` one for each contrast. A row of weight 0 is not there, as if
            it had been left out of all arguments, whatever features it holds: it is no contrast, no positive and no
            anchor; its loss is 0, and the mean does not count it. No gradient.
        ignore_index: A class number whose rows, in `labels` and `contrast_labels`, are not there in this sense. For a
            GPU as for compiled code, nothing has to be looked up or filtered.
        empty_anchors: What anchors without positives (W_i <= 1e-8) count. "zero": 0 in the mean, as in the paper's
            code and SupContrast. "ignore": the mean is over the others, as in pytorch-metric-learning.
        normalize: Scale embeddings to unit length first. Nothing changes if they have it. A row shorter than 1e-18
            counts as zero: it is similar to nothing. In float32 a row longer than 1e19 gives NaN.
        reduction: "mean" over anchors, "sum" or "none".
        group: "world", or a `torch.distributed` process group: the batch is then that of all its processes, each of
            which passes its own share, of any size, zero too. Anchors are this process's, contrasts are everyone's,
            `contrast_features` included. All processes return the loss of the whole batch ("none": the losses of their
            own anchors), and after the averaging of gradients by DDP or FSDP parameters have the gradient of the whole
            batch. "world" is looked up at each call; `torch.distributed.group.WORLD` is None until
            `init_process_group()`, and None is this process alone. Not with `label_similarity`.
        backend: "auto", "dense" (an N x N matrix; twice differentiable), "tiled" (linear memory) or "triton" (linear
            memory, on NVIDIA GPUs, float32 or half precision, up to 1024 features). "auto" takes the fastest of those
            that can be used; with `group` never "dense".
        **unknown: Refused, too.

    Returns:
        The loss, in nats times tau / tau_base, 0-dim, or (anchors,) in view-major order for "none"; float32, or float64
        for float64 features. 0 with zero gradient if there is no contrast (one sample, an empty queue). A collapsed
        model has the value of `collapsed_loss`. NaN and infinity in features make it NaN or infinite, never a finite
        number.

    Raises:
        ValueError: A shape, device, mode or value is wrong; the message begins with the name of the argument. Negative,
            NaN and infinite values in labels and the like are looked for in CPU tensors; on a GPU, within `validate()`.
            With `group`, all processes raise if one does, or if they differ in what they must have in common.
        TypeError: A Python type or a dtype is wrong.
        RuntimeError: On a second derivative, or a forward-mode one, of any backend but "dense".

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> gen_supcon_loss(features, torch.tensor([0, 0, 1]), temperature=0.5)
        tensor(1.6593)
        >>> soft = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [0.0, 1.0, 0.0]])
        >>> gen_supcon_loss(features, soft, temperature=0.5, reduction="none")
        tensor([1.3136, 4.5215, 1.8806])

    References:
        - Kim et al., "Generalized Supervised Contrastive Learning", https://arxiv.org/abs/2206.00384
        - Khosla et al., "Supervised Contrastive Learning", https://arxiv.org/abs/2004.11362
    """

    def prepare() -> _Problem:
        if more or unknown:
            raise unknown_arguments(gen_supcon_loss, more, unknown)
        check_bool("normalize", normalize)
        check_bool("include_batch", include_batch)
        ignored = check_index("ignore_index", ignore_index)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("empty_anchors", empty_anchors, EMPTY_ANCHORS)
        check_choice("backend", backend, BACKENDS)
        batch = make_batch(
            features,
            labels,
            label_similarity=label_similarity,
            contrast_mode=contrast_mode,
            contrast_features=contrast_features,
            contrast_labels=contrast_labels,
            include_batch=include_batch,
            teacher_labels=teacher_labels,
            contrast_teacher_labels=contrast_teacher_labels,
            sample_weight=sample_weight,
            contrast_weight=contrast_weight,
            ignore_index=ignored,
            normalize=normalize,
        )
        weight = check_number("teacher_weight", teacher_weight)
        scale, factor = _scale_and_factor(temperature, base_temperature, batch.anchors)
        options: dict[str, object] = {
            "temperature": temperature if isinstance(temperature, Tensor) else float(temperature),  # 1 and 1.0 agree
            "base_temperature": None if base_temperature is None else float(base_temperature),
            "contrast_mode": contrast_mode,
            "contrast_features": None if contrast_features is None else "given",
            "include_batch": include_batch,
            "contrast_weight": None if contrast_weight is None else "given",
            "ignore_index": ignored,
            "empty_anchors": empty_anchors,
            "reduction": reduction,
            "teacher_weight": weight,
        }
        # A likelihood is one, and not larger; with weights in its denominator it may be.
        is_probability = contrast_weight is None
        return _Problem(batch, scale, factor, weight, reduction, empty_anchors, backend, is_probability, options)

    return _loss(prepare()) if group is None else _loss_of_group(group, prepare)


class _Problem(NamedTuple):
    """What the loss is to be computed of."""

    batch: Batch
    scale: Tensor | float
    factor: float | Tensor
    teacher_weight: float
    reduction: str
    empty_anchors: str
    backend: str
    is_probability: bool
    options: dict[str, object]  # in which processes of a group have to agree


def _loss(problem: _Problem) -> Tensor:
    batch = problem.batch.without_empty_set()
    losses = _losses(batch, problem.scale, problem.backend, problem.is_probability)
    return _total(problem, losses, batch.anchors.shape[0], None)


def _loss_of_group(group: object, prepare: Callable[[], _Problem]) -> Tensor:
    # Communication stays out of compiled graphs, which go on behind it. `torch._dynamo.disable` does that, and would
    # import the compiler where nothing is compiled.
    compute = _communicating_loss
    if "torch._dynamo" in sys.modules:
        compute = torch._dynamo.disable(compute)  # type: ignore[no-untyped-call]
    return compute(group, prepare)


_loss_of_group._torchdynamo_disable = True  # type: ignore[attr-defined]


def _communicating_loss(group: object, prepare: Callable[[], _Problem]) -> Tensor:
    members = Members.of(group)
    try:
        problem = prepare()
        batch = problem.batch
        backend = choose(problem.backend, batch.anchors, batch.num_contrasts, may_be_dense=False)
        precision = _precision(batch)
        agreed = {name: _told(value) for name, value in problem.options.items()}
        agreed |= facts(batch) | {"backend": backend}
        sizes = batch.anchors.shape[0], batch.num_contrast_rows
    except Exception as error:
        members.refuse(error)
        raise
    num_anchors, counts = zip(*members.agree(agreed, *sizes), strict=True)
    scale = as_tensor(problem.scale, batch.anchors)
    likelihoods = global_log_likelihoods(batch, scale, members, counts, precision=precision, backend=backend)
    return _total(problem, _losses_of(likelihoods, problem.is_probability), sum(num_anchors), members)


def _told(value: object) -> object:
    """An option as other processes are told of it."""
    if not isinstance(value, Tensor):
        return value
    shown = f"{float(value.detach()):.7g}" if value.device.type == "cpu" else "a tensor"
    return f"{shown}, with gradient" if value.requires_grad else shown


def _total(problem: _Problem, losses: list[tuple[Tensor, Tensor]], num_anchors: int, members: Members | None) -> Tensor:
    """The loss of all anchors, the teacher's term included."""
    terms = [_reduce(loss, mass, problem, num_anchors, members) for loss, mass in losses]
    return terms[0] if len(terms) == 1 else terms[0] + problem.teacher_weight * terms[1]


def collapsed_loss(
    num_contrasts: int, temperature: float | Tensor = 0.07, base_temperature: float | None = 0.07
) -> float:
    """Loss of a collapsed model, one whose embeddings are all equal: `log(M) * tau / tau_base`.

    A loss that stays at this number ("stuck at 6.92") says that the model maps everything to one point, or that
    training has not moved it from there. It does not depend on the labels, provided that all anchors have positives.

    Args:
        num_contrasts: M, the contrasts that an anchor sees: V * N - 1 for N samples in V views, N in mode "one", the
            number of rows of a separate contrast set.
        temperature: tau, a number or a 0-dim tensor, which is read.
        base_temperature: tau_base, or None for no factor.

    Returns:
        The value, in the units of `gen_supcon_loss`; 0 if there is no contrast.

    Raises:
        ValueError: `num_contrasts` is negative, a temperature is not positive, or a tensor is not 0-dim.
        TypeError: `num_contrasts` is not an integer, or a temperature not a number.

    Example:
        >>> import torch
        >>> round(collapsed_loss(2 * 256 - 1, temperature=0.1), 4)
        8.909
        >>> one_point = torch.ones(256, 2, 64)
        >>> round(gen_supcon_loss(one_point, torch.arange(256), temperature=0.1).item(), 4)
        8.909

    References:
        - Kim et al., "Generalized Supervised Contrastive Learning", https://arxiv.org/abs/2206.00384
    """
    if isinstance(num_contrasts, bool) or not isinstance(num_contrasts, int):
        raise TypeError(f"num_contrasts must be an integer; got {type(num_contrasts).__name__}")
    if num_contrasts < 0:
        raise ValueError(f"num_contrasts must be >= 0; got {num_contrasts}")
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0:
            raise ValueError(f"temperature must be a number or a 0-dim tensor; got shape {tuple(temperature.shape)}")
        temperature = temperature.item()
    factor = check_number("temperature", temperature, positive=True)
    if base_temperature is None:
        factor = 1.0
    else:
        factor /= check_number("base_temperature", base_temperature, positive=True)
    return math.log(num_contrasts) * factor if num_contrasts else 0.0


def _losses(batch: Batch, scale: Tensor | float, backend: str, is_probability: bool) -> list[tuple[Tensor, Tensor]]:
    """The loss and W_i of each anchor, for the labels and for the teacher's: both share the softmax."""
    anchors, contrasts, self_offset = batch.anchors, batch.contrasts, batch.self_offset
    backend = choose(backend, anchors, batch.num_contrasts, batch.num_classes, is_self=contrasts is None)
    if batch.num_contrasts == 0:
        z, others = unit_pair(anchors, contrasts, batch.normalize)
        return _losses_of(no_log_likelihoods(z, others, scale, len(batch.all_labels)), is_probability)
    if backend == "dense":
        all_labels = [] if batch.partner is not None else batch.all_labels
        weights = [similarity_matrix(y, self_offset, anchors.dtype) for y in all_labels]
        return dense.losses(
            anchors, contrasts, scale, batch.contrast_weight, weights, self_offset,
            normalize=batch.normalize, is_probability=is_probability, partner=batch.partner, num_live=batch.num_live,
        )  # fmt: skip
    all_labels = batch.all_labels
    constant = [y for y in all_labels if not isinstance(y, Similarity) and not has_gradient(y)]
    if len(constant) == len(all_labels):
        partner = batch.partner if backend == "tiled" else None
        options = linear.Options(
            self_offset, partner, batch.num_live, batch.normalize, is_probability, _precision(batch), backend
        )
        return linear.losses(anchors, contrasts, scale, batch.contrast_weight, constant, options)
    return _losses_of(_log_likelihoods(batch, as_tensor(scale, anchors), backend), is_probability)


def _log_likelihoods(batch: Batch, scale: Tensor, backend: str) -> list[tuple[Tensor, Tensor]]:
    """sum_j w_ij log p_ij and W_i of each anchor in linear memory, from an operator for each half: for all labels."""
    z, others = unit_pair(batch.anchors, batch.contrasts, batch.normalize)
    lse = row_lse(
        z, others, scale, batch.self_offset,
        unit=batch.normalize, precision=_precision(batch), backend=backend, weight=batch.contrast_weight,
    )  # fmt: skip
    found = [positives(z, others, labels, batch.self_offset) for labels in batch.all_labels]
    return [(log_likelihood(alignment, mass, lse, scale), mass) for alignment, mass in found]


def _precision(batch: Batch) -> str:
    return "high" if batch.half else float32_precision(batch.anchors.device.type)


def _losses_of(likelihoods: list[tuple[Tensor, Tensor]], is_probability: bool) -> list[tuple[Tensor, Tensor]]:
    return [(loss_of(likelihood, mass, is_probability), mass) for likelihood, mass in likelihoods]


def _reduce(loss: Tensor, mass: Tensor, problem: _Problem, num_anchors: int, members: Members | None) -> Tensor:
    """Weigh the losses, reduce over those that count, and multiply what is then fewest by the factor."""
    factor, dtype, weight = problem.factor, loss.dtype, problem.batch.sample_weight
    if weight is not None:
        # In float64 1e-50 is a weight. Processes may have theirs in different dtypes, and add them up in this one.
        weight = weight.to(torch.promote_types(weight.dtype, dtype) if members is None else torch.float64)
        loss = loss * weight
    if problem.reduction == "none":
        return (loss * factor).to(dtype)
    if problem.reduction == "mean" and problem.empty_anchors == "ignore":
        counts = (mass.detach() > EPS).to(dtype)
        loss = loss * counts  # a product, not a choice: what is NaN stays NaN
        weight = counts if weight is None else weight * counts
    is_plain = problem.reduction == "mean" and weight is None and members is None
    if is_plain and num_anchors > 0 and isinstance(factor, float) and factor == 1:
        return loss.mean()  # the factor's default, and one launch less on a GPU
    total = _sum(loss, members)
    if problem.reduction == "sum":
        return (total * factor).to(dtype)
    if weight is None:
        return total * (factor / max(num_anchors, 1))
    weights = _sum(weight, members)
    return (total * factor / torch.where(weights > 0, weights, 1)).to(dtype)


def _sum(x: Tensor, members: Members | None) -> Tensor:
    return x.sum() if members is None else sum_over(x.sum(), members)


def _scale_and_factor(
    temperature: float | Tensor, base_temperature: float | None, anchors: Tensor
) -> tuple[Tensor | float, float | Tensor]:
    """1 / tau, a tensor if tau is one, and tau / tau_base without its gradient."""
    smallest = torch.finfo(anchors.dtype).tiny ** 0.5
    base = None if base_temperature is None else check_number("base_temperature", base_temperature, positive=True)
    if base is not None and base < smallest:
        raise ValueError(f"base_temperature is too small to compute with in {anchors.dtype}; got {base}")
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature)
        if temperature.dim() != 0:
            raise ValueError(f"temperature must be a number or a 0-dim tensor; got shape {tuple(temperature.shape)}")
        if not temperature.is_floating_point():
            raise TypeError(f"temperature must be floating-point; got {temperature.dtype}")
        if temperature.device not in (torch.device("cpu"), anchors.device):
            raise ValueError(f"temperature must be on the device of features or the CPU; got {temperature.device}")
        check_values("temperature", temperature, positive=True)
        if may_look_at(temperature):
            _check_computable(float(temperature.detach()), smallest, anchors)
        temperature = temperature.to(anchors.dtype)
        return temperature.reciprocal(), 1.0 if base is None else temperature.detach() / base
    temperature = check_number("temperature", temperature, positive=True)
    _check_computable(temperature, smallest, anchors)
    return 1 / temperature, 1.0 if base is None else temperature / base


def _check_computable(temperature: float, smallest: float, anchors: Tensor) -> None:
    if temperature < smallest:
        raise ValueError(f"temperature is too small to compute with in {anchors.dtype}; got {temperature}")
