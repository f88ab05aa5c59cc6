"""One-shot whose CTAs send their next row ahead, beside the same with its rows in turn and beside two-shot: ``scripts/ahead.py OUT.json``.

Two ranks, H = 7168, bfloat16, residual + norm and a format. Every call lies in CUDA graphs of 100 and of 20; a time is the difference over
80, of the slowest rank, the median of the replays. The ways of one call are replayed in turn, and their outputs are compared bit for bit.
A round has communicators, tensors and graphs of its own; every round is kept in the file. Rows are microseconds.

By default the ranks are processes, with a GPU each: where two-shot begins to be faster is where plans should go over to it.
``--virtual``: threads of one process on one GPU. There is no NVLink in these times, a rank has a quarter of the GPU, and a CTA does four
times as many rows: they show instructions and latency, and that nothing hangs, not a wire.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import collogue
from collogue.contract.quant import parse
from collogue.gpu import jit
from collogue.planning.variant import Variant
from collogue.testing import environment, run_virtual
from collogue.testing.processes import run_processes
from collogue.tools.bench.timing import LONG, SHORT
from collogue.tools.record import circumstances

HIDDEN, REPLAYS = 7168, 15
#: By name: the algorithm, and whether rows may be sent ahead.
WAYS: dict[str, tuple[Any, bool]] = {
    "one-shot, in turn": ("one_shot", False),
    "one-shot, ahead": ("one_shot", True),
    "two-shot": ("two_shot", True),
}
Times = dict[str, list[float]]
_THREAD, _CUBIN = threading.local(), jit.cubin


def _cubin(variant: Variant, architecture: str) -> bytes:
    """What engines of this thread load."""
    return _CUBIN(variant if _THREAD.ahead else replace(variant, ahead=0), architecture)


jit.cubin = _cubin


def time_ways(
    group: Any, rank: int, meet: Callable[[], None], tokens: int, label: str, say: Callable[[str], None] = lambda text: None
) -> Times:
    """Of one rank: every way's time in each replay. Collective."""
    comms = {
        name: collogue.Communicator(group, max_tokens=tokens, hidden_size=HIDDEN, algorithm=algorithm, timeout=10.0, table=False)
        for name, (algorithm, _) in WAYS.items()
    }
    partial, residual, weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()
        for seed, shape in ((rank, (tokens, HIDDEN)), (98, (tokens, HIDDEN)), (99, (HIDDEN,)))
    )
    norm = collogue.RMSNorm(weight)
    quant = parse(label, global_scale=37.5, static_scale=0.02)
    outs, graphs = {}, {}
    with torch.inference_mode():
        for name, (algorithm, ahead) in WAYS.items():
            comm, out = comms[name], comms[name].empty(tokens, residual=True, norm=norm, quant=quant)
            assert comm.explain(tokens, quant=quant).algorithm == algorithm, f"{tokens} tokens are too many for {algorithm}"
            _THREAD.ahead = ahead
            comm.prepare(tokens, norm=norm, quant=quant)
            meet()
            for count in (LONG, SHORT):
                for turn in range(2):  # capturing waits for the GPU: one rank at a time
                    if turn == rank:
                        graph = graphs[name, count] = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                            for _ in range(count):
                                comm.all_reduce(partial, residual=residual, norm=norm, quant=quant, out=out)
                    meet()
            outs[name] = out
        taken: dict[tuple[str, int], list[float]] = {key: [] for key in graphs}
        for turn in range(REPLAYS + 1):
            for key, graph in graphs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                meet()
                start.record()
                graph.replay()
                end.record()
                meet()
                if turn:
                    taken[key].append(start.elapsed_time(end) * 1e3)
        first, *others = (dict(out.items()) for out in outs.values())
        for other in others:
            for name, tensor in first.items():
                assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), f"{name} differs"
    for comm in comms.values():
        comm.check()
    meet()
    graphs.clear()
    meet()
    for comm in comms.values():
        comm.close()
    say(f"{tokens} {label}")
    return {name: [(a - b) / (LONG - SHORT) for a, b in zip(taken[name, LONG], taken[name, SHORT], strict=True)] for name in WAYS}


def of_process(group: dist.ProcessGroup, tell: Callable[[str], None], jobs: Sequence[tuple[int, str]]) -> list[Times]:
    """A rank that is a process, with a GPU of its own."""

    def meet() -> None:
        torch.cuda.synchronize()
        dist.barrier(group)
        torch.cuda.synchronize()

    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        return [time_ways(group, dist.get_rank(group), meet, *job, tell) for job in jobs]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="One-shot with rows sent ahead, in turn, and two-shot.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--virtual", action="store_true", help="two ranks on one GPU, without NVLink")
    parser.add_argument("--tokens", type=int, nargs="*", default=(64, 128, 160, 192, 256, 320, 384, 448, 512))
    parser.add_argument("--format", nargs="*", default=("none", "fp8_static", "nvfp4/128x4"))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    environment.set_defaults()
    jobs = [(tokens, label) for label in given.format for tokens in given.tokens]
    ranks: list[Any]
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(given.rounds):
        if given.virtual:
            ranks = [run_virtual(2, lambda g, j=job: time_ways(g, g.rank, g.settle, *j), device="cuda:0") for job in jobs]  # type: ignore[misc]
        else:
            ranks = list(zip(*run_processes(2, of_process, jobs, device="cuda"), strict=True))
        slowest = [{way: statistics.median(map(max, zip(*(rank[way] for rank in job), strict=True))) for way in WAYS} for job in ranks]
        rounds.append({f"{tokens} {label}": us for (tokens, label), us in zip(jobs, slowest, strict=True)})
    us = {call: {way: statistics.median(found[call][way] for found in rounds) for way in WAYS} for call in rounds[0]}
    data = {"virtual": given.virtual, "us": us, "rounds": rounds, **circumstances()}
    given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print("tokens, format".ljust(24), *(way.rjust(18) for way in WAYS))
    for call, of_call in us.items():
        print(call.ljust(24), *(f"{of_call[way]:18.2f}" for way in WAYS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
