"""Times of several ways to do the same, in turn: on virtual ranks of one GPU, or on others that meet."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """What a :class:`collogue.testing.VirtualGroup` has, too. ``settle``: afterwards nothing of any rank runs on any GPU."""

    rank: int
    size: int

    def settle(self) -> None: ...


class Processes:
    """Ranks that are processes."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def settle(self) -> None:
        """Wait for this GPU, then for every rank."""
        torch.cuda.synchronize()
        dist.barrier(self.group)
        torch.cuda.synchronize()


def time_ways(
    group: Ranks,
    ways: Mapping[str, Callable[[], Any]],
    counts: tuple[int, int],
    replays: int,
    replayed: Callable[[str], None] = lambda way: None,
) -> dict[str, list[float]]:
    """Microseconds of a call of each way on this rank, by replay. Calls lie in CUDA graphs of many and of few of them (``counts``), which
    all ranks replay together, the ways in turn; a time is the difference of the two over the calls between them. ``replayed(way)`` is
    called behind each replay, and once behind the first call.
    """
    graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
    for way, call in ways.items():
        group.settle()
        call()
        group.settle()
        replayed(way)
        for count in counts:
            for turn in range(group.size):  # capturing waits for the GPU: one rank at a time
                if turn == group.rank:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                        for _ in range(count):
                            call()
                    graphs[way, count] = graph
                group.settle()
    times: dict[tuple[str, int], list[float]] = {key: [] for key in graphs}
    for turn in range(replays + 2):
        for key, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            group.settle()
            start.record()
            graph.replay()
            end.record()
            group.settle()
            replayed(key[0])
            if turn > 1:
                times[key].append(start.elapsed_time(end) * 1e3)
    group.settle()
    graphs.clear()
    group.settle()
    many, few = counts
    return {way: [(long - short) / (many - few) for long, short in zip(times[way, many], times[way, few], strict=True)] for way in ways}


def of_slower_rank(by_rank: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """The median over replays of the slower rank's time of each way."""
    return {way: statistics.median(map(max, zip(*(times[way] for times in by_rank), strict=True))) for way in by_rank[0]}
