"""The order of a communicator's calls on several streams: they use one workspace in turn."""

from __future__ import annotations

import torch
from cuda.bindings import driver

from collogue.errors import CaptureError


class StreamOrder:
    """Makes each call wait for the one before it, where that was queued on another stream.

    Streams of PyTorch's pool and the default stream live as long as the process; an event is recorded on the old one when a call comes
    on a new one. A stream that PyTorch did not make may be destroyed, and another may then have its handle: the event is recorded right
    behind each call on such a stream, and every call there waits for the call before.

    ``stream``: where the last call was queued, if a call there need not wait for anything.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self.stream: int | None = None
        self._event: torch.cuda.Event | None = None  # behind the last call, where `stream` is None and there was a call

    def enter(self, stream: int) -> None:
        """Before a call on ``stream``, the current one. Raises :class:`CaptureError` where the last call's stream is being captured."""
        if stream == self.stream:
            return
        if self.stream is not None:
            error, status = driver.cuStreamIsCapturing(driver.CUstream(self.stream))
            if error or status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
                raise CaptureError(
                    "the stream of this communicator's last call is being captured, and this call is on another stream",
                    hint="end the capture first, or make the call on the stream of the last one",
                )
            self._record(self.stream)
        if self._event is not None:
            self._event.wait(torch.cuda.ExternalStream(stream, device=self._index))  # type: ignore[no-untyped-call]
        self.stream = stream

    def leave(self, stream: int) -> None:
        """Behind the call."""
        if _may_be_destroyed(self._index, stream):
            self._record(stream)
            self.stream = None

    def _record(self, stream: int) -> None:
        if self._event is None:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.ExternalStream(stream, device=self._index))  # type: ignore[no-untyped-call]


class AnyOrder:
    """Of calls that share no memory: none waits for another."""

    def __init__(self) -> None:
        self.stream: int | None = None

    def enter(self, stream: int) -> None:
        """Before a call."""
        self.stream = stream

    def leave(self, stream: int) -> None:
        """Behind the call."""


def _may_be_destroyed(index: int, stream: int) -> bool:
    """Whether the current stream, with this handle, is one that PyTorch did not make: such a stream's id is its handle."""
    return stream != 0 and int(torch._C._cuda_getCurrentStream(index)[0]) == stream
