"""``collogue bench model``: decode steps and prefills of layer stacks, with every implementation of the epilogue, in one run.

Tokens per second are of the whole model: the time of a short stack, in a CUDA graph, times the model's layers over the stack's.
A number is kept only if the stack's output is that of NCCL's within :data:`TOLERANCE`.
"""

from __future__ import annotations

import functools
import json as json_module
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from collogue.communicator import Communicator
from collogue.errors import ArgumentError, PlatformError
from collogue.pytorch import fusion
from collogue.testing import environment
from collogue.testing.processes import run_processes
from collogue.tools.bench import tables
from collogue.tools.bench.stack import ACTIVATIONS, SHAPES, functions_of, make_blocks, rank_shape
from collogue.tools.bench.timing import captured, everywhere, microseconds
from collogue.tools.bench.variants import ALL, BASELINES, COLLOGUE, LOCAL, Blocks, make_step
from collogue.tools.record import circumstances

#: Relative error, in the L2 norm, of the last residual against NCCL's: one rounding less at every boundary moves some FP8 codes by one,
#: about a hundredth per boundary. A missing term gives errors of order 1.
TOLERANCE = 0.15
#: From so many tokens on a step is a prefill of one sequence; below, a decode step of as many sequences.
PREFILL = 512
SILENCE = 180.0
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-32b", "deepseek-v3-dense", "deepseek-v3-shared")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)

Row = dict[str, Any]


def run(
    *,
    model: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    world_size: Sequence[int] | None = None,
    layers: int = 4,
    replays: int = 20,
    scales: str = "static",
    device: str = "cuda",
    json: str | None = None,
    plot: str | None = None,
    commit: str | None = None,
) -> bool:
    """Measure, write the JSON, print the tables; whether everything of Collogue's has a number.

    Args:
        model: names of :data:`collogue.tools.bench.stack.SHAPES`; default :data:`MODELS`.
        tokens: batch of a decode step, or length of a prefill from :data:`PREFILL` on; default :data:`TOKENS`.
        world_size: default: 2, 4 and 8, as far as there are GPUs.
        layers: of the stack that is timed. replays: of each graph, of which the median counts.
        scales: of activations, a key of :data:`collogue.tools.bench.stack.ACTIVATIONS`.
        device: ``"cpu"`` runs the same code without graphs; its times mean nothing.
        json: a file, or ``"-"`` for stdout (the tables then go to stderr). plot: a file for a plot of the speed-ups.
    Raises:
        ArgumentError: an unknown model or kind of scales. PlatformError: fewer GPUs than ranks.
    """
    names, counts = list(model or MODELS), list(tokens or TOKENS)
    for name in names:
        if name not in SHAPES:
            raise ArgumentError(f"unknown model {name!r}", hint=f"choose one of {', '.join(SHAPES)}")
    if scales not in ACTIVATIONS:
        raise ArgumentError(f"unknown scales {scales!r}", hint=f"choose one of {', '.join(ACTIVATIONS)}")
    if device == "cuda":
        environment.set_defaults()
    gpus = torch.cuda.device_count() if device == "cuda" else 8
    worlds = list(world_size or [n for n in (2, 4, 8) if n <= gpus])
    if not worlds or max(worlds) > gpus:
        raise PlatformError(f"{gpus} GPUs found; {max(worlds, default=2)} required, one for each rank", hint="use a machine with more GPUs")
    data: dict[str, Any] = {"passed": False, **circumstances(commit), "layers": layers, "replays": replays, "scales": scales, "rows": []}
    for world in worlds:

        def heard(rank: int, stage: str) -> None:
            if rank == 0:
                print(stage, file=sys.stderr, flush=True)

        ranks = run_processes(world, model_rank, names, counts, layers, replays, scales, device=device, silence=SILENCE, heard=heard)
        data["rows"] += ranks[0]
    data["passed"] = all(row["error"] is None for row in data["rows"] if row["what"] in COLLOGUE)
    _add_speedups(data["rows"])
    text = json_module.dumps(data, indent=1, allow_nan=False) + "\n"
    if json == "-":
        sys.stdout.write(text)
    elif json is not None:
        Path(json).write_text(text)
    if plot is not None:
        draw(data["rows"], plot)
    print(table(data), file=sys.stderr if json == "-" else sys.stdout)
    return bool(data["passed"])


# ---- one rank


def model_rank(
    group: dist.ProcessGroup,
    tell: Callable[[str], None],
    names: Sequence[str],
    counts: Sequence[int],
    layers: int,
    replays: int,
    scales: str,
) -> list[Row]:
    """Every model and size on this rank; the same rows on every rank."""
    rows: list[Row] = []
    for name in names:
        shape = SHAPES[name]
        for tokens in counts:
            with (
                torch.no_grad(),
                Communicator(group, max_tokens=tokens, hidden_size=shape.hidden_size, timeout=20.0) as comm,
            ):
                rows += _measure(group, comm, name, tokens, layers, replays, scales)
            torch._dynamo.reset()  # units of other shapes are other graphs
            tell(f"world {comm.world_size}, {name}, {tokens} tokens: " + ", ".join(_short(row) for row in rows[-len(ALL) :]))
    return rows


def _measure(group: dist.ProcessGroup, comm: Communicator, name: str, tokens: int, layers: int, replays: int, scales: str) -> list[Row]:
    whole, device, prefill, activations = SHAPES[name], comm.device, tokens >= PREFILL, ACTIVATIONS[scales]
    shape = rank_shape(whole, comm.world_size)
    blocks = make_blocks(shape, layers, tokens, prefill=prefill, device=device, seed=comm.rank, rowwise=activations.rowwise)
    rows_of = torch.Generator(device).manual_seed(100)
    residual = torch.randn(tokens, whole.hidden_size, device=device, generator=rows_of).bfloat16()
    partial = torch.randn(tokens, whole.hidden_size, device=device, generator=rows_of).bfloat16() / comm.world_size
    stack = Blocks(functions_of(shape, prefill, activations.quantize), blocks, device, activations)
    found: dict[str, Row] = {}
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    row: Row
    expected: torch.Tensor | None = None
    for what in ("nccl", *(w for w in ALL if w != "nccl")):
        row = {"model": name, "world_size": comm.world_size, "tokens": tokens, "prefill": prefill, "what": what, "us": None, "error": None}
        fusion.compile.report().clear()
        try:
            run = captured(functools.partial(make_step(what, stack, comm, group), partial, residual), device)
            result = run().float()
            if what == "collogue pass":
                row["error"] = _left_out(fusion.compile.report(), len(stack.functions))
            expected = result if what == "nccl" else expected
            difference = float((result - expected).norm() / expected.norm()) if expected is not None else 0.0
            row["difference"] = difference
            if what != LOCAL and not difference < TOLERANCE:
                row["error"] = f"relative difference {difference:.3g} to NCCL's output"
            runs[what] = run
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        failed = everywhere(group, row["error"])
        row["error"] = next((text for text in failed if text), None)
        found[what] = row
    right = [what for what in found if found[what]["error"] is None]
    for what, times in zip(right, _times([runs[what] for what in right], group, replays, device), strict=True):
        row = found[what]
        row["us"] = statistics.median(times) * whole.layers / layers
        row["tokens_per_second"] = tokens / row["us"] * 1e6
    local = found[LOCAL]["us"]
    for row in found.values():
        row["share_of_collectives"] = None if row["us"] is None or local is None else max(0.0, 1.0 - local / row["us"])
    return [found[what] for what in ALL]


def _left_out(report: fusion.Report, units: int) -> str | None:
    """What the pass has left of the boundaries of ``units`` compiled units, if anything: a time with it is that of something else."""
    partly = [fused for fused in report.fused if fused.quant == "none" or fused.keeps_norm or not fused.residual]
    outside = next(map(str, (*report.missed, *report.remarks, *partly)), None)
    if outside is None and len(report.fused) < units:
        return f"the pass fused {len(report.fused)} of {units} boundaries"
    return outside


def _times(runs: Sequence[Callable[[], torch.Tensor]], group: dist.ProcessGroup, replays: int, device: torch.device) -> list[list[float]]:
    """Microseconds of every replay but the first two, the longest of all ranks; the runs take turns, and all ranks start together."""
    taken = []
    for _ in range(replays + 2):
        for run in runs:
            dist.barrier(group)
            taken.append(microseconds(run, device))
    slowest = [max(times) for times in zip(*everywhere(group, taken), strict=True)]
    return [slowest[i :: len(runs)][2:] for i in range(len(runs))]


# ---- report


def _add_speedups(rows: list[Row]) -> None:
    """Of every row of Collogue's: against NCCL, and against the better of torch's symmetric memory."""
    times = {(r["model"], r["world_size"], r["tokens"], r["what"]): r["us"] for r in rows}
    for row in rows:
        if row["what"] not in COLLOGUE or row["us"] is None:
            continue
        key = (row["model"], row["world_size"], row["tokens"])
        symmetric = [us for what in BASELINES[1:] if (us := times.get((*key, what))) is not None]
        nccl = times.get((*key, "nccl"))
        row["speedup_nccl"] = None if nccl is None else nccl / row["us"]
        row["speedup_symm_mem"] = min(symmetric) / row["us"] if symmetric else None


def _short(row: Row) -> str:
    return f"{row['what']} {row['us']:.0f} us" if row["us"] is not None else f"{row['what']} FAILED ({row['error']})"


def table(data: Row) -> str:
    """:func:`collogue.tools.bench.tables.model` as text."""
    return "\n".join(tables.lines(tables.model(data)))


def draw(rows: Sequence[Row], file: str) -> None:
    """:func:`collogue.tools.bench.tables.layer_gains` as bars."""
    import matplotlib.pyplot as plt

    gains = tables.layer_gains({"rows": rows})
    sizes = list(dict.fromkeys(size for bars in gains.values() for size in bars))
    figure, axes = plt.subplots(figsize=(max(5.0, 1.8 * len(gains)), 4))
    for i, size in enumerate(sizes):
        at = [j + 0.8 * (i + 0.5) / len(sizes) - 0.4 for j, bars in enumerate(gains.values()) if size in bars]
        axes.bar(at, [bars[size] for bars in gains.values() if size in bars], width=0.8 / len(sizes), label=size)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(gains)), [name.replace(", ", "\n") for name in gains])
    axes.set(ylabel="whole layers: times as fast as the\nfaster of NCCL and symmetric memory")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
