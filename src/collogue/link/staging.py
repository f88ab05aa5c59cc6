"""Host memory in which bytes of a GPU lie while they travel by sockets."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_ALIGNMENT = 256


class Staging:
    """Page-locked memory of one rank, kept between calls: a GPU copies to and from it by itself, and it is mapped already.

    A call's bytes stay until the next call of :meth:`blocks`. Not for two threads at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._last: torch.cuda.Event | None = None

    def blocks(self, sizes: Iterable[int]) -> list[torch.Tensor]:
        """A block of so many bytes for each of ``sizes``. Waits for the copies of the call before."""
        if self._last is not None:
            self._last.synchronize()
        ends, end = [], 0
        for size in sizes:
            ends.append((end, size))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        if self._memory.numel() < end:
            self._memory = torch.empty(1 << (end - 1).bit_length(), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return [self._memory[begin : begin + size] for begin, size in ends]

    def fetch(self, tensors: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy bytes of the device into blocks, each pair (block, bytes); they are there on return."""
        for block, given in tensors:
            block.copy_(given, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def bring(self, tensors: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy blocks to the device, each pair (bytes, block), in the order of the current stream."""
        for target, block in tensors:
            target.copy_(block, non_blocking=True)
        if self._device.type == "cuda":
            self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._last.record(torch.cuda.current_stream(self._device))
