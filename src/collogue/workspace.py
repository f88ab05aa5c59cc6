"""The memory a communicator works in: slots in symmetric memory, control words, and the failure record.

Layout of a rank's symmetric buffer (kernels/protocol.cuh): control words, headers and the journal in the first 4096 bytes,
then two generations of ``generation_bytes`` each.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from collogue import header
from collogue.errors import CollectiveTimeout, MismatchedCall
from collogue.group import Group
from collogue.plan import GENERATIONS, generation_bytes
from collogue.topology import Topology

CONTROL_BYTES = 4096
#: A word that has not arrived, by bytes of a value (kernels/values.cuh).
SENTINELS = {2: 0x80008000, 4: 0x80000000}
_STAGES = {1: "the partial sums", 2: "the reduced rows", 3: "the start"}
HEADERS_OFFSET, HEADERS, MAX_RANKS = 256, 4, 8
JOURNAL_OFFSET, JOURNAL = 2048, 64
TIMEOUT, MISMATCH = 1, 2


class FailureRecord(ctypes.Structure):
    """Mirrors ``collogue::Failure``. ``fault``: 0 nothing, 1 a wait took too long, 2 calls do not match; ``rank`` found it."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("fault", "rank", "late_rank", "call", "token", "stage", "waited_ms", "reserved")]


@dataclass
class Workspace:
    """Collective to make: every rank allocates, maps every rank's buffer, fills its slots with sentinels."""

    group: Group
    topology: Topology

    def __post_init__(self) -> None:
        self.generation_bytes = generation_bytes(self.topology)
        self.buffer = self.group.symmetric(CONTROL_BYTES + GENERATIONS * self.generation_bytes)
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
        mine, named = f.rank == self.group.rank, f.late_rank < self.topology.world_size
        if f.fault == MISMATCH:
            sides = self._headers(f.call) if mine else self._headers(f.call) or self._headers(f.call - 1)
            text = "; ".join(f"rank {rank} made {header}" for rank, header in sides.items())
            raise MismatchedCall(f"ranks made different calls: {text or f'rank {f.rank} says so at call {f.call}'}", hint=hint)
        if not mine:
            raise CollectiveTimeout(f"rank {f.rank} gave up waiting and stopped the group at call {f.call}", hint=hint)
        # The kernel looks once more before it names a rank: by then the words may have come.
        late = f"rank {f.late_rank}" if named else "a rank that came while this was written"
        sides = self._headers(f.call)
        own = sides.get(f.rank)
        raise CollectiveTimeout(
            f"rank {f.rank} waited {f.waited_ms / 1000:.1f} s for {_STAGES.get(f.stage, f.stage)} of {late}, "
            f"call {f.call}, token {f.token}" + (f" ({own}; {late} made {sides.get(f.late_rank, 'no such call')})" if own else ""),
            hint=hint,
        )

    def control_words(self) -> torch.Tensor:
        """The control words as they are now, on the CPU (int32), over a stream of their own: kernels may be running."""
        stream = torch.cuda.Stream(self.group.device)  # type: ignore[no-untyped-call]
        words = torch.empty(CONTROL_BYTES // 4, dtype=torch.int32, pin_memory=True)
        with torch.cuda.stream(stream):
            words.copy_(self.buffer.local[:CONTROL_BYTES].view(torch.int32), non_blocking=True)
        stream.synchronize()
        return words

    def _headers(self, call: int) -> dict[int, str]:
        """What each rank made as its call of this number, as far as it is known here."""
        words = self.control_words()
        found = {}
        for rank in range(self.topology.world_size):
            first = HEADERS_OFFSET // 4 + (call % HEADERS * MAX_RANKS + rank) * header.HEADER_WORDS
            one = [w & 0xFFFFFFFF for w in words[first : first + header.HEADER_WORDS].tolist()]
            if one[0] == call + 1:
                found[rank] = header.text(one)
        return found
