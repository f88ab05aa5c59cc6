"""The sockets of a link: who listens where, and how two ranks make sure that both are there."""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collogue.errors import PlatformError

_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"<{_TOKEN_BYTES}sI")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Late(Exception):
    """A deadline has passed."""


class Sockets:
    """One socket for each other rank, by :meth:`connect`. Collective; ``gather`` is the group's own way to exchange objects, used twice.

    Ranks of one machine meet on its loopback interface. A peer that does not know the token of the link is not let in.
    """

    def __init__(self, rank: int, size: int, gather: Callable[[Any], list[Any]]) -> None:
        self.rank, self.size = rank, size
        self.peers: dict[int, socket.socket] = {}
        self._all: list[socket.socket] = []  # to be closed
        self.close = weakref.finalize(self, _close, self._all)
        hosts = gather((machine(), socket.gethostname()))
        here = {host for host, _ in hosts} == {machine()}
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._all.append(self._listener)
        problem, port = "", 0
        try:
            self._listener.bind(("127.0.0.1" if here else "", 0))
            self._listener.listen(4 * size)
            port = self._listener.getsockname()[1]
        except OSError as error:
            problem = str(error)
        every = gather((port, problem, secrets.token_bytes(_TOKEN_BYTES)))
        for other, (_, text, _) in enumerate(every):
            if text:
                raise PlatformError(f"rank {other} cannot open a socket: {text}", hint="CPU groups need TCP sockets between their ranks")
        self._token = every[0][2]
        self.addresses = [("127.0.0.1" if here else name, port) for (_, name), (port, _, _) in zip(hosts, every, strict=True)]

    def connect(self, deadline: float) -> None:
        """New sockets in place of the old ones. Raises :class:`Late`, with :attr:`peers` as far as it came."""
        for peer in self.peers.values():
            self._all.remove(peer)
            peer.close()
        self.peers.clear()
        for rank in range(self.rank):
            self.peers[rank] = self._join(rank, deadline)
        while len(self.peers) < self.size - 1:
            self._accept(deadline)

    def _join(self, rank: int, deadline: float) -> socket.socket:
        """Connect to a lower rank, which answers when it accepts: then both are here."""
        while True:
            peer = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                peer.settimeout(_left(deadline))
                peer.connect(self.addresses[rank])
                peer.sendall(_HELLO.pack(self._token, self.rank))
                if peer.recv(1) == b"a":
                    peer.sendall(b"c")
                    return self._ready(peer)
            except OSError:  # not there yet, or it gave up meanwhile
                pass
            except BaseException:
                peer.close()
                raise
            peer.close()
            time.sleep(min(0.02, _left(deadline)))

    def _accept(self, deadline: float) -> None:
        """Take one connection of a higher rank. What has been given up since, or is not a rank of this link, is dropped."""
        self._listener.settimeout(_left(deadline))
        try:
            peer, _ = self._listener.accept()
        except TimeoutError:
            raise Late from None
        try:
            rank = self._welcome(peer, min(5.0, _left(deadline)))
        except OSError:
            rank = None
        except BaseException:
            peer.close()
            raise
        if rank is None:
            peer.close()
            return
        if rank in self.peers:
            self._all.remove(self.peers[rank])
            self.peers.pop(rank).close()
        self.peers[rank] = self._ready(peer)

    def _welcome(self, peer: socket.socket, seconds: float) -> int | None:
        """The rank behind a new connection, if it is one of this link and still there."""
        peer.settimeout(seconds)
        hello = b""
        while len(hello) < _HELLO.size and (more := peer.recv(_HELLO.size - len(hello))):
            hello += more
        if len(hello) < _HELLO.size:
            return None
        token, rank = _HELLO.unpack(hello)
        if not secrets.compare_digest(token, self._token) or not self.rank < rank < self.size:
            return None
        peer.sendall(b"a")
        return int(rank) if peer.recv(1) == b"c" else None

    def _ready(self, peer: socket.socket) -> socket.socket:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._all.append(peer)
        return peer


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise Late
    return seconds


def machine() -> str:
    """The same on two ranks if they run on one machine with one network: its name and, as names may repeat, which boot of a kernel it is,
    where that can be had.
    """
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} (boot {_BOOT_ID.read_text().strip()})"
    return socket.gethostname()


def _close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()
    sockets.clear()
