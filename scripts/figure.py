"""The headline figure as a file, from results: ``python scripts/figure.py LATENCY.json [MODEL.json ...] FIGURE.svg``.

Panels: the speed-up over other libraries against tokens; times with the lower bound of each kind of call; shares of these bounds; the
speed-up of whole layers, where results of ``collogue bench model`` are given.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collogue.tools.bench import report, tables
from collogue.tools.bench.cases import COMPILED, HIDDEN_SIZE, NCCL, ONE_SHOT, TWO_SHOT
from collogue.tools.bench.page import exact
from collogue.tools.bench.plot import WIDTH, Point, bar_chart, line_chart

Row = dict[str, Any]

_STYLE = (
    "<style>svg { font: 13px system-ui, sans-serif; background: #fff; } .title { font-weight: 600; font-size: 15px; } "
    ".grid { stroke: #e4e4e4; } .axis { stroke: #555; } .value { font-size: 9px; } .bound { stroke-width: 1.2; }</style>"
)
#: Pixels: between the panels, and above them.
_GAP, _HEAD = 24, 34
#: Sizes of the bars.
_SIZES = ("T = 1", "T = 16", "T = 256", "T = 4096")
#: Kinds of Collogue's calls: format, and operation where it is not all_reduce.
_KINDS: dict[str, tuple[str, str | None]] = {
    "Collogue, norm": ("none", None),
    "Collogue, NVFP4": ("nvfp4/128x4", None),
    "Collogue, sharded, NVFP4": ("nvfp4/128x4", "sharded"),
    "Collogue, sharded, FP8 per token": ("fp8_per_token", "sharded"),
}


def figure(data: Row, models: Row | None = None) -> str:
    """An SVG of up to four panels, two in a row. ``models``: results of ``collogue bench model``.

    Raises :class:`ValueError` where a call took less than its lower bound.
    """
    below = report.below_floor(data)
    if below:
        raise ValueError(f"a lower bound is wrong: {below[0]}")
    gpus = data["machine"]["gpus"]
    title = f"All-reduce + residual + RMSNorm (+ quantization), {len(gpus)} x {gpus[0]}, H = {HIDDEN_SIZE}, bfloat16"
    gains = {f"over {name}": exact(ratios) for name, ratios in report.speedups(data).items() if name != report.FASTEST}
    series, bounds, shares = _times(data)
    panels = [
        line_chart("Speed-up of Collogue, norm", "tokens", "times as fast", gains, logarithmic=False),
        line_chart("Time of a call", "tokens", "microseconds", series, order=_ORDER, bounds=bounds),
        line_chart("Share of the lower bound of the same kind of call", "tokens", "bound / time", shares, order=_ORDER, logarithmic=False),
    ]
    if models is not None:
        bars = {name: {size: gain for size, gain in sizes.items() if size in _SIZES} for name, sizes in tables.layer_gains(models).items()}
        panels.append(bar_chart("Whole layers, over the faster of NCCL and symm. mem.", "times as fast", bars))
    heights = [float(re.findall(r'viewBox="0 0 \S+ (\S+)"', panel)[0]) for panel in panels]
    rows = [max(heights[i : i + 2]) for i in range(0, len(panels), 2)]
    placed = []
    for i, panel in enumerate(panels):
        x, y = i % 2 * (WIDTH + _GAP), _HEAD + sum(rows[: i // 2]) + i // 2 * _GAP
        placed.append(panel.replace("<svg ", f'<svg x="{x}" y="{y:g}" width="{WIDTH}" height="{heights[i]:g}" ', 1))
    width, height = 2 * WIDTH + _GAP, round(_HEAD + sum(rows) + _GAP * (len(rows) - 1))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    return "\n".join([head, _STYLE, f'<text x="12" y="20" class="title">{title}</text>', *placed, "</svg>"]) + "\n"


#: Names in the order of their colors.
_ORDER = (*_KINDS, "NCCL + compiled norm", "symmetric memory + compiled norm", "NCCL all-reduce alone")


def _times(data: Row) -> tuple[dict[str, list[Point]], dict[str, list[Point]], dict[str, list[Point]]]:
    """Times, lower bounds, and shares of these. Of Collogue's times only two are drawn, so that the lines can be told apart."""
    rows = [r for r in data["cases"] if r["hidden_size"] == HIDDEN_SIZE and r["us"] and r["section"] in ("decode", "large")]

    def best(names: Sequence[str], format: str | None, operation: str | None = None) -> dict[int, Row]:
        found: dict[int, Row] = {}
        for r in rows:
            whole = format is None or (r.get("norm") and not r["keep_norm"] and r["format"] == format)
            known = found.get(r["tokens"], {"us": float("inf")})
            if r["what"] in names and whole and r.get("operation") == operation and r["us"] < known["us"]:
                found[r["tokens"]] = r
        return found

    own = {name: best(["collogue"], *kind) for name, kind in _KINDS.items()}
    lines = {
        "NCCL + compiled norm": best([NCCL + COMPILED], "none"),
        "symmetric memory + compiled norm": best([ONE_SHOT + COMPILED, TWO_SHOT + COMPILED], "none"),
        "NCCL all-reduce alone": best([NCCL], None),
        **{name: own[name] for name in ("Collogue, norm", "Collogue, sharded, NVFP4")},
    }

    def points(of: dict[str, dict[int, Row]], key: str) -> dict[str, list[Point]]:
        drawn = {name: exact({t: r[key] for t, r in found.items() if r.get(key)}) for name, found in of.items()}
        return {name: line for name, line in drawn.items() if line}

    return points(lines, "us"), points(own, "floor_us"), points(own, "share")


def joined(files: Sequence[Path]) -> Row | None:
    """The rows of results of ``collogue bench model``."""
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    return {"rows": rows} if rows else None


if __name__ == "__main__":
    results, *more, out = map(Path, sys.argv[1:])
    out.write_text(figure(json.loads(results.read_text(encoding="utf-8")), joined(more)), encoding="utf-8")
