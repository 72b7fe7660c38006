"""The instruments: time, memory, repeatability, and on a GPU its kernels and graphs. All that depends on the device."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from contenders import Run
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and stop otherwise

REPLAYS = 20  # of a CUDA graph for one reading, so that the launch of the first does not count
FEW_REPLAYS = 3  # of large batches, whose launch takes no part of it


# ---- Time ----


def time_once(run: Run, device: torch.device) -> tuple[float, float]:
    """Seconds of the forward pass (which records what the backward pass needs) and of both passes."""
    run.leaf.grad = None
    if device.type == "cuda":
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize(device)
        begin.record()
        output = run.forward()
        middle.record()
        run.backward(output)
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(middle) / 1e3, begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    output = run.forward()
    forward = time.perf_counter() - start
    run.backward(output)
    return forward, time.perf_counter() - start


def time_call(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of one of so many calls in a row."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3 / times
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


# ---- Memory ----


def run_for_memory(run: Run, device: torch.device) -> tuple[Tensor, int]:
    """The output of the forward pass, and by how many bytes both passes raise the peak of torch's allocator."""
    run.leaf.grad = None
    gc.collect(1)  # nothing of another method shall be freed meanwhile; old generations hold none of it
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = run.forward()
        run.backward(output)
        return output.detach(), torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        output = run.forward()
        run.backward(output)
    return output.detach(), peak_of_profile(profile)


def peak_of_profile(profile: torch.profiler.profile) -> int:
    """Largest running sum of all allocations and frees on the CPU, in the order in which they happened."""
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, size in changes:
        now += size
        peak = max(peak, now)
    return peak


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device; None where it cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = meminfo("MemAvailable")
    try:  # the limit of a container may be lower
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return limit if available is None else min(available, limit)


def meminfo(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def release(device: torch.device) -> None:
    """Give back what a graph kept, once nothing refers to it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- Repeatability ----


def is_repeatable(run: Run, repeats: int) -> bool:
    """Whether output and gradient are the same to the bit every time, whatever their memory held before."""

    def once() -> tuple[Tensor, Tensor]:
        run.leaf.grad = None
        shapes = 2 * (run.leaf.shape, run.leaf.shape[:1])
        poison = [run.leaf.new_full(shape, torch.nan, dtype=torch.float32) for shape in shapes]
        del poison  # the allocator hands such memory out again, now as results
        output = run.forward()
        run.backward(output)
        return output.detach(), run.leaf.grad

    first = once()
    return all(torch.equal(a, b) for _ in range(repeats - 1) for a, b in zip(first, once(), strict=True))


# ---- Kernels and graphs, of a GPU alone ----


def count_kernels(run: Run, device: torch.device) -> list[int]:
    """How many kernels, copies and fills the GPU executes for the forward and for the backward pass."""
    outputs: list[Tensor] = []

    def counted(work: Callable[[], object]) -> int:
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize(device)
        return device_events(profile.events())

    run.leaf.grad = None
    counted(lambda: outputs.append(run.forward()))  # the first recording of a process may miss something
    return [counted(lambda: outputs.append(run.forward())), counted(lambda: run.backward(outputs.pop()))]


def device_events(events: Iterable[Any]) -> int:
    """Events of the GPU's timeline, without the names that code gives to stretches of it."""
    return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events)


def capture(run: Run, device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Both passes as one CUDA graph: how to replay it, and the output that a replay fills in anew.

    Raises whatever prevents it. A method that waits for the GPU is found by torch's own check beforehand: letting the
    capture fail would leave the allocator of torch < 2.12 in the middle of it.
    """
    side = torch.cuda.Stream(device)

    def both() -> Tensor:
        run.leaf.grad = None
        output = run.forward()
        run.backward(output)
        return output

    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            both()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        output = both()
    return graph.replay, output.detach()
