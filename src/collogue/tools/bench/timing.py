"""Timing by the difference of two graph lengths: the time of a CUDA graph of 100 calls less that of a graph of 20, divided by 80.

The difference leaves out the launch of the graph and the skew in which the ranks start.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

SHORT, LONG = 20, 100
#: Input sets that calls take in turn.
SETS = 3


@dataclass(frozen=True)
class Latency:
    """Microseconds per call: the slope of the medians, and the 10th and 90th percentile of the replays' own slopes."""

    us: float
    low_us: float
    high_us: float


@dataclass(frozen=True)
class EagerLatency(Latency):
    """Of calls from Python: ``us`` from the first call to the end of the GPU's work, ``host_us`` until the last call returned."""

    host_us: float


class Subject(Protocol):
    """Something that can be timed, and can show that what it computes is right."""

    #: Whether the gate also holds after a graph of many calls (not where a call overwrites its own input).
    repeatable: bool

    def call(self, turn: int) -> object:
        """Enqueue one call on the current stream, on input set ``turn % SETS``."""

    def gate(self, run: Callable[[], None]) -> str | None:
        """Spoil the outputs, ``run()`` the calls, and return what is wrong with the outputs, if anything is."""


def slope(short: Sequence[float], long: Sequence[float]) -> Latency:
    """Latency from the times (us) of replays of both graphs; the n-th of each were taken one after the other."""
    each = sorted((b - a) / (LONG - SHORT) for a, b in zip(short, long, strict=True))
    middle = (statistics.median(long) - statistics.median(short)) / (LONG - SHORT)
    return Latency(middle, each[round(0.1 * (len(each) - 1))], each[round(0.9 * (len(each) - 1))])


def slowest(ranks: Sequence[Latency]) -> Latency:
    """The latency of the rank whose calls take longest."""
    return max(ranks, key=lambda latency: latency.us)


class Chain:
    """Two CUDA graphs of calls back to back, captured on ``stream``."""

    def __init__(self, call: Callable[[int], object], stream: torch.cuda.Stream) -> None:
        self.stream = stream
        torch.cuda.synchronize()
        self.short, self.long = (_capture(call, count, stream) for count in (SHORT, LONG))

    def run(self) -> None:
        """Replay the short graph."""
        with torch.cuda.stream(self.stream):
            self.short.replay()

    def replay(self, graph: torch.cuda.CUDAGraph) -> float:
        """Microseconds of one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e3


def _capture(call: Callable[[int], object], count: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # Other threads (NCCL's watchdog) may call CUDA meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for turn in range(count):
                call(turn)
        finally:
            graph.capture_end()
    return graph


def captured(step: Callable[[], T], device: torch.device, warmups: int = 3) -> Callable[[], T]:
    """``step``, run ``warmups`` times; on a GPU captured in a CUDA graph, whose results stay where they are."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = step()

    def run() -> T:
        graph.replay()
        return result

    return run


def microseconds(run: Callable[[], object], device: torch.device, count: int = 2) -> float:
    """Of one of ``count`` runs in a row; on the CPU of one run, whose time means nothing."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    events[0].record()
    for _ in range(count):
        run()
    events[1].record()
    torch.cuda.synchronize()
    return float(events[0].elapsed_time(events[1])) * 1e3 / count


def everywhere(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """``value`` of every rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def meet(group: dist.ProcessGroup) -> None:
    """Every rank is here and every GPU is idle."""
    torch.cuda.synchronize()
    dist.barrier(group)
    torch.cuda.synchronize()


def measure(chains: Mapping[str, Chain], replays: int, meet: Callable[[], None]) -> dict[str, Latency]:
    """Time all chains in turn, ``replays`` times round. The first round warms up and is not counted.

    ``meet`` is called before every replay: all ranks are there, and all their GPUs are idle, when it returns.
    """
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in chains}
    for turn in range(replays + 1):
        for name, chain in chains.items():
            for graph, taken in zip((chain.short, chain.long), times[name], strict=True):
                meet()
                us = chain.replay(graph)
                if turn:
                    taken.append(us)
    return {name: slope(short, long) for name, (short, long) in times.items()}


class EagerCalls:
    """Calls from Python; stands where a :class:`Chain` does."""

    #: Calls of one measurement.
    COUNT = 200

    def __init__(self, call: Callable[[int], object]) -> None:
        self._call = call

    def run(self) -> None:
        """One call on every input set."""
        for turn in range(SETS):
            self._call(turn)

    def time(self, meet: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
        """Microseconds per call until all have returned, and until the GPU has done them."""
        meet()
        start = clock()
        for turn in range(self.COUNT):
            self._call(turn)
        returned = clock()
        torch.cuda.synchronize()
        return (returned - start) / self.COUNT * 1e6, (clock() - start) / self.COUNT * 1e6


def measure_eager(calls: Mapping[str, EagerCalls], replays: int, meet: Callable[[], None]) -> dict[str, EagerLatency]:
    """Time all in turn, ``replays`` times round, after a round that warms up. Medians; percentiles as in :func:`slope`."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(replays + 1):
        for name, subject in calls.items():
            taken = subject.time(meet)
            if turn:
                times[name].append(taken)
    found = {}
    for name, taken_all in times.items():
        host, whole = (sorted(column) for column in zip(*taken_all, strict=True))
        last = len(whole) - 1
        low, high = whole[round(0.1 * last)], whole[round(0.9 * last)]
        found[name] = EagerLatency(statistics.median(whole), low, high, statistics.median(host))
    return found
