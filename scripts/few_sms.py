"""Calls on few SMs in other launch shapes, in turn: ``scripts/few_sms.py OUT.json [--sms 16 8] [--tokens 2048 8192]``.

H = 7168, bfloat16, residual + norm. A shape is ``TEAMSxTHREADSxVECTORS``, with ``+`` behind it where a team has another row on its way
before it finishes one; ``plan``: what the plan takes, ``all``: on all SMs. Every call lies in CUDA graphs of several and of one; a time
is the difference over the calls between them, of the slower rank, the median over replays, in microseconds. The ways of one call are
replayed in turn, and their outputs are compared bit for bit. The ranks are two processes, with a GPU each; ``--virtual``: threads of one
process on one GPU, without NVLink.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from collogue.testing import environment

environment.set_defaults()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import collogue  # noqa: E402
from collogue.calls.request import Request  # noqa: E402
from collogue.contract.quant import parse  # noqa: E402
from collogue.contract.spec import owned_rows  # noqa: E402
from collogue.gpu import jit  # noqa: E402
from collogue.planning import plan  # noqa: E402
from collogue.planning.topology import Overrides, Topology  # noqa: E402
from collogue.planning.variant import Variant  # noqa: E402
from collogue.testing import run_virtual  # noqa: E402
from collogue.testing.processes import run_processes  # noqa: E402
from collogue.tools.record import circumstances  # noqa: E402
from scripts.ways import Processes, Ranks, of_slower_rank, time_ways  # noqa: E402

HIDDEN, REPLAYS = 7168, 9
SHAPES = ("1x896x1", "1x896x1+", "2x448x2", "3x224x4", "4x224x4", "2x224x4+", "4x128x7", "4x128x7+")
#: What is called: an operation and a format.
CALLS = (("all_reduce", "none"), ("sharded", "none"), ("sharded", "nvfp4/128x4"), ("all_reduce", "fp8_per_token"))
_THREAD, _SHAPE, _VARIANT = threading.local(), plan.launch_shape, plan.make_variant


def _launch_shape(topology: Topology, *facts: Any, **more: Any) -> plan.LaunchShape:
    """What plans of this thread take."""
    shape: str = getattr(_THREAD, "shape", "plan")
    if shape in ("plan", "all"):
        return _SHAPE(topology, *facts, **more)
    teams, threads, vectors = map(int, shape.rstrip("+").split("x"))
    assert topology.overrides.max_sms
    return plan.LaunchShape(threads, vectors, 1, topology.overrides.max_sms * teams, teams)


def _make_variant(topology: Topology, request: Request, shape: plan.LaunchShape, algorithm: str) -> Variant:
    variant = _VARIANT(topology, request, shape, algorithm)  # type: ignore[arg-type]
    forced: str = getattr(_THREAD, "shape", "plan")
    return variant if forced in ("plan", "all") else replace(variant, ahead=int(forced.endswith("+")), ctas_per_multiprocessor=1)


plan.launch_shape, plan.make_variant = _launch_shape, _make_variant  # type: ignore[assignment]


def ways_of(operation: str, sms: Sequence[int], shapes: Sequence[str]) -> list[tuple[str, int | None]]:
    """Shape and SMs of every way."""
    ahead = operation == "all_reduce"
    return [("all", None), *((s, n) for n in sms for s in ("plan", *shapes) if ahead or not s.endswith("+"))]


def variants(topology: Topology, calls: Sequence[tuple[str, str]], sms: Sequence[int], shapes: Sequence[str]) -> list[Variant]:
    """Every kernel that will be timed, to be compiled before."""
    found = []
    for operation, label in calls:
        for shape, limit in ways_of(operation, sms, shapes):
            _THREAD.shape = shape
            limited = replace(topology, overrides=Overrides("two_shot" if operation == "all_reduce" else None, limit, None))
            wanted = plan.Wanted.of(has_residual=True, has_norm=True, quant=parse(label, global_scale=1.0), keep_norm=False)
            request = Request(
                topology.max_tokens, HIDDEN, topology.dtype, True, True, False, parse(label, global_scale=1.0), wanted, operation
            )  # type: ignore[arg-type]
            found += [kernel.variant for kernel in plan.make_kernels(limited, request, plan.make_plan(limited, request))]
    return found


def measure(
    group: Any, ranks: Ranks, operation: str, label: str, tokens: int, ways: list[tuple[str, int | None]]
) -> dict[str, list[float]]:
    """Of one rank: the time of each replay of every way. Collective."""
    owned = owned_rows(tokens, ranks.size, ranks.rank)
    whole, weight = (torch.randn(s, generator=torch.Generator().manual_seed(9)).bfloat16().cuda() for s in ((tokens, HIDDEN), (HIDDEN,)))
    partial = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(ranks.rank)).bfloat16().cuda()
    sharded = operation == "sharded"
    residual = whole[owned.start : owned.stop].contiguous() if sharded else whole
    quant, norm = parse(label, global_scale=37.5), collogue.RMSNorm(weight)
    comms, outs, calls = [], [], {}
    for shape, limit in ways:
        _THREAD.shape = shape
        algorithm = None if sharded else "two_shot"
        comm = collogue.Communicator(
            group, max_tokens=tokens, hidden_size=HIDDEN, algorithm=algorithm, timeout=10.0, table=False, max_sms=limit
        )
        comm.prepare(tokens, norm=norm, quant=quant, operation=operation)
        out = comm.empty(tokens, residual=True, norm=norm, quant=quant, operation=operation)
        comms.append(comm)
        outs.append(out)
        name = shape if limit is None else f"{limit} {shape}"
        calls[name] = functools.partial(comm.all_reduce, partial, residual=residual, norm=norm, quant=quant, sharded=sharded, out=out)
        if ranks.rank == 0:
            print(name, comm.explain(tokens, quant=quant, operation=operation).shape, flush=True)
    with torch.inference_mode():
        times = time_ways(ranks, calls, (8, 2) if tokens <= 2048 else (4, 1), REPLAYS)
        for other in outs[1:]:
            for name, tensor in outs[0].items():
                assert torch.equal(tensor.view(torch.uint8), getattr(other, name).view(torch.uint8)), f"{name} differs"
    ranks.settle()
    for comm in comms:
        comm.check()
        comm.close()
    return times


def of_process(group: dist.ProcessGroup, tell: Callable[[str], None], jobs: Sequence[tuple[Any, ...]]) -> list[dict[str, list[float]]]:
    """A rank that is a process, with a GPU of its own."""
    found = []
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for job in jobs:
            tell(str(job[:3]))
            found.append(measure(group, Processes(group), *job))
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Calls on few SMs in other launch shapes.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--virtual", action="store_true", help="both ranks on one GPU, without NVLink")
    parser.add_argument("--sms", type=int, nargs="*", default=(16, 8))
    parser.add_argument("--tokens", type=int, nargs="*", default=(2048, 8192))
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    given = parser.parse_args()
    jobs = [(*call, tokens, ways_of(call[0], given.sms, given.shapes)) for call in CALLS for tokens in given.tokens]
    capability = torch.cuda.get_device_capability()
    architecture = f"sm_{capability[0]}{capability[1]}a"
    topology = Topology(2, max(given.tokens), HIDDEN, torch.bfloat16, architecture, 132, 2 if given.virtual else 1)
    jit.build(variants(topology, CALLS, given.sms, given.shapes), architecture)
    ranks: list[Any]
    if given.virtual:
        ranks = [run_virtual(2, lambda g, j=job: measure(g, g, *j), device="cuda:0") for job in jobs]  # type: ignore[misc]
    else:
        ranks = list(zip(*run_processes(2, of_process, jobs, device="cuda"), strict=True))
    us = {" ".join(map(str, job[:3])): of_slower_rank(job_ranks) for job, job_ranks in zip(jobs, ranks, strict=True)}
    facts = {"world_size": 2, "hidden_size": HIDDEN, "virtual": given.virtual, "us": us, **circumstances()}
    given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for call, times in us.items():
        print(call, *(f"\n   {way:14} {time:9.2f}  {time / times['all']:5.2f}" for way, time in times.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
