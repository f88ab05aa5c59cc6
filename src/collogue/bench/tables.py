"""Tables of what the benchmarks found, row by row, from results as data. :mod:`collogue.pages` and the commands lay them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from collogue.bench.variants import ALL, COLLOGUE

Data = dict[str, Any]


def lines(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown; the first row is its head."""
    for number, row in enumerate(rows):
        yield "| " + " | ".join(row) + " |"
        if number == 0:
            yield "|" + "---|" * len(row)


def model(data: Data) -> Iterator[Sequence[str]]:
    """Of each model, world and size: microseconds of a pass over the whole model, and speed-ups of the best of Collogue's ways."""
    yield ["model", "ranks", "tokens", *ALL, "best / NCCL", "best / symm. mem.", "collectives' share: NCCL, best"]
    for key in dict.fromkeys((r["model"], r["world_size"], r["tokens"]) for r in data["rows"]):
        mine = {r["what"]: r for r in data["rows"] if (r["model"], r["world_size"], r["tokens"]) == key}
        times = ["-" if mine[what]["us"] is None else f"{mine[what]['us']:.0f}" for what in ALL]
        own = [mine[what] for what in COLLOGUE if mine[what]["us"] is not None]
        best = min(own, key=lambda r: float(r["us"]), default=None)
        gains = ["-" if best is None or best.get(k) is None else f"{best[k]:.2f}" for k in ("speedup_nccl", "speedup_symm_mem")]
        shares = [r["share_of_collectives"] for r in (mine["nccl"], best) if r is not None and r["share_of_collectives"] is not None]
        yield [*map(str, key), *times, *gains, ", ".join(f"{s:.0%}" for s in shares) or "-"]


def speedups(data: Data) -> Iterator[Sequence[str]]:
    """Of each model and size: how much faster the best of Collogue's ways is than the baselines."""
    yield ["model", "ranks", "tokens", "over NCCL + torch.compile", "over torch symmetric memory + torch.compile"]
    for key in dict.fromkeys((r["model"], r["world_size"], r["tokens"]) for r in data["rows"]):
        own = [r for r in data["rows"] if (r["model"], r["world_size"], r["tokens"]) == key and r.get("speedup_nccl")]
        best = max(own, key=lambda r: float(r["speedup_nccl"]), default=None)
        if best is not None:
            yield [*map(str, key), *(f"{best[k]:.2f}" for k in ("speedup_nccl", "speedup_symm_mem"))]


def serving(data: Data) -> Iterator[Sequence[str]]:
    """Of each way: tokens per second and times of the whole workload, and the ratio to NCCL's, whole and of its chunks."""
    yield ["way", "output tokens/s", "ms per token", "ms to first token", "seconds", "over NCCL", "by chunk"]
    for row in data["totals"]:
        if row["error"] is not None:
            yield [row["way"], f"NO NUMBER: {row['error']}", *[""] * 5]
            continue
        gain = ["-", "-"]
        if "speedup_nccl" in row:
            gain = [f"{row['speedup_nccl']:.3f}", f"{row['speedup_low']:.3f} to {row['speedup_high']:.3f}"]
        times = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("ms_per_token", "ms_to_first_token", "seconds")]
        yield [row["way"], f"{row['tokens_per_second']:.0f}", *times, *gain]


def host(data: Data) -> Iterator[Sequence[str]]:
    """Host time of one eager call in every way to make it."""
    yield ["call", "ranks", "us of host time"]
    for row in data["host"]:
        yield [f"`{row['what']}`", str(row["world_size"]), f"{row['us']:.1f}"]
