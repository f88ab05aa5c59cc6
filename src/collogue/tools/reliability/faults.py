"""Fault injection: what must not be done, and what every rank sees of it.

Each fault is what the ranks do instead of calling alike. Afterwards every rank asks ``comm.check()`` until it raises or the time is
over; then all reset the communicator and compare calls with the reference.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from collogue.errors import CollogueError
from collogue.gpu.journal import Journal
from collogue.gpu.workspace import CONTROL_WORDS, MARKS, MARKS_OFFSET, MAX_RANKS
from collogue.tools.reliability.scene import TIMEOUT, Scene

#: Seconds beyond the timeout in which every rank must know.
GRACE = 1.0
#: Seconds in which kernels of calls that differ end.
MISMATCHED = 1.0
#: Calls of the graph that a fault interrupts, and calls that the culprit makes.
GRAPH_CALLS, GRAPH_MADE = 200, 100
#: Large calls of a graph that is replayed until a process dies.
REPLAYED_CALLS = 50
_POLL = 0.01


Allowed: TypeAlias = tuple[str, ...]
_TIMEOUT, _MISMATCH = ("CollectiveTimeout",), ("MismatchedCall",)
_CORRUPTED = ("CorruptedWorkspace",)
_EITHER = (*_TIMEOUT, *_MISMATCH)


@dataclass(frozen=True)
class Fault:
    """``act`` is done by every rank. ``others`` and ``culprit``: the errors that they may see; none: nothing must be seen.

    ``on_cpu``: also makes sense where the reference runs. ``last``: the group cannot be used afterwards.
    """

    name: str
    what: str
    act: Callable[[Scene], None]
    others: Allowed = ()
    culprit: Allowed = ()
    on_cpu: bool = False
    last: bool = False


def _calls(usual: str, culprit: str) -> Callable[[Scene], None]:
    """Names of calls, with commas, that the ranks make and that the culprit makes instead."""

    def act(scene: Scene) -> None:
        for name in filter(None, (culprit if scene.culprit else usual).split(",")):
            scene.call(name)

    return act


def _late(name: str) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        if scene.culprit:
            time.sleep(1.6 * scene.comm.timeout)
        scene.call(name)

    return act


def _flip(offset: Callable[[Scene], int], bit: int = 0, *, on_first: bool = False) -> Callable[[Scene], None]:
    """The culprit (or rank 0) flips a bit of its workspace while nothing runs, then all call."""

    def act(scene: Scene) -> None:
        if scene.comm.rank == 0 if on_first else scene.culprit:
            scene.flip(offset(scene), bit)
        scene.comm._group.barrier()
        scene.call("a")

    return act


def _mark(scene: Scene) -> int:
    """Of the hash that the culprit has left here for the last call."""
    calls = int(scene.words(4)[0])
    return MARKS_OFFSET + ((calls - 1) % MARKS * MAX_RANKS + scene.comm.world_size - 1) * 8 + 4


def _rest(offset: int) -> Callable[[Scene], None]:
    """The culprit flips a bit of its control words, and nobody calls."""

    def act(scene: Scene) -> None:
        if scene.culprit:
            scene.flip(offset)

    return act


def _threads(scene: Scene) -> None:
    """Two threads of one rank in calls that communicate nothing, until one of them is rejected."""
    given = scene.calls["a"]
    scene.comm.prepare(given.case.tokens, norm=given.kwargs["norm"], operation="finish", residual=False)
    if not scene.culprit:
        return
    refused: list[CollogueError] = []
    done = time.perf_counter() + TIMEOUT
    interval = sys.getswitchinterval()

    def hammer() -> None:
        while not refused and time.perf_counter() < done:
            try:
                scene.comm.finish(given.partial, norm=given.kwargs["norm"])
            except CollogueError as error:
                refused.append(error)

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=hammer) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if refused:
        raise refused[0]


def _graph(scene: Scene) -> None:
    """The culprit's graph holds half as many calls; the others' must end in one timeout, and their watch must tell."""
    graph, stream = scene.capture("a", GRAPH_MADE if scene.culprit else GRAPH_CALLS)
    scene.settle()
    with scene.comm.watch(scene.watched.append, interval=_POLL):
        with torch.cuda.stream(stream):
            graph.replay()
        scene.synchronize()
        ended = time.perf_counter() + 10 * _POLL
        while not scene.watched and not scene.culprit and time.perf_counter() < ended:
            time.sleep(_POLL)
    if scene.watched:
        raise scene.watched[0]


def _killed(scene: Scene) -> None:
    if scene.culprit:
        _die()
    time.sleep(0.4)
    scene.call("a")


def _die() -> None:
    time.sleep(0.3)  # what this rank has told must have left it
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_inside(scene: Scene) -> None:
    """All replay graphs of large calls, one after the other; the culprit dies meanwhile."""
    graph, stream = scene.capture("large", REPLAYED_CALLS)
    scene.settle()
    if scene.culprit:
        threading.Thread(target=_die).start()
    ended = time.perf_counter() + 3.0
    with torch.cuda.stream(stream):
        while time.perf_counter() < ended:
            graph.replay()
            stream.synchronize()
            scene.comm.check()


FAULTS: tuple[Fault, ...] = (
    Fault("a call left out", "the last of two equal calls is not made by one rank", _calls("a,a", "a"), _TIMEOUT, _TIMEOUT),
    Fault("a call left out between others", "of calls a, b one rank makes only b", _calls("a,b", "b"), _EITHER, _EITHER),
    Fault("a call too many", "one rank makes a second call", _calls("a", "a,a"), _TIMEOUT, _TIMEOUT),
    Fault("a late rank", "one rank calls 1.6 timeouts after the others", _late("a"), _TIMEOUT, _TIMEOUT),
    Fault("a late rank, two-shot", "the same, 700 rows", _late("large"), _TIMEOUT, _TIMEOUT),
    Fault("a late rank, sharded", "the same, 64 rows", _late("sharded"), _TIMEOUT, _TIMEOUT),
    Fault("a late rank, reduce_scatter", "the same, 64 rows", _late("scattered"), _TIMEOUT, _TIMEOUT),
    Fault("a late rank, all_gather", "the same, 64 rows", _late("gathered"), _TIMEOUT, _TIMEOUT),
    Fault("a call left out, two-shot", "the last of two equal calls of 700 rows", _calls("large,large", "large"), _TIMEOUT, _TIMEOUT),
    Fault("other tokens, one-shot", "2 rows, on one rank 3", _calls("a", "more tokens"), _MISMATCH, _MISMATCH, on_cpu=True),
    Fault("other tokens, two-shot", "700 rows, on one rank 701", _calls("large", "larger"), _MISMATCH, _MISMATCH, on_cpu=True),
    Fault("other tokens, sharded", "64 rows, on one rank 66", _calls("sharded", "more sharded"), _MISMATCH, _MISMATCH, on_cpu=True),
    Fault("another eps", "1e-6, on one rank 1e-5; hangs nobody", _calls("a", "another eps"), _MISMATCH, _MISMATCH, on_cpu=True),
    Fault(
        "another format", "none, on one rank FP8 per token; hangs nobody", _calls("a", "another format"), _MISMATCH, _MISMATCH, on_cpu=True
    ),
    Fault("another order", "calls a, b; on one rank b, a", _calls("a,b", "b,a"), _MISMATCH, _MISMATCH, on_cpu=True),
    Fault("call counter flipped", "one bit of the call number in one rank's control words", _flip(lambda scene: 4), _EITHER, _EITHER),
    Fault("mark flipped", "one bit of what rank 0 knows of the last call of another", _flip(_mark, on_first=True), _CORRUPTED, _CORRUPTED),
    Fault("stop word flipped", "one bit of one rank's abort flag", _flip(lambda scene: 8), _TIMEOUT, _CORRUPTED),
    Fault("stop word flipped, a fault", "the same, bit 8", _flip(lambda scene: 8, 8), _TIMEOUT, _CORRUPTED),
    Fault("stop word flipped, no fault", "the same, bit 16", _flip(lambda scene: 8, 16), _TIMEOUT, _CORRUPTED),
    Fault("what is left to clean flipped", "one bit of how much one rank has to clean", _rest(12), (), _CORRUPTED),
    Fault("claim of the record flipped", "one bit of who fills one rank's failure record", _rest(16), (), _CORRUPTED),
    Fault("canary flipped", "one bit between one rank's control words", _rest(CONTROL_WORDS), (), _CORRUPTED),
    Fault("two threads at once", "two threads of one rank call", _threads, (), ("ConcurrentUseError",)),
    Fault("a graph", f"graphs of {GRAPH_CALLS} calls are replayed, one rank's holds {GRAPH_MADE}", _graph, _TIMEOUT, _TIMEOUT),
    Fault("a killed process", "one process is killed before it calls", _killed, _TIMEOUT, (), last=True),
    Fault(
        "a process killed in large calls",
        "one process is killed while all replay calls of 700 rows",
        _killed_inside,
        _TIMEOUT,
        (),
        last=True,
    ),
)


def commit(fault: Fault, scene: Scene) -> dict[str, Any]:
    """What this rank saw of ``fault``, and whether the communicator is as good as new afterwards. Collective."""
    scene.watched.clear()
    scene.call("a")  # there is a call before
    scene.settle()
    start = time.perf_counter()
    by, error = _see(fault, scene)
    seconds = time.perf_counter() - start
    over = _kernels_over(scene, start)
    allowed = fault.culprit if scene.culprit else fault.others
    saw = type(error).__name__ if error is not None else None
    row: dict[str, Any] = {
        "rank": scene.comm.rank,
        "culprit": scene.culprit,
        "saw": saw,
        "by": by,
        "seconds": round(seconds, 3),
        "kernels_over": over,
        "text": error.message.splitlines()[0] if error is not None else None,
        "hint": re.sub(r"--journal \S+", "--journal FILE", error.hint) if error is not None else None,
        "journal": _journal_of(error),
    }
    row["as_expected"] = saw in allowed and seconds <= scene.comm.timeout + GRACE if allowed else saw is None
    if over is not None:  # calls that differ end within a second, whatever the timeout
        row["as_expected"] &= over <= (MISMATCHED if saw == "MismatchedCall" else scene.comm.timeout + GRACE)
    row["afterwards"] = _rebuild(scene) if fault.last else _renew(scene)
    return row


def _see(fault: Fault, scene: Scene) -> tuple[str | None, CollogueError | None]:
    """How this rank learnt of the fault, and the error."""
    allowed = fault.culprit if scene.culprit else fault.others
    try:
        fault.act(scene)
    except CollogueError as error:
        return ("watch" if scene.watched else "call"), error
    # Who is to see nothing looks as long as the others take.
    done = time.perf_counter() + scene.comm.timeout * (1.0 if not allowed else 1.0 + GRACE + 1.0)
    while time.perf_counter() < done:
        try:
            scene.comm.check()
        except CollogueError as error:
            return "check", error
        time.sleep(_POLL)
    return None, None


def _kernels_over(scene: Scene, start: float) -> float | None:
    """Seconds from ``start`` until this rank's kernels had ended, which no look at them makes sooner; ``None`` on the CPU."""
    if scene.device.type == "cpu":
        return None
    torch.cuda.synchronize(scene.device)
    return round(time.perf_counter() - start, 3)


def _journal_of(error: CollogueError | None) -> bool | None:
    """Whether the file that the error names can be read and holds calls; ``None`` where it names none."""
    named = re.search(r"--journal (\S+)", error.hint) if error is not None else None
    if named is None:
        return None
    with contextlib.suppress(CollogueError, OSError):
        return any(Journal.load(Path(named[1])).calls.values())
    return False


def _renew(scene: Scene) -> str | None:
    """Reset, and compare every call with the reference: what is wrong, if anything is. Collective."""
    scene.settle()
    scene.comm.reset()
    try:
        return scene.wrong()
    except CollogueError as error:
        return f"{type(error).__name__}: {error.message}".splitlines()[0]


def _rebuild(scene: Scene) -> str | None:
    """Without the last rank: a new group and communicator, and calls on it."""
    left = list(range(scene.comm.world_size - 1))
    timeout = scene.comm.timeout
    scene.comm.close(collective=False)
    group = dist.new_group(left, backend="gloo", use_local_synchronization=True)
    try:
        smaller = Scene.make(group, scene.device, timeout, scene.comm.hidden_size, rows=scene.calls["large"].case.tokens)
        return smaller.wrong()
    except CollogueError as error:
        return f"{type(error).__name__}: {error.message}".splitlines()[0]


def faults_of(device: str) -> Iterator[Fault]:
    """Those that can be made there."""
    return (fault for fault in FAULTS if device == "cuda" or fault.on_cpu)
