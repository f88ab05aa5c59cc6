"""What outlives what: communicators and graphs, threads, errors that leave a block. Without a GPU."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import communicator

import collogue.flashinfer
from collogue.contract.spec import Output
from collogue.engines import sglang, vllm
from collogue.errors import ArgumentError, ClosedError, CollectiveTimeout, ConcurrentUseError
from collogue.flashinfer import workspace
from collogue.gpu import engine as cuda
from collogue.gpu.engine import KernelEngine
from collogue.host.engine import HostEngine
from collogue.planning.topology import Topology
from collogue.testing import VirtualGroup, run_virtual

ERROR = CollectiveTimeout("late", hint="reset")


def kernel_engine() -> KernelEngine:
    """One rank's engine, which has never seen a GPU."""
    group: Any = SimpleNamespace(device=torch.device("cuda", 0), rank=0, size=1, barrier=lambda: None)
    return KernelEngine(group, Topology(1, 8, 64, torch.bfloat16, "sm_90a", 132, 1), 1.0)


# ---- errors that leave a with block


class Closed:
    """An engine that notes how it was closed."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.collective: list[bool] = []
        self.problem = problem

    def close(self, collective: bool) -> None:
        self.collective.append(collective)
        if self.problem is not None:
            raise self.problem


@pytest.mark.parametrize("problem", [None, RuntimeError("the context is gone")])
@pytest.mark.parametrize("error", [ERROR, ValueError("x")])
def test_an_error_is_neither_hidden_nor_kept_waiting(error: Exception, problem: Exception | None) -> None:
    def rank(group: VirtualGroup) -> list[bool]:
        comm: Any = communicator(group)
        comm._engine = engine = Closed(problem)
        with pytest.raises(type(error)) as caught, comm:
            raise error
        assert caught.value is error
        return engine.collective

    assert run_virtual(1, rank) == [[False]]


def test_a_block_that_ends_well_closes_together() -> None:
    def rank(group: VirtualGroup) -> list[bool]:
        comm: Any = communicator(group)
        comm._engine = engine = Closed()
        with comm:
            pass
        comm = communicator(group)
        comm._engine = Closed(RuntimeError("x"))
        with pytest.raises(RuntimeError, match="x"), comm:
            pass
        return engine.collective

    assert run_virtual(1, rank) == [[True]]


# ---- two threads


def test_two_threads_are_refused_on_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave, refused = threading.Event(), threading.Event(), list[ConcurrentUseError]()
    result = HostEngine._result

    def slow(self: HostEngine, *arguments: Any) -> None:
        entered.set()
        leave.wait(10)
        result(self, *arguments)

    monkeypatch.setattr(HostEngine, "_result", slow)

    def rank(group: VirtualGroup) -> None:
        comm, partial = communicator(group), torch.ones(1, 64, dtype=torch.bfloat16)
        first = threading.Thread(target=lambda: comm.all_reduce(partial))
        first.start()
        entered.wait(10)
        try:
            comm.all_reduce(partial)
        except ConcurrentUseError as error:
            refused.append(error)
        leave.set()
        first.join()
        comm.all_reduce(partial)

    run_virtual(1, rank)
    assert len(refused) == 1


def test_kernels_are_not_prepared_nor_workspaces_reset_during_a_call() -> None:
    engine = kernel_engine()
    with engine.in_use:
        for use in (lambda: engine.prepare([]), engine.reset, lambda: engine.run(None, None)):  # type: ignore[arg-type]
            with pytest.raises(ConcurrentUseError):
                use()
    engine.prepare([])


# ---- graphs


@pytest.mark.slow
def test_a_captured_communicator_lives_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", lambda index: (3, 0, 1), raising=False)
    monkeypatch.setattr(cuda, "fill_call", lambda params, call, out: None)
    launched: list[int] = []
    launcher: Any = lambda stream: launched.append(stream)  # noqa: E731
    launcher.params = None

    def call(engine: KernelEngine) -> None:
        engine._order.stream = 7
        engine._launch(cuda._Ready(launcher), SimpleNamespace(operation="all_reduce"), Output())  # type: ignore[arg-type]

    for captured in (False, True):
        capturing[0], engine = captured, kernel_engine()
        call(engine)
        alive = weakref.ref(engine)
        del engine
        gc.collect()
        assert (alive() is not None) == captured
    engine_ = alive()
    assert engine_ is not None
    engine_.close(collective=False)
    del engine_
    gc.collect()
    assert alive() is None
    assert launched == [7, 7]


def test_a_workspace_that_is_destroyed_closes_its_communicators() -> None:
    """Captured or not: nothing else keeps the memory."""

    def rank(group: VirtualGroup) -> bool:
        made = workspace.TRTLLMAllReduceFusionWorkspace(1, 0, 8, 64, torch.bfloat16, group=group)
        comm = made.communicator(4, 64, torch.bfloat16)
        made.destroy()
        return comm._engine is None

    assert run_virtual(1, rank) == [True]


def test_a_call_that_comes_behind_close_is_refused() -> None:
    engine = kernel_engine()
    engine.topology = Topology(2, 8, 64, torch.bfloat16, "sm_90a", 132, 1)
    with pytest.raises(ClosedError):
        engine.prepare(["a call"])  # type: ignore[list-item]


# ---- looking


@pytest.mark.parametrize(("value", "checks"), [(None, 0), ("", 0), ("0", 0), ("1", 1)])
def test_the_variable_that_makes_every_call_look(value: str | None, checks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLLOGUE_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("COLLOGUE_DEBUG", value)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    engine, looked = kernel_engine(), list[int]()
    monkeypatch.setattr(engine, "check", lambda: looked.append(1))
    monkeypatch.setattr(engine, "_launch", lambda ready, call, out: None)
    engine._ready["a call"] = cuda._Ready(None)  # type: ignore[index]
    engine.run(SimpleNamespace(signature="a call", bindable=True), Output())  # type: ignore[arg-type]
    assert len(looked) == checks


@pytest.mark.parametrize("value", [None, "log", "abort"])
def test_who_never_calls_hears_of_a_failure(value: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    aborted: list[int] = []
    monkeypatch.setattr(os, "abort", lambda: aborted.append(1))
    monkeypatch.delenv(workspace.ON_FAILURE, raising=False)
    if value is not None:
        monkeypatch.setenv(workspace.ON_FAILURE, value)
    with caplog.at_level(logging.CRITICAL):
        workspace.failed(ERROR)
    assert "its outputs and all later ones are undefined: late" in caplog.text
    assert aborted == [1] * (value == "abort")


@pytest.mark.parametrize(("adapter", "switch"), [(vllm, "COLLOGUE_VLLM"), (sglang, "COLLOGUE_SGLANG")])
@pytest.mark.parametrize("before", [None, "log"])
def test_engines_end_unless_they_are_told_otherwise(adapter: Any, switch: str, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, "flashinfer")
    monkeypatch.setenv(workspace.ON_FAILURE, before or "")
    if before is None:
        monkeypatch.delenv(workspace.ON_FAILURE)
    monkeypatch.setattr(collogue.flashinfer, "flashinfer_present", lambda: True)
    monkeypatch.setattr(collogue.flashinfer, "install", lambda: None)
    monkeypatch.setattr(adapter, "_registered", False, raising=False)
    adapter.register()
    assert os.environ[workspace.ON_FAILURE] == (before or "abort")


def test_communicators_on_several_streams_are_warned_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cuda, "_OPEN", set())

    def engine(stream: int, concurrent: int = 1) -> KernelEngine:
        made = kernel_engine()
        made.topology = dataclasses.replace(made.topology, world_size=2, concurrent=concurrent)
        made.workspace, made.stream = SimpleNamespace(), stream  # type: ignore[assignment]
        cuda._OPEN.add(made)
        return made

    first, second = engine(7), engine(7)
    for each in (first, second):
        each._look_at_others()
    assert caplog.records == []
    second.stream = 8
    for _ in range(2):
        second._look_at_others()
    (record,) = caplog.records
    assert "2 streams of cuda:0" in record.getMessage()
    assert "concurrent=2" in record.getMessage()
    caplog.clear()
    third = engine(9, concurrent=3)
    third._look_at_others()
    assert caplog.records == []


@pytest.mark.parametrize(("text", "seconds"), [(None, 600.0), ("", 600.0), ("12.5", 12.5)])
def test_seconds_that_engines_wait(text: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLLOGUE_TIMEOUT", raising=False)
    if text is not None:
        monkeypatch.setenv("COLLOGUE_TIMEOUT", text)
    assert workspace.timeout() == seconds


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_wrong_seconds_are_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLOGUE_TIMEOUT", text)
    with pytest.raises(ArgumentError, match=f"COLLOGUE_TIMEOUT is '{text}', expected seconds"):
        workspace.timeout()
