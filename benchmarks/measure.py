"""How one case is measured: every method is checked, then those that are right take turns."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from cases import Problem, compute_dtype, sampled
from contenders import Method, Run
from meters import (
    FEW_REPLAYS,
    REPLAYS,
    available_bytes,
    capture,
    count_kernels,
    is_repeatable,
    release,
    run_for_memory,
    time_call,
    time_once,
)
from reference import Errors, Reference, errors, float64_reference
from torch import Tensor

MOST_TURNS = 300
LAUNCH_BOUND = 1024  # samples; up to here a GPU waits for its host, and graphs take turns as methods do

# Beyond these a result is wrong, not inexact: a bfloat16 gradient is off by 3e-3, a row in TF32 by 1e-2.
WRONG = Errors(loss=0.01, row=0.1, gradient=0.05)


@dataclass
class Result:
    method: str
    title: str
    kind: str
    status: str = "ok"  # or why there is nothing to show
    forward_ms: list[float] = field(default_factory=list)  # lower quartile, median, upper quartile
    backward_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)  # of forward + backward
    graph_ms: list[float] = field(default_factory=list)  # the same, replayed as one CUDA graph
    graph_status: str | None = None  # "ok", or why there is no graph; None: not looked at
    kernels: list[int] | None = None  # of the forward and of the backward pass
    turns: int = 0
    extra_bytes: int | None = None  # at the peak; the gradient counts, the inputs do not
    loss_error: float | None = None  # relative to float64
    row_error: float | None = None  # absolute, the largest over the anchors
    gradient_error: float | None = None  # relative, in norm
    checked_anchors: int | None = None
    repeats: int = 0  # how often it was run to see whether the result is the same to the bit
    identical: bool | None = None

    @property
    def median_ms(self) -> float | None:
        return self.total_ms[1] if self.total_ms else None


def measure_case(
    problem: Problem,
    methods: list[Method],
    *,
    turns: int | None,
    seconds: float,
    progress: Any,
    repeats: int = 0,
) -> list[Result]:
    """Check every method, then time those that work, in turns; `repeats` runs of ours are compared bit by bit."""
    if any(method.compiles for method in methods):
        torch.compiler.reset()  # no limit on recompilation
    reference = cache(partial(float64_reference, sampled(problem)))
    results, runs = [], []
    for method in methods:
        progress.show(f"{problem.case}: {method.title}")
        result = Result(method.key, method.title, method.kind)
        run = check(problem, method, reference, result, repeats)
        if run is not None:
            runs.append((run, result))
        results.append(result)
        progress.advance()
    progress.show(f"{problem.case}: timing")
    time_in_turns(runs, problem.device, turns, seconds)
    if problem.device.type == "cuda":
        look_at_all_launches(runs, problem.case.n, problem.device, turns, seconds)
    for run, _ in runs:
        run.leaf.grad = None
    return results


def check(
    problem: Problem, method: Method, reference: Callable[[str], Reference], result: Result, repeats: int = 0
) -> Run | None:
    """Run once and fill in memory and errors; return what is to be timed, or None with the reason in `result`."""
    itemsize = torch.empty(0, dtype=compute_dtype(problem.features)).element_size()
    needed, available = method.matrices * problem.case.n**2 * itemsize, available_bytes(problem.device)
    if available is not None and needed > available:
        result.status = f"skipped (needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free)"
        return None
    try:
        run = method.start(problem)
        if method.compiles or problem.device.type == "cuda":
            time_once(run, problem.device)
        output, extra_bytes = run_for_memory(run, problem.device)
        if method.quantity is not None:
            result.extra_bytes = extra_bytes
            compare(problem, method, reference, result, output, run.leaf.grad)
        if repeats and method.ours:
            result.repeats, result.identical = repeats, is_repeatable(run, repeats)
    except Exception as error:  # a peer may fail for any reason of its own; the others are still worth measuring
        result.status = f"failed ({reason(error)})"
    return run if result.status == "ok" else None


def reason(error: Exception) -> str:
    """What an exception says, in one line, without paths of this machine."""
    first_line = re.sub(r"\S*[/\\]\S+", "<path>", (str(error).strip() or "no message").splitlines()[0])
    return f"{type(error).__name__}: {first_line[:160]}"


def compare(
    problem: Problem,
    method: Method,
    reference: Callable[[str], Reference],
    result: Result,
    output: Tensor,
    gradient: Tensor,
) -> None:
    """Fill in the errors against float64. Where not all anchors can be checked, run once more with a few that count."""
    checked = sampled(problem)
    if checked.sample is not None:
        if not method.samples:
            return
        run = method.start(checked)
        run.leaf.grad = None
        output = run.forward()
        run.backward(output)
        gradient = run.leaf.grad
    expected = reference(method.quantity)
    share = expected.nonempty if method.skips_empty_anchors else 1.0
    found = errors(checked, expected, output, gradient, share)
    result.loss_error, result.row_error, result.gradient_error = found
    result.checked_anchors = len(checked.anchors)
    for name, error, limit in zip(Errors._fields, found, WRONG, strict=True):
        if error is not None and not error <= limit:  # nor is NaN
            result.status = f"wrong ({name} error {error:.1e})"


def time_in_turns(runs: list[tuple[Run, Result]], device: torch.device, turns: int | None, seconds: float) -> None:
    """Interleave the methods, so that a slow moment of the machine falls on all of them; fill in their times."""
    times = take_turns([partial(time_once, run, device) for run, _ in runs], turns, seconds)
    for (_, result), taken in zip(runs, times, strict=True):
        result.turns = len(taken)
        result.forward_ms = quartiles([1e3 * forward for forward, _ in taken])
        result.backward_ms = quartiles([1e3 * (total - forward) for forward, total in taken])
        result.total_ms = quartiles([1e3 * total for _, total in taken])


def take_turns(readings: list[Callable[[], object]], turns: int | None, seconds: float) -> list[list]:
    """What each reading returned, turn by turn: as many turns as were asked for, or as fit into the time.

    The order is drawn anew for every turn: none is always the one that finds the caches full of another's tensors.
    """
    taken: list[list] = [[] for _ in readings]
    order, shuffle = list(range(len(readings))), random.Random(0).shuffle
    start = time.perf_counter()
    for turn in range(turns or MOST_TURNS):
        if turns is None and turn >= 3 and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for k in order:
            taken[k].append(readings[k]())
    return taken


def look_at_all_launches(
    runs: list[tuple[Run, Result]], n: int, device: torch.device, turns: int | None, seconds: float
) -> None:
    """Small graphs side by side; of large batches one at a time, for each keeps the memory of both passes."""
    groups = [runs] if n <= LAUNCH_BOUND else [[entry] for entry in runs]
    for group in groups:
        replays = REPLAYS if n <= LAUNCH_BOUND else FEW_REPLAYS
        look_at_launches(group, device, turns, seconds / len(groups), replays)
        for run, _ in group:
            run.leaf.grad = None  # it is the graph's
        release(device)


def look_at_launches(
    runs: list[tuple[Run, Result]], device: torch.device, turns: int | None, seconds: float, times: int = REPLAYS
) -> None:
    """Count the kernels of both passes, and time them without their launches: replayed as a CUDA graph."""
    replays = []
    for run, result in runs:
        try:
            result.kernels = count_kernels(run, device)
            expected = run_for_memory(run, device)[0], run.leaf.grad
            replay, output = capture(run, device)
            replays.append((replay, result))
            result.graph_status = verdict(replay, (output, run.leaf.grad), expected)
        except Exception as error:  # of many kinds: whatever a method does that a graph cannot hold
            result.graph_status = f"no CUDA graph ({reason(error)})"
    replays = [(replay, result) for replay, result in replays if result.graph_status == "ok"]
    readings = [partial(time_call, replay, device, times) for replay, _ in replays]
    for (_, result), taken in zip(replays, take_turns(readings, turns, seconds), strict=True):
        result.graph_ms = quartiles([1e3 * reading for reading in taken])


def verdict(replay: Callable[[], None], filled: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str:
    """Whether a replay fills in what was expected, up to the order of sums."""
    for tensor in filled:
        tensor.fill_(torch.nan)
    replay()
    for name, tensor, other in zip(("output", "gradient"), filled, expected, strict=True):
        if not (tensor - other).norm() <= 1e-3 * other.norm():
            return f"no CUDA graph (its {name} differs)"
    return "ok"


def quartiles(values: list[float]) -> list[float]:
    return [float(q) for q in np.percentile(values, [25, 50, 75])]
