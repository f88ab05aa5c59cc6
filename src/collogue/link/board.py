"""Where every rank of a process group publishes a record that the others read: the group's store."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store


class Board:
    """The records of all ranks. A thread of its own talks to the store: one that no longer answers keeps nobody else waiting.

    ``records``: the last that were read, by rank; of this rank nothing. ``lost``: why the store cannot be used any more.
    Every rank makes one with a first record, and all have done so before any reads.
    """

    def __init__(self, store: Store, name: str, rank: int, size: int, first: str) -> None:
        self._store, self._size, self._rank = store, size, rank
        self._keys = [f"collogue/{name}/{r}" for r in range(size)]
        self._others = [r for r in range(size) if r != rank]
        self.records: Sequence[bytes | None] = [None] * size
        self.lost = ""
        self._mine = self._published = first
        store.set(self._keys[rank], first)
        self._asked, self._answered = threading.Event(), threading.Event()
        self._answered.set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="collogue-store", daemon=True)

    def start(self) -> None:
        """Every rank has made its board."""
        self._thread.start()

    def exchange(self, mine: str, seconds: float) -> bool:
        """Publish and read. Returns whether that was done within so many seconds; else it goes on. For one thread."""
        if not self._answered.wait(seconds):  # it is still at the last one
            return False
        self._mine = mine
        self._answered.clear()
        self._asked.set()
        return self._answered.wait(seconds)

    def _run(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            try:
                if self._mine != self._published:
                    given = self._mine
                    self._store.set(self._keys[self._rank], given)
                    self._published = given
                if not self._closed:
                    self.records = self._read()
            except Exception as error:  # whichever the store raises: what it is for people is all that matters
                self.lost = str(error) or type(error).__name__
            self._answered.set()
            if self._closed:
                return

    def _read(self) -> list[bytes | None]:
        keys = [self._keys[r] for r in self._others]
        several = getattr(self._store, "has_extended_api", lambda: False)()
        found = self._store.multi_get(keys) if several else map(self._store.get, keys)
        records: list[bytes | None] = [None] * self._size
        for rank, record in zip(self._others, found, strict=True):
            records[rank] = bytes(record)
        return records

    def close(self, last: str, seconds: float) -> None:
        """Publish a last record, and end the thread, if the store answers within so many seconds."""
        self._mine, self._closed = last, True
        self._asked.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)
