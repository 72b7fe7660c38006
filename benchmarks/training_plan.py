"""The plan of a registered comparison of trainings, and the files of those of its runs that are done."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
PLAN = BENCHMARKS / "training" / "plan.json"


@dataclass(frozen=True)
class Run:
    """One training: a variant (a method with its options) of a stage, with a seed."""

    stage: str
    method: str
    options: tuple[tuple[str, Any], ...]  # those in which variants of the stage differ
    seed: int

    @property
    def variant(self) -> str:
        return ",".join([self.method, *(f"{name}={value}" for name, value in self.options)])

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.variant}/{self.seed}"


class Plan:
    """What is to be run, in which order, and the results so far.

    The file has "common" options of the trainer, "methods" (each with its "options", and its "teacher" if it has one)
    and "stages": "variants" (a method and the options that set it apart), "seeds", "options", and "settings_from", the
    stage in which the options of each method are chosen. A stage with "compared_with", a stage and a variant of
    it, changes one thing at a time; what settings do not come from and has no such entry compares methods.
    """

    def __init__(self, path: Path = PLAN, results: Path | None = None) -> None:
        self.content = json.loads(path.read_text(encoding="utf-8"))
        self.results = results or BENCHMARKS / "results" / self.content["name"]

    def runs(self) -> list[Run]:
        """Seed by seed, so that pairs are complete early."""
        return [run for name in self.content["stages"] for run in self.stage(name)]

    def kind(self, stage: str) -> str:
        """What a stage is: "choice", "changes" or "comparison"."""
        stages = self.content["stages"]
        if "compared_with" in stages[stage]:
            return "changes"
        return "choice" if any(other.get("settings_from") == stage for other in stages.values()) else "comparison"

    def stage(self, name: str) -> list[Run]:
        stage = self.content["stages"][name]
        runs = []
        for seed in stage["seeds"]:
            for variant in stage["variants"]:
                options = tuple((k, v) for k, v in variant.items() if k != "method")
                runs.append(Run(name, variant["method"], options, seed))
        return runs

    def file(self, run: Run) -> Path:
        return self.results / run.stage / run.variant / f"{run.seed}.json"

    def result(self, run: Run) -> dict[str, Any] | None:
        file = self.file(run)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def again(self, run: Run) -> Path:
        """The file of a run that was done once more."""
        return self.file(run).with_suffix(".again.json")

    def is_done(self, run: Run) -> bool:
        return self.file(run).exists()

    def missing(self, only: str | None = None) -> str:
        """How many runs of each stage are done, and which are not; of those that `with_needs` names."""
        wanted, lines = self.with_needs(only), []
        for stage in dict.fromkeys(run.stage for run in wanted):
            runs = [run for run in wanted if run.stage == stage]
            missing = [run.name for run in runs if not self.is_done(run)]
            lines += [f"{stage}: {len(runs) - len(missing)} of {len(runs)} runs", *(f"  missing: {n}" for n in missing)]
        return "\n".join(lines)

    def chosen(self, method: str, stage: str) -> tuple[tuple[str, Any], ...] | None:
        """The options of the best variant of a method on validation images; None as long as one is missing."""
        scores: dict[tuple[tuple[str, Any], ...], list[float]] = {}
        for run in (run for run in self.stage(stage) if run.method == method):
            if (result := self.result(run)) is None:
                return None
            scores.setdefault(run.options, []).append(result["results"]["linear"][0])
        return max(scores, key=lambda options: statistics.mean(scores[options]))  # the first one of equals

    def teacher(self, run: Run) -> Run | None:
        """Of the same stage and seed; of several, the best on validation images. The first one if that is open."""
        found = self.teachers(run)
        if len(found) > 1 and (best := self.chosen(found[0].method, run.stage)) is not None:
            found = [other for other in found if other.options == best]
        return found[0] if found else None

    def teachers(self, run: Run) -> list[Run]:
        method = self.content["methods"][run.method].get("teacher")
        return [other for other in self.stage(run.stage) if (other.method, other.seed) == (method, run.seed)]

    def needs(self, run: Run) -> list[Run]:
        """The runs that have to be finished before this one."""
        source = self.content["stages"][run.stage].get("settings_from")
        needed = [other for other in self.stage(source) if other.method == run.method] if source else []
        return needed + self.teachers(run)

    def with_needs(self, only: str | None) -> list[Run]:
        """A stage, a variant, or a run, and what has to be finished before, in the order of the plan; all if None."""
        parts = only.split("/") if only else []
        found = {run for run in self.runs() if run.name.split("/")[: len(parts)] == parts}
        while missing := {need for run in found for need in self.needs(run)} - found:
            found |= missing
        return [run for run in self.runs() if run in found]

    def settings(self, run: Run) -> dict[str, Any]:
        """The trainer's options of a run whose needs are met."""
        stage = self.content["stages"][run.stage]
        options = self.content["common"] | stage["options"] | self.content["methods"][run.method]["options"]
        if source := stage.get("settings_from"):
            options |= dict(self.chosen(run.method, source) or ())
        return options | dict(run.options) | {"seed": run.seed, "subset_seed": run.seed}
