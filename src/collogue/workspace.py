"""The memory a communicator works in: slots in symmetric memory, control words, and the failure record.

Layout of a rank's symmetric buffer (kernels/protocol.cuh): control words in the first 4096 bytes, then four generations
of ``world_size`` slots of ``slot_bytes`` each.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from collogue.errors import CollectiveTimeout
from collogue.group import Group
from collogue.plan import GENERATIONS, slot_bytes
from collogue.topology import Topology

CONTROL_BYTES = 4096
#: A word that has not arrived, by bytes of a value (kernels/values.cuh).
SENTINELS = {2: 0x80008000, 4: 0x80000000}
_STAGES = {1: "the partial sums"}


class FailureRecord(ctypes.Structure):
    """Mirrors ``collogue::Failure``. ``kind``: 0 nothing, 1 this rank waited too long, 2 another rank stopped the group."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("kind", "rank", "late_rank", "call", "token", "stage", "waited_ms", "reserved")]


@dataclass
class Workspace:
    """Collective to make: every rank allocates, maps every rank's buffer, fills its slots with sentinels."""

    group: Group
    topology: Topology

    def __post_init__(self) -> None:
        self.slot_bytes = slot_bytes(self.topology)
        self.buffer = self.group.symmetric(CONTROL_BYTES + GENERATIONS * self.topology.world_size * self.slot_bytes)
        self._pinned = torch.zeros(ctypes.sizeof(FailureRecord), dtype=torch.uint8, pin_memory=True)
        self.failure = FailureRecord.from_address(self._pinned.data_ptr())
        self.failure_pointer = self._pinned.data_ptr()
        self.reset()

    @property
    def nbytes(self) -> int:
        """Device memory held on this rank."""
        return self.buffer.local.numel()

    def reset(self) -> None:
        """Clean slots, zero control words, forget failures. Collective; no kernel of any rank may be running."""
        self.group.barrier()
        self.buffer.local[:CONTROL_BYTES].zero_()
        sentinel = SENTINELS[self.topology.dtype.itemsize]
        self.buffer.local[CONTROL_BYTES:].view(torch.int32).fill_(sentinel - (1 << 32))
        ctypes.memset(self.failure_pointer, 0, ctypes.sizeof(FailureRecord))
        torch.cuda.synchronize(self.group.device)
        self.group.barrier()

    def raise_failure(self) -> None:
        """Raise what a kernel wrote into the failure record."""
        f = self.failure
        hint = "call comm.reset() on every rank to use the communicator again; if a rank has died, make a new one without it"
        if f.kind == 2:
            raise CollectiveTimeout(f"rank {f.late_rank} gave up waiting and stopped the group at call {f.call}", hint=hint)
        # The kernel looks once more before it names a rank: by then the words may have come.
        late = f"rank {f.late_rank}" if f.late_rank < self.topology.world_size else "a rank that came while this was written"
        raise CollectiveTimeout(
            f"rank {f.rank} waited {f.waited_ms / 1000:.1f} s for {_STAGES.get(f.stage, f.stage)} of {late}, "
            f"call {f.call}, token {f.token}",
            hint=hint,
        )
