"""The benchmark runs, writes what it says, copes with absent packages, and its instruments measure what they claim."""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import subprocess
import sys
import types
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "bench_loss.py"
COMMITTED = sorted(ROOT.glob("benchmarks/results/*/bench_loss.json"))
CPU = torch.device("cpu")

# From the bottom to the top: each file imports only from files before it.
FILES = ["cases", "contenders", "reference", "meters", "measure", "ceilings"]
FILES += ["roofline", "figures", "report", "plot", "bench_loss", "bench_distributed"]
ALONE = {"fit_choice", "kernel_report", "report_training", "training_plan"}  # import none of them
LAST = {
    "gpu",
    "tune",
    "accuracy",
    "bench_cached",
    "bench_grid",
    "bench_sets",
    "bench_train",
    "compare_training",
    "probe_decay",
}  # imports the trainer too, or only `report`


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's files as modules, by name; the number of threads that it sets is put back."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    threads = torch.get_num_threads()
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in FILES})
    monkeypatch.setitem(modules.ceilings.SIZES, "cpu", modules.ceilings.SIZES["smoke"])
    yield modules
    torch.set_num_threads(threads)


def run_script(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(folder), *arguments]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = inherited | {"PYTHONPATH": paths} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[str, Path]:
    """What the smoke run printed, and the folder that it wrote to."""
    folder = tmp_path_factory.mktemp("bench")
    done = run_script(folder, "--smoke")
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_imports_go_down_only():
    assert {path.stem for path in SCRIPT.parent.glob("*.py")} == set(FILES) | ALONE | LAST
    places = [*enumerate(FILES), *((0, name) for name in ALONE), *((len(FILES), name) for name in LAST)]
    for position, name in places:
        tree = ast.parse((SCRIPT.parent / f"{name}.py").read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
        assert imported & set(FILES) <= set(FILES[:position]), name


# ---- A run ----


def test_the_smoke_run_writes_a_complete_report(smoke):
    report = json.loads((smoke[1] / "bench_loss.json").read_text())
    assert report.keys() >= {"date", "machine", "versions", "commit", "arguments", "absent", "results", "figures"}
    assert report.keys() >= {"ceilings", "left_out"}
    assert report["machine"].keys() >= {"cpu", "cores", "threads", "memory_gb", "gpu", "float32_matmul_precision"}
    assert report["versions"].keys() >= {"torch", "numpy", "genscl-loss", "pytorch-metric-learning", "python"}
    assert report["ceilings"].keys() == {"matmul float32", "copy", "exp2"}
    assert all(rate > 0 for rates in report["ceilings"].values() for rate in rates)
    assert {row["method"] for row in report["results"]} >= {"auto", "tiled", "dense", "plain", "lse", "mm"}
    for row in report["results"]:
        assert row["status"] == "ok", row
        assert row["turns"] == 2
        assert 0 < row["forward_ms"][1] < row["total_ms"][1]
        assert row["backward_ms"][1] > 0
        assert row["total_ms"] == sorted(row["total_ms"])
        if row["kind"] != "yardstick":
            assert row["extra_bytes"] >= 4 * row["n"] * row["d"]  # the gradient, at least
            assert row["loss_error"] < 1e-6
        if row["method"] == "lse":
            assert row["row_error"] < 1e-5
        if row["method"] != "mm":
            assert row["gradient_error"] < 1e-5
            assert row["checked_anchors"] == row["n"]


def test_the_report_holds_no_path_of_this_machine(smoke):
    text = (smoke[1] / "bench_loss.json").read_text()
    assert str(ROOT) not in text
    assert str(smoke[1]) not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"


def test_the_table_shows_every_method_of_every_case(smoke):
    printed = smoke[0]
    for text in ("N=64  D=32  C=10  soft", "N=600  D=32  C=10  hard", "extra MB", "plain dense", "genscl auto"):
        assert text in printed
    assert "graph ms" not in printed  # columns of a GPU


def test_a_plot_is_drawn_when_matplotlib_is_there(smoke):
    pytest.importorskip("matplotlib")
    assert (smoke[1] / "bench_loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_memory_that_a_method_declares_is_what_it_needs(smoke, bench):
    methods = bench.contenders.all_methods()
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
    assert bench.bench_loss.main([*case, "--methods", "auto", "plain", "pml", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "bench_loss.json").read_text())
    assert report["absent"].keys() == {"pytorch-metric-learning", "tqdm", "matplotlib"}
    assert all(f"absent: {name}" in printed for name in report["absent"])
    assert [row["method"] for row in report["results"]] == ["auto", "plain"]
    assert not list(tmp_path.glob("*.png"))


def test_when_the_time_is_spent_the_rest_is_named(bench, monkeypatch, tmp_path, capsys):
    arguments = ["--n", "16", "32", "--methods", "auto", "--device", "cpu", "--no-plot", "--out", str(tmp_path)]
    assert bench.bench_loss.main([*arguments, "--budget", "0", "--commit", "abc"]) == 0
    assert "left out, the time is spent: N=32" in capsys.readouterr().out
    report = json.loads((tmp_path / "bench_loss.json").read_text())
    assert len(report["left_out"]) == 2
    assert report["results"] == []
    assert report["commit"]


def test_a_wrong_result_of_ours_fails_the_run(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.contenders, "gen_supcon_loss", lambda features, labels, **options: features.sum())
    arguments = ["--n", "16", "--methods", "auto", "plain", "--repeats", "1", "--device", "cpu", "--no-plot"]
    assert bench.bench_loss.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "wrong (" in capsys.readouterr().out
    rows = {row["method"]: row for row in json.loads((tmp_path / "bench_loss.json").read_text())["results"]}
    assert rows["auto"]["total_ms"] == []
    assert rows["plain"]["status"] == "ok"


def test_the_eight_figures_are_refused_on_a_cpu(bench, capsys):
    with pytest.raises(SystemExit):
        bench.bench_loss.parse_arguments(["--figures", "1", "--device", "cpu"])
    assert "--figures" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_triton_is_measured_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    keys = ("triton", "triton_high", "lse_triton", "lse_triton_high")
    probe = "import sys, genscl_loss; sys.exit('triton' not in genscl_loss.available_backends())"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    if subprocess.run([sys.executable, "-c", probe], env=environment, timeout=60).returncode:
        pytest.skip('no backend "triton"')
    case = ("--smoke", "--n", "40", "--d", "20", "--c", "5", "--labels", "soft", "--repeats", "1", "--no-plot")
    done = run_script(tmp_path, *case, "--methods", *keys, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["method"]: row for row in json.loads((tmp_path / "bench_loss.json").read_text())["results"]}
    assert rows.keys() == set(keys)
    assert all(row["status"] == "ok" for row in rows.values())
    assert rows["triton"]["gradient_error"] < 5e-6 < rows["triton_high"]["gradient_error"] < 5e-3
    assert rows["lse_triton"]["row_error"] < 1e-5 < rows["lse_triton_high"]["row_error"] < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_and_graphs_are_looked_at_on_a_gpu(bench, tmp_path):
    arguments = ["--n", "256", "--methods", "auto", "tiled", "dense", "plain", "--identical", "3", "--repeats", "3"]
    assert bench.bench_loss.main([*arguments, "--no-plot", "--out", str(tmp_path)]) == 0
    for row in json.loads((tmp_path / "bench_loss.json").read_text())["results"]:
        assert row["graph_status"] == "ok", row
        assert 0 < row["graph_ms"][1] < row["total_ms"][1], row
        assert min(row["kernels"]) > 0, row
        assert row["identical"] in {True, None}, row


# ---- One case ----


def measure(bench, case, *keys, **options):
    problem = bench.cases.make_problem(case, CPU)
    methods = [bench.contenders.all_methods()[key] if isinstance(key, str) else key for key in keys]
    options = {"turns": 1, "seconds": 1, "progress": bench.report.Progress(99)} | options
    return bench.measure.measure_case(problem, methods, **options)


def test_what_does_not_fit_in_memory_is_skipped_and_says_so(bench, monkeypatch):
    monkeypatch.setattr(bench.measure, "available_bytes", lambda device: 10**5)
    results = measure(bench, bench.cases.Case(300), "plain", "tiled")
    assert results[0].status.startswith("skipped (needs 0.0 GB")
    assert results[0].median_ms is None
    assert results[1].median_ms is not None
    assert "skipped" in bench.report.table(bench.cases.Case(300), results)


def test_a_method_that_fails_does_not_stop_the_others(bench):
    def fail(features, labels, temperature):
        raise RuntimeError("cannot open /some/where/file.cpp\nmore")

    broken = bench.contenders.Method("broken", "broken", "peer", bench.contenders.run_loss(fail))
    results = measure(bench, bench.cases.Case(32), broken, "auto")
    assert results[0].status == "failed (RuntimeError: cannot open <path>)"
    assert results[1].status == "ok"


@pytest.mark.parametrize("factor", [1.5, math.nan])
def test_what_is_wrong_is_not_timed(bench, factor):
    def loss(features, labels, temperature):
        return factor * bench.contenders.plain_dense(features, labels, temperature)

    wrong = bench.contenders.Method("wrong", "wrong", "peer", bench.contenders.run_loss(loss))
    (result,) = measure(bench, bench.cases.Case(32), wrong)
    assert result.status.startswith("wrong (")
    assert result.total_ms == []


def test_large_problems_are_checked_on_a_sample_of_anchors(bench, monkeypatch):
    case = bench.cases.Case(90, d=8, c=5)
    whole = measure(bench, case, "auto", "tiled", "lse", "plain")
    monkeypatch.setitem(bench.cases.CHECK_ALL_UP_TO, "cpu", 80)
    monkeypatch.setattr(bench.cases, "SAMPLE", 16)
    some = measure(bench, case, "auto", "tiled", "lse", "plain")
    assert [result.checked_anchors for result in whole] == [90] * 4
    assert [result.checked_anchors for result in some] == [16, 16, 16, None]
    assert all(result.gradient_error < 1e-5 for result in some[:3])
    assert some[3].gradient_error is None
    assert some[3].total_ms


def test_half_precision_features_do_not_underflow(bench):
    case = bench.cases.Case(300, d=16, dtype="float16")
    for result in measure(bench, case, "auto", "plain"):
        assert result.gradient_error < 1e-3


def test_repeats_are_compared_to_the_bit(bench):
    leaf = torch.ones(4, 3, requires_grad=True)
    same = bench.contenders.Run(leaf, lambda: leaf.sum(), torch.Tensor.backward)
    noisy = bench.contenders.Run(leaf, lambda: leaf.sum() + torch.rand(()), torch.Tensor.backward)
    undefined = bench.contenders.Run(leaf, lambda: leaf.sum() * math.nan, torch.Tensor.backward)
    assert bench.meters.is_repeatable(same, 3)
    assert not bench.meters.is_repeatable(noisy, 3)
    assert not bench.meters.is_repeatable(undefined, 3)
    results = measure(bench, bench.cases.Case(32), "auto", "lse", "plain", repeats=3)
    assert [(result.repeats, result.identical) for result in results] == [(3, True), (3, True), (0, None)]
    assert "3 equal" in bench.report.table(bench.cases.Case(32), results)


# ---- The contenders ----


def test_precision_is_set_for_both_passes_and_put_back(bench):
    seen = []

    def prepare(problem):
        def note(*_):
            seen.append(torch.get_float32_matmul_precision())
            return torch.zeros(())

        return bench.contenders.Run(problem.features, note, note)

    method = bench.contenders.Method("x", "x", "peer", prepare, precision="high")
    before = torch.get_float32_matmul_precision()
    run = method.start(bench.cases.make_problem(bench.cases.Case(4), CPU))
    run.backward(run.forward())
    assert seen == ["high", "high"]
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), bench.contenders.float32_precision("medium"):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_methods_are_measured_only_where_they_apply(bench):
    case, methods = bench.cases.Case, bench.contenders.all_methods()
    triton = {method.key: method for method in bench.contenders.triton_methods()}
    assert not methods["pml"].suits(case(64), "cuda")
    assert not methods["sdpa"].suits(case(64), "cpu")
    assert not methods["compiled_tf32"].suits(case(64), "cpu")
    assert not triton["triton"].suits(case(64, dtype="float64"), "cuda")
    assert triton["triton"].suits(case(64, dtype="bfloat16"), "cuda")
    assert not triton["triton_high"].suits(case(64, dtype="bfloat16"), "cuda")
    assert methods["infcl"].suits(case(128, d=64), "cuda")
    assert not methods["infcl"].suits(case(100, d=64), "cuda")
    assert not methods["infcl"].suits(case(128, d=96), "cuda")


def test_inf_cl_is_held_against_its_own_quantity(bench, monkeypatch):
    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        assert head_dim == q.shape[1]
        logits = scale * q @ k.T
        return logits.logsumexp(1) - logits.diagonal()

    monkeypatch.setitem(sys.modules, "inf_cl", types.SimpleNamespace(cal_flash_loss=cal_flash_loss))
    (result,) = measure(bench, bench.cases.Case(64, d=16), bench.contenders.all_methods()["infcl"])
    assert result.status == "ok"
    assert result.row_error < 1e-5
    assert result.gradient_error < 1e-5
    assert result.loss_error is None


def test_memeff_is_held_against_clips_loss_of_z_with_itself(bench, monkeypatch):
    def loss(temperature, normalized_inputs, stable):
        assert normalized_inputs
        assert not stable
        target = torch.arange(64)
        cross_entropy = torch.nn.functional.cross_entropy

        def both(x, y):
            logits = x @ y.T / temperature
            return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

        return both

    monkeypatch.setitem(sys.modules, "memeff", types.SimpleNamespace(MemoryEfficientCLIPLoss=loss))
    (result,) = measure(bench, bench.cases.Case(64, d=16), bench.contenders.all_methods()["memeff"])
    assert result.status == "ok"
    assert result.loss_error < 1e-5
    assert result.gradient_error < 1e-5


def test_attention_is_that_of_z_with_itself(bench):
    problem = bench.cases.make_problem(bench.cases.Case(24, d=16), CPU)
    run = bench.contenders.run_sdpa(None)(problem)
    output = run.forward()
    z = bench.cases.unit_rows(problem)
    expected = torch.softmax(z @ z.T / bench.cases.TEMPERATURE, 1) @ z
    torch.testing.assert_close(output[0, 0].float(), expected, atol=0.02, rtol=0.02)
    run.backward(output)
    assert run.leaf.grad.shape == (24, 16)
    assert run.leaf.grad.count_nonzero() > 300


def test_the_yardstick_performs_the_products_of_the_upper_triangle(bench, monkeypatch):
    monkeypatch.setattr(bench.contenders, "TILE", 16)
    run = bench.contenders.run_mm(bench.cases.make_problem(bench.cases.Case(40, d=8), CPU))
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


# ---- The reference ----


def test_the_float64_reference_is_the_plain_equation(bench):
    for labels in ("soft", "hard"):
        case = bench.cases.Case(70, d=8, c=90, labels=labels, dtype="float64", temperature=0.2)
        problem = bench.cases.make_problem(case, CPU)
        reference = bench.reference.float64_reference(problem, "loss")
        loss = bench.contenders.plain_dense(problem.features, problem.labels, 0.2)
        loss.backward()
        assert reference.value.item() == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(reference.gradient, problem.features.grad, rtol=1e-9, atol=1e-14)
        assert (reference.nonempty == 1) == (labels == "soft")


@pytest.mark.parametrize("with_self", [False, True])
def test_the_float64_reference_of_the_operator(bench, with_self):
    problem = bench.cases.make_problem(bench.cases.Case(30, d=6), CPU)
    problem = replace(problem, sample=torch.tensor([4, 0, 17]))
    reference = bench.reference.float64_reference(problem, "lse_with_self" if with_self else "lse")
    z = bench.cases.unit_rows(problem).double().requires_grad_()
    s = z @ z.T / 0.07
    without_self = s.masked_fill(torch.eye(30, dtype=torch.bool), -torch.inf)
    rows = s.logsumexp(1) - s.diagonal() if with_self else without_self.logsumexp(1)
    rows[problem.sample].mean().backward()
    torch.testing.assert_close(reference.value, rows[problem.sample].detach())
    torch.testing.assert_close(reference.gradient, z.grad)


# ---- The instruments ----


def test_the_memory_meter_finds_the_exact_peak(bench):
    leaf = torch.ones(100, 100, requires_grad=True)

    def forward() -> torch.Tensor:
        first = leaf.detach() @ leaf.detach()  # 40,000 bytes each
        second = first.exp()
        del first
        return second + second  # the peak: these two

    _, extra = bench.meters.run_for_memory(bench.contenders.Run(leaf, forward, lambda output: None), CPU)
    assert extra == 80_000


def test_turns_are_shuffled_and_complete(bench):
    order = []
    readings = [partial(lambda k: order.append(k) or k, k) for k in range(4)]
    taken = bench.measure.take_turns(readings, 5, seconds=0)
    assert taken == [[k] * 5 for k in range(4)]
    turns = [tuple(order[4 * turn : 4 * turn + 4]) for turn in range(5)]
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns)
    assert len(set(turns)) > 1
    assert len(bench.measure.take_turns(readings, None, seconds=0)[0]) == 3


def test_calls_in_a_row_are_timed_as_one(bench):
    calls = []
    assert bench.meters.time_call(lambda: calls.append(1), CPU, 20) > 0
    assert len(calls) == 20


def test_what_a_gpu_executes_is_counted_without_annotations(bench):
    def event(kind, annotation=False):
        return SimpleNamespace(device_type=kind, is_user_annotation=annotation)

    events = [event(DeviceType.CPU), event(DeviceType.CUDA), event(DeviceType.CUDA), event(DeviceType.CUDA, True)]
    assert bench.meters.device_events(events) == 2


def test_a_graph_that_fills_in_something_else_is_not_timed(bench):
    output, gradient, expected = torch.ones(3), torch.ones(3), (torch.ones(3), torch.full((3,), 2.0))

    def replay():
        output.fill_(1)
        gradient.fill_(2.0001)

    assert bench.measure.verdict(replay, (output, gradient), expected) == "ok"
    assert "output" in bench.measure.verdict(lambda: None, (output, gradient), expected)
    assert "gradient" in bench.measure.verdict(lambda: output.fill_(1), (output, gradient), expected)


def test_what_no_graph_can_hold_says_why(bench, monkeypatch):
    def capture(run, device):
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(bench.measure, "capture", capture)
    monkeypatch.setattr(bench.measure, "count_kernels", lambda run, device: [4, 5])
    (result,) = measure(bench, bench.cases.Case(16), "auto")
    run = bench.contenders.all_methods()["auto"].start(bench.cases.make_problem(bench.cases.Case(16), CPU))
    bench.measure.look_at_launches([(run, result)], CPU, 2, 1.0)
    assert result.graph_ms == []
    printed = bench.report.table(bench.cases.Case(16), [result])
    assert "4+5" in printed
    assert "genscl auto: no CUDA graph (RuntimeError: called a synchronizing CUDA operation)" in printed


@pytest.mark.parametrize(("n", "groups", "replays"), [(64, [2], 20), (4096, [1, 1], 3)])
def test_graphs_of_large_batches_are_looked_at_one_at_a_time(bench, monkeypatch, n, groups, replays):
    seen = []
    look = lambda group, device, turns, seconds, times: seen.append((len(group), times))  # noqa: E731
    monkeypatch.setattr(bench.measure, "look_at_launches", look)
    runs = [(types.SimpleNamespace(leaf=torch.zeros(1)), None)] * 2
    bench.measure.look_at_all_launches(runs, n, CPU, 2, 1.0)
    assert seen == [(count, replays) for count in groups]


def test_graphs_are_timed_in_turns(bench, monkeypatch):
    replays = []

    def capture(run, device):
        run.leaf.grad = None
        output = run.forward()
        run.backward(output)
        output, gradient = output.detach(), run.leaf.grad
        values = output.clone(), gradient.clone()

        def replay():
            replays.append(1)
            output.copy_(values[0])
            gradient.copy_(values[1])

        return replay, output

    monkeypatch.setattr(bench.measure, "capture", capture)
    monkeypatch.setattr(bench.measure, "count_kernels", lambda run, device: [1, 1])
    (result,) = measure(bench, bench.cases.Case(16), "plain")
    run = bench.contenders.all_methods()["plain"].start(bench.cases.make_problem(bench.cases.Case(16), CPU))
    bench.measure.look_at_launches([(run, result)], CPU, 2, 1.0)
    assert result.graph_status == "ok"
    assert len(result.graph_ms) == 3
    assert len(replays) == 1 + 2 * bench.meters.REPLAYS


# ---- What only a GPU runs, with a stand-in for torch.cuda ----


class Clock:
    """Instead of a CUDA event: every recording is a millisecond after the one before."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Clock.now += 1
        self.time = Clock.now

    def elapsed_time(self, end):
        return float(end.time - self.time)


@pytest.fixture
def cuda(monkeypatch) -> tuple[torch.device, SimpleNamespace]:
    """A device that says "cuda" for tensors of the CPU, and its calls; those have the signatures of torch's."""
    calls = SimpleNamespace()
    answers = {"memory_allocated": 100, "max_memory_allocated": 350, "memory_reserved": 1000}
    answers["mem_get_info"] = (5000, 9000)
    for name in ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode", "current_stream", "stream", *answers):
        stand_in = mock.create_autospec(getattr(torch.cuda, name), return_value=answers.get(name, mock.MagicMock()))
        monkeypatch.setattr(torch.cuda, name, stand_in)
        setattr(calls, name, stand_in)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    for name in ("Stream", "CUDAGraph", "graph"):
        setattr(calls, name, mock.MagicMock())
        monkeypatch.setattr(torch.cuda, name, getattr(calls, name))
    return torch.device("cuda"), calls


def sum_of_squares(bench):
    leaf = torch.ones(3, requires_grad=True)
    return bench.contenders.Run(leaf, lambda: (leaf**2).sum(), torch.Tensor.backward)


def test_a_gpu_is_timed_by_its_events(bench, cuda):
    assert bench.meters.time_once(sum_of_squares(bench), cuda[0]) == (0.001, 0.002)
    assert bench.meters.time_call(lambda: None, cuda[0], 10) == pytest.approx(0.0001)


def test_the_memory_of_a_gpu_is_that_of_torchs_allocator(bench, cuda):
    output, extra = bench.meters.run_for_memory(sum_of_squares(bench), cuda[0])
    assert (output.item(), extra) == (3, 250)
    assert cuda[1].reset_peak_memory_stats.called
    assert bench.meters.available_bytes(cuda[0]) == 5900


@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
def test_the_kernels_of_both_passes_are_counted_apart(bench, cuda, monkeypatch):
    run, counts = sum_of_squares(bench), iter([9, 4, 5])
    monkeypatch.setattr(bench.meters, "device_events", lambda events: next(counts))
    assert bench.meters.count_kernels(run, cuda[0]) == [4, 5]
    assert run.leaf.grad.tolist() == [2, 2, 2]


def test_a_graph_is_captured_on_the_stream_that_was_warmed_up(bench, cuda):
    run = sum_of_squares(bench)
    replay, output = bench.meters.capture(run, cuda[0])
    side, graph = cuda[1].Stream.return_value, cuda[1].CUDAGraph.return_value
    assert [call.args for call in cuda[1].set_sync_debug_mode.call_args_list] == [("error",), ("default",)]
    assert {call.args for call in cuda[1].stream.call_args_list} == {(side,)}
    assert cuda[1].graph.call_args == mock.call(graph, stream=side)
    assert replay is graph.replay
    assert (output.item(), run.leaf.grad.tolist()) == (3, [2, 2, 2])


def test_what_waits_for_the_gpu_is_not_captured(bench, cuda):
    def wait():
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        bench.meters.capture(sum_of_squares(bench)._replace(forward=wait), cuda[0])
    assert cuda[1].set_sync_debug_mode.call_args == mock.call("default")
    assert not cuda[1].graph.called


def test_the_ceilings_of_a_gpu_are_measured_in_four_formats(bench, cuda, monkeypatch):
    seen = []
    torch_mm = torch.mm

    def mm(a, b, *, out):
        seen.append((a.dtype, torch.get_float32_matmul_precision()))
        return torch_mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(bench.ceilings, "READINGS", 2)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device: randn(*size))
    rates = bench.ceilings.measure_ceilings(cuda[0], 16, 64)
    names = {"matmul bfloat16", "matmul float16", "matmul tf32", "matmul float32"}
    assert rates.keys() == names | {"copy"}
    assert rates["matmul tf32"] == pytest.approx(2 * 16**3 / 0.001)
    assert rates["copy"] == pytest.approx(2 * 64 * 4 / 0.001)
    single = [precision for dtype, precision in seen if dtype == torch.float32]
    assert single == ["high"] * 5 + ["highest"] * 5


# ---- The figures ----


def row_of(bench, case, method, milliseconds=1.0, **rest):
    times = {"forward_ms": [0.0, milliseconds / 4, 99.0], "backward_ms": [0.0, milliseconds * 3 / 4, 99.0]}
    times["total_ms"] = [0.0, milliseconds, 99.0]
    return asdict(case) | asdict(bench.measure.Result(method, method, "ours", **times)) | rest


def cpu_report(rows):
    return {"machine": {"device": "cpu", "gpu": None, "cpu": "a CPU"}, "date": "2026-01-01", "results": rows}


def test_figures_are_ratios_of_medians_with_a_verdict(bench):
    case = bench.cases.Case(8192)
    times = {"auto": 10.0, "plain": 80.0, "compiled": 30.0}
    rows = [row_of(bench, case, method, milliseconds) for method, milliseconds in times.items()]
    figures = bench.figures.make_figures(cpu_report(rows))
    assert {(figure.value, figure.met) for figure in figures} == {(8.0, False), (8.0, True), (3.0, True)}
    assert "goal: at least 9; missed" in bench.figures.summary(figures, "cpu")
    hard = [row | {"labels": "hard"} for row in rows]
    assert bench.figures.make_figures(cpu_report(hard)) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_a_committed_report_has_the_figures_that_its_rows_give(bench, path):
    report = json.loads(path.read_text())
    figures = [asdict(figure) | {"met": figure.met} for figure in bench.figures.make_figures(report)]
    assert [figure | {"number": None} for figure in report["figures"]] == figures


def gpu_report(bench, steps):
    """A report of these steps with invented numbers: each method takes as many ms as it has letters times N."""
    rows = []
    for step in steps:
        for key in step.keys:
            milliseconds = len(key) * step.case.n / 1000
            rest = {"extra_bytes": 10**6 * len(key), "row_error": 1e-6 * len(key), "gradient_error": 1e-7 * len(key)}
            if step.case.n <= 1024:
                rest["graph_ms"] = [0.0, milliseconds / 10, 99.0]
            rows.append(row_of(bench, step.case, key, milliseconds, repeats=step.repeats, identical=True, **rest))
    machine = {"device": "cuda", "gpu": "an invented GPU", "cpu": "a CPU"}
    ceilings = {"matmul bfloat16": [4e14, 5e14]}
    versions = {"genscl-loss": "0", "torch": "0"}
    return cpu_report(rows) | {"machine": machine, "ceilings": ceilings, "versions": versions}


def test_one_run_on_a_gpu_measures_all_eight_figures(bench):
    steps = bench.bench_loss.gpu_steps()
    known = set(bench.contenders.all_methods()) | {method.key for method in bench.contenders.triton_methods()}
    assert {key for step in steps for key in step.keys} <= known
    assert len({step.case for step in steps}) == len(steps)
    figures = bench.figures.make_figures(gpu_report(bench, steps))
    goals = [figure.number for figure in figures if figure.met is not None]
    assert sorted(goals) == [1, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 7, 7, 7, 8, 8, 8, 8, 8]
    assert "not measured" not in bench.figures.summary(figures, "cuda")
    for number in range(1, 9):
        some = [step for step in steps if number in step.figures]
        alone = bench.figures.make_figures(gpu_report(bench, some))
        assert [str(f) for f in alone if f.number == number] == [str(f) for f in figures if f.number == number]


def test_the_figures_of_a_gpu_by_hand(bench):
    figures = bench.figures.make_figures(gpu_report(bench, bench.bench_loss.gpu_steps()))
    values = {figure.text: figure.value for figure in figures}
    assert values['N=32768: "high" faster than plain dense'] == pytest.approx(5 / 11)
    assert values['N=32768: "highest" faster than plain dense'] == pytest.approx(5 / 6)
    # 2 * 65536^2 * 128 flops in 15 * 65.536 / 4 ms at 5e14 a second
    fraction = values['N=65536, D=128: row_lse "high" forward, useful flops']
    assert fraction == pytest.approx(2 * 65536**2 * 128 / (15 * 65.536 / 4 / 1e3) / 5e14)
    both = values['N=65536, D=128: row_lse "high" both, useful flops']
    assert both == pytest.approx(6 * 65536**2 * 128 / (15 * 65.536 / 1e3) / 5e14)
    thrice = values['N=65536, D=512: row_lse "highest" backward, 3 times that, as performed']
    assert thrice == pytest.approx(3 * 4 * 65536**2 * 512 / (10 * 65.536 * 3 / 4 / 1e3) / 5e14)
    assert values['N=65536: row_lse "high" over the faster attention(z, z, z), bfloat16, one head'] == 15 / 4
    assert values['N=131072: extra memory of the loss, "highest"'] == pytest.approx(0.006)
    assert values['"highest": repeats that are equal to the bit, fewest of the cases (0: some differ)'] == 100
    best = 'N=256 to 1024, as a CUDA graph: "auto" over the best of the dense ones, largest (at N=1024)'
    assert values[best] == pytest.approx(1)


def test_figures_of_a_gpu_that_were_not_measured_say_so(bench):
    report = gpu_report(bench, [step for step in bench.bench_loss.gpu_steps() if 3 in step.figures])
    printed = bench.figures.summary(bench.figures.make_figures(report), "cuda")
    assert "  1. not measured in this run" in printed
    assert "3. N=16384" in printed


def test_one_repeat_that_differs_misses_the_goal(bench):
    report = gpu_report(bench, bench.bench_loss.gpu_steps())
    next(row for row in report["results"] if row["method"] == "lse_triton" and row["repeats"])["identical"] = False
    (figure,) = [f for f in bench.figures.make_figures(report) if "equal to the bit" in f.text]
    assert (figure.value, figure.met) == (0, False)


# ---- The floors ----


def test_the_floor_of_the_kernels_by_hand(bench):
    row = row_of(bench, bench.cases.Case(32768), "triton_high")
    rates = bench.roofline.rates_of({"results": []}, "H200")
    forward, backward = (work.times(rates) for work in bench.roofline.work_of(row, "cuda"))
    assert forward["products"] == pytest.approx(0.348, abs=1e-3)  # 2 * 32768^2 * 128 / 790e12
    assert forward["exponentials"] == pytest.approx(0.299, abs=1e-3)  # 32768^2 / (132 * 16 * 1.7e9)
    assert forward["bytes"] == pytest.approx(0.00393, abs=1e-5)  # 32768 * (128 + 1) * 4 / 4.3e12
    assert backward["products"] == pytest.approx(0.696, abs=1e-3)
    split = bench.roofline.work_of(row | {"method": "triton"}, "cuda")
    assert split[1].times(rates)["products"] == pytest.approx(3 * 0.696, abs=2e-3)
    half = bench.roofline.work_of(row | {"method": "triton", "dtype": "bfloat16"}, "cuda")
    assert half[0].flops == 2 * 32768**2 * 128


def test_the_floor_of_a_matrix_by_hand(bench):
    row = row_of(bench, bench.cases.Case(16384, c=10), "plain")
    forward, backward = bench.roofline.work_of(row, "cuda")
    assert forward.flops == 2 * 16384**2 * (128 + 10)
    assert backward.flops == 4 * 16384**2 * 128
    assert forward.bytes == pytest.approx(4 * 16384**2 * 4, rel=0.01)
    assert backward.bytes == pytest.approx(5 * 16384**2 * 4, rel=0.01)
    small, _ = bench.roofline.work_of(row_of(bench, bench.cases.Case(1024), "plain"), "cuda")
    assert small.bytes < 10**6  # what may stay in a cache is not counted


def test_floors_prefer_rates_of_the_run_and_name_the_others(bench):
    row = row_of(bench, bench.cases.Case(32768), "triton_high", 2.0)
    report = cpu_report([row]) | {"machine": {"device": "cuda", "gpu": "NVIDIA H200"}}
    printed = bench.roofline.describe(report, None)
    assert "matmul float16   missing" in printed
    assert "no rate" in printed
    printed = bench.roofline.describe(report, "H200")
    assert "7.9e+14  (assumed for H200, not measured)" in printed
    assert "1.44x" in printed  # half a millisecond forward: 0.5 / 0.348
    assert "1.92x" in printed  # 2 ms in all: 2 / (0.348 + 0.696)
    printed = bench.roofline.describe(report | {"ceilings": {"matmul float16": [7e14, 8e14]}}, "H200")
    assert "8e+14  (measured in that run)" in printed


def test_the_rate_of_the_yardstick_counts_the_tiles_on_the_diagonal_in_full(bench):
    case = bench.cases.Case(1024, d=10)
    rate = bench.roofline.best_mm(cpu_report([row_of(bench, case, "mm", 1000.0)]) | {"tile": 512})
    assert rate.value == 2 * 10 * (2 * (3 * 512**2) + 1024**2)
    assert bench.roofline.best_mm(cpu_report([])) is None


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_reports_can_be_read_with_floors(bench, path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(path)])
    bench.roofline.main()
    printed = capsys.readouterr().out
    assert "A floor is not a measurement" in printed
    assert "genscl auto" in printed


# ---- The plot ----


def test_the_plot_command_draws_next_to_its_input(bench, smoke, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    copy = tmp_path / "again.json"
    copy.write_text((smoke[1] / "bench_loss.json").read_text())
    monkeypatch.setattr(sys, "argv", ["plot.py", str(copy)])
    bench.plot.main()
    assert (tmp_path / "again.png").stat().st_size > 10_000


def test_everything_that_a_gpu_measures_has_a_line(bench, tmp_path):
    pytest.importorskip("matplotlib")
    report = gpu_report(bench, bench.bench_loss.gpu_steps())
    assert {row["method"] for row in report["results"]} <= set(bench.plot.STYLES)
    bench.plot.draw(report, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
