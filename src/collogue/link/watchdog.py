"""Who is late, or has made another call, among ranks whose exchanges are queued on GPUs, where no host waits for another.

A rank numbers the exchanges that it queues on a process group (:class:`.History`). A thread publishes how far the rank is in the group's
store and reads the same of the others, twenty times a second. When calls differ, a rank has waited too long, or one has ended, all ranks
stop: each publishes its last calls, all make the same error of them, and the group is aborted, which ends what is queued on every GPU.
"""

from __future__ import annotations

import atexit
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch.distributed.distributed_c10d import Store

from collogue.errors import ClosedError, CollectiveError, CollectiveTimeout, MismatchedCall, PlatformError
from collogue.link.board import Board
from collogue.link.frames import pack_error, unpack_error
from collogue.link.history import History, Record

#: Seconds between two looks; for which ranks that stop wait for the others; between looks while they do.
INTERVAL, GRACE, STEP = 0.05, 0.5, 0.002
#: As many calls are taken from those on their way at a time, where the last of them has ended.
_MANY = 64
NEW_GROUP = "the group was aborted: make a new one (dist.new_group) and a new communicator"


class Event(Protocol):
    """A place in the work of this rank's GPU."""

    def query(self) -> bool:
        """Whether the GPU has come to it. Waits for nothing."""


class Queue(Protocol):
    """What queues the exchanges of a process group."""

    def event(self) -> Event:
        """Here, in the order of what this thread queues."""

    def free(self, events: Sequence[Event]) -> None:
        """The GPU has passed them, and nobody has them any more."""

    def enter_thread(self) -> None:
        """What a thread does first that only asks for events, and aborts."""

    def abort(self) -> None:
        """End what is queued, also what waits for other ranks. The group cannot be used again."""


@dataclass(slots=True)
class _Queued:
    """A call on its way. ``since``: when the GPU was first seen to have come to it. ``ended`` is set once all of it is queued."""

    number: int
    timeout: float
    reached: Event
    ended: Event | None = None
    since: float | None = None

    def has_ended(self) -> bool:
        return self.ended is not None and self.ended.query()


class Watchdog:
    """Of one rank of one process group, for all of its communicators. Collective: all ranks make one before any starts it."""

    def __init__(self, group: str, rank: int, size: int, store: Store, queue: Queue, number: int) -> None:
        self.rank, self.size, self.number, self._queue = rank, size, number, queue
        self.history, self.turn = History(), threading.Lock()
        self.failure: CollectiveError | None = None
        self.stopping = False
        #: Of every communicator: what has broken its link, and what ends its waits once the ranks have stopped.
        self.checks: list[Callable[[], CollectiveError | None]] = []
        self.interrupts: list[Callable[[], None]] = []
        self.asking = ""
        self._process = os.getpid()
        self._calls = deque[_Queued]()
        self._record, self._board = Record(), Board(store, f"{group}/{number}", rank, size, Record().pack())
        self._suspected: tuple[int, int] | None = None
        self._broken: float | None = None
        self._wake, self._looked, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="collogue-watchdog", daemon=True)

    def start(self) -> None:
        """Every rank has made its own."""
        self._board.start()
        atexit.register(self.close)
        self._thread.start()

    # ---- calls

    def queue(self, text: str, digest: int, timeout: float, move: Callable[[], None]) -> None:
        """Do ``move``, which queues the call that ``text`` describes."""
        with self.turn:
            self.raise_failure()
            call = _Queued(self.history.add(text, digest), timeout, self._queue.event())
            self._calls.append(call)
            try:
                move()
            except BaseException as error:  # the others wait for what is not queued
                what = f"rank {self.rank} left {text} by {type(error).__name__}: {error}"
                self.stop(CollectiveError(what, hint=NEW_GROUP))
                if isinstance(error, Exception):
                    self.raise_failure()
                raise
            call.ended = self._queue.event()

    def raise_failure(self) -> None:
        """Raise what has been found; where the ranks are about to stop, when they have."""
        if os.getpid() != self._process:
            hint = "start processes by the method 'spawn', and make group and communicator in the process that calls"
            raise ClosedError(f"the communicator belongs to process {self._process}; this is process {os.getpid()}", hint=hint)
        if self.stopping:
            self._stopped.wait(4 * GRACE)
            assert self.failure is not None
            raise copy.copy(self.failure)

    def check(self) -> None:
        """Look now, and raise what has been found. Waits for no GPU, and for the store no longer than between two looks."""
        self.raise_failure()
        self._looked.clear()
        self._wake.set()
        self._looked.wait(INTERVAL)
        self.raise_failure()

    def check_usable(self) -> None:
        """Raise :class:`PlatformError` where the group was aborted."""
        try:
            self.raise_failure()
        except CollectiveError as error:
            raise PlatformError(f"the group cannot be used again: {error.message}", hint=NEW_GROUP) from error

    def stop(self, error: CollectiveError) -> None:
        """Stop all ranks because of ``error``, unless they do already. Returns when they have."""
        if not self.stopping:
            self._record = replace(self._record, error=pack_error(error))
            self._wake.set()
        self._stopped.wait(2 * (INTERVAL + GRACE))

    # ---- the thread

    def _run(self) -> None:
        self._queue.enter_thread()
        while not self._closed and self.failure is None:
            self._wake.wait(INTERVAL)
            self._wake.clear()
            if not self._closed and self._look():
                self._stop_all()
            self._looked.set()

    def _look(self) -> bool:
        """Publish and compare. Returns whether the ranks have to stop."""
        waited = self._advance()
        if waited is not None:
            self._record = replace(self._record, waited=waited.number, seconds=waited.timeout)
        found = self._exchange(INTERVAL) or waited is not None or bool(self._record.error) or self._lost()
        for rank, record in enumerate(self._others()):
            if record is not None:
                found = found or self._differs(rank, record)
        return found or self._broken_link()

    def _advance(self) -> _Queued | None:
        """Take calls that have ended from those on their way. Returns the one whose time is over."""
        calls, free = self._calls, list[Event]()
        reached, ended = self._record.reached, self._record.ended
        while calls:
            many = _MANY if len(calls) >= _MANY and calls[_MANY - 1].has_ended() else int(calls[0].has_ended())
            for _ in range(many):
                call = calls.popleft()
                reached = ended = call.number
                free += (call.reached, call.ended)  # type: ignore[arg-type]
            if not many:
                break
        self._queue.free(free)
        late = None
        if calls:
            first, now = calls[0], time.monotonic()
            if first.since is None and first.reached.query():
                first.since = now
            if first.since is not None:
                reached = first.number
                late = first if now - first.since > first.timeout else None
        self._record = replace(self._record, reached=reached, ended=ended)
        return late

    def _exchange(self, seconds: float) -> bool:
        """Publish this rank's record and read the others'. Returns whether one of them stops."""
        history = self.history
        while True:  # another thread may add between two reads
            count = history.count
            found = history.at(count)
            if count == 0 or found is not None:
                break
        self._record = replace(self._record, count=count, digest=found[0] if found else 0, asking=self.asking)
        self._board.exchange(self._record.pack(), seconds)
        return any(record is not None and record.state == "stopping" for record in self._others())

    def _others(self) -> list[Record | None]:
        return [None if each is None else Record.unpack(each) for each in self._board.records]

    def _lost(self) -> bool:
        if not self._board.lost:
            return False
        text = f"rank {self.rank} lost the store of the group: {self._board.lost}"
        self._record = replace(self._record, error=pack_error(CollectiveError(text, hint=NEW_GROUP)))
        return True

    def _differs(self, rank: int, record: Record) -> bool:
        """Whether a rank has made other calls than this one, is about to, or has ended before as many."""
        mine = self.history.at(record.count)
        if mine is not None and mine[0] != record.digest:
            return True
        if record.state == "closed" and record.count < self._record.count:
            text = f"rank {self.rank} has made a call for which rank {rank} has closed the communicator"
            error = CollectiveError(text, hint=f"close it on every rank; {NEW_GROUP}")
            self._record = replace(self._record, error=pack_error(error))
            return True
        next_call = self.history.at(record.count + 1)
        if not record.asking or next_call is None or next_call[1] == record.asking:
            return False
        suspected, self._suspected = self._suspected, (rank, record.count)  # twice, as the record may be old
        return suspected == self._suspected

    def _broken_link(self) -> bool:
        """Whether a communicator's link has broken, and what this rank has queued does not end."""
        errors = [error for check in list(self.checks) if (error := check()) is not None]
        if not errors or not self._calls:
            self._broken = None
            return False
        now = time.monotonic()
        self._broken = now if self._broken is None else self._broken
        if now - self._broken < GRACE:
            return False
        self._record = replace(self._record, error=pack_error(type(errors[0])(errors[0].message, hint=NEW_GROUP)))
        return True

    def _stop_all(self) -> None:
        """All ranks publish their last calls, make the same error of them, and abort the group at nearly the same time."""
        self.stopping = True
        self._record = replace(self._record, state="stopping").of(self.history)
        deadline = time.monotonic() + GRACE
        while True:
            self._exchange(max(STEP, deadline - time.monotonic()))
            others = self._others()
            here = [rank for rank, each in enumerate(others) if rank == self.rank or (each is not None and each.state)]
            if len(here) == self.size or time.monotonic() > deadline or self._board.lost:
                break
            time.sleep(STEP)
        records = [self._record if rank == self.rank else others[rank] for rank in range(self.size)]
        self.failure = explain(records, here)
        try:
            self._queue.abort()
        finally:
            self._stopped.set()
            for interrupt in list(self.interrupts):
                interrupt()

    # ---- the end

    def close(self) -> None:
        """End the threads. In a forked child, which has none, nothing."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)
        last = self._record if self._record.state else replace(self._record, state="closed", count=self.history.count)
        self._board.close(replace(last, digest=self.history.digest).pack(), 1.0)


def explain(records: Sequence[Record | None], here: Sequence[int]) -> CollectiveError:
    """What ranks that have stopped raise, the same on all of them. ``here``: those that have published why."""
    known = {rank: record for rank in here if (record := records[rank]) is not None}
    found = _mismatch(known)
    if found is not None:
        return found
    for rank, record in known.items():
        if record.error:
            return unpack_error(rank, record.error)
    for rank, record in known.items():
        if record.waited:
            return _late(rank, record, records, here)
    silent = [rank for rank in range(len(records)) if rank not in known]
    return CollectiveError(f"{_ranks(silent)} stopped the group and did not say why", hint=NEW_GROUP)


def _mismatch(known: dict[int, Record]) -> MismatchedCall | None:
    """The first call that two ranks have made, or are about to make, differently."""
    calls = {rank: {number: text for number, _, text in record.calls} for rank, record in known.items()}
    for rank, record in known.items():
        if record.asking:
            calls[rank].setdefault(record.count + 1, record.asking)
    for number in sorted({number for each in calls.values() for number in each}):
        texts = {rank: each[number] for rank, each in calls.items() if number in each}
        first = min(texts)
        for rank, text in texts.items():
            if text != texts[first]:
                return MismatchedCall(f"call {number} of the group: rank {first} called {texts[first]}, rank {rank} {text}", hint=NEW_GROUP)
    return None


def _late(finder: int, record: Record, records: Sequence[Record | None], here: Sequence[int]) -> CollectiveTimeout:
    """Whom ``finder`` has waited for: ranks that have not made the call, else those whose GPU has not come to it."""
    number = record.waited
    what = next((text for n, _, text in record.calls if n == number), f"call {number}")
    every = dict(enumerate(records))
    absent = [rank for rank, each in every.items() if rank not in here or each is None]
    behind = [rank for rank, each in every.items() if each is not None and each.count < number]
    queued = [rank for rank, each in every.items() if each is not None and each.reached < number]
    reasons = (behind, "which has not called"), (absent, "which is silent"), (queued, "whose GPU is late")
    everybody = sorted(set(every) - {finder}), "although all ranks have called and their GPUs have begun"
    late, why = next(((ranks, why) for ranks, why in reasons if ranks), everybody)
    hint = f"see what became of {_ranks(late)}; {NEW_GROUP}"
    return CollectiveTimeout(f"rank {finder} waited {record.seconds:g} s in {what} for {_ranks(late)}, {why}", hint=hint)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
