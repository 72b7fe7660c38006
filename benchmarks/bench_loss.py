"""Time, memory and accuracy of the loss beside what one would use without it, in one run on one machine.

    python benchmarks/bench_loss.py                            # minutes, on a GPU if there is one
    python benchmarks/bench_loss.py --smoke                    # seconds: does it run at all?
    python benchmarks/bench_loss.py --n 1024 4096 --d 512      # cases of your own: the product of the lists

Every method of a case gets the same tensors. It runs once for its result and its memory; then all methods take turns,
one forward and one backward pass each, until the time of the case is spent. What is printed are medians over the turns.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from plot import draw
from torch import Tensor

from genscl_loss import __version__, available_backends, gen_supcon_loss
from genscl_loss._backends import row_lse
from genscl_loss._backends.tiled import TILE

TEMPERATURE = 0.07
SIZES = {
    "cpu": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "cuda": (64, 256, 1024, 4096, 16384, 32768, 65536, 131072),
}
REFERENCE_AT_MOST = 16384  # samples; beyond, the float64 reference would take longer than all else
MOST_TURNS = 300
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- The inputs ----


@dataclass(frozen=True)
class Case:
    n: int
    d: int = 128
    c: int = 100
    labels: str = "soft"
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"N={self.n}  D={self.d}  C={self.c}  {self.labels} labels  {self.dtype}"


@dataclass(frozen=True)
class Problem:
    case: Case
    features: Tensor  # (N, D), a leaf
    labels: Tensor  # (N,) integers, or (N, C) whose rows sum to one

    @property
    def device(self) -> torch.device:
        return self.features.device


def make_problem(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(case.n, case.d, generator=generator).to(device, DTYPES[case.dtype]).requires_grad_()
    if case.labels == "hard":
        labels = torch.randint(case.c, (case.n,), generator=generator)
    else:
        labels = torch.softmax(3 * torch.randn(case.n, case.c, generator=generator), 1)
        labels = labels.to(compute_dtype(features))
    return Problem(case, features, labels.to(device))


def compute_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


# ---- The methods ----


class Run(NamedTuple):
    """One method on one problem: `backward` takes what `forward` returned, and leaves a gradient on `leaf`."""

    leaf: Tensor
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object]


@dataclass(frozen=True)
class Method:
    key: str
    title: str
    kind: str  # "ours", "peer", or "yardstick": a part of the work, timed only
    prepare: Callable[[Problem], Run]
    matrices: float = 0  # N x N matrices of the computing dtype that it holds at its peak
    compiles: bool = False
    labels: tuple[str, ...] = ("soft", "hard")
    skips_empty_anchors: bool = False  # its mean is over the anchors that have positives


def plain_dense(features: Tensor, labels: Tensor) -> Tensor:
    """The paper's equation, written down."""
    z = F.normalize(features.to(compute_dtype(features)), dim=1)
    if labels.is_floating_point():
        y = F.normalize(labels, dim=1)
        w = y @ y.T
    else:
        w = (labels[:, None] == labels).to(z.dtype)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    w.masked_fill_(itself, 0)
    s = (z / TEMPERATURE) @ z.T
    log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return (-(w * log_p).sum(1) / (w.sum(1) + 1e-8)).mean()


def lean_dense(features: Tensor, labels: Tensor) -> Tensor:
    """The same with a finite mask, so that the fused log_softmax can be used: one matrix and one pass less."""
    z = F.normalize(features.to(compute_dtype(features)), dim=1)
    if labels.is_floating_point():
        y = F.normalize(labels, dim=1)
        w = y @ y.T
    else:
        w = (labels[:, None] == labels).to(z.dtype)
    w.fill_diagonal_(0)
    log_p = ((z / TEMPERATURE) @ z.T).fill_diagonal_(-1e9).log_softmax(1)
    return (-(w * log_p).sum(1) / (w.sum(1) + 1e-8)).mean()


def run_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        return Run(problem.features, lambda: loss(problem.features, problem.labels), Tensor.backward)

    return prepare


def run_ours(backend: str) -> Callable[[Problem], Run]:
    return run_loss(lambda x, y: gen_supcon_loss(x, y, temperature=TEMPERATURE, base_temperature=None, backend=backend))


def run_compiled(problem: Problem) -> Run:
    torch.compiler.reset()  # each shape is compiled for itself: the faster code, and no limit on recompilation
    return run_loss(torch.compile(plain_dense, dynamic=False))(problem)


def run_pml(problem: Problem) -> Run:
    from pytorch_metric_learning.losses import SupConLoss

    return run_loss(SupConLoss(temperature=TEMPERATURE))(problem)


def run_lse(problem: Problem) -> Run:
    """The bare pairwise operator: what is left of "tiled" without labels and normalisation."""
    z = unit_rows(problem)
    scale = torch.tensor(1 / TEMPERATURE, dtype=z.dtype, device=z.device)
    upstream = torch.full((len(z),), 1 / len(z), dtype=z.dtype, device=z.device)
    leaf = z.requires_grad_()
    return Run(leaf, lambda: row_lse(leaf, None, scale, 0, "tiled"), lambda lse: lse.backward(upstream))


def run_mm(problem: Problem) -> Run:
    """The matrix products that "tiled" performs, into buffers made beforehand, and nothing else."""
    z = unit_rows(problem)
    tiles, rows_out, cols_out = z.new_empty(TILE * TILE), z.new_empty(TILE, z.shape[1]), z.new_empty(TILE, z.shape[1])
    blocks = z.split(TILE)

    def products() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for i, rows in enumerate(blocks):
            for j, cols in enumerate(blocks[i:]):
                tile = tiles[: len(rows) * len(cols)].view(len(rows), len(cols))
                torch.mm(rows, cols.T, out=tile)
                yield tile, rows, cols if j else None

    def forward() -> Tensor:
        for _ in products():
            pass
        return tiles

    def backward(_: Tensor) -> None:
        for tile, rows, cols in products():
            torch.mm(tile, rows if cols is None else cols, out=rows_out[: len(rows)])
            if cols is not None:
                torch.mm(tile.T, rows, out=cols_out[: len(cols)])

    return Run(z, forward, backward)


def unit_rows(problem: Problem) -> Tensor:
    x = problem.features.detach()
    return F.normalize(x.to(compute_dtype(x)), dim=1)


def all_methods() -> dict[str, Method]:
    dense_matrices = {"dense": 3.4}  # found by measuring; the others need a fraction of one
    ours = [
        Method(name, f"genscl {name}", "ours", run_ours(name), dense_matrices.get(name, 0))
        for name in ("auto", *reversed(available_backends()))
    ]
    others = [
        Method("plain", "plain dense", "peer", run_loss(plain_dense), 5.4),
        Method("compiled", "plain, torch.compile", "peer", run_compiled, 2.2, compiles=True),
        Method("lean", "plain, log_softmax", "peer", run_loss(lean_dense), 3.1),
        Method("pml", "PML SupConLoss", "peer", run_pml, 11.4, labels=("hard",), skips_empty_anchors=True),
        Method("lse", "genscl row_lse only", "yardstick", run_lse),
        Method("mm", "torch.mm only", "yardstick", run_mm),
    ]
    return {method.key: method for method in ours + others}


def absent_packages() -> dict[str, str]:
    """Optional packages that cannot be imported, and what is left out for that reason."""
    purposes = {
        "pytorch_metric_learning": "its SupConLoss is not measured",
        "tqdm": "progress is plain text",
        "matplotlib": "no plot is drawn",
    }
    absent = {}
    for name, consequence in purposes.items():
        try:
            __import__(name)
        except ImportError:
            absent[name.replace("_", "-")] = consequence
    return absent


# ---- The float64 reference ----


class Reference(NamedTuple):
    loss: float
    gradient: Tensor  # (N, D), float64
    nonempty: float  # share of the anchors that have positives


def float64_reference(problem: Problem) -> Reference | None:
    """The dense evaluation in float64, a block of rows at a time."""
    n = problem.case.n
    if n > REFERENCE_AT_MOST:
        return None
    x = problem.features.detach().double().requires_grad_()
    y = F.normalize(problem.labels.double(), dim=1) if problem.labels.is_floating_point() else problem.labels
    z = F.normalize(x, dim=1)
    leaf = z.detach().requires_grad_()
    loss, nonempty = 0.0, 0.0
    for rows in torch.arange(n, device=x.device).split(max(1, 2**23 // n)):
        itself = rows[:, None] == torch.arange(n, device=x.device)
        w = (y[rows] @ y.T if y.dim() == 2 else (y[rows, None] == y).double()).masked_fill_(itself, 0)
        s = (leaf[rows] / TEMPERATURE) @ leaf.T
        lse = s.masked_fill(itself, -torch.inf).logsumexp(1)
        mass = w.sum(1)
        part = ((mass * lse - (w * s).sum(1)) / (mass + 1e-8)).sum() / n
        part.backward()
        loss += part.item()
        nonempty += (mass > 1e-8).sum().item() / n
    z.backward(leaf.grad)
    return Reference(loss, x.grad, nonempty)


def relative_errors(method: Method, loss: Tensor, gradient: Tensor, reference: Reference) -> tuple[float, float]:
    share = reference.nonempty if method.skips_empty_anchors else 1.0
    expected_loss, expected_gradient = reference.loss / share, reference.gradient / share
    loss_error = abs(loss.item() - expected_loss) / abs(expected_loss)
    gradient_error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    return loss_error, gradient_error.item()


# ---- Measuring ----


@dataclass
class Result:
    method: str
    title: str
    kind: str
    status: str = "ok"  # or why there is nothing to show
    forward_ms: list[float] = field(default_factory=list)  # lower quartile, median, upper quartile
    total_ms: list[float] = field(default_factory=list)  # the same, of forward + backward
    turns: int = 0
    extra_bytes: int | None = None  # at the peak; the gradient counts, the inputs do not
    loss_error: float | None = None  # relative to float64
    gradient_error: float | None = None  # relative, in norm

    @property
    def median_ms(self) -> float | None:
        return self.total_ms[1] if self.total_ms else None


def measure_case(
    problem: Problem, methods: list[Method], *, turns: int | None, seconds: float, progress: Progress
) -> list[Result]:
    """Check every method once, then time those that work, in turns."""
    reference = float64_reference(problem)
    progress.advance()
    results, runs = [], []
    for method in methods:
        progress.show(f"{problem.case}: {method.title}")
        result = Result(method.key, method.title, method.kind)
        run = check(problem, method, reference, result)
        if run is not None:
            runs.append((run, result))
        results.append(result)
        progress.advance()
    progress.show(f"{problem.case}: timing")
    time_in_turns(runs, problem.device, turns, seconds)
    return results


def check(problem: Problem, method: Method, reference: Reference | None, result: Result) -> Run | None:
    """Run once and fill in memory and errors; return what is to be timed, or None with the reason in `result`."""
    itemsize = torch.empty(0, dtype=compute_dtype(problem.features)).element_size()
    needed, available = method.matrices * problem.case.n**2 * itemsize, available_bytes(problem.device)
    if available is not None and needed > available:
        result.status = f"skipped (needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free)"
        return None
    try:
        run = method.prepare(problem)
        if method.compiles or problem.device.type == "cuda":
            time_once(run, problem.device)
        output, extra_bytes = run_for_memory(run, problem.device)
    except Exception as error:  # a peer may fail for any reason of its own; the others are still worth measuring
        first_line = re.sub(r"\S*[/\\]\S+", "<path>", (str(error).strip() or "no message").splitlines()[0])
        result.status = f"failed ({type(error).__name__}: {first_line[:160]})"
        return None
    if method.kind != "yardstick":
        result.extra_bytes = extra_bytes
        if reference is not None and problem.features.grad is not None:
            errors = relative_errors(method, output, problem.features.grad, reference)
            result.loss_error, result.gradient_error = errors
    return run


def time_in_turns(runs: list[tuple[Run, Result]], device: torch.device, turns: int | None, seconds: float) -> None:
    """Interleave the methods, so that a slow moment of the machine falls on all of them; fill in their times.

    The order is drawn anew for every turn: none is always the one that finds the caches full of another's tensors.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    order, shuffle = list(range(len(runs))), random.Random(0).shuffle
    start = time.perf_counter()
    for turn in range(turns or MOST_TURNS):
        if turns is None and turn >= 3 and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for k in order:
            times[k].append(time_once(runs[k][0], device))
    for (run, result), taken in zip(runs, times, strict=True):
        run.leaf.grad = None
        result.turns = len(taken)
        result.forward_ms = quartiles([1e3 * forward for forward, _ in taken])
        result.total_ms = quartiles([1e3 * total for _, total in taken])


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


def quartiles(values: list[float]) -> list[float]:
    return [float(q) for q in np.percentile(values, [25, 50, 75])]


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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and stop otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
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
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
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


# ---- Progress ----


class Progress:
    """A bar if tqdm is installed and someone watches; otherwise a line on stderr for each case."""

    def __init__(self, total: int) -> None:
        self.bar, self.last = None, ""
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit="step", leave=False, dynamic_ncols=True)

    def show(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(text)
        elif (case := text.partition(":")[0]) != self.last:
            print(f"measuring {case} ...", file=sys.stderr, flush=True)
            self.last = case

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def write(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# ---- The report ----


def table(case: Case, results: list[Result]) -> str:
    """One case for the eye: medians, with the middle half of the turns in brackets."""
    heads = ("", "forward ms", "fwd+bwd ms", "quartiles", "turns", "vs plain", "extra MB", "loss error", "grad error")
    plain = next((r.median_ms for r in results if r.method == "plain"), None)
    rows = [heads] + [table_row(result, plain) for result in results]
    widths = [max(len(row[k]) for row in rows if len(row) > 2) for k in range(len(heads))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=False))])
        if len(row) > 2
        else f"{row[0].ljust(widths[0])}  {row[1]}"
        for row in rows
    ]
    return "\n".join([str(case), *(f"  {line.rstrip()}" for line in lines), ""])


def table_row(result: Result, plain_ms: float | None) -> tuple[str, ...]:
    if result.median_ms is None:
        return result.title, result.status
    low, middle, high = result.total_ms
    compared = result.kind != "yardstick" and plain_ms is not None
    return (
        result.title,
        milliseconds(result.forward_ms[1]),
        milliseconds(middle),
        f"[{milliseconds(low)}, {milliseconds(high)}]",
        str(result.turns),
        f"{plain_ms / middle:.2f}x" if compared else "",
        "" if result.extra_bytes is None else f"{result.extra_bytes / 1e6:,.1f}",
        "" if result.loss_error is None else f"{result.loss_error:.1e}",
        "" if result.gradient_error is None else f"{result.gradient_error:.1e}",
    )


def milliseconds(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3}f}"


@dataclass
class Figure:
    """A number that the package promises on two CPU cores, or that is good to know (no bound)."""

    text: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        value = f"{self.value:.1e}" if not self.unit else f"{self.value:,.2f} {self.unit}"
        goals = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        goals += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        goal = f" (goal: {', '.join(goals)}; {'met' if self.met else 'missed'})" if goals else ""
        return f"  {self.text}: {value.replace(' x', 'x')}{goal}"

    @property
    def met(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


def make_figures(measured: list[tuple[Case, list[Result]]]) -> list[Figure]:
    """The ratios of the standard cases (D=128, C=100, soft labels, float32), as far as they were measured."""
    by_size = {case.n: {r.method: r for r in results} for case, results in measured if case == Case(case.n)}
    figures = []

    def ratio(n: int, slow: str, fast: str) -> float | None:
        pair = [by_size[n][key].median_ms if n in by_size and key in by_size[n] else None for key in (slow, fast)]
        return None if None in pair else pair[0] / pair[1]

    def add(value: float | None, text: str, unit: str = "x", **bounds: float) -> None:
        if value is not None:
            figures.append(Figure(text, value, unit, **bounds))

    for n, goal in ((2048, 3), (8192, 9), (16384, 14)):
        add(ratio(n, "plain", "auto"), f'N={n}: "auto" faster than plain dense', at_least=goal)
    speedups = [(r, n) for n in by_size if n >= 64 and (r := ratio(n, "plain", "auto")) is not None]
    if speedups:
        worst, n = min(speedups)
        add(worst, f'all N: "auto" faster than plain dense, least (at N={n})', at_least=1)
    add(ratio(8192, "compiled", "auto"), 'N=8192: "auto" faster than plain dense under torch.compile', at_least=2.5)
    add(ratio(8192, "lean", "auto"), 'N=8192: "auto" faster than dense with log_softmax')
    add(ratio(8192, "lse", "mm"), "N=8192: the tiled operator row_lse over its matrix products alone", at_most=1.25)
    add(ratio(8192, "tiled", "mm"), 'N=8192: the whole loss, "tiled", over those matrix products')
    auto = [by_size[n]["auto"] for n in by_size if "auto" in by_size[n]]
    if 16384 in by_size and "auto" in by_size[16384] and (extra := by_size[16384]["auto"].extra_bytes) is not None:
        add(extra / 1e6, 'N=16384: "auto" extra memory', "MB", at_most=100)
    for name, errors in (("loss", [r.loss_error for r in auto]), ("gradient", [r.gradient_error for r in auto])):
        known = [error for error in errors if error is not None]
        add(max(known, default=None), f'all N: "auto" relative error of the {name} against float64, largest', "")
    return figures


def summary(figures: list[Figure]) -> str:
    if not figures:
        return ""
    head = "Forward + backward, D=128, C=100, soft labels, float32. Goals are for two CPU cores."
    return "\n".join([head, *map(str, figures), "\n"])


def describe_machine(device: torch.device) -> dict[str, Any]:
    total = meminfo("MemTotal")
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": None if total is None else round(total / 1e9, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda_tf32": torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else None,
    }


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"genscl-loss": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "pytorch-metric-learning"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = str(torch.__version__)
    return versions


def git_commit() -> str | None:
    """The commit of the tree that holds this file, with "+" if it was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ---- The command ----


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    methods = all_methods()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cases = parser.add_argument_group("cases (lists; the default is a sweep over N and a few cases beside it)")
    cases.add_argument("--n", type=positive, nargs="+", help="batch sizes")
    cases.add_argument("--d", type=positive, nargs="+", help="embedding dimensions (128)")
    cases.add_argument("--c", type=positive, nargs="+", help="numbers of classes (100)")
    cases.add_argument("--labels", nargs="+", choices=("soft", "hard"), help="kinds of labels (soft)")
    cases.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="dtypes of the features (float32)")
    parser.add_argument("--methods", nargs="+", choices=list(methods), help="default: all but lean")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads (torch's choice)")
    parser.add_argument("--repeats", type=positive, help="turns of every method; default: as many as --seconds allows")
    parser.add_argument("--seconds", type=float, default=3.0, help="timing of a case ends then, after 3 turns (3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local", help="where to write")
    parser.add_argument("--no-plot", action="store_true", help="write no PNG")
    parser.add_argument("--smoke", action="store_true", help="a few tiny cases, no torch.compile, 1 thread")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def choose_cases(arguments: argparse.Namespace) -> list[Case]:
    lists = (arguments.n, arguments.d, arguments.c, arguments.labels, arguments.dtype)
    if arguments.smoke:
        defaults = ([64, 600], [32], [10], ["soft", "hard"], ["float32"])
    else:
        defaults = (list(SIZES[arguments.device]), [128], [100], ["soft"], ["float32"])
    lists_or_defaults = [given or default for given, default in zip(lists, defaults, strict=True)]
    cases = [Case(*values) for values in product(*lists_or_defaults)]
    cases.sort(key=lambda case: (case.labels == "hard", case.dtype, case.d, case.c, case.n))
    if arguments.smoke or any(lists):
        return cases
    aside = [Case(2048, d=512), Case(2048, c=1000), Case(2048, dtype="float64"), Case(2048, dtype="bfloat16")]
    return cases + [Case(n, labels="hard") for n in (256, 1024, 4096)] + aside


def choose_methods(arguments: argparse.Namespace, absent: dict[str, str]) -> list[Method]:
    methods = all_methods()
    left_out = {"lean", "compiled"} if arguments.smoke else {"lean"}
    keys = arguments.methods or [key for key in methods if key not in left_out]
    return [methods[key] for key in keys if key != "pml" or "pytorch-metric-learning" not in absent]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.smoke:
        arguments.repeats, arguments.threads = arguments.repeats or 2, arguments.threads or 1
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, absent = torch.device(arguments.device), absent_packages()
    report = describe_run(device, arguments, absent)
    print(head_lines(report), flush=True)
    measured = measure_all(choose_cases(arguments), choose_methods(arguments, absent), device, arguments)
    figures = make_figures(measured)
    print(summary(figures), end="")
    report["results"] = [asdict(case) | asdict(result) for case, results in measured for result in results]
    report["figures"] = [asdict(figure) | {"met": figure.met} for figure in figures]
    write(report, arguments.out, plot=not arguments.no_plot and "matplotlib" not in absent)
    return int(any(r.kind == "ours" and r.status.startswith("failed") for _, results in measured for r in results))


def describe_run(device: torch.device, arguments: argparse.Namespace, absent: dict[str, str]) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "commit": git_commit(),
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "temperature": TEMPERATURE,
        "tile": TILE,
        "absent": absent,
    }


def measure_all(
    cases: list[Case], methods: list[Method], device: torch.device, arguments: argparse.Namespace
) -> list[tuple[Case, list[Result]]]:
    chosen = [[method for method in methods if case.labels in method.labels] for case in cases]
    progress = Progress(sum(len(some) + 2 for some in chosen))
    measured = []
    for case, some in zip(cases, chosen, strict=True):
        progress.show(f"{case}: float64")
        problem = make_problem(case, device)
        limits = {"turns": arguments.repeats, "seconds": arguments.seconds}
        results = measure_case(problem, some, progress=progress, **limits)
        progress.advance()
        progress.write(table(case, results))
        measured.append((case, results))
    progress.close()
    return measured


def head_lines(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_gb']} GB; float32 matmul precision {machine['float32_matmul_precision']}",
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        *(f"absent: {name}; {consequence}" for name, consequence in report["absent"].items()),
    ]
    if (machine["load_before"] or 0) > 0.3 * machine["cores"]:
        lines.append(f"warning: other programs are busy (load average {machine['load_before']}); times will be off")
    lines.append("")
    return "\n".join(lines)


def write(report: dict[str, Any], folder: Path, *, plot: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench_loss.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")
    if plot:
        draw(report, path.with_suffix(".png"))
        print(f"written: {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main())
