"""Ranks whose exchanges are queued, as NCCL does it, without a GPU: a thread is the GPU of a rank, a store moves the bytes.

What processes of such a group do to each other; used by test_watchdog.py.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from links import Told, forked, told
from ranks import HIDDEN_SIZE, arguments, check_works, communicator

import collogue
from collogue.group import TorchGroup

TIMEOUT = 1.5


class Passed:
    """An event."""

    def __init__(self) -> None:
        self.is_set = threading.Event()

    def query(self) -> bool:
        return self.is_set.is_set()


class FakeQueue:
    """Does what it is given one after the other, in a thread. The host waits for each exchange, as results are looked at on the CPU."""

    def __init__(self, store: Any, name: str, rank: int, size: int) -> None:
        self._store, self._name, self._rank, self._size = store, name, rank, size
        self._count = self.aborts = 0
        self.aborted = threading.Event()
        self._items: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._items.get()()

    def put(self, item: Callable[[], object]) -> None:
        self._items.put(item)

    def swap(self, given: list[torch.Tensor], taken: list[torch.Tensor]) -> None:
        self._count += 1
        number, done = self._count, threading.Event()
        self.put(lambda: (self._move(number, given, taken), done.set()))
        while not done.wait(0.001) and not self.aborted.is_set():
            pass

    def _move(self, number: int, given: list[torch.Tensor], taken: list[torch.Tensor]) -> None:
        """As many bytes as both have: nobody looks whether that is right."""
        others = [r for r in range(self._size) if r != self._rank]
        for rank in others:
            self._store.set(f"{self._name}/{number}/{self._rank}/{rank}", given[rank].numpy().tobytes().hex())
        for rank in others:
            key = f"{self._name}/{number}/{rank}/{self._rank}"
            while not self._store.check([key]):
                if self.aborted.wait(0.001):
                    return
            found = torch.tensor(list(bytes.fromhex(self._store.get(key).decode())), dtype=torch.uint8)
            count = min(len(found), taken[rank].numel())
            taken[rank][:count] = found[:count]

    def event(self) -> Passed:
        event = Passed()
        self.put(event.is_set.set)
        return event

    def free(self, events: Sequence[Any]) -> None:
        assert all(event.query() for event in events)

    def enter_thread(self) -> None:
        """Nothing."""

    def abort(self) -> None:
        self.aborts += 1
        self.aborted.set()


#: How many queues of a process group there were: none gets what another has sent.
_queues: Counter[str] = Counter()


def queued(group: dist.ProcessGroup) -> TorchGroup:
    known = TorchGroup(group, "cpu")
    _queues[known.name] += 1
    known.queue = FakeQueue(group.get_group_store(), f"bytes {_queues[known.name]}", known.rank, known.size)  # type: ignore[assignment]
    return known


def make(group: dist.ProcessGroup, **options: Any) -> collogue.Communicator:
    return communicator(queued(group), timeout=TIMEOUT, **options)


def call(comm: collogue.Communicator, tokens: int = 4, eps: float = 1e-5) -> Callable[[], Any]:
    given = arguments(comm.rank, tokens)
    given["norm"] = collogue.RMSNorm(given["norm"].weight, eps)
    return lambda: comm.all_reduce(**given)


def until_found(comm: collogue.Communicator, *calls: Callable[[], Any], seconds: float = TIMEOUT + 2.0) -> Told:
    """Make the calls, and ask until something has been found: what, after how long, and what ``reset`` says then."""

    def make_calls() -> None:
        for each in calls:
            each()
        while time.monotonic() < end:
            comm.check()
            time.sleep(0.02)

    end = time.monotonic() + seconds
    name, text, took, _ = told(comm, make_calls)
    return name, text, took, told(comm, comm.reset)[0]


def late(comm: collogue.Communicator) -> Told:
    if comm.rank == 1:
        time.sleep(TIMEOUT + 1.0)
        return until_found(comm, call(comm))
    return until_found(comm, call(comm))


def late_gpu(comm: collogue.Communicator) -> Told:
    if comm.rank == 1:
        comm._group.queue.put(lambda: time.sleep(TIMEOUT + 1.5))  # type: ignore[attr-defined]
    return until_found(comm, call(comm))


def other_order(comm: collogue.Communicator) -> Told:
    """Both are known, and of the same bytes."""
    calls = call(comm), call(comm, eps=1e-6)
    return until_found(comm, *(calls if comm.rank != 1 else calls[::-1]))


def other_size(comm: collogue.Communicator) -> Told:
    return until_found(comm, call(comm, 2 if comm.rank == 1 else 4))


def one_is_new(comm: collogue.Communicator) -> Told:
    """Rank 1 asks the others about a call, which they do not make."""
    return until_found(comm, call(comm, 3) if comm.rank == 1 else call(comm))


def one_more(comm: collogue.Communicator) -> Told:
    """Rank 1 has made one call less when all make a new one."""
    return until_found(comm, *[call(comm)] * (comm.rank != 1), call(comm, 3))


def closed(comm: collogue.Communicator) -> Told:
    if comm.rank == 1:
        comm.close()
        return "ClosedError", "rank 1 has closed the communicator", 0.0, "PlatformError"
    return until_found(comm, call(comm))


SCENES = {scene.__name__: scene for scene in (late, late_gpu, other_order, other_size, one_is_new, one_more, closed)}


def scenes_rank(group: dist.ProcessGroup, tell: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, scene in SCENES.items():
        tell(name)
        comm = make(dist.new_group([0, 1, 2]))
        for known in (call(comm), call(comm, eps=1e-6), call(comm, 2)):
            known()
        found[name] = scene(comm)
        found[f"{name}, aborts"] = comm._group.queue.aborts if name != "closed" else 1  # type: ignore[attr-defined]
        dist.barrier()
        comm.close(collective=False)
    tell("two communicators")
    found["two"] = _two(dist.new_group([0, 1, 2]))
    comm = make(group)
    tell("links")
    found["links"] = _asked(comm)
    tell("different and new")
    found["new"] = told(comm, call(comm, 5 + comm.rank))
    comm.reset()
    check_works(comm, seed=1)
    found["aborts"] = comm._group.queue.aborts  # type: ignore[attr-defined]
    tell("fork")
    found["fork"] = forked(comm, (call(comm), comm.reset, comm.check, comm.close))
    check_works(comm, seed=2)
    tell("again")
    comm.close()
    with make(group) as comm:
        check_works(comm, seed=3)
    dist.barrier()
    found["threads"] = [thread.name for thread in threading.enumerate() if thread.name.startswith("collogue")]
    return found


def _two(group: dist.ProcessGroup) -> Told:
    """Two communicators of a group, called in another order by rank 1, same shapes."""
    shared = queued(group)
    other = TorchGroup(group, "cpu")
    other.queue = shared.queue
    comms = [communicator(each, timeout=TIMEOUT) for each in (shared, other)]
    for comm in comms:
        call(comm)()
    first, second = comms if shared.rank != 1 else comms[::-1]
    found = until_found(first, call(first), call(second))
    dist.barrier()
    for comm in comms:
        comm.close(collective=False)
    return found


def _asked(comm: collogue.Communicator) -> list[str]:
    """What is compared on the host in two rounds of the same calls."""
    link: Any = comm._group.link  # type: ignore[attr-defined]
    exchange, texts = link.exchange, list[str]()
    link.exchange = lambda what, *rest: (texts.append(what), exchange(what, *rest))[1]
    for _ in range(2):
        for tokens in (4, 2):
            check_works(comm, tokens=tokens)
        texts.append("")
    del link.exchange
    return texts


def dying_rank(group: dist.ProcessGroup, tell: Any, when: str) -> Told | None:
    """Rank 2 dies before a call of the others, or while they wait for it."""
    comm = communicator(queued(group), timeout=5, hidden_size=HIDDEN_SIZE)
    call(comm)()
    if comm.rank == 2:
        time.sleep(0.7 * (when == "later"))
        os.kill(os.getpid(), signal.SIGKILL)
    return until_found(comm, call(comm), seconds=8)
