"""What is saved of a queue: one tensor of integers, from which the queue comes back bit for bit.

One tensor under torch's own key, `_extra_state`: of a module's other keys `torch.distributed.checkpoint` knows
parameters and buffers only, and does not find the rest again in models that are compiled or wrapped in DDP. Of
integers, because what averages states copies those instead of mixing them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)

# What the tensor begins with. Sums of it overflow, and floating-point types round it: no mean of states begins like it.
_MARK = 0x47656E51_75657565
_HEADER = 8  # numbers in front of the memory


class State(NamedTuple):
    """All that changes in a queue."""

    features: Tensor  # (size, D)
    labels: Tensor  # (size,) in int64 or (size, C) in the dtype of the features
    position: int  # of the next row
    rows: int  # that are filled
    labelled: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Size, D and C; C is 0 for class numbers."""
        size, dim = self.features.shape
        return size, dim, self.labels.shape[1] if self.labels.dim() > 1 else 0


def pack(state: State) -> Tensor:
    """A copy of the state in one tensor, on its device: numbers, then the bits of features and labels."""
    dtype = DTYPES.index(state.features.dtype)
    header = [_MARK, *state.sizes, dtype, state.position, state.rows, int(state.labelled)]
    words = [torch.tensor(header, dtype=torch.int64, device=state.features.device)]
    for memory in (state.features, state.labels):
        octets = memory.reshape(-1).view(torch.uint8)
        words.append(nn.functional.pad(octets, (0, -len(octets) % 8)).view(torch.int64))
    return torch.cat(words)


def unpack(saved: Tensor | dict[str, Any], own: State) -> State:
    """What was saved of a queue that has the sizes of `own`, or the error that says what is wrong with it."""
    state = _of_first_version(saved) if isinstance(saved, dict) else _unpacked(saved, own)
    _check_sizes(state.sizes, own.sizes)
    size, rows = own.sizes[0], state.rows
    if not 0 <= rows <= size or not 0 <= state.position < size or (rows < size and state.position != rows):
        raise ValueError(f"state is damaged: {rows} of {size} rows, the next one at {state.position}")
    return state


def _unpacked(saved: object, own: State) -> State:
    expected = "state must be what a FeatureQueue saves, a row of int64"
    if not isinstance(saved, Tensor):
        raise TypeError(f"{expected}; got {type(saved).__name__}")
    if saved.is_meta:
        raise ValueError(f"{expected}; this one is on meta, where there are no values")
    if saved.dtype != torch.int64 or saved.dim() != 1:
        raise ValueError(
            f"{expected}; got {saved.dtype} of shape {tuple(saved.shape)}: a cast, or a mean, of a state is none"
        )
    header = saved[:_HEADER].tolist()
    if len(header) < _HEADER or header[0] != _MARK:
        raise ValueError(f"{expected}; this is something else, or a mean of several")
    _, size, dim, classes, dtype, position, rows, labelled = header
    _check_sizes((size, dim, classes), own.sizes)
    if not 0 <= dtype < len(DTYPES) or labelled not in (0, 1):
        raise ValueError(f"state is damaged: dtype {dtype}, labelled {labelled}")
    features_dtype = DTYPES[dtype]
    labels_dtype = features_dtype if classes else torch.int64
    octets = [own.features.numel() * features_dtype.itemsize, own.labels.numel() * labels_dtype.itemsize]
    middle = _HEADER - (-octets[0] // 8)
    end = middle - (-octets[1] // 8)
    if len(saved) != end:
        raise ValueError(f"state is damaged: {end} numbers expected; got {len(saved)}")
    features, labels = (part.contiguous().view(torch.uint8) for part in (saved[_HEADER:middle], saved[middle:]))
    return State(
        features[: octets[0]].view(features_dtype).view_as(own.features),
        labels[: octets[1]].view(labels_dtype).view_as(own.labels),
        position,
        rows,
        bool(labelled),
    )


def _of_first_version(saved: dict[str, Any]) -> State:
    """The first version saved a dict, and all rows had labels."""
    names = ("features", "labels", "next", "count")
    if not all(name in saved for name in names):
        wanted = ", ".join(names)
        raise ValueError(f"state must be a tensor, or as the first version saved it a dict of {wanted}; got {[*saved]}")
    features, labels, position, rows = (saved[name] for name in names)
    for name, value, dims in (("features", features, (2,)), ("labels", labels, (1, 2))):
        if not isinstance(value, Tensor) or value.dim() not in dims or value.is_floating_point() != (value.dim() == 2):
            raise ValueError(f"state is damaged: {name} is not that of a queue")
    if len(features) != len(labels):
        raise ValueError(f"state is damaged: {len(features)} features and {len(labels)} labels")
    return State(features, labels, int(position), int(rows), labelled=True)


def _check_sizes(saved: tuple[int, int, int], own: tuple[int, int, int]) -> None:
    if saved != own:
        theirs, ours = (f"size {size}, dim {dim} and num_classes {c or None}" for size, dim, c in (saved, own))
        raise ValueError(f"state is of a queue of {theirs}; this one has {ours}")
