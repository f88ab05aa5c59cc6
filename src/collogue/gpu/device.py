"""One GPU through CUDA's driver: its context, and a reader of its memory that waits for no kernel."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from cuda.bindings import driver

from collogue.errors import ClosedError, PlatformError


def checked(result: tuple[Any, ...]) -> Any:
    """What a driver function returned beside its error. Raises :class:`PlatformError` where there is one."""
    error, *values = result
    if error:
        raise PlatformError(f"the CUDA driver says {error!r}", hint="an earlier CUDA error may have ended this process's context")
    return values[0] if values else None


@contextlib.contextmanager
def on_device(index: int) -> Iterator[None]:
    """PyTorch's context of GPU ``index`` is current inside, also in a thread that has used no GPU before."""
    gpu = checked(driver.cuDeviceGet(index))
    context = checked(driver.cuDevicePrimaryCtxRetain(gpu))
    try:
        checked(driver.cuCtxPushCurrent(context))
        try:
            yield
        finally:
            driver.cuCtxPopCurrent()
    finally:
        driver.cuDevicePrimaryCtxRelease(gpu)


def use_device(index: int) -> None:
    """PyTorch's context of GPU ``index`` is current from now on, in a thread that has used no GPU before."""
    with on_device(index):
        context = checked(driver.cuCtxGetCurrent())
    checked(driver.cuCtxSetCurrent(context))


@contextlib.contextmanager
def _beside_captures() -> Iterator[None]:
    """What is done inside is not part of a graph that is being captured, in this thread or another, and does not end the capture."""
    mode = checked(driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


class Reader:
    """Copies up to ``most`` bytes of device memory to the host while kernels spin.

    It has a stream of its own that waits for no other, the null stream included (PyTorch's streams are shared: a user's kernel may spin
    on any of them), and pinned memory of its own (to allocate some may wait for the GPU). Any thread may read. The stream goes with
    :meth:`close` or with the object.
    """

    def __init__(self, index: int, most: int) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._target = torch.empty(most, dtype=torch.uint8, pin_memory=True)
        with on_device(index):
            self._stream: Any = checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value))
        self._destroy = weakref.finalize(self, _destroy, index, self._stream)
        self._destroy.atexit = False

    def read(self, pointer: int, nbytes: int) -> bytes:
        """The bytes at ``pointer``; empty where they cannot be had. Raises :class:`ClosedError` once the reader is closed."""
        assert nbytes <= self._target.numel()
        address = self._target.data_ptr()
        with self._lock, contextlib.suppress(PlatformError):
            if self._stream is None:  # by another thread, between the look at the communicator and this one
                raise ClosedError("the communicator is closed", hint="make a new collogue.Communicator")
            with on_device(self._index), _beside_captures():
                checked(driver.cuMemcpyDtoHAsync(address, pointer, nbytes, self._stream))
                checked(driver.cuStreamSynchronize(self._stream))
                return ctypes.string_at(address, nbytes)
        return b""

    def close(self) -> None:
        """Destroy the stream; nothing can be read any more."""
        with self._lock:
            self._stream = None
            self._destroy()


def _destroy(index: int, stream: Any) -> None:
    with contextlib.suppress(PlatformError), on_device(index):
        checked(driver.cuStreamDestroy(stream))
