"""The example with a queue runs on one process and on two, and a run that was interrupted goes on as if it was not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genscl_loss import FeatureQueue

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "momentum_queue.py"
# Any free port, and nothing left behind on it.
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
    "--nproc-per-node",
]
WITHOUT_THREADS = str(ROOT / "tests" / "without_threads.py")
STATE = {"model", "momentum_model", "queue", "optimizer", "losses"}


def run(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    launcher = [] if processes == 1 else [*TORCHRUN, str(processes), WITHOUT_THREADS]
    command = [sys.executable, *launcher, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=60)


def run_to(checkpoint: Path, *arguments: str, processes: int = 1) -> tuple[str, dict]:
    """What it printed, and what it saved."""
    done = run("--smoke", "--batch", "50", "--checkpoint", str(checkpoint), *arguments, processes=processes)
    assert done.returncode == 0, done.stderr
    assert not list(checkpoint.parent.glob("*.tmp"))
    return done.stdout, torch.load(checkpoint, weights_only=True)


def queue_of(state: dict) -> FeatureQueue:
    """The queue of a checkpoint of the smoke run."""
    queue = FeatureQueue(100, 64, 10)
    queue.load_state_dict(state["queue"])
    return queue


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=[needs_gloo, pytest.mark.exhaustive])])
def finished(request, tmp_path_factory) -> tuple[int, str, dict]:
    """The smoke run on one process and on two."""
    return request.param, *run_to(tmp_path_factory.mktemp("run") / "run.pt", processes=request.param)


def test_it_prints_losses_and_accuracies(finished):
    processes, printed, _ = finished
    assert f"Processes: {processes}. Images: 50 labelled for training, 800 for the test." in printed
    keys = 50 // processes + 100  # this process's share of the batch, and the whole queue
    line = re.search(rf"Loss after 60 steps, {keys} keys: (\d\.\d+) \((\d\.\d+) if collapsed\)", printed)
    loss, collapsed = map(float, line.groups())
    assert collapsed == pytest.approx(torch.tensor(float(keys)).log().item(), abs=1e-3)
    assert 0.8 * collapsed < loss < collapsed  # 60 steps do not go far
    rows = dict(re.findall(r"^(untrained|trained) +(\d.*)$", printed, re.MULTILINE))
    for accuracies in rows.values():
        assert all(30 < float(accuracy) <= 100 for accuracy in accuracies.split())  # chance is 10
    assert rows["trained"] != rows["untrained"]


def test_the_queue_holds_the_last_keys_of_all_processes(finished):
    _, _, state = finished
    assert state.keys() == STATE
    assert len(state["losses"]) == 60
    queue = queue_of(state)
    assert len(queue) == 100
    # Two steps, and in each step all images once: mixing leaves the sum of their labels as it is.
    assert queue.labels.sum(0).tolist() == pytest.approx([10.0] * 10, abs=1e-3)
    assert queue.labels.sum(1).tolist() == pytest.approx([1.0] * 100, abs=1e-5)
    assert ((queue.labels > 0).sum(1) == 2).any()  # mixed
    assert queue.features.unique(dim=0).shape == (100, 64)  # no process's rows twice


def test_the_momentum_model_follows_slowly(finished):
    state = finished[2]
    fast, slow = state["model"]["1.0.weight"], state["momentum_model"]["1.0.weight"]
    assert 0 < (fast - slow).abs().max() < 0.1
    assert state["momentum_model"].keys() == state["model"].keys()


@pytest.mark.exhaustive
def test_an_interrupted_run_goes_on_as_if_it_was_not(finished, tmp_path):
    processes, printed, expected = finished
    # An odd number of steps of 50 rows: the queue, of 100, is not at its start.
    _, halfway = run_to(tmp_path / "run.pt", "--stop-at", "13", processes=processes)
    assert halfway["losses"] == expected["losses"][:13]
    name = "1.0.weight"
    assert not torch.equal(halfway["momentum_model"][name], expected["momentum_model"][name])
    again, state = run_to(tmp_path / "run.pt", processes=processes)
    assert state["losses"] == expected["losses"]
    assert again == printed
    for part in ("model", "momentum_model"):
        assert all(torch.equal(state[part][name], value) for name, value in expected[part].items())
    assert torch.equal(state["queue"]["_extra_state"], expected["queue"]["_extra_state"])


@pytest.mark.exhaustive
def test_wrong_numbers_are_refused():
    done = run("--batch", "51")
    assert done.returncode == 2
    assert "--batch no more than all labelled images" in done.stderr
