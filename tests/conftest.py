"""Fixtures and hypothesis profiles shared by all tests."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: one thread each, also in what they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

INTERPRETED = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels then run on the CPU, as Python

# Test bodies run once per backend through the `backend` fixture, which hypothesis would otherwise refuse.
_SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors]
settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=_SUPPRESSED)
settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, print_blob=True, suppress_health_check=_SUPPRESSED
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


# Files that take longest, so that the last process to end has no long one left when the others are done.
_LONG = ["kernels_aot", "triton", "properties", "distributed", "compile"]
_LONG += ["train_cifar", "compare_training", "bench_train", "momentum_queue", "module"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(params=["dense", "tiled", "auto", "triton"])
def backend(request) -> str:
    """Every backend name; "triton" in Triton's interpreter, and not for tests that are marked `not_on_triton`."""
    if request.param == "triton":
        if (mark := request.node.get_closest_marker("not_on_triton")) is not None:
            pytest.skip(f"not on triton: {mark.args[0]}")
        if not INTERPRETED:
            pytest.skip("needs Triton's interpreter: a Triton that is installed, and no GPU")
    return request.param


@pytest.fixture
def small_tile(monkeypatch) -> int:
    """Make the tiled backend's tiles so small that a batch of ten rows spans several of them."""
    monkeypatch.setattr("genscl_loss._backends.tiled.TILE", 4)
    return 4
