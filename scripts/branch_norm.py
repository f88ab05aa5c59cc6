"""A call with a norm before and one behind the residual, against two calls and an addition: ``branch_norm.py OUT.json``.

``fused``: ``all_reduce(partial, residual=, branch_norm=, norm=)``. ``two_calls``: ``all_reduce(partial, norm=)``, the addition of the
residual, and ``finish(norm=)``; the same bits. Two ranks, bfloat16. See scripts/ways.py for what a time is. By default the ranks are
processes, with a GPU each. ``--virtual``: threads of one process on one GPU; there is no NVLink in these times, and a rank has a quarter of
the SMs for what waits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from collogue.testing import environment

environment.set_defaults()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import collogue  # noqa: E402
from collogue.testing import run_virtual  # noqa: E402
from collogue.testing.processes import run_processes  # noqa: E402
from collogue.tools.record import circumstances  # noqa: E402
from scripts.ways import Processes, Ranks, of_slower_rank, time_ways  # noqa: E402

WORLD = 2


def measure(group: Any, ranks: Ranks, tokens: int, hidden_size: int, quant: collogue.Quant | None, replays: int) -> dict[str, list[float]]:
    """Of one rank, the times of calls of so many rows."""
    comm = collogue.Communicator(group, max_tokens=tokens, hidden_size=hidden_size, table=False)
    generator = torch.Generator(device="cuda").manual_seed(ranks.rank)
    partial = torch.empty(tokens, hidden_size, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    residual = torch.ones_like(partial)
    branch, norm = collogue.RMSNorm(torch.ones_like(partial[0])), collogue.RMSNorm(torch.ones_like(partial[0]))
    comm.prepare(tokens, branch_norm=branch, norm=norm, quant=quant)
    comm.prepare(tokens, residual=False, norm=branch)
    comm.prepare(tokens, residual=False, norm=norm, quant=quant, operation="finish")
    out = comm.empty(tokens, residual=True, branch_norm=branch, norm=norm, quant=quant)
    normed = comm.empty(tokens, residual=False, norm=branch)
    last = comm.empty(tokens, residual=False, norm=norm, quant=quant, operation="finish")
    stream = torch.empty_like(partial)

    def two_calls() -> None:
        comm.all_reduce(partial, norm=branch, out=normed)
        assert normed.norm is not None
        torch.add(normed.norm, residual, out=stream)
        comm.finish(stream, norm=norm, quant=quant, out=last)

    ways: dict[str, Callable[[], Any]] = {
        "fused": lambda: comm.all_reduce(partial, residual=residual, branch_norm=branch, norm=norm, quant=quant, out=out),
        "two_calls": two_calls,
    }
    with torch.inference_mode():
        times = time_ways(ranks, ways, (100, 20), replays)
        for name in ("norm", "codes", "scales"):
            one, other = getattr(out, name), getattr(last, name)
            assert (one is None) == (other is None), name
            assert one is None or torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
    comm.check()
    ranks.settle()
    comm.close()
    return times


def of_process(group: Any, tell: Callable[[str], None], jobs: Sequence[tuple[Any, ...]]) -> list[dict[str, list[float]]]:
    """A rank that is a process, with a GPU of its own."""
    found = []
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for job in jobs:
            tell(str(job))
            found.append(measure(group, Processes(group), *job))
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Two norms in one call, against two calls and an addition.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[2304, 3584, 5120])
    parser.add_argument("--virtual", action="store_true", help="both ranks on one GPU, without NVLink")
    parser.add_argument("--replays", type=int, default=15)
    given = parser.parse_args()
    formats = (None, collogue.FP8PerToken())
    jobs = [(tokens, width, quant, given.replays) for width in given.hidden_size for quant in formats for tokens in given.tokens]
    ranks: list[Any]
    if given.virtual:
        ranks = [run_virtual(WORLD, lambda g, j=job: measure(g, g, *j), device="cuda:0") for job in jobs]  # type: ignore[misc]
    else:
        ranks = list(zip(*run_processes(WORLD, of_process, jobs, device="cuda"), strict=True))
    found: dict[str, dict[str, float]] = {}
    for (tokens, width, quant, _), times in zip(jobs, ranks, strict=True):
        us = of_slower_rank(times)
        row = {**us, "ratio": us["fused"] / us["two_calls"]}
        name = f"H={width} T={tokens} {'none' if quant is None else quant.label}"
        found[name] = row
        print(name.ljust(36) + "  ".join(f"{way} {value:7.2f}" for way, value in row.items()), flush=True)
    given.out.write_text(json.dumps({"virtual": given.virtual, "us": found, **circumstances()}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
