"""All that has to run on a GPU, in three parts of less than ten minutes each: are the kernels right, and how fast?

    python benchmarks/gpu.py                # the parts that have not passed yet, one after the other; or `make gpu`
    python benchmarks/gpu.py --part 2       # one of them
    python benchmarks/gpu.py --smoke        # on a CPU, in Triton's interpreter and with tiny sizes: does it run at all?

1 correctness   the tests of the kernels, and those of the loss with its tensors on the GPU; memcheck, if it is there
2 speed         tile shapes, tried out on this GPU and the fastest kept (tune.py); then the figures of time and memory
3 the rest      the tests again with those shapes; accuracy, the largest batches and small ones

Needs torch, triton, numpy, pytest, pytest-xdist and hypothesis; with matplotlib it draws, and wheels in a folder .whl
(inf-cl, pytorch-metric-learning) join in without being installed. Nothing waits for the network. A step that fails
does not stop the others, one that has passed is not run again unless the package has changed, and one that does not
fit into the ten minutes is left to the next call. The folder --state, .gpu, has the logs; reports of the parts and of
the benchmarks go to benchmarks/results/<date>-<device>/. The exit status is 1 if a step failed or is left.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from report import describe_machine, describe_versions, git_commit

ROOT = Path(__file__).resolve().parents[1]
PART_SECONDS = 570.0
LEAST_SECONDS = 20.0  # a step that has less left is not begun
TITLES = {1: "correctness", 2: "speed", 3: "the rest"}
CONTRACT = ("loss", "gradients", "traps", "properties", "accuracy", "contrast_sets", "contrast_weights", "module")


class Step(NamedTuple):
    """A command, and what it may take."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = {}


def steps(part: int, folder: Path, results: Path, smoke: bool) -> list[Step]:
    """What a part consists of; commands write below these two folders and into plans.py."""
    python = [sys.executable]
    workers = 1 if smoke else min(12, os.cpu_count() or 1)
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += ["-n", f"{workers}", "--dist", "worksteal"] if workers > 1 else []
    bench = [*python, "benchmarks/bench_loss.py", "--out"]
    commit = ["--commit", git_commit() or (folder / "commit").read_text().strip()] if _has_commit(folder) else []
    kernels, moved = "tests/test_triton.py", {"GENSCL_TEST_DEVICE": "cpu" if smoke else "cuda"}
    if part == 1:
        contract = [f"tests/test_{name}.py" for name in (CONTRACT[:1] if smoke else CONTRACT)]
        few = ["-k", "up_to_a_positive_mass"] if smoke else []
        meters = "tests/test_bench.py::test_kernels_and_graphs_are_looked_at_on_a_gpu"
        fewer = ["tests/test_gpu.py", "-k", "bits"] if smoke else ["tests/test_gpu.py", meters, kernels]
        small = [kernels, "-k", "any_strides or parts_of_a_rectangle"]
        found = [
            Step("tests of the kernels", [*pytest, *fewer], 230),
            Step("tests of the loss on the device", [*pytest, *contract, *few], 230, moved),
        ]
        if tool := shutil.which("compute-sanitizer"):
            checked = [tool, "--tool", "memcheck", "--error-exitcode", "9", *python, "-m", "pytest", "-q", *small]
            found.append(Step("memcheck", checked, 100))
        return found
    if part == 2:
        figures = ["--figures", "1", "3", "4", "5", "6", "--seconds", "1.5"]
        figures = ["--smoke", "--no-plot", "--n", "64"] if smoke else figures
        tune = [*python, "benchmarks/tune.py", "--out", str(folder / "tune")]
        tune += ["--smoke"] if smoke else ["--apply", "--budget", "150"]
        return [
            Step("tile shapes", tune, 210),
            Step("figures of speed", [*bench, str(results), *figures, *commit, "--budget", "220"], 340),
        ]
    rest = ["--smoke", "--no-plot", "--n", "64"] if smoke else ["--figures", "7", "8", "2", "--seconds", "1"]
    again = ["tests/test_gpu.py", "-k", "bits"] if smoke else [kernels, "-k", "any_number or any_temperature or parts"]
    return [
        Step("tests with the shapes of part 2", [*pytest, *again], 150),
        Step("the other figures", [*bench, f"{results}-rest", *rest, *commit, "--budget", "200"], 300),
    ]


def _has_commit(folder: Path) -> bool:
    return git_commit() is not None or (folder / "commit").exists()


def environment(folder: Path, smoke: bool) -> dict[str, str]:
    """Of all commands: this checkout's package, and the wheels beside it, unpacked."""
    site = folder / "site"
    for wheel in sorted((ROOT / ".whl").glob("*.whl")):
        if not (site / wheel.name).exists():
            zipfile.ZipFile(wheel).extractall(site)
            (site / wheel.name).touch()
    paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    found |= {"MPLCONFIGDIR": str(folder / "matplotlib")}
    if smoke:
        return found | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found.pop("TRITON_INTERPRET", None)
    return found


def run(step: Step, log: Path, limit: float, variables: dict[str, str]) -> dict[str, Any]:
    """Run a command to its end or for so long; its output goes to a file."""
    start = time.perf_counter()
    with log.open("w") as file:
        # In a session of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=variables | step.environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(limit) == 0 else f"failed, exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"failed, not ready after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    bad = [line[:300] for line in lines if re.match(r"(FAILED|ERROR|FAULT)\b", line)]
    result = {"name": step.name, "status": status, "seconds": round(time.perf_counter() - start, 1)}
    return result | {"failures": bad[:50], "last_lines": [line[:300] for line in lines[-8:]]}


def fingerprint(smoke: bool) -> str:
    """Of all that a step's result depends on but for the tile shapes, which part 2 changes."""
    files = sorted(path for path in (ROOT / "genscl_loss").rglob("*.py") if path.name != "plans.py")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    return digest.hexdigest()[:16] + (" smoke" if smoke else "")


def run_part(part: int, folder: Path, results: Path, smoke: bool) -> list[dict[str, Any]]:
    """Run what has not passed yet, and keep what did."""
    start, state_file, mark = time.perf_counter(), folder / "state.json", fingerprint(smoke)
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    variables, done = environment(folder, smoke), []
    for step in steps(part, folder, results, smoke):
        before = state.get(step.name, {})
        left = PART_SECONDS - (time.perf_counter() - start)
        if before.get("fingerprint") == mark and before["status"] == "passed":
            result = before
        elif left < LEAST_SECONDS:
            result = {"name": step.name, "status": "left to the next call", "seconds": 0.0}
        else:
            print(f"  {step.name} ...", flush=True)
            log = folder / f"{part}-{step.name.replace(' ', '-')}.log"
            result = run(step, log, min(step.seconds, left), variables)
            result |= {"fingerprint": mark, "log": log.name}
            state[step.name] = result
            state_file.write_text(json.dumps(state, indent=1))
        print(f"  {step.name}: {result['status']}, {result['seconds']:.0f} s", flush=True)
        done.append(result)
    return done


def write_report(part: int, done: list[dict[str, Any]], results: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = {"date": _now().isoformat(timespec="seconds"), "part": part, "commit": git_commit()}
    report |= {"machine": describe_machine(device), "versions": describe_versions(), "steps": done}
    results.mkdir(parents=True, exist_ok=True)
    (results / f"gpu-{part}.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"# Part {part}, {TITLES[part]}: {report['machine']['gpu'] or report['machine']['cpu']}", ""]
    lines += ["| step | result | seconds | last line |", "|---|---|---:|---|"]
    for step in done:
        last = (step.get("last_lines") or [""])[-1].replace("|", "\\|")
        lines.append(f"| {step['name']} | {step['status']} | {step['seconds']:.0f} | {last} |")
    for step in done:
        lines += ["", *(f"- {line}" for line in step.get("failures", []))]
    (results / f"gpu-{part}.md").write_text("\n".join(lines).rstrip() + "\n")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 1 if not all of it has passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--state", type=Path, default=ROOT / ".gpu", help="logs, and what has passed (.gpu)")
    parser.add_argument("--out", type=Path, help="where reports go: benchmarks/results, of --smoke the state's folder")
    parser.add_argument("--smoke", action="store_true", default=os.environ.get("GPU_SMOKE") == "1")
    arguments = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not arguments.smoke:
        parser.error("there is no GPU; --smoke tries the command out on a CPU")
    folder = arguments.state.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if has_gpu else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    out = arguments.out or (folder / "results" if arguments.smoke else ROOT / "benchmarks" / "results")
    results = out.resolve() / f"{_now():%Y-%m-%d}-{slug}"
    done = []
    for part in arguments.part:
        print(f"Part {part}: {TITLES[part]}", flush=True)
        found = run_part(part, folder, results, arguments.smoke)
        write_report(part, found, results)
        done += found
    bad = [step for step in done if step["status"] != "passed"]
    print(f"\n{len(done) - len(bad)} of {len(done)} steps passed; reports: {results}")
    for step in bad:
        print(f"NOT PASSED {step['name']}: {step['status']}", *step.get("failures", [])[:10], sep="\n    ")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
