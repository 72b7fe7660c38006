"""Which backend "auto" takes: the model of time, its bound on memory, and where something else decides."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from genscl_loss import available_backends, gen_supcon_loss
from genscl_loss._backends import auto_backend, choice, choose

ROOT = Path(__file__).parent.parent


def on_cpu(n: int, m: int | None = None, *, d: int, c: int = 0, dtype=torch.float32) -> str:
    return auto_backend(n, m, num_features=d, num_classes=c, dtype=dtype)


def test_few_logits_are_dense_and_many_are_not():
    for d, c in ((16, 0), (128, 100), (2048, 1000)):
        assert on_cpu(32, d=d, c=c) == "dense"
        assert on_cpu(16384, d=d, c=c) == "tiled"


def test_many_features_and_classes_make_the_dense_equation_worth_more():
    """Sums by class of 1000 x 2048 numbers cost as much as a thousand rows of logits do."""
    assert on_cpu(1024, d=128, c=100) == "tiled"
    assert on_cpu(1024, d=2048, c=1000) == "dense"
    assert on_cpu(520, d=4096, c=20000) == "dense"


def test_logits_beyond_a_cache_count_twice():
    """Beside a queue, 256 x 4096 of them took 5.9 ms dense and 7.3 ms tiled; 64 x 65536 63 ms and 34 ms."""
    assert on_cpu(256, 4096, d=16) == "dense"
    assert on_cpu(64, 65536, d=16) == "tiled"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, m", [(16384, None), (64, 10**6), (4096, None), (256, 65536), (1, 10**6)])
def test_matrices_are_small_or_not_much_larger_than_what_is_given(n, m, dtype):
    """Whatever time says."""
    itemsize = 8 if dtype == torch.float64 else 4
    costs = {"cpu": {dtype: replace(choice._COSTS["cpu"][dtype], linear_call=10**18)}}
    with patch.object(choice, "_COSTS", costs):
        for d, c in ((16, 0), (128, 100), (2048, 1000)):
            matrices = 3.5 * itemsize * n * (m or n)
            given = itemsize * ((m or 0) + n) * (d + c)
            expected = "dense" if matrices <= max(2**26, 8 * given) else "tiled"
            assert on_cpu(n, m, d=d, c=c, dtype=dtype) == expected


def test_the_loss_takes_what_can_be_asked_for():
    queue = {"contrast_features": torch.randn(40, 8), "contrast_labels": torch.rand(40, 5)}
    for options, sizes in (({}, (12, None)), (queue, (12, 40))):
        with patch.object(choice.Sizes, "dense_is_best", autospec=True, return_value=True) as asked:
            gen_supcon_loss(torch.randn(12, 8), torch.rand(12, 5), teacher_labels=None, **options)
            assert auto_backend(*sizes, num_features=8, num_classes=5) == "dense"
        by_loss, by_user = (call.args[0] for call in asked.call_args_list)
        assert by_loss == by_user


def test_a_backend_asked_for_by_name_is_used_or_refused():
    rows = torch.empty(10**6, 8)
    assert [choose(name, rows, 10**6) for name in available_backends()] == list(available_backends())
    with pytest.raises(ValueError, match="^backend must be one of 'auto', 'dense', 'tiled', 'triton'; got 'Triton'"):
        gen_supcon_loss(rows[:4], torch.arange(4) % 2, backend="Triton")


# Where something else decides


@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap"])
def test_under_transforms_auto_is_dense_and_others_say_what_to_do(transform):
    x, labels = torch.randn(1100, 4, dtype=torch.float64), torch.arange(1100) % 3
    assert on_cpu(1100, d=4, dtype=torch.float64) == "tiled"

    def loss(features, backend="auto"):
        reduction = "none" if transform == "jacrev" else "mean"
        return gen_supcon_loss(features, labels[: len(features)], backend=backend, reduction=reduction)

    if transform == "grad":
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaf), leaf)[0]
        torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    elif transform == "jacrev":
        found = torch.func.jacrev(loss)(x[:9])
        torch.testing.assert_close(found, torch.autograd.functional.jacobian(loss, x[:9]))
    else:
        batches = torch.stack([x, x.flip(1), -x])
        torch.testing.assert_close(torch.func.vmap(loss)(batches), torch.stack([loss(one) for one in batches]))
    with pytest.raises(RuntimeError, match='^backend "tiled" .*torch.func.*pass backend="dense"'):
        getattr(torch.func, transform)(lambda v: loss(v, "tiled"))(x[:9] if transform != "vmap" else x[None])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["none", "hard", "soft"])
def test_an_exported_program_serves_batches_on_both_sides_of_the_choice(kind, strict):
    class Loss(torch.nn.Module):
        def forward(self, features, labels):
            return gen_supcon_loss(features, labels)

    def batch(n: int):
        soft = torch.softmax(torch.randn(n, 7), 1)
        return torch.randn(n, 2, 16), {"none": None, "hard": soft.argmax(1), "soft": soft}[kind]

    assert on_cpu(2 * 10, d=16) == "dense"
    assert on_cpu(2 * 900, d=16) == "tiled"
    sizes = torch.export.Dim("batch", min=4, max=4096)
    shapes = {"features": {0: sizes}, "labels": None if kind == "none" else {0: sizes}}
    program = torch.export.export(Loss(), batch(10), dynamic_shapes=shapes, strict=strict).module()
    for n in (5, 900):
        given = batch(n)
        torch.testing.assert_close(program(*given), gen_supcon_loss(*given))


@pytest.mark.exhaustive
def test_the_constants_can_be_measured_anywhere():
    command = [sys.executable, str(ROOT / "benchmarks" / "fit_choice.py"), "--smoke"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.startswith("torch.float32: Costs(dense_call=")


@pytest.mark.exhaustive
def test_the_grid_names_its_worst_cell_and_the_backend(tmp_path):
    sizes = ["--n", "8", "--d", "4", "--labels", "none", "hardN", "soft10", "--queue", "0", "20", "--seconds", "0"]
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_grid.py"), *sizes, "--busy", "1", "--no-plot"]
    said = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.count(" dense ") >= 5
    assert "worst cell: " in said
    report = json.loads((tmp_path / "bench_grid_busy.json").read_text())
    assert {(cell["labels"], cell["queue"]) for cell in report["cells"]} == {
        ("none", 0), ("hardN", 0), ("soft10", 0), ("hardN", 20), ("soft10", 20),
    }  # fmt: skip
    assert max(cell["ratio"] for cell in report["cells"]) > 0
