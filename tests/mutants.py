"""Change the package in small ways, one at a time, and see whether a test notices: a sample of all such mutants.

    pip install cosmic-ray==8.7.0        # makes the mutants
    python tests/mutants.py              # about an hour on two cores

A mutant is drawn in two steps, first a place and a kind of change there, then one change of that kind: otherwise the
eleven other operators that can stand for one `+`, all of them noticed at once, would make up most of the sample.
Annotations are left alone. Each mutant meets the quick tests in a copy of the project: first the fuzzer, then the rest
until one fails.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTATED = [
    "functional",
    "_batch",
    "_dense",
    "_likelihood",
    "_linear",
    "_backends/tiled",
    "_positives/alignment",
    "_positives/labels",
    "_positives/sums",
]
FILES = [f"genscl_loss/{name}.py" for name in MUTATED]
NAMES = ["errors", "backends", "positives", "gradients", "loss", "traps", "module", "memory", "parity", "accuracy"]
NAMES += ["contrast_sets", "contrast_weights", "mirrored", "triton", "distributed", "distributed_sets"]
# Triton's interpreter is slow, and no mutated file is its own: of its tests only the one of the choice of precision.
SELECTED = "not triton or different_dtypes"
STAGES = [["tests/test_fuzz.py"], [*(f"tests/test_{name}.py" for name in NAMES), "-k", SELECTED]]


def all_mutants() -> dict[tuple, list[tuple[str, str, int, int]]]:
    """(file, operator, occurrence, line) by place and kind of change."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    places: dict[tuple, list[tuple[str, str, int, int]]] = {}
    for file in FILES:
        source = (ROOT / file).read_text(encoding="utf-8")
        nodes, annotated = list(ast_nodes(get_ast(source))), annotations(source)
        for name in sorted(operator_names()):
            if get_operator(name).arguments():
                continue
            found = (p for node in nodes for p in get_operator(name)().mutation_positions(node))
            for occurrence, (start, end) in enumerate(found):
                if not any(first <= start and end <= last for first, last in annotated):
                    kind = name.split("_")[0]
                    places.setdefault((file, start, kind), []).append((file, name, occurrence, start[0]))
    return places


def annotations(source: str) -> list[tuple]:
    """Where they begin and end."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for x in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if x is not None:
                found.append(((x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset)))
    return found


def mutated(file: str, operator: str, occurrence: int) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code((ROOT / file).read_text(encoding="utf-8"), get_operator(operator)(), occurrence)


def change(file: str, text: str) -> str:
    """The changed lines."""
    old, new = (ROOT / file).read_text(encoding="utf-8").splitlines(), text.splitlines()
    lines = [line for line in difflib.ndiff(old, new) if line[0] in "-+"]
    return "  ".join(" ".join(line.split()) for line in lines)


def run_tests(copy: Path, log: Path) -> None:
    """In a process of its own, which ends with the number of the stage that failed, or 0."""
    import pytest

    os.setsid()
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
    os.environ["PYTHONPATH"] = str(copy)
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    for number, stage in enumerate(STAGES, 1):
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", "--assert=plain", *stage])
        sys.stdout.flush()
        if status:
            os._exit(number)
    os._exit(0)


class Worker:
    """A copy of the project and the mutant that is tested in it."""

    def __init__(self, folder: Path) -> None:
        self.copy, self.log = folder / "copy", folder / "log"
        leave = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "site")
        shutil.copytree(ROOT, self.copy, ignore=leave)
        self.pid = 0

    def start(self, number: int, mutant: tuple[str, str, int, int] | None) -> None:
        self.number, self.mutant, self.began = number, mutant, time.monotonic()
        for stale in (self.copy / "genscl_loss").rglob("__pycache__"):
            shutil.rmtree(stale)
        for file in FILES:
            shutil.copy(ROOT / file, self.copy / file)
        if mutant is not None:
            (self.copy / mutant[0]).write_text(mutated(*mutant[:3]), encoding="utf-8")
        self.pid = os.fork()
        if self.pid == 0:
            try:
                run_tests(self.copy, self.log)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(99)

    def ended(self, limit: float) -> str | None:
        """How, if the tests have come to an end."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() - self.began > limit:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return "out of time"
        if not pid:
            return None
        stage = os.waitstatus_to_exitcode(status)
        return "SURVIVED" if stage == 0 else f"killed in stage {stage}" if stage > 0 else f"killed by signal {-stage}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=120, help="how many mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which (default: %(default)s)")
    parser.add_argument("--only", type=int, nargs="*", help="numbers in the sample; 0 is the package as it is")
    parser.add_argument("--jobs", type=int, default=2, help="side by side (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show them, and test nothing")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "ci"}

    places, choose = all_mutants(), random.Random(arguments.seed)
    drawn = choose.sample(sorted(places), arguments.sample)
    sample = [None] + [choose.choice(places[place]) for place in drawn]
    count = sum(map(len, places.values()))
    print(f"{count} mutants of {len(places)} places and kinds; {arguments.sample} drawn", flush=True)
    waiting = list(range(len(sample))) if arguments.only is None else arguments.only
    if arguments.list:
        for number in filter(None, waiting):
            file, operator, occurrence, line = sample[number]
            print(f"{number}: {file}:{line} {operator}: {change(file, mutated(file, operator, occurrence))}")
        return

    import numpy  # noqa: F401  what takes long to import is imported once, and forked
    import pytest  # noqa: F401
    import torch  # noqa: F401

    results: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for job in range(min(arguments.jobs, len(waiting))):
            (Path(folder) / str(job)).mkdir()
            workers.append(Worker(Path(folder) / str(job)))
        while waiting or any(worker.pid for worker in workers):
            for worker in workers:
                if worker.pid and (how := worker.ended(arguments.limit)):
                    worker.pid, results[worker.number] = 0, how
                    what = "the package as it is"
                    if worker.mutant is not None:
                        file, operator, occurrence, line = worker.mutant
                        what = f"{file}:{line} {operator}: {change(file, mutated(file, operator, occurrence))}"
                    print(f"{worker.number}: {how} after {time.monotonic() - worker.began:.0f} s: {what}", flush=True)
                if not worker.pid and waiting:
                    number = waiting.pop(0)
                    worker.start(number, sample[number])
            time.sleep(0.1)
    tried = [how for number, how in results.items() if number]
    print(f"{sum(how.startswith('killed') for how in tried)} of {len(tried)} killed; 0, where it ran, must survive")


if __name__ == "__main__":
    main()
