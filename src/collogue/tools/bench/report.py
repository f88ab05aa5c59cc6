"""Results as data and as tables. Tables are made from the data only, so a table can always be made again from its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from collogue.tools.bench.cases import BASELINES, COMPILED, FLASHINFER_WAYS, NCCL, ONE_SHOT, TWO_SHOT, VLLM
from collogue.tools.bench.floors import EMPTY, EXCHANGE
from collogue.tools.bench.names import Row, label

METHOD = (
    "Microseconds per call: (CUDA graph of 100 back-to-back calls - graph of 20) / 80; median over replays, maximum over ranks; "
    "low_us and high_us are the 10th and 90th percentile of the replays' own slopes on that rank. All rows of a round are replayed in "
    "turn, each call takes the next of three input sets (partial, residual, weight, outputs), and before each replay all ranks meet and "
    "all GPUs are idle. A call of Collogue is all_reduce with a residual, RMSNorm and the format, out= given; its outputs equal the "
    "reference bit for bit before timing and after the timed graph. Baselines sum small integers exactly before they are timed, then run "
    "on zeros; chains and fused kernels of other libraries give the exact residual stream, and a norm or decoded codes within bounds. "
    "Section eager: 200 calls from Python one after the other, us until the GPU has done them, host_us until the last one returned. "
    "floor_us = the one-word exchange of the same round + bytes_sent / the measured rate of the wire, not of eager calls; "
    "share = floor_us / us."
)


def add_floors(rows: Iterable[Row], wire: Row) -> list[Row]:
    """``rows`` of one world with ``floor_us`` and ``share`` where the exchange of their round, the wire and the row have a time.

    Eager calls have none: their exchange is called from Python, too, and its time is the host's.
    """
    rows = list(rows)
    exchange = {_round_of(r): r["us"] for r in rows if r["what"] == EXCHANGE}
    result = []
    for row in rows:
        hop, floor, share = exchange.get(_round_of(row)), None, None
        known = hop is not None and wire["us"] is not None and row.get("bytes_sent") is not None and "host_us" not in row
        if row["what"] == "collogue" and known:
            floor = hop + row["bytes_sent"] / wire["bytes_sent"] * wire["us"]
            share = floor / row["us"] if row["us"] else None
        result.append({**row, "floor_us": floor, "share": share})
    return result


def _round_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("section", "world_size", "tokens", "hidden_size", "dtype"))


def passed(data: dict[str, Any]) -> bool:
    """Whether there are cases, and every one of Collogue's, every floor and every host time has a number. Baselines may be missing. No call
    may take less than its lower bound."""
    own = [r for r in data["cases"] if r["what"] in ("collogue", EMPTY, EXCHANGE)]
    return bool(own) and all(r["error"] is None for r in [*own, *data["wire"], *data["host"]]) and not below_floor(data)


def below_floor(data: dict[str, Any]) -> list[str]:
    """Calls that took less than their lower bound: a bug of the bound, so that no share of it means anything."""
    return [
        f"{label(r)} T={r['tokens']} H={r['hidden_size']} world {r['world_size']}: {r['us']:.2f} us, lower bound {r['floor_us']:.2f}"
        for r in data.get("cases", ())
        if r["us"] is not None and r.get("share") is not None and r["share"] > 1
    ]


def find(data: dict[str, Any], **wanted: Any) -> list[Row]:
    """Cases whose fields equal ``wanted``, or one of them where it is a tuple."""
    choices = {key: value if isinstance(value, tuple) else (value,) for key, value in wanted.items()}
    return [row for row in data["cases"] if all(row.get(key) in values for key, values in choices.items())]


_NORM: dict[str, Any] = {"what": "collogue", "format": "none", "norm": True, "keep_norm": False, "operation": None}
_CHAINS = tuple(name + COMPILED for name in BASELINES)
#: Other libraries' whole calls, with the norm.
_LIBRARIES: dict[str, tuple[str, ...]] = {
    "NCCL + compiled norm": (NCCL + COMPILED,),
    "symmetric memory + compiled norm": (ONE_SHOT + COMPILED, TWO_SHOT + COMPILED),
    "vLLM's custom all-reduce + compiled norm": (VLLM + COMPILED,),
    "FlashInfer": FLASHINFER_WAYS,
}
#: Columns of the table in README.md: heading, the fields of rows, and which number of them; the least is shown.
COLUMNS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("Collogue, norm", _NORM, "us"),
    ("Collogue, NVFP4", {"what": "collogue", "format": "nvfp4/128x4", "norm": True, "keep_norm": False, "operation": None}, "us"),
    ("Collogue, FP8 static", {"what": "collogue", "format": "fp8_static", "norm": True, "keep_norm": False, "operation": None}, "us"),
    ("NCCL or symm. mem., then a compiled norm", {"what": _CHAINS, "format": "none"}, "us"),
    ("NCCL all-reduce alone", {"what": NCCL}, "us"),
    ("lower bound (norm)", _NORM, "floor_us"),
)
#: Decode sizes that the table has, and large calls. The figure has all.
DECODE = (1, 4, 8, 16, 64, 128)
LARGE = (512, 4096, 16384)


def latency_table(data: dict[str, Any]) -> str:
    """The decode sizes and some large ones as Markdown: tokens by :data:`COLUMNS`, with the machine named."""
    decode = find(data, section="decode")
    if not decode:
        raise ValueError("the results have no decode section: run `collogue bench` without lists of shapes")
    first = decode[0]
    world, gpu = first["world_size"], data["machine"]["gpus"][0]
    lines = [
        f"{world} x {gpu}, H = {first['hidden_size']}, {first['dtype']}: µs per call of all-reduce + residual + RMSNorm",
        "(+ quantization), back to back in a CUDA graph. Lower bound: latency of exchanging one word with each peer + bytes sent /",
        "measured NVLink bandwidth.",
        "",
        _line(["tokens", *(heading for heading, _, _ in COLUMNS)]),
        "|" + "---|" * (1 + len(COLUMNS)),
    ]
    large = [row for row in find(data, section="large") if row["tokens"] in LARGE]
    small = [row for row in decode if row["tokens"] in DECODE]
    for section, tokens in sorted({(row["section"], row["tokens"]) for row in (*small, *large)}):
        cells = []
        for _, fields, key in COLUMNS:
            rows = [row for row in find(data, section=section, world_size=world, tokens=tokens, **fields) if row[key] is not None]
            cells.append(number(min(rows, key=lambda row: float(row[key]), default=None), key))
        lines.append(_line([str(tokens), *cells]))
    return "\n".join(lines) + "\n"


def chain_ratios(data: dict[str, Any], chains: tuple[str, ...] = _CHAINS) -> dict[int, float]:
    """By number of tokens: the fastest of ``chains``, all-reduces with a compiled norm behind them, over Collogue's call with the norm."""

    def least(tokens: int, fields: dict[str, Any]) -> float | None:
        rows = find(data, section=("decode", "large"), tokens=tokens, **fields)
        return min((float(row["us"]) for row in rows if row["us"] is not None), default=None)

    ratios = {}
    for tokens in sorted({row["tokens"] for row in find(data, section=("decode", "large"))}):
        own, others = least(tokens, _NORM), least(tokens, {"what": chains, "format": "none"})
        if own is not None and others is not None:
            ratios[tokens] = others / own
    return ratios


def speedups(data: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Ratios by number of tokens over each library that was measured, and over the fastest of them."""
    found = {name: chain_ratios(data, chains) for name, chains in _LIBRARIES.items()}
    measured = {name: ratios for name, ratios in found.items() if ratios}
    every = tuple(chain for chains in _LIBRARIES.values() for chain in chains)
    return {**measured, FASTEST: chain_ratios(data, every)} if len(measured) > 1 else measured


FASTEST = "the fastest of them"


def number(row: Row | None, key: str = "us") -> str:
    """A time of ``row`` as a table shows it; what has no number is a dash."""
    us = None if row is None else row[key]
    return "-" if us is None else f"{us:.2f}" if us < 100 else f"{us:.0f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def text(data: dict[str, Any]) -> str:
    """All results as text: a table for each section and world, then the wire, the host and the compiler, then errors."""
    lines: list[str] = []
    for section, world, dtype in dict.fromkeys((r["section"], r["world_size"], r["dtype"]) for r in data["cases"]):
        rows = find(data, section=section, world_size=world, dtype=dtype)
        names = list(dict.fromkeys(label(r) for r in rows))
        table = [["H", "T", *names]]
        for hidden, tokens in dict.fromkeys((r["hidden_size"], r["tokens"]) for r in rows):
            found = {label(r): r for r in rows if (r["hidden_size"], r["tokens"]) == (hidden, tokens)}
            table.append([str(hidden), str(tokens), *(number(found.get(name)) for name in names)])
        lines += [f"{section}, world {world}, {dtype}: us per call", *aligned(table)]
        lines.append("")
    for wire in data["wire"]:
        if wire["us"] is not None:
            lines.append(f"wire, world {wire['world_size']}: {wire['bytes_sent'] / wire['us'] / 1e3:.0f} GB/s leave each rank")
    for host in data["host"]:
        if host["us"] is not None:
            lines.append(f"host, world {host['world_size']}, {host['what']}: {host['us']:.1f} us per eager call")
    for compiler in data["compile"]:
        for name in ("cold", "cached"):
            seconds = ", ".join(f"{s:.3f}" for s in compiler[f"{name}_seconds"])
            lines.append(f"kernels ({', '.join(compiler['formats'])}), {name}: {seconds} s")
    wrong = [r for r in [*data["cases"], *data["wire"], *data["host"]] if r["error"] is not None]
    lines += [f"NO NUMBER {label(r)} T={r.get('tokens')} H={r.get('hidden_size')}: {r['error']}" for r in wrong]
    lines += [f"BELOW ITS LOWER BOUND {text}" for text in below_floor(data)]
    return "\n".join(lines) + "\n"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns one under the other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
