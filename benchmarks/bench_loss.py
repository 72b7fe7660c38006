"""Time, memory and accuracy of the loss beside what one would use without it, in one run on one machine.

    python benchmarks/bench_loss.py                            # minutes, on a GPU if there is one
    python benchmarks/bench_loss.py --smoke                    # seconds: does it run at all?
    python benchmarks/bench_loss.py --n 1024 4096 --d 512      # cases of your own: the product of the lists
    python benchmarks/bench_loss.py --figures 1 2              # on a GPU: what these of its eight figures need

Every method of a case gets the same tensors. It runs once for its result and its memory; then all methods take turns,
one forward and one backward pass each, until the time of the case is spent. What is printed are medians over the turns.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES, TEMPERATURE, Case, make_problem
from ceilings import SIZES as CEILING_SIZES
from ceilings import measure_ceilings
from contenders import Method, absent_packages, all_methods
from figures import ACCURACY, HARD, LARGE, LONGEST, MEMORY, SMALL, WIDTHS, make_figures, summary
from measure import Result, measure_case
from plot import draw
from report import (
    Progress,
    ceiling_lines,
    describe_machine,
    describe_versions,
    git_commit,
    head_lines,
    table,
    write,
)

from genscl_loss._backends.tiled import TILE

SIZES = {
    "cpu": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "cuda": (64, 256, 1024, 4096, 16384, 32768, 65536, 131072),
}
REPEATS = 100  # for equality to the bit
GPU_BUDGET = 400.0  # seconds; the case that is under way then is finished


@dataclass(frozen=True)
class Step:
    """A case and the methods that are measured on it; empty: all that suit."""

    case: Case
    keys: tuple[str, ...] = ()
    figures: tuple[int, ...] = ()  # which of the eight need it
    repeats: int = 0


def cpu_steps() -> list[Step]:
    cases = [Case(n) for n in SIZES["cpu"]] + [Case(n, labels="hard") for n in (256, 1024, 4096)]
    cases += [Case(2048, d=512), Case(2048, c=1000), Case(2048, dtype="float64"), Case(2048, dtype="bfloat16")]
    return [Step(case) for case in cases]


def gpu_steps() -> list[Step]:
    """What the figures need, the largest first; then the rest of the sweep."""
    ours, operators = ("auto", "triton", "triton_high"), ("lse_triton", "lse_triton_high")
    attention, peers = ("sdpa", "sdpa_cudnn"), ("infcl", "memeff")
    dense = ("dense", "plain")
    small = (*ours, "tiled", *dense, "compiled", "lean", "lse_triton", *peers)
    return [
        Step(LARGE, (*ours, "tiled", "plain", "compiled", "compiled_tf32", *operators, *peers), (1, 2, 4, 8), REPEATS),
        Step(HARD, (*ours, "tiled", "plain", "pml"), (3,)),
        Step(WIDTHS[128], ("triton", *operators, *attention), (5, 6)),
        Step(WIDTHS[512], ("triton", *operators), (5,)),
        Step(MEMORY, (*ours, "tiled", *operators), (7,)),
        Step(LONGEST, ("triton",), (7,)),
        *(Step(case, ("triton", *operators), (8,)) for case in ACCURACY),
        *(Step(case, small, (8,), REPEATS) for case in SMALL),
        *(Step(Case(n), (*ours, "tiled", *dense)) for n in (64, 2048)),
        *(Step(Case(n), (*ours, "tiled", *dense, "compiled_tf32", *peers)) for n in (4096, 16384)),
        *(Step(replace(LARGE, dtype=dtype), ("triton", "plain")) for dtype in ("bfloat16", "float16")),
        *(Step(replace(LARGE, d=d), ("triton_high", *operators)) for d in (64, 256, 1024)),
    ]


# ---- The command ----


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    cases = parser.add_argument_group("cases (lists; the default is a sweep over N and a few cases beside it)")
    cases.add_argument("--n", type=positive, nargs="+", help="batch sizes")
    cases.add_argument("--d", type=positive, nargs="+", help="embedding dimensions (128)")
    cases.add_argument("--c", type=positive, nargs="+", help="numbers of classes (100)")
    cases.add_argument("--labels", nargs="+", choices=("soft", "hard"), help="kinds of labels (soft)")
    cases.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="dtypes of the features (float32)")
    cases.add_argument("--temperature", type=float, nargs="+", help=f"temperatures ({TEMPERATURE:g})")
    cases.add_argument("--figures", type=int, nargs="+", choices=range(1, 9), help="on a GPU: only what these need")
    parser.add_argument("--methods", nargs="+", choices=list(all_methods()), help="default: all but lean")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=positive, help="CPU threads (torch's choice)")
    parser.add_argument("--repeats", type=positive, help="turns of every method; default: as many as --seconds allows")
    parser.add_argument("--seconds", type=float, default=3.0, help="timing of a case ends then, after 3 turns (3)")
    parser.add_argument("--budget", type=float, help=f"seconds after which no case begins (GPU: {GPU_BUDGET:g})")
    parser.add_argument("--identical", type=positive, default=0, help="run ours so often and compare to the bit (0)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local", help="where to write")
    parser.add_argument("--commit", help="of this tree, for the report, where git cannot tell")
    parser.add_argument("--no-plot", action="store_true", help="write no PNG")
    parser.add_argument("--smoke", action="store_true", help="a few tiny cases, no torch.compile, 1 thread")
    arguments = parser.parse_args(argv)
    if arguments.figures and arguments.device == "cpu":
        parser.error("--figures: the eight figures are those of a GPU")
    return arguments


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def choose_steps(arguments: argparse.Namespace) -> list[Step]:
    lists = (arguments.n, arguments.d, arguments.c, arguments.labels, arguments.dtype, arguments.temperature)
    if not arguments.smoke and not any(lists):
        steps = gpu_steps() if arguments.device == "cuda" else cpu_steps()
        return [step for step in steps if not arguments.figures or set(arguments.figures) & set(step.figures)]
    if arguments.smoke:
        defaults = ([64, 600], [32], [10], ["soft", "hard"], ["float32"], [TEMPERATURE])
    else:
        defaults = (list(SIZES[arguments.device]), [128], [100], ["soft"], ["float32"], [TEMPERATURE])
    lists_or_defaults = [given or default for given, default in zip(lists, defaults, strict=True)]
    cases = [Case(*values) for values in product(*lists_or_defaults)]
    cases.sort(key=lambda case: (case.labels == "hard", case.dtype, case.d, case.c, case.n))
    return [Step(case, repeats=arguments.identical) for case in cases]


def choose_methods(step: Step, arguments: argparse.Namespace, absent: dict[str, str]) -> list[Method]:
    methods = all_methods()
    left_out = {"lean", "compiled", "compiled_tf32"} if arguments.smoke else {"lean"}
    left_out = set() if arguments.methods or step.keys else left_out
    packages = {"pml": "pytorch-metric-learning", "infcl": "inf-cl", "memeff": "memeff"}
    left_out |= {key for key, package in packages.items() if package in absent}
    keys = arguments.methods or step.keys or methods
    chosen = [methods[key] for key in keys if key in methods and key not in left_out]
    return [method for method in chosen if method.suits(step.case, arguments.device)]


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.smoke:
        arguments.repeats, arguments.threads = arguments.repeats or 2, arguments.threads or 1
    if arguments.budget is None and arguments.device == "cuda":
        arguments.budget = GPU_BUDGET
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    report = describe_run(device, arguments)
    print(head_lines(report), flush=True)
    start, sizes = time.perf_counter(), CEILING_SIZES["smoke" if arguments.smoke else device.type]
    before = measure_ceilings(device, *sizes)
    measured = measure_all(report, device, arguments)
    after = measure_ceilings(device, *sizes)
    report["ceilings"] = {name: [rate, after[name]] for name, rate in before.items()}
    report["seconds"] = round(time.perf_counter() - start, 1)
    figures = make_figures(report)
    report["figures"] = [asdict(figure) | {"met": figure.met} for figure in figures]
    print(ceiling_lines(report["ceilings"]), end="")
    print(summary(figures, device.type), end="")
    path = write(report, arguments.out)
    print(f"written: {path}")
    if not arguments.no_plot and "matplotlib" not in report["absent"]:
        for picture in draw(report, path.with_suffix(".png")):
            print(f"written: {picture}")
    methods = all_methods()
    return int(any(methods[r.method].ours and r.status.startswith(("failed", "wrong")) for r in measured))


def describe_run(device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "commit": git_commit() or arguments.commit,
        "arguments": {key: value for key, value in vars(arguments).items() if key not in {"out", "commit"}},
        "temperature": TEMPERATURE,
        "tile": TILE,
        "absent": absent_packages(device),
        "left_out": [],
        "results": [],
    }


def measure_all(report: dict[str, Any], device: torch.device, arguments: argparse.Namespace) -> list[Result]:
    """Measure every case; the report, and its file, grow by the rows of each."""
    steps = [(step, choose_methods(step, arguments, report["absent"])) for step in choose_steps(arguments)]
    steps = [(step, methods) for step, methods in steps if methods]
    progress = Progress(sum(len(methods) + 1 for _, methods in steps))
    measured, start = [], time.perf_counter()
    for step, methods in steps:
        if arguments.budget is not None and time.perf_counter() - start > arguments.budget:
            report["left_out"].append(str(step.case))
            continue
        progress.show(f"{step.case}: tensors")
        problem = make_problem(step.case, device)
        limits = {"turns": arguments.repeats, "seconds": arguments.seconds, "repeats": step.repeats}
        results = measure_case(problem, methods, progress=progress, **limits)
        progress.advance()
        progress.write(table(step.case, results))
        measured += results
        report["results"] += [asdict(step.case) | asdict(result) for result in results]
        write(report, arguments.out)
    progress.close()
    for case in report["left_out"]:
        print(f"left out, the time is spent: {case}")
    return measured


if __name__ == "__main__":
    sys.exit(main())
