"""Which calls this rank has queued on a process group, and what of that the other ranks read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Calls whose digests are kept. Ranks are not that far apart: a host that has launched a thousand kernels waits for its GPU.
KEPT = 4096
_MASK, _FACTOR = (1 << 64) - 1, 0x9E3779B97F4A7C15


def text_digest(text: str) -> int:
    """64 bits of ``text``, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class History:
    """The calls of one rank, numbered from 1. ``digest`` depends on all of them and on their order.

    One thread adds; any may look.
    """

    def __init__(self) -> None:
        self.count = self.digest = 0
        self._last: list[tuple[int, int, str]] = [(0, 0, "")] * KEPT

    def add(self, text: str, digest: int) -> int:
        """One more call, ``digest`` that of its text. Returns its number."""
        number = self.count + 1
        self.digest = (self.digest * _FACTOR + digest) & _MASK
        self._last[number % KEPT] = number, self.digest, text
        self.count = number
        return number

    def at(self, number: int) -> tuple[int, str] | None:
        """The digest after call ``number``, and its text; ``None`` where it is to come or long ago."""
        found, digest, text = self._last[number % KEPT]
        return (digest, text) if found == number else None

    def calls(self) -> list[tuple[int, int, str]]:
        """The last calls, oldest first: number, digest, text."""
        return sorted(call for call in self._last if call[0])


@dataclass(frozen=True)
class Record:
    """What a rank publishes. All counts are of calls.

    ``count`` and ``digest``: of its history. ``reached`` and ``ended``: what its GPU has come to, and is done with. ``asking``: the call
    that it compares with the others before it makes it. ``state``: ``""``, ``"stopping"`` or ``"closed"``. Of a rank that is stopping:
    ``waited``, the call whose time is over, after ``seconds``; ``error`` otherwise; the last ``calls``.
    """

    count: int = 0
    digest: int = 0
    reached: int = 0
    ended: int = 0
    asking: str = ""
    state: str = ""
    waited: int = 0
    seconds: float = 0.0
    error: str = ""
    calls: Sequence[tuple[int, int, str]] = field(default=(), repr=False)

    def pack(self) -> str:
        """As JSON; every text stands in it once."""
        texts = list(dict.fromkeys(text for *_, text in self.calls))
        place = {text: i for i, text in enumerate(texts)}
        values = vars(self) | {"calls": [(number, digest, place[text]) for number, digest, text in self.calls]}
        return json.dumps([values, texts])

    @classmethod
    def unpack(cls, given: bytes) -> Record:
        values, texts = json.loads(given)
        return cls(**values | {"calls": [(number, digest, texts[i]) for number, digest, i in values["calls"]]})

    def of(self, history: History) -> Record:
        """The same with the last calls."""
        return dataclasses.replace(self, calls=history.calls())
