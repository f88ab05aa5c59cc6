"""Ways of an all-reduce beside each other, in one run: ``scripts/one_shot.py algorithms|clearing|ctas OUT.json [--world N]``.

H = 7168, bfloat16, residual + norm and a format. Every call lies in CUDA graphs of 100 and of 20; a time is the difference over
80, of the slowest rank, the median of the replays. The ways of one call are replayed in turn, and their outputs are compared bit for bit.
A round has communicators, tensors and graphs of its own; every round is kept in the file. Rows are microseconds.

``algorithms``: one-shot and two-shot. Where two-shot begins to be faster is where plans should go over to it.

``clearing``: what cleared slots cost. One-shot with 128 generations of slots, more than a graph has calls, whose calls clear what the call
before has left, or leave it to be cleaned between two replays; and with four generations, as it is.

``ctas``: as many CTAs of 128 threads on an SM as plans take, and other numbers. For four ranks and more.

By default the ranks are processes, with a GPU each. ``--virtual``: threads of one process on one GPU. There is no NVLink in these times,
of two ranks each has a quarter of the GPU, so that a CTA does four times as many rows: they show instructions and latency, and that
nothing hangs.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from collogue.testing import environment

environment.set_defaults()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import collogue  # noqa: E402
from collogue.contract.quant import parse  # noqa: E402
from collogue.gpu import jit  # noqa: E402
from collogue.gpu.workspace import SENTINELS  # noqa: E402
from collogue.planning import extent, plan  # noqa: E402
from collogue.planning.variant import Variant  # noqa: E402
from collogue.testing import run_virtual  # noqa: E402
from collogue.testing.emulator import Edit  # noqa: E402
from collogue.testing.processes import run_processes  # noqa: E402
from collogue.tools.ablation.build import edit_sources  # noqa: E402
from collogue.tools.ablation.switches import SWITCHES  # noqa: E402
from collogue.tools.bench.timing import LONG, SHORT  # noqa: E402
from collogue.tools.record import circumstances  # noqa: E402
from scripts.ways import Processes, Ranks, of_slower_rank, time_ways  # noqa: E402

HIDDEN, REPLAYS, GENERATIONS = 7168, 15, 128


@dataclass(frozen=True)
class Way:
    """One way of a call. ``edits`` of the kernel sources; ``cleaned``: slots, between replays; ``threads`` that an SM is to hold, where
    not as many as plans count on.
    """

    algorithm: Literal["one_shot", "two_shot"] = "one_shot"
    edits: tuple[Edit, ...] = ()
    cleaned: bool = False
    threads: int | None = None

    def cubin(self, variant: Variant, architecture: str) -> bytes:
        """The kernel."""
        if not self.edits:
            return _CUBIN(variant, architecture)
        with tempfile.TemporaryDirectory() as folder:
            edit_sources(Path(folder), self.edits)
            return jit.compile_source(variant.source(), architecture, variant.name, folder=Path(folder))[0]


_MANY = Edit("protocol.cuh", "kOneShotGenerations = 4;", f"kOneShotGenerations = {GENERATIONS};")
_NEXT_CLEANS = next(switch for switch in SWITCHES if switch.name == "wipe off").edits
WAYS = {
    "algorithms": {"one-shot": Way(), "two-shot": Way("two_shot")},
    "clearing": {
        "4 generations": Way(),
        f"{GENERATIONS}, each call cleans": Way(edits=(_MANY,)),
        f"{GENERATIONS}, cleaned between": Way(edits=(_MANY, *_NEXT_CLEANS), cleaned=True),
    },
    "ctas": {
        "one-shot": Way(),
        "one-shot, 5 CTAs": Way(threads=640),
        "one-shot, 8 CTAs": Way(threads=1024),
        "two-shot": Way("two_shot"),
        "two-shot, 5 CTAs": Way("two_shot", threads=640),
        "two-shot, 6 CTAs": Way("two_shot", threads=768),
    },
}
TOKENS = {
    "algorithms": (64, 128, 160, 192, 256, 320, 384, 448, 512),
    "clearing": (1, 8, 16, 32, 64),
    "ctas": (1, 4, 8, 16, 32, 64, 512, 2048, 8192),
}
Times = dict[str, list[float]]
_THREAD, _CUBIN, _RESIDENT = threading.local(), jit.cubin, plan.resident_threads


def _cubin(variant: Variant, architecture: str) -> bytes:
    """What engines of this thread load."""
    return _THREAD.way.cubin(variant, architecture)  # type: ignore[no-any-return]


def _resident(*facts: Any, **more: Any) -> int:
    """What plans of this thread count on."""
    return _THREAD.way.threads or _RESIDENT(*facts, **more)


jit.cubin, plan.resident_threads = _cubin, _resident


def clean(comm: collogue.Communicator) -> None:
    """All slots of this rank. No call may be running."""
    workspace: Any = comm._engine.workspace  # type: ignore[union-attr]
    workspace.buffer.local[extent.CONTROL_BYTES :].view(torch.int32).fill_(SENTINELS[comm.dtype.itemsize] - (1 << 32))


def measure(group: Any, ranks: Ranks, what: str, tokens: int, label: str) -> Times:
    """Of one rank: the time of each replay of every way in which the call fits. Collective."""
    ways = dict(WAYS[what])
    if what == "clearing":
        extent.ONE_SHOT_GENERATIONS = GENERATIONS  # workspaces of all ways have room for them
    partial, residual, weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()
        for seed, shape in ((ranks.rank, (tokens, HIDDEN)), (98, (tokens, HIDDEN)), (99, (HIDDEN,)))
    )
    quant, norm = parse(label, global_scale=37.5, static_scale=0.02), collogue.RMSNorm(weight)
    comms, outs, calls = {}, {}, {}
    for name, way in list(ways.items()):
        _THREAD.way = way
        comm = collogue.Communicator(group, max_tokens=tokens, hidden_size=HIDDEN, algorithm=way.algorithm, timeout=10.0, table=False)
        if comm.explain(tokens, quant=quant).algorithm != way.algorithm:
            del ways[name]
            comm.close()
            continue
        comm.prepare(tokens, norm=norm, quant=quant)
        comms[name], outs[name] = comm, comm.empty(tokens, residual=True, norm=norm, quant=quant)
        calls[name] = functools.partial(comm.all_reduce, partial, residual=residual, norm=norm, quant=quant, out=outs[name])

    def replayed(name: str) -> None:
        if ways[name].cleaned:
            clean(comms[name])

    with torch.inference_mode():
        times = time_ways(ranks, calls, (LONG, SHORT), REPLAYS, replayed)
        first, *others = (dict(out.items()) for out in outs.values())
        for other in others:
            for name, tensor in first.items():
                assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), f"{name} differs"
    for comm in comms.values():
        comm.check()
    ranks.settle()
    for comm in comms.values():
        comm.close()
    return times


def of_process(group: dist.ProcessGroup, tell: Callable[[str], None], jobs: Sequence[tuple[str, int, str]]) -> list[Times]:
    """A rank that is a process, with a GPU of its own."""
    found = []
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for what, tokens, label in jobs:
            tell(f"{tokens} {label}")
            found.append(measure(group, Processes(group), what, tokens, label))
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Ways of an all-reduce beside each other, in one run.")
    parser.add_argument("what", choices=list(WAYS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--virtual", action="store_true", help="all ranks on one GPU, without NVLink")
    parser.add_argument("--world", type=int, default=2, help="ranks")
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--format", nargs="*", default=("none", "fp8_static", "nvfp4/128x4"))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ways = WAYS[given.what]
    jobs = [(given.what, tokens, label) for label in given.format for tokens in given.tokens or TOKENS[given.what]]
    ranks: list[Any]
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(given.rounds):
        if given.virtual:
            ranks = [run_virtual(given.world, lambda g, j=job: measure(g, g, *j), device="cuda:0") for job in jobs]  # type: ignore[misc]
        else:
            ranks = list(zip(*run_processes(given.world, of_process, jobs, device="cuda"), strict=True))
        slowest = [of_slower_rank(job) for job in ranks]
        rounds.append({f"{tokens} {label}": us for (_, tokens, label), us in zip(jobs, slowest, strict=True)})
    us = {call: {way: statistics.median(found[call][way] for found in rounds) for way in of_call} for call, of_call in rounds[0].items()}
    data = {"what": given.what, "world_size": given.world, "virtual": given.virtual, "us": us, "rounds": rounds, **circumstances()}
    given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print("tokens, format".ljust(24), *(way.rjust(24) for way in ways))
    for call, of_call in us.items():
        print(call.ljust(24), *(f"{of_call[way]:24.2f}" if way in of_call else "-".rjust(24) for way in ways))
    return 0


if __name__ == "__main__":
    sys.exit(main())
