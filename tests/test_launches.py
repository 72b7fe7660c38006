"""How many kernels the loss launches around the pairwise one: small batches on a GPU cost little else."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from genscl_loss import _linear as linear
from genscl_loss import _linear_fused, available_backends, gen_supcon_loss
from genscl_loss._backends import fused
from genscl_loss._positives import fused as label_half
from genscl_loss._positives import operator, sums

# What only looks at memory or takes some.
FREE = {"alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "expand", "lift_fresh", "new_empty"}
FREE |= {"permute", "select", "slice", "split", "t", "tensor_split", "transpose", "unbind", "unsqueeze", "view"}
FREE |= {"split_with_sizes", "_unsafe_view", "_local_scalar_dense"}
# On the CPU only: checks of values and the number of classes, neither of which may make the host wait for a device.
FREE |= {"aminmax", "max"}
FREE |= {"full"}  # the temperature, on the host
KERNELS = {
    "linear": linear._kernel,
    "linear_grad": linear._grad_kernel,
    "class_numbers": operator._class_numbers_kernel,
}


class Calls(TorchDispatchMode):
    """Lists operations, each of which would launch a kernel; of our own operators what is inside, if asked for."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.names, self.inside = [], inside

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if self.inside and name in KERNELS:
            with self:
                return KERNELS[name](*args)
        with self:
            result = function.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def as_one(self, function):
        """The same function, which counts as one operation."""

        def call(*args):
            self.names.append(function.__name__)
            with _disable_current_modes():
                return function(*args)

        return call


class TritonLaunches:
    """The Triton kernels, which note each launch; in their interpreter what they do themselves does not count."""

    def __init__(self, names: list[str], kernels) -> None:
        self.names, self.kernels = names, kernels

    def __getattr__(self, name: str):
        value = getattr(self.kernels, name)
        if not hasattr(value, "run"):
            return value

        class Noted:
            def __getitem__(_, grid):
                def launch(*args, **kwargs):
                    self.names.append(name)
                    with _disable_current_modes():
                        value[grid](*args, **kwargs)

                return launch

        return Noted()


def count(labels: str, backend: str, *, inside: bool, n: int = 256, d: int = 64, **options) -> tuple[int, int]:
    """Operations of a forward and of a backward pass."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator, requires_grad=True)
    soft = torch.softmax(torch.randn(n, 10, generator=generator), 1)
    if labels == "none":
        features, chosen = features.view(n // 2, 2, d), None
    else:
        chosen = {"hard": soft.argmax(1), "soft": soft}[labels]

    def counted(work) -> tuple[int, torch.Tensor]:
        calls = Calls(inside=inside)
        with (
            contextlib.ExitStack() as stack,
            patch.object(linear, "pure_row_lse", calls.as_one(linear.pure_row_lse)),
            patch.object(linear, "pure_row_lse_grad", calls.as_one(linear.pure_row_lse_grad)),
            calls,
        ):
            for module in (fused, label_half, _linear_fused) if backend == "triton" else ():
                launches = TritonLaunches(calls.names, module._kernels())
                stack.enter_context(patch.object(module, "_kernels", lambda launches=launches: launches))
            result = work()
        return len(calls.names), result

    forward, loss = counted(lambda: gen_supcon_loss(features, chosen, backend=backend, **options))
    backward, _ = counted(lambda: torch.autograd.grad(loss, features))
    return forward, backward


@pytest.fixture(autouse=True)
def chunks_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(sums, "_CHUNK", sums._CHUNK_ELSEWHERE)


def skip_without(backend: str) -> None:
    if backend == "triton" and backend not in available_backends():
        pytest.skip("needs Triton's interpreter")


@pytest.mark.parametrize("labels", ["none", "hard", "soft"])
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_few_calls_into_torch(labels, backend):
    """Both halves are one operator, which is one call in either direction."""
    skip_without(backend)
    forward, backward = count(labels, backend, inside=False)
    assert forward <= 15
    assert backward <= 12


@pytest.mark.parametrize(
    ("labels", "backend", "forward", "backward"),
    [
        ("none", "dense", 27, 18),
        ("hard", "dense", 19, 13),
        ("soft", "dense", 24, 13),
        ("none", "tiled", 29, 36),
        ("hard", "tiled", 33, 38),
        ("soft", "tiled", 34, 40),
        ("none", "triton", 10, 10),
        ("hard", "triton", 8, 9),
        ("soft", "triton", 7, 8),
    ],
)
def test_no_more_kernels_than_needed(labels, backend, forward, backward):
    """What is inside of the operators included: small batches on a GPU cost little else."""
    skip_without(backend)
    assert count(labels, backend, inside=True) == (forward, backward)


@pytest.mark.parametrize("labels", ["none", "hard", "soft"])
@pytest.mark.parametrize("d", [64, pytest.param(300, marks=pytest.mark.exhaustive)])
def test_a_step_of_the_kernels_is_twenty_launches(labels, d, monkeypatch):
    """On a GPU of many multiprocessors, where sums over rows and columns are split and have to be merged."""
    skip_without("triton")
    monkeypatch.setattr(fused, "_multiprocessors", lambda device: 132)
    assert sum(count(labels, "triton", inside=True, n=300, d=d)) <= 20


def test_every_launch_asks_for_fused_multiply_adds():
    """By name: what a release of Triton does unasked changes."""
    root, asking, silent = Path(fused.__file__).parents[1], set(), set()
    for path in root.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Subscript) and ast.unparse(call.func.value).startswith("_kernels()."):
                given = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
                found = asking if given & {"LAUNCH", "_options(plan)"} else silent
                found.add(ast.unparse(call.func.value).removeprefix("_kernels()."))
    assert not silent
    assert len(asking) == 18
