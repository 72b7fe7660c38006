"""The benchmark runs, writes what it says, copes with absent packages, and its instruments measure what they claim."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "bench_loss.py"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; the number of threads that it sets is put back."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    threads = torch.get_num_threads()
    yield importlib.import_module("bench_loss")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[str, Path]:
    """What the smoke run printed, and the folder that it wrote to."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(SCRIPT), "--smoke", "--device", "cpu", "--out", str(folder)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_the_smoke_run_writes_a_complete_report(smoke):
    report = json.loads((smoke[1] / "bench_loss.json").read_text())
    assert report.keys() >= {"date", "machine", "versions", "commit", "arguments", "absent", "results", "figures"}
    assert report["machine"].keys() >= {"cpu", "cores", "threads", "memory_gb", "gpu", "float32_matmul_precision"}
    assert report["versions"].keys() >= {"torch", "numpy", "genscl-loss", "pytorch-metric-learning", "python"}
    assert {row["method"] for row in report["results"]} >= {"auto", "tiled", "dense", "plain", "lse", "mm"}
    for row in report["results"]:
        assert row["status"] == "ok", row
        assert row["turns"] == 2
        assert 0 < row["forward_ms"][1] < row["total_ms"][1]
        assert row["total_ms"] == sorted(row["total_ms"])
        if row["kind"] != "yardstick":
            assert row["extra_bytes"] >= 4 * row["n"] * row["d"]  # the gradient, at least
            assert row["loss_error"] < 1e-6
            assert row["gradient_error"] < 1e-5


def test_the_report_holds_no_path_of_this_machine(smoke):
    text = (smoke[1] / "bench_loss.json").read_text()
    assert str(ROOT) not in text
    assert str(smoke[1]) not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"


def test_the_table_shows_every_method_of_every_case(smoke):
    printed = smoke[0]
    for text in ("N=64  D=32  C=10  soft", "N=600  D=32  C=10  hard", "extra MB", "plain dense", "genscl auto"):
        assert text in printed


def test_a_plot_is_drawn_when_matplotlib_is_there(smoke):
    pytest.importorskip("matplotlib")
    assert (smoke[1] / "bench_loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_memory_that_a_method_declares_is_what_it_needs(smoke, bench):
    methods = bench.all_methods()
    rows = [row for row in json.loads((smoke[1] / "bench_loss.json").read_text())["results"] if row["n"] == 600]
    checked = set()
    for row in rows:
        if matrices := methods[row["method"]].matrices:
            assert row["extra_bytes"] == pytest.approx(4 * matrices * 600**2, rel=0.3), row
            checked.add(row["method"])
    assert checked >= {"dense", "plain"}


def test_absent_packages_are_named_and_done_without(bench, monkeypatch, tmp_path, capsys):
    for name in ("pytorch_metric_learning", "tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    case = ["--n", "40", "--labels", "hard", "--device", "cpu", "--threads", "1", "--repeats", "1"]
    assert bench.main([*case, "--methods", "auto", "plain", "pml", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "bench_loss.json").read_text())
    assert report["absent"].keys() == {"pytorch-metric-learning", "tqdm", "matplotlib"}
    assert all(f"absent: {name}" in printed for name in report["absent"])
    assert [row["method"] for row in report["results"]] == ["auto", "plain"]
    assert not list(tmp_path.glob("*.png"))


def test_what_does_not_fit_in_memory_is_skipped_and_says_so(bench, monkeypatch):
    monkeypatch.setattr(bench, "available_bytes", lambda device: 10**5)
    results = bench.measure_case(
        bench.make_problem(bench.Case(300), CPU),
        [bench.all_methods()[key] for key in ("plain", "tiled")],
        turns=1,
        seconds=1,
        progress=bench.Progress(3),
    )
    assert results[0].status.startswith("skipped (needs 0.0 GB")
    assert results[0].median_ms is None
    assert results[1].median_ms is not None
    assert "skipped" in bench.table(bench.Case(300), results)


def test_a_method_that_fails_does_not_stop_the_others(bench):
    def fail(features, labels):
        raise RuntimeError("cannot open /some/where/file.cpp\nmore")

    broken = bench.Method("broken", "broken", "peer", bench.run_loss(fail))
    working = bench.all_methods()["auto"]
    problem = bench.make_problem(bench.Case(32), CPU)
    results = bench.measure_case(problem, [broken, working], turns=1, seconds=1, progress=bench.Progress(4))
    assert results[0].status == "failed (RuntimeError: cannot open <path>)"
    assert results[1].status == "ok"


def test_the_memory_meter_finds_the_exact_peak(bench):
    leaf = torch.ones(100, 100, requires_grad=True)

    def forward() -> torch.Tensor:
        first = leaf.detach() @ leaf.detach()  # 40,000 bytes each
        second = first.exp()
        del first
        return second + second  # the peak: these two

    _, extra = bench.run_for_memory(bench.Run(leaf, forward, lambda output: None), CPU)
    assert extra == 80_000


def test_the_float64_reference_is_the_plain_equation(bench):
    for labels in ("soft", "hard"):
        problem = bench.make_problem(bench.Case(70, d=8, c=90, labels=labels, dtype="float64"), CPU)
        reference = bench.float64_reference(problem)
        loss = bench.plain_dense(problem.features, problem.labels)
        loss.backward()
        assert reference.loss == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(reference.gradient, problem.features.grad, rtol=1e-9, atol=1e-14)
        assert (reference.nonempty == 1) == (labels == "soft")


def test_the_yardstick_performs_the_products_of_the_upper_triangle(bench, monkeypatch):
    monkeypatch.setattr(bench, "TILE", 16)
    run = bench.run_mm(bench.make_problem(bench.Case(40, d=8), CPU))
    flops = 0
    mm = torch.mm

    def counting_mm(a, b, *, out):
        nonlocal flops
        flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counting_mm)
    output = run.forward()
    half = (16 * 16 * 2 + 8 * 8) + (16 * 16 + 16 * 8 * 2)  # entries of the tiles on and above the diagonal
    assert flops == 2 * 8 * half
    run.backward(output)
    assert flops == 2 * 8 * (half + half + 40 * 40)


def test_figures_are_ratios_of_medians_with_a_verdict(bench):
    def result(method, milliseconds):
        return bench.Result(method, method, "ours", total_ms=[0.0, milliseconds, 99.0], extra_bytes=10**6)

    case = bench.Case(8192)
    measured = [(case, [result("auto", 10.0), result("plain", 80.0), result("compiled", 30.0)])]
    figures = {(figure.value, figure.met) for figure in bench.make_figures(measured)}
    assert figures == {(8.0, False), (8.0, True), (3.0, True)}
    assert "goal: at least 9; missed" in bench.summary(bench.make_figures(measured))
    assert bench.make_figures([(bench.Case(8192, labels="hard"), measured[0][1])]) == []


def test_the_plot_command_draws_next_to_its_input(bench, smoke, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    copy = tmp_path / "again.json"
    copy.write_text((smoke[1] / "bench_loss.json").read_text())
    monkeypatch.setattr(sys, "argv", ["plot.py", str(copy)])
    importlib.import_module("plot").main()
    assert (tmp_path / "again.png").stat().st_size > 10_000
