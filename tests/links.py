"""What processes of a gloo group do to each other: late, dead, interrupted, forked, in another order. Used by test_sockets.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from ranks import HIDDEN_SIZE, arguments, check_works, communicator

import collogue

TIMEOUT = 1.5
Told = tuple[str, str, float, str]


def told(comm: collogue.Communicator, call: Callable[[], Any] | None = None) -> Told:
    """Name and text of the error of a call, its seconds, and the error of ``check`` afterwards."""
    begin = time.monotonic()
    name = text = ""
    try:
        (call or (lambda: comm.all_reduce(**arguments(comm.rank))))()
    except (collogue.CollogueError, KeyboardInterrupt) as error:
        name, text = type(error).__name__, str(error)
    seconds = time.monotonic() - begin
    try:
        comm.check()
    except collogue.CollogueError as error:
        return name, text, seconds, type(error).__name__
    return name, text, seconds, ""


def late(comm: collogue.Communicator) -> Told:
    if comm.rank == 1:
        time.sleep(TIMEOUT + 1.5)
    return told(comm)


def late_in_the_middle(comm: collogue.Communicator) -> Told:
    """The others have the header of rank 1, and wait for its bytes."""
    link: Any = comm._group.link  # type: ignore[attr-defined]
    if comm.rank == 1:
        move = link._move
        link._move = lambda *args: (time.sleep(TIMEOUT + 1.5), move(*args))[1]
    try:
        return told(comm, lambda: comm.all_reduce(torch.zeros(8, HIDDEN_SIZE, dtype=torch.bfloat16)))
    finally:
        vars(link).pop("_move", None)


def without_tokens(comm: collogue.Communicator) -> Told:
    if comm.rank == 1:
        comm.all_reduce(torch.zeros(0, HIDDEN_SIZE, dtype=torch.bfloat16))
        time.sleep(TIMEOUT + 1.0)
        return told(comm, comm.check)
    return told(comm)


def other_tokens_and_late(comm: collogue.Communicator) -> Told:
    """What is wrong is told before the last rank has come."""
    if comm.rank == 1:
        time.sleep(TIMEOUT)
    return told(comm, lambda: comm.all_reduce(torch.zeros(1 + comm.rank, HIDDEN_SIZE, dtype=torch.bfloat16)))


def in_prepare(comm: collogue.Communicator) -> Told:
    return told(comm, (lambda: comm.prepare(4)) if comm.rank == 1 else None)


def interrupted(comm: collogue.Communicator) -> Told:
    """Rank 1 waits for rank 2, which is late, when somebody presses Ctrl-C."""
    if comm.rank == 1:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # processes of tests block it
        threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    if comm.rank == 2:
        time.sleep(1.2)
    return told(comm)


def interrupted_between(comm: collogue.Communicator) -> Told:
    """Rank 1 is interrupted where it has moved its bytes and computes."""
    if comm.rank == 1:
        gather = comm._engine._gather  # type: ignore[union-attr]

        def stop(*args: Any) -> Any:
            comm._engine._gather = gather  # type: ignore[union-attr]
            raise KeyboardInterrupt

        comm._engine._gather = stop  # type: ignore[union-attr]
    return told(
        comm, lambda: comm.all_reduce(**arguments(comm.rank) | {"residual": comm.shard(arguments(comm.rank)["residual"])}, sharded=True)
    )


def one_resets(comm: collogue.Communicator) -> Told:
    if comm.rank == 1:
        return told(comm, comm.reset)
    return told(comm)


def one_resets_while_others_wait(comm: collogue.Communicator) -> Told:
    if comm.rank == 1:
        time.sleep(0.3)
        return told(comm, comm.reset)
    return told(comm)


def reset_twice(comm: collogue.Communicator) -> Told:
    """Rank 0 resets alone and gives up; then all reset."""
    if comm.rank == 0:
        return told(comm, comm.reset)
    time.sleep(TIMEOUT + 0.5)
    return told(comm, comm.check)


SCENES = {
    scene.__name__: scene
    for scene in (
        late,
        late_in_the_middle,
        without_tokens,
        other_tokens_and_late,
        in_prepare,
        interrupted,
        interrupted_between,
        one_resets,
        one_resets_while_others_wait,
        reset_twice,
    )
}


def scenes_rank(group: dist.ProcessGroup, tell: Any) -> dict[str, Any]:
    """Every scene on one communicator: afterwards ``reset`` makes it usable again."""
    found: dict[str, Any] = {}
    comm = communicator(group, timeout=TIMEOUT)
    check_works(comm)
    for number, (name, scene) in enumerate(SCENES.items()):
        tell(name)
        found[name] = scene(comm)
        dist.barrier()
        comm.reset()
        comm.check()
        check_works(comm, seed=number)
    tell("order")
    found["order"] = _order(group, comm)
    tell("threads")
    found["threads"] = [_threads(group, made_by_threads) for made_by_threads in (False, True)]
    tell("one communicator in two threads")
    found["shared"] = _shared(comm)
    dist.barrier()
    comm.reset()
    tell("watched")
    found["watched"] = _watched(comm)
    tell("fork")
    found["fork"] = forked(comm, (None, comm.reset, comm.check, lambda: comm.prepare(1), comm.close))
    check_works(comm)
    tell("large")
    found["large"] = _large(group)
    tell("close")
    dist.barrier()
    if comm.rank == 1:
        comm.close()
    dist.barrier()
    if comm.rank != 1:
        found["closed"] = told(comm)
        comm.close(collective=False)
    return found


def _order(group: dist.ProcessGroup, first: collogue.Communicator) -> Told:
    """Two communicators, called in another order by rank 1, same shapes."""
    second = communicator(group, timeout=TIMEOUT)
    comms = (first, second) if first.rank != 1 else (second, first)
    found = told(comms[0])
    dist.barrier()
    first.reset()
    second.reset()
    check_works(first, seed=20)
    check_works(second, seed=21)
    second.close()
    return found


def _threads(group: dist.ProcessGroup, made_by_threads: bool) -> list[str]:
    """Two threads, each with its communicator, on one group."""
    wrong: list[str] = []

    def work(comm: collogue.Communicator | None) -> None:
        try:
            with comm or communicator(group, timeout=20) as mine:
                for step in range(20):
                    check_works(mine, tokens=1 + step % 7, seed=step)
        except BaseException as error:
            wrong.append(f"{type(error).__name__}: {error}")

    made = [None if made_by_threads else communicator(group, timeout=20) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(comm,)) for comm in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def _shared(comm: collogue.Communicator) -> list[str]:
    """A second thread calls, resets and gathers while rank 0 waits for the others."""
    if comm.rank != 0:
        time.sleep(0.5)
        told(comm)
        return []
    waiting = threading.Thread(target=told, args=(comm,))
    waiting.start()
    time.sleep(0.2)
    found = [told(comm, call)[0] for call in (None, comm.reset, lambda: comm.prepare(4))]
    waiting.join()
    return found


def _watched(comm: collogue.Communicator) -> list[str]:
    """A watch looks all the time, and is in nobody's way."""
    seen: list[str] = []
    with comm.watch(lambda error: seen.append(str(error)), interval=1e-5):
        for step in range(50):
            check_works(comm, tokens=1 + step % 7, seed=step)
    return seen


def forked(comm: collogue.Communicator, calls: Sequence[Callable[[], Any] | None]) -> list[str]:
    """What a forked child hears, call by call, while the others work on."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, ",".join(told(comm, each)[0] for each in calls).encode())
        os._exit(0)
    os.close(write)
    heard = b""
    while block := os.read(read, 1000):
        heard += block
    os.close(read)
    os.waitpid(child, 0)
    return heard.decode().split(",")


def _large(group: dist.ProcessGroup) -> bool:
    """Far more bytes than a socket holds."""
    with communicator(group, timeout=20, max_tokens=4096, hidden_size=1024, dtype=torch.float32) as comm:
        out = comm.all_reduce(torch.full((4096, 1024), float(1 + comm.rank)))
        assert out.reduced is not None
        return bool((out.reduced == 6.0).all())


def dying_rank(group: dist.ProcessGroup, tell: Any, when: str) -> Told | None:
    """Rank 2 dies: before the call, while the others wait, in the middle of a large one, or unheard."""
    comm = communicator(group, timeout=5, max_tokens=4096, hidden_size=1024, dtype=torch.float32)
    partial = torch.ones(4096, 1024)
    comm.all_reduce(partial[:4])
    if comm.rank == 2:
        if when == "later":
            time.sleep(0.7)
        if when == "in the middle":
            comm._group.link._move = lambda *args: os._exit(9)  # type: ignore[attr-defined]
            comm.all_reduce(partial)
        os.kill(os.getpid(), signal.SIGKILL)
    if when == "unheard":
        time.sleep(1.0)
        found = told(comm, lambda: None)
        return told(comm, comm.check)
    found = told(comm, lambda: comm.all_reduce(partial))
    again = told(comm, lambda: comm.all_reduce(partial))
    assert again[:1] == found[:1], (found, again)
    return found
