"""Fixtures and hypothesis profiles shared by all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Test bodies run once per backend through the `backend` fixture, which hypothesis would otherwise refuse.
_SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors]
settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=_SUPPRESSED)
settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, print_blob=True, suppress_health_check=_SUPPRESSED
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(params=["dense", "tiled", "auto"])
def backend(request) -> str:
    """Every backend name that works on any machine."""
    return request.param


@pytest.fixture
def small_tile(monkeypatch) -> int:
    """Make the tiled backend's tiles so small that a batch of ten rows spans several of them."""
    monkeypatch.setattr("genscl_loss._backends.tiled.TILE", 4)
    return 4
