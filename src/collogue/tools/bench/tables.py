"""Tables of what the benchmarks found, row by row, from results as data. ``scripts/pages.py`` and the commands lay them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from collogue.tools.bench import report
from collogue.tools.bench.floors import EMPTY, EXCHANGE
from collogue.tools.bench.names import call_name
from collogue.tools.bench.variants import ALL, COLLOGUE
from collogue.tools.bench.virtual import KINDS, ratios

Data = dict[str, Any]


def lines(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown; the first row is its head."""
    for number, row in enumerate(rows):
        yield "| " + " | ".join(row) + " |"
        if number == 0:
            yield "|" + "---|" * len(row)


def _by_model(data: Data) -> dict[tuple[str, int], dict[int, dict[str, Data]]]:
    """Rows of ``collogue bench model`` by model and world size, tokens in rising order, and way."""
    found: dict[tuple[str, int], dict[int, dict[str, Data]]] = {}
    for row in sorted(data["rows"], key=lambda r: int(r["tokens"])):
        ways = found.setdefault((row["model"], row["world_size"]), {}).setdefault(row["tokens"], {})
        if row["what"] in ways:
            raise ValueError(f"two results of {row['model']}, world {row['world_size']}, T = {row['tokens']}, {row['what']}")
        ways[row["what"]] = row
    first = list(dict.fromkeys((r["model"], r["world_size"]) for r in data["rows"]))
    return {key: found[key] for key in first}


def _best(ways: dict[str, Data]) -> Data | None:
    """The fastest of Collogue's ways."""
    return min((ways[what] for what in COLLOGUE if ways[what]["us"] is not None), key=lambda r: float(r["us"]), default=None)


def _gains(best: Data | None) -> list[str]:
    return ["-" if best is None or best.get(k) is None else f"{best[k]:.2f}" for k in ("speedup_nccl", "speedup_symm_mem")]


def model(data: Data) -> Iterator[Sequence[str]]:
    """Of each model, world and size: microseconds of a pass over the whole model, and speed-ups of the best of Collogue's ways."""
    yield ["model", "ranks", "tokens", *ALL, "best / NCCL", "best / symm. mem.", "collectives' share: NCCL, best"]
    for (name, world), sizes in _by_model(data).items():
        for tokens, ways in sizes.items():
            times = ["-" if ways[what]["us"] is None else f"{ways[what]['us']:.0f}" for what in ALL]
            best = _best(ways)
            shares = [r["share_of_collectives"] for r in (ways["nccl"], best) if r is not None and r["share_of_collectives"] is not None]
            yield [name, str(world), str(tokens), *times, *_gains(best), ", ".join(f"{s:.0%}" for s in shares) or "-"]


def speedups(data: Data) -> Iterator[Sequence[str]]:
    """Of each model and size: how much faster the best of Collogue's ways is, over NCCL / over torch's symmetric memory."""
    counts = sorted({int(r["tokens"]) for r in data["rows"]})
    yield ["model, ranks", *(f"T = {tokens}" for tokens in counts)]
    for (name, world), sizes in _by_model(data).items():
        yield [f"{name}, {world}", *(" / ".join(_gains(_best(sizes[t]))) if t in sizes else "" for t in counts)]


def layer_gains(data: Data) -> dict[str, dict[str, float]]:
    """Of each model and number of ranks, by number of tokens: the best of Collogue's ways over the faster of NCCL and symmetric memory."""
    found: dict[str, dict[str, float]] = {}
    for (name, world), sizes in _by_model(data).items():
        for tokens, ways in sizes.items():
            best = _best(ways)
            gains = [float(best[key]) for key in ("speedup_nccl", "speedup_symm_mem") if best is not None and best.get(key)]
            if gains:
                found.setdefault(f"{name}, {world} ranks", {})[f"T = {tokens}"] = min(gains)
    return found


def headline(data: Data) -> str:
    """One sentence of ratios, of `collogue bench` (cases) and `collogue bench model` (rows) together."""
    chains = report.chain_ratios(data)
    least, most = min(chains), max(chains)
    best = [row for sizes in _by_model(data).values() for ways in sizes.values() if (row := _best(ways)) is not None]
    nccl, symm_mem = (sorted(float(row[key]) for row in best if row.get(key)) for key in ("speedup_nccl", "speedup_symm_mem"))
    world, gpu = data["cases"][0]["world_size"], data["machine"]["gpus"][0]
    return (
        f"On {world} x {gpu}, all-reduce + residual + RMSNorm is **{chains[least]:.1f}x as fast at {least} token and "
        f"{chains[most]:.1f}x at {most} tokens** as the faster\nof NCCL and PyTorch symmetric memory with a compiled norm behind it; "
        f"layer stacks of published models run **{nccl[0]:.2f}x to {nccl[-1]:.2f}x**\nas fast as "
        f"with NCCL and `torch.compile`, {symm_mem[0]:.2f}x to {symm_mem[-1]:.2f}x as "
        "fast as with symmetric memory and `torch.compile`.\n"
    )


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
    yield ["call", "ranks", "µs of host time"]
    for row in data["host"]:
        yield [f"`{row['what']}`", str(row["world_size"]), f"{row['us']:.1f}"]


def eager(data: Data) -> Iterator[Sequence[str]]:
    """Calls from Python: microseconds of each until the GPU has done a row of them, by number of tokens."""
    return _section(data, "eager")


def virtual(data: Data) -> Iterator[Sequence[str]]:
    """FlashInfer's time over Collogue's on virtual ranks: norm / FP8 static / sum. What does not fit on the GPU together is left out."""
    found = {row["cell"]: row for row in ratios(data)}
    counts = sorted({tokens for _, _, tokens, _ in found})
    yield ["ranks, H", *(f"T = {tokens}" for tokens in counts)]
    for world, width in dict.fromkeys((world, width) for world, width, _, _ in found):
        cells = [[found.get((world, width, tokens, kind)) for kind in KINDS] for tokens in counts]
        yield [f"{world}, {width}", *(" / ".join(f"{row['ratio']:.2f}" for row in cell if row is not None) for cell in cells)]


def epilogues(data: Data) -> Iterator[Sequence[str]]:
    """Microseconds of a call with each epilogue, by number of tokens."""
    return _section(data, "epilogues")


def _section(data: Data, section: str) -> Iterator[Sequence[str]]:
    """All calls of a section of ``collogue bench`` but the floors; a call has a row, a number of tokens a column."""
    rows = [r for r in data["cases"] if r["section"] == section and r["us"] is not None and r["what"] not in (EMPTY, EXCHANGE)]
    counts = sorted({int(r["tokens"]) for r in rows})
    found = {(call_name(r), r["tokens"]): r["us"] for r in rows}
    yield ["call", *(f"T = {tokens}" for tokens in counts)]
    for name in dict.fromkeys(call_name(r) for r in rows):
        yield [name, *(f"{found[name, t]:.2f}" if (name, t) in found else "-" for t in counts)]
