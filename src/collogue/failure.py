"""What a kernel writes where it fails, and how far that says the calls of a journal have come."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from collogue.header import Entry

#: ``collogue::Fault``.
TIMEOUT, MISMATCH = 1, 2
#: What a wait was for, by ``collogue::Stage``.
STAGES = ("the partial sums", "the reduced rows", "the start", "the call before")

#: The fields of a :class:`FailureRecord` by name.
Record: TypeAlias = dict[str, int]


class FailureRecord(ctypes.Structure):
    """Mirrors ``collogue::Failure``. ``fault``: 0 nothing, 1 a wait took too long, 2 calls do not match; ``rank`` found it."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("fault", "rank", "late_rank", "call", "token", "stage")]


def finder_of(stop: int, world: int) -> int | None:
    """The rank that wrote a stop word; ``None`` where no kernel writes such a word."""
    rank = (stop & 0xFF) - 1
    return rank if stop >> 8 in (TIMEOUT, MISMATCH) and 0 <= rank < world else None


def with_stages(rank: int, entries: Sequence[Entry], finder: int | None, record: Record | None) -> tuple[Entry, ...]:
    """The calls that ``rank`` has started, oldest first, with what is known of how far each has come.

    A call has finished if the same rank has started a later one. ``finder``: who wrote the rank's stop word, if it has one. ``record``: of
    a kernel of this very rank; other ranks' cannot be read.
    """
    if not entries:
        return ()
    *earlier, last = entries
    stage = _by_record(last.call, rank, record) if record is not None else _by_stop_word(rank, finder)
    return (*(replace(entry, stage="finished") for entry in earlier), replace(last, stage=stage))


def _by_record(call: int, rank: int, record: Record) -> str:
    """A rank's last call in its journal. Calls that begin when the rank has been stopped are not in it."""
    if record["call"] > call:
        return "finished"
    if record["call"] < call:
        return "started"
    if record["rank"] != rank:
        return f"stopped by rank {record['rank']}"
    what, late = STAGES[record["stage"]], record["late_rank"]
    if record["fault"] == MISMATCH:
        return f"waiting for {what}; the arguments of rank {late} differ"
    return f"waiting for {what} of token {record['token']} from rank {late}"


def _by_stop_word(rank: int, finder: int | None) -> str:
    if finder is None:
        return "started"
    return "started; it stopped the group" if finder == rank else f"started; stopped by rank {finder} unless it had finished"
