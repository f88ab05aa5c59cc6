"""Times of the local kernel (a world of one), of source trees and ``torch.compile``: ``local_times.py OUT.json NAME=PATH ...``.

Each ``PATH`` is a checkout. Residual + norm + format, bfloat16, out=, CUDA graphs, inputs and outputs rotated over more bytes than the L2
cache holds. A time is a graph's over its calls, the median of 9 replays, in microseconds. ``bytes`` is the time of the bytes that must
move at 4.3 TB/s, the rate of a large copy on an H200: each input read once, each output written once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from collogue.tools.record import circumstances

CHILD = r"""
import json, statistics, sys
import torch, torch.distributed as dist, collogue
try:
    from collogue.tools.bench import epilogue as E
    from collogue.contract.quant import parse
except ImportError:
    from collogue.bench import epilogue as E
    from collogue.quant import parse
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
jobs, with_compile = json.loads(sys.argv[1]), sys.argv[2] == "compile"

def time(call, count):
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    graph.replay()
    torch.cuda.synchronize()
    found = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(found)

found = {}
for H, T, label in jobs:
    quant = parse(label, global_scale=37.5, static_scale=0.02)
    if quant is not None and quant.block and H % quant.block:
        continue
    norm = collogue.RMSNorm(torch.randn(H, device="cuda").bfloat16())
    sets = [[torch.randn(T, H, device="cuda").bfloat16() for _ in range(2)] for _ in range(max(2, min(16, int(4e8 / (T * H * 8)) + 1)))]
    count = 60 if T <= 1024 else 12
    with torch.no_grad():
        comm = collogue.Communicator(dist.group.WORLD, max_tokens=T, hidden_size=H, device="cuda:0", table=False)
        outs = [comm.empty(T, residual=True, norm=norm, quant=quant) for _ in sets]
        n = len(sets)
        call = lambda i: comm.all_reduce(sets[i % n][0], residual=sets[i % n][1], norm=norm, quant=quant, out=outs[i % n])
        found[f"{H}/{T}/{label}/collogue"] = time(call, count)
        bytes_out = sum(t.numel() * t.element_size() for _, t in outs[0].items())
        found[f"{H}/{T}/{label}/bytes"] = (2 * T * H * 2 + bytes_out) / 4.3e6
        if with_compile and label in E.FORMATS:
            scale = torch.tensor(37.5 if label.startswith("nvfp4") else 0.02, device="cuda")
            run = E.compiled(quant, 1e-6, (*sets[0], norm.weight, scale))
            found[f"{H}/{T}/{label}/torch.compile"] = time(lambda i: run(*sets[i % n], norm.weight, scale), count)
        comm.close()
    del sets, outs
print("RESULT" + json.dumps(found))
"""
HIDDEN, TOKENS = (2880, 4096, 7168, 12800), (1, 64, 256, 1024, 4096, 16384)
FORMATS = ("none", "fp8_static", "fp8_per_token", "fp8_group128", "nvfp4/128x4", "mxfp8/ceil/128x4", "mxfp4/ceil/128x4")


def measure(path: Path, jobs: list[tuple[int, int, str]], *, compiled: bool) -> dict[str, float]:
    """The times of one tree."""
    environment = {**os.environ, "PYTHONPATH": str(path / "src")}
    command = [sys.executable, "-c", CHILD, json.dumps(jobs), "compile" if compiled else "no"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(f"{path}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("RESULT"))
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Times of the local kernel, of source trees and torch.compile.")
    parser.add_argument("out", type=Path)
    parser.add_argument("trees", nargs="+", help="NAME=PATH; torch.compile is timed in the process of the last")
    parser.add_argument("--hidden-size", type=int, nargs="*", default=HIDDEN)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--format", nargs="*", default=FORMATS)
    given = parser.parse_args()
    jobs = [(h, t, label) for h in given.hidden_size for label in given.format for t in given.tokens]
    trees = {name: Path(path) for name, path in (tree.split("=", 1) for tree in given.trees)}
    last = list(trees)[-1]
    times = {name: measure(path, jobs, compiled=name == last) for name, path in trees.items()}
    rows = []
    for h, t, label in jobs:
        key = f"{h}/{t}/{label}"
        if f"{key}/collogue" in times[last]:
            row = {"hidden_size": h, "tokens": t, "format": label, **{name: found[f"{key}/collogue"] for name, found in times.items()}}
            row |= {name: times[last][f"{key}/{name}"] for name in ("torch.compile", "bytes") if f"{key}/{name}" in times[last]}
            rows.append(row)
            print("  ".join(f"{name} {value:.2f}" if isinstance(value, float) else f"{value}" for name, value in row.items()))
    given.out.write_text(json.dumps({"rows": rows, **circumstances()}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
