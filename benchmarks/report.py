"""What a run says: the machine and the versions it ran on, its progress, a table for each case, and the file."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from cases import Case
from measure import Result
from meters import meminfo

from genscl_loss import __version__

# ---- Where it ran ----


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
        "gpu_capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
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
    for name in ("torch", "triton", "numpy", "pytorch-metric-learning", "inf-cl", "memeff"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = str(torch.__version__)
    return versions


def git_commit() -> str | None:
    """The commit of the tree that holds this file, with "+" if anything but results was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        source = (":/", ":(top,exclude)benchmarks/results")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *source)
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


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


def ceiling_lines(ceilings: dict[str, list[float]]) -> str:
    """Rates before and after the cases."""
    lines = ["Ceilings per second (products: flops; copies: bytes read and written), before and after the cases:"]
    lines += [f"  {name:16}" + "".join(f"{rate:12.3g}" for rate in rates) for name, rates in ceilings.items()]
    return "\n".join([*lines, "\n"])


# ---- While it runs ----


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


# ---- A case ----

HEADS = (
    "",
    "forward ms",
    "fwd+bwd ms",
    "quartiles",
    "turns",
    "vs plain",
    "graph ms",
    "kernels",
    "extra MB",
    "loss error",
    "row error",
    "grad error",
    "repeats",
)


def table(case: Case, results: list[Result]) -> str:
    """One case for the eye: medians, with the middle half of the turns in brackets. Empty columns are left out."""
    plain = next((r.median_ms for r in results if r.method == "plain"), None)
    rows = [table_row(result, plain) for result in results]
    full = [row for row in rows if len(row) == len(HEADS)]
    shown = [k for k in range(1, len(HEADS)) if any(row[k] for row in full)]
    first = max(len(row[0]) for row in rows)
    widths = {k: max(len(row[k]) for row in [HEADS, *full]) for k in shown}
    lines = ["".join([" " * first, *(f"  {HEADS[k]:>{widths[k]}}" for k in shown)])]
    for row in rows:
        cells = [f"  {row[k]:>{widths[k]}}" for k in shown] if len(row) == len(HEADS) else [f"  {row[1]}"]
        lines.append("".join([f"{row[0]:{first}}", *cells]))
    lines += [f"{r.title}: {r.graph_status}" for r in results if r.graph_status not in {None, "ok"}]
    return "\n".join([str(case), *(f"  {line.rstrip()}" for line in lines), ""])


def table_row(result: Result, plain_ms: float | None) -> tuple[str, ...]:
    """As many cells as HEADS; or two, the second saying why there are no more."""
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
        milliseconds(result.graph_ms[1]) if result.graph_ms else "",
        "+".join(map(str, result.kernels or ())),
        "" if result.extra_bytes is None else f"{result.extra_bytes / 1e6:,.1f}",
        *("" if e is None else f"{e:.1e}" for e in (result.loss_error, result.row_error, result.gradient_error)),
        "" if result.identical is None else f"{result.repeats} {'equal' if result.identical else 'DIFFER'}",
    )


def milliseconds(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3}f}"


# ---- The file ----


def write(report: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench_loss.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path
