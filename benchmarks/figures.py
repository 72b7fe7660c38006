"""The numbers that a report is read for, with their goals: computed from the rows of that report and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cases import Case
from roofline import SPLIT, useful_flops

Row = dict[str, Any]


@dataclass
class Figure:
    """A number that the package has a goal for, or that is good to know (no bound)."""

    text: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    number: int | None = None  # of the goal that it belongs to, on a GPU

    def __str__(self) -> str:
        digits = ".1e" if not self.unit else "," if isinstance(self.value, int) else ",.2f"
        value = f"{self.value:{digits}} {self.unit}".rstrip()
        goals = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        goals += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        goal = f" (goal: {', '.join(goals)}; {'met' if self.met else 'missed'})" if goals else ""
        number = "" if self.number is None else f"{self.number}. "
        return f"  {number}{self.text}: {value.replace(' x', 'x')}{goal}"

    @property
    def met(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


class Report:
    """Rows of a report by case and method."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.rows: list[Row] = report["results"]
        self.ceilings: dict[str, list[float]] = report.get("ceilings", {})

    def row(self, case: Case, method: str) -> Row | None:
        """The row if it was measured."""
        return next((r for r in self.rows if case_of(r) == case and r["method"] == method and r["total_ms"]), None)

    def median(self, case: Case, method: str, quantity: str = "total_ms") -> float | None:
        row = self.row(case, method)
        return row[quantity][1] if row and row.get(quantity) else None

    def value(self, case: Case, method: str, quantity: str) -> float | None:
        row = self.row(case, method)
        return None if row is None else row[quantity]


def case_of(row: Row) -> Case:
    return Case(**{name: row[name] for name in Case.__dataclass_fields__ if name in row})


def quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


class Figures(list[Figure]):
    def put(self, value: float | None, text: str, unit: str = "x", **rest: Any) -> None:
        """Append a figure if its parts were measured."""
        if value is not None:
            self.append(Figure(text, value, unit, **rest))


def make_figures(report: dict[str, Any]) -> list[Figure]:
    return gpu_figures(Report(report)) if report["machine"]["device"] == "cuda" else cpu_figures(Report(report))


# ---- On a CPU ----


def cpu_figures(report: Report) -> list[Figure]:
    """The standard cases (D=128, C=100, soft labels, float32), as far as they were measured."""
    figures = Figures()

    def ratio(n: int, slow: str, fast: str) -> float | None:
        return quotient(report.median(Case(n), slow), report.median(Case(n), fast))

    sizes = sorted({row["n"] for row in report.rows if case_of(row) == Case(row["n"])})
    for n, goal in ((2048, 3), (8192, 9), (16384, 14)):
        figures.put(ratio(n, "plain", "auto"), f'N={n}: "auto" faster than plain dense', at_least=goal)
    speedups = [(r, n) for n in sizes if n >= 64 and (r := ratio(n, "plain", "auto")) is not None]
    if speedups:
        worst, n = min(speedups)
        figures.put(worst, f'all N: "auto" faster than plain dense, least (at N={n})', at_least=1)
    text = 'N=8192: "auto" faster than plain dense under torch.compile'
    figures.put(ratio(8192, "compiled", "auto"), text, at_least=2.5)
    figures.put(ratio(8192, "lean", "auto"), 'N=8192: "auto" faster than dense with log_softmax')
    text = "N=8192: the tiled operator row_lse over its matrix products alone"
    figures.put(ratio(8192, "lse", "mm"), text, at_most=1.25)
    figures.put(ratio(8192, "tiled", "mm"), 'N=8192: the whole loss, "tiled", over those matrix products')
    extra = report.value(Case(16384), "auto", "extra_bytes")
    figures.put(quotient(extra, 1e6), 'N=16384: "auto" extra memory', "MB", at_most=100)
    for name in ("loss", "gradient"):
        known = [report.value(Case(n), "auto", f"{name}_error") for n in sizes]
        worst = max((error for error in known if error is not None), default=None)
        figures.put(worst, f'all N: "auto" relative error of the {name} against float64, largest', "")
    return figures


# ---- On a GPU: eight goals for an H200 ----

LARGE = Case(32768)
HARD = Case(16384, labels="hard")
WIDTHS = {d: Case(65536, d=d, dtype="bfloat16") for d in (128, 512)}
MEMORY = Case(131072)
LONGEST = Case(262144, dtype="bfloat16")
ACCURACY = [Case(4096, temperature=tau) for tau in (0.5, 0.1, 0.05)] + [Case(4099, d=100)]
SMALL = [Case(n) for n in (256, 512, 1024)]
OPERATORS = {"high": "lse_triton_high", "highest": "lse_triton"}
LOSSES = {"high": "triton_high", "highest": "triton"}


def gpu_figures(report: Report) -> list[Figure]:
    figures = Figures()
    against_dense(report, figures)
    against_packages(report, figures)
    fractions(report, figures)
    against_attention(report, figures)
    memory(report, figures)
    accuracy(report, figures)
    small_batches(report, figures)
    return figures


def against_dense(report: Report, figures: Figures) -> None:
    for precision, goal in (("high", 15), ("highest", 8)):
        value = quotient(report.median(LARGE, "plain"), report.median(LARGE, LOSSES[precision]))
        figures.put(value, f'N=32768: "{precision}" faster than plain dense', at_least=goal, number=1)
    for precision, goal in (("high", {"at_least": 5}), ("highest", {})):
        value = quotient(report.median(LARGE, "compiled_tf32"), report.median(LARGE, LOSSES[precision]))
        text = f'N=32768: "{precision}" faster than plain dense under torch.compile with TF32'
        figures.put(value, text, number=2, **goal)
    value = quotient(report.median(LARGE, "compiled"), report.median(LARGE, "triton"))
    figures.put(value, 'N=32768: "highest" faster than plain dense under torch.compile without TF32', number=2)


def against_packages(report: Report, figures: Figures) -> None:
    for precision, time_goal, memory_goal in (("high", {"at_least": 20}, {"at_least": 50}), ("highest", {}, {})):
        ours, text = LOSSES[precision], f'N=16384, hard labels: "{precision}"'
        value = quotient(report.median(HARD, "pml"), report.median(HARD, ours))
        figures.put(value, f"{text} faster than pytorch-metric-learning", number=3, **time_goal)
        value = quotient(report.value(HARD, "pml", "extra_bytes"), report.value(HARD, ours, "extra_bytes"))
        figures.put(value, f"{text} extra memory, pytorch-metric-learning's over it", number=3, **memory_goal)
    for precision, time_goal, error_goal in (("high", {"at_least": 4}, {"at_most": 1}), ("highest", {}, {})):
        ours, text = OPERATORS[precision], f'N=32768: row_lse "{precision}"'
        value = quotient(report.median(LARGE, "infcl"), report.median(LARGE, ours))
        figures.put(value, f"{text} faster than inf-cl", number=4, **time_goal)
        for name, quantity in (("rows", "row_error"), ("gradient", "gradient_error")):
            value = quotient(report.value(LARGE, ours, quantity), report.value(LARGE, "infcl", quantity))
            which = f"error of the {name} over inf-cl's, each of its own quantity"
            figures.put(value, f"{text} {which}", number=4, **error_goal)
    value = quotient(report.median(LARGE, "infcl"), report.median(LARGE, "triton_high"))
    figures.put(value, 'N=32768: the whole loss, "high", faster than inf-cl, which has no labels', number=4)


def fractions(report: Report, figures: Figures) -> None:
    rate = max(report.ceilings.get("matmul bfloat16", []), default=None)
    figures.put(quotient(rate, 1e12), "bfloat16 matrix product of this run, the faster of two", "TFLOP/s", number=5)
    goals = {(128, "forward"): 0.45, (128, "backward"): 0.55, (512, "forward"): 0.6, (512, "backward"): 0.5}
    for precision, method in OPERATORS.items():
        for d, case in WIDTHS.items():
            forward, backward = useful_flops(case.n, d)
            for step, quantity, flops in (
                ("forward", "forward_ms", forward),
                ("backward", "backward_ms", backward),
                ("both", "total_ms", forward + backward),
            ):
                fraction = quotient(quotient(1e3 * flops, report.median(case, method, quantity)), rate)
                text, unit = f'N=65536, D={d}: row_lse "{precision}" {step}', "of that rate"
                goal = {"at_least": goals.get((d, step))} if precision == "high" else {}
                figures.put(fraction, f"{text}, useful flops", unit, number=5, **goal)
                if precision == "highest" and fraction is not None:
                    figures.put(fraction * SPLIT, f"{text}, {SPLIT} times that, as performed", unit, number=5)


def against_attention(report: Report, figures: Figures) -> None:
    case = WIDTHS[128]
    attention = [report.median(case, method) for method in ("sdpa", "sdpa_cudnn")]
    fastest = min((time for time in attention if time is not None), default=None)
    for precision, goal in (("high", {"at_most": 0.6}), ("highest", {})):
        value = quotient(report.median(case, OPERATORS[precision]), fastest)
        text = f'N=65536: row_lse "{precision}" over the faster attention(z, z, z), bfloat16, one head'
        figures.put(value, text, number=6, **goal)


def memory(report: Report, figures: Figures) -> None:
    for precision in LOSSES:
        extra = quotient(report.value(MEMORY, LOSSES[precision], "extra_bytes"), 1e9)
        figures.put(extra, f'N=131072: extra memory of the loss, "{precision}"', "GB", at_most=0.2, number=7)
        extra = quotient(report.value(MEMORY, OPERATORS[precision], "extra_bytes"), 1e9)
        figures.put(extra, f'N=131072: extra memory of row_lse alone, "{precision}"', "GB", number=7)
    figures.put(report.median(LONGEST, "triton"), "N=262144, bfloat16: forward + backward", "ms", at_most=130, number=7)


def accuracy(report: Report, figures: Figures) -> None:
    for quantity, text, goal in (
        ("row_error", "largest error of a row's log-sum-exp", 1e-5),
        ("gradient_error", "largest relative error of dZ", 5e-6),
    ):
        rows = [row for row in report.rows if row["method"] == "lse_triton" and case_of(row).temperature >= 0.05]
        worst = max((row[quantity] for row in rows if row[quantity] is not None), default=None)
        figures.put(worst, f'"highest", temperatures from 0.05: {text}', "", at_most=goal, number=8)
    counted = [row for row in report.rows if row["method"] in {"triton", "lse_triton"} and row.get("repeats")]
    if counted:
        fewest = min(row["repeats"] if row["identical"] else 0 for row in counted)
        text = '"highest": repeats that are equal to the bit, fewest of the cases (0: some differ)'
        figures.put(fewest, text, "repeats", at_least=100, number=8)


def small_batches(report: Report, figures: Figures) -> None:
    rivals = ("plain", "compiled", "lean")
    for quantity, how in (("total_ms", "launched one by one"), ("graph_ms", "as a CUDA graph")):
        for ours, goal in (("auto", {"at_most": 1.2}), ("triton", {})):
            ratios = []
            for case in SMALL:
                times = [report.median(case, rival, quantity) for rival in rivals]
                best = min((time for time in times if time is not None), default=None)
                ratios.append((quotient(report.median(case, ours, quantity), best), case.n))
            if all(value is not None for value, _ in ratios):
                worst, n = max(ratios)
                text = f'N=256 to 1024, {how}: "{ours}" over the best of the dense ones, largest (at N={n})'
                figures.put(worst, text, number=8, **goal)


def summary(figures: list[Figure], device: str) -> str:
    head = "Forward + backward, D=128, C=100, soft labels, float32"
    if device == "cuda":
        lines = [
            f"{head}, unless it says otherwise. Goals are for one H200.",
            '"highest" and "high" are the backend "triton" under that float32 matmul precision of torch.',
        ]
        for number in range(1, 9):
            some = [str(figure) for figure in figures if figure.number == number]
            lines += some or [f"  {number}. not measured in this run"]
        return "\n".join([*lines, "\n"])
    if not figures:
        return ""
    return "\n".join([f"{head}. Goals are for two CPU cores.", *map(str, figures), "\n"])
