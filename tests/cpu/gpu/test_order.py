"""The order of a communicator's calls on several streams, with a driver that only notes what it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from collogue.errors import CaptureError
from collogue.gpu import order
from collogue.gpu.order import StreamOrder

#: Streams of PyTorch's pool, and streams that it did not make.
POOL, POOL_TOO, FOREIGN, FOREIGN_TOO = 0x10, 0x20, 0x1000, 0x2000


class Machine:
    """Notes events: ``("record", stream)``, ``("wait", stream)``."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, int]] = []
        self.current = POOL
        self.capturing: set[int] = set()
        self.events = 0

    def call(self, of: StreamOrder, stream: int) -> list[tuple[str, int]]:
        """What one call does around its launch, which is noted too."""
        self.notes, self.current = [], stream
        of.enter(stream)
        self.notes.append(("launch", stream))
        of.leave(stream)
        return self.notes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    class Event:
        def __init__(self) -> None:
            made.events += 1

        def record(self, stream: int) -> None:
            made.notes.append(("record", stream))

        def wait(self, stream: int) -> None:
            made.notes.append(("wait", stream))

    def capturing(stream: Any) -> tuple[int, Any]:
        states = order.driver.CUstreamCaptureStatus
        active = int(stream) in made.capturing
        return 0, states.CU_STREAM_CAPTURE_STATUS_ACTIVE if active else states.CU_STREAM_CAPTURE_STATUS_NONE

    def current(index: int) -> tuple[int, int, int]:
        return (made.current if made.current >= FOREIGN else 3), 0, 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: stream)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", current, raising=False)
    monkeypatch.setattr(order.driver, "cuStreamIsCapturing", capturing)
    return made


def test_calls_on_one_stream_need_no_events(machine: Machine) -> None:
    of = StreamOrder(0)
    for _ in range(3):
        assert machine.call(of, POOL) == [("launch", POOL)]
        assert of.stream == POOL


def test_another_stream_waits_for_the_last_call(machine: Machine) -> None:
    of = StreamOrder(0)
    machine.call(of, POOL)
    assert machine.call(of, POOL_TOO) == [("record", POOL), ("wait", POOL_TOO), ("launch", POOL_TOO)]
    assert machine.call(of, 0) == [("record", POOL_TOO), ("wait", 0), ("launch", 0)]
    assert machine.events == 1


def test_a_stream_that_may_be_destroyed_is_not_asked_later(machine: Machine) -> None:
    """The event stands behind the call while the stream is there; a new stream may have the same handle, and waits all the same."""
    of = StreamOrder(0)
    assert machine.call(of, FOREIGN) == [("launch", FOREIGN), ("record", FOREIGN)]
    assert of.stream is None
    assert machine.call(of, FOREIGN) == [("wait", FOREIGN), ("launch", FOREIGN), ("record", FOREIGN)]
    assert machine.call(of, FOREIGN_TOO) == [("wait", FOREIGN_TOO), ("launch", FOREIGN_TOO), ("record", FOREIGN_TOO)]
    assert machine.call(of, POOL) == [("wait", POOL), ("launch", POOL)]
    assert machine.call(of, POOL) == [("launch", POOL)]
    assert machine.call(of, FOREIGN) == [("record", POOL), ("wait", FOREIGN), ("launch", FOREIGN), ("record", FOREIGN)]
    assert machine.events == 1


def test_a_stream_that_is_being_captured_is_not_waited_for(machine: Machine) -> None:
    of = StreamOrder(0)
    machine.call(of, POOL)
    machine.capturing.add(POOL)
    with pytest.raises(CaptureError, match="stream of this communicator's last call is being captured"):
        machine.call(of, POOL_TOO)
    assert machine.notes == []
    machine.capturing.clear()
    assert machine.call(of, POOL_TOO)[0] == ("record", POOL)


def test_caches_are_bounded() -> None:
    from collogue.calls.request import MOST_KEPT, keep

    cache: dict[int, int] = {}
    for i in range(3 * MOST_KEPT):
        assert keep(cache, i, i) == i
        assert len(cache) <= MOST_KEPT
        assert cache[i] == i
    keep(cache, 3 * MOST_KEPT - 1, 0)
    assert len(cache) == MOST_KEPT
