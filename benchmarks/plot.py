"""Draw what bench_loss.py measured: time and extra memory against N, both axes logarithmic.

The command writes a PNG next to the report:

    python benchmarks/plot.py benchmarks/results/local/bench_loss.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

# Ours in blue, others in warm colours, yardsticks in grey. "auto" lies on another backend: drawn last, thin and dark.
STYLES: dict[str, dict[str, Any]] = {
    "tiled": {"color": "#4c9be8", "linewidth": 4},
    "dense": {"color": "#9cc7f2", "linewidth": 4},
    "triton": {"color": "#2a6fb0", "linewidth": 4},
    "triton_high": {"color": "#16a085", "linewidth": 4},
    "auto": {"color": "#0b2e59", "linewidth": 1.6, "marker": "o", "markersize": 4, "zorder": 5},
    "plain": {"color": "#c0392b", "linewidth": 2, "marker": "s", "markersize": 4},
    "compiled": {"color": "#e67e22", "linewidth": 2, "marker": "^", "markersize": 5},
    "compiled_tf32": {"color": "#f5b041", "linewidth": 2, "marker": "v", "markersize": 5},
    "lean": {"color": "#8e44ad", "linewidth": 2, "marker": "v", "markersize": 5},
    "pml": {"color": "#b7950b", "linewidth": 2, "marker": "D", "markersize": 4},
    "infcl": {"color": "#e84393", "linewidth": 2, "marker": "P", "markersize": 5},
    "memeff": {"color": "#b03a7a", "linewidth": 2, "marker": "X", "markersize": 5},
    "lse": {"color": "#555555", "linewidth": 1.2, "linestyle": "--"},
    "lse_triton": {"color": "#2a6fb0", "linewidth": 1.2, "linestyle": "--"},
    "lse_triton_high": {"color": "#16a085", "linewidth": 1.2, "linestyle": "--"},
    "sdpa": {"color": "#555555", "linewidth": 1.2, "linestyle": "-.", "marker": "x"},
    "sdpa_cudnn": {"color": "#999999", "linewidth": 1.2, "linestyle": "-.", "marker": "x"},
    "mm": {"color": "#555555", "linewidth": 1.2, "linestyle": ":"},
}
SETTING = ("d", "c", "labels", "dtype", "temperature")


def draw(report: dict[str, Any], path: Path) -> list[Path]:
    """A picture of time over memory, legible on a phone, for each setting that was measured at two sizes or more.

    Without such a setting, for all. The first is `path`, the others have its name and a number.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    settings = list(group(report["results"]).values())
    sweeps = [rows for rows in settings if len({row["n"] for row in rows}) > 1] or settings
    titles = {row["method"]: row["title"] for row in report["results"]}
    written = []
    for number, rows in enumerate(sweeps, start=1):
        figure = Figure(figsize=(5, 6.6), layout="constrained")
        time_axes, memory_axes = figure.subplots(2, sharex=True)
        handles = lines(time_axes, rows, "total_ms") | lines(memory_axes, rows, "extra_bytes")
        finish(time_axes, "Forward + backward, milliseconds", rows)
        finish(memory_axes, "Peak extra memory, MB", rows)
        memory_axes.set_xlabel("batch size N")
        ordered = {key: handles[key] for key in STYLES if key in handles}
        names = [titles[key] for key in ordered]
        figure.legend(ordered.values(), names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        figure.suptitle(f"{headline(report)}\n{'D={d}, C={c}, {labels} labels, {dtype}'.format(**rows[0])}", fontsize=9)
        written.append(path if number == 1 else path.with_stem(f"{path.stem}-{number}"))
        figure.savefig(written[-1], dpi=150)
    return written


def group(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups = defaultdict(list)
    for row in results:
        groups[tuple(row.get(key) for key in SETTING)].append(row)  # older reports have one temperature
    return dict(groups)


def lines(axes: Any, rows: list[dict[str, Any]], quantity: str) -> dict[str, Any]:
    """Draw one line for each method that has this quantity; times with their quartiles as a band."""
    handles = {}
    for key, style in STYLES.items():
        points = sorted((row["n"], row[quantity]) for row in rows if row["method"] == key and row[quantity])
        if not points:
            continue
        sizes, values = zip(*points, strict=True)
        if quantity == "total_ms":
            low, values, high = zip(*values, strict=True)
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.18, linewidth=0)
        else:
            values = [value / 1e6 for value in values]
        (handles[key],) = axes.plot(sizes, values, **({"marker": "."} if len(sizes) == 1 else {}) | style)
    return handles


def finish(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    sizes = sorted({row["n"] for row in rows})
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
    axes.minorticks_off()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def headline(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    chip = machine["gpu"] or f"{machine['cpu']} ({machine['threads']} of {machine['cores']} cores)"
    return f"genscl-loss {versions['genscl-loss']}, torch {versions['torch']}, {report['date'][:10]}\n{chip}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that bench_loss.py wrote")
    for path in parser.parse_args().results:
        for picture in draw(json.loads(path.read_text()), path.with_suffix(".png")):
            print(f"written: {picture}")


if __name__ == "__main__":
    main()
