"""The loss as a module: it keeps the options and delegates to the function."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from genscl_loss._checks import check_bool, check_index, check_number, is_transformed, unknown_arguments
from genscl_loss._choices import BACKENDS, Backend, ContrastMode, EmptyAnchors, Reduction, check_choice
from genscl_loss._distributed import Members
from genscl_loss.functional import gen_supcon_loss

if TYPE_CHECKING:
    from typing import ParamSpec, TypeVar

    from torch.distributed import ProcessGroup

    _P = ParamSpec("_P")
    _R = TypeVar("_R")

    def _as(function: Callable[_P, _R]) -> Callable[[Callable[..., Any]], Callable[_P, _R]]: ...


_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 1.0  # of a learnable temperature: logit scales from 1 to 100, as CLIP has
_LOG_RANGE = (math.log(_MIN_TEMPERATURE), math.log(_MAX_TEMPERATURE))


class GenSupConLoss(nn.Module):
    """`gen_supcon_loss` with its options kept; the equation and all arguments are described there.

    Note for users of SupContrast: its `contrast_mode="one"` is "first" here.

    Args:
        temperature: tau > 0; the initial value if it is learnable.
        contrast_mode: "all", "one" or "first".
        base_temperature: tau_base, or None for no factor.
        include_batch: Contrast with the batch and `contrast_features`, which each call then has.
        ignore_index: Class number of rows that take no part.
        teacher_weight: alpha >= 0 of the teacher's term.
        empty_anchors: "zero" or "ignore".
        normalize: Scale embeddings to unit length first.
        reduction: "mean", "sum" or "none".
        group: "world", or a `torch.distributed` process group, whose processes share the batch.
            Copies of the module share it; to pickle the module, set it to None first.
        backend: "auto" or one of `available_backends()`.
        learnable_temperature: Make the temperature a parameter, kept as its logarithm in `log_temperature` and within
            [0.01, 1]: each forward pass in training mode first moves it back inside, as CLIP does. Hand
            `criterion.parameters()` to the optimizer.

    Raises:
        ValueError: An option is wrong, or a learnable temperature starts outside [0.01, 1].
        TypeError: An option is of the wrong type.

    Example:
        >>> import torch
        >>> criterion = GenSupConLoss(temperature=0.1)
        >>> features = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(0))
        >>> criterion(features, torch.arange(8) % 4).shape
        torch.Size([])

    References:
        - Kim et al., "Generalized Supervised Contrastive Learning", https://arxiv.org/abs/2206.00384
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: ContrastMode = "all",
        base_temperature: float | None = 0.07,
        *,
        include_batch: bool = False,
        ignore_index: int | None = None,
        teacher_weight: float = 1.0,
        empty_anchors: EmptyAnchors = "zero",
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: "ProcessGroup | Literal['world'] | None" = None,
        backend: Backend = "auto",
        learnable_temperature: bool = False,
    ) -> None:
        super().__init__()
        self.contrast_mode: ContrastMode = contrast_mode
        self.base_temperature = base_temperature
        self.teacher_weight = teacher_weight
        self.empty_anchors: EmptyAnchors = empty_anchors
        self.normalize = normalize
        self.reduction: Reduction = reduction
        self._group = _Kept(None)
        self.backend: Backend = "auto"
        self.log_temperature: nn.Parameter | None = None
        self._temperature = _fixed(temperature)
        self.include_batch: bool = False
        self.ignore_index: int | None = None
        # Any wrong option shows now, not in the first step of training: the function is the judge. By name, since a
        # subclass may have a `forward` of its own.
        GenSupConLoss.forward(self, torch.zeros(2, 2, 2, device="cpu"))
        self.include_batch = check_bool("include_batch", include_batch)
        self.ignore_index = check_index("ignore_index", ignore_index)
        check_choice("backend", backend, BACKENDS)  # whether it can be used is for the device of the features to say
        self.backend = backend
        self.group = group
        if check_bool("learnable_temperature", learnable_temperature):
            if not _MIN_TEMPERATURE <= temperature <= _MAX_TEMPERATURE:
                raise ValueError(
                    f"temperature must be in [{_MIN_TEMPERATURE}, {_MAX_TEMPERATURE}] if learnable; got {temperature}"
                )
            self.log_temperature = nn.Parameter(torch.empty(()))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a learnable temperature to the one given at first: what those do who make modules without memory."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self._temperature))

    @property
    def temperature(self) -> float | Tensor:
        """tau: the number, which may be set, or if it is learnable a 0-dim tensor in [0.01, 1]."""
        if self.log_temperature is None:
            return self._temperature
        # With the gradient as if there were no bounds: at a bound it has to lead back, whatever rounding makes of that.
        log = self.log_temperature
        return (log.detach().clamp(*_LOG_RANGE) + (log - log.detach())).exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        if self.log_temperature is not None:
            raise AttributeError("temperature is learnable here: change log_temperature")
        self._temperature = _fixed(value)

    @property
    def group(self) -> "ProcessGroup | Literal['world'] | None":
        """The processes that share the batch, which may be set."""
        return self._group.value

    @group.setter
    def group(self, value: "ProcessGroup | Literal['world'] | None") -> None:
        if value is not None:
            Members.check(value)
        self._group = _Kept(value)

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor] | None = None,
        *more: NoReturn,
        label_similarity: Tensor | None = None,
        contrast_features: Tensor | None = None,
        contrast_labels: Tensor | None = None,
        teacher_labels: Tensor | Sequence[Tensor] | None = None,
        contrast_teacher_labels: Tensor | None = None,
        sample_weight: Tensor | None = None,
        contrast_weight: Tensor | None = None,
        **unknown: NoReturn,
    ) -> Tensor:
        """The loss of a batch; the tensors are those of `gen_supcon_loss`, and so are the errors.

        Args:
            features: (N, D), (N, V, ...) or a sequence of V tensors (N, D).
            labels: (N,), (N, C), (N, V, C), a sequence of V tensors, or None.
            *more: Refused, with the name under which such an argument goes.
            label_similarity: (N, N) or (anchors, contrasts), instead of labels.
            contrast_features: (M, D).
            contrast_labels: (M,) or (M, C).
            teacher_labels: (N, C), (N, V, C) or a sequence of V tensors (N, C).
            contrast_teacher_labels: (M, C).
            sample_weight: (N,) or (N, V).
            contrast_weight: (N,), (N, V) or (contrasts,).
            **unknown: Refused, too.

        Returns:
            0-dim, or (anchors,) with reduction "none".
        """
        if more or unknown:
            self._refuse(more, unknown)
        if self.log_temperature is not None and self.training and not is_transformed():
            # Through `data`: an earlier forward pass of the same step, which saw the same value, stays differentiable.
            self.log_temperature.data.clamp_(*_LOG_RANGE)
        return gen_supcon_loss(
            features,
            labels,
            label_similarity=label_similarity,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            contrast_mode=self.contrast_mode,
            contrast_features=contrast_features,
            contrast_labels=contrast_labels,
            include_batch=self.include_batch,
            teacher_labels=teacher_labels,
            contrast_teacher_labels=contrast_teacher_labels,
            teacher_weight=self.teacher_weight,
            sample_weight=sample_weight,
            contrast_weight=contrast_weight,
            ignore_index=self.ignore_index,
            empty_anchors=self.empty_anchors,
            normalize=self.normalize,
            reduction=self.reduction,
            group=self.group,
            backend=self.backend,
        )

    def _refuse(self, more: tuple[object, ...], unknown: dict[str, NoReturn]) -> NoReturn:
        try:
            raise unknown_arguments(GenSupConLoss.forward, more, unknown, options=GenSupConLoss.__init__)
        except TypeError as error:
            if self.group is not None:
                Members.of(self.group).refuse(error)
            raise

    if TYPE_CHECKING:  # torch leaves open what a module is called with

        @_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Call `forward`, with its arguments."""

    def extra_repr(self) -> str:
        """The options that differ from their defaults, and the temperature."""
        parameters = inspect.signature(type(self).__init__).parameters.values()
        temperature = self.temperature
        if not isinstance(temperature, Tensor):
            shown = [f"temperature={temperature:g}"]
        elif temperature.is_meta:  # a module that has no memory yet
            shown = ["temperature=?"]
        else:
            shown = [f"temperature={temperature.item():g}"]
        for option in parameters:
            value = getattr(self, option.name, option.default)
            if option.name not in ("self", "temperature") and value != option.default:
                shown.append(f"{option.name}={value!r}")
        return ", ".join(shown if self.log_temperature is None else [*shown, "learnable_temperature=True"])


class _Kept:
    """A process group inside a module: torch can neither copy nor pickle one."""

    def __init__(self, value: "ProcessGroup | Literal['world'] | None") -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Kept":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.value is not None and self.value != "world":
            raise TypeError("group cannot be pickled: save state_dict(), or set criterion.group = None first")
        return _Kept, (self.value,)


def _fixed(temperature: float) -> float:
    if isinstance(temperature, Tensor):
        raise TypeError("temperature must be a number; for a parameter pass learnable_temperature=True")
    return check_number("temperature", temperature, positive=True)
