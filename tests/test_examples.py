"""The demo runs in a smoke size, prints its table and draws its pictures, and its numbers can be had again."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "digits_demo.py"
METHODS = ["Cross-entropy", "SupCon", "GenSCL mixup-cutmix", "GenSCL mixup-cutmix + KD"]
CELL = r"\s+(-?\d+\.\d\d) ± (\d+\.\d\d)"


def run(*arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=120)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """The finished smoke run, and the folder that it was told to write to."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = run("--smoke", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return done, folder


@pytest.mark.exhaustive
def test_the_table_has_two_accuracies_and_two_gains_for_every_method(smoke):
    table = smoke[0].stdout.split("s/run\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == len(METHODS)
    for line, method in zip(table, METHODS, strict=True):
        row = re.fullmatch(re.escape(method) + 4 * CELL + r"\s+\d+\.\d", line)
        assert row, line
        probe, probe_spread, gain, _, knn, knn_spread, *_ = map(float, row.groups())
        assert 30 < probe <= 100  # chance is 10
        assert 30 < knn <= 100
        assert probe_spread < 50
        assert knn_spread < 50
        if method == "Cross-entropy":
            baseline = probe
        assert gain == pytest.approx(probe - baseline, abs=0.011)


@pytest.mark.exhaustive
def test_it_says_what_was_split_how(smoke):
    assert "50 labelled training images (5 per class), 800 test images, 2 seeds" in smoke[0].stdout


@pytest.mark.exhaustive
def test_the_loss_falls_below_the_value_of_a_collapsed_encoder(smoke):
    lines = dict(re.findall(r"^(.+?)\s{2,}(\d+\.\d\d \(\d+\.\d\d\))$", smoke[0].stdout, re.MULTILINE))
    assert list(lines) == METHODS
    values = {method: [float(value) for value in re.findall(r"\d+\.\d\d", line)] for method, line in lines.items()}
    # ln 10 classes; ln 99 contrasts: 50 images in two views, without the anchor itself; twice that with a teacher
    assert [collapsed for _, collapsed in values.values()] == [2.30, 4.60, 4.60, 9.19]
    assert all(last < collapsed for last, collapsed in values.values())


@pytest.mark.parametrize("name", ["digits_losses.png", "digits_embeddings.png"])
@pytest.mark.exhaustive
def test_the_pictures_are_where_it_says(smoke, name):
    done, folder = smoke
    assert str(folder / name) in done.stdout
    picture = (folder / name).read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 900
    assert height > 350
    assert len(picture) > 20_000


@pytest.mark.exhaustive
def test_it_shows_its_progress(smoke):
    assert "seed 1: GenSCL mixup-cutmix + KD: 100%" in smoke[0].stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--per-class", "91"]])
def test_wrong_numbers_are_refused_before_any_work(arguments, tmp_path):
    done = run(*arguments, "--out", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "--per-class 1 to 90" in done.stderr
    assert not (tmp_path / "none").exists()
