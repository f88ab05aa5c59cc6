"""Kernel times with ranks of one process on one GPU, one source tree against another: ``virtual_times.py OUT.json NAME=PATH ...``.

Each ``PATH`` is a checkout; the first is the base of the ratios. Every round times each tree in a process of its own, in turn. A rank
is a thread with a stream; its calls lie in CUDA graphs of 100 and of 20, which the ranks replay together. A time is the difference of
the two over 80, in microseconds: the slowest rank's, the median over 15 replays, and over rounds. ``spread`` is the largest difference
between the rounds of one tree. There is no NVLink in these times: they show instructions and latency, not a wire.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from collogue.tools.record import circumstances

CHILD = r"""
import json, statistics, sys
from collogue.testing import environment
environment.set_defaults()
import torch, collogue
from collogue.testing import run_virtual

H = 7168
found = {}

def one(world, label, tokens, make_quant):
    def rank(group):
        comm = collogue.Communicator(group, max_tokens=64, hidden_size=H, table=False)
        torch.manual_seed(group.rank)
        x = torch.randn(tokens, H, device="cuda").bfloat16()
        torch.manual_seed(99)
        residual, weight = torch.randn(tokens, H, device="cuda").bfloat16(), torch.randn(H, device="cuda").bfloat16()
        norm, quant = collogue.RMSNorm(weight), make_quant()
        comm.prepare(tokens, norm=norm, quant=quant)
        out = comm.empty(tokens, residual=True, norm=norm, quant=quant)
        call = lambda: comm.all_reduce(x, residual=residual, norm=norm, quant=quant, out=out)
        graphs = {}
        with torch.inference_mode():
            group.settle()
            call()
            group.settle()
            for count in (100, 20):
                for turn in range(world):  # capturing waits for the GPU: one rank at a time
                    if turn == group.rank:
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                            for _ in range(count):
                                call()
                        graphs[count] = graph
                    group.settle()
            times = {100: [], 20: []}
            for turn in range(17):
                for count, graph in graphs.items():
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    group.settle()
                    start.record()
                    graph.replay()
                    end.record()
                    group.settle()
                    if turn > 1:
                        times[count].append(start.elapsed_time(end) * 1e3)
        comm.check()
        group.settle()
        del graphs
        group.settle()
        comm.close()
        return [(long - short) / 80 for long, short in zip(times[100], times[20])]

    by_rank = run_virtual(world, rank, device="cuda", timeout=60.0)
    found[f"{world} ranks/{label}/{tokens}"] = statistics.median(max(turn) for turn in zip(*by_rank))

for world, tokens in json.loads(sys.argv[1]):
    one(world, "norm", tokens, lambda: None)
for label, make in (
    ("nvfp4, a number", lambda: collogue.NVFP4(37.5)),
    ("nvfp4, a tensor", lambda: collogue.NVFP4(torch.full((1,), 37.5, device="cuda"))),
    ("fp8_static, a number", lambda: collogue.FP8Static(0.02)),
    ("fp8_static, a tensor", lambda: collogue.FP8Static(torch.full((1,), 0.02, device="cuda"))),
):
    one(2, label, 1, make)
print("RESULT" + json.dumps(found))
"""
SHAPES = [(2, 1), (2, 8), (2, 32), (4, 1), (4, 8)]


def measure(path: Path) -> dict[str, float]:
    """The times of one tree."""
    environment = {**os.environ, "PYTHONPATH": str(path / "src")}
    command = [sys.executable, "-c", CHILD, json.dumps(SHAPES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(f"{path}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("RESULT"))
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Kernel times with ranks of one process on one GPU, of one source tree against another.")
    parser.add_argument("out", type=Path)
    parser.add_argument("trees", nargs="+", help="NAME=PATH; the first is the base")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    trees = {name: Path(path) for name, path in (tree.split("=", 1) for tree in given.trees)}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(given.rounds):
        for name, path in trees.items():
            rounds[name].append(measure(path))
    base, *others = trees
    times = {name: {row: statistics.median(r[row] for r in found) for row in found[0]} for name, found in rounds.items()}
    spread = {row: max(max(r[row] for r in found) - min(r[row] for r in found) for found in rounds.values()) for row in times[base]}
    given.out.write_text(
        json.dumps({"us": times, "spread": spread, "rounds": rounds, **circumstances()}, indent=1) + "\n", encoding="utf-8"
    )
    for row in times[base]:
        shares = "".join(f"  {name} {times[name][row]:6.2f}" for name in others)
        print(f"{row:40} {base} {times[base][row]:6.2f}{shares}  spread {spread[row]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
