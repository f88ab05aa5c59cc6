"""The adapters: an engine's plugin is loaded, and then it calls ``flashinfer.comm`` as that engine does, on real process groups."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_calls import WORLD, sglang_rank, vllm_rank
from fake_flashinfer import forgotten, write_flashinfer

import collogue.flashinfer
from collogue.engines import sglang, vllm
from collogue.engines.switch import Hook, problems
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


@pytest.fixture(autouse=True)
def forget_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    for adapter in (vllm, sglang):
        monkeypatch.setattr(adapter, "_registered", False)
    monkeypatch.setenv("COLLOGUE_ON_FAILURE", "log")  # not `abort` for the rest of this process


ADAPTERS = pytest.mark.parametrize(
    ("adapter", "switch", "value"), [(vllm, "COLLOGUE_VLLM", "flashinfer"), (sglang, "COLLOGUE_SGLANG", "flashinfer")]
)


@ADAPTERS
@pytest.mark.parametrize("off", [None, "0", ""])
@pytest.mark.usefixtures("flashinfer_on_the_path")
def test_nothing_happens_unless_it_is_switched_on(
    adapter: Any, switch: str, value: str, off: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(switch, raising=False)
    if off is not None:
        monkeypatch.setenv(switch, off)
    adapter.register()
    assert importlib.import_module("flashinfer.comm").allreduce_fusion() == "flashinfer"


def test_switched_off_the_plugin_imports_nothing() -> None:
    """It is loaded in every process of every engine of whoever has Collogue installed."""
    code = (
        "import os, sys; os.environ['COLLOGUE_VLLM'] = '0'; import collogue.engines.vllm as p; before = set(sys.modules); p.register();"
        "assert set(sys.modules) == before; assert 'collogue.flashinfer' not in sys.modules; assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@ADAPTERS
def test_without_flashinfer_the_adapters_say_so(
    adapter: Any, switch: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(switch, value)
    monkeypatch.setattr(collogue.flashinfer, "flashinfer_present", lambda: False)
    monkeypatch.setattr(collogue.flashinfer, "install", None)
    with caplog.at_level(logging.WARNING):
        adapter.register()
    assert "flashinfer-python is not installed" in caplog.text


@ADAPTERS
def test_a_broken_flashinfer_does_not_end_the_engine(
    adapter: Any, switch: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose parts do not fit each other raises when it is imported, as engines know."""
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").write_text("raise RuntimeError('the cubin version does not match')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(switch, value)
    with forgotten("flashinfer"), caplog.at_level(logging.WARNING):
        adapter.register()
        adapter.register()
    assert "the engine runs without Collogue: RuntimeError: the cubin version does not match" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("adapter", "switch"), [(vllm, "COLLOGUE_VLLM"), (sglang, "COLLOGUE_SGLANG")])
def test_a_misspelt_switch_is_named(adapter: Any, switch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(switch, "Flashinfr")
    with caplog.at_level(logging.WARNING):
        adapter.register()
    assert f"{switch}=Flashinfr has no effect: choose" in caplog.text


@pytest.mark.parametrize("mode", ["compile", "eager", "auto", "1"])
def test_a_vllm_that_we_do_not_know_goes_on_and_hears_what_moved(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "vllm" / "model_executor" / "layers").mkdir(parents=True)
    for folder in ("", "model_executor", "model_executor/layers"):
        (tmp_path / "vllm" / folder / "__init__.py").write_text("")
    (tmp_path / "vllm/model_executor/layers/linear.py").write_text("def tensor_model_parallel_all_reduce(tensor): return tensor")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLLOGUE_VLLM", mode)
    with forgotten("vllm"), caplog.at_level(logging.WARNING):
        vllm.register()
        linear = importlib.import_module("vllm.model_executor.layers.linear")

        assert linear.tensor_model_parallel_all_reduce(1) == 1
    assert "the engine runs without Collogue" in caplog.text
    if mode == "eager":
        assert "vllm.model_executor.layers.linear.tensor_model_parallel_all_reduce takes no input_, but tensor" in caplog.text
        assert "vllm.model_executor.custom_op cannot be imported" in caplog.text


def test_what_moved_is_named() -> None:
    here = "collogue.engines.switch"
    assert problems([Hook(here, "Hook.problem"), Hook(here, "problems", ("hooks",)), Hook(here, "Hook", ("module", "name"))]) == []
    assert problems([Hook(here, "Hook.away")]) == [f"{here}.Hook.away is not there"]
    assert problems([Hook(here, "problems", ("hook",))]) == [f"{here}.problems takes no hook, but hooks"]
    assert problems([Hook("collogue.no", "x")]) == ["collogue.no cannot be imported: ModuleNotFoundError: No module named 'collogue.no'"]
