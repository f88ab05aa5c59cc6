"""The memory a communicator works in: slots in symmetric memory, control words, and the failure record.

Layout of a rank's symmetric buffer (kernels/protocol.cuh): control words, call signatures and the journal in the first 4096 bytes, then the
generations (:class:`collogue.planning.extent.Extent`).
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import time
import weakref
from dataclasses import dataclass, replace

import torch

from collogue import kernels
from collogue.errors import CollectiveError, CollectiveTimeout, CorruptedWorkspace, MismatchedCall, PlatformError
from collogue.gpu.device import Reader
from collogue.gpu.failure import MISMATCH, STAGES, TIMEOUT, FailureRecord, Record, finder_of, noted, stopped, with_stages
from collogue.gpu.header import ENTRY_BYTES, Entry
from collogue.gpu.journal import Journal, default_path
from collogue.group import Group
from collogue.planning.extent import CONTROL_BYTES, workspace_extent
from collogue.planning.topology import Topology

#: A word that has not arrived, by bytes of a value.
SENTINELS = {
    kernels.constant_of("values.cuh", of, "kBytes"): kernels.constant_of("values.cuh", of, "kSentinel") for of in ("BFloat16", "Float32")
}
_PROTOCOL, MAX_RANKS = kernels.constants("protocol.cuh"), kernels.constants("params.cuh")["kMaxWorld"]
#: Bytes of the control words, and where the marks, the notes, the bounds of uneven rows and the journal lie; between them, canaries.
CONTROL_WORDS = kernels.size_of("protocol.cuh", "Control")
MARKS_OFFSET, MARKS = _PROTOCOL["kMarksOffset"], _PROTOCOL["kMarks"]
NOTES_OFFSET = _PROTOCOL["kNotesOffset"]
NOTES_END = NOTES_OFFSET + MAX_RANKS * kernels.size_of("protocol.cuh", "Note")
BOUNDS_OFFSET, BOUNDS = _PROTOCOL["kBoundsOffset"], _PROTOCOL["kBounds"]
JOURNAL_OFFSET, JOURNAL = _PROTOCOL["kJournalOffset"], _PROTOCOL["kJournal"]
_CANARY = b"\xc0\x11\x09\xbe"
#: Seconds in which a kernel that has claimed the failure record fills it.
_FILLED = 0.01
_AFTER = "call comm.reset() on every rank; if a rank has died, comm.close(collective=False) and make a communicator without it"
_WRITTEN_OVER = "something on this GPU, or a peer, writes outside its memory: run it under compute-sanitizer; then comm.reset()"
_HINTS: dict[type[CollectiveError], str] = {CollectiveTimeout: _AFTER, MismatchedCall: _AFTER, CorruptedWorkspace: _WRITTEN_OVER}


@dataclass(frozen=True)
class Control:
    """The control words of one rank.

    Calls started, abort flag, what one-shot has left to be cleaned (twice 16 bits), who fills the failure record (1 + call), signatures
    ``[call % 4][rank]`` of (number, hash), notes ``[rank]`` of (call, what was found), canaries.
    """

    calls: int
    stop: int
    left: int
    claimed: int
    marks: tuple[tuple[tuple[int, int], ...], ...]
    notes: tuple[tuple[int, int], ...]
    canaries: bytes

    @classmethod
    def of(cls, page: bytes) -> Control:
        _, calls, stop, left, claimed = struct.unpack_from("<5I", page)
        pairs = [(int(a), int(b)) for a, b in struct.iter_unpack("<2I", page[MARKS_OFFSET:NOTES_END])]
        marks = tuple(tuple(pairs[m * MAX_RANKS : (m + 1) * MAX_RANKS]) for m in range(MARKS))
        canaries = page[CONTROL_WORDS:MARKS_OFFSET] + page[NOTES_END:BOUNDS_OFFSET]
        return cls(calls, stop, left, claimed, marks, tuple(pairs[MARKS * MAX_RANKS :]), canaries)

    @property
    def plausible(self) -> bool:
        """Whether kernels can have written this: canaries untouched, an even number of ones in either half of ``left``."""
        halves = self.left & 0xFFFF, self.left >> 16
        return self.canaries == _CANARY * (len(self.canaries) // len(_CANARY)) and not any(half.bit_count() % 2 for half in halves)

    def differing(self, rank: int, world: int) -> int | None:
        """The first of the last calls in which another rank's arguments differ from those of ``rank``, whose control words these are."""
        calls = []
        for marks in self.marks:
            number, mine = marks[rank]
            if number and any(theirs == number and digest != mine for theirs, digest in marks[:world]):
                calls.append(number - 1)
        return min(calls, default=None)


def clean_control() -> bytearray:
    """The first bytes of a workspace in which nothing has been called: zeros, and canaries between them."""
    page = bytearray(_CANARY * (CONTROL_BYTES // len(_CANARY)))
    for first, end in ((0, CONTROL_WORDS), (MARKS_OFFSET, NOTES_END), (BOUNDS_OFFSET, CONTROL_BYTES)):
        page[first:end] = bytes(end - first)
    return page


@dataclass(eq=False)
class Workspace:
    """Collective to make: every rank allocates, maps every rank's buffer, fills its slots with sentinels."""

    group: Group
    topology: Topology
    timeout: float
    name: str = "?"  #: of the communicator
    stream: int | None = None  #: of its last call

    def __post_init__(self) -> None:
        self.extent = workspace_extent(self.topology)
        with torch.inference_mode(False):  # else reset() would change tensors that may not be changed outside it
            self.buffer = self.group.symmetric(self.extent.total)
            self._pinned = torch.zeros(ctypes.sizeof(FailureRecord), dtype=torch.uint8, pin_memory=True)
        self.failure = FailureRecord.from_address(self._pinned.data_ptr())
        self.failure_pointer = self._pinned.data_ptr()
        assert self.group.device.index is not None
        self._reader = Reader(self.group.device.index, CONTROL_BYTES)
        self._saved: str | None = None
        self.reset()
        _OPEN.add(self)

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
        self._saved = None
        torch.cuda.synchronize(self.group.device)
        self.group.barrier()

    def close(self) -> None:
        """Nothing can be read any more. The memory goes with the object."""
        _OPEN.discard(self)
        self._reader.close()

    @property
    def failed(self) -> bool:
        """Whether a kernel of this rank has filled the failure record. One stopped without a fault names a late rank only."""
        return bool(self.failure.fault or self.failure.late_rank)

    def check(self) -> None:
        """Raise what a kernel of this rank has recorded, or else what its control words say. Kernels may be running."""
        control = self.control()
        self.raise_failure(control)
        if control is None:
            raise PlatformError("this rank's own workspace cannot be read", hint="an earlier CUDA error has ended this process's context")

    def raise_failure(self, control: Control | None) -> None:
        """Raise what the failure record or ``control`` says, and write the journal, once until :meth:`reset`.

        Where the arguments of one of the last calls differ, that is the error, also if a rank has waited too long in consequence.
        """
        found = self._recorded(control) or self._told(control)
        differing = control.differing(self.group.rank, self.topology.world_size) if control is not None else None
        written_over = control is not None and not self._plausible(control)
        if found is None and differing is None and not written_over:
            return
        journal = self.journal()
        kind, text = self._describe(journal, found, differing)
        if self._saved is None:
            path = default_path(self.group.rank)
            try:
                replace(journal, error=text).save(path)
                self._saved = f"Journal: collogue doctor --journal {path}"
            except OSError as error:
                self._saved = f"The journal could not be written: {error}"
        raise kind(text, hint=f"{_HINTS[kind]}. {self._saved}")

    def _recorded(self, control: Control | None = None) -> Record | None:
        """What a kernel of this rank has found, or was stopped by; then with what the finder has left in ``control``."""
        if not self.failure.fault:
            return None
        record = {name: int(getattr(self.failure, name)) for name, *_ in FailureRecord._fields_}
        if finder_of(record["fault"] << 8 | (record["rank"] + 1 & 0xFF), self.topology.world_size) != record["rank"]:
            return record | {"fault": 0}  # stopped by a word that no kernel writes
        return record if record["rank"] == self.group.rank or control is None else noted(record, control.notes, self.topology.world_size)

    def _told(self, control: Control | None) -> Record | None:
        """What this rank's abort flag says; fault 0 where it is none that a kernel writes."""
        if control is None or not control.stop:
            return None
        world = self.topology.world_size
        finder = finder_of(control.stop, world)
        fault, rank = (0, self.group.rank) if finder is None else (control.stop >> 8, finder)
        record = {"fault": fault, "rank": rank, "late_rank": world, "call": control.calls - 1, "token": 0, "stage": 0}
        return noted(record, control.notes, world)

    def _plausible(self, control: Control) -> bool:
        """Whether kernels can have written this. A record that is claimed is filled at once."""
        if not control.plausible:
            return False
        if control.claimed and not self.failure.fault:
            time.sleep(_FILLED)
            return bool(self.failure.fault)
        return True

    def _describe(self, journal: Journal, found: Record | None, differing: int | None) -> tuple[type[CollectiveError], str]:
        """Class and text of the error: of what was found, of a call that differs, or of both; else the control words are written over."""
        rank, fault = self.group.rank, found["fault"] if found is not None else MISMATCH
        if found is not None and fault == MISMATCH and differing is None:
            differing = found["call"]
        if differing is not None:
            finder = found["rank"] if found is not None and fault == MISMATCH else rank
            alike = {journal.made(of, differing) for of in journal.calls}
            if len(alike) == 1 and None not in alike:
                text = f"the signatures of call {differing} differ, and the ranks' calls do not: rank {finder}'s have been written over"
                return CorruptedWorkspace, text
            then = f"; then {self._timeout(journal, found)}" if found is not None and fault == TIMEOUT else ""
            return MismatchedCall, _mismatch(journal, finder, differing) + then
        if found is not None and fault == TIMEOUT:
            kind, elsewhere = self._elsewhere(found)
            return kind, self._timeout(journal, found) + elsewhere
        if found is not None:
            return CorruptedWorkspace, f"rank {rank}'s abort flag has been written over: no kernel writes what it holds"
        return CorruptedWorkspace, f"rank {rank}'s control words have been written over"

    def _timeout(self, journal: Journal, found: Record) -> str:
        rank, call, late = found["rank"], found["call"], found["late_rank"]
        made = journal.made(rank, call)
        own = f" ({made})" if made else ""
        if late == self.topology.world_size:
            return f"rank {rank} gave up waiting and stopped the group"
        waited = f"rank {rank} waited {self.timeout:g} s for {STAGES[found['stage']]} of rank {late}, call {call}, token {found['token']}"
        if late not in journal.calls:
            return f"{waited}{own}; rank {late} cannot be read"
        theirs = journal.made(late, call)
        return f"{waited}{own}; rank {late} {f'made {theirs}' if theirs else 'made no such call'}"

    def _elsewhere(self, found: Record) -> tuple[type[CollectiveError], str]:
        """Whether the late rank has been in a call of another communicator meanwhile.

        One that the waiting rank has not made, or in which it has waited for the waiting rank. On one stream that is an order of calls
        that differs between ranks; on several streams the rank may only be late there.
        """
        rank, late = found["rank"], found["late_rank"]
        if late < self.topology.world_size:
            for other in list(_OPEN):
                if other is self or (other.group.name, other.group.rank) != (self.group.name, self.group.rank):
                    continue
                theirs, mine = (page and Control.of(page).calls for page in map(other._control_page, (late, rank)))
                text = ""
                if theirs and theirs > (mine or 0):
                    text = f"; rank {late} is in call {theirs - 1} of communicator {other.name!r}, which rank {rank} has not made"
                told = other._told(other.control())
                if told and (told["fault"], told["rank"], told["late_rank"]) == (TIMEOUT, late, rank):
                    text = f"; rank {late} waited for rank {rank} in call {told['call']} of communicator {other.name!r}"
                if text:
                    same = self.stream is not None and self.stream == other.stream
                    return (MismatchedCall if same else CollectiveTimeout), text
        return CollectiveTimeout, ""

    def _control_page(self, rank: int) -> bytes:
        return self._read(self.buffer.pointers[rank], JOURNAL_OFFSET)

    def control(self) -> Control | None:
        """The control words as they are now; ``None`` where they cannot be read. Kernels may be running."""
        page = self._control_page(self.group.rank)
        return Control.of(page) if page else None

    def journal(self) -> Journal:
        """The last calls of every rank as they are now. Kernels may be running; a process may have died."""
        own, world, record = self.group.rank, self.topology.world_size, self._recorded()
        calls = {}
        for rank, pointer in enumerate(self.buffer.pointers):
            if not (page := self._read(pointer, CONTROL_BYTES)):
                continue
            made = _entries(page, world)
            control = Control.of(page[:JOURNAL_OFFSET])
            calls[rank] = with_stages(rank, made, record if rank == own else stopped(rank, control.stop, control.notes, world))
        started = max((entry.call + 1 for entry in calls.get(own, ())), default=0)
        return Journal(own, world, started, calls, record)

    def _read(self, pointer: int, nbytes: int) -> bytes:
        """Bytes of device memory; empty where they cannot be had. Waits for no kernel."""
        return self._reader.read(pointer, nbytes)


def _entries(page: bytes, world: int) -> list[Entry]:
    """The journal in the first bytes of a workspace, oldest call first. Uneven rows are known of the last :data:`BOUNDS` calls."""
    places = range(JOURNAL_OFFSET, len(page), ENTRY_BYTES)
    numbers = [struct.unpack_from("<I", page, at)[0] for at in places]
    last, entries = max(numbers), []
    for number, at in zip(numbers, places, strict=True):
        rows = None
        if number + BOUNDS > last:
            bounds = struct.unpack_from(f"<{world}I", page, BOUNDS_OFFSET + (number - 1) % BOUNDS * 4 * MAX_RANKS)
            rows = tuple(end - first for first, end in itertools.pairwise((0, *bounds)))
        entries.append(Entry.of(page[at : at + ENTRY_BYTES], rows))
    return sorted(filter(None, entries), key=lambda entry: entry.call)


def _mismatch(journal: Journal, finder: int, call: int) -> str:
    sides = "; ".join(f"rank {rank} made {text}" for rank in journal.calls if (text := journal.made(rank, call)))
    return f"the ranks' calls number {call} differ, rank {finder} found: {sides}"


#: Workspaces that can be read.
_OPEN: weakref.WeakSet[Workspace] = weakref.WeakSet()
