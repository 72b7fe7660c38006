"""How many kernels the loss launches around the pairwise one: small batches on a GPU cost little else."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genscl_loss import _attract, gen_supcon_loss

# What only looks at memory or takes some.
FREE = {
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "empty",
    "empty_like",
    "expand",
    "permute",
    "new_empty",
    "select",
    "slice",
    "split",
    "t",
}
FREE |= {
    "tensor_split",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_unsafe_view",
    "lift_fresh",
    "_local_scalar_dense",
}
# On the CPU only: checks of values and the number of classes, neither of which may make the host wait for a device.
FREE |= {"aminmax", "max"}
FREE |= {"full"}  # the temperature, on the host
KERNELS = {"attract": _attract._kernel, "attract_grad": _attract._grad_kernel}


class Launches(TorchDispatchMode):
    """Lists operations that would each launch a kernel, those inside our own operators included."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name in KERNELS:
            with self:
                return KERNELS[name](*args)
        with self:
            result = function.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def count(labels: str, backend: str, **options) -> tuple[int, int]:
    """Launches of a forward and of a backward pass."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(256, 64, generator=generator, requires_grad=True)
    soft = torch.softmax(torch.randn(256, 10, generator=generator), 1)
    if labels == "none":
        features, chosen = features.view(128, 2, 64), None
    else:
        chosen = {"hard": soft.argmax(1), "soft": soft}[labels]
    with Launches() as forward:
        loss = gen_supcon_loss(features, chosen, backend=backend, **options)
    with Launches() as backward:
        torch.autograd.grad(loss, features)
    return len(forward.names), len(backward.names)


@pytest.fixture(autouse=True)
def chunks_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(_attract, "_CHUNK", _attract._CHUNK_ELSEWHERE)


@pytest.mark.parametrize(
    ("labels", "backend", "forward", "backward"),
    [
        ("none", "dense", 24, 21),
        ("hard", "dense", 21, 20),
        ("soft", "dense", 27, 20),
        ("none", "tiled", 30, 26),
        ("hard", "tiled", 32, 25),
        ("soft", "tiled", 36, 28),
    ],
)
def test_no_more_kernels_than_needed(labels, backend, forward, backward):
    assert count(labels, backend) == (forward, backward)
