"""How many kernels the loss launches around the pairwise one: small batches on a GPU cost little else."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from genscl_loss import _linear as linear
from genscl_loss import available_backends, gen_supcon_loss
from genscl_loss._backends import fused
from genscl_loss._positives import sums

# What only looks at memory or takes some.
FREE = {"alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "expand", "lift_fresh", "new_empty"}
FREE |= {"permute", "select", "slice", "split", "t", "tensor_split", "transpose", "unbind", "unsqueeze", "view"}
FREE |= {"_unsafe_view", "_local_scalar_dense"}
# On the CPU only: checks of values and the number of classes, neither of which may make the host wait for a device.
FREE |= {"aminmax", "max"}
FREE |= {"full"}  # the temperature, on the host
KERNELS = {"linear": linear._kernel, "linear_grad": linear._grad_kernel}


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
            if args[-1] == "triton" or args[-2] == "triton":  # its kernels note themselves
                return function(*args)
            self.names.append(function.__name__)
            with _disable_current_modes():
                return function(*args)

        return call


class TritonLaunches:
    """The Triton kernels, which note each launch; in their interpreter what they do themselves does not count."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __getattr__(self, name: str):
        from genscl_loss._backends import kernels

        value = getattr(kernels, name)
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


def count(labels: str, backend: str, *, inside: bool) -> tuple[int, int]:
    """Operations of a forward and of a backward pass."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(256, 64, generator=generator, requires_grad=True)
    soft = torch.softmax(torch.randn(256, 10, generator=generator), 1)
    if labels == "none":
        features, chosen = features.view(128, 2, 64), None
    else:
        chosen = {"hard": soft.argmax(1), "soft": soft}[labels]

    def counted(work) -> tuple[int, torch.Tensor]:
        calls = Calls(inside=inside)
        with (
            patch.object(fused, "_kernels", lambda: TritonLaunches(calls.names)),
            patch.object(linear, "pairs", calls.as_one(linear.pairs)),
            patch.object(linear, "pairs_grad", calls.as_one(linear.pairs_grad)),
            calls,
        ):
            result = work()
        return len(calls.names), result

    forward, loss = counted(lambda: gen_supcon_loss(features, chosen, backend=backend))
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
        ("none", "dense", 27, 21),
        ("hard", "dense", 21, 18),
        ("soft", "dense", 25, 18),
        ("none", "tiled", 30, 36),
        ("hard", "tiled", 34, 40),
        ("soft", "tiled", 36, 42),
        ("none", "triton", 30, 35),
        ("hard", "triton", 35, 42),
        ("soft", "triton", 37, 44),
    ],
)
def test_no_more_kernels_than_needed(labels, backend, forward, backward):
    """What is inside of the operators included: small batches on a GPU cost little else."""
    skip_without(backend)
    assert count(labels, backend, inside=True) == (forward, backward)
