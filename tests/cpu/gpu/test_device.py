"""The reader of device memory and the loading of kernels, with a stand-in for CUDA's driver: what is asked of it, in which order."""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as real

from collogue.errors import ClosedError, PlatformError
from collogue.gpu import device, jit, launch
from collogue.planning.plan import LaunchShape

CONTEXT, STREAM, KERNEL, FUNCTION = 77, 5, 31, 32
CUBIN = b"\x7fELF\x02\x01"
OK, BAD = real.CUresult.CUDA_SUCCESS, real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS


class Driver:
    """Knows one GPU; ``asked`` holds the calls. Functions named in ``refused`` return an error, those in ``absent`` are not there."""

    CUstream_flags = real.CUstream_flags
    CUstreamCaptureMode = real.CUstreamCaptureMode

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.refused: set[str] = set()
        self.absent: set[str] = set()
        self.pushed = 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            if name in self.absent:
                raise RuntimeError(f"Function {name} not found")
            self.asked.append((name, *arguments))
            return (BAD,) if name in self.refused else (OK, *self._answer(name, arguments))

        return function

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "cuMemcpyDtoHAsync":
            ctypes.memmove(*arguments[:3])
        self.pushed += (name == "cuCtxPushCurrent") - (name == "cuCtxPopCurrent")
        values = {
            "cuDeviceGet": (3,),
            "cuDevicePrimaryCtxRetain": (CONTEXT,),
            "cuCtxGetCurrent": (CONTEXT,),
            "cuStreamCreate": (STREAM,),
            "cuThreadExchangeStreamCaptureMode": (real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL,),
            "cuKernelGetFunction": (FUNCTION,),
        }
        return values.get(name, ())

    def names(self) -> list[str]:
        return [name for name, *_ in self.asked]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake, empty = Driver(), torch.empty
    monkeypatch.setattr(device, "driver", fake)
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **kwargs: empty(*sizes, **kwargs))
    return fake


def test_a_reader_copies_over_a_stream_of_its_own(driver: Driver) -> None:
    reader = device.Reader(3, 64)
    assert ("cuStreamCreate", int(real.CUstream_flags.CU_STREAM_NON_BLOCKING)) in driver.asked
    memory = ctypes.create_string_buffer(bytes(range(32)))
    driver.asked.clear()
    assert reader.read(ctypes.addressof(memory) + 2, 8) == bytes(range(2, 10))
    assert driver.names() == [
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent",
        "cuThreadExchangeStreamCaptureMode",
        "cuMemcpyDtoHAsync",
        "cuStreamSynchronize",
        "cuThreadExchangeStreamCaptureMode",
        "cuCtxPopCurrent",
        "cuDevicePrimaryCtxRelease",
    ]
    assert [asked[-1] for asked in driver.asked if asked[0] in ("cuMemcpyDtoHAsync", "cuStreamSynchronize")] == [STREAM, STREAM]
    modes = [asked[1] for asked in driver.asked if asked[0] == "cuThreadExchangeStreamCaptureMode"]
    assert modes == [real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED, real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL]


@pytest.mark.parametrize("step", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuMemcpyDtoHAsync", "cuStreamSynchronize"])
def test_what_cannot_be_read_is_empty(driver: Driver, step: str) -> None:
    reader = device.Reader(3, 64)
    driver.refused.add(step)
    assert reader.read(0x1000, 0) == b""
    assert driver.pushed == 0
    assert driver.names().count("cuDevicePrimaryCtxRelease") == driver.names().count("cuDevicePrimaryCtxRetain") - (
        step == "cuDevicePrimaryCtxRetain"
    )


def test_a_closed_reader_reads_nothing(driver: Driver) -> None:
    reader = device.Reader(3, 64)
    reader.close()
    reader.close()
    assert [asked for asked in driver.asked if asked[0] == "cuStreamDestroy"] == [("cuStreamDestroy", STREAM)]
    with pytest.raises(ClosedError):
        reader.read(0x1000, 8)
    assert "cuMemcpyDtoHAsync" not in driver.names()


def test_a_reader_that_is_dropped_gives_its_stream_back(driver: Driver) -> None:
    reader = device.Reader(3, 64)
    del reader
    gc.collect()
    assert [asked for asked in driver.asked if asked[0] == "cuStreamDestroy"] == [("cuStreamDestroy", STREAM)]


@pytest.fixture
def loader(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """``jit.load`` finds one kernel on GPU 3."""
    kernel = SimpleNamespace(handle=KERNEL)
    core = SimpleNamespace(ObjectCode=SimpleNamespace(from_cubin=lambda code: SimpleNamespace(get_kernel=lambda name: kernel)))
    monkeypatch.setattr(jit, "_cuda_core", lambda: core)
    monkeypatch.setattr(jit, "_LOADED", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(real, "cuKernelGetFunction", lambda kernel: driver.cuKernelGetFunction(int(kernel)))
    monkeypatch.setattr(real, "cuFuncLoad", lambda function: driver.cuFuncLoad(function))
    return driver


def test_a_kernel_is_loaded_at_once(loader: Driver) -> None:
    assert jit.load(CUBIN, "k").handle == KERNEL
    pushed, popped = loader.names().index("cuCtxPushCurrent"), loader.names().index("cuCtxPopCurrent")
    assert loader.asked[pushed + 1 : popped] == [("cuKernelGetFunction", KERNEL), ("cuFuncLoad", FUNCTION)]
    assert ("cuDeviceGet", 3) in loader.asked


def test_a_kernel_is_loaded_once_and_stays(loader: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, name, gpu in ((CUBIN, "k", 3), (CUBIN, "k", 3), (CUBIN, "other", 3), (CUBIN + b"another", "k", 3), (CUBIN, "k", 4)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda gpu=gpu: gpu)
        assert jit.load(code, name).handle == KERNEL
    assert loader.names().count("cuFuncLoad") == 4


def test_a_driver_without_the_last_step_is_enough(loader: Driver) -> None:
    loader.absent.add("cuFuncLoad")
    assert jit.load(CUBIN, "k").handle == KERNEL


@pytest.mark.parametrize("step", ["cuKernelGetFunction", "cuFuncLoad"])
def test_a_kernel_that_cannot_be_loaded_is_an_error(loader: Driver, step: str) -> None:
    loader.refused.add(step)
    with pytest.raises(PlatformError, match="ILLEGAL_ADDRESS"):
        jit.load(CUBIN, "k")
    assert loader.pushed == 0


# ---- launching


@pytest.fixture
def launcher(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its ``errors`` are what the driver returns, launch by launch."""
    errors: list[Any] = []
    monkeypatch.setattr(launch.driver, "cuLaunchKernelEx", lambda *arguments: (errors.pop(0),))
    made: Any = launch.Launcher(SimpleNamespace(handle=KERNEL), LaunchShape(128, 1, 1, 1), dependent=False)
    made.errors = errors
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return made


def test_a_thread_that_has_used_no_gpu_gets_a_context(launcher: Any, driver: Driver) -> None:
    launcher.errors += [real.CUresult.CUDA_ERROR_INVALID_CONTEXT, OK]
    launcher(STREAM)
    assert not launcher.errors
    assert driver.asked[-1] == ("cuCtxSetCurrent", CONTEXT)
    assert driver.pushed == 0


@pytest.mark.parametrize("errors", [[BAD], [real.CUresult.CUDA_ERROR_INVALID_CONTEXT, BAD]], ids=["at once", "with a context"])
def test_a_refused_launch_is_an_error(launcher: Any, errors: list[Any]) -> None:
    launcher.errors += errors
    with pytest.raises(PlatformError, match="ILLEGAL_ADDRESS"):
        launcher(STREAM)
    assert not launcher.errors
