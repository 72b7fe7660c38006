"""`make gpu`: resuming, what it says of failures, and that all of it runs, in Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from genscl_loss import available_backends
from genscl_loss._backends import plans

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.fixture
def tune(monkeypatch):
    if "triton" not in available_backends():
        pytest.skip('needs backend "triton"')
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tune")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def two_steps(gpu, monkeypatch, tmp_path):
    """One step that counts how often it ran, and one that fails until a file is there."""
    count = f"print('ran'); open({str(tmp_path / 'count')!r}, 'a').write('x')"
    fail = f"import os, sys; print('FAILED tests/x.py'); sys.exit(not os.path.exists({str(tmp_path / 'cure')!r}))"
    made = [gpu.Step("first", python(count), 60), gpu.Step("second", python(fail), 60)]
    monkeypatch.setattr(gpu, "steps", lambda *_: made)
    return tmp_path


def test_what_has_passed_is_not_run_again_and_what_has_failed_is(gpu, two_steps, capsys):
    arguments = ["--smoke", "--part", "1", "--state", str(two_steps)]
    assert gpu.main(arguments) == 1
    assert "NOT PASSED second: failed, exit status 1\n    FAILED tests/x.py" in capsys.readouterr().out
    (two_steps / "cure").touch()
    assert gpu.main(arguments) == 0
    assert (two_steps / "count").read_text() == "x"
    (report,) = two_steps.glob("results/*/gpu-1.json")
    assert [step["status"] for step in json.loads(report.read_text())["steps"]] == ["passed", "passed"]
    assert "| second | passed |" in report.with_suffix(".md").read_text()


def test_another_package_is_another_run(gpu, two_steps, monkeypatch):
    (two_steps / "cure").touch()
    for mark in ("one", "two"):
        monkeypatch.setattr(gpu, "fingerprint", lambda smoke, mark=mark: mark)
        assert gpu.main(["--smoke", "--part", "1", "--state", str(two_steps)]) == 0
    assert (two_steps / "count").read_text() == "xx"


def test_a_step_without_end_is_ended_and_the_rest_is_left(gpu, monkeypatch, tmp_path, capsys):
    made = [gpu.Step("endless", python("import time; time.sleep(600)"), 600), gpu.Step("next", python(""), 60)]
    monkeypatch.setattr(gpu, "steps", lambda *_: made)
    monkeypatch.setattr(gpu, "PART_SECONDS", 1.0)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    assert gpu.main(["--smoke", "--part", "1", "--state", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "NOT PASSED endless: failed, not ready after 1 s" in printed
    assert "NOT PASSED next: left to the next call" in printed


def test_no_part_takes_more_than_ten_minutes(gpu, tmp_path):
    for part in gpu.TITLES:
        assert gpu.PART_SECONDS < 600
        assert sum(step.seconds for step in gpu.steps(part, tmp_path, tmp_path, False)) <= gpu.PART_SECONDS


def test_every_candidate_is_a_plan_for_a_line_of_the_tables(tune):
    for line, tried in tune.candidates(90).items():
        assert tried[0] == tune.of_the_table(line, 90)
        assert len(set(tried)) == len(tried) > 1
        assert all(plans.PAD % plan.block_m == 0 == plans.PAD % plan.block_n for plan in tried)


def row(status: str, *ms: float) -> dict:
    return {"status": status, "ms": dict(enumerate(ms)), "plan": []}


def test_the_fastest_right_line_is_kept_if_it_is_worth_it(tune):
    base = row("right", 1.0, 4.0)
    quick, wrong, slow = row("right", 0.5, 2.0), row("wrong", 0.1, 0.1), row("right", 0.99, 4.0)
    assert tune.choose([base, wrong, quick, slow]) == (quick, pytest.approx(2.0))
    assert tune.choose([base, wrong, slow]) == (None, 1.0)
    assert tune.choose([row("failed: x"), slow, quick]) == (quick, math.inf)
    assert tune.choose([row("failed: x"), wrong]) == (None, 1.0)


@pytest.mark.parametrize("line", [("row_lse", 128, 1), ("row_lse_grad", 1024, 2), ("softmax_weights", 512, 1)])
def test_the_tables_are_rewritten_in_one_place(tune, line):
    new = plans.Plan(64, 32, 16, 128, 4, 5, 6)
    before = Path(plans.__file__).read_text()
    scope: dict = {"__name__": "plans"}
    exec(compile(tune.rewritten(before, 90, line, new), "plans.py", "exec"), scope)
    for name in ("_FORWARD", "_BACKWARD", "_WEIGHTS"):
        for chip, lines in getattr(plans, name).items():
            for key, plan in lines.items():
                is_new = (name, chip, *key) == (tune.TABLES[line[0]], 90, *line[1:])
                assert tuple(scope[name][chip][key]) == tuple(new if is_new else plan)


@pytest.mark.exhaustive
def test_all_of_it_runs_without_a_gpu(tmp_path):
    if "triton" not in available_backends():
        pytest.skip('needs backend "triton"')
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--state", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in tmp_path.glob("results/*/*")}
    assert {f"gpu-{part}.{kind}" for part in (1, 2, 3) for kind in ("json", "md")} <= names
    assert "bench_loss.json" in names
