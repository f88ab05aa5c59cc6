"""The headline figure as a file: speed-up and time against tokens, from the results of ``collogue bench``.

``python scripts/figure.py RESULTS.json FIGURE.svg``
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collogue.tools.bench.cases import COMPILED, HIDDEN_SIZE, NCCL, ONE_SHOT, TWO_SHOT
from collogue.tools.bench.plot import WIDTH, Point, line_chart
from collogue.tools.bench.report import speedups

Row = dict[str, Any]

_STYLE = (
    "<style>svg { font: 13px system-ui, sans-serif; background: #fff; } .title { font-weight: 600; font-size: 15px; } "
    ".grid { stroke: #e4e4e4; } .axis { stroke: #555; }</style>"
)
#: Pixels: between the panels, and above them.
_GAP, _HEAD = 24, 34


def figure(data: Row) -> str:
    """An SVG of two panels: the speed-up over other libraries, and the times of replicated calls with their lower bound."""
    gpus = data["machine"]["gpus"]
    title = f"All-reduce + residual + RMSNorm (+ quantization), {len(gpus)} x {gpus[0]}, H = {HIDDEN_SIZE}, bfloat16"
    gains = {f"over {name}": [Point(t, r, r, r) for t, r in ratios.items()] for name, ratios in speedups(data).items()}
    gains.pop("over the fastest of them", None)
    panels = [
        line_chart("Speed-up of Collogue, norm", "tokens", "times as fast", gains, logarithmic=False),
        line_chart("Time of a call", "tokens", "microseconds", _times(data)),
    ]
    heights = [float(re.findall(r'viewBox="0 0 \S+ (\S+)"', panel)[0]) for panel in panels]
    width, height = 2 * WIDTH + _GAP, round(_HEAD + max(heights))
    placed = [
        panel.replace("<svg ", f'<svg x="{i * (WIDTH + _GAP)}" y="{_HEAD}" width="{WIDTH}" height="{heights[i]:g}" ', 1)
        for i, panel in enumerate(panels)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    return "\n".join([head, _STYLE, f'<text x="12" y="20" class="title">{title}</text>', *placed, "</svg>"]) + "\n"


def _times(data: Row) -> dict[str, list[Point]]:
    """Lines of one kind of call: every rank gets all rows."""
    rows = [r for r in data["cases"] if r["hidden_size"] == HIDDEN_SIZE and r["us"] and r["section"] in ("decode", "large")]
    whole = [r for r in rows if r.get("norm") and not r["keep_norm"] and not r.get("operation")]

    def line(names: Sequence[str], format: str) -> list[Point]:
        best: dict[int, Row] = {}
        for r in whole:
            if r["what"] in names and r["format"] == format and r["us"] < best.get(r["tokens"], {"us": float("inf")})["us"]:
                best[r["tokens"]] = r
        return [Point(t, r["us"], r["us"], r["us"]) for t, r in sorted(best.items())]

    floors = {r["tokens"]: r["floor_us"] for r in whole if r["what"] == "collogue" and r["format"] == "none"}
    series = {
        "NCCL + compiled norm": line([NCCL + COMPILED], "none"),
        "symmetric memory + compiled norm": line([ONE_SHOT + COMPILED, TWO_SHOT + COMPILED], "none"),
        "NCCL all-reduce alone": [Point(r["tokens"], r["us"], r["us"], r["us"]) for r in rows if r["what"] == NCCL],
        "Collogue, NVFP4": line(["collogue"], "nvfp4/128x4"),
        "Collogue, norm": line(["collogue"], "none"),
        "lower bound (norm)": [Point(t, us, us, us) for t, us in floors.items()],
    }
    return {name: points for name, points in series.items() if points}


if __name__ == "__main__":
    results, out = map(Path, sys.argv[1:])
    out.write_text(figure(json.loads(results.read_text(encoding="utf-8"))), encoding="utf-8")
