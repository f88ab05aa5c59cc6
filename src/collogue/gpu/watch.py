"""A thread that notices failures while nobody calls: during replays of CUDA graphs."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from types import TracebackType

from collogue.contract.number import check_seconds
from collogue.errors import ArgumentError, ClosedError, CollogueError


class Watch:
    """Calls ``check`` every ``interval`` seconds and ``on_failure`` with the first error that it raises, once, in its own thread.

    It must not be used to call the communicator; tell the thread that owns it. ``stop()`` ends it, and so does closing the communicator
    or the end of the process; also a context manager. Raises :class:`ArgumentError` for an interval that is not a time.
    """

    def __init__(self, check: Callable[[], None], on_failure: Callable[[CollogueError], None], interval: float) -> None:
        check_seconds("interval", interval, threading.TIMEOUT_MAX)
        if not callable(on_failure):
            raise ArgumentError(f"on_failure is a {type(on_failure).__name__}", hint="pass a function that takes the error")
        self._check, self._on_failure, self._interval = check, on_failure, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collogue-watch", daemon=True)
        atexit.register(self._at_exit)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._look()
        finally:
            atexit.unregister(self._at_exit)

    def _look(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._check()
            except ClosedError:
                return
            except CollogueError as error:
                self._on_failure(error)
                return

    def stop(self) -> None:
        """End the thread; returns when it has ended."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _at_exit(self) -> None:
        """A thread that is inside CUDA when the interpreter goes may end the process in another way than it wanted."""
        self._stop.set()
        self._thread.join(1.0)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def while_alive(method: Callable[[], None]) -> Callable[[], None]:
    """``method``, as long as something else keeps its object; then :class:`ClosedError`."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is None:
            raise ClosedError("the communicator is gone", hint="keep it as long as it is watched")
        alive()

    return call
