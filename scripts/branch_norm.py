"""A call with a norm before and one behind the residual, against two calls and an addition: ``branch_norm.py OUT.json``.

``fused``: ``all_reduce(partial, residual=, branch_norm=, norm=)``. ``two_calls``: ``all_reduce(partial, norm=)``, the addition of the
residual, and ``finish(norm=)``; the same bits. One process, two virtual ranks on one GPU; bfloat16. See scripts/ways.py for what a time is.
There is no NVLink in these times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collogue.testing import environment

environment.set_defaults()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import collogue  # noqa: E402
from collogue.testing import VirtualGroup, run_virtual  # noqa: E402
from collogue.tools.record import circumstances  # noqa: E402
from scripts.ways import of_slower_rank, time_ways  # noqa: E402

WORLD = 2


def measure(tokens: int, hidden_size: int, quant: collogue.Quant | None, replays: int) -> dict[str, float]:
    """The times of calls of so many rows."""

    def rank(group: VirtualGroup) -> dict[str, list[float]]:
        comm = collogue.Communicator(group, max_tokens=tokens, hidden_size=hidden_size, table=False)
        generator = torch.Generator(device="cuda").manual_seed(group.rank)
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
            times = time_ways(group, ways, (100, 20), replays)
            for name in ("norm", "codes", "scales"):
                one, other = getattr(out, name), getattr(last, name)
                assert (one is None) == (other is None), name
                assert one is None or torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
        comm.check()
        group.settle()
        comm.close()
        return times

    found = of_slower_rank(run_virtual(WORLD, rank, device="cuda:0", timeout=60.0))
    return {**found, "ratio": found["fused"] / found["two_calls"]}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Two norms in one call, against two calls and an addition.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[2304, 3584, 5120])
    parser.add_argument("--replays", type=int, default=15)
    given = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for hidden_size in given.hidden_size:
        for quant in (None, collogue.FP8PerToken()):
            for tokens in given.tokens:
                row = measure(tokens, hidden_size, quant, given.replays)
                name = f"H={hidden_size} T={tokens} {'none' if quant is None else quant.label}"
                found[name] = row
                print(name.ljust(36) + "  ".join(f"{way} {value:7.2f}" for way, value in row.items()), flush=True)
    given.out.write_text(json.dumps({"us": found, **circumstances()}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
