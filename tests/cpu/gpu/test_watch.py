"""The thread that looks while nobody calls."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import pytest
from ranks import communicator

from collogue.errors import ArgumentError, CollectiveTimeout, CollogueError, CorruptedWorkspace, PlatformError
from collogue.gpu.watch import Watch, while_alive
from collogue.testing import VirtualGroup, run_virtual


@pytest.mark.parametrize("kind", [CollectiveTimeout, CorruptedWorkspace, PlatformError])
def test_the_first_error_is_told_once(kind: type[CollogueError]) -> None:
    told: list[CollogueError] = []
    looks, error = 0, kind("x", hint="y")

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks >= 3:
            raise error

    watch = Watch(check, told.append, 0.001)
    watch._thread.join(10)
    assert not watch._thread.is_alive()
    assert told == [error]
    watch.stop()
    assert looks == 3


def test_nothing_keeps_a_thread_that_has_ended() -> None:
    """Nor the communicator that it has asked."""
    watch = Watch(lambda: None, pytest.fail, 0.001)
    watch.stop()
    alive = weakref.ref(watch)
    del watch
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("interval", ["a", None, True, 0, 0.0, -1.0, float("nan"), float("inf"), 2 * threading.TIMEOUT_MAX])
def test_intervals_that_are_none_are_refused(interval: Any) -> None:
    """Before there is a thread, which would end unheard or never pause."""
    threads = threading.active_count()
    with pytest.raises(ArgumentError, match=f"interval is {interval!r}\nhint: give a positive number of seconds".replace("+", ".")):
        Watch(lambda: None, pytest.fail, interval)
    assert threading.active_count() == threads


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(ArgumentError, match="on_failure is a list\nhint: pass a function"):
        Watch(lambda: None, [], 0.1)  # type: ignore[arg-type]


def test_a_watch_keeps_no_communicator_alive() -> None:
    """One that is dropped ends its watch, and that is no failure."""

    class Watched:
        def check(self) -> None:
            looked.set()

    looked, watched = threading.Event(), Watched()
    watch = Watch(while_alive(watched.check), pytest.fail, 0.001)
    assert looked.wait(10)
    alive = weakref.ref(watched)
    del watched
    watch._thread.join(10)
    assert (alive(), watch._thread.is_alive()) == (None, False)


def test_stop_ends_it() -> None:
    looked = threading.Event()
    with Watch(looked.set, pytest.fail, 0.001) as watch:
        assert looked.wait(10)
    assert not watch._thread.is_alive()


def test_a_closed_communicator_is_no_failure() -> None:
    """Whoever forgets to stop the thread hears nothing, and the thread ends."""

    def rank(group: VirtualGroup) -> None:
        comm, told = communicator(group), list[CollogueError]()
        watch = comm.watch(told.append, 0.001)
        time.sleep(0.01)
        assert watch._thread.is_alive()
        comm.close()
        watch._thread.join(10)
        assert not watch._thread.is_alive()
        assert not told

    run_virtual(1, rank)


@pytest.mark.slow
def test_the_end_of_the_process_waits_for_a_look() -> None:
    """A daemon thread inside CUDA's driver must not outlive the interpreter."""
    text = """
import time
from collogue.gpu.watch import Watch, while_alive

def look():
    time.sleep(0.2)
    print("looked", flush=True)

Watch(look, print, 0.001)
time.sleep(0.05)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "looked\n"
