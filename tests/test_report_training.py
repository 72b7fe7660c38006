"""The report of a registered comparison: intervals that are right, nothing claimed that is not there."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("matplotlib")
stats = pytest.importorskip("scipy.stats")
import report_training  # noqa: E402
from training_plan import PLAN, Plan, Run  # noqa: E402

HEAD = ["cpu", "cpu_capability"], ["torch", "python"]
COMPARISONS = ("scarce", "few", "more")  # the regimes that the pages show side by side


def write(plan: Plan, run: Run, linear: float, knn: float, curve: list[float], weights: str = "") -> None:
    """A run as `compare_training.py` leaves it, with these accuracies."""
    epochs = plan.settings(run)["epochs"] if not run.options else 450
    every = epochs / len(curve)
    record = {
        "run": run.name,
        "commit": "c" * 40,
        "machine": dict.fromkeys(HEAD[0], "a machine"),
        "versions": dict.fromkeys(HEAD[1], "1.2"),
        "config": {"epochs": epochs},
        "results": {"linear": [linear, 100.0], "knn": [knn, 100.0]},
        "knn": [[every * (number + 1), value] for number, value in enumerate(curve)],
        "weights": weights or run.name,
    }
    file = plan.file(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


@pytest.fixture
def plan(tmp_path) -> Plan:
    return Plan(results=tmp_path)


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_intervals_are_those_of_the_paired_t_test():
    random = np.random.default_rng(0)
    one, other = random.normal(60, 1, 6), random.normal(59, 1, 6)
    runs = [{s: {"results": {"linear": [v, 100.0]}} for s, v in enumerate(values)} for values in (one, other)]
    values = report_training.differences(*runs, "linear")
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert report_training.interval(values) == pytest.approx((expected.low, expected.high))


def test_only_seeds_that_both_have_are_compared():
    one, other = (
        {s: {"results": {"knn": [v, 100.0]}} for s, v in runs} for runs in ([(0, 5), (2, 9)], [(1, 1), (2, 2)])
    )
    assert report_training.differences(one, other, "knn") == [7]
    assert report_training.interval([7]) == (-math.inf, math.inf)


def test_without_runs_nothing_is_written(plan, tmp_path, capsys):
    assert report_training.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no finished run yet" in printed
    assert "missing: few/supcon/3" in printed
    assert "Preliminary" not in printed
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_compared_and_what_is_missing_said(plan, tmp_path, capsys):
    for run in plan.stage("scarce"):
        number = list(report_training.Report(plan).titles).index(run.method)
        if run.seed < 3 and (run.method, run.seed) != ("kd", 2):
            write(plan, run, 60 + number + 0.1 * run.seed * (run.method == "mix"), 50, [30, 40, 45, 47, 49.5])
    assert report_training.main(["--results", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "**Preliminary: not all runs of this stage are done.**" in text
    assert row(text, "SupCon") == ["3", "62.00 ± 0.00", "50.00 ± 0.00", "+5.00"]
    assert "Not at its end: cross-entropy, cross-entropy, mixup-cutmix, SupCon" in text
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    expected = f"**+1.10 [{1.1 - half:+.2f}, {1.1 + half:+.2f}]**"
    assert row(text, "GenSCL, mixup-cutmix − SupCon (hypothesis)") == ["3", expected, "+0.00 [+0.00, +0.00]"]
    count, cell, _ = row(text, "GenSCL, mixup-cutmix + KD − GenSCL, mixup-cutmix (hypothesis)")
    assert (count, cell) == ("2", "+1.00; +0.90")
    assert "Commits: ccccccc." in text
    assert "scarce: 14 of 25 runs" in text
    assert "missing: scarce/kd/2" in text
    assert "(curves-scarce.png)" in text
    assert "250 images per class" not in text
    assert not (tmp_path / "curves-few.png").exists()
    for name in ("curves-scarce.png", "images.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_complete_stage_is_not_preliminary(plan, tmp_path):
    for run in plan.stage("more"):
        write(plan, run, 60, 50, [49.5] * 5)
    text = report_training.Report(plan).text()
    assert "Preliminary" not in text
    assert "Not at its end" not in text
    assert "(hypothesis)" not in text


def test_the_ablation_is_compared_with_the_same_seeds_of_the_whole(plan):
    for run in [*plan.stage("few"), *plan.stage("ablation")]:
        if run.method == "mix":
            changed = {"hard_labels": -2.0 - 0.1 * run.seed, "queue_size": 0.5}
            gain = sum(changed.get(name, 0.0) for name, _ in run.options)
            weights = f"of {run.seed}" if run.options in ((), (("empty_anchors", "ignore"),)) else ""
            write(plan, run, 60 + run.seed + gain, 50, [1.0], weights)
    text = report_training.Report(plan).text()
    (half,) = [stats.t.ppf(0.975, 4) * np.std([0, 0.1, 0.2, 0.3, 0.4], ddof=1) / math.sqrt(5)]
    assert row(text.split("## What the parts")[1], "GenSCL, mixup-cutmix, unchanged")[:2] == ["5", "62.00 ± 1.58"]
    cells = row(text, "GenSCL, mixup-cutmix, hard labels")
    assert (cells[0], cells[3]) == ("5", f"**-2.20 [{-2.2 - half:+.2f}, {-2.2 + half:+.2f}]**")
    assert row(text, "GenSCL, mixup-cutmix, empty anchors ignore")[3] == "the same weights, bit for bit"
    assert row(text, "GenSCL, mixup-cutmix, smoothing 0.1")[3] == "+0.00 [+0.00, +0.00]"
    assert "Better by 2 points or more in every seed, for both judges: nothing." in text
    assert "The queue of 1,024 beside that of one: +0.00 [+0.00, +0.00] (linear probe)" in text


def test_the_choice_names_what_was_chosen(plan):
    for run in plan.stage("choose"):
        write(plan, run, {0.002: 50, 0.001: 52, 0.004: 51}[dict(run.options)["lr"]], 50, [1.0])
    text = report_training.Report(plan).text()
    assert row(text, "SupCon, lr 0.001 (chosen, the lowest tried)")[0] == "52.00"
    for run in plan.stage("choose"):
        write(plan, run, {0.002: 52, 0.001: 50, 0.004: 51}[dict(run.options)["lr"]], 50, [1.0])
    assert "| SupCon, lr 0.002 (chosen) |" in (text := report_training.Report(plan).text())
    assert text.count("(chosen)") == 5
    assert plan.settings(plan.stage("few")[0])["lr"] == 0.002


def test_other_decays_of_the_probe_are_a_table_of_their_own(plan):
    gains = {"supcon": 0.0, "mix": 1.0, "kd": 3.0}
    runs = [run for run in plan.stage("scarce") if run.method in gains]
    for run in runs:
        write(plan, run, 50 + gains[run.method], 50, [1.0])
    probes = {run.name: [50 + gains[run.method], 60 + 2 * gains[run.method] + run.seed] for run in runs}
    (plan.results / "probe_decay.json").write_text(json.dumps({"decays": [1e-4, 0.01], "runs": probes}))
    text = report_training.Report(plan).text()
    differences = ["**+2.00 [+2.00, +2.00]**", "**+4.00 [+4.00, +4.00]**"]
    assert row(text, "0.01") == ["62.00 ± 1.58", "64.00 ± 1.58", "68.00 ± 1.58", *differences]
    assert "| weight decay | SupCon | GenSCL, mixup-cutmix | GenSCL, mixup-cutmix + KD |" in text


def test_a_default_is_poor_if_another_value_is_better_in_both_seeds_and_for_both_judges(plan):
    gains = {  # of each seed: probe, kNN
        (("temperature", 0.2),): ((2.0, 2.5), (3.0, 2.0)),
        (("temperature", 0.5),): ((9.0, 9.0), (9.0, 1.9)),
        (("projection", 32),): ((2.0, 2.5),),  # one seed only so far
    }
    for run in plan.stage("sweep"):
        if run.method == "kd" and run.seed - 200 < len(of_seeds := gains.get(run.options, ((0, 0), (0, 0)))):
            linear, knn = of_seeds[run.seed - 200]
            write(plan, run, 50 + linear, 50 + knn, [1.0])
        elif run.method == "ce_mix":
            write(plan, run, 70, 70, [1.0])  # the teacher is no other value
    text = report_training.Report(plan).text()
    poor = "GenSCL, mixup-cutmix + KD, temperature 0.2"
    assert f"Better by 2 points or more in every seed, for both judges: {poor}." in text
    assert row(text, poor)[3:] == ["+2.00; +3.00", "+2.50; +2.00"]


def test_the_last_fifth_begins_before_four_fifths():
    knn = [[epoch, float(epoch)] for epoch in range(25, 400, 25)]
    run = {"config": {"epochs": 375}, "knn": knn, "results": {"knn": [375.0, 100.0]}}
    assert math.isnan(report_training.last_fifth(run | {"knn": knn[-1:]}))
    assert report_training.last_fifth(run) == 100  # from 275: 300 is at four fifths, not before


def test_a_stage_of_your_own_is_reported_like_the_others(tmp_path):
    content = json.loads(PLAN.read_text())
    variants = [{"method": "supcon"}, {"method": "mix"}, {"method": "mix", "mix_alpha": 0.2}]
    mine = {"title": "25 images of each class", "options": {"per_class": 25, "epochs": 40}, "seeds": [7, 8]}
    content["stages"] = {"mine": mine | {"variants": variants}}
    del content["methods"]["kd"], content["methods"]["ce_mix"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    plan = Plan(tmp_path / "plan.json", tmp_path / "runs")
    for run in plan.stage("mine"):
        write(plan, run, 40 + run.seed + {"supcon": 0, "mix": 2}[run.method] + bool(run.options), 50, [50.0] * 5)
    assert report_training.main(["--plan", str(tmp_path / "plan.json"), "--results", str(plan.results)]) == 0
    text = (plan.results / "report.md").read_text(encoding="utf-8")
    assert "## 25 images of each class" in text
    assert row(text, "GenSCL, mixup-cutmix, mix alpha 0.2")[:2] == ["2", "50.50 ± 0.71"]
    assert row(text, "GenSCL, mixup-cutmix − SupCon (hypothesis)")[:2] == ["2", "+2.00; +2.00"]
    assert "KD" not in text
    assert (plan.results / "images.png").exists()
    assert (plan.results / "curves-mine.png").exists()


@pytest.mark.parametrize(("equal", "said"), [(True, "the same to the last bit"), (False, "**not the same**")])
def test_a_run_that_was_done_once_more_is_mentioned(plan, equal, said):
    run = plan.stage("scarce")[0]
    write(plan, run, 60, 50, [50.0] * 5)
    assert "once more" not in report_training.Report(plan).text()
    plan.again(run).write_text(json.dumps({"same": equal}))
    assert f"- {run.name}, once more: {said}\n" in report_training.Report(plan).text()


def test_the_committed_report_is_that_of_the_committed_runs():
    plan = Plan()
    report = plan.results / "report.md"
    if not plan.results.exists():
        pytest.skip("no runs are committed yet")
    assert report.read_text(encoding="utf-8") == report_training.Report(plan).text()
    for run in plan.runs():
        if (result := plan.result(run)) is not None:
            assert result["run"] == run.name
            settings = {name: value for name, value in plan.settings(run).items() if name != "device"}
            assert {name: result["config"][name] for name in settings} == settings
            if (teacher := plan.teacher(run)) is not None:
                expected = {"run": teacher.name, "weights": plan.result(teacher)["weights"]}
                assert result["teacher"] == expected


def test_the_pages_have_the_numbers_of_the_committed_runs():
    report = report_training.Report(Plan())
    choosing = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    (page,) = [part for part in choosing.split("\n## ") if part.startswith("When to mix")]
    for method, name in {
        "supcon": "SupCon",
        "mix": "GenSCL, mixup-cutmix",
        "kd": "GenSCL, mixup-cutmix and a teacher",
        "ce_mix": "cross-entropy, mixup-cutmix (the teacher)",
        "ce": "cross-entropy",
    }.items():
        judged = [
            [report_training.accuracy(run, judge) for run in report.of(stage, method).values()]
            for stage in COMPARISONS
            for judge in report_training.JUDGES
        ]
        assert row(page, name) == [report_training.mean_and_spread(values) for values in judged], name
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    names = ["1. GenSCL with mixup-cutmix − SupCon", "2. the same with a teacher − without"]
    for name, (one, other) in zip(names, report_training.HYPOTHESES, strict=True):
        cells = [
            report_training.difference(report.of(stage, one), report.of(stage, other), judge).strip("*")
            for stage in COMPARISONS
            for judge in report_training.JUDGES
        ]
        assert row(page, name) == cells
    for name, variant in {
        "hard labels: mixed images, each of the class of the larger share": "mix,hard_labels=True",
        "smoothing 0.1 after mixing": "mix,smoothing=0.1",
        "a queue of 1,024 rows, four steps of the same encoder": "mix,queue_size=1024",
        "a queue of one row, the control for it": "mix,queue_size=1",
        '`empty_anchors="ignore"`, where no anchor is empty': "mix,empty_anchors=ignore",
    }.items():
        runs = report.of("ablation", variant), report.of("few", "mix")
        changes = [report_training.difference(*runs, judge) for judge in report_training.JUDGES]
        assert row(page, name)[:2] == [change.strip("*") for change in changes], name
        assert row(page, name)[2].startswith("harms") == all(change.startswith("**-") for change in changes), name
    for name, variant in {
        "temperature 0.07 (default: 0.1)": "temperature=0.07",
        "temperature 0.2": "temperature=0.2",
        "temperature 0.5": "temperature=0.5",
        "projection to 32 (128)": "projection=32",
        "projection to 512": "projection=512",
        "teacher's weight 0.5 (1)": "teacher_weight=0.5",
        "teacher's weight 2": "teacher_weight=2",
        "the teacher's labels alone": "teacher_weight=inf",
    }.items():
        runs = report.of("sweep", f"kd,{variant}"), report.of("sweep", "kd")
        assert row(page, name) == [report_training.difference(*runs, judge) for judge in report_training.JUDGES], name
