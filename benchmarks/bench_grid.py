"""Is "auto" as fast as the plain formula everywhere? Every batch size, width and kind of labels, as one heat map.

    python benchmarks/bench_grid.py                     # some ten minutes on two CPU cores
    python benchmarks/bench_grid.py --busy 2            # beside two other processes that never rest
    python benchmarks/bench_grid.py --n 256 2048 --d 128 --labels soft100 --queue 0

Forward and backward of `gen_supcon_loss(backend="auto")`, of the equation in ten lines, and of the same with a fused
log_softmax, take turns on the same tensors. A cell shows the median time of ours over that of the faster of the two,
so less than one is faster; the slowest cell is named last. Formulas that would take more than 8 GB are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from cases import TEMPERATURE
from report import describe_machine, describe_versions, git_commit
from torch import Tensor

from genscl_loss import auto_backend, gen_supcon_loss

SIZES, WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096), (16, 128, 512, 2048)
LABELS = ("none", "hard10", "hardN", "soft10", "soft100", "soft1000", "soft20000")
QUEUES, QUEUED_SIZES, QUEUE_LABELS = (4096, 65536), (1, 64, 256), ("hard10", "hardN", "soft100")
MOST_BYTES = 8e9
MATRICES = 5.4  # of the plain formula at its peak


@dataclass(frozen=True)
class Cell:
    n: int
    d: int
    labels: str  # none, hard<classes>, soft<classes>; N: as many classes as samples
    queue: int = 0

    def __str__(self) -> str:
        queue = f", queue of {self.queue}" if self.queue else ""
        return f"N = {self.n}, D = {self.d}, {self.labels}{queue}"

    @property
    def classes(self) -> int:
        """Of labels; 0 without."""
        digits = self.labels.removeprefix("none").removeprefix("hard").removeprefix("soft")
        return self.n if digits == "N" else int(digits or 0)

    @property
    def is_soft(self) -> bool:
        return self.labels.startswith("soft")

    @property
    def backend(self) -> str:
        """What "auto" takes."""
        classes = self.classes if self.is_soft else 0
        return auto_backend(self.n, self.queue or None, num_features=self.d, num_classes=classes)

    def fits(self) -> bool:
        if self.is_soft and self.classes > 5000 and self.n > 1024:  # labels alone would take most of the time
            return False
        return MATRICES * 4 * self.n * (self.queue or self.n) <= MOST_BYTES


# ---- What is compared ----


def plain(q: Tensor, k: Tensor | None, a: Tensor, b: Tensor | None) -> Tensor:
    """The paper's equation, written down."""
    z, others, w, itself = prepared(q, k, a, b)
    s = (z / TEMPERATURE) @ others.T
    if itself is None:
        log_p = s - s.logsumexp(1, keepdim=True)
    else:
        w.masked_fill_(itself, 0)
        log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return (-(w * log_p).sum(1) / (w.sum(1) + 1e-8)).mean()


def lean(q: Tensor, k: Tensor | None, a: Tensor, b: Tensor | None) -> Tensor:
    """The same with a finite mask, so that the fused log_softmax can be used: one matrix and one pass less."""
    z, others, w, itself = prepared(q, k, a, b, mask=False)
    s = (z / TEMPERATURE) @ others.T
    if k is None:
        w.fill_diagonal_(0)
        s = s.fill_diagonal_(-1e9)
    return (-(w * s.log_softmax(1)).sum(1) / (w.sum(1) + 1e-8)).mean()


def prepared(
    q: Tensor, k: Tensor | None, a: Tensor, b: Tensor | None, *, mask: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    z = F.normalize(q, dim=1)
    others, right = (z, a) if k is None or b is None else (F.normalize(k, dim=1), b)
    if a.is_floating_point():
        y = F.normalize(a, dim=1)
        w = y @ (y if right is a else F.normalize(right, dim=1)).T
    else:
        w = (a[:, None] == right).to(z.dtype)
    return z, others, w, torch.eye(len(z), dtype=torch.bool) if mask and k is None else None


def contenders(cell: Cell) -> tuple[Tensor, list[Callable[[], Tensor]]]:
    """A leaf, and the loss of it: ours, plain, lean."""
    generator = torch.Generator().manual_seed(0)

    def labels_of(rows: int) -> Tensor:
        if not cell.is_soft:
            return torch.randint(cell.classes, (rows,), generator=generator)
        return torch.softmax(3 * torch.randn(rows, cell.classes, generator=generator), 1)

    x = torch.randn(cell.n, cell.d, generator=generator)
    if cell.labels == "none":
        x = x.view(cell.n // 2, 2, cell.d).requires_grad_()
        samples = torch.arange(cell.n // 2).repeat_interleave(2)
        formulas = [lambda f=f: f(x.flatten(0, 1), None, samples, None) for f in (plain, lean)]
        return x, [lambda: gen_supcon_loss(x, base_temperature=None), *formulas]
    x.requires_grad_()
    a, k, b = labels_of(cell.n), None, None
    if cell.queue:
        k, b = torch.randn(cell.queue, cell.d, generator=generator), labels_of(cell.queue)
    formulas = [lambda f=f: f(x, k, a, b) for f in (plain, lean)]
    return x, [
        lambda: gen_supcon_loss(x, a, contrast_features=k, contrast_labels=b, base_temperature=None),
        *formulas,
    ]


# ---- Measuring ----


def measure(cell: Cell, seconds: float) -> list[float]:
    """Median milliseconds of each, forward and backward, in turns."""
    leaf, losses = contenders(cell)
    taken: list[list[float]] = [[] for _ in losses]
    begin = time.perf_counter()
    turn = 0
    while turn < 4 or (time.perf_counter() - begin < seconds and turn < 200):
        for k in range(len(losses)):
            which = (k + turn) % len(losses)  # none always follows the same one
            leaf.grad = None
            start = time.perf_counter()
            losses[which]().backward()
            if turn:
                taken[which].append(1e3 * (time.perf_counter() - start))
        turn += 1
    return [median(times) for times in taken]


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Others on the same cores."""
    others = [multiprocessing.get_context("spawn").Process(target=never_rest, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    if others:
        time.sleep(5)
    yield
    for other in others:
        other.kill()


def never_rest() -> None:
    torch.set_num_threads(1)
    x = torch.randn(512, 512)
    while True:
        x @ x


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    found = []
    for queue in arguments.queue:
        for labels in arguments.labels or (QUEUE_LABELS if queue else LABELS):
            for d in arguments.d:
                for n in arguments.n or (QUEUED_SIZES if queue else SIZES):
                    found.append(Cell(n, d, labels, queue))
    return [cell for cell in found if cell.fits() and not (cell.queue and cell.labels == "none")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", help="batch sizes")
    parser.add_argument("--d", type=int, nargs="+", default=WIDTHS, help="numbers of features")
    parser.add_argument("--labels", nargs="+", help=f"kinds: {' '.join(LABELS)}, or another number")
    parser.add_argument("--queue", type=int, nargs="+", default=(0, *QUEUES), help="rows of a queue; 0: no queue")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a cell (1), after four turns")
    parser.add_argument("--busy", type=int, default=0, help="other processes that are busy meanwhile (0)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "local", help="where to write")
    parser.add_argument("--no-plot", action="store_true", help="write no PNG")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = {
        "machine": describe_machine(torch.device("cpu")),
        "versions": describe_versions(),
        "commit": git_commit(),
        "busy": arguments.busy,
        "cells": [],
    }
    print(
        "cell                                     backend    ours ms   plain ms    lean ms   ours / faster", flush=True
    )
    with busy(arguments.busy):
        for cell in cells_of(arguments):
            ours, *others = measure(cell, arguments.seconds)
            ratio = ours / min(others)
            report["cells"].append(asdict(cell) | {"backend": cell.backend, "ms": [ours, *others], "ratio": ratio})
            times = " ".join(f"{ms:10.2f}" for ms in (ours, *others))
            print(f"{cell!s:40} {cell.backend:8} {times} {ratio:8.2f}", flush=True)
    print(summary(report["cells"]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"bench_grid{'_busy' if arguments.busy else ''}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    if not arguments.no_plot:
        draw(report["cells"], path.with_suffix(".png"))
    return 0


def summary(cells: list[dict]) -> str:
    worst = max(cells, key=lambda cell: cell["ratio"])
    named = Cell(*(worst[key] for key in ("n", "d", "labels", "queue")))
    slow = sum(cell["ratio"] > 1.1 for cell in cells)
    return f"worst cell: {worst['ratio']:.2f}x at {named} ({worst['backend']}); {slow} of {len(cells)} above 1.1x"


def draw(cells: list[dict], path: Path) -> None:
    """Rows are widths and labels, columns batch sizes; one panel for each queue."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is absent")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    queues = sorted({cell["queue"] for cell in cells})
    figure, axes = plt.subplots(1, len(queues), squeeze=False, figsize=(7 * len(queues), 9), layout="constrained")
    for axis, queue in zip(axes[0], queues, strict=True):
        shown = [cell for cell in cells if cell["queue"] == queue]
        rows = list(dict.fromkeys((cell["labels"], cell["d"]) for cell in shown))
        columns = sorted({cell["n"] for cell in shown})
        grid = torch.full((len(rows), len(columns)), torch.nan)
        for cell in shown:
            grid[rows.index((cell["labels"], cell["d"])), columns.index(cell["n"])] = cell["ratio"]
        image = axis.imshow(grid.log2(), cmap="RdYlGn_r", vmin=-2, vmax=2, aspect="auto")
        for i, j in [(i, j) for i in range(len(rows)) for j in range(len(columns)) if not grid[i, j].isnan()]:
            axis.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), [f"{labels}, D = {d}" for labels, d in rows])
        axis.set_xlabel("N")
        axis.set_title(f"queue of {queue}" if queue else "the batch itself")
    figure.colorbar(image, ax=axes[0].tolist(), label="time of ours / faster formula, log2")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
