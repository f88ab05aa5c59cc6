"""Times the host path on one GPU, against what it replaces: `python scripts/host_path.py` writes benchmarks/results/host-path-h200.json.

1. Processes that share the GPU over gloo: `all_reduce(residual, norm)` with `transport="host"` against `dist.all_reduce` of the same group
   and a compiled epilogue, in turn, the median of so many calls. Every call is first compared with the reference, bit by bit.
2. The kernel that adds and finishes, alone: bytes that it has to read and write a second, against a copy of as many in the same run.

With `--nccl`, on a machine with several GPUs: the first part with a rank on each GPU over NCCL, also in CUDA graphs, and as many calls
as the host can launch before it waits; it writes benchmarks/results/host-path-2xh200.json.

On a machine without a GPU `--device cpu` runs the first part, to see that it works.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import collogue
from collogue import RMSNorm, reference
from collogue.calls.terms import Terms
from collogue.host.finish import KernelFinisher, Steps
from collogue.planning.architecture import architecture_of
from collogue.planning.topology import Topology
from collogue.testing.compare import compare, differing
from collogue.testing.inputs import make_inputs, make_partials
from collogue.testing.processes import run_processes
from collogue.tools.bench.epilogue import compiled
from collogue.tools.record import circumstances

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
RESULT, RESULT_NCCL = RESULTS / "host-path-h200.json", RESULTS / "host-path-2xh200.json"
WIDTH, EPS = 4096, 1e-5
#: Launches between two events: what a launch costs the host is not the kernel's time.
REPEATS = 10
#: Calls of a row, and of a graph.
IN_A_ROW = 20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(calls: dict[str, Callable[[], object]], device: torch.device, turns: int) -> dict[str, float]:
    """Median microseconds of each call, one after the other in every turn."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            synchronize(device)
            dist.barrier()
            begin = time.perf_counter()
            call()
            synchronize(device)
            seen[name].append((time.perf_counter() - begin) * 1e6)
    return {name: round(statistics.median(times[turns // 5 :]), 1) for name, times in seen.items()}


def whole_calls(group: dist.ProcessGroup, tell: Any, device_type: str, turns: int) -> dict[str, dict[str, float]]:
    """One rank of the first part, by number of tokens."""
    device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    comm = collogue.Communicator(group, max_tokens=1024, hidden_size=WIDTH, device=device, transport="host")
    found = {}
    for tokens in (1, 64, 1024):
        tell(f"{tokens} tokens")
        shape: dict[str, Any] = {"tokens": tokens, "hidden_size": WIDTH, "dtype": torch.bfloat16, "device": device}
        made, partials = make_inputs("normal", rank=rank, **shape), make_partials("normal", size, **shape)
        norm, weight = RMSNorm(made.weight, EPS), made.weight
        out = comm.all_reduce(made.partial, residual=made.residual, norm=norm)
        wrong = differing(compare(out, reference.all_reduce(partials, residual=made.residual, norm=norm)))
        if wrong:
            raise SystemExit(f"rank {rank}, {tokens} tokens: {wrong}")
        scale = torch.ones((), device=device)
        finish = compiled(None, EPS, (made.partial, made.residual, weight, scale))

        def replaced(made: Any = made, weight: torch.Tensor = weight, scale: torch.Tensor = scale, finish: Any = finish) -> object:
            total = made.partial.clone()
            dist.all_reduce(total, group=group)
            return finish(total, made.residual, weight, scale)

        calls: dict[str, Callable[[], object]] = {
            "host path": functools.partial(comm.all_reduce, made.partial, residual=made.residual, norm=norm),
            "all_reduce and compiled epilogue": replaced,
        }
        found[str(tokens)] = in_turn(calls, device, turns)
        if dist.get_backend(group) == "nccl":
            found[f"{tokens} in a row"] = in_turn({name: in_a_row(call) for name, call in calls.items()}, device, turns)
            found[f"{tokens} in a graph"] = in_turn({name: captured(call) for name, call in calls.items()}, device, turns)
    return found


def in_a_row(call: Callable[[], object]) -> Callable[[], None]:
    """Calls that do not wait for each other: what eager code pays for all of them."""

    def calls() -> None:
        for _ in range(IN_A_ROW):
            call()

    return calls


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The replay of a graph of as many calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        in_a_row(call)()
    replay: Callable[[], None] = graph.replay
    return replay


def kernels(turns: int = 50) -> list[dict[str, Any]]:
    """The second part: T = 4096, two and eight terms."""
    device, properties, rows = torch.device("cuda", 0), torch.cuda.get_device_properties(0), []
    architecture = architecture_of((properties.major, properties.minor))
    facts = Topology(1, 4096, WIDTH, torch.bfloat16, architecture, properties.multi_processor_count, 1)
    finisher, steps = KernelFinisher(facts, device, 30.0), Steps(facts, device)
    shape: dict[str, Any] = {"tokens": 4096, "hidden_size": WIDTH, "dtype": torch.bfloat16, "device": device}
    made = make_inputs("normal", rank=0, **shape)
    for count in (2, 8):
        terms = Terms(tuple(make_partials("normal", count, **shape)))
        norm = RMSNorm(made.weight, EPS)
        step = steps.add(terms, torch.bfloat16, residual=made.residual, norm=norm)
        out = step.signature.empty()
        finisher.run(step, out)
        wrong = differing(compare(out, reference.all_reduce(terms.values, residual=made.residual, norm=norm)))
        if wrong:
            raise SystemExit(f"{count} terms: {wrong}")
        tensor_bytes = made.partial.nbytes
        moved = tensor_bytes * (count + 3)  # terms and residual in, y and norm out
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        calls: dict[str, Callable[[], object]] = {
            "kernel": functools.partial(finisher.run, step, out),
            "copy": functools.partial(target.copy_, source),
        }
        us: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(turns):
            for name, call in calls.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                call()  # the GPU is busy while the next ones are launched
                begin.record()
                for _ in range(REPEATS):
                    call()
                end.record()
                torch.cuda.synchronize()
                us[name].append(begin.elapsed_time(end) * 1e3 / REPEATS)
        median = {name: statistics.median(times) for name, times in us.items()}
        rows.append(
            {"terms": count, **{f"{k} us": round(v, 1) for k, v in median.items()}, "of copy": round(median["copy"] / median["kernel"], 3)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--nccl", action="store_true")
    parser.add_argument("--turns", type=int, default=100)
    asked = parser.parse_args()
    if asked.nccl and torch.cuda.device_count() < asked.ranks:
        parser.error(f"--nccl with {asked.ranks} ranks needs as many GPUs, PyTorch sees {torch.cuda.device_count()}")
    every = run_processes(asked.ranks, whole_calls, asked.device, asked.turns, device=asked.device)
    slowest = {t: {name: max(rank[t][name] for rank in every) for name in every[0][t]} for t in every[0]}
    more = {t: slowest.pop(t) for t in list(slowest) if " in " in t}
    result = {"ranks": asked.ranks, "width": WIDTH, "calls, us": slowest}
    if asked.nccl:
        result[f"{IN_A_ROW} calls, us"] = more
        RESULT_NCCL.write_text(json.dumps({**circumstances(), **result}, indent=1) + "\n")
    elif asked.device == "cuda":
        result["kernels"] = kernels()
        RESULT.write_text(json.dumps({**circumstances(), **result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
