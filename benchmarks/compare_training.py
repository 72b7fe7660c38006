"""A registered comparison of training methods: do what is missing of a plan, each run once, whatever interrupts it.

    python benchmarks/compare_training.py --data PATH           # benchmarks/training/plan.json, in its order
    python benchmarks/compare_training.py --list                # what is done and what is missing
    python benchmarks/compare_training.py --data PATH --only scarce/mix    # these runs, and what they need
    python benchmarks/compare_training.py --data PATH --again few/supcon/0    # once more: the same to the last bit?

The plan says what is compared, and `benchmarks/training/REGISTRATION.md` why. Runs are those of
`examples/train_cifar.py`, one thread each, at the lowest priority, two at a time. One that was cut off goes on from its
last checkpoint; several of these commands, also at once, share the work. Of each finished run one small file is kept
under `--results`. Checkpoints stay in `--local`: without them a teacher is trained again, and compared with its file.
`benchmarks/report_training.py` makes tables and figures. A regime of your own is a stage in a copy of the plan, --plan.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # also of the runs: sums in another order would be another run

import torch
from report import describe_machine, describe_versions, git_commit
from training_plan import BENCHMARKS, PLAN, Plan, Run

ROOT = BENCHMARKS.parent
TRAINER = ROOT / "examples" / "train_cifar.py"
LOCAL_OPTIONS = {"data", "data_folder", "device", "out", "resume", "smoke", "teacher"}  # of no meaning elsewhere


def arguments_of(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


# ------------------------------------------------------------------ one run
@contextmanager
def lock(folder: Path) -> Iterator[int | None]:
    """The descriptor of the folder's lock, None if a living process has it.

    It is the kernel's: it ends with the last process that holds it, the training itself included, which inherits it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


class Runner:
    def __init__(self, plan: Plan, data: Path, local: Path, commit: str | None, only: str | None = None) -> None:
        self.plan, self.data, self.local = plan, data, local
        self.wanted = plan.with_needs(only)
        self.active: set[Run] = set()  # of this command
        self.failed: set[Run] = set()
        self.facts = {
            "commit": commit or git_commit(),
            "machine": {k: v for k, v in describe_machine(torch.device("cpu")).items() if k != "load_before"},
            "versions": describe_versions() | {name: metadata.version(name) for name in ("kornia", "pillow")},
        }

    def folder(self, run: Run) -> Path:
        return self.local / run.stage / run.variant / str(run.seed)

    def has_weights(self, run: Run) -> bool:
        return (self.folder(run) / "results.json").exists() and (self.folder(run) / "last.pt").exists()

    def possible(self) -> list[Run]:
        """What could be run now, in the order of the plan; a teacher whose weights are gone before its students."""
        found: list[Run] = []
        for run in self.wanted:
            if self.plan.is_done(run) or not all(self.plan.is_done(other) for other in self.plan.needs(run)):
                continue
            teacher = self.plan.teacher(run)
            found.append(run if teacher is None or self.has_weights(teacher) else teacher)
        return [run for run in dict.fromkeys(found) if run not in self.failed]

    def train(self, run: Run, held: int, folder: Path, any_teacher: bool = False) -> bool:
        """Whether the training came to its end, which it does with the source, and the teacher, that it should have."""
        begun_by, commit = folder / "commit", str(self.facts["commit"])
        if (folder / "last.pt").exists() and begun_by.exists() and begun_by.read_text() != commit:
            return self.fail(
                run, f"begun by commit {begun_by.read_text()}, not {commit}: take that, or delete {folder}"
            )
        begun_by.write_text(commit)
        command = [sys.executable, str(TRAINER), "--data", str(self.data), "--out", str(folder), "--resume"]
        command += arguments_of(self.plan.settings(run))
        if (teacher := self.plan.teacher(run)) is not None:
            command += ["--teacher", str(self.folder(teacher) / "last.pt")]
            known = self.plan.result(teacher)
            if known is not None and not any_teacher and known["weights"] != digest(self.weights(teacher)):
                return self.fail(run, f"its teacher, {teacher.name}, came out otherwise here than its file says")
        with (folder / "log.txt").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=log, pass_fds=[held], env=environment()).returncode
        if code:
            return self.fail(run, f"failed with code {code}, see {folder / 'log.txt'}")
        return True

    def fail(self, run: Run, why: str) -> bool:
        say(f"{run.name}: {why}")
        self.failed.add(run)
        return False

    def record(self, run: Run, folder: Path) -> dict[str, Any]:
        """What is kept of a finished run."""
        saved = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
        history, teacher = saved["history"], self.plan.teacher(run)
        config = {name: value for name, value in saved["config"].items() if name not in LOCAL_OPTIONS}
        if config["teacher_weight"] == math.inf:
            config["teacher_weight"] = "inf"  # for which JSON has no number
        return {
            "run": run.name,
            **self.facts,
            "config": config | {"data": self.data.name},
            "teacher": None if teacher is None else {"run": teacher.name, "weights": digest(self.weights(teacher))},
            "results": json.loads((folder / "results.json").read_text(encoding="utf-8")),
            "knn": [[entry["epoch"], entry["knn"]] for entry in history if "knn" in entry],
            "losses": [float(f"{entry['loss']:.6g}") for entry in history],
            "collapsed_loss": history[-1]["collapsed_loss"],
            "seconds": round(sum(entry["seconds"] for entry in history)),
            "weights": digest(saved["model"]),
        }

    def weights(self, run: Run) -> dict[str, torch.Tensor]:
        return torch.load(self.folder(run) / "last.pt", map_location="cpu", weights_only=True)["model"]

    def work(self) -> None:
        """Until nothing is left that this command could do."""
        while (todo := self.possible()) or self.active:
            if not any(self.do(run) for run in todo if run not in self.active):
                time.sleep(1)  # others are at it, or at what it needs

    def do(self, run: Run) -> bool:
        """Whether the run was this one's to do."""
        folder = self.folder(run)
        with lock(folder) as held:
            if held is None or (self.plan.is_done(run) and self.has_weights(run)):
                return False
            self.active.add(run)
            say(f"{run.name}: {'goes on' if (folder / 'last.pt').exists() else 'begins'}")
            if self.train(run, held, folder):
                self.keep(run, self.record(run, folder))
            self.active.discard(run)
        return True

    def again(self, run: Run) -> bool:
        """Train a finished run once more from its beginning, and keep what came out beside what it was."""
        if (before := self.plan.result(run)) is None:
            raise SystemExit(f"error: {run.name} is not finished")
        teacher, folder = self.plan.teacher(run), self.local / "again" / run.name
        if teacher is not None and not self.has_weights(teacher):
            self.do(teacher)
        with lock(folder) as held:
            # On another machine the teacher is another one, too: that is said below.
            if held is None or not self.train(run, held, folder, any_teacher=True):
                return False
            record = self.record(run, folder)
            (folder / "last.pt").unlink()  # the next time, too, begins at the beginning
        changed = differing(before, record)
        write(self.plan.again(run), {"same": not changed, **record})
        say(f"{run.name}: again, {verdict(changed)}")
        return not changed

    def keep(self, run: Run, record: dict[str, Any]) -> None:
        if (before := self.plan.result(run)) is not None:  # a teacher whose weights were gone
            return say(f"{run.name}: again, {verdict(differing(before, record))}")
        write(self.plan.file(run), record)
        judged = ", ".join(f"{judge} {first:.2f}" for judge, (first, _) in record["results"].items())
        say(f"{run.name}: {judged} ({record['seconds'] / 60:.1f} minutes)")


def write(file: Path, record: dict[str, Any]) -> None:
    """Under another name first, so that a file that is there is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
    unfinished.replace(file)


def digest(state: dict[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        content.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is not the same; options that only one of them has, and the name of the data's folder, do not count."""
    shared = one["config"].keys() & other["config"].keys() - {"data"}
    options = sorted(f"option {name}" for name in shared if one["config"][name] != other["config"][name])
    return options + [key for key in ("teacher", "results", "knn", "losses", "weights") if one[key] != other[key]]


def verdict(changed: list[str]) -> str:
    return f"NOT the same: {', '.join(changed)}" if changed else "the same to the last bit"


def environment() -> dict[str, str]:
    """Of the trainings: they import this checkout's package, whichever is installed."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def keep_to_avx2() -> None:
    """Here and in the trainings: with AVX-512, torch and oneDNN would add in another order than without."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in old versions
    if found.get("avx2"):
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


# ------------------------------------------------------------------ the command
def add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder or tar of images, as of the trainer")
    parser.add_argument("--plan", type=Path, default=PLAN, help="(default: benchmarks/training/plan.json)")
    parser.add_argument("--results", type=Path, help="folder of what is kept (default: benchmarks/results/NAME)")
    local = BENCHMARKS / "results" / "local" / "training"
    parser.add_argument("--local", type=Path, default=local, help="folder of checkpoints")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_places(parser)
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="runs side by side (default: %(default)s)")
    parser.add_argument("--nice", type=int, default=19, help="of the priority, 19 is the lowest (default: %(default)s)")
    parser.add_argument("--commit", help="of the source, where it is not in a git repository")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing, and end")
    parser.add_argument("--only", metavar="RUNS", help="stage, stage/variant or stage/variant/seed")
    parser.add_argument("--again", metavar="RUN", help="do a finished run once more and compare, and end")
    options = parser.parse_args(argv)
    plan = Plan(options.plan, options.results)
    if not plan.with_needs(options.only):
        parser.error(f"--only {options.only} is not in the plan; --list shows its runs")
    if options.list:
        print(plan.missing(options.only))
        return 0
    if options.data is None:
        parser.error("--data is missing: a folder or tar of images")
    keep_to_avx2()
    os.nice(options.nice)
    runner = Runner(plan, options.data.resolve(), options.local.resolve(), options.commit, options.only)
    if options.again:
        run = next((run for run in plan.runs() if run.name == options.again), None)
        if run is None:
            parser.error(f"--again {options.again} is not in the plan; --list shows its runs")
        return 0 if runner.again(run) else 1
    with ThreadPoolExecutor(options.jobs) as pool:
        for worker in [pool.submit(runner.work) for _ in range(options.jobs)]:
            worker.result()
    print(plan.missing(options.only))
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
