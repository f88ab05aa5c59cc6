"""Exchanges that NCCL queues on the GPU of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class NcclQueue:
    """A :class:`.Queue` of one process group. Its events are PyTorch's, without times, and used again."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._free: list[Any] = []

    def swap(self, given: list[torch.Tensor], taken: list[torch.Tensor]) -> None:
        """``taken[r]`` of rank r from its ``given[this rank]``, bytes, of which nothing is for the rank itself."""
        dist.all_to_all(taken, given, group=self._group)

    def event(self) -> Any:
        try:
            event = self._free.pop()
        except IndexError:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def free(self, events: Sequence[Any]) -> None:
        self._free.extend(events)

    def enter_thread(self) -> None:
        """To ask for an event must not end a capture of another thread."""
        from cuda.bindings import driver

        driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        torch.cuda.set_device(self._device)

    def abort(self) -> None:
        self._group._get_backend(self._device).abort()  # PyTorch's watchdog looks at errors of aborted calls no more
