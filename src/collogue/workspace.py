"""The memory a communicator works in: slots in symmetric memory, control words, and the failure record.

Layout of a rank's symmetric buffer (kernels/protocol.cuh): control words, marks and the journal in the first 4096 bytes, then the
generations (:class:`collogue.plan.Extent`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from cuda.bindings import driver

from collogue.errors import CollectiveTimeout, MismatchedCall
from collogue.group import Group
from collogue.header import ENTRY_BYTES, Entry
from collogue.plan import CONTROL_BYTES, workspace_extent
from collogue.topology import Topology

#: A word that has not arrived, by bytes of a value (kernels/values.cuh).
SENTINELS = {2: 0x80008000, 4: 0x80000000}
#: What a wait was for, by ``collogue::Stage``.
_STAGES = ("the partial sums", "the reduced rows", "the start", "the call before")
JOURNAL_OFFSET, JOURNAL = 2048, 64
TIMEOUT, MISMATCH = 1, 2


class FailureRecord(ctypes.Structure):
    """Mirrors ``collogue::Failure``. ``fault``: 0 nothing, 1 a wait took too long, 2 calls do not match; ``rank`` found it."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("fault", "rank", "late_rank", "call", "token", "stage")]


@dataclass
class Workspace:
    """Collective to make: every rank allocates, maps every rank's buffer, fills its slots with sentinels."""

    group: Group
    topology: Topology
    timeout: float

    def __post_init__(self) -> None:
        self.extent = workspace_extent(self.topology)
        self.buffer = self.group.symmetric(self.extent.total)
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
        made = {rank: journal.get(f.call) for rank, journal in self.journals().items()}
        if f.fault == MISMATCH:
            sides = "; ".join(f"rank {rank} made {call.text}" for rank, call in made.items() if call is not None)
            raise MismatchedCall(f"the ranks' calls {f.call} differ, says rank {f.rank}: {sides}", hint=hint)
        own = made.get(self.group.rank)
        text = f" ({own.text})" if own is not None else ""
        if f.rank != self.group.rank:
            raise CollectiveTimeout(f"rank {f.rank} gave up waiting and stopped the group at call {f.call}{text}", hint=hint)
        theirs = made.get(f.late_rank)
        raise CollectiveTimeout(
            f"rank {f.rank} waited {self.timeout:g} s for {_STAGES[f.stage]} of rank {f.late_rank}, call {f.call}, token {f.token}{text}; "
            f"rank {f.late_rank} " + (f"made {theirs.text}" if theirs is not None else "made no such call"),
            hint=hint,
        )

    def journals(self) -> dict[int, dict[int, Entry]]:
        """The last calls of every rank, by rank and call number, as they are now. Kernels may be running; a process may have died."""
        found = {}
        for rank, pointer in enumerate(self.buffer.pointers):
            words = self._read(pointer + JOURNAL_OFFSET, JOURNAL * ENTRY_BYTES)
            entries = (Entry.of(words[i : i + ENTRY_BYTES]) for i in range(0, len(words), ENTRY_BYTES))
            found[rank] = {entry.call: entry for entry in sorted(filter(None, entries), key=lambda entry: entry.call)}
        return found

    def _read(self, pointer: int, nbytes: int) -> bytes:
        """Bytes of device memory, over a stream of their own. Empty where they cannot be had."""
        with torch.cuda.device(self.group.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            (error,) = driver.cuMemcpyDtoHAsync(target.data_ptr(), pointer, nbytes, stream.cuda_stream)
            if error:
                return b""
            stream.synchronize()
        return bytes(target.tolist())
