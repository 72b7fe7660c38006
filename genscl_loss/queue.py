"""A memory of past embeddings and their labels: more contrasts than a batch has."""

import copy
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genscl_loss._checks import check_values, kind
from genscl_loss._distributed import Members, gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FeatureQueue(nn.Module):
    """The newest embeddings of earlier steps and their labels, first in, first out: the queue of MoCo.

    Contrast a batch with the queue, then put its keys in: a batch that is in the queue already would make each sample
    its own positive. See the example.

    Rows have no gradient, and are stored as they come: the loss scales them to unit length. NaN and infinity, too, are
    stored, and make the loss NaN until newer rows replace them; inside `validate()` they are an error.

    The memory is no buffer, so that DDP, which would overwrite the buffers of all processes with those of the first,
    leaves it alone. It is in `state_dict`, as a copy, with the position of the next row. `to`, `half` and the like move
    and cast it: features and label vectors have one dtype, float32 at first. No method makes the host wait for a GPU,
    except `enqueue` with a group whose only backend is NCCL. Use the queue outside of compiled functions and hand its
    rows to them: the position changes with each call, and `torch.compile` would compile anew each time.

    Args:
        size: The number of rows that the queue holds.
        dim: D, the width of the features.
        num_classes: C, if labels are label vectors (B, C). None: labels are class numbers (B,).
        group: Processes that share one queue: each enqueues rows of its own, all get those of all, in the order of
            their ranks, as if one process had enqueued everything. All must call `enqueue` equally often, with any
            number of rows, 0 too. Their queues are equal bit for bit. None: this process alone. Do not also pass such a
            group to the loss, which would gather the queue, the same in every process, once from each.

    Attributes:
        size: As given.
        dim: As given.
        num_classes: As given.
        group: As given. `copy.deepcopy` keeps it; a queue that has one cannot be pickled, its `state_dict` can.

    Raises:
        ValueError: A size is not positive, or the group does not contain this process.
        TypeError: A size is not an integer, or the group is not a process group.

    Example:
        >>> import torch
        >>> from genscl_loss import GenSupConLoss
        >>> queue, criterion = FeatureQueue(size=6, dim=16), GenSupConLoss(temperature=0.1)
        >>> for step in range(3):
        ...     queries, keys, labels = torch.randn(4, 16), torch.randn(4, 16), torch.tensor([0, 1, 1, 2])
        ...     contrasts = {"contrast_features": queue.features, "contrast_labels": queue.labels}
        ...     loss = criterion(queries, labels, **contrasts)  # 0 while the queue is empty
        ...     queue.enqueue(keys, labels)
        >>> len(queue), queue.labels
        (6, tensor([1, 2, 0, 1, 1, 2]))

    References:
        - He et al., "Momentum Contrast for Unsupervised Visual Representation Learning",
          https://arxiv.org/abs/1911.05722
        - Kim et al., "Generalized Supervised Contrastive Learning", https://arxiv.org/abs/2206.00384
    """

    def __init__(
        self, size: int, dim: int, num_classes: int | None = None, *, group: "ProcessGroup | None" = None
    ) -> None:
        super().__init__()
        self.size = _positive("size", size)
        self.dim = _positive("dim", dim)
        self.num_classes = None if num_classes is None else _positive("num_classes", num_classes)
        if group is not None:
            Members.check(group)  # what is wrong with it shows here, not in the first step of training
        self.group = group
        self._features = torch.zeros(self.size, self.dim, dtype=torch.float32)
        self._labels = torch.zeros(self.size, dtype=torch.int64)
        if self.num_classes is not None:
            self._labels = torch.zeros(self.size, self.num_classes, dtype=torch.float32)
        # Numbers of the host: slices that depend on them wait for no device.
        self._count = 0  # rows that are filled
        self._next = 0  # where the next row goes; as long as the queue is not full, this is the count

    @property
    def features(self) -> Tensor:
        """The rows so far, (len, D), oldest first: a copy, which later calls of `enqueue` leave as it is."""
        return self._oldest_first(self._features)

    @property
    def labels(self) -> Tensor:
        """Their labels, (len,) in int64 or (len, C): a copy."""
        return self._oldest_first(self._labels)

    def __len__(self) -> int:
        """Rows so far, at most `size`."""
        return self._count

    def enqueue(self, features: Tensor, labels: Tensor) -> None:
        """Add rows, in the place of the oldest ones if the queue is full. Of more than `size` rows the last are kept.

        Args:
            features: (B, D), floating-point, cast to the dtype of the queue. B may be 0.
            labels: Class numbers (B,), of any integer dtype, or label vectors (B, C), of any real dtype and not
                negative, if the queue has `num_classes`. Class numbers are then refused, not turned into vectors: the
                labels of the anchors that meet them in the loss have to be vectors too.

        Raises:
            ValueError: A shape, device or value is wrong. Values are looked at where `validate` says. With a group,
                every process raises if one does, or if their queues differ in size, kind, dtype or number of rows.
            TypeError: A Python type or a dtype is wrong.
        """
        if self.group is None:
            self._store(*self._checked(features, labels))
            return
        members = Members.of(self.group)
        try:
            features, labels = self._checked(features, labels)
        except Exception as error:
            members.refuse(error)
            raise
        counts = [count for (count,) in members.agree(self._facts(), len(features))]
        if max(counts) > 0:
            self._store(gather(features, counts, members), gather(labels, counts, members))

    def reset(self) -> None:
        """Forget all rows."""
        self._count = self._next = 0

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` saves: copies of the memory, the position of the next row and the number of rows."""
        memory = {"features": self._features.clone(), "labels": self._labels.clone()}
        return {**memory, "next": self._next, "count": self._count}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_extra_state` returned, on this queue's device and in its dtype.

        Args:
            state: Of a queue with the same sizes and the same kind of labels.

        Raises:
            ValueError: It is of another queue, or of none; this one is then unchanged.
        """
        names = ("features", "labels", "next", "count")
        if not isinstance(state, dict) or not all(name in state for name in names):
            raise ValueError(f"state must be a dict of {', '.join(names)}, as a FeatureQueue saves it")
        features, labels, position, count = (state[name] for name in names)
        saved, own = (features.shape, labels.shape), (self._features.shape, self._labels.shape)
        if saved != own:
            raise ValueError(f"state is of a queue of {_describe(*saved)}; this one has {_describe(*own)}")
        self._features.copy_(features)
        self._labels.copy_(labels)
        self._next, self._count = int(position), int(count)

    def extra_repr(self) -> str:
        """The sizes, and how many rows there are."""
        classes = "" if self.num_classes is None else f", num_classes={self.num_classes}"
        shared = "" if self.group is None else f", group={type(self.group).__name__}"
        return f"size={self.size}, dim={self.dim}{classes}{shared}, len={len(self)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "FeatureQueue":
        """Copy all but the group, which stands for processes and cannot be copied."""
        twin = self.__new__(type(self))
        memo[id(self)], memo[id(self.group)] = twin, self.group
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeatureQueue":
        # What `to`, `half`, `cuda` and the like do to parameters and buffers.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._features, self._labels = fn(self._features), fn(self._labels)
        return self

    def _oldest_first(self, memory: Tensor) -> Tensor:
        # A view would change under a backward pass that is still to come. Until the queue is full, row 0 is the oldest.
        return torch.cat([memory[self._next : self._count], memory[: self._next]])

    def _checked(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and labels as they are stored, or the error that names the argument."""
        for name, value in (("features", features), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor; got {kind(value)}")
            if value.device != self._features.device:
                raise ValueError(
                    f"{name} must be on the device of the queue, {self._features.device}; got {value.device}"
                )
        if not features.is_floating_point():
            raise TypeError(f"features must be floating-point; got {features.dtype}")
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (B, D) with D = {self.dim}; got shape {tuple(features.shape)}")
        self._check_labels(labels, len(features))
        check_values("features", features, signed=True, only_if_asked=True)
        check_values("labels", labels, signed=self.num_classes is None)
        return features.detach().to(self._features.dtype), labels.detach().to(self._labels.dtype)

    def _check_labels(self, labels: Tensor, count: int) -> None:
        if self.num_classes is None:
            if labels.is_floating_point() or labels.is_complex():
                raise TypeError(f"labels must be class numbers, integers, without num_classes; got {labels.dtype}")
            if tuple(labels.shape) != (count,):
                raise ValueError(
                    f"labels must be (B,) with B = {count} as in features; got shape {tuple(labels.shape)}"
                )
            return
        if labels.is_complex():
            raise TypeError(f"labels must be real; got {labels.dtype}")
        if tuple(labels.shape) != (count, self.num_classes):
            hint = "; torch.nn.functional.one_hot makes vectors of class numbers" if labels.dim() == 1 else ""
            raise ValueError(
                f"labels must be (B, C) with B = {count} as in features and C = {self.num_classes}; "
                f"got shape {tuple(labels.shape)}{hint}"
            )

    def _facts(self) -> dict[str, object]:
        """What makes queues of several processes one."""
        return {
            "size": self.size,
            "dim": self.dim,
            "num_classes": self.num_classes,
            "the dtype of the queue": self._features.dtype,
            "the device of the queue": self._features.device.type,
            "the rows in the queue": f"{self._count}, the next one at {self._next}",
        }

    def _store(self, features: Tensor, labels: Tensor) -> None:
        features, labels = features[-self.size :], labels[-self.size :]
        count = len(features)
        before_end = min(count, self.size - self._next)  # the others go on at the start
        for memory, rows in ((self._features, features), (self._labels, labels)):
            memory[self._next : self._next + before_end] = rows[:before_end]
            memory[: count - before_end] = rows[before_end:]
        self._next = (self._next + count) % self.size
        self._count = min(self._count + count, self.size)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return int(value)


def _describe(features: torch.Size, labels: torch.Size) -> str:
    classes = labels[1] if len(labels) > 1 else None
    return f"size {features[0]}, dim {features[1]} and num_classes {classes}"
