"""What processes tell each other. The only file that communicates.

Every collective is differentiated as a part of the sum of the losses of all processes: what one process sent to others
gets back what they made of it. The global loss is the same number on each of W processes, so gradients come out W times
as large as those of the loss, and the averaging of DDP and FSDP over as many processes makes them exact.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Its name since torch 2.13, and the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

_SIZES = 2  # that a process tells the others, at most
_TEXT = 2048  # bytes of what a process says when there is something to say

_refusing: ContextVar[Exception | None] = ContextVar("genscl_loss_refusing", default=None)


class Members(NamedTuple):
    """The processes of a group, seen from one of them."""

    group: Any  # dist.ProcessGroup
    rank: int  # within the group
    size: int
    device: torch.device  # where small numbers are exchanged

    @staticmethod
    def check(group: object) -> None:
        """Check what is to be a group later: all processes need not be there yet."""
        if not (isinstance(group, str) and group == "world"):
            Members.of(group)

    @staticmethod
    def of(group: object) -> "Members":
        """Check a group without communicating: what is wrong here is wrong for this process alone."""
        if not dist.is_available():
            raise ValueError("group cannot be used: this build of torch has no torch.distributed")
        if isinstance(group, str) and group == "world":
            if not dist.is_initialized():
                raise ValueError('group="world" needs torch.distributed.init_process_group() before the first call')
            group = dist.group.WORLD
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group does not contain this process")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f'group must be "world", for all processes, or a torch.distributed.ProcessGroup; got '
                f"{repr(group) if isinstance(group, str) else type(group).__name__}"
            )
        try:
            backends = dist.get_backend_config(group)
            rank, size = dist.get_rank(group), dist.get_world_size(group)
        except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
            raise ValueError("group is not initialized, or was destroyed") from error
        if rank < 0:
            raise ValueError("group does not contain this process")
        # On the host where it can be: on a GPU each exchange makes the host wait for the device.
        on_host = "cpu" in backends or backends == "gloo"
        device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
        return Members(group, rank, size, device)

    def agree(self, facts: dict[str, object], *sizes: int) -> list[tuple[int, ...]]:
        """Tell the others the sizes here, and make sure that they have the same facts.

        Args:
            facts: What must be the same everywhere, by the name of the argument that it comes from.
            sizes: What may differ.

        Returns:
            The sizes of each process.

        Raises:
            ValueError: On every process, if facts differ or a process called `refuse`.
        """
        if (error := _refusing.get()) is not None:
            self.refuse(error)
            raise RuntimeError("this process refused to take part")
        return self._exchange("\n".join(f"{name}\t{value}" for name, value in facts.items()), sizes)

    def refuse(self, error: Exception) -> None:
        """Have the others raise instead of waiting for a process whose arguments are wrong."""
        # What the others say does not matter here, where `error` is about to be raised.
        error = _refusing.get() or error
        text = f"\t{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._exchange(text, (), raises=False)

    def _exchange(self, text: str, sizes: tuple[int, ...], *, raises: bool = True) -> list[tuple[int, ...]]:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        # Of one length, whoever asks: a process may compute a loss while another enqueues.
        row = [int.from_bytes(digest, "little", signed=True), *sizes, *[0] * (_SIZES - len(sizes))]
        table = self._all(torch.tensor([row], device=self.device)).tolist()
        if any(other[0] != row[0] for other in table):
            said = text.encode()[:_TEXT].ljust(_TEXT)
            texts = self._all(torch.tensor([list(said)], dtype=torch.uint8, device=self.device)).tolist()
            if raises:
                raise ValueError(_disagreement([bytes(one).decode(errors="ignore").rstrip(" ") for one in texts]))
        return [tuple(other[1 : 1 + len(sizes)]) for other in table]

    def _all(self, row: Tensor) -> Tensor:
        return gather(row, [1] * self.size, self)


def refuse_in(call: Callable[[], object], error: Exception) -> None:
    """Have `refuse` called, because of an error, in the place where a call would begin to communicate, if it does."""
    if not dist.is_available() or not dist.is_initialized():
        return
    token = _refusing.set(error)
    try:
        with torch.no_grad(), suppress(Exception):
            call()
    finally:
        _refusing.reset(token)


def _disagreement(texts: Sequence[str]) -> str:
    """What went wrong, from what each process said."""
    for rank, text in enumerate(texts):
        if text.startswith("\t"):
            return f"group: process {rank} could not take part: {text.strip()}"
    facts = [dict(line.split("\t", 1) for line in text.split("\n") if "\t" in line) for text in texts]
    for name in dict.fromkeys(name for said in facts for name in said):
        values = [said.get(name, "nothing") for said in facts]
        if len(set(values)) > 1:
            ranks = {value: [i for i, other in enumerate(values) if other == value] for value in values}
            told = "; ".join(f"{value} on {_processes(where)}" for value, where in ranks.items())
            return f"group: processes differ in {name}: {told}"
    return "group: processes called with different arguments"


def _processes(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} others" if len(ranks) > 4 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"


# ---- Collectives ----


def gather(rows: Tensor, counts: Sequence[int], members: Members) -> Tensor:
    """The rows of all processes, in the order of their ranks; no gradient."""
    # As bytes: every backend takes them, whatever the dtype. Of equal number, because not every backend takes others.
    most, (count, *rest) = max(counts), rows.shape
    own = rows.detach().reshape(count, math.prod(rest)).contiguous()
    if own.stride(1) != 1:  # which one column may have
        own = own.clone(memory_format=torch.contiguous_format)
    own = own.view(torch.uint8)
    if count < most:
        own = torch.cat([own, own.new_zeros(most - count, own.shape[1])])
    every = own.new_empty(members.size * most, own.shape[1])
    _all_gather(every, own, group=members.group)
    if min(counts) < most:
        every = torch.cat([every[rank * most :][:count] for rank, count in enumerate(counts)])
    return every.view(rows.dtype).view(-1, *rest)


def _scatter_sum(rows: Tensor, counts: Sequence[int], members: Members) -> Tensor:
    """Of rows for all processes, in the order of their ranks, the sum of those for this one over all processes."""
    own = counts[members.rank]
    parts = rows.new_empty(members.size * own, *rows.shape[1:])
    dist.all_to_all_single(parts, rows.contiguous(), [own] * members.size, list(counts), group=members.group)
    return parts.view(members.size, own, *rows.shape[1:]).sum(0)  # in one order, whatever the network does


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], members: Members) -> Tensor:
        ctx.counts, ctx.members = counts, members
        return gather(rows, counts, members)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ScatterSum.apply(grad, ctx.counts, ctx.members), None, None  # type: ignore[no-untyped-call]


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], members: Members) -> Tensor:
        ctx.counts, ctx.members = counts, members
        return _scatter_sum(rows, counts, members)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(grad, ctx.counts, ctx.members), None, None  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, members: Members) -> Tensor:
        ctx.members = members
        total = x.clone()
        dist.all_reduce(total, group=members.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(grad.contiguous(), ctx.members), None  # type: ignore[no-untyped-call]


def gather_with_gradient(rows: Tensor, counts: Sequence[int], members: Members) -> Tensor:
    """`gather`, whose gradient returns to the owners of the rows."""
    every: Tensor = _Gather.apply(rows, counts, members)  # type: ignore[no-untyped-call]
    return every


def sum_over(x: Tensor, members: Members) -> Tensor:
    """The sum over all processes; its gradient is that of all of them."""
    total: Tensor = _Sum.apply(x, members)  # type: ignore[no-untyped-call]
    return total
