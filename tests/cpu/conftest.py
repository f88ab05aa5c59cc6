"""Fixtures of the CPU tests."""

from __future__ import annotations

import pytest
from oracle import Oracle


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """NVIDIA's own encoders, compiled for the host."""
    return Oracle(tmp_path_factory.mktemp("oracle"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests recorded with ``record_property("told", ..)``: from every worker, passed or not."""
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == "told" and report.when == "call":
                terminalreporter.write_line(value)
