"""The link of a communicator whose exchanges are queued on GPUs: calls like one before are not compared on the host any more."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import struct
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.distributed.distributed_c10d import Store

from collogue.errors import ClosedError, CollectiveError, ConcurrentUseError, MismatchedCall, PlatformError
from collogue.link import Bytes, Link
from collogue.link.history import text_digest
from collogue.link.watchdog import NEW_GROUP, Queue, Watchdog

_HISTORY = struct.Struct("<QQ")

#: The watchdogs of this process by name of the process group and rank, how many links each has, and how many there were.
_watchdogs: dict[tuple[str, int], tuple[Watchdog, set[int]]] = {}
_numbers: dict[tuple[str, int], int] = {}


class QueuedLink(Link):
    """A :class:`Link` beside a queue. A call is compared over the link the first time that one of its text is made, with the history of the
    group; later ones are numbered for the :class:`.Watchdog`, and nothing waits. With ``COLLOGUE_DEBUG`` every call is compared.
    """

    def __init__(
        self,
        group: str,
        name: str,
        rank: int,
        size: int,
        gather: Callable[[Any], list[Any]],
        timeout: float,
        store: Store,
        queue: Queue,
    ) -> None:
        super().__init__(group, name, rank, size, gather, timeout)
        self._digests: dict[str, tuple[str, int]] = {}
        self._always = os.environ.get("COLLOGUE_DEBUG", "0") not in ("", "0")
        self.watchdog = self._join((group, rank), store, queue)
        self.watchdog.checks.append(_weak(self._broken))
        self.watchdog.interrupts.append(_weak(self._interrupt))
        self._leave = weakref.finalize(self, _leave, (group, rank), self.watchdog, id(self))
        self._leave.atexit = False

    def _join(self, key: tuple[str, int], store: Store, queue: Queue) -> Watchdog:
        """The group's watchdog, if every rank has the same one, else a new one. Collective."""
        mine = _watchdogs.get(key)
        told = self.exchange("the watchdogs of the ranks", struct.pack("<QQ", mine[0].number if mine else 0, _numbers.get(key, 0)))
        every = [struct.unpack("<QQ", each) for each in told]
        if mine is None or {number for number, _ in every} != {mine[0].number}:
            if mine is not None:
                mine[0].close()
            number = _numbers[key] = 1 + max(latest for _, latest in every)
            watchdog = Watchdog(self.group, self.rank, self.size, store, queue, number)
            self.exchange("new watchdogs", b"")
            watchdog.start()
            mine = _watchdogs[key] = watchdog, set()
        mine[1].add(id(self))
        return mine[0]

    def queue(self, what: str, move: Callable[[], None]) -> None:
        """Do ``move``, which queues the exchange of that description on every rank."""
        known = self._digests.get(what)
        if known is None or self._always:
            known = self._agree(what)
        if self.failure is not None:
            raise copy.copy(self.failure)
        self.watchdog.queue(*known, self.timeout, move)

    def _agree(self, what: str) -> tuple[str, int]:
        """Compare a call with the other ranks, and what has been queued before it. Returns text and digest of the history."""
        text = f"{self.name} with ({what})"
        watchdog = self.watchdog
        watchdog.raise_failure()
        watchdog.asking = text
        try:
            told = self.exchange(what, self._history())
        finally:
            watchdog.asking = ""
        self._compare(told)
        return self._digests.setdefault(what, (text, text_digest(text)))

    def _history(self) -> bytes:
        return _HISTORY.pack(self.watchdog.history.count, self.watchdog.history.digest)

    def _compare(self, told: Sequence[Bytes]) -> None:
        """Raise where the histories of the ranks differ: what they have queued does not fit together."""
        every = [_HISTORY.unpack(each) for each in told]
        for rank, (count, _) in enumerate(every):
            if every[rank] != every[0]:
                text = f"rank 0 has queued {every[0][0]} exchanges, rank {rank} {count}, or others"
                self.watchdog.stop(MismatchedCall(text, hint=NEW_GROUP))
                self.watchdog.raise_failure()

    def exchange(self, what: str, payload: Bytes | Sequence[Bytes], into: Mapping[int, memoryview] | None = None) -> list[Bytes]:
        try:
            return super().exchange(what, payload, into)
        except CollectiveError:
            watchdog = getattr(self, "watchdog", None)
            if watchdog is not None and watchdog.stopping:  # it has ended the wait
                watchdog.raise_failure()
            raise

    def _broken(self) -> CollectiveError | None:
        """What has broken the link, here or on another rank."""
        with contextlib.suppress(CollectiveError, ConcurrentUseError, ClosedError):
            super().check()
        return self.failure

    def _interrupt(self) -> None:
        """End the wait of an exchange: the group has been aborted."""
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def raise_failure(self) -> None:
        """Raise what has been found so far. Looks at nothing."""
        self.watchdog.raise_failure()
        if self.failure is not None:
            raise copy.copy(self.failure)

    def check(self) -> None:
        self.watchdog.check()
        super().check()

    def reset(self) -> None:
        """As of every link, while what was queued has ended on every rank. Raises :class:`PlatformError` where the group was aborted."""
        self.watchdog.check_usable()
        try:
            super().reset()
            self._digests.clear()  # ranks may have left the last exchange at different places
            self._compare(self.exchange("the history of the group", self._history()))
        except CollectiveError as error:
            if self.watchdog.stopping:
                raise PlatformError(f"the group cannot be used again: {error.message}", hint=NEW_GROUP) from error
            raise

    def close(self) -> None:
        if os.getpid() == self.watchdog._process:
            self._leave()
        super().close()


def _weak(method: Callable[[], Any]) -> Callable[[], Any]:
    """``method``, which does nothing once its object has gone."""
    reference = weakref.WeakMethod(method)

    def call() -> Any:
        alive = reference()
        return None if alive is None else alive()

    return call


def _leave(key: tuple[str, int], watchdog: Watchdog, link: int) -> None:
    """A link of the watchdog has gone; with the last one it ends."""
    found = _watchdogs.get(key)
    if found is not None and found[0] is watchdog:
        found[1].discard(link)
        if not found[1]:
            del _watchdogs[key]
            watchdog.close()
