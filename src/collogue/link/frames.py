"""What travels over a link: frames, read and written without waiting for more than is there."""

from __future__ import annotations

import contextlib
import json
import socket
import struct

from collogue import errors
from collogue.errors import CollectiveError

#: Kind of frame, length of its text, bytes that follow it.
FRAME = struct.Struct("<BIQ")
#: A call, with what it is; its bytes, when all agree; why a rank has given up; that it has closed its communicator.
CALL, BYTES, STOP, CLOSED = 1, 2, 3, 4


def frame(kind: int, text: str, nbytes: int = 0) -> bytes:
    """A frame without its bytes."""
    encoded = text.encode()
    return FRAME.pack(kind, len(encoded), nbytes) + encoded


def receive(peer: socket.socket, count: int) -> bytes:
    """So many bytes of a frame that has begun to come: it is short. Raises :class:`OSError` where the peer is gone."""
    got = bytearray()
    while len(got) < count:
        block = peer.recv(count - len(got))
        if not block:
            raise ConnectionResetError("closed")
        got += block
    return bytes(got)


def send(peer: socket.socket, given: bytes, seconds: float) -> None:
    """Send a short frame. Whether the peer is gone is found when it is listened to: it may have said why."""
    with contextlib.suppress(OSError):
        peer.settimeout(seconds)
        peer.sendall(given)


def send_some(peer: socket.socket, blocks: list[memoryview]) -> list[memoryview]:
    """Send what ``peer`` takes, and return the rest."""
    rest = blocks[0][peer.send(blocks[0]) :]
    return [block for block in (rest, *blocks[1:]) if len(block)]


def peek(peer: socket.socket) -> list[tuple[int, str]] | None:
    """Kind and text of the frames that ``peer`` has sent and nobody has read; ``None`` where it is gone.

    Between exchanges these are a call that this rank has not made yet, and why it was given up.
    """
    peer.setblocking(False)
    frames: list[tuple[int, str]] = []
    try:
        if not (seen := peer.recv(1 << 16, socket.MSG_PEEK)):
            return None
    except BlockingIOError:
        return frames
    except OSError:
        return None
    while len(seen) >= FRAME.size:
        kind, length, _ = FRAME.unpack_from(seen)
        text, seen = seen[FRAME.size : FRAME.size + length], seen[FRAME.size + length :]
        if len(text) == length:
            frames.append((kind, text.decode()))
    return frames


class Incoming:
    """The frame of bytes of a peer, as far as it has come. ``stopped``: length of the reason that came instead.

    ``block``: where the bytes go; default: memory of its own.
    """

    def __init__(self, size: int, block: memoryview | None = None) -> None:
        self.head, self.stopped = bytearray(FRAME.size), 0
        self.block = bytearray(size) if block is None else block
        self._rest = [memoryview(self.head), *([memoryview(self.block)] if size else [])]

    @property
    def done(self) -> bool:
        """Whether all has come."""
        return not self._rest

    def take(self, peer: socket.socket) -> bool:
        """Receive what there is. Returns whether the peer has stopped."""
        count = peer.recv_into(self._rest[0])
        if count == 0:
            raise ConnectionResetError("closed")
        self._rest[0] = self._rest[0][count:]
        if len(self._rest[0]):
            return False
        del self._rest[0]
        kind, length, _ = FRAME.unpack(self.head)
        self.stopped = 0 if kind == BYTES else length
        return bool(self.stopped)


def pack_error(error: CollectiveError) -> str:
    """The text of a frame that tells ``error``."""
    return json.dumps([type(error).__name__, error.message, error.hint])


def unpack_error(rank: int, text: str) -> CollectiveError:
    """The error that ``rank`` has told."""
    name, message, hint = json.loads(text)
    kind = getattr(errors, name, CollectiveError)
    known: type[CollectiveError] = kind if issubclass(kind, CollectiveError) else CollectiveError
    return known(message if message.startswith(f"rank {rank} ") else f"rank {rank} stopped: {message}", hint=hint)
