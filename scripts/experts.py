"""Experts combined in the call against a combine kernel of ``torch.compile`` and the plain call behind it: ``experts.py OUT.json``.

``inside`` is the call whose own kernel combines, ``in_front`` the call that launches a kernel for it first; ``fused`` is the one of them
that the plan takes. One process, two virtual ranks on one GPU, a thread and a stream each; bfloat16, residual and norm. Calls lie in CUDA
graphs of many and
of few calls, which both ranks replay together, the ways in turn. A time is the difference of the two graphs over the calls between them,
in microseconds: the slower rank's, the median over replays. ``rows_us``: the time in which memory would read the experts' rows once, at
4.3 TB/s, on both ranks. There is no NVLink in these times.
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
from collogue.planning import plan  # noqa: E402
from collogue.testing import VirtualGroup, run_virtual  # noqa: E402
from collogue.tools.record import circumstances  # noqa: E402
from scripts.ways import of_slower_rank, time_ways  # noqa: E402

WORLD = 2
#: Bytes a microsecond.
MEMORY = 4.3e6
MOST_INSIDE = plan.MOST_TOKENS_OF_EXPERTS


def combine(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """What the call does in front of its sum, as one would write it."""
    total = torch.zeros(shared.shape, dtype=torch.float32, device=shared.device)
    for k in range(index.shape[1]):
        named = index[:, k]
        x = rows[named.clamp(min=0).long()].float() * weights[:, k, None].float()
        total = total + torch.where((named >= 0)[:, None], x, 0.0)
    return (total + shared.float()).to(rows.dtype)


def measure(tokens: int, hidden_size: int, slots: int, compiled: Callable[..., torch.Tensor], replays: int) -> dict[str, float]:
    """The times of calls of so many rows."""
    counts = (100, 20) if tokens <= 64 else (20, 4)

    def inputs(rank: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device="cuda").manual_seed(rank)
        rows = torch.empty(tokens * slots, hidden_size, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
        index = torch.randperm(tokens * slots, device="cuda", generator=generator, dtype=torch.int32).view(tokens, slots)
        weights = torch.rand(tokens, slots, device="cuda", generator=generator).bfloat16()
        return rows, index, weights, torch.ones(tokens, hidden_size, dtype=torch.bfloat16, device="cuda")

    with torch.inference_mode():
        compiled(*inputs(0))  # compiled before any rank runs
    torch.cuda.synchronize()

    def rank(group: VirtualGroup) -> dict[str, list[float]]:
        shape: dict[str, Any] = {"max_tokens": tokens, "hidden_size": hidden_size, "table": False}
        comm, inside, in_front = (collogue.Communicator(group, **shape) for _ in range(3))
        with torch.inference_mode():
            rows, index, weights, shared = inputs(group.rank)
            term = collogue.ExpertCombine(rows, index, weights, shared)
            residual, norm = torch.ones_like(shared), collogue.RMSNorm(torch.ones_like(shared[0]))
            comm.prepare(tokens, norm=norm)
            for each, most in ((inside, tokens), (in_front, tokens - 1)):
                group.settle()
                if group.rank == 0:
                    plan.MOST_TOKENS_OF_EXPERTS = most
                group.settle()
                each.prepare(tokens, norm=norm, prologue=term)
                group.settle()
            out = comm.empty(tokens, residual=True, norm=norm)
            partial = compiled(rows, index, weights, shared)
            ways: dict[str, Callable[[], Any]] = {
                "inside": lambda: inside.all_reduce(term, residual=residual, norm=norm, out=out),
                "in_front": lambda: in_front.all_reduce(term, residual=residual, norm=norm, out=out),
                "unfused": lambda: comm.all_reduce(compiled(rows, index, weights, shared), residual=residual, norm=norm, out=out),
                "plain": lambda: comm.all_reduce(partial, residual=residual, norm=norm, out=out),
            }
            times = time_ways(group, ways, counts, replays)
        for each in (comm, inside, in_front):
            each.close()
        return times

    by_rank = run_virtual(WORLD, rank, device="cuda:0", timeout=60.0)
    found = of_slower_rank(by_rank)
    found["fused"] = found["inside" if tokens <= MOST_INSIDE else "in_front"]
    rows_us = WORLD * tokens * (slots + 1) * hidden_size * 2 / MEMORY
    return {**found, "ratio": found["fused"] / found["unfused"], "added": found["fused"] - found["plain"], "rows_us": rows_us}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Experts combined in the call, against a kernel of their own and the plain call.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 128, 256, 512, 4096])
    parser.add_argument("--hidden-size", type=int, default=7168)
    parser.add_argument("--slots", type=int, default=8, help="experts of a token")
    parser.add_argument("--replays", type=int, default=21)
    given = parser.parse_args()
    compiled = torch.compile(combine, dynamic=False)
    found = {}
    for tokens in given.tokens:
        found[tokens] = row = measure(tokens, given.hidden_size, given.slots, compiled, given.replays)
        print(f"{tokens:6} tokens  " + "  ".join(f"{name} {value:8.2f}" for name, value in row.items()), flush=True)
        facts = {"hidden_size": given.hidden_size, "slots": given.slots, "us": found, **circumstances()}
        given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
