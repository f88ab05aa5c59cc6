"""Times of one source tree against another, on one GPU: ``scripts/trees.py host|virtual|local OUT.json NAME=PATH NAME=PATH ...``.

Each ``PATH`` is a checkout; the first is the base of the ratios. Every round times each tree in a process of its own, in turn, so that the
machine's noise meets all alike; every round is kept in the file. Rows are microseconds.

``host``: host time of eager calls and operators, a world of one, H = 7168, 8 tokens, ``torch.no_grad``: the fastest of blocks of 200 calls,
as what else runs on the machine only adds. The GPU keeps up: a call's kernel takes less than its launch.

``virtual``: kernels, with ranks that are threads of one process, a stream each. A rank's calls lie in CUDA graphs of 100 and of 20, which
the ranks replay together; a time is the difference over 80, of the slowest rank, the median of 15. There is no NVLink in these times:
they show instructions and latency, not a wire.

``local``: the kernel of a world of one, residual + norm + format, out=, CUDA graphs, over more bytes than the L2 cache holds; the last tree
also times ``torch.compile``. ``bytes`` is the time of the bytes that must move at 4.3 TB/s, the rate of a large copy on an H200: each input
read once, each output written once.
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

HOST = r"""
import json, sys, time
import torch, torch.distributed as dist
import collogue
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
comm = collogue.Communicator(dist.group.WORLD, max_tokens=64, hidden_size=7168, device="cuda:0", table=False)
torch.manual_seed(0)
T, H = 8, 7168
sets = []
for _ in range(4):
    x, r = (torch.randn(T, H, device="cuda").bfloat16() for _ in range(2))
    sets.append((x, r, collogue.RMSNorm(torch.randn(H, device="cuda").bfloat16())))

def fastest(call):
    for i in range(1000):
        call(*sets[i % 4])
    torch.cuda.synchronize()
    blocks = []
    for _ in range(40):
        start = time.perf_counter_ns()
        for i in range(200):
            call(*sets[i % 4])
        blocks.append((time.perf_counter_ns() - start) / 200e3)
        torch.cuda.synchronize()
    return min(blocks)

found = {}
for label, quant in (("norm", None), ("norm + fp8_per_token", collogue.FP8PerToken()), ("norm + nvfp4", collogue.NVFP4(37.5))):
    with torch.no_grad():
        x, r, norm = sets[0]
        out = comm.all_reduce(x, residual=r, norm=norm, quant=quant)
        found[label + "/fresh"] = fastest(lambda x, r, n: comm.all_reduce(x, residual=r, norm=n, quant=quant))
        found[label + "/out="] = fastest(lambda x, r, n: comm.all_reduce(x, residual=r, norm=n, quant=quant, out=out))
        op = torch.ops.collogue.all_reduce.default
        name, scale = ("none" if quant is None else quant.label), getattr(quant, "global_scale", 1.0)
        smallest = getattr(quant, "smallest", 0.0)
        found[label + "/operator"] = fastest(lambda x, r, n: op(x, r, n.weight, n.eps, 0.0, name, None, scale, smallest, False, comm.name))
with torch.no_grad():
    y = torch.empty_like(x)
    found["torch.add, out="] = fastest(lambda x, r, n: torch.add(x, r, out=y))
comm.check()
print("RESULT" + json.dumps(found))
"""
VIRTUAL = r"""
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

for world, tokens in ((2, 1), (2, 8), (2, 32), (4, 1), (4, 8)):
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
LOCAL = r"""
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


def measure(path: Path, code: str, *arguments: str) -> dict[str, float]:
    """What ``code`` prints of the tree at ``path``."""
    environment = {**os.environ, "PYTHONPATH": str(path / "src")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(f"{path}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("RESULT"))
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Times of one source tree against another, on one GPU.")
    parser.add_argument("what", choices=("host", "virtual", "local"))
    parser.add_argument("out", type=Path)
    parser.add_argument("trees", nargs="+", help="NAME=PATH; the first is the base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, nargs="*", default=HIDDEN, help="local")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="local")
    parser.add_argument("--format", nargs="*", default=FORMATS, help="local")
    given = parser.parse_args()
    trees = {name: Path(path) for name, path in (tree.split("=", 1) for tree in given.trees)}
    jobs = json.dumps([(h, t, label) for h in given.hidden_size for label in given.format for t in given.tokens])
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(given.rounds):
        for name, path in trees.items():
            if given.what == "local":
                rounds[name].append(measure(path, LOCAL, jobs, "compile" if name == list(trees)[-1] else "no"))
            else:
                rounds[name].append(measure(path, HOST if given.what == "host" else VIRTUAL))
    best = min if given.what == "host" else statistics.median
    times = {name: {row: best([r[row] for r in found]) for row in found[0]} for name, found in rounds.items()}
    spread = {name: {row: max(r[row] for r in found) - min(r[row] for r in found) for row in found[0]} for name, found in rounds.items()}
    data = {"what": given.what, "us": times, "spread": spread, "rounds": rounds, **circumstances()}
    given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    base = next(iter(trees))
    for row, us in times[list(trees)[-1]].items():
        others = "".join(f"  {name} {found[row]:8.2f} +- {spread[name][row]:.2f}" for name, found in times.items() if row in found)
        ratio = f"  {us / times[base][row]:.2f}" if row in times[base] and len(trees) > 1 else ""
        print(f"{row:40}{others}{ratio}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
