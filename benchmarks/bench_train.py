"""The four-way comparison of the GenSCL paper with `examples/train_cifar.py`: accuracy, and what the loss costs.

    python benchmarks/bench_train.py --data PATH                                  # tens of minutes on two CPU cores
    python benchmarks/bench_train.py --arch resnet18 --per-class 0 --epochs 100 --batch-size 1024 --amp bf16 --compile
    python benchmarks/bench_train.py --data PATH --smoke                          # seconds: does it run at all?

Cross-entropy, SupCon, GenSCL with mixup-cutmix, and that with a teacher, which is the cross-entropy model with
mixup-cutmix of the same seed and a fifth row. All have the same network, images, augmentation, number of steps and two
views of each image. Options that are not named here go on to the trainer. A comparison that was interrupted goes on
where it was: runs stay in the folder `runs` beside the report.

Then the rate of training steps is measured beside that of the bare network on random tensors, in turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
TRAINER = EXAMPLES / "train_cifar.py"

import torch  # noqa: E402
import train_cifar as trainer  # noqa: E402
from cifar_data import Subset, load  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from report import describe_machine, describe_versions, git_commit  # noqa: E402
from torch.nn import functional as F  # noqa: E402

# A key, a title and the options of each method
METHODS = (
    ("ce", "cross-entropy", ["--method", "ce"]),
    ("supcon", "SupCon", ["--method", "supcon"]),
    ("mix", "GenSCL, mixup-cutmix", ["--method", "genscl", "--mix", "mixup_cutmix"]),
    ("kd", "GenSCL, mixup-cutmix + KD", ["--method", "genscl", "--mix", "mixup_cutmix"]),
    ("teacher", "(the teacher: cross-entropy, mixup-cutmix)", ["--method", "ce", "--mix", "mixup_cutmix"]),
)
JUDGES = ("linear", "knn")
TURNS = 15


def main(argv: list[str] | None = None) -> int:
    options, passed_on = parse_arguments(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = ["--data", options.data, "--arch", options.arch, "--epochs", str(options.epochs)]
    settings += ["--batch-size", str(options.batch_size), "--knn-every", "0", *passed_on]
    settings += ["--per-class", str(options.per_class)] if options.per_class else []
    device = trainer.World.join(trainer.parse_options(settings).device).device
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": options.commit or git_commit(),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "settings": [Path(setting).name if setting == options.data else setting for setting in settings],
    }
    # A student waits for its teacher; longest first, so that no process is left with nothing to do.
    rounds = [["teacher", "ce", "supcon", "mix"], ["kd"]]
    for keys in rounds:
        jobs = [(key, seed) for seed in range(options.seeds) for key in keys]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda job: train(*job, settings, options.out / "runs"), jobs))
    report["runs"] = {
        key: [read(options.out / "runs" / f"{key}-{seed}") for seed in range(options.seeds)] for key, *_ in METHODS
    }
    print(f"\n{table(report)}")
    report["throughput"] = throughput(settings)
    print(f"\n{rates(report['throughput'])}")
    (options.out / "bench_train.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report, options.out / "bench_train.png")
    print(f"\n{options.out / 'bench_train.json'}\n{options.out / 'bench_train.png'}")
    return 0


def train(key: str, seed: int, settings: list[str], runs: Path) -> None:
    out = runs / f"{key}-{seed}"
    if (out / "results.json").exists():
        return
    chosen = next(extra for name, _, extra in METHODS if name == key)
    command = [sys.executable, str(TRAINER), *settings, *chosen, "--seed", str(seed), "--out", str(out), "--resume"]
    if key == "kd":
        command += ["--teacher", str(runs / f"teacher-{seed}" / "last.pt")]
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with (out / "log.txt").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise SystemExit(f"error: {key} with seed {seed} failed; see {out / 'log.txt'}")
    print(f"{key} with seed {seed}: {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)


def read(run: Path) -> dict[str, Any]:
    """What is kept of a run: accuracies, and the loss of each epoch."""
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "results": json.loads((run / "results.json").read_text()),
        "losses": [round(entry["loss"], 4) for entry in history],
        "collapsed_loss": history[-1]["collapsed_loss"],
        "seconds": round(sum(entry["seconds"] for entry in history), 1),
    }


def summary(runs: list[dict[str, Any]], judge: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds of the top-1 accuracy."""
    values = [run["results"][judge][0] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(report: dict[str, Any]) -> str:
    lines = [
        f"| Top-1 in %, mean ± sd of {len(report['runs']['ce'])} seeds | linear probe | kNN | classifier | s/run |"
    ]
    lines.append("|---|---:|---:|---:|---:|")
    for key, title, _ in METHODS:
        runs = report["runs"][key]
        judges = [*JUDGES, *(["classifier"] if "classifier" in runs[0]["results"] else [])]
        cells = [f"{mean:.2f} ± {spread:.2f}" for mean, spread in (summary(runs, judge) for judge in judges)]
        cells += [""] * (3 - len(cells))
        lines.append(f"| {title} | {' | '.join(cells)} | {statistics.mean(run['seconds'] for run in runs):.0f} |")
    return "\n".join(lines)


def throughput(settings: list[str]) -> dict[str, Any]:
    """Images per second of whole training steps, and of the network alone on random tensors; of pairs in turns."""
    options = trainer.parse_options([*settings, "--method", "genscl", "--mix", "mixup_cutmix"])
    world = trainer.World.join(options.device)
    images = load(options.data, options.data_folder, Subset(options.per_class), options.image_size).to(world.device)
    options.out = Path("not-written")
    run = trainer.start(options, images, trainer.World(1, 1, world.device))  # rank 1 writes nothing
    objective, _ = trainer.make_objective(run, images, None, options, world)
    size, shape = options.batch_size, images.train[0].shape[1:]
    network = torch.compile(run.model) if options.compile else run.model
    noise = torch.rand(2 * size, *shape, device=world.device).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        rows = torch.randint(len(images.train[1]), (size,)).to(world.device)
        update(objective(rows)[0])

    def bare() -> None:
        with trainer.autocast(options, world):
            outputs = network(noise)
        update(F.mse_loss(outputs.float(), torch.zeros_like(outputs, dtype=torch.float32)))

    def update(loss: torch.Tensor) -> None:
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()

    def seconds(call: Any) -> float:
        began = time.perf_counter()
        call()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for call in (step, bare) * 2:
        seconds(call)
    pairs = [(seconds(step), seconds(bare)) for _ in range(TURNS)]
    fractions = sorted(alone / whole for whole, alone in pairs)
    return {
        "training": 2 * size / statistics.median(whole for whole, _ in pairs),
        "bare": 2 * size / statistics.median(alone for _, alone in pairs),
        "fraction": statistics.median(fractions),
        "quartiles": [fractions[TURNS // 4], fractions[-1 - TURNS // 4]],
    }


def rates(throughput: dict[str, Any]) -> str:
    whole, alone, (low, high) = throughput["training"], throughput["bare"], throughput["quartiles"]
    what = f"{whole:.0f} images/s in training steps of GenSCL with mixup-cutmix, {alone:.0f} in the bare network"
    return f"{what}: {throughput['fraction']:.2f} (quartiles {low:.2f} to {high:.2f})"


def draw(report: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(5, 5), layout="constrained")  # legible on a phone
    axes = figure.subplots(2, 1)
    keys = [key for key, *_ in METHODS][::-1]
    for axis, judge, title in zip(axes, JUDGES, ("linear probe", "weighted kNN"), strict=True):
        for row, key in enumerate(keys):
            runs = report["runs"][key]
            mean, _ = summary(runs, judge)
            axis.plot([run["results"][judge][0] for run in runs], [row] * len(runs), "o", color="tab:blue", alpha=0.6)
            axis.plot([mean, mean], [row - 0.25, row + 0.25], color="navy", linewidth=2)
        axis.set_title(title, fontsize=11)
        names = [dict((k, t) for k, t, _ in METHODS)[key].strip("()") for key in keys]
        axis.set_yticks(range(len(keys)), names, fontsize=9)
        axis.grid(alpha=0.3)
    figure.suptitle("Test accuracy in %", fontsize=11)
    figure.savefig(path, dpi=150)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="cifar10", help="as of the trainer")
    parser.add_argument("--arch", default="small", help="as of the trainer")
    parser.add_argument("--epochs", type=int, default=20, help="of each run")
    parser.add_argument("--per-class", type=int, default=1000, help="training images of each class; 0 for all")
    parser.add_argument("--batch-size", type=int, default=256, help="images per step")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() if not torch.cuda.is_available() else 1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/train"), help="folder of the report")
    parser.add_argument("--commit", help="of the source, where it is not in a git repository")
    parser.add_argument("--smoke", action="store_true", help="1 seed of 1 epoch on few images, without meaning")
    options, passed_on = parser.parse_known_args(argv)
    if options.smoke:
        options.epochs, options.per_class, options.batch_size, options.seeds = 1, 16, 32, 1
    if min(options.epochs, options.batch_size, options.seeds, options.jobs) < 1 or options.per_class < 0:
        parser.error("--epochs, --batch-size, --seeds and --jobs must be at least 1, --per-class at least 0")
    return options, passed_on


if __name__ == "__main__":
    sys.exit(main())
