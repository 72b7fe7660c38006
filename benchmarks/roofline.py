"""Beside each measured time of a report, the time that its work needs at least: the floor, computed, not measured.

    python benchmarks/roofline.py benchmarks/results/local/bench_loss.json
    python benchmarks/roofline.py REPORT.json --assume H200       # rates that the report lacks, from this file

The work is counted per pass: floating-point operations of the matrix products, exponentials, and bytes to and from
memory. Each has a rate; the longest of the three times is the floor of the pass. What is linear in N and needs no
N x D matrix (norms, label sums, reductions) is left out, so that the floor is never too high for that.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

# Rates that someone measured or computed for a machine of this name, not the run in question: leads, no measurements.
ASSUMED = {
    "H200": {
        "matmul bfloat16": 790e12,
        "matmul float16": 790e12,
        "matmul tf32": 395e12,
        "matmul float32": 57e12,
        "exp2": 132 * 16 * 1.7e9,  # multiprocessors, exponentials of each per cycle, cycles
        "copy": 4.3e12,
    }
}


class Rate(NamedTuple):
    value: float  # per second
    source: str


@dataclass(frozen=True)
class Work:
    """What one pass must do at least."""

    flops: float
    exponentials: float
    bytes: float
    format: str  # in which the products are computed

    def times(self, rates: dict[str, Rate]) -> dict[str, float]:
        """Milliseconds of each part whose rate is known."""
        parts = {
            "products": (self.flops, f"matmul {self.format}"),
            "exponentials": (self.exponentials, "exp2"),
            "bytes": (self.bytes, "copy"),
        }
        return {part: 1e3 * amount / rates[name].value for part, (amount, name) in parts.items() if name in rates}


class Scheme(NamedTuple):
    """How a method goes about it: products of N x N x D and exponentials of N x N, for each pass."""

    forward_products: float
    backward_products: float
    forward_exponentials: float = 1
    backward_exponentials: float = 1


# A backward pass needs the logits again (where they were not kept) and one product with them for each side; the two
# sides are one where row and column of a tile share their weights. Symmetric: half of the tiles serve for the rest.
STREAMING = Scheme(1, 2)
SYMMETRIC = Scheme(0.5, 1.5, 0.5, 0.5)
MATERIALISED = Scheme(1, 2)
SCHEMES = {
    **dict.fromkeys(("triton", "triton_high", "lse_triton", "lse_triton_high"), STREAMING),
    **dict.fromkeys(("dense", "plain", "compiled", "compiled_tf32", "lean", "pml"), MATERIALISED),
    "infcl": Scheme(1, 4, 1, 2),
    "memeff": Scheme(1, 4, 1, 2),
    "sdpa": Scheme(2, 5),
    "sdpa_cudnn": Scheme(2, 5),
    "mm": Scheme(0.5, 1.5, 0, 0),
}
SPLIT = 3  # products of half-precision numbers that stand for one of float32 numbers
CACHE = 2**28  # bytes; smaller matrices may never get to memory


def useful_flops(n: int, d: int) -> tuple[float, float]:
    """Of the pairwise operator's forward and backward pass: the logits; the logits again, and their gradient."""
    return 2.0 * n * n * d, 4.0 * n * n * d


def work_of(row: dict[str, Any], device: str) -> tuple[Work, Work] | None:
    """Of the forward and the backward pass of one row of a report; None for methods that are unknown here."""
    n, d = row["n"], row["d"]
    if row["method"] in {"tiled", "auto", "lse"}:
        scheme = SYMMETRIC if device == "cpu" else STREAMING
    else:
        scheme = SCHEMES.get(row["method"])
    if scheme is None:
        return None
    number_format, products = number_format_of(row, device)
    one_product = products * 2.0 * n * n * d
    feature_bytes = n * d * {"float64": 8, "float32": 4}.get(row["dtype"], 2)
    forward = Work(
        scheme.forward_products * one_product,
        scheme.forward_exponentials * n * n,
        feature_bytes + 4 * n,  # features in, one number for each row out
        number_format,
    )
    backward = Work(
        scheme.backward_products * one_product,
        scheme.backward_exponentials * n * n,
        2 * feature_bytes + 8 * n,  # features, log-sum-exp and gradient of each row in, gradient out
        number_format,
    )
    return with_matrices(forward, backward, row) if scheme is MATERIALISED else (forward, backward)


def with_matrices(forward: Work, backward: Work, row: dict[str, Any]) -> tuple[Work, Work]:
    """Plus what comes from N x N matrices: the similarity of soft labels, and their way to memory and back."""
    n = row["n"]
    size = n * n * (8 if row["dtype"] == "float64" else 4)
    soft = row["labels"] == "soft"
    ways = (2, 4)  # logits out and in; in again, their gradient out, and in for either side
    if soft:
        forward = replace(forward, flops=forward.flops + 2.0 * n * n * row["c"])
        ways = (4, 5)  # the similarity likewise
    if size < CACHE:
        ways = (0, 0)
    return replace(forward, bytes=forward.bytes + ways[0] * size), replace(
        backward, bytes=backward.bytes + ways[1] * size
    )


def number_format_of(row: dict[str, Any], device: str) -> tuple[str, int]:
    """What the products are computed in, and how many of them stand for one."""
    method = row["method"]
    if row["dtype"] == "float64":
        return "float64", 1
    if method in {"sdpa", "sdpa_cudnn"}:
        return "bfloat16", 1
    if method in {"infcl", "memeff", "compiled_tf32"}:
        return "tf32", 1
    if method in {"triton_high", "lse_triton_high"}:
        return "float16", 1
    if method == "lse_triton":
        return "float16", SPLIT
    if method == "triton" or (method == "auto" and device == "cuda"):
        return "float16", SPLIT if row["dtype"] == "float32" else 1
    return "float32", 1


# ---- Rates ----


def rates_of(report: dict[str, Any], assume: str | None) -> dict[str, Rate]:
    """Those measured in the run, the faster of before and after; else assumed ones, if asked for."""
    source = f"assumed for {assume}, not measured"
    rates = {name: Rate(value, source) for name, value in ASSUMED.get(assume, {}).items()}
    if (found := best_mm(report)) is not None:
        rates["matmul float32"] = found
    for name, values in report.get("ceilings", {}).items():
        rates[name] = Rate(max(values), "measured in that run")
    return rates


def best_mm(report: dict[str, Any]) -> Rate | None:
    """The fastest of the rows of the yardstick "torch.mm only"."""
    tile, best = report.get("tile", 0), None
    for row in report["results"]:
        if row["method"] != "mm" or not row["total_ms"] or row["dtype"] == "float64":
            continue
        half = row["n"] * (row["n"] + min(tile, row["n"])) / 2  # entries of the tiles on and above the diagonal
        rate = 2 * row["d"] * (2 * half + row["n"] ** 2) / (row["total_ms"][1] / 1e3)
        if best is None or rate > best.value:
            best = Rate(rate, f'"torch.mm only" of that run, N={row["n"]}; another library may be faster')
    return best


# ---- The table ----


def describe(report: dict[str, Any], assume: str | None) -> str:
    rates, device = rates_of(report, assume), report["machine"]["device"]
    machine = report["machine"]
    needed = {"copy", "exp2"} | {
        f"matmul {number_format_of(row, device)[0]}" for row in report["results"] if work_of(row, device) is not None
    }
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {report['date'][:10]}. Milliseconds: medians as measured, and floors,",
        "computed from counted work and the following rates per second. A floor is not a measurement.",
    ]
    for name in sorted(needed):
        rate = rates.get(name)
        said = "missing: its part of the work is in no floor" if rate is None else f"{rate.value:.3g}  ({rate.source})"
        lines.append(f"  {name:16} {said}")
    heads = ("", "forward", "floor", "over it", "fwd+bwd", "floor", "over it", "longest part of the floor")
    previous = None
    for row in report["results"]:
        case = f"N={row['n']}  D={row['d']}  C={row['c']}  {row['labels']} labels  {row['dtype']}"
        if case != previous:
            lines += ["", case, line(heads)]
            previous = case
        if row["total_ms"]:
            lines.append(line(cells(row, rates, device)))
    return "\n".join(lines)


def cells(row: dict[str, Any], rates: dict[str, Rate], device: str) -> tuple[str, ...]:
    forward, total = row["forward_ms"][1], row["total_ms"][1]
    work = work_of(row, device)
    times = [one.times(rates) for one in work] if work else []
    if not work or not all(times):
        return row["title"], number(forward), "", "", number(total), "", "", "no rate" if work else "work not counted"
    floors = [max(parts.values()) for parts in times]
    longest = [max(parts, key=parts.get) for parts in times]
    longest = longest[0] if longest[0] == longest[1] else " / ".join(longest)
    beaten = forward < floors[0] or total < sum(floors)
    return (
        row["title"],
        number(forward),
        number(floors[0]),
        f"{forward / floors[0]:.2f}x",
        number(total),
        number(sum(floors)),
        f"{total / sum(floors):.2f}x",
        f"{longest}, at a rate that is too low: it was beaten" if beaten else longest,
    )


def number(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def line(texts: tuple[str, ...]) -> str:
    first, *middle, last = texts
    return f"  {first:34}" + "".join(f"{text:>10}" for text in middle) + f"  {last}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("reports", type=Path, nargs="+", help="JSON files that bench_loss.py wrote")
    parser.add_argument("--assume", choices=sorted(ASSUMED), help="take rates that a report lacks from this file")
    arguments = parser.parse_args()
    print("\n\n".join(describe(json.loads(path.read_text()), arguments.assume) for path in arguments.reports))


if __name__ == "__main__":
    main()
