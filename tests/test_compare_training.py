"""The registered comparison: each run is done once, in order, and to the same last bit whatever interrupts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "compare_training.py"
sys.path[:0] = [str(ROOT / "examples"), str(SCRIPT.parent)]
for package in ("kornia", "matplotlib", "sklearn", "PIL", "tqdm"):
    pytest.importorskip(package)
pytest.importorskip("fcntl")
import compare_training as compare  # noqa: E402
import training_plan  # noqa: E402
from images import pack, write_images  # noqa: E402

KD = "few/kd,teacher_weight=inf/0"
RATES = (0.002, 0.001)
VARIANTS = ["ce_mix", "mix", "supcon", "kd", "ce"]


def tiny_plan(folder: Path, **changes: object) -> Path:
    """The committed plan, each stage with one seed and one or two variants of a few steps."""
    plan = json.loads(training_plan.PLAN.read_text())
    plan["common"] |= {"batch_size": 8, "amp": "off", "knn_every": 1, "save_every": 1}
    stages = plan["stages"]
    stages["choose"]["variants"] = [{"method": "ce_mix", "lr": lr} for lr in RATES]
    stages["choose"]["variants"] += [{"method": method, "lr": RATES[0]} for method in ("mix", "kd")]
    stages["few"]["variants"] = [{"method": "ce_mix"}, {"method": "mix"}, {"method": "kd", "teacher_weight": "inf"}]
    stages["ablation"]["variants"] = stages["ablation"]["variants"][2:3]
    for name in ("choose", "few", "ablation"):
        epochs = 3 if name == "few" else 1
        held_out = {"validation": 4} if name == "choose" else {}
        stages[name] |= {"options": {"per_class": 8, "epochs": epochs, **held_out}, "seeds": [0]}
    del stages["scarce"], stages["sweep"], stages["more"]
    path = folder / "plan.json"
    path.write_text(json.dumps(plan | changes))
    return path


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"}


def command(data: Path, folder: Path, *arguments: str) -> list[str]:
    places = ["--results", str(folder / "results"), "--local", str(folder / "local"), "--commit", "none", "--nice", "0"]
    what = ["--data", str(data), "--plan", str(folder / "plan.json")]
    return [sys.executable, str(SCRIPT), *what, *places, *arguments]


def run(*arguments) -> str:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, encoding="utf-8", env=environment(), timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return pack(write_images(folder / "images", train=14), folder / "images.tar")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    tiny_plan(folder)
    printed = run(data, folder)
    assert "missing" not in printed
    return folder


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / "results" / f"{name}.json").read_text())


@pytest.mark.exhaustive
def test_a_run_leaves_its_configuration_and_its_results(finished, data):
    one = record(finished, KD)
    assert one["run"] == KD
    assert one["commit"] == "none"
    assert one["versions"].keys() >= {"torch", "python", "kornia", "pillow"}
    assert one["machine"]["threads"] == 1
    assert one["machine"]["cpu_capability"] != "AVX512"  # which adds in another order
    assert [epoch for epoch, _ in one["knn"]] == [1, 2, 3]
    assert len(one["losses"]) == 3
    assert one["results"].keys() == {"linear", "knn"}
    assert one["config"]["data"] == data.name
    assert str(finished) not in json.dumps(one)
    teacher = record(finished, "few/ce_mix/0")
    assert one["teacher"] == {"run": "few/ce_mix/0", "weights": teacher["weights"]}
    assert teacher["teacher"] is None
    assert teacher["config"]["images"] == one["config"]["images"]
    assert one["config"]["test_images"] == 24
    assert record(finished, f"choose/mix,lr={RATES[0]}/0")["config"]["test_images"] == 16  # 4 of each class, put aside


@pytest.mark.exhaustive
def test_the_chosen_settings_are_those_of_the_best_on_validation_images(finished):
    scores = {lr: record(finished, f"choose/ce_mix,lr={lr}/0")["results"]["linear"][0] for lr in RATES}
    best = max(scores, key=scores.get)  # the first of equals
    assert record(finished, "few/ce_mix/0")["config"]["lr"] == best
    assert record(finished, f"choose/ce_mix,lr={best}/0")["config"]["validation"] == 4
    assert record(finished, f"choose/kd,lr={RATES[0]}/0")["teacher"]["run"] == f"choose/ce_mix,lr={best}/0"


def test_of_equals_the_first_is_chosen(tmp_path):
    plan = training_plan.Plan(results=tmp_path)
    runs = [run for run in plan.stage("choose") if run.method == "supcon"]
    for run, linear in zip(runs, (50, 51, 51), strict=True):
        assert plan.chosen("supcon", "choose") is None
        plan.file(run).parent.mkdir(parents=True)
        plan.file(run).write_text(json.dumps({"results": {"linear": [linear, 100]}}))
    assert plan.chosen("supcon", "choose") == (("lr", 0.001),)


def test_a_training_with_avx512_is_told_to_do_without(monkeypatch):
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
    for found, expected in (({"avx2": True, "avx512_f": True}, ["avx2", "AVX2"]), ({"arm_neon": True}, [None, None])):
        monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in names})
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        compare.keep_to_avx2()
        told = compare.environment()
        assert [told.get(name) for name in names] == expected


def test_only_some_runs_and_what_they_need(tmp_path):
    plan = training_plan.Plan(results=tmp_path)
    names = [run.name for run in plan.with_needs("scarce/kd/2")]
    rates = [f"choose/{method},lr={lr}/100" for method in ("ce_mix", "kd") for lr in (0.002, 0.001, 0.004)]
    assert names == [*rates, "scarce/ce_mix/2", "scarce/kd/2"]
    assert [run.name for run in plan.with_needs("scarce/ce") if run.stage == "scarce"] == [
        f"scarce/ce/{seed}" for seed in range(5)
    ]
    assert plan.with_needs("few/nothing") == []
    assert plan.missing("scarce/ce/2").splitlines()[-2:] == ["scarce: 0 of 1 runs", "  missing: scarce/ce/2"]
    assert plan.with_needs(None) == plan.runs()


def test_only_what_is_not_in_the_plan_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main(["--data", str(tmp_path), "--results", str(tmp_path), "--nice", "0", "--only", "few/nothing"])
    assert "--only few/nothing is not in the plan" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_the_options_of_a_variant_reach_the_trainer(finished):
    assert record(finished, "ablation/mix,queue_size=1024/0")["config"]["queue_size"] == 1024
    assert record(finished, "few/mix/0")["config"]["queue_size"] == 0
    assert record(finished, KD)["config"]["teacher_weight"] == "inf"


@pytest.mark.exhaustive
def test_a_second_command_finds_nothing_to_do(finished, data):
    before = {path: path.stat().st_mtime_ns for path in (finished / "results").rglob("*.json")}
    assert len(before) == 4 + 3 + 1
    assert "begins" not in run(data, finished)
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "results").rglob("*.json")}


@pytest.mark.exhaustive
def test_again_is_the_same_to_the_last_bit(finished, data):
    assert f"{KD}: again, the same to the last bit" in run(data, finished, "--again", KD)
    again = record(finished, f"{KD}.again")
    assert again["same"]
    assert not (finished / "local" / "again" / KD / "last.pt").exists()
    assert again["weights"] == record(finished, KD)["weights"]
    (finished / "results" / f"{KD}.again.json").unlink()


@pytest.mark.exhaustive
def test_the_probe_with_other_decays_begins_with_that_of_the_runs(finished, data, tmp_path, capsys):
    import probe_decay

    places = ["--results", str(finished / "results"), "--local", str(finished / "local")]
    arguments = ["--data", str(data), "--plan", str(finished / "plan.json"), *places]
    assert probe_decay.main(arguments) == 0
    assert "another machine" not in capsys.readouterr().out
    found = json.loads((finished / "results" / "probe_decay.json").read_text())
    assert list(found["runs"]) == ["few/ce_mix/0", "few/mix/0", KD]
    for name, judged in found["runs"].items():
        assert judged[0] == pytest.approx(record(finished, name)["results"]["linear"][0], abs=0.01)
        assert len(judged) == len(probe_decay.DECAYS)
    (finished / "results" / "probe_decay.json").unlink()
    # Weights of another run are not probed in its name.
    shutil.copytree(finished, tmp_path / "copy")
    weights = [tmp_path / "copy" / "local" / "few" / name / "0" / "last.pt" for name in ("mix", "ce_mix")]
    shutil.copy(*weights)
    places = [str(path).replace(str(finished), str(tmp_path / "copy")) for path in arguments]
    assert probe_decay.main(places) == 0
    assert "few/ce_mix/0: left out" in capsys.readouterr().out
    found = json.loads((tmp_path / "copy" / "results" / "probe_decay.json").read_text())
    assert list(found["runs"]) == ["few/mix/0", KD]


def strip(one: dict) -> dict:
    return {name: value for name, value in one.items() if name != "seconds"}


@pytest.mark.exhaustive
def test_what_was_killed_goes_on_and_ends_as_if_it_was_not(finished, data, tmp_path):
    """Runner and training are killed within a run; and the weights of the teacher are gone afterwards."""
    tiny_plan(tmp_path)
    for name in ("choose", "ablation", "few/ce_mix"):
        source, target = finished / "results" / name, tmp_path / "results" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    process = subprocess.Popen(
        command(data, tmp_path, "--jobs", "1"), env=environment(), stdout=subprocess.PIPE, start_new_session=True
    )
    metrics, limit = tmp_path / "local" / "few" / "mix" / "0" / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") == 2) and time.monotonic() < limit:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "results" / "few" / "mix" / "0.json").exists()
    assert (metrics.parent / "last.pt").exists()
    printed = run(data, tmp_path)
    assert "few/mix/0: goes on" in printed
    assert "few/ce_mix/0: again, the same to the last bit" in printed
    for path in (finished / "results").rglob("*.json"):
        name = str(path.relative_to(finished / "results")).removesuffix(".json")
        assert strip(record(tmp_path, name)) == strip(record(finished, name)), name


def test_what_differs_is_named():
    one = {"config": {"lr": 1, "data": "here"}, "teacher": None, "results": 1, "knn": 1, "losses": 1, "weights": "a"}
    same = one | {"config": {"lr": 1, "data": "there", "added_later": 0}}
    assert compare.differing(one, same) == []
    assert compare.verdict([]) == "the same to the last bit"
    changed = compare.differing(one, same | {"config": {"lr": 2}, "weights": "b"})
    assert compare.verdict(changed) == "NOT the same: option lr, weights"


def test_a_training_imports_the_package_beside_it():
    assert compare.environment()["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_a_run_does_not_go_on_with_another_commit(tmp_path, capsys):
    plan = training_plan.Plan(results=tmp_path / "results")
    run = plan.stage("choose")[0]
    runner = compare.Runner(plan, tmp_path, tmp_path / "local", "new")
    folder = runner.folder(run)
    folder.mkdir(parents=True)
    (folder / "last.pt").touch()
    (folder / "commit").write_text("old")
    assert not runner.train(run, 0, folder)
    assert "begun by commit old, not new" in capsys.readouterr().out
    assert run not in runner.possible()


def test_a_report_that_was_written_anew_does_not_make_another_commit(tmp_path, monkeypatch):
    import report

    source, kept = tmp_path / "benchmarks" / "report.py", tmp_path / "benchmarks" / "results" / "report.md"
    kept.parent.mkdir(parents=True)
    for path in (source, kept):
        path.write_text("before")
    who = ["-c", "user.name=someone", "-c", "user.email=some@where"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "begin"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(report, "__file__", str(source))
    commit = report.git_commit()
    assert len(commit) == 40
    kept.write_text("after")
    assert report.git_commit() == commit
    source.write_text("after")
    assert report.git_commit() == commit + "+"


def test_no_student_is_taught_by_a_teacher_that_came_out_otherwise(tmp_path, capsys, monkeypatch):
    plan = training_plan.Plan(results=tmp_path / "results")
    (student,) = plan.stage("few")[3:4]
    teacher = plan.teacher(student)
    runner = compare.Runner(plan, tmp_path, tmp_path / "local", "commit")
    for run in (teacher, student):
        runner.folder(run).mkdir(parents=True)
    weights = {"layer": torch.arange(3.0)}
    torch.save({"model": weights}, runner.folder(teacher) / "last.pt")
    trained = []
    monkeypatch.setattr(plan, "settings", lambda run: {})
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: trained.append(1) or SimpleNamespace(returncode=0))
    for file_has, expected in ((weights, True), ({"layer": torch.ones(3)}, False)):
        compare.write(plan.file(teacher), {"weights": compare.digest(file_has)})
        assert runner.train(student, 0, runner.folder(student)) == expected
    assert len(trained) == 1
    assert "its teacher, few/ce_mix/0, came out otherwise here" in capsys.readouterr().out
    assert student in runner.failed
    assert runner.train(student, 0, runner.folder(student), any_teacher=True)


def test_a_run_belongs_to_one_process_and_to_nobody_when_that_is_dead(tmp_path):
    hold = "import sys, time, pathlib, compare_training\n"
    hold += "with compare_training.lock(pathlib.Path(sys.argv[1])) as held:\n"
    hold += "    print(held is not None, flush=True)\n    time.sleep(100)"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SCRIPT.parent)])},
    )
    assert process.stdout.readline() == b"True\n"
    with compare.lock(tmp_path) as held:
        assert held is None
    process.kill()
    process.communicate()
    with compare.lock(tmp_path) as held:
        assert held is not None


def test_a_training_keeps_the_lock_of_a_command_that_died(tmp_path):
    with compare.lock(tmp_path) as held:
        process = subprocess.Popen(["sleep", "100"], pass_fds=[held])
    with compare.lock(tmp_path) as held:
        assert held is None
    process.kill()
    process.wait()
    with compare.lock(tmp_path) as held:
        assert held is not None


@pytest.mark.exhaustive
def test_a_run_that_fails_does_not_stop_the_others(data, tmp_path):
    plan = json.loads(tiny_plan(tmp_path).read_text())
    few = plan["stages"]["few"] | {"variants": [{"method": "ce_mix", "lr": -1}, {"method": "kd"}, {"method": "mix"}]}
    del few["settings_from"]
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"stages": {"few": few}}))
    done = subprocess.run(
        command(data, tmp_path), capture_output=True, text=True, encoding="utf-8", env=environment(), timeout=200
    )
    assert done.returncode == 1
    assert "few/ce_mix,lr=-1/0: failed with code 2" in done.stdout
    assert (tmp_path / "results" / "few" / "mix" / "0.json").exists()
    assert "missing: few/kd/0" in done.stdout


# ------------------------------------------------------------------ the committed plan
def test_the_plan_is_what_was_registered():
    plan = training_plan.Plan()
    counts = {stage: len(plan.stage(stage)) for stage in plan.content["stages"]}
    assert counts == {"choose": 15, "scarce": 25, "few": 25, "ablation": 25, "sweep": 20, "more": 25}
    assert [run.name for run in plan.runs()[15:20]] == [f"scarce/{method}/0" for method in VARIANTS]
    names = [run.name for run in plan.runs()]
    assert len(set(names)) == len(names)
    for method in VARIANTS:  # the same effort for each
        assert [dict(run.options) for run in plan.stage("choose") if run.method == method] == [
            {"lr": lr} for lr in (0.002, 0.001, 0.004)
        ]
    for stage in ("choose", "sweep"):
        assert plan.content["stages"][stage]["options"]["validation"] > 0


def test_the_trainer_knows_every_option_of_the_plan():
    import train_cifar

    plan = training_plan.Plan(results=Path("nowhere"))
    for run in plan.runs():
        arguments = compare.arguments_of(plan.settings(run))
        if plan.teacher(run) is not None:
            arguments += ["--teacher", "some.pt"]
        options = vars(train_cifar.parse_options(arguments))
        for name, value in plan.settings(run).items():
            assert str(options[name]) == str(value) or options[name] == value, (run.name, name)
