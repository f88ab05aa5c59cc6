"""What a kernel writes where it fails, and how far that says the calls of a journal have come."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from collogue import kernels
from collogue.gpu.header import Entry

_FAULTS, _STAGES = kernels.enumerators("protocol.cuh", "Fault"), kernels.enumerators("protocol.cuh", "Stage")
#: What a kernel has found.
TIMEOUT, MISMATCH = _FAULTS["kTimeout"], _FAULTS["kMismatch"]
_WAITED_FOR = {
    "kStagePartials": "the partial sums",
    "kStageRows": "the reduced rows",
    "kStageStart": "the start",
    "kStagePrevious": "the call before",
    "kStageShard": "the rows",
}
#: What a wait was for, by ``collogue::Stage``.
STAGES = tuple(_WAITED_FOR[name] for name in sorted(_STAGES, key=_STAGES.__getitem__))

#: The fields of a :class:`FailureRecord` by name.
Record: TypeAlias = dict[str, int]


class FailureRecord(ctypes.Structure):
    """``collogue::Failure``. ``fault``: 0 nothing, 1 a wait took too long, 2 calls do not match; ``rank`` found it."""

    _fields_ = kernels.fields("protocol.cuh", "Failure")


def finder_of(stop: int, world: int) -> int | None:
    """The rank that wrote an abort flag; ``None`` where no kernel writes such a word."""
    rank = (stop & 0xFF) - 1
    return rank if stop >> 8 in (TIMEOUT, MISMATCH) and 0 <= rank < world else None


def noted(record: Record, notes: Sequence[tuple[int, int]], world: int) -> Record:
    """``record`` of a rank that was stopped, with what the rank that stopped it has found: call, token, stage and late rank."""
    if record["fault"] == 0:
        return record
    call, what = notes[record["rank"]]
    if what == 0 or (what - 1) & 0xF >= world or (what - 1) >> 4 & 0xF >= len(STAGES):
        return record
    what -= 1
    return record | {"late_rank": what & 0xF, "call": call, "token": what >> 8, "stage": what >> 4 & 0xF}


def stopped(rank: int, stop: int, notes: Sequence[tuple[int, int]], world: int) -> Record | None:
    """What the control words of another rank say of why it has stopped; ``None`` where it has not."""
    finder = finder_of(stop, world)
    if finder is None:
        return None
    record = {"fault": stop >> 8, "rank": finder, "late_rank": world, "call": -1, "token": 0, "stage": 0}
    return noted(record, notes, world) if finder == rank else record


def with_stages(rank: int, entries: Sequence[Entry], record: Record | None) -> tuple[Entry, ...]:
    """The calls that ``rank`` has started, oldest first, with what is known of how far each has come.

    A call has finished if the same rank has started a later one. ``record``: why the rank has stopped, where it has.
    """
    if not entries:
        return ()
    *earlier, last = entries
    stage = "started" if record is None else _stage(last.call, rank, record)
    return (*(replace(entry, stage="finished") for entry in earlier), replace(last, stage=stage))


def _stage(call: int, rank: int, record: Record) -> str:
    """Of a rank's last call in its journal. Calls that begin when the rank has been stopped are not in it."""
    if record["call"] > call:
        return "finished"
    if record["rank"] != rank:
        return f"stopped by rank {record['rank']}" + " unless it had finished" * (record["call"] < 0)
    if record["call"] < call:
        return "started; it stopped the group"
    what, late = STAGES[record["stage"]], record["late_rank"]
    if record["fault"] == MISMATCH:
        return f"waiting for {what}; the arguments of rank {late} differ"
    return f"waiting for {what} of token {record['token']} from rank {late}"
