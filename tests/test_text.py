"""The example of texts runs in a smoke size, on texts that are there, and its table says what it measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "text.py"
METHODS = ["Cross-entropy", "Cross-entropy, smoothing", "SupCon", "GenSCL, smoothing"]
CELL = r"\s+(-?\d+\.\d\d) ± (\d+\.\d\d)"


@pytest.fixture(scope="module")
def example():
    """The script as a module."""
    spec = spec_from_file_location("text_example", SCRIPT)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(example) -> tuple[list[list[str]], np.ndarray]:
    return example.load_texts()


def run(*arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=120)


@pytest.mark.exhaustive
def test_the_smoke_run_prints_two_accuracies_and_two_gains_for_every_method():
    done = run("--smoke")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^\d{4} texts of 13 libraries: 260 labelled texts \(20 per library\), 325 judged$", done.stdout, re.M
    )
    table = done.stdout.partition("gain\n")[2].splitlines()
    assert len(table) == len(METHODS)
    baseline = float(re.search(CELL, table[0])[1])
    for line, method in zip(table, METHODS, strict=True):
        found = re.fullmatch(re.escape(method) + 4 * CELL, line)
        assert found, line
        probe, _, gain, _, knn, *_ = map(float, found.groups())
        assert 20 < probe <= 100  # chance is 8
        assert 20 < knn <= 100
        assert gain == pytest.approx(probe - baseline, abs=0.011)
    assert f"seed 1: {METHODS[-1]}: 100%" in done.stderr


def test_intervals_are_those_of_paired_differences(example, capsys):
    # 2.26 is the quantile of ten values; the spread of a gain is not that of its two methods.
    seeds = np.arange(10.0)
    same, wavering = 50 + seeds, 51 + seeds + 0.5 * (-1) ** seeds
    scores = np.stack([same, wavering, same, same])[:, :, None].repeat(2, axis=2)
    example.print_table(scores)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(METHODS[1]))
    half = 2.262 * 0.5 * np.sqrt(10 / 9) / np.sqrt(10)
    assert [float(value) for value in re.search(2 * CELL, row).groups()][2:] == pytest.approx([1, half], abs=0.006)


def test_every_library_has_texts_that_do_not_name_it(example, texts):
    words, labels = texts
    assert len(words) >= 1500
    assert np.bincount(labels).min() >= 2 * example.TEST_TEXTS + 20  # two held out, and a draw
    assert len(set(map(tuple, words))) == len(words)
    assert not any(example.LIBRARIES[label] in " ".join(text) for text, label in zip(words, labels, strict=True))


def test_test_validation_and_pool_share_no_text(example, texts):
    parts = example.split(texts[1])
    assert sorted(np.concatenate(parts)) == list(range(len(texts[1])))
    assert [len(part) for part in parts[:2]] == [325, 325]


def test_a_view_loses_features_and_keeps_the_order_of_texts(example):
    texts = [torch.arange(1000), torch.arange(1000, 3000)]
    features, begins = example.view(texts, torch.Generator().manual_seed(0))
    assert begins[0] == 0
    assert (features[: begins[1]] < 1000).all()
    assert (features[begins[1] :] >= 1000).all()
    assert 0.65 < len(features) / 3000 < 0.75


@pytest.mark.parametrize("arguments", [["--seeds", "1"], ["--per-class", "21"]])
def test_wrong_numbers_are_refused(example, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["text.py", *arguments])
    with pytest.raises(SystemExit):
        example.parse_arguments()
    assert "--seeds must be at least 2" in capsys.readouterr().err
