"""The thread that looks while nobody calls."""

from __future__ import annotations

import threading

import pytest

from collogue.errors import CollectiveTimeout, CollogueError, CorruptedWorkspace, PlatformError
from collogue.watch import Watch


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
    assert looks == 3
    watch.stop()


def test_stop_ends_it() -> None:
    looked = threading.Event()
    with Watch(looked.set, pytest.fail, 0.001) as watch:
        assert looked.wait(10)
    assert not watch._thread.is_alive()
