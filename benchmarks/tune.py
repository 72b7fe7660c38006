"""Try out lines of the tile tables (`genscl_loss/_backends/plans.py`) on this GPU, and keep the fastest that is right.

    python benchmarks/tune.py                 # print them, and write a new plans.py beside the report
    python benchmarks/tune.py --apply         # write it into the package
    python benchmarks/tune.py --smoke         # in Triton's interpreter: does it run at all?

Candidates are compiled first, in many processes. Each is then compared with the line of the table, in its result and
in time at two batch sizes. A line takes its place if it is right and at least MARGIN faster; the geometric mean over
the sizes counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from genscl_loss._backends import fused, plans

MARGIN = 1.02
BOUNDS = {1: 1e-3, 2: 1e-5}  # of the relative difference from the table's line, by number of fp16 terms
SIZES = (4096, 32768)
SCALE = torch.tensor(1 / 0.07)

# Beside the line of the table: kernel, width, terms, then "m n edge k  warps stages programs".
# Those for chips with the shared memory of sm_90; that of others is too small for most of them, which then fail.
CANDIDATES = """
    row_lse        64 1   128 128 64  64  8 3 2
    row_lse        64 1   128  64 32  64  8 4 3
    row_lse        64 1   256  64 32  64  8 4 2
    row_lse        64 1   128  64 32  64  4 4 3
    row_lse       128 1   128 128 64 128  8 2 2
    row_lse       128 1   128  64 32 128  8 3 2
    row_lse       128 1   128  64 32 128  8 4 2
    row_lse       128 1   256  64 32 128  8 3 2
    row_lse       128 1   128  64 32 128  4 3 2
    row_lse       128 1   256 128 64 128  8 3 1
    row_lse       128 1    64  64 32 128  4 3 3
    row_lse       128 1   128 128 64 128  8 3 1
    row_lse       256 1   128 128 64 256  8 2 1
    row_lse       256 1   128  64 32 256  8 3 1
    row_lse       256 1   256  64 32 256  8 2 1
    row_lse       256 1    64  64 32 256  4 2 2
    row_lse       512 1   256 128 64  64  8 3 1
    row_lse       512 1   256 128 64  64  8 4 1
    row_lse       512 1   128 256 64  64  8 4 1
    row_lse       512 1   128 256 64 128  8 2 1
    row_lse       512 1   128 128 64  64  8 3 2
    row_lse        64 2   128  64 32  64  8 3 2
    row_lse        64 2   256  64 32  64  8 3 1
    row_lse        64 2   128 128 64  64  8 3 1
    row_lse       128 2   128 128 64 128  8 2 1
    row_lse       128 2   128  64 32 128  8 3 1
    row_lse       128 2    64  64 32 128  4 2 2
    row_lse       128 2   256  64 32 128  8 2 1
    row_lse       128 2   128  64 32 128  8 2 1
    row_lse       512 2   256 128 64  32  8 3 1
    row_lse       512 2   128 128 64  64  8 3 1
    row_lse       512 2   128 256 64  32  8 4 1
    row_lse_grad   64 1   128  64 32  64  4 4 2
    row_lse_grad   64 1   128  64 32  64  8 3 2
    row_lse_grad   64 1    64 128 32  64  4 3 3
    row_lse_grad  128 1    64 128 32 128  4 2 2
    row_lse_grad  128 1    64 128 32 128  4 3 2
    row_lse_grad  128 1    64  64 32 128  4 3 3
    row_lse_grad  128 1    64  64 32 128  4 4 2
    row_lse_grad  128 1   128  32 32 128  4 3 2
    row_lse_grad  128 1   128 128 32 128  8 3 1
    row_lse_grad  128 1   128  64 32 128  8 3 1
    row_lse_grad  256 1    64  64 32 256  4 2 2
    row_lse_grad  256 1   128  64 32 256  8 2 1
    row_lse_grad  256 1    64  32 32 256  4 3 2
    row_lse_grad  256 1   128  64 32 256  8 3 1
    row_lse_grad  512 1    64  64 32 512  8 2 1
    row_lse_grad  512 1    64 128 32 128  8 2 1
    row_lse_grad  512 1    64 128 32  64  8 3 1
    row_lse_grad   64 2   128  64 32  64  8 3 2
    row_lse_grad   64 2    64  64 32  64  4 3 2
    row_lse_grad   64 2   128  64 32  64  4 2 1
    row_lse_grad  128 2    64  64 32 128  4 2 2
    row_lse_grad  128 2    64  64 32 128  4 3 1
    row_lse_grad  128 2   128 128 32 128  8 2 1
    row_lse_grad  128 2   128  64 32 128  8 3 1
    row_lse_grad  128 2    64 128 32 128  4 2 1
    row_lse_grad  128 2    64  32 32 128  4 3 2
    row_lse_grad  512 2   128 128 64  32  8 3 1
    row_lse_grad  512 2    64 128 32  64  8 2 1
    softmax_weights 512 1  128 256 256  64  8 3 1
    softmax_weights 512 1  128 256 256  64  8 4 1
    softmax_weights 512 1  256 128 128  64  8 3 1
    softmax_weights 512 1  128 128 128  64  8 4 1
    softmax_weights 512 1  128 128 128  64  4 3 2
    softmax_weights 512 2  128 128 128  32  8 3 2
    softmax_weights 512 2  128 256 256  32  8 3 1
    softmax_weights 512 2  128  64  64  64  8 3 2
"""
TABLES = {"row_lse": "_FORWARD", "row_lse_grad": "_BACKWARD", "softmax_weights": "_WEIGHTS"}

Line = tuple[str, int, int]  # kernel, width, terms


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def of_the_table(line: Line, chip: int) -> plans.Plan:
    kernel, width, terms = line
    table: dict[int, dict[tuple[int, int], plans.Plan]] = getattr(plans, TABLES[kernel])
    return table[chip][width, terms]


def candidates(chip: int) -> dict[Line, list[plans.Plan]]:
    """The line of the table first, then the others; D = 128 before all else, should the time not suffice."""
    found: dict[Line, list[plans.Plan]] = {}
    for text in CANDIDATES.strip().splitlines():
        kernel, width, terms, *numbers = text.split()
        line, plan = (kernel, int(width), int(terms)), plans.Plan(*map(int, numbers))
        tried = found.setdefault(line, [of_the_table(line, chip)])
        if plan not in tried:
            tried.append(plan)
    return dict(sorted(found.items(), key=lambda entry: (entry[0][1] != 128, entry[0])))


def with_plan(line: Line, plan: plans.Plan, chip: int) -> AbstractContextManager[Any]:
    kernel, width, terms = line
    if kernel == "row_lse":
        return mock.patch.object(fused, "forward_plan", lambda *_: plan)
    if kernel == "softmax_weights":
        return mock.patch.multiple(fused, weights_plan=lambda *_: plan, _FEW_PAIRS=0)
    block_out = plans.block_out(chip, width, terms, plan)
    return mock.patch.multiple(fused, backward_plan=lambda *_: (plan, block_out), _FEW_PAIRS=math.inf)


def job(line: Line, n: int) -> Callable[[], Tensor]:
    """One launch of the kernel on n unit rows, by whatever plan holds when it is called; see `value`.

    Of `softmax_weights` all that makes the gradient of it, so that its times are those of `row_lse_grad`, or not.
    """
    kernel, width, terms = line
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(n, width, generator=generator), dim=1).to(device())
    grad = torch.rand(n, generator=generator).to(z.device)
    _, sums, rows, _ = fused.row_lse(z, None, SCALE, None, [0], True, "highest" if terms == 2 else "high")
    if kernel == "row_lse":
        return lambda: fused._launch_lse(rows, rows, n, n, SCALE, None, 0, True)[1]
    largest = grad.max()
    weights = fused._launch_weights(grad, sums, rows.shape[1], largest)
    side = fused._Side(rows, n, weights, None)
    return lambda: fused._launch_grad(side, side, 0, largest, SCALE, True, width)


def value(line: Line, parts: Tensor) -> Tensor:
    """What parts of the columns make together: the log-sum-exp, or the gradient."""
    if line[0] == "row_lse":
        return ((parts[:, 0] + parts[:, 1].log2()) * math.log(2)).double().logsumexp(0)
    return parts.double().sum(0)


def milliseconds(work: Callable[[], Tensor], spend: float = 0.12) -> float:
    work()
    if device().type == "cpu":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    repeats = max(5, min(50, int(spend / max(1e-5, time.perf_counter() - start))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2]


def measure(line: Line, plan: plans.Plan, jobs: dict[int, Callable[[], Tensor]], right: dict[int, Tensor], chip: int):
    """A row of the report; `right` holds the results of the first plan that ran."""
    row: dict[str, Any] = dict(zip(("kernel", "width", "terms"), line, strict=True))
    row |= {"plan": list(plan), "ms": {}, "error": None, "status": "right"}
    try:
        with with_plan(line, plan, chip):
            errors = []
            for n, work in jobs.items():
                got = value(line, work())
                wanted = right.setdefault(n, got)
                errors.append(((got - wanted).norm() / wanted.norm()).item())
                row["ms"][n] = milliseconds(work)
    except Exception as error:  # of the compiler or the device: a line for another chip
        return row | {"status": f"failed: {type(error).__name__}: {str(error)[:150]}"}
    row["error"] = max(errors)
    if not row["error"] <= BOUNDS[line[2]]:  # NaN too
        row["status"] = "wrong"
    return row


def faster(row: dict[str, Any], base: dict[str, Any]) -> float:
    """How many times the speed of another row, over all sizes."""
    logs = [math.log(base["ms"][n] / ms) for n, ms in row["ms"].items()]
    return math.exp(sum(logs) / len(logs))


def choose(rows: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, float]:
    """The row to keep of a line, and its speed in that of the first; None if nothing is to change."""
    right = [row for row in rows if row["status"] == "right"]
    if not right:
        return None, 1.0
    if right[0] is not rows[0]:  # the table's own line does not work here
        return min(right, key=lambda row: sum(map(math.log, row["ms"].values()))), math.inf
    best = max(right, key=lambda row: faster(row, rows[0]))
    gain = faster(best, rows[0])
    return (best, gain) if gain >= MARGIN else (None, 1.0)


def rewritten(text: str, chip: int, line: Line, plan: plans.Plan) -> str:
    """The source of plans.py with another plan in that line."""
    kernel, width, terms = line
    start = text.index(f"    {chip}: _plans", text.index(f"{TABLES[kernel]} = {{"))
    stop = text.index('""")', start)
    new = "{:>4} {:>3} {:>2} {:>3}  {} {} {}".format(*plan)
    table, count = re.subn(rf"(?m)^(\s+{width} {terms} ).*$", lambda found: found[1] + new, text[start:stop])
    assert count == 1
    return text[:start] + table + text[stop:]


def compile_share(share: str, chip: int) -> None:
    """Compile some candidates, at sizes that make the variants which are measured."""
    first, step = map(int, share.split("/"))
    every = [(line, plan) for line, tried in candidates(chip).items() for plan in tried]
    for line, plan in every[first::step]:
        for splits in (32, 1):
            try:
                with mock.patch.object(fused, "_MOST_SPLITS", splits), with_plan(line, plan, chip):
                    job(line, 512)()
            except Exception:  # found again, and told, when it is measured
                continue


def main(argv: list[str] | None = None) -> int:
    """Measure all candidates; 1 if a line of the table is wrong or does not work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local")
    parser.add_argument("--apply", action="store_true", help="write plans.py of the package")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which no line is begun")
    parser.add_argument("--n", type=int, nargs="+", default=SIZES)
    parser.add_argument("--smoke", action="store_true", help="two lines, few rows")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # "i/k": what a process of this command does
    arguments = parser.parse_args(argv)
    chip, start = fused._chip(device()), time.perf_counter()
    if arguments.compile:
        compile_share(arguments.compile, chip)
        return 0
    tried = candidates(chip)
    if arguments.smoke:
        arguments.n = [64]
        tried = {line: tried[line][:2] for line in (("row_lse", 64, 1), ("softmax_weights", 512, 1))}
    elif device().type == "cuda":
        workers = min(10, os.cpu_count() or 1)
        command = [sys.executable, __file__, "--compile"]
        for process in [subprocess.Popen([*command, f"{i}/{workers}"]) for i in range(workers)]:
            process.wait()
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    path, report, fault = Path(plans.__file__), [], False
    text = path.read_text()
    for line, lines in tried.items():
        if time.perf_counter() - start > arguments.budget:
            print(f"left out, the time is spent: {line}")
            continue
        sizes = [n // 2 if line[1] >= 512 and n > 20000 else n for n in arguments.n]
        jobs, right, rows = {n: job(line, n) for n in sizes}, {}, []
        for plan in lines:
            row = measure(line, plan, jobs, right, chip)
            rows.append(row)
            times = "  ".join(f"N={n}: {ms:.3f} ms" for n, ms in row["ms"].items())
            print(f"{line[0]:15} {line[1]:4} x{line[2]}  {plan!s}  {times}  {row['status']}", flush=True)
        best, gain = choose(rows)
        if rows[0]["status"] != "right":
            fault = True
            print(f"FAULT: the line of the table is {rows[0]['status']}: {line}")
        if best is not None:
            text = rewritten(text, chip, line, plans.Plan(*best["plan"]))
            print(f"KEPT {line}: {best['plan']}, {gain:.2f} times as fast")
        report += rows
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tune.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "plans.py").write_text(text)
    if arguments.apply:
        path.write_text(text)
    return int(fault)


if __name__ == "__main__":
    sys.exit(main())
