"""One thread at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType

from collogue.errors import ConcurrentUseError


class Exclusive:
    """``with`` it nobody else is in; a second thread that wants to is rejected."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.release = self._lock.release
        #: Whether nobody else is in it, and this thread now is.
        self.acquire_now: Callable[[], bool] = functools.partial(self._lock.acquire, False)

    def acquire(self) -> None:
        """Raises :class:`ConcurrentUseError`."""
        if not self.acquire_now():
            raise ConcurrentUseError(
                "another thread is using this communicator", hint="make one communicator for each thread, or use a lock"
            )

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def wait(self) -> threading.Lock:
        """For ``with``: a thread that wants in waits."""
        return self._lock
