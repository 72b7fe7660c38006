"""How many kernels the loss launches around the pairwise one: small batches on a GPU cost little else."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from genscl_loss import _attract, available_backends, gen_supcon_loss
from genscl_loss._backends import fused, operator

# What only looks at memory or takes some.
FREE = {"alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "expand", "lift_fresh", "new_empty"}
FREE |= {"permute", "select", "slice", "split", "t", "tensor_split", "transpose", "unbind", "unsqueeze", "view"}
FREE |= {"_unsafe_view", "_local_scalar_dense"}
# On the CPU only: checks of values and the number of classes, neither of which may make the host wait for a device.
FREE |= {"aminmax", "max"}
FREE |= {"full"}  # the temperature, on the host
KERNELS = {"attract": _attract._kernel, "attract_grad": _attract._grad_kernel}
PAIRWISE = {"row_lse": operator._lse_kernel, "row_lse_grad": operator._grad_kernel}


class Launches(TorchDispatchMode):
    """Lists operations that would each launch a kernel, those inside our own operators included."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        inside = (KERNELS | PAIRWISE if "triton" in args else KERNELS).get(name)
        if inside is not None:
            with self:
                return inside(*args)
        with self:
            result = function.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


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


def count(labels: str, backend: str, **options) -> tuple[int, int]:
    """Launches of a forward and of a backward pass."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(256, 64, generator=generator, requires_grad=True)
    soft = torch.softmax(torch.randn(256, 10, generator=generator), 1)
    if labels == "none":
        features, chosen = features.view(128, 2, 64), None
    else:
        chosen = {"hard": soft.argmax(1), "soft": soft}[labels]
    with Launches() as forward, patch.object(fused, "_kernels", lambda: TritonLaunches(forward.names)):
        loss = gen_supcon_loss(features, chosen, backend=backend, **options)
    with Launches() as backward, patch.object(fused, "_kernels", lambda: TritonLaunches(backward.names)):
        torch.autograd.grad(loss, features)
    return len(forward.names), len(backward.names)


@pytest.fixture(autouse=True)
def chunks_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(_attract, "_CHUNK", _attract._CHUNK_ELSEWHERE)


@pytest.mark.parametrize(
    ("labels", "backend", "forward", "backward"),
    [
        ("none", "dense", 36, 32),
        ("hard", "dense", 25, 22),
        ("soft", "dense", 31, 22),
        ("none", "tiled", 26, 27),
        ("hard", "tiled", 34, 26),
        ("soft", "tiled", 38, 29),
        ("none", "triton", 33, 29),
        ("hard", "triton", 35, 28),
        ("soft", "triton", 39, 31),
    ],
)
def test_no_more_kernels_than_needed(labels, backend, forward, backward):
    if backend == "triton" and backend not in available_backends():
        pytest.skip("needs Triton's interpreter")
    assert count(labels, backend) == (forward, backward)
