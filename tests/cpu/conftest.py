"""Fixtures of the CPU tests."""

from __future__ import annotations

import pytest
from oracle import Oracle


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """NVIDIA's own encoders, compiled for the host."""
    return Oracle(tmp_path_factory.mktemp("oracle"))
