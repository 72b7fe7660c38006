"""How much depends on the weight decay of the linear probe: that of finished runs once more, with other decays.

    python benchmarks/probe_decay.py --data PATH    # whichever runs have their checkpoints in --local

The trainer's decay, which is registered, stays the judge; this is a description, for all methods alike, that was made
after the fact. It needs the checkpoints that `compare_training.py` leaves, and goes to `probe_decay.json` beside the
runs, from which `report_training.py` makes a table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # as in the runs: the first decay has to give their accuracies

import torch
from compare_training import Runner, add_places, digest, say, write
from training_plan import BENCHMARKS, Plan, Run

sys.path.insert(0, str(BENCHMARKS.parent / "examples"))
import train_cifar as trainer  # noqa: E402
from cifar_data import Images, Subset, load  # noqa: E402
from networks import make_network  # noqa: E402

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # the first one is the trainer's


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_places(parser)
    options = parser.parse_args(argv)
    if options.data is None:
        parser.error("--data is missing: a folder or tar of images")
    plan = Plan(options.plan, options.results)
    runner = Runner(plan, options.data.resolve(), options.local.resolve(), None)
    file = plan.results / "probe_decay.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"decays": DECAYS, "runs": {}}
    for run in (run for run in plan.runs() if plan.kind(run.stage) == "comparison"):
        result = plan.result(run)
        if result is None or run.name in found["runs"] or not runner.has_weights(run):
            continue
        if digest(runner.weights(run)) != result["weights"]:
            say(f"{run.name}: left out, the weights in {runner.folder(run)} are not those of its file")
            continue
        found["runs"][run.name] = judged = probe(runner, run, result)
        say(f"{run.name}: {', '.join(f'{value:.2f}' for value in judged)}")
        write(file, found)
    if not found["runs"]:
        parser.exit(1, f"{runner.local} holds no checkpoint of a finished run of a comparison\n")
    return 0


def probe(runner: Runner, run: Run, result: dict[str, Any]) -> list[float]:
    """Top-1 accuracy for each decay."""
    config = result["config"]
    images = images_of(runner.data, config["per_class"], config["subset_seed"], config["validation"])
    if images.digest() != config["images"]:
        raise SystemExit(f"error: {runner.data} holds other images than those of {run.name}")
    model = make_network(config, len(images.classes), *images.statistics())
    model.load_state_dict(runner.weights(run))
    model = model.to(memory_format=torch.channels_last)
    as_run, options = argparse.Namespace(model=model), argparse.Namespace(amp=config["amp"])
    rows = trainer.features_of(as_run, images, options, trainer.World.join("cpu"))
    judged = [trainer.linear_probe(*rows, decay=decay)[0] for decay in DECAYS]
    if judged[0] != result["results"]["linear"][0]:
        before = result["results"]["linear"][0]
        say(f"{run.name}: {judged[0]:.2f} with the decay of the run, which had {before:.2f}: on another machine?")
    return [round(value, 2) for value in judged]


@cache
def images_of(data: Path, per_class: int, seed: int, validation: int) -> Images:
    return load(str(data), data, Subset(per_class, seed, validation))


if __name__ == "__main__":
    sys.exit(main())
