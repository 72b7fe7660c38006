"""Tables and figures of a registered comparison of trainings, from whatever runs are there; what is missing is said.

    python benchmarks/report_training.py    # benchmarks/results/NAME of the plan: report.md and figures
    python benchmarks/report_training.py --plan MINE.json

Methods are compared seed by seed: the mean of the differences, and a 95 % interval from Student's t. What is not
registered in the plan, such as a stage of your own, is reported in the same way.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import t as student
from training_plan import PLAN, Plan, Run

JUDGES = {"linear": "linear probe", "knn": "kNN"}
HYPOTHESES = (("mix", "supcon"), ("kd", "mix"))
OTHERS = (("kd", "supcon"), ("supcon", "ce"), ("mix", "ce"), ("kd", "ce"))
OTHERS += (("ce_mix", "ce"), ("mix", "ce_mix"), ("kd", "ce_mix"))
LONG_ENOUGH = 1.0  # points of kNN that a method may gain in the last fifth of its training
POOR = 2.0  # a default is called poor if another value is better by so many points, in each seed and for each judge

Results = dict[int, dict[str, Any]]  # of the runs of a variant, by seed


# ------------------------------------------------------------------ numbers
def found(plan: Plan) -> dict[str, dict[str, Results]]:
    """The results that are there, of each stage and variant."""
    results: dict[str, dict[str, Results]] = {}
    for run in plan.runs():
        variants = results.setdefault(run.stage, {}).setdefault(run.variant, {})
        if (result := plan.result(run)) is not None:
            variants[run.seed] = result
    return results


def accuracy(result: dict[str, Any], judge: str) -> float:
    return result["results"][judge][0]


def differences(one: Results, other: Results, judge: str) -> list[float]:
    """Within each seed that both have."""
    return [accuracy(one[seed], judge) - accuracy(other[seed], judge) for seed in sorted(one.keys() & other.keys())]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of Student's t around the mean; unbounded for fewer than two values."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def last_fifth(result: dict[str, Any]) -> float:
    """What kNN gained from the last judgement before four fifths of the epochs to the end."""
    epochs = result["config"]["epochs"]
    before = [value for epoch, value in result["knn"] if epoch < 0.8 * epochs]
    return accuracy(result, "knn") - before[-1] if before else math.nan


# ------------------------------------------------------------------ words
def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def mean_and_spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def difference(one: Results, other: Results, judge: str) -> str:
    """The mean with its interval, in bold if zero is outside; one or two values as they are."""
    values = differences(one, other, judge)
    if len(values) < 3:
        return "; ".join(f"{value:+.2f}" for value in values) or "–"
    low, high = interval(values)
    text = f"{statistics.mean(values):+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


class Report:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.results = plan, found(plan)
        self.titles = {name: method["title"] for name, method in plan.content["methods"].items()}
        self.comparisons = [stage for stage in plan.content["stages"] if plan.kind(stage) == "comparison"]

    def of(self, stage: str, variant: str) -> Results:
        return self.results.get(stage, {}).get(variant, {})

    def is_complete(self, stage: str) -> bool:
        return all(self.plan.is_done(run) for run in self.plan.stage(stage))

    def text(self) -> str:
        """The whole report in Markdown."""
        stages = self.plan.content["stages"]
        parts = ["# A registered comparison of trainings\n", self.conditions()]
        parts += ["![Linear probe against images of each class](images.png)\n"] if self.compared() else []
        for stage, variants in self.results.items():
            if any(variants.values()):
                parts.append(f"## {stages[stage]['title']}\n")
                parts += [] if self.is_complete(stage) else ["**Preliminary: not all runs of this stage are done.**\n"]
                parts.append(self.section(stage))
        return "\n".join([*parts, "## Runs\n", *self.repeated(), f"```text\n{self.plan.missing()}\n```\n"])

    def compared(self) -> list[str]:
        """The comparisons of which there are runs."""
        return [stage for stage in self.comparisons if any(self.results[stage].values())]

    def repeated(self) -> list[str]:
        """What came out of runs that were done once more."""
        said = []
        for run in self.plan.runs():
            if (file := self.plan.again(run)).exists():
                equal = json.loads(file.read_text(encoding="utf-8"))["same"]
                said.append(f"- {run.name}, once more: {'the same to the last bit' if equal else '**not the same**'}")
        return ["\n".join(said) + "\n"] if said else []

    def conditions(self) -> str:
        stages = self.results.values()
        runs = [run for variants in stages for results in variants.values() for run in results.values()]
        machines = {f"{run['machine']['cpu']}, {run['machine']['cpu_capability']}" for run in runs}
        versions = {f"torch {run['versions']['torch']}, Python {run['versions']['python']}" for run in runs}
        commits = {str(run["commit"])[:7] for run in runs}
        where = f" Machines: {'; '.join(sorted(machines))}. Versions: {'; '.join(sorted(versions))}. " if runs else ""
        where += f"Commits: {', '.join(sorted(commits))}." if runs else ""
        return (
            "Written by `benchmarks/report_training.py` from the files beside it. Top-1 accuracies in %, ± standard "
            "deviation over seeds. Differences within seeds: mean and 95 % interval, in bold if zero is outside; that "
            "zero is inside does not show that there is no difference. One or two differences are shown as they are."
            f"{where}\n"
        )

    def section(self, stage: str) -> str:
        tables = {"comparison": self.comparison, "choice": self.choice, "changes": self.changes}
        return tables[self.plan.kind(stage)](stage)

    def variants(self, stage: str) -> dict[str, str]:
        """Of each variant its title, methods in the order of the plan."""
        titles = {run.variant: (run.method, options_of(run)) for run in self.plan.stage(stage)}
        ordered = sorted(titles.items(), key=lambda entry: list(self.titles).index(entry[1][0]))
        return {name: ", ".join(filter(None, [self.titles[method], changed])) for name, (method, changed) in ordered}

    def comparison(self, stage: str) -> str:
        results, titles, rows = self.results[stage], self.variants(stage), []
        for variant, title in titles.items():
            runs = results[variant].values()
            judged = [mean_and_spread([accuracy(run, judge) for run in runs]) for judge in JUDGES]
            gained = [gain for run in runs if not math.isnan(gain := last_fifth(run))]
            rows.append([title, str(len(runs)), *judged, f"{statistics.mean(gained):+.2f}" if gained else "–"])
        heads = ["", "seeds", *JUDGES.values(), "kNN gained in the last fifth"]
        parts = [f"![kNN against epochs](curves-{stage}.png)\n", table(heads, rows)]
        rows = []
        for pairs, mark in ((HYPOTHESES, " (hypothesis)" if stage == self.comparisons[0] else ""), (OTHERS, "")):
            for one, other in (pair for pair in pairs if results.keys() >= set(pair)):
                count = len(differences(results[one], results[other], "linear"))
                cells = [difference(results[one], results[other], judge) for judge in JUDGES]
                rows.append([f"{self.titles[one]} − {self.titles[other]}{mark}", str(count), *cells])
        parts.append(table(["difference", "pairs", *JUDGES.values()], rows))
        slow = [title for variant, title in titles.items() if self.gain(results[variant]) >= LONG_ENOUGH]
        if slow:
            parts.append(f"Not at its end: {', '.join(slow)} gained a point of kNN or more in the last fifth.\n")
        return "\n".join([*parts, *self.other_decays(stage)])

    def other_decays(self, stage: str) -> list[str]:
        """What `probe_decay.py` found: accuracies, and the hypotheses' differences, with other weight decays."""
        file = self.plan.results / "probe_decay.json"
        if not file.exists():
            return []
        probes, rows = json.loads(file.read_text(encoding="utf-8")), []
        runs = [run for run in self.plan.stage(stage) if run.name in probes["runs"]]
        titles = {name: title for name, title in self.variants(stage).items() if any(r.variant == name for r in runs)}
        for number, decay in enumerate(probes["decays"]):
            judged: dict[str, Results] = {name: {} for name in titles}
            for run in runs:
                linear = probes["runs"][run.name][number]
                judged[run.variant][run.seed] = {"results": {"linear": [linear]}}
            means = [mean_and_spread([accuracy(run, "linear") for run in of.values()]) for of in judged.values()]
            pairs = [difference(judged.get(one, {}), judged.get(other, {}), "linear") for one, other in HYPOTHESES]
            rows.append([f"{decay:g}", *means, *pairs])
        heads = ["weight decay", *titles.values()]
        heads += [f"{self.titles[one]} − {self.titles[other]}" for one, other in HYPOTHESES]
        words = (
            "The linear probe with other weight decays, after the fact; the first one is that of the tables above:\n"
        )
        return [words, table(heads, rows)] if runs else []

    def gain(self, results: Results) -> float:
        return statistics.mean(map(last_fifth, results.values())) if results else math.nan

    def choice(self, stage: str) -> str:
        rows, titles = [], self.variants(stage)
        for variant, results in self.results[stage].items():
            run = next(run for run in self.plan.stage(stage) if run.variant == variant)
            chosen = self.plan.chosen(run.method, stage) == run.options
            mark = f" (chosen{self.edge(run)})" if chosen else ""
            cells = [mean_and_spread([accuracy(result, judge) for result in results.values()]) for judge in JUDGES]
            rows.append([f"{titles[variant]}{mark}", *cells])
        return table(["", *JUDGES.values()], rows)

    def edge(self, run: Run) -> str:
        """Whether a chosen value is the last one that was tried, beyond which there may be a better one."""
        for name, value in run.options:
            tried = [dict(other.options)[name] for other in self.plan.stage(run.stage) if other.method == run.method]
            if len(set(tried)) > 1 and value in (min(tried), max(tried)):
                return f", the {'highest' if value == max(tried) else 'lowest'} tried"
        return ""

    def changes(self, stage: str) -> str:
        """What one changed option does."""
        source, base = self.plan.content["stages"][stage]["compared_with"].split("/")
        base_results, rows, titles = self.of(source, base), [], self.variants(stage)
        if source != stage and base_results:
            cells = [mean_and_spread([accuracy(result, judge) for result in base_results.values()]) for judge in JUDGES]
            rows.append([f"{self.variants(source)[base]}, unchanged", str(len(base_results)), *cells, "", ""])
        changed = {run.variant for run in self.plan.stage(stage) if run.options}  # all but the base and its teacher
        for variant, results in self.results[stage].items():
            if variant not in changed | {base}:
                continue
            cells = [mean_and_spread([accuracy(result, judge) for result in results.values()]) for judge in JUDGES]
            compared = [difference(results, base_results, judge) for judge in JUDGES]
            shared = results.keys() & base_results.keys()
            if shared and variant != base and all(results[s]["weights"] == base_results[s]["weights"] for s in shared):
                compared = ["the same weights, bit for bit", ""]
            rows.append([titles[variant], str(len(results)), *cells, *(compared if variant != base else ["", ""])])
        heads = ["", "seeds", *JUDGES.values(), *(f"change, {judge}" for judge in JUDGES.values())]
        better = [
            titles[variant]
            for variant, results in self.results[stage].items()
            if (shared := results.keys() & base_results.keys()) and variant in changed and shared == base_results.keys()
            if all(value >= POOR for judge in JUDGES for value in differences(results, base_results, judge))
        ]
        words = (
            f"Better by {POOR:.0f} points or more in every seed, for both judges: {', '.join(better) or 'nothing'}.\n"
        )
        parts = [table(heads, rows), words]
        long, one = (self.of(stage, f"mix,queue_size={size}") for size in (1024, 1))
        if long and one:
            cells = ", ".join(f"{difference(long, one, judge)} ({title})" for judge, title in JUDGES.items())
            parts.append(f"The queue of 1,024 beside that of one: {cells}.\n")
        return "\n".join(parts)


def options_of(run: Run) -> str:
    words = [(name.replace("_", " "), "" if value is True else f" {value}") for name, value in run.options]
    return ", ".join(name + value for name, value in words)


# ------------------------------------------------------------------ figures
def draw_curves(report: Report, stage: str, path: Path) -> None:
    """kNN against epochs: mean over seeds, and a band of one standard deviation."""
    axis = (figure := Figure(figsize=(6.5, 4), layout="constrained")).subplots()
    for variant, title in report.variants(stage).items():
        if not (runs := report.of(stage, variant).values()):
            continue
        epochs = [epoch for epoch, _ in next(iter(runs))["knn"]]
        values = list(zip(*([value for _, value in run["knn"]] for run in runs), strict=True))
        means = [statistics.mean(column) for column in values]
        spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in values]
        label = f"{title} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        (line,) = axis.plot(epochs, means, marker="o" if len(epochs) == 1 else "", label=label)
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    title = report.plan.content["stages"][stage]["title"] + ("" if report.is_complete(stage) else " (preliminary)")
    axis.set(title=title, xlabel="epoch", ylabel="kNN, test accuracy in %"), axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def draw_images(report: Report, path: Path) -> None:
    """The linear probe against the number of images of each class."""
    axis = (figure := Figure(figsize=(5.5, 4), layout="constrained")).subplots()
    stages = report.compared()
    for number, (method, title) in enumerate(report.titles.items()):
        points = []
        for stage in stages:
            values = [accuracy(run, "linear") for run in report.of(stage, method).values()]
            images = report.plan.content["stages"][stage]["options"].get("per_class")
            if values and images is not None:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                points.append((images * 1.015 ** (number - 2), statistics.mean(values), spread))  # side by side
        if points:
            x, y, spread = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, spread, marker="o", capsize=3, label=title)
    label = "linear probe, test accuracy in %" + ("" if all(map(report.is_complete, stages)) else " (preliminary)")
    counts = {report.plan.content["stages"][stage]["options"].get("per_class") for stage in stages} - {None}
    axis.set_xscale("log"), axis.set_xticks(sorted(counts), map(str, sorted(counts))), axis.minorticks_off()
    title = "mean ± standard deviation, side by side"
    axis.set(title=title, xlabel="training images of each class", ylabel=label), axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)


# ------------------------------------------------------------------ the command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=PLAN, help="(default: benchmarks/training/plan.json)")
    parser.add_argument(
        "--results", type=Path, help="folder of the runs (default: benchmarks/results/NAME of the plan)"
    )
    options = parser.parse_args(argv)
    plan = Plan(options.plan, options.results)
    report = Report(plan)
    text = report.text()
    print(text)
    if not any(result for variants in report.results.values() for result in variants.values()):
        print(f"{plan.results} holds no finished run yet: nothing is written")
        return 0
    (plan.results / "report.md").write_text(text, encoding="utf-8")
    for stage in report.compared():
        draw_curves(report, stage, plan.results / f"curves-{stage}.png")
    if report.compared():
        draw_images(report, plan.results / "images.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
