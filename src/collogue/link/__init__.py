"""How the ranks of a CPU group exchange bytes: sockets between every two ranks, of one communicator alone, with bounded waits.

An exchange begins with a frame of each rank to every other that says what it is about. When all have said the same, a frame with the
bytes follows: a rank that has given up meanwhile sends its reason in the place of it.
A rank that gives up tells the others why. Afterwards the link is broken on every rank until all of them have called :meth:`Link.reset`,
which makes new sockets: nothing of the time before can reach the time after.
"""

from __future__ import annotations

import contextlib
import copy
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeAlias

from collogue.errors import ClosedError, CollectiveError, CollectiveTimeout, ConcurrentUseError, MismatchedCall
from collogue.link.frames import BYTES, CALL, CLOSED, FRAME, STOP, Incoming, frame, pack_error, peek, receive, send, send_some, unpack_error
from collogue.link.sockets import Late, Sockets

Bytes: TypeAlias = bytes | bytearray | memoryview

#: Seconds in which ranks that have found different calls wait for the texts of the others.
_GRACE = 1.0
_RESET = "call comm.reset() on every rank"

#: Every open link of this process.
_LINKS: weakref.WeakSet[Link] = weakref.WeakSet()


class Link:
    """How one communicator exchanges bytes. Collective; ``gather`` is the group's own way to exchange objects, used only here.

    Args:
        group: its name; of the links of one group, calls in another order are distinguished from late ones.
        name: of the communicator, for messages.
        timeout: seconds that an exchange waits for a rank, and a reset for all of them.
    """

    def __init__(self, group: str, name: str, rank: int, size: int, gather: Callable[[Any], list[Any]], timeout: float) -> None:
        self.group, self.name, self.rank, self.size, self.timeout = group, name, rank, size, timeout
        self.failure: CollectiveError | None = None
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._in_use, self._checking = threading.Lock(), threading.Lock()
        self._sockets = Sockets(rank, size, gather)
        self._peers = self._sockets.peers
        self._cut_off = set[int]()  # ranks that have a part of a frame
        _LINKS.add(self)
        with self._alone():
            self._connect("the constructor of the communicator")

    # ---- exchanging

    def exchange(self, what: str, payload: Bytes | Sequence[Bytes], into: Mapping[int, memoryview] | None = None) -> list[Bytes]:
        """What every rank has for this one, by rank. ``what`` is the same on every rank, or all raise :class:`MismatchedCall`.

        ``payload``: for every rank, or one for each. ``into``: by rank, where the bytes go; they are as many.

        Raises :class:`CollectiveTimeout` where ranks are late, :class:`CollectiveError` where one has ended or given up.
        """
        with self._alone():
            self._thread = threading.get_ident()
            self._look(STOP, CLOSED)
            if self.failure is not None:
                raise copy.copy(self.failure)
            try:
                payloads = [payload] * self.size if isinstance(payload, Bytes) else list(payload)
                return self._move(what, payloads, self._announce(what, list(map(len, payloads))), into or {})
            except CollectiveError as error:
                self._fail(error)
                raise
            except BaseException as error:
                self._fail(CollectiveError(f"rank {self.rank} left {what} by {type(error).__name__}", hint=_RESET))
                raise

    def abandon(self, why: str) -> None:
        """Tell the others that this rank has left in the middle of a call."""
        with self._alone():
            if self.failure is None:
                self._fail(CollectiveError(f"rank {self.rank} {why}", hint=_RESET))

    def _announce(self, what: str, nbytes: list[int]) -> dict[int, int]:
        """Say what this rank is about to do, and hear it of all others. Returns how many bytes each will send."""
        for rank, peer in self._peers.items():
            send(peer, frame(CALL, what, nbytes[rank]), self.timeout)
        sizes, texts, deadline = dict[int, int](), {self.rank: what}, time.monotonic() + self.timeout
        while waiting := set(self._peers) - set(sizes):
            ready = self._select(waiting, deadline - time.monotonic())
            for rank in ready:
                texts[rank], sizes[rank] = self._hear(rank, what)
                if texts[rank] != what:
                    deadline = min(deadline, time.monotonic() + _GRACE)
            if not ready and len(set(texts.values())) > 1:
                break
            if not ready:
                raise self._late(sorted(waiting), what)
        first = min(texts)
        for rank in sorted(texts):
            if texts[rank] != texts[first]:
                raise MismatchedCall(
                    f"rank {first} called with ({texts[first]}), rank {rank} with ({texts[rank]})",
                    hint="every rank of the group must make the same call: same operation, tokens, hidden size and epilogue",
                )
        return sizes

    def _hear(self, rank: int, what: str) -> tuple[str, int]:
        """Text and size of the call of ``rank``. Raises what the rank says if that is why it has stopped."""
        peer = self._peers[rank]
        try:
            peer.settimeout(self.timeout)
            kind, length, nbytes = FRAME.unpack(receive(peer, FRAME.size))
            text = receive(peer, length).decode()
        except OSError as error:
            raise self._gone(rank, what) from error
        if kind != CALL:
            raise unpack_error(rank, text)
        return text, nbytes

    def _move(self, what: str, payloads: list[Bytes], sizes: dict[int, int], into: Mapping[int, memoryview]) -> list[Bytes]:
        """Send every peer its payload, and receive theirs. The wait is counted from the last byte that moved."""
        left = {rank: [memoryview(FRAME.pack(BYTES, 0, len(payloads[rank]))), memoryview(payloads[rank])] for rank in sizes}
        self._cut_off = set(left)
        coming = {rank: Incoming(size, into.get(rank)) for rank, size in sizes.items()}
        while left or not all(each.done for each in coming.values()):
            waiting = {rank for rank, each in coming.items() if not each.done}
            ready = self._select(waiting, self.timeout, set(left))
            if not ready:
                raise self._late(sorted(waiting | set(left)), what)
            for rank, events in ready.items():
                peer = self._peers[rank]
                peer.setblocking(False)
                try:
                    if events & selectors.EVENT_READ and coming[rank].take(peer):
                        peer.settimeout(self.timeout)
                        raise unpack_error(rank, receive(peer, coming[rank].stopped).decode())
                    if events & selectors.EVENT_WRITE:
                        left[rank] = send_some(peer, left[rank])
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise self._gone(rank, what) from error
            left = {rank: rest for rank, rest in left.items() if rest}
            self._cut_off = set(left)
        return [payloads[rank] if rank == self.rank else coming[rank].block for rank in range(self.size)]

    def _select(self, ranks: Set[int], seconds: float, sending: Set[int] = frozenset()) -> dict[int, int]:
        """Those of ``ranks`` that have sent something, and of ``sending`` that take something, with what of it as events."""
        with selectors.DefaultSelector() as selector:
            for rank in ranks | sending:
                events = selectors.EVENT_WRITE * (rank in sending) | selectors.EVENT_READ * (rank in ranks)
                selector.register(self._peers[rank], events, rank)
            return {key.data: events for key, events in selector.select(max(0.0, seconds))}

    # ---- failures

    def _late(self, ranks: list[int], what: str) -> CollectiveError:
        """What to raise where ``ranks`` have not come. In a thread that calls several links of the group, their order may differ."""
        for other in list(_LINKS):
            if other is not self and (other.group, other._thread) == (self.group, threading.get_ident()):
                for rank in set(ranks) & set(other._peers):
                    calls = [text for kind, text in peek(other._peers[rank]) or () if kind == CALL]
                    if calls:
                        return MismatchedCall(
                            f"rank {self.rank} called {self.name} with ({what}), rank {rank} called {other.name} with ({calls[0]})",
                            hint="call the communicators of a group in the same order on every rank",
                        )
        return CollectiveTimeout(
            f"rank {self.rank} waited {self.timeout:g} s in {what} for {_ranks(ranks)}",
            hint=f"see what {_ranks(ranks)} did instead, then {_RESET}",
        )

    def _gone(self, rank: int, what: str = "") -> CollectiveError:
        when = f"in {what}" if what else "between calls"
        return CollectiveError(
            f"rank {self.rank} lost the connection to rank {rank} {when}: its process has ended, or it gave up",
            hint=f"see what became of rank {rank}; if it is alive, {_RESET}",
        )

    def _fail(self, error: CollectiveError, kind: int = STOP) -> None:
        """The link is broken from now on. The others hear why, or, in the middle of a frame, that it was cut off."""
        self.failure = error
        for rank, peer in self._peers.items():
            if rank in self._cut_off:
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
            else:
                send(peer, frame(kind, pack_error(error)), 0.1)

    def _look(self, *kinds: int) -> None:
        """Take notice of ranks that have said such a thing, or ended, while nobody listened."""
        for rank, peer in self._peers.items() if self.failure is None else ():
            frames = peek(peer)
            reasons = [text for kind, text in frames or () if kind in kinds]
            if reasons or frames is None:
                self._fail(unpack_error(rank, reasons[0]) if reasons else self._gone(rank))
                return

    def check(self) -> None:
        """Raise what has broken the link, here or on another rank. Waits for nobody. A rank that has closed is not a fault."""
        self._check_process()
        with self._checking:
            if self._in_use.acquire(blocking=False):
                try:
                    self._look(STOP)
                finally:
                    self._in_use.release()
        if self.failure is not None:
            raise copy.copy(self.failure)

    # ---- again, and closing

    def reset(self) -> None:
        """New sockets. Collective: returns when this rank is connected with every other, or raises :class:`CollectiveTimeout`."""
        with self._alone():
            if self.failure is None:
                self._fail(CollectiveError(f"rank {self.rank} called reset()", hint=_RESET))
            self._connect("reset()")

    def _connect(self, what: str) -> None:
        self._cut_off.clear()
        try:
            self._sockets.connect(time.monotonic() + self.timeout)
        except Late:
            error = self._late(sorted(set(range(self.size)) - {self.rank, *self._peers}), what)
            self._fail(error)
            raise error from None
        self.failure = None

    def close(self) -> None:
        """Close the sockets. Ranks that still call hear of it."""
        _LINKS.discard(self)
        if os.getpid() == self._process:  # a forked child has copies: it says nothing, and waits for no thread that it does not have
            alone = self._take()
            if self.failure is None:
                self._fail(CollectiveError(f"rank {self.rank} has closed the communicator", hint="close it on every rank"), CLOSED)
            if alone:
                self._in_use.release()
        self._peers.clear()
        self._sockets.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._check_process()
        if not self._take():
            raise ConcurrentUseError("another thread is using this communicator", hint="make one for each thread, or use a lock")
        try:
            yield
        finally:
            self._in_use.release()

    def _take(self) -> bool:
        """Have the link for this thread, at once, or after a :meth:`check` of another thread."""
        while not self._in_use.acquire(blocking=False):
            if not self._checking.locked():
                return self._in_use.acquire(blocking=False)
            time.sleep(1e-4)
        return True

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ClosedError(
                f"the communicator belongs to process {self._process}; this is process {os.getpid()}, forked from it",
                hint="start processes by the method 'spawn', and make group and communicator in the process that calls",
            )


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 1``, ``ranks 1, 2``."""
    names = [str(rank) for rank in ranks]
    return f"rank{'s' * (len(names) > 1)} {', '.join(names)}"
