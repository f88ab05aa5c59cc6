"""Floors, by small kernels of our own (kernels/floor.cuh): an empty kernel, one word to and from every peer, bytes on the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from collogue.gpu import jit
from collogue.gpu.launch import Launcher, timeouts
from collogue.group import Group
from collogue.planning.architecture import has_clusters
from collogue.planning.plan import LaunchShape

EMPTY, EXCHANGE, WIRE = "empty kernel", "one-word exchange", "wire"
#: Bytes that leave each rank in one call of the wire floor.
WIRE_BYTES = 64 << 20
#: Where kernels/floor.cuh keeps its words, in bytes.
_STRIDE, _COUNTER, _LATE, _DATA = 128, 2048, 2176, 4096
_TIMEOUT = 5.0


def source(world_size: int) -> str:
    """The translation unit of all floors."""
    bodies = {"empty": "empty_floor()", "exchange": f"exchange_floor<{world_size}>(p)", "wire": f"wire_floor<{world_size}>(p)"}
    return '#include "floor.cuh"\n' + "".join(
        f'extern "C" __global__ void __launch_bounds__(512) collogue_floor_{name}(const __grid_constant__ collogue::Params p) {{\n'
        f"  collogue::{body};\n"
        "}\n"
        for name, body in bodies.items()
    )


class _Floor:
    """One kernel as a subject of timing."""

    repeatable = True

    def __init__(self, launcher: Launcher, device: torch.device, spoil: Callable[[], None], wrong: Callable[[], str | None]) -> None:
        self._launcher, self._device, self._spoil, self._wrong = launcher, device, spoil, wrong

    def call(self, turn: int) -> None:
        self._launcher(torch.cuda.current_stream(self._device).cuda_stream)

    def gate(self, run: Callable[[], None]) -> str | None:
        self._spoil()
        torch.cuda.synchronize(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return self._wrong()


class Floors:
    """The floors of one group. Making it is collective, and so is every call of ``exchange``."""

    def __init__(self, group: Group, architecture: str) -> None:
        self._group = group
        self._slot_bytes = WIRE_BYTES // (group.size - 1) // 4096 * 4096
        self._buffer = group.symmetric(_DATA + group.size * self._slot_bytes)
        self._code, _ = jit.compile_source(source(group.size), architecture, "collogue_floors")
        self._dependent = has_clusters(architecture)
        multiprocessors = torch.cuda.get_device_properties(group.device).multi_processor_count
        self._seen = self._count()
        self.subjects = {
            EMPTY: self._floor("empty", 32, 1, lambda: None, lambda: None),
            EXCHANGE: self._floor("exchange", 32, 1, self._note_count, self._wrong_words),
            WIRE: self._floor("wire", 512, multiprocessors, self._spoil_data, self._wrong_data),
        }

    @property
    def bytes_sent(self) -> int:
        """Bytes that leave this rank in one call of the wire floor."""
        return (self._group.size - 1) * self._slot_bytes

    def _floor(self, name: str, threads: int, ctas: int, spoil: Callable[[], None], wrong: Callable[[], str | None]) -> _Floor:
        kernel: Any = jit.load(self._code, f"collogue_floor_{name}")
        shape = LaunchShape(threads=threads, vectors=1, cluster=1, clusters=ctas)
        launcher = Launcher(kernel, shape, dependent=self._dependent)
        params = launcher.params
        params.rank, params.slot_bytes = self._group.rank, self._slot_bytes
        params.timeout, params.relay_timeout = timeouts(_TIMEOUT)
        for rank, pointer in enumerate(self._buffer.pointers):
            params.workspace[rank] = pointer
        return _Floor(launcher, self._group.device, spoil, wrong)

    def _word(self, offset: int) -> int:
        return int(self._buffer.local[offset : offset + 4].view(torch.int32))

    def _count(self) -> int:
        return self._word(_COUNTER)

    def _note_count(self) -> None:
        self._seen = self._count()

    def _wrong_words(self) -> str | None:
        count, peers = self._count(), [r for r in range(self._group.size) if r != self._group.rank]
        if self._word(_LATE):
            return f"a peer was late in call {self._word(_LATE)}"
        if count == self._seen:
            return "no call was counted"
        words = [self._word(_STRIDE * r) for r in peers]
        return None if all(w - count in (0, 1) for w in words) else f"call {count} ended with the words {words}"

    def _data(self) -> torch.Tensor:
        return self._buffer.local[_DATA:].view(torch.int32).view(self._group.size, -1)

    def _spoil_data(self) -> None:
        self._data().fill_(-1)
        torch.cuda.synchronize(self._group.device)
        self._group.barrier()

    def _wrong_data(self) -> str | None:
        self._group.barrier()
        wrong = [r for r, row in enumerate(self._data()) if r != self._group.rank and not bool((row == r + 1).all())]
        return f"the bytes of ranks {wrong} did not arrive" if wrong else None
