"""The memory a communicator works in: slots in symmetric memory, control words, and the failure record.

Layout of a rank's symmetric buffer (kernels/protocol.cuh): control words, marks and the journal in the first 4096 bytes, then the
generations (:class:`collogue.extent.Extent`).
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from dataclasses import dataclass, replace

import torch
from cuda.bindings import driver

from collogue.errors import CollectiveError, CollectiveTimeout, CorruptedWorkspace, MismatchedCall, PlatformError
from collogue.extent import CONTROL_BYTES, workspace_extent
from collogue.group import Group
from collogue.header import ENTRY_BYTES, Entry
from collogue.journal import Journal, default_path
from collogue.topology import Topology

#: A word that has not arrived, by bytes of a value (kernels/values.cuh).
SENTINELS = {2: 0x80008000, 4: 0x80000000}
#: What a wait was for, by ``collogue::Stage``.
_STAGES = ("the partial sums", "the reduced rows", "the start", "the call before")
#: Bytes of ``collogue::Control``, and where the marks and the journal lie; between them, canaries.
CONTROL_WORDS = 32
MARKS_OFFSET, MARKS, MAX_RANKS = 256, 4, 8
JOURNAL_OFFSET, JOURNAL = 2048, 64
_CANARY = b"\xc0\x11\x09\xbe"
TIMEOUT, MISMATCH = 1, 2


class FailureRecord(ctypes.Structure):
    """Mirrors ``collogue::Failure``. ``fault``: 0 nothing, 1 a wait took too long, 2 calls do not match; ``rank`` found it."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("fault", "rank", "late_rank", "call", "token", "stage")]


@dataclass(frozen=True)
class Control:
    """The control words of one rank: calls started, stop word, marks ``[call % 4][rank]`` of (number, hash), canaries."""

    calls: int
    stop: int
    marks: tuple[tuple[tuple[int, int], ...], ...]
    canaries: bytes

    @classmethod
    def of(cls, page: bytes) -> Control:
        words = struct.unpack(f"<{len(page) // 4}I", page)
        first = MARKS_OFFSET // 4
        marks = tuple(
            tuple((words[first + 2 * (m * MAX_RANKS + r)], words[first + 2 * (m * MAX_RANKS + r) + 1]) for r in range(MAX_RANKS))
            for m in range(MARKS)
        )
        canaries = page[CONTROL_WORDS:MARKS_OFFSET] + page[MARKS_OFFSET + MARKS * MAX_RANKS * 8 :]
        return cls(words[1], words[2], marks, canaries)


def clean_control() -> bytearray:
    """The first bytes of a workspace in which nothing has been called: zeros, and canaries between them."""
    page = bytearray(_CANARY * (CONTROL_BYTES // len(_CANARY)))
    marks_end = MARKS_OFFSET + MARKS * MAX_RANKS * 8
    for first, end in ((0, CONTROL_WORDS), (MARKS_OFFSET, marks_end), (JOURNAL_OFFSET, CONTROL_BYTES)):
        page[first:end] = bytes(end - first)
    return page


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
        self.buffer.local[:CONTROL_BYTES].copy_(torch.frombuffer(clean_control(), dtype=torch.uint8))
        sentinel = SENTINELS[self.topology.dtype.itemsize]
        self.buffer.local[CONTROL_BYTES:].view(torch.int32).fill_(sentinel - (1 << 32))
        ctypes.memset(self.failure_pointer, 0, ctypes.sizeof(FailureRecord))
        torch.cuda.synchronize(self.group.device)
        self.group.barrier()

    def raise_failure(self, control: Control | None = None) -> None:
        """Raise what a kernel wrote into the failure record, or else what ``control`` says, and write the journal."""
        f = self.failure
        record = None
        if f.fault:
            record = {name: int(getattr(f, name)) for name, *_ in FailureRecord._fields_}
        elif control is not None:
            record = self._found_in(control)
        if record is None:
            return
        kind, text, journal = self._describe(record)
        path = default_path(self.group.rank)
        with contextlib.suppress(OSError):
            replace(journal, error=text).save(path)
        hint = "call comm.reset() on every rank; if a rank has died, comm.close(collective=False) and make a communicator without it"
        raise kind(text, hint=f"{hint}. Journal: collogue doctor --journal {path}")

    def _describe(self, record: dict[str, int]) -> tuple[type[CollectiveError], str, Journal]:
        rank, call, late = record["rank"], record["call"], record["late_rank"]
        journal = self.journal(record)
        made = {r: next((entry.text for entry in entries if entry.call == call), None) for r, entries in journal.calls.items()}
        if record["fault"] == MISMATCH:
            sides = "; ".join(f"rank {r} made {text}" for r, text in made.items() if text is not None)
            return MismatchedCall, f"the ranks' calls number {call} differ, rank {rank} found: {sides}", journal
        own = f" ({made[self.group.rank]})" if made.get(self.group.rank) else ""
        if rank != self.group.rank:
            return CollectiveTimeout, f"rank {rank} gave up waiting and stopped the group at call {call}{own}", journal
        theirs = f"made {made[late]}" if made.get(late) else "made no such call"
        waited = (
            f"rank {rank} waited {self.timeout:g} s for {_STAGES[record['stage']]} of rank {late}, call {call}, token {record['token']}"
        )
        return CollectiveTimeout, f"{waited}{own}; rank {late} {theirs}", journal

    def _found_in(self, control: Control) -> dict[str, int] | None:
        """A fault that no kernel of this rank has recorded: another rank's stop word, or marks of the last call that differ."""
        rank, world = self.group.rank, self.topology.world_size
        if control.stop:
            return {
                "fault": control.stop >> 8,
                "rank": (control.stop & 0xFF) - 1,
                "late_rank": world,
                "call": control.calls - 1,
                "token": 0,
                "stage": 0,
            }
        if control.calls:
            marks = control.marks[(control.calls - 1) % MARKS]
            for other in range(world):
                if marks[other][0] == marks[rank][0] == control.calls and marks[other][1] != marks[rank][1]:
                    return _record(MISMATCH, rank, other, control.calls - 1)
        return None

    def control(self) -> Control:
        """The control words as they are now. Kernels may be running."""
        page = self._read(self.buffer.pointers[self.group.rank], JOURNAL_OFFSET)
        if not page:
            raise PlatformError("this rank's own workspace cannot be read", hint="an earlier CUDA error has ended this process's context")
        return Control.of(page)

    def check_canaries(self, control: Control) -> None:
        """Raise :class:`CorruptedWorkspace` where something has written between the control words."""
        if control.canaries != _CANARY * (len(control.canaries) // len(_CANARY)):
            raise CorruptedWorkspace(
                f"rank {self.group.rank}'s control words have been written over",
                hint="something on this GPU, or a peer, writes outside its memory: run it under compute-sanitizer; then comm.reset()",
            )

    def journal(self, record: dict[str, int] | None = None) -> Journal:
        """The last calls of every rank as they are now. Kernels may be running; a process may have died."""
        calls = {}
        for rank, pointer in enumerate(self.buffer.pointers):
            words = self._read(pointer + JOURNAL_OFFSET, JOURNAL * ENTRY_BYTES)
            entries = (Entry.of(words[i : i + ENTRY_BYTES]) for i in range(0, len(words), ENTRY_BYTES))
            calls[rank] = tuple(sorted(filter(None, entries), key=lambda entry: entry.call))
        started = max((entry.call + 1 for entry in calls[self.group.rank]), default=0)
        return Journal(self.group.rank, self.topology.world_size, started, calls, record)

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


def _record(fault: int, rank: int, late_rank: int, call: int) -> dict[str, int]:
    return {"fault": fault, "rank": rank, "late_rank": late_rank, "call": call, "token": 0, "stage": 0}
