"""A memory of past embeddings and their labels: more contrasts than a batch has."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from genscl_loss._checks import check_count, check_tensor, check_values, may_look_at
from genscl_loss._distributed import Members, gather
from genscl_loss._queue_state import DTYPES, State, pack, unpack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FeatureQueue(nn.Module):
    """The newest embeddings of earlier steps and their labels, first in, first out: the queue of MoCo.

    Contrast a batch with the queue, then put its keys in: a batch that is in the queue already would make each sample
    its own positive. See the example.

    Rows have no gradient, and are stored as they come: the loss scales them to unit length. NaN and infinity, too, are
    stored, and make the loss NaN until newer rows replace them; inside `validate()` they are an error.

    The memory is no buffer, so that DDP, which would overwrite the buffers of all processes with those of the first,
    leaves it alone, and what averages models does not mix rows of different samples: the average keeps the queue that
    it was copied with. In `state_dict` it is one tensor, a copy, with the position of the next row. The tensor is of
    integers: what averages states copies such tensors whole, and a mixture would be refused when it is loaded.

    `to`, `half` and the like move and cast the memory: features and label vectors have one dtype, float32 at first.
    FSDP, which moves parameters and buffers only, does not: move the queue before. `to_empty` empties a queue that is
    on meta; elsewhere call `reset` after it, as the rows have lost their values. Adding rows and taking them never
    makes the host wait for a GPU, except `enqueue` with a group whose only backend is NCCL. Use the queue outside of
    compiled functions and hand its rows to them: the position changes with each call, and `torch.compile` would compile
    anew each time.

    Args:
        size: The number of rows that the queue holds.
        dim: D, the width of the features.
        num_classes: C, if labels are label vectors (B, C). None: labels are class numbers (B,), or there are none, for
            training without labels.
        group: Processes that share one queue, "world" or a `torch.distributed` process group: each enqueues rows of its
            own, all get those of all, in the order of their ranks, as if one process had enqueued everything. All must
            call `enqueue` equally often, with any number of rows, 0 too. Their queues are equal bit for bit. None: this
            process alone. Do not also pass such a group to the loss, which would gather the queue, the same in every
            process, once from each.

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

        Without labels the key of a sample is its positive, and the queue holds negatives:

        >>> queue = FeatureQueue(size=6, dim=16)
        >>> for step in range(3):
        ...     queries, keys = torch.randn(4, 16), torch.randn(4, 16)
        ...     loss = criterion(queries, contrast_features=torch.cat([keys, queue.features]))
        ...     queue.enqueue(keys)
        >>> len(queue)
        6

    References:
        - He et al., "Momentum Contrast for Unsupervised Visual Representation Learning",
          https://arxiv.org/abs/1911.05722
        - Kim et al., "Generalized Supervised Contrastive Learning", https://arxiv.org/abs/2206.00384
    """

    _labelled = True  # for queues that the first version pickled

    def __init__(
        self,
        size: int,
        dim: int,
        num_classes: int | None = None,
        *,
        group: "ProcessGroup | Literal['world'] | None" = None,
    ) -> None:
        super().__init__()
        self.size: int = check_count("size", size)
        self.dim: int = check_count("dim", dim)
        self.num_classes: int | None = None if num_classes is None else check_count("num_classes", num_classes)
        if group is not None:
            Members.check(group)  # what is wrong with it shows here, not in the first step of training
        self.group = group
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside of it
            self._features = torch.zeros(self.size, self.dim, dtype=torch.float32)
            self._labels = torch.zeros(self.size, dtype=torch.int64)
            if self.num_classes is not None:
                self._labels = torch.zeros(self.size, self.num_classes, dtype=torch.float32)
        # Of the host: slices that depend on them wait for no device.
        self._count = 0  # rows that are filled
        self._next = 0  # where the next row goes; as long as the queue is not full, this is the count
        self._labelled = True  # whether rows have labels; without rows the next ones decide

    @property
    def features(self) -> Tensor:
        """The rows so far, (len, D), oldest first: a copy, which later calls of `enqueue` leave as it is."""
        return self._oldest_first(self._features)

    @property
    def labels(self) -> Tensor:
        """Their labels, (len,) in int64 or (len, C): a copy. A ValueError if they were enqueued without labels."""
        if not self._labelled:
            raise ValueError("labels: the rows of this queue have none, they were enqueued without labels")
        return self._oldest_first(self._labels)

    def __len__(self) -> int:
        """Rows so far, at most `size`."""
        return self._count

    def enqueue(self, features: Tensor, labels: Tensor | None = None) -> None:
        """Add rows, in the place of the oldest ones if the queue is full. Of more than `size` rows the last are kept.

        Args:
            features: (B, D), floating-point, cast to the dtype of the queue. B may be 0.
            labels: Class numbers (B,), of any integer dtype, or label vectors (B, C), of any real dtype and not
                negative, if the queue has `num_classes`. Class numbers are then refused, not turned into vectors: the
                labels of the anchors that meet them in the loss have to be vectors too. None: rows without labels. All
                rows have labels or none has, until `reset`.

        Raises:
            ValueError: A shape, device or value is wrong, or labels are missing, or there where others have none.
                Values are looked at where `validate` says. With a group, every process raises if one does, if labels
                are missing on some, or if their queues differ in size, kind, dtype or number of rows.
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
        counts = [count for (count,) in members.agree(self._facts(labels), len(features))]
        if max(counts) > 0:
            every = gather(features, counts, members)
            self._store(every, None if labels is None else gather(labels, counts, members))

    def reset(self) -> None:
        """Forget all rows, and whether they had labels."""
        self._count = self._next = 0
        self._labelled = True

    def get_extra_state(self) -> Tensor:
        """What `state_dict` saves: one row of int64 on this queue's device, a copy of all that changes in a queue.

        First numbers, the sizes and the position of the next row among them, then the bits of features and labels.
        """
        return pack(self._state())

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        """Take over what `get_extra_state` returned, on this queue's device and in its dtype.

        A queue on meta moves to the device of the state. `load_state_dict` calls this, and errors then begin with the
        key.

        Args:
            state: Of a queue with the same sizes and the same kind of labels, on any device and of any dtype. The
                first version saved a dict, which is taken too.

        Raises:
            ValueError: It is of another queue, or of none; this one is then unchanged.
            TypeError: It is no tensor.
        """
        if isinstance(state, Tensor) and state.is_meta and self._features.is_meta:
            return  # nothing has values
        saved = unpack(state, self._state())
        if self._features.is_meta:
            device = saved.features.device
            self._features, self._labels = (torch.empty_like(x, device=device) for x in (self._features, self._labels))
        self._features.copy_(saved.features)
        self._labels.copy_(saved.labels)
        self._next, self._count, self._labelled = saved.position, saved.rows, saved.labelled

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
        with torch.inference_mode(False):
            features, labels = fn(self._features), fn(self._labels)
            if self.num_classes is None and labels.dtype != torch.int64:  # `type` casts integers too
                labels = self._labels.to(labels.device)
        if features.dtype not in DTYPES:
            raise TypeError(f"dtype must be floating-point for the rows of a FeatureQueue; got {features.dtype}")
        if self._features.is_meta and not features.is_meta:  # `to_empty`: rows on meta had no values to move
            self.reset()
        self._features, self._labels = features, labels
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # Only here is the key known, which errors have to name.
        try:
            super()._load_from_state_dict(state_dict, prefix, *others)
        except (TypeError, ValueError) as error:
            error.args = (f"{prefix}_extra_state: {error}",)
            raise

    def _state(self) -> State:
        return State(self._features, self._labels, self._next, self._count, self._labelled)

    def _oldest_first(self, memory: Tensor) -> Tensor:
        # A view would change under a backward pass that is still to come. Until the queue is full, row 0 is the oldest.
        return torch.cat([memory[self._next : self._count], memory[: self._next]])

    def _checked(self, features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows and labels as they are stored, or the error that names the argument."""
        self._check_tensor("features", features)
        if not features.is_floating_point():
            raise TypeError(f"features must be floating-point; got {features.dtype}")
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (B, D) with D = {self.dim}; got shape {tuple(features.shape)}")
        self._check_labels(labels, len(features))
        check_values("features", features, signed=True, only_if_asked=True)
        rows = features.detach().to(self._features.dtype)
        return rows, None if labels is None else labels.detach().to(self._labels.dtype)

    def _check_tensor(self, name: str, value: object) -> None:
        device = self._features.device
        check_tensor(name, value, value.device if isinstance(value, Tensor) else device)
        if isinstance(value, Tensor) and value.device != device:
            call = "to_empty(device=...)" if device.type == "meta" else "to(...)"
            raise ValueError(
                f"{name} must be on the device of the queue, {device}; got {value.device}: queue.{call} moves the queue"
            )

    def _check_labels(self, labels: Tensor | None, count: int) -> None:
        if labels is None:
            if self.num_classes is not None:
                raise ValueError("labels is missing: a queue with num_classes holds label vectors (B, C)")
            if self._count and self._labelled:
                raise ValueError("labels is missing: the rows in this queue have labels; queue.reset() forgets them")
            return
        if not self._labelled:
            raise ValueError("labels must be left out: the rows in this queue have none; queue.reset() forgets them")
        self._check_tensor("labels", labels)
        if self.num_classes is None:
            _check_class_numbers(labels, count)
        elif tuple(labels.shape) != (count, self.num_classes):
            hint = "; torch.nn.functional.one_hot makes vectors of class numbers" if labels.dim() == 1 else ""
            raise ValueError(
                f"labels must be (B, C) with B = {count} as in features and C = {self.num_classes}; "
                f"got shape {tuple(labels.shape)}{hint}"
            )
        check_values("labels", labels, signed=self.num_classes is None)

    def _facts(self, labels: Tensor | None) -> dict[str, object]:
        """What makes queues of several processes one."""
        return {
            "size": self.size,
            "dim": self.dim,
            "num_classes": self.num_classes,
            "labels": "missing" if labels is None else "given",
            "the dtype of the queue": self._features.dtype,
            "the device of the queue": self._features.device.type,
            "the rows in the queue": f"{self._count}, the next one at {self._next}",
        }

    def _store(self, features: Tensor, labels: Tensor | None) -> None:
        count = min(len(features), self.size)
        before_end = min(count, self.size - self._next)  # the others go on at the start
        for memory, rows in ((self._features, features), (self._labels, labels)):
            if rows is not None:
                newest = rows[len(rows) - count :]
                memory[self._next : self._next + before_end] = newest[:before_end]
                memory[: count - before_end] = newest[before_end:]
        self._next = (self._next + count) % self.size
        self._count = min(self._count + count, self.size)
        if count:
            self._labelled = labels is not None


def _check_class_numbers(labels: Tensor, count: int) -> None:
    if labels.is_floating_point():
        raise TypeError(f"labels must be class numbers, integers, without num_classes; got {labels.dtype}")
    if tuple(labels.shape) != (count,):
        raise ValueError(f"labels must be (B,) with B = {count} as in features; got shape {tuple(labels.shape)}")
    if labels.dtype == torch.uint64 and may_look_at(labels) and bool((labels.view(torch.int64) < 0).any()):
        raise ValueError("labels must be below 2**63: the queue keeps them in int64")
