"""The CIFAR trainer: every method runs, an interrupted run loses nothing, what is wrong is said, and scores are right.

The images are drawn by `images.py`. Where the environment variable CIFAR_ARCHIVE names a folder or tar of images, the
methods run on those too.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_cifar.py"
sys.path.insert(0, str(SCRIPT.parent))
for package in ("kornia", "matplotlib", "sklearn", "PIL", "tqdm"):
    pytest.importorskip(package)
import cifar_data  # noqa: E402
import networks  # noqa: E402
import train_cifar  # noqa: E402
from images import CLASSES, draw, pack, write_images  # noqa: E402
from PIL import Image  # noqa: E402

TINY = ["--arch", "tiny", "--batch-size", "16", "--epochs", "1", "--knn-every", "1", "--amp", "off", "--device", "cpu"]
ONE_MIX = [mix for mix in train_cifar.MIXES if mix not in ("none", "mixup_cutmix")]
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
WITHOUT_THREADS = str(ROOT / "tests" / "without_threads.py")
pytestmark = [
    # Of kornia's own calls, and of torch's compiler, which kornia imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


# ------------------------------------------------------------------ data
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def archive(folder, tmp_path_factory) -> Path:
    return pack(folder, tmp_path_factory.mktemp("archive") / "images.tar.xz")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Sums in another order would be another run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _without_figures(request, monkeypatch):
    """They take half of the time of a run, and are looked at once for each method."""
    if request.function is not test_a_run_leaves_its_results:
        monkeypatch.setattr(train_cifar, "draw", lambda *_: None)


def train(data: Path, out: Path, *options: str) -> dict:
    """Run the script here, and return its checkpoint."""
    train_cifar.main([*TINY, "--data", str(data), "--out", str(out), *options])
    return torch.load(out / "last.pt", weights_only=True)


def refusal(data: Path | str, out: Path, *options: str) -> str:
    """What the script says when it ends with an error."""
    with pytest.raises(SystemExit) as error:
        train_cifar.main([*TINY, "--data", str(data), "--out", str(out), *options])
    return str(error.value)


def command(*arguments: str, processes: int = 1) -> list[str]:
    launcher = [] if processes == 1 else [*TORCHRUN, "--nproc-per-node", str(processes), WITHOUT_THREADS]
    return [sys.executable, *launcher, str(SCRIPT), *TINY, *arguments]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


# ------------------------------------------------------------------ every method runs
@pytest.mark.parametrize(
    ("method", "mix"),
    [
        ("supcon", "none"),
        *((method, mix) for method in ("ce", "genscl") for mix in ("none", "mixup_cutmix")),
        *(pytest.param(method, mix, marks=pytest.mark.exhaustive) for method in ("ce", "genscl") for mix in ONE_MIX),
    ],
)
def test_a_run_leaves_its_results(archive, tmp_path, capsys, method, mix):
    state = train(archive, tmp_path, "--method", method, "--mix", mix, "--epochs", "2")
    judges = {"linear", "knn"} | ({"classifier"} if method == "ce" else set())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == judges
    assert all(0 < top1 <= top5 <= 100 for top1, top5 in results.values())
    assert results["linear"][0] > 40  # chance is 25
    printed = capsys.readouterr()
    assert f"linear            {results['linear'][0]:>8.2f}{results['linear'][1]:>8.2f}" in printed.out
    assert "epoch 2/2: 100%" in printed.err
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == state["history"]
    assert [line["epoch"] for line in lines] == [1, 2]
    collapsed = None if method == "ce" else pytest.approx(np.log(31) / 0.7, abs=1e-4)  # base temperature 0.07
    assert all(line["collapsed_loss"] == collapsed for line in lines)
    assert ("(4.91 if collapsed)" in printed.err) == (method != "ce")
    assert all(0 < line["loss"] < 20 and line["images_per_second"] > 0 for line in lines)
    assert lines[1]["loss"] != lines[0]["loss"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["method"], config["mix"], config["train_images"], config["test_images"]) == (method, mix, 80, 24)
    for name in train_cifar.SOURCES:
        assert (tmp_path / "source" / name).read_bytes() == (SCRIPT.parent / name).read_bytes()
    for name in ("curves.png", "embeddings.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [["--augment", "randaugment"], ["--optimizer", "adamw"], ["--amp", "bf16"]])
def test_other_options_run(archive, tmp_path, options):
    state = train(archive, tmp_path, *options, "--method", "supcon")
    assert 0 < state["history"][0]["loss"] < 20


@pytest.mark.exhaustive
def test_smoke_is_a_script_to_run(archive, tmp_path):
    arguments = ["--smoke", "--data", str(archive), "--out", str(tmp_path / "run"), "--per-class", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy in % after 2 epochs" in done.stdout


@pytest.mark.skipif("CIFAR_ARCHIVE" not in os.environ, reason="CIFAR_ARCHIVE names no images")
@pytest.mark.parametrize("method", ["ce", "supcon", "genscl"])
def test_on_real_images(tmp_path, method):
    state = train(Path(os.environ["CIFAR_ARCHIVE"]), tmp_path, "--method", method, "--per-class", "30")
    assert np.isfinite(state["history"][0]["loss"])


def test_two_views_of_mixed_images_have_labels_of_their_own(archive, tmp_path, monkeypatch):
    seen = []

    class Spy(train_cifar.GenSupConLoss):
        def forward(self, features, labels, **others):
            seen.append((features, labels, others["teacher_labels"]))
            return super().forward(features, labels, **others)

    train(archive, tmp_path / "teacher", "--method", "ce")
    monkeypatch.setattr(train_cifar, "GenSupConLoss", Spy)
    train(archive, tmp_path / "run", "--mix", "mixup", "--teacher", str(tmp_path / "teacher" / "last.pt"))
    features, labels, opinions = seen[0]
    assert [view.shape for view in features] == [(16, 128)] * 2
    assert not torch.equal(*labels)
    for rows in (*labels, *opinions):
        assert rows.shape == (16, 4)
        torch.testing.assert_close(rows.sum(1), torch.ones(16))
    assert ((labels[0] > 0).sum(1) == 2).any()
    assert not torch.equal(*opinions)


class Calls:
    """The loss, which also notes what it is called with."""

    def __init__(self, monkeypatch) -> None:
        self.made, self.seen = [], []
        calls = self

        class Spy(train_cifar.GenSupConLoss):
            def __init__(self, *arguments, **options):
                calls.made.append(options)
                super().__init__(*arguments, **options)

            def forward(self, features, labels, **others):
                calls.seen.append((features, labels, others))
                return super().forward(features, labels, **others)

        monkeypatch.setattr(train_cifar, "GenSupConLoss", Spy)


def test_hard_labels_are_those_of_the_larger_share(archive, tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    train(archive, tmp_path / "soft", "--mix", "mixup", "--empty-anchors", "ignore")
    soft = calls.seen[0][1]
    train(archive, tmp_path / "hard", "--mix", "mixup", "--hard-labels")
    hard = calls.seen[5][1]
    assert [label.dtype for label in hard] == [torch.int64] * 2
    for rows, numbers in zip(soft, hard, strict=True):
        assert torch.equal(rows.argmax(1), numbers)
        assert not torch.equal(rows, nn.functional.one_hot(numbers, 4).float())
    assert [options["empty_anchors"] for options in calls.made] == ["ignore", "zero"]


@pytest.mark.parametrize(("mix", "floor"), [("none", 0.05), ("mixup", 0.05)])
def test_smoothing_leaves_a_share_to_every_class(archive, tmp_path, monkeypatch, mix, floor):
    calls = Calls(monkeypatch)
    train(archive, tmp_path, "--mix", mix, "--smoothing", "0.2")
    for rows in calls.seen[0][1]:
        assert rows.shape == (16, 4)
        torch.testing.assert_close(rows.sum(1), torch.ones(16))
        assert rows.min().item() == pytest.approx(floor)


@pytest.mark.exhaustive
def test_the_teacher_alone(archive, tmp_path, monkeypatch):
    train(archive, tmp_path / "teacher", "--method", "ce")
    options = ["--teacher", str(tmp_path / "teacher" / "last.pt"), "--mix", "mixup"]
    calls = Calls(monkeypatch)
    train(archive, tmp_path / "both", *options)
    _, labels, others = calls.seen[0]
    state = train(archive, tmp_path / "alone", *options, "--teacher-weight", "inf")
    _, alone, nothing = calls.seen[5]
    assert nothing["teacher_labels"] is None
    for expected, found, given in zip(others["teacher_labels"], alone, labels, strict=True):
        assert torch.equal(found, expected)
        assert not torch.equal(found, given)
    assert state["history"][0]["collapsed_loss"] == pytest.approx(np.log(31) / 0.7, abs=1e-4)
    one = train(archive, tmp_path / "ce", "--method", "ce", *options, "--teacher-weight", "inf")
    assert 0 < one["history"][0]["loss"] < 3


def test_a_queue_holds_the_embeddings_of_earlier_steps(archive, tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    state = train(archive, tmp_path, "--mix", "mixup", "--queue-size", "40")
    rows = [len(others["contrast_features"]) for _, _, others in calls.seen[::2]]
    assert rows == [16, 16 + 32, 56, 56, 56]
    (first, labels, other), (second, other_labels, _) = calls.seen[:2]
    assert torch.equal(other["contrast_features"], second)
    assert torch.equal(other["contrast_labels"], other_labels)
    later = calls.seen[2][2]
    assert torch.equal(later["contrast_features"][16:], torch.cat([first, second]))
    assert torch.equal(later["contrast_labels"][16:], torch.cat([labels, other_labels]))
    assert state["history"][0]["collapsed_loss"] == pytest.approx(np.log(56) / 0.7, abs=1e-4)


def test_the_width_of_the_projection(archive, tmp_path):
    state = train(archive, tmp_path, "--method", "supcon", "--projection", "24")
    assert state["model"]["head.2.weight"].shape == (24, 128)


# ------------------------------------------------------------------ interruptions
LONG = ["--method", "genscl", "--mix", "mixup_cutmix", "--epochs", "3", "--seed", "5"]


@pytest.fixture(scope="module")
def uninterrupted(archive, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        command(*LONG, "--data", str(archive), "--out", str(out)), capture_output=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_run(state: dict, expected: dict) -> None:
    timing = ("seconds", "images_per_second")
    bare = [[{k: v for k, v in entry.items() if k not in timing} for entry in s["history"]] for s in (state, expected)]
    assert bare[0] == bare[1]
    assert state["model"].keys() == expected["model"].keys()
    assert all(torch.equal(state["model"][name], value) for name, value in expected["model"].items())


@pytest.mark.exhaustive
def test_a_run_that_was_killed_within_an_epoch_goes_on_as_if_it_was_not(archive, tmp_path, uninterrupted):
    arguments = command(*LONG, "--data", str(archive), "--out", str(tmp_path / "run"))
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics, limit = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") == 1) and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert 1 <= len(killed["history"]) < 3
    assert not (tmp_path / "run" / "results.json").exists()
    # Again by its own means, and with what an interruption within a save would leave.
    (tmp_path / "run" / "last.tmp").write_bytes(b"half of a checkpoint")
    done = subprocess.run([*arguments, "--resume"], capture_output=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert b"epoch 1/3" not in done.stderr
    assert_same_run(torch.load(tmp_path / "run" / "last.pt", weights_only=True), uninterrupted)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_resume_starts_where_there_is_nothing_and_judges_what_is_finished(archive, tmp_path):
    first = train(archive, tmp_path, "--method", "supcon", "--resume")
    results = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").unlink()
    assert_same_run(train(archive, tmp_path, "--method", "supcon", "--resume"), first)
    assert (tmp_path / "results.json").read_text() == results


@pytest.mark.parametrize(
    "options",
    [
        ["--mix", "mixup"],
        pytest.param(["--mix", "cutmix", "--hard-labels"], marks=pytest.mark.exhaustive),
        pytest.param(["--method", "supcon"], marks=pytest.mark.exhaustive),
    ],
)
def test_a_queue_and_rarer_checkpoints_survive_an_interruption(archive, tmp_path, monkeypatch, options):
    """Interrupted in epoch 3, of which nothing is kept, as there is a checkpoint after every second one."""
    options = [*options, "--queue-size", "70", "--epochs", "5", "--save-every", "2"]
    expected = train(archive, tmp_path / "whole", *options)
    full = expected["queue"]["_extra_state"]
    assert 70 in full[:8]  # rows that are filled
    calls, augmentation = [], train_cifar.make_augmentation

    def interrupted(name, size):
        def augment(images):
            calls.append(None)
            if len(calls) == 2 * 5 * 2 + 3:
                raise KeyboardInterrupt
            return augmentation(name, size)(images)

        return augment

    monkeypatch.setattr(train_cifar, "make_augmentation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(archive, tmp_path / "run", *options)
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert len(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["history"]) == 2
    state = train(archive, tmp_path / "run", *options, "--resume")
    assert_same_run(state, expected)
    assert torch.equal(state["queue"]["_extra_state"], full)


def test_another_seed_is_another_run(archive, tmp_path):
    one, other = (train(archive, tmp_path / seed, "--method", "supcon", "--seed", seed) for seed in "12")
    assert one["history"][0]["loss"] != other["history"][0]["loss"]


def test_a_run_is_not_overwritten(archive, tmp_path):
    train(archive, tmp_path, "--method", "supcon")
    before = (tmp_path / "last.pt").read_bytes()
    assert "--resume" in refusal(archive, tmp_path, "--method", "supcon")
    assert "a run with lr 0.0078125, not 0.5" in refusal(
        archive, tmp_path, "--method", "supcon", "--resume", "--lr", "0.5"
    )
    assert (tmp_path / "last.pt").read_bytes() == before


def test_two_runs_that_start_in_one_folder_are_told_apart(archive, tmp_path):
    (tmp_path / "config.json").write_text("{}")  # of a run that has no checkpoint yet
    assert "holds a run already" in refusal(archive, tmp_path, "--method", "supcon")
    assert (tmp_path / "config.json").read_text() == "{}"
    train(archive, tmp_path, "--method", "supcon", "--resume")


def test_a_run_that_begins_meanwhile_is_told_apart(archive, tmp_path, monkeypatch):
    def slow_load(*arguments):
        (tmp_path / "config.json").write_text("{}")
        return cifar_data.load(*arguments)

    monkeypatch.setattr(train_cifar, "load", slow_load)
    assert "another run has just begun" in refusal(archive, tmp_path, "--method", "supcon")
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_folder_that_cannot_be_is_named(archive, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(archive, tmp_path / "file" / "run", "--method", "supcon")


def test_a_truncated_checkpoint_is_named_and_kept(archive, tmp_path):
    train(archive, tmp_path, "--method", "supcon")
    half = (tmp_path / "last.pt").read_bytes()[:5000]
    (tmp_path / "last.pt").write_bytes(half)
    message = refusal(archive, tmp_path, "--method", "supcon", "--resume")
    assert str(tmp_path / "last.pt") in message
    assert (tmp_path / "last.pt").read_bytes() == half


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(archive, tmp_path, monkeypatch):
    calls = []

    def poisoned(images, labels, num_classes, alpha):
        calls.append(None)
        images, labels = train_cifar.mixup(images, labels, num_classes, alpha)
        return images * (torch.nan if len(calls) == 13 else 1), labels  # 5 steps of 2 views: step 2 of epoch 2

    monkeypatch.setitem(train_cifar.MIXES, "mixup", poisoned)
    message = refusal(archive, tmp_path, "--mix", "mixup", "--epochs", "3")
    assert "the loss is not finite at step 2 of epoch 2" in message
    assert f"{tmp_path / 'last.pt'} holds epoch 1" in message
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert len(state["history"]) == 1
    assert all(weights.isfinite().all() for weights in state["model"].values())


def test_a_last_step_that_spoils_the_weights_does_not_reach_the_checkpoint(archive, tmp_path, monkeypatch):
    rates = iter([0.01] * 9 + [float("inf")])
    monkeypatch.setattr(train_cifar, "learning_rate", lambda *_: next(rates))
    assert "weights are not finite after epoch 2" in refusal(archive, tmp_path, "--method", "ce", "--epochs", "2")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert len(state["history"]) == 1
    assert all(weights.isfinite().all() for weights in state["model"].values())


def test_it_warns_of_a_collapsed_model(archive, tmp_path, capsys):
    options = ["--method", "supcon", "--arch", "encoders:constant_encoder", "--epochs", "3", "--warmup-epochs", "0"]
    state = train(archive, tmp_path, *options)
    assert state["history"][-1]["loss"] == pytest.approx(state["history"][-1]["collapsed_loss"], rel=1e-3)
    printed = capsys.readouterr()
    assert (printed.err + printed.out).count("warning: the loss is that of a collapsed model, 4.906") == 2
    train(archive, tmp_path / "other", "--method", "supcon", "--epochs", "3", "--lr", "0.05")
    printed = capsys.readouterr()
    assert "warning" not in printed.err + printed.out


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_only_batch_norm_takes_account_of_other_images(norm):
    network = networks.make_network({"method": "ce", "arch": "tiny", "norm": norm}, 4, [0.5] * 3, [0.2] * 3)
    images = torch.rand(6, 3, 32, 32)
    alike = torch.allclose(network.train().features(images)[:2], network.features(images[:2]), atol=1e-5)
    assert alike == (norm == "group")


# ------------------------------------------------------------------ several processes
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
@pytest.mark.parametrize("method", [pytest.param("ce", marks=pytest.mark.exhaustive), "genscl"])
def test_two_processes_have_the_losses_of_one(archive, tmp_path, method):
    # Nothing depends on who has which images, and there are no kinks, which make much of the last bit of a sum.
    options = ["--method", method, "--augment", "none", "--arch", "encoders:smooth_encoder", "--epochs", "2"]
    options += ["--data", str(archive)]
    one = train(archive, tmp_path / "one", *options)
    arguments = command(*options, "--out", str(tmp_path / "two"), processes=2)
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two" / "last.pt", weights_only=True)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["last_loss"] == pytest.approx(b["last_loss"], rel=5e-6)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5)
    assert done.stdout.count("test accuracy") == 1


# ------------------------------------------------------------------ data
def test_folders_and_tars_are_the_same_images(folder, archive):
    one, other = cifar_data.load(str(folder), Path()), cifar_data.load(str(archive), Path())
    assert one.classes == other.classes == list(CLASSES)
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    x, y = one.train
    assert x.shape == (80, 3, 32, 32)
    assert x.dtype == torch.uint8
    assert y.bincount().tolist() == [20] * 4
    row = 20 * CLASSES.index("red") + 7
    assert torch.equal(x[row], torch.from_numpy(np.array(draw("red", 7))).permute(2, 0, 1))
    limited = cifar_data.load(str(archive), Path(), cifar_data.Subset(3))
    assert limited.digest() != one.digest() == other.digest()
    assert torch.equal(limited.train[0], x.view(4, 20, 3, 32, 32)[:, :3].flatten(0, 1))
    assert len(limited.test[1]) == 24
    mean, std = one.statistics()
    values = x.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(values.mean(1).tolist())
    assert std == pytest.approx(values.std(1, correction=0).tolist())


def test_classes_without_train_and_test_are_split(folder, tmp_path, capsys):
    everything = cifar_data.load(str(folder / "train"), Path())
    assert "every fifth image of a class is a test image" in capsys.readouterr().out
    assert everything.train[1].bincount().tolist() == [16] * 4
    assert everything.test[1].bincount().tolist() == [4] * 4
    expected = torch.from_numpy(np.array(draw("blue", 5))).permute(2, 0, 1)
    assert torch.equal(everything.test[0][1], expected)


def test_images_of_other_shapes_are_scaled_and_cut(tmp_path):
    for split in ("train", "val"):
        for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
            (tmp_path / split / name).mkdir(parents=True)
            image = Image.new("RGB", (96, 64), (0, 255, 0))
            image.paste(colour, (16, 0, 80, 64))
            image.save(tmp_path / split / name / "one.jpg", quality=95, subsampling=0)
    images = cifar_data.load(str(tmp_path), Path(), size=16)
    assert images.train[0].shape == (2, 3, 16, 16)
    assert images.train[0][0, 0].min() > 200  # red all over: the green sides were cut off
    assert images.train[0][0, 1].float().mean() < 10


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: None, "does not exist"),
        (lambda f: f.mkdir(), "holds no images"),
        (lambda f: (f.mkdir(), (f / "x.png").write_bytes(b"")), "holds no images"),
        (lambda f: f.write_bytes(b"no tar"), "cannot be read to its end"),
        (lambda f: (write_images(f, 2, 1), (f / "train/red/0001.png").write_bytes(b"\x89PNG")), "train/red/0001.png"),
        (lambda f: (write_images(f, 2, 1), draw("red", 0).save(f / "test/x.png"))[1], None),
        (lambda f: (write_images(f, 2, 1), (f / "train/red").rename(f / "train/rot")), "without training images: red"),
    ],
)
def test_bad_folders_are_named(tmp_path, spoil, message):
    path = tmp_path / "data"
    spoil(path)
    if message is None:
        assert len(cifar_data.load(str(path), Path()).test[1]) == 4
        return
    with pytest.raises(cifar_data.DataError, match=re.escape(message)) as error:
        cifar_data.load(str(path), Path())
    assert "data" in str(error.value)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_truncated_archive_is_named_and_kept(archive, tmp_path, share):
    content = archive.read_bytes()
    short = tmp_path / "short.tar.xz"
    short.write_bytes(content[: int(share * len(content))])
    assert f"{short} cannot be read to its end" in refusal(short, tmp_path / "run")
    assert short.stat().st_size == int(share * len(content))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ the official archives
def official(name: str, path: Path, *, evil: bool = False) -> tuple[Path, np.ndarray, list[int]]:
    """An archive of 20 random images in the format of CIFAR-10 or CIFAR-100."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
    labels = [n % 10 for n in range(20)]
    names = [f"class {n}".encode() for n in range(10)]
    if name == "cifar10":
        parts = {f"data_batch_{n + 1}": (slice(3 * n, 3 * n + 3)) for n in range(5)} | {"test_batch": slice(15, 20)}
        files = {part: {b"data": pixels[rows], b"labels": labels[rows]} for part, rows in parts.items()}
        folder, files["batches.meta"] = "cifar-10-batches-py", {b"label_names": names}
    else:
        parts = {"train": slice(0, 15), "test": slice(15, 20)}
        files = {part: {b"data": pixels[rows], b"fine_labels": labels[rows]} for part, rows in parts.items()}
        folder, files["meta"] = "cifar-100-python", {b"fine_label_names": names}
    if evil:
        files[next(iter(files))] = Evil()
    path.mkdir(parents=True, exist_ok=True)
    archive = path / cifar_data.CIFAR[name].archive
    with tarfile.open(archive, "w:gz") as tar:
        for part, content in {**files, "readme.html": None}.items():
            data = b"<html>" if content is None else pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f"{folder}/{part}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return archive, pixels, labels


class Evil:
    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_official_archives_are_read(tmp_path, name):
    _, pixels, labels = official(name, tmp_path)
    images = cifar_data.load(name, tmp_path)
    assert torch.equal(images.train[0], torch.from_numpy(pixels[:15].reshape(-1, 3, 32, 32)))
    assert images.train[1].tolist() == labels[:15]
    assert torch.equal(images.test[0], torch.from_numpy(pixels[15:].reshape(-1, 3, 32, 32)))
    assert images.classes[3] == "class 3"
    assert cifar_data.load(name, tmp_path, cifar_data.Subset(1)).train[1].tolist() == list(range(10))


def test_an_archive_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    official("cifar10", tmp_path, evil=True)
    with pytest.raises(cifar_data.DataError, match="which no data need"):
        cifar_data.load("cifar10", tmp_path)
    assert not Path("harm").exists()


def test_a_damaged_or_wrong_archive_is_named(tmp_path):
    archive, *_ = official("cifar10", tmp_path)
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(cifar_data.DataError, match="is damaged"):
        cifar_data.load("cifar10", tmp_path)
    archive.write_bytes(official("cifar100", tmp_path / "other")[0].read_bytes())
    with pytest.raises(
        cifar_data.DataError, match="is not the archive of cifar10: it holds meta, readme.html, test, train"
    ):
        cifar_data.load("cifar10", tmp_path)


class Server(http.server.SimpleHTTPRequestHandler):
    share = 1.0  # of a file, that is sent before the connection breaks

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: int(self.share * len(content))])

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An archive to download: its content, and the class that sends it."""
    archive, *_ = official("cifar10", tmp_path / "site")
    content = archive.read_bytes()
    handler = type("Handler", (Server,), {})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path / "site"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(cifar_data, "SITE", f"http://127.0.0.1:{server.server_port}")
    changed = cifar_data.CIFAR["cifar10"]._replace(checksum=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(cifar_data.CIFAR, "cifar10", changed)
    yield content, handler
    server.shutdown()
    server.server_close()


def test_a_download_is_kept_and_shows_its_progress(site, tmp_path, capfd):
    images = cifar_data.load("cifar10", tmp_path / "new" / "data")
    assert len(images.train[1]) == 15
    assert (tmp_path / "new" / "data" / "cifar-10-python.tar.gz").read_bytes() == site[0]
    assert "100" in capfd.readouterr().err
    site[1].share = 0.0
    assert len(cifar_data.load("cifar10", tmp_path / "new" / "data").train[1]) == 15  # not downloaded again


def test_an_interrupted_download_leaves_nothing_behind_and_can_be_repeated(site, tmp_path):
    site[1].share = 0.5
    with pytest.raises(cifar_data.DataError, match="did not arrive as it should"):
        cifar_data.load("cifar10", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    site[1].share = 1.0
    assert len(cifar_data.load("cifar10", tmp_path / "data").train[1]) == 15


def test_without_a_network_it_says_where_the_archive_belongs(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_data, "SITE", "http://127.0.0.1:9")
    message = refusal("cifar100", tmp_path / "run", "--data-folder", str(tmp_path / "data"))
    assert f"put the file at {tmp_path / 'data' / 'cifar-100-python.tar.gz'}" in message


def rows_of(images: tuple[torch.Tensor, torch.Tensor], among: tuple[torch.Tensor, torch.Tensor]) -> list[list[int]]:
    """Of each class, which of its images these are."""
    found: list[list[int]] = [[] for _ in range(int(among[1].max()) + 1)]
    for image, label in zip(*images, strict=True):
        of_class = among[0][among[1] == label]
        found[label] += (of_class == image).flatten(1).all(1).nonzero().flatten().tolist()
    return found


def test_a_subset_is_drawn_by_its_seed_and_apart_from_validation(archive):
    everything = cifar_data.load(str(archive), Path())
    subsets = {}
    for per_class, seed in ((5, None), (5, 1), (5, 2), (8, 1)):
        images = cifar_data.load(str(archive), Path(), cifar_data.Subset(per_class, seed, 12))
        train, validation = (rows_of(part, everything.train) for part in (images.train, images.test))
        assert [len(rows) for rows in train] == [per_class] * 4
        assert [len(set(rows)) for rows in validation] == [12] * 4
        assert all(not set(a) & set(b) for a, b in zip(train, validation, strict=True))
        subsets[per_class, seed] = train, validation
    assert subsets[5, None] == ([list(range(5))] * 4, [list(range(8, 20))] * 4)
    assert subsets[5, 1][0] != subsets[5, 2][0]
    assert len({tuple(rows) for rows in subsets[5, 1][0]}) == 4  # each class has an order of its own
    assert subsets[5, 1][1] == subsets[8, 1][1]
    assert [rows[:5] for rows in subsets[8, 1][0]] == subsets[5, 1][0]
    without = cifar_data.load(str(archive), Path(), cifar_data.Subset(5, 1))
    assert rows_of(without.train, everything.train) == subsets[5, 1][0]
    assert torch.equal(without.test[0], everything.test[0])
    with pytest.raises(cifar_data.DataError, match="20 training images: too few to put 16 aside"):
        cifar_data.load(str(archive), Path(), cifar_data.Subset(5, 1, 16))


# ------------------------------------------------------------------ augmentation
@pytest.mark.parametrize("name", ["standard", "randaugment"])
def test_augmentation_is_determined_by_the_seed_and_different_for_each_image(name):
    augment = train_cifar.make_augmentation(name, 32)
    images = torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].shape == images.shape
    assert results[0].unique(dim=0).shape[0] == 8
    assert results[0].min() >= 0
    assert results[0].max() <= 1 + 1e-5


# ------------------------------------------------------------------ networks
@pytest.mark.parametrize(
    ("name", "weights", "features"),
    # Of ResNet-18 and -50 with this stem and ten classes, as published with https://github.com/kuangliu/pytorch-cifar
    [("resnet18", 11_173_962, 512), ("resnet50", 23_520_842, 2048)],
)
def test_residual_networks_have_the_published_size(name, weights, features):
    with torch.device("meta"):
        network = networks.Network(networks.ENCODERS[name](), 10, False, [0.5] * 3, [0.2] * 3)
        assert sum(weight.numel() for weight in network.parameters()) == weights
        assert network.features(torch.empty(2, 3, 32, 32)).shape == (2, features)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("norm", networks.NORMS)
def test_shapes_and_signals(norm):
    torch.manual_seed(0)
    network = networks.Network(networks.ENCODERS["small"](norm=norm), 128, True, [0.5] * 3, [0.2] * 3)
    images = torch.rand(4, 3, 32, 32)
    assert network(images).shape == (4, 128)
    assert len([layer for layer in network.head if isinstance(layer, nn.Linear)]) == 2
    features = network.features(images)
    assert features.shape == (4, network.encoder.num_features)
    assert 0.01 < features.std() < 100
    standardised = network.encoder((images - 0.5) / 0.2)
    torch.testing.assert_close(features, standardised)


# ------------------------------------------------------------------ teachers
def make_teacher() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))


def make_wide_teacher() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))


def no_module() -> int:
    return 1


def test_any_module_can_teach(archive, tmp_path):
    teacher, file = make_teacher(), tmp_path / "teacher.pt"
    losses = set()
    for saved, options in (
        (teacher.state_dict(), ["--teacher-model", f"{__name__}:make_teacher"]),
        ({"state_dict": teacher.state_dict()}, ["--teacher-model", f"{__name__}:make_teacher"]),
        (teacher, ["--trust-teacher"]),
    ):
        torch.save(saved, file)
        state = train(archive, tmp_path / str(len(losses)) / type(saved).__name__, "--teacher", str(file), *options)
        losses.add(state["history"][0]["loss"])
    assert len(losses) == 1
    state = train(archive, tmp_path / "other", "--teacher", str(file), "--trust-teacher", "--teacher-weight", "0.3")
    assert state["history"][0]["loss"] < losses.pop()
    assert state["history"][0]["collapsed_loss"] == pytest.approx(1.3 * np.log(31) / 0.7, abs=1e-4)


def test_a_teacher_for_cross_entropy(archive, tmp_path):
    options = ["--method", "ce"]
    torch.save(make_teacher(), tmp_path / "teacher.pt")
    alone = train(archive, tmp_path / "alone", *options)
    taught = train(archive, tmp_path / "taught", *options, "--teacher", str(tmp_path / "teacher.pt"), "--trust-teacher")
    assert taught["history"][0]["loss"] > alone["history"][0]["loss"] + 0.5


@pytest.mark.parametrize(
    ("saved", "options", "message"),
    [
        (None, [], "does not exist"),
        (b"nothing", [], "teacher.pt"),
        (b"weights, I hope\n", [], "teacher.pt"),
        (make_teacher(), [], "add --trust-teacher"),
        (make_wide_teacher(), ["--trust-teacher"], "must give 4 logits for an image; got (2, 7)"),
        (make_teacher().state_dict(), [], "name their network with --teacher-model"),
        (make_teacher().state_dict(), ["--teacher-model", "nowhere:f"], "nowhere"),
        (make_teacher().state_dict(), ["--teacher-model", "resnet"], "module:function"),
        (make_teacher().state_dict(), ["--teacher-model", f"{__name__}:no_module"], "got int"),
        (make_teacher().state_dict(), ["--teacher-model", f"{__name__}:make_wide_teacher"], "does not fit"),
        ([1, 2], ["--teacher-model", f"{__name__}:make_teacher"], "does not fit"),
    ],
)
def test_bad_teachers_are_named(archive, tmp_path, saved, options, message):
    file = tmp_path / "teacher.pt"
    if isinstance(saved, bytes):
        file.write_bytes(saved)
    elif saved is not None:
        torch.save(saved, file)
    text = refusal(archive, tmp_path / "run", "--teacher", str(file), *options)
    assert message in text
    assert not (tmp_path / "run").exists()


def test_teachers_of_other_runs_must_fit(folder, archive, tmp_path):
    train(archive, tmp_path / "supcon", "--method", "supcon")
    message = refusal(archive, tmp_path / "run", "--teacher", str(tmp_path / "supcon" / "last.pt"))
    assert "was trained with supcon: it has no logits" in message
    state = train(archive, tmp_path / "ce", "--method", "ce")
    state["classes"] = ["a", "b", "c", "d"]
    torch.save(state, tmp_path / "ce" / "last.pt")
    message = refusal(archive, tmp_path / "run", "--teacher", str(tmp_path / "ce" / "last.pt"))
    assert "was trained on other classes: a, b, c, d" in message


def test_an_encoder_of_your_own_needs_a_width(archive, tmp_path):
    assert "num_features" in refusal(archive, tmp_path, "--arch", f"{__name__}:make_teacher")


# ------------------------------------------------------------------ evaluation
def blobs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seven classes that a plane, and a direction, tell from each other."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 7
    return 5 * torch.eye(9)[labels] + 0.1 * torch.randn(count, 9, generator=generator), labels


@pytest.mark.parametrize("judge", [train_cifar.neighbours, train_cifar.linear_probe])
def test_separable_features_are_told_apart(judge):
    assert judge(*blobs(140, 0), *blobs(70, 1)) == (100, 100)


@pytest.mark.parametrize("judge", [train_cifar.neighbours, train_cifar.linear_probe])
def test_features_without_information_are_at_chance(judge):
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(700, 9, generator=generator) for _ in range(2))
    first, fifth = judge(train, torch.arange(700) % 7, test, torch.arange(700) % 7)
    assert first == pytest.approx(100 / 7, abs=6)
    assert fifth == pytest.approx(500 / 7, abs=8)


def test_votes_are_weighted_by_similarity():
    """Two near neighbours of one class outvote three of another that are further away."""
    angles = torch.tensor([0.05, -0.05, 0.6, -0.6, 0.62])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels, query = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([[3.0, 0.0]])
    assert train_cifar.neighbours(train, labels, query, torch.tensor([0]))[0] == 100
    assert train_cifar.neighbours(train, labels, query, torch.tensor([0]), temperature=10.0)[0] == 0
    assert train_cifar.neighbours(train, labels, query, torch.tensor([0]), k=2, temperature=10.0)[0] == 100


def test_the_probe_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    features = torch.randn(400, 6, generator=generator) + 0.7 * torch.eye(6)[labels]
    first, _ = train_cifar.linear_probe(features[:200], labels[:200], features[200:], labels[200:], decay=1e-3)
    scaler = StandardScaler().fit(features[:200])
    other = LogisticRegression(C=1 / (2 * 1e-3 * 200), max_iter=1000, tol=1e-8)
    other.fit(scaler.transform(features[:200]), labels[:200])
    assert first == pytest.approx(100 * other.score(scaler.transform(features[200:]), labels[200:]), abs=0.51)


# ------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "supcon", "--mix", "mixup"], "--mix and --teacher need genscl or ce"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--per-class", "0"], "--per-class must be at least 1"),
        (["--lr", "0"], "--lr must be positive"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--teacher-weight", "-1"], "--teacher-weight must not be negative"),
        (["--mix-alpha", "inf"], "--mix-alpha must not be negative"),
        (["--method", "supcon", "--smoothing", "0.1"], "--mix and --teacher need genscl or ce, as does --smoothing"),
        (["--smoothing", "1.5"], "--smoothing must be between 0 and 1"),
        (["--hard-labels"], "--hard-labels needs a --mix"),
        (["--teacher-weight", "inf"], "leaves nothing to learn without a --teacher"),
        (["--teacher-weight", "nan"], "--teacher-weight must not be negative"),
        (["--method", "ce", "--queue-size", "9"], "--queue-size needs genscl or supcon without --teacher"),
        (["--teacher", "t.pt", "--queue-size", "9"], "--queue-size needs genscl or supcon without --teacher"),
        (["--queue-size", "-1"], "--queue-size must be at least 0"),
        (["--save-every", "0"], "--save-every must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        train_cifar.main([*TINY, "--data", "nowhere", "--out", str(tmp_path / "run"), *options])
    assert message in capsys.readouterr().err


def test_a_batch_must_not_be_larger_than_the_data(archive, tmp_path):
    message = refusal(archive, tmp_path / "run", "--batch-size", "81")
    assert "--batch-size 81 is more than all 80 training images" in message


def test_the_learning_rate_rises_and_falls():
    options = train_cifar.parse_options(["--lr", "2"])
    rates = [train_cifar.learning_rate(options, step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2
    assert rates[55] == pytest.approx(1)
    assert 0 < rates[99] < 0.002


def test_products_are_of_a_type_that_the_processor_multiplies(monkeypatch, capsys):
    def amp(*options: str) -> str:
        return train_cifar.parse_options(["--data", "x", "--device", "cpu", *options]).amp

    for found, expected in ({"avx2": True}, "off"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert amp() == expected
        assert amp("--amp", "off") == "off"
        capsys.readouterr()
        assert amp("--amp", "bf16") == "bf16"
        assert ("emulates" in capsys.readouterr().out) == (expected == "off")
