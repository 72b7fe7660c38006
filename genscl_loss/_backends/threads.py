"""Tasks on threads of their own, each of which computes alone: it never waits for another within an operation.

torch spreads every operation over all threads, which then wait for the last of them. Where a tile takes a millisecond
and other processes want the same cores, that is most of the time. Here a task, some milliseconds of operations, is done
by one thread, and the next is taken by whichever is free. Tasks that add to the same numbers do so in the order in
which they are given: results are the same to the bit, however many threads there are.
"""

import ctypes
import heapq
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import Condition, local

import torch

Work = Callable[[int, int], None]  # is told the number of the task and that of its lane


def lanes_for(num_tasks: int) -> int:
    """How many of so many tasks `run` does at a time: one for each thread that torch has here.

    One, in the caller's thread, where somebody counts or records operations there.
    """
    lanes = min(num_tasks, torch.get_num_threads())
    is_watched = torch._C._len_torch_dispatch_stack() > 0
    return lanes if lanes > 1 and not is_watched and _can_limit() else 1


def run(adds_to: Sequence[tuple[Hashable, ...]], work: Work, lanes: int) -> None:
    """Do a task for each entry, so many at a time; those of a lane, and those that add to the same, in order.

    Tasks write into tensors that were made before, and need no gradients. What one raises is raised here.
    """
    if lanes == 1:
        for task in range(len(adds_to)):
            work(task, 0)
        return
    schedule = _Schedule(adds_to)
    futures: list[Future[None]] = []
    try:
        for lane in range(lanes):
            futures.append(_pool().submit(_drain, schedule, work, lane))
        wait(futures)
    finally:
        schedule.stop()  # on an interrupt: what is under way writes to tensors that are about to go
        wait(futures)
    for future in futures:
        future.result()


class _Schedule:
    """Which task is next; shared by threads."""

    def __init__(self, adds_to: Sequence[tuple[Hashable, ...]]) -> None:
        last: dict[Hashable, int] = {}
        self._followers: list[list[int]] = [[] for _ in adds_to]
        self._awaited = [0] * len(adds_to)  # tasks that have to be done before
        for task, keys in enumerate(adds_to):
            for before in {last[key] for key in keys if key in last}:
                self._followers[before].append(task)
                self._awaited[task] += 1
            last.update(dict.fromkeys(keys, task))
        self._ready = [task for task, count in enumerate(self._awaited) if not count]  # sorted, and so a heap
        self._left = len(adds_to)  # to be taken
        self._changed = Condition()

    def take(self) -> int | None:
        """The first task that can be done, once there is one; None: none is left."""
        with self._changed:
            while self._left and not self._ready:
                self._changed.wait()
            if not self._left:
                return None
            self._left -= 1
            return heapq.heappop(self._ready)

    def finish(self, task: int) -> None:
        with self._changed:
            for follower in self._followers[task]:
                self._awaited[follower] -= 1
                if not self._awaited[follower]:
                    heapq.heappush(self._ready, follower)
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._left = 0
            self._changed.notify_all()


def _drain(schedule: _Schedule, work: Work, lane: int) -> None:
    if not hasattr(_limited, "once"):
        _limited.once = _limit()
    try:
        with torch.inference_mode():  # which a caller may be in; its own results are then of that kind
            while (task := schedule.take()) is not None:
                work(task, lane)
                schedule.finish(task)
    except BaseException:
        schedule.stop()
        raise


# ---- The threads ----

_limited = local()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1024, "genscl_loss")  # as many as are asked for at a time


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # no thread comes along


@cache
def _can_limit() -> bool:
    """Whether a thread can be told to compute alone."""
    with ThreadPoolExecutor(1) as one:
        return one.submit(_limit).result()


def _limit() -> bool:
    """Have the current thread compute alone, and no other: `torch.set_num_threads` tells all that come later, too."""
    torch.get_num_threads()  # sets what is about to be changed, once in each thread
    library = ctypes.CDLL(torch._C.__file__)  # finds what torch is linked with
    names = ["omp_set_num_threads"]
    if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        names.append("MKL_Set_Num_Threads_Local")
    for name in names:
        if not hasattr(library, name):
            return False
        getattr(library, name)(1)
    return torch.get_num_threads() == 1
