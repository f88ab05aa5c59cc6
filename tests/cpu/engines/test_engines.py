"""The adapters: an engine's plugin is loaded, and then it calls ``flashinfer.comm`` as that engine does, on real process groups."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_calls import WORLD, sglang_rank, vllm_rank
from fake_flashinfer import forgotten, write_flashinfer

import collogue.flashinfer
from collogue.engines import sglang, vllm
from collogue.testing.processes import run_processes

pytestmark = pytest.mark.slow


@pytest.fixture
def flashinfer_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A FlashInfer that only says that it was called, for this process and those that it starts; they see no GPU."""
    write_flashinfer(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with forgotten("flashinfer"):
        yield tmp_path


def test_vllm(flashinfer_on_the_path: Path) -> None:
    assert run_processes(WORLD, vllm_rank, str(flashinfer_on_the_path), silence=60) == [[]] * WORLD


def test_sglang(flashinfer_on_the_path: Path) -> None:
    assert run_processes(WORLD + 1, sglang_rank, str(flashinfer_on_the_path), silence=60) == [[]] * (WORLD + 1)


ADAPTERS = pytest.mark.parametrize(("adapter", "switch"), [(vllm, "COLLOGUE_VLLM"), (sglang, "COLLOGUE_SGLANG")])


@ADAPTERS
@pytest.mark.parametrize("value", [None, "0", ""])
@pytest.mark.usefixtures("flashinfer_on_the_path")
def test_nothing_happens_unless_it_is_switched_on(adapter: Any, switch: str, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(switch, raising=False)
    if value is not None:
        monkeypatch.setenv(switch, value)
    adapter.register()
    assert importlib.import_module("flashinfer.comm").allreduce_fusion() == "flashinfer"


@ADAPTERS
def test_without_flashinfer_the_adapters_say_so(
    adapter: Any, switch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(switch, "1")
    monkeypatch.setattr(collogue.flashinfer, "flashinfer_present", lambda: False)
    monkeypatch.setattr(collogue.flashinfer, "install", None)
    with caplog.at_level(logging.WARNING):
        adapter.register()
    assert "flashinfer-python" in caplog.text
