"""Fixtures and hypothesis profiles shared by all tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Hashable

import interpreter
import pytest
import torch
from devices import run_losses_on
from grids import covering
from hypothesis import HealthCheck, settings

from genscl_loss._backends import fused

# NumPy reads it where it is imported first, which is in the processes that run tests side by side: one thread each.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # also for torch, and in what tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

_HAS_TRITON = importlib.util.find_spec("triton") is not None and not fused._is_too_old()
INTERPRETED = _HAS_TRITON and not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels then run on the CPU, as Python
    interpreter.hasten()

# With the tensors of all calls of the loss there: the contract's tests on a GPU (benchmarks/gpu.py).
MOVED_TO = os.environ.get("GENSCL_TEST_DEVICE")
if MOVED_TO is not None:
    run_losses_on(torch.device(MOVED_TO))

# Test bodies run once per backend through the `backend` fixture, which hypothesis would otherwise refuse.
_SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors]
_settings = {"deadline": None, "suppress_health_check": _SUPPRESSED}
settings.register_profile("dev", max_examples=20, **_settings)
settings.register_profile("ci", max_examples=20, derandomize=True, print_blob=True, **_settings)
settings.register_profile("all", max_examples=50, derandomize=True, print_blob=True, **_settings)  # make test-all
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


collect_ignore = ["typed.py"]  # for type checkers only: half of its calls are wrong

# Files that take longest, so that the last process to end has no long one left when the others are done.
_LONG = ["kernels_aot", "triton", "properties", "distributed", "compile"]
_LONG += ["train_cifar", "compare_training", "bench_train", "momentum_queue", "module"]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    never = [x for x in items if is_nothing_for_triton(x)]
    config.hook.pytest_deselected(items=never)
    items[:] = [item for item in items if item not in set(never)]
    mark_what_is_exhaustive(items)
    rank = {f"test_{name}": i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def is_nothing_for_triton(item: pytest.Item) -> bool:
    """Whether a case of "triton" is marked so, or differs from another in how "tiled" cuts tiles."""
    chosen = getattr(item, "callspec", None)
    if chosen is None or chosen.params.get("backend") != "triton":
        return False
    return item.get_closest_marker("not_on_triton") is not None or chosen.params.get("small_tile") is True


def comparable(value: object) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def case(item: pytest.Item) -> dict[str, Hashable]:
    """The parameters of a test by name; the columns of a table, whose rows belong together, are one."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    found = {name: comparable(value) for name, value in values.items()}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        if len(names) > 1:
            found[", ".join(names)] = tuple(found.pop(name.strip()) for name in names)
    return found


def mark_what_is_exhaustive(items: list[pytest.Item]) -> None:
    """Of each test the cases in which no two values meet that have not met (`grids.py`), beside what is marked so.

    And properties on "triton", which takes a second for an example that others have in a hundredth.
    """
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if INTERPRETED and hasattr(item.obj, "hypothesis") and case(item).get("backend") == "triton":
            item.add_marker("exhaustive")
        if not item.get_closest_marker("exhaustive"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for grid in grids.values():
        mark = grid[0].get_closest_marker("strength")
        quick = covering([case(item) for item in grid], *(mark.args if mark else ()))
        for number, item in enumerate(grid):
            if case(item) and number not in quick:
                item.add_marker("exhaustive")


@pytest.fixture(params=["dense", "tiled", "auto", *["triton"] * (INTERPRETED or MOVED_TO == "cuda")])
def backend(request) -> str:
    """Every backend name; "triton" in Triton's interpreter, and not for tests that are marked `not_on_triton`."""
    return request.param


@pytest.fixture(params=[False, True], ids=["together", "alone"])
def small_tile(request, monkeypatch) -> int:
    """Make the tiled backend's tiles so small that a batch of ten rows spans several, each by all threads or by one."""
    monkeypatch.setattr("genscl_loss._backends.tiled.TILE", 4)
    if request.param:
        monkeypatch.setattr("genscl_loss._backends.tiled._WORK", 0)
    return 4
