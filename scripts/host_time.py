"""Host time of eager calls, of one source tree against another: ``scripts/host_time.py OUT.json NAME=PATH NAME=PATH ...``.

Each ``PATH`` is a checkout; the first is the base of the ratios. One GPU, a world of one, bfloat16, H = 7168, 8 tokens. Every round times
each tree in a process of its own, in turn, so that the machine's noise meets all alike. A time is the median over rounds of the lower
quartile over blocks of 200 calls (what else runs on the machine only adds), in microseconds a call, by the wall clock. The GPU keeps up:
a call's kernel takes less than its launch. Every round is kept.

Rows: the epilogue; fresh outputs, ``out=``, and the operator ``torch.ops.collogue.all_reduce`` under ``torch.no_grad``.
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
import json, statistics, sys, time
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

def quartile(call):
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
    return statistics.quantiles(blocks, n=4)[0]

found = {}
for label, quant in (("norm", None), ("norm + fp8_per_token", collogue.FP8PerToken()), ("norm + nvfp4", collogue.NVFP4(37.5))):
    with torch.no_grad():
        x, r, norm = sets[0]
        out = comm.all_reduce(x, residual=r, norm=norm, quant=quant)
        found[label + "/fresh"] = quartile(lambda x, r, n: comm.all_reduce(x, residual=r, norm=n, quant=quant))
        found[label + "/out="] = quartile(lambda x, r, n: comm.all_reduce(x, residual=r, norm=n, quant=quant, out=out))
        op = torch.ops.collogue.all_reduce.default
        name, scale = ("none" if quant is None else quant.label), getattr(quant, "global_scale", 1.0)
        smallest = getattr(quant, "smallest", 0.0)
        found[label + "/operator"] = quartile(lambda x, r, n: op(x, r, n.weight, n.eps, 0.0, name, None, scale, smallest, False, comm.name))
with torch.no_grad():
    y = torch.empty_like(x)
    found["torch.add, out="] = quartile(lambda x, r, n: torch.add(x, r, out=y))
comm.check()
print("RESULT" + json.dumps(found))
"""


def measure(path: Path) -> dict[str, float]:
    """The times of one tree."""
    environment = {**os.environ, "PYTHONPATH": str(path / "src")}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=200, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(f"{path}: {done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("RESULT"))
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Host time of eager calls, of one source tree against another.")
    parser.add_argument("out", type=Path)
    parser.add_argument("trees", nargs="+", help="NAME=PATH; the first is the base")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    trees = {name: Path(path) for name, path in (tree.split("=", 1) for tree in given.trees)}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(given.rounds):
        for name, path in trees.items():
            rounds[name].append(measure(path))
    base, *others = trees
    times = {name: {row: statistics.median(r[row] for r in found) for row in found[0]} for name, found in rounds.items()}
    ratios = {name: {row: times[name][row] / us for row, us in times[base].items()} for name in others}
    import torch

    device = torch.cuda.get_device_name(0)
    data = {"device": device, "torch": torch.__version__, "us": times, "ratio": ratios, "rounds": rounds, **circumstances()}
    given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for row in times[base]:
        shares = "".join(f"  {name} {times[name][row]:6.2f} ({ratios[name][row]:.2f})" for name in others)
        print(f"{row:32} {base} {times[base][row]:6.2f}{shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
