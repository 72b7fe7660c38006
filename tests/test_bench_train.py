"""The comparison of training methods runs, adds up right, and goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "bench_train.py"
sys.path[:0] = [str(ROOT / "examples"), str(SCRIPT.parent)]
for package in ("kornia", "matplotlib", "sklearn", "PIL", "tqdm"):
    pytest.importorskip(package)
import bench_train  # noqa: E402
from images import pack, write_images  # noqa: E402

KEYS = ["ce", "supcon", "mix", "kd", "teacher"]


def run(data: Path, out: Path) -> str:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(SCRIPT), "--smoke", "--data", str(data), "--out", str(out), "--jobs", "2"]
    command += ["--amp", "off"]  # which the trainer knows
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
def test_smoke(tmp_path):
    data = pack(write_images(tmp_path / "images", train=16), tmp_path / "images.tar.xz")
    printed = run(data, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "bench_train.json").read_text())
    assert list(report["runs"]) == KEYS
    assert bench_train.table(report) in printed
    assert bench_train.rates(report["throughput"]) in printed
    assert str(tmp_path) not in json.dumps(report["settings"])
    assert (tmp_path / "out" / "bench_train.png").read_bytes().startswith(b"\x89PNG")
    configs = {}
    for key in KEYS:
        (one,) = report["runs"][key]
        assert len(one["losses"]) == 1
        folder = tmp_path / "out" / "runs" / f"{key}-0"
        assert one["results"] == json.loads((folder / "results.json").read_text())
        configs[key] = json.loads((folder / "config.json").read_text())
    assert [configs[key]["method"] for key in KEYS] == ["ce", "supcon", "genscl", "genscl", "ce"]
    assert [configs[key]["mix"] for key in KEYS] == ["none", "none", *["mixup_cutmix"] * 3]
    assert configs["kd"]["teacher"].endswith("teacher-0/last.pt")
    assert not any(configs[key]["teacher"] for key in KEYS if key != "kd")
    assert {configs[key]["amp"] for key in KEYS} == {"off"}
    collapsed = {key: report["runs"][key][0]["collapsed_loss"] for key in KEYS}
    assert collapsed["kd"] == pytest.approx(2 * collapsed["mix"])
    assert 0 < report["throughput"]["fraction"] < 1.5
    # Once more: nothing is trained again but what is missing.
    before = {key: (tmp_path / "out" / "runs" / f"{key}-0" / "last.pt").stat().st_mtime_ns for key in KEYS}
    (tmp_path / "out" / "runs" / "kd-0" / "results.json").unlink()
    again = run(data, tmp_path / "out")
    assert [line.split(":")[0] for line in again.splitlines() if "minutes" in line] == ["kd with seed 0"]
    assert before == {key: (tmp_path / "out" / "runs" / f"{key}-0" / "last.pt").stat().st_mtime_ns for key in KEYS}
    assert bench_train.table(report).splitlines()[2] in again


def test_means_and_spreads():
    runs = [{"results": {"linear": [value, 100.0]}} for value in (70.0, 72.0, 77.0)]
    assert bench_train.summary(runs, "linear") == (73.0, pytest.approx(13**0.5))
    assert bench_train.summary(runs[:1], "linear") == (70.0, 0.0)


def test_wrong_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_train.main(["--seeds", "0"])
    assert "--seeds" in capsys.readouterr().err
