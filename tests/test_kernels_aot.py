"""What the compiler makes of the Triton kernels, for GPUs that need not be there: see `benchmarks/kernel_report.py`.

Compiled here are each line of the tile tables in the variant that most calls take, a self-contrast with a known
temperature, but lines that differ in the length of a loop only once; on sm_90 the other variants of 128 features; and
each kernel of the label half for each GPU, also with rows that begin anywhere. By `make test` only one line of sm_90.
`python benchmarks/kernel_report.py --all`, then with `--labels hard soft both`, compiles everything, and ends with 1 at
any fault.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from genscl_loss._backends import plans

PROBLEMS = ("self", "rectangular", "first")
REPORT = Path(__file__).resolve().parents[1] / "benchmarks" / "kernel_report.py"

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("Triton's compiler for NVIDIA GPUs needs Linux on x86-64", allow_module_level=True)
TRITON = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
if TRITON < (3, 5):
    pytest.skip("the report needs Triton 3.5 or newer", allow_module_level=True)


def report(folder: Path, *options: str) -> list[dict]:
    """Lines of the report, made by a process of its own: here Triton may be in its interpreter's mode."""
    file = folder / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPORT), *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert file.exists(), done.stderr
    rows = json.loads(file.read_text())
    assert done.returncode == any(row["faults"] for row in rows), done.stderr
    assert "Warning" not in done.stderr, done.stderr  # of Triton, about how it is called
    return rows


@pytest.fixture(scope="session", params=["one line", pytest.param("all", marks=pytest.mark.exhaustive)])
def rows(request, tmp_path_factory) -> list[dict]:
    folder, line = tmp_path_factory.mktemp("kernels"), ("--arch", "90", "--widths", "128")
    if request.param == "one line":
        return report(folder, *line, "--terms", "1")
    line += ("--problems", *PROBLEMS)
    # "check" is the two others behind a branch, the same with one term of fp16 or two.
    checked = report(folder, *line, "--terms", "1", "--ranges", "check")
    return report(folder, "--kinds") + report(folder, *line, "--ranges", "fixed", "online") + checked


def later(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def name(row: dict) -> str:
    return f"sm_{row['arch']} {row['kernel']} {row['case']}, {row['width']} features, {row['terms']} terms"


def line_of(row: dict) -> tuple[str, int, int, int]:
    return row["kernel"], row["arch"], row["width"], row["terms"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("rows", ["all"], indirect=True)
def test_every_line_of_the_tables_is_compiled(rows):
    compiled = {(row["kernel"], row["arch"], width, row["terms"]) for row in rows for width in row["widths"]}
    tables = {"row_lse": plans._FORWARD, "row_lse_grad": plans._BACKWARD, "softmax_weights": plans._WEIGHTS}
    assert compiled == {
        (kernel, arch, *line) for kernel, table in tables.items() for arch, lines in table.items() for line in lines
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("rows", ["all"], indirect=True)
def test_every_variant_is_compiled(rows):
    cases = {row["case"] for row in rows if (row["kernel"], row["arch"], row["width"]) == ("row_lse_grad", 90, 128)}
    for words in (("both", "self"), ("rows",), ("cols",), ("rows", "self"), ("cols", "self")):
        for exponents in ("fixed", "online", "check+", "check-"):
            assert " ".join((exponents, *words)) in cases, cases


# Lines of the tables (kernel, GPU, features, terms) of which Triton 3.9 and the assembler in it spill a few registers;
# of the shapes that were tried none is better by the model of the report.
SPILLED = {("row_lse_grad", 90, 512, 2), ("row_lse_grad", 100, 512, 1)} if TRITON >= (3, 9) else set()


def test_no_kernel_spills_or_exceeds_a_multiprocessor(rows):
    faults = {name(row): row["faults"] for row in rows if row["faults"] and line_of(row) not in SPILLED}
    assert not faults
    for row in (row for row in rows if line_of(row) in SPILLED):
        assert row["spilled"] <= 128
        assert all("spilled" in fault for fault in row["faults"])


QUICK = ("--arch", "90", "--widths", "128", "--labels", "soft", "--problems", "self")
QUICK += ("--kernel", "label_sums", "align_grad")
EVERY = ("--widths", "128", "--labels", "hard", "soft", "--problems", "self", "ragged")  # on each chip
MORE = ("--arch", "90", "--widths", "128", "--classes", "128", "--labels", "both", "hard", "--problems", "first")


@pytest.fixture(scope="session", params=["some", pytest.param("all", marks=pytest.mark.exhaustive)])
def label_rows(request, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("labels")
    return report(folder, *QUICK) if request.param == "some" else report(folder, *EVERY) + report(folder, *MORE)


def test_no_kernel_of_the_label_half_spills_or_exceeds_a_multiprocessor(label_rows):
    """Which also says that products of float64 are taken by tensor cores, where there are some for it."""
    assert not {f"{row['kernel']} {row['case']} sm_{row['arch']}": row["faults"] for row in label_rows if row["faults"]}


@pytest.mark.exhaustive
@pytest.mark.parametrize("label_rows", ["all"], indirect=True)
def test_every_kernel_of_the_label_half_is_compiled_for_each_chip(label_rows):
    soft = {"inverse_lengths", "label_sums", "align", "align_grad"}
    hard = {"first_of_class", "class_sums", "align_classes", "align_classes_grad"}
    for arch in plans._FORWARD:
        in_blocks = {"sums_of_others"} if arch == 89 else set()
        compiled = {row["kernel"] for row in label_rows if row["arch"] == arch}
        assert compiled == soft | hard | in_blocks | {"losses", "losses_grad"}


def test_tensor_cores_take_float64_where_triton_knows_how(label_rows):
    products = {"label_sums", "align", "align_grad"}
    counts = {(row["kernel"], row["arch"]): row["float64_products"] for row in label_rows if row["kernel"] in products}
    assert counts
    for (kernel, arch), count in counts.items():
        assert (count > 0) == (arch in (80, 90) or (arch == 100 and TRITON >= (3, 9))), (kernel, arch)


@pytest.mark.parametrize(("kernel", "most"), [("row_lse", 6.5), ("row_lse_grad", 10.0)])
def test_instructions_of_the_main_loop(rows, kernel, most):
    """All machine instructions of a thread, predicated ones too, over the entries of its tile; one term, sm_90."""
    counts = {
        name(row): row["per_pair"]
        for row in rows
        if (row["kernel"], row["arch"], row["width"], row["terms"]) == (kernel, 90, 128, 1) and "fixed" in row["case"]
    }
    assert counts
    assert max(counts.values()) <= most, counts


@pytest.mark.parametrize(
    ("arch", "width", "terms", "kernel", "plan", "faults"),
    [
        (90, 128, 1, "row_lse_grad", "128 128 64 128 4 2 1", ["bytes spilled", "serialized matrix products"]),
        later(90, 128, 1, "row_lse", "256 256 64 128 8 3 1", ["KB of shared memory"]),
        later(90, 128, 1, "row_lse", "128 128 64 128 8 2 3", ["2 programs fit, 3 should"]),
        later(100, 256, 2, "row_lse_grad", "128 64 32 256 8 2 1", ["compiled into a trap", "columns of tensor memory"]),
    ],
)
def test_a_bad_line_is_found(tmp_path, arch, width, terms, kernel, plan, faults):
    if arch == 100 and TRITON >= (3, 9):
        pytest.skip("this Triton needs less tensor memory")
    line = ["--arch", str(arch), "--widths", str(width), "--terms", str(terms), "--kernel", kernel, "--plan", plan]
    (row,) = report(tmp_path, *line)
    for fault in faults:
        assert any(fault in found for found in row["faults"]), row
