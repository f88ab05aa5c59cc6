"""Fixtures of the CPU tests."""

from __future__ import annotations

import pytest
from emulated import Build
from oracle import Oracle

from collogue.testing.emulator import compile_cases


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """NVIDIA's own encoders, compiled for the host."""
    return Oracle(tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles cases for the emulator, once per session: test processes share a directory."""
    directory = tmp_path_factory.getbasetemp().parent / "emulator"
    return lambda *cases, edits=(): compile_cases(cases, directory, edits)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compiles for the emulator, or NVIDIA's headers for the host, is slow; other tests carry the mark themselves."""
    for item in items:
        if {"build", "oracle"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests recorded with ``record_property("told", ..)``: from every worker, passed or not."""
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == "told" and report.when == "call":
                terminalreporter.write_line(value)
