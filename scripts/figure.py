"""The headline figure as a file: time against tokens, from the results of ``collogue bench``.

``python scripts/figure.py RESULTS.json FIGURE.svg``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collogue.tools.bench.cases import COMPILED, HIDDEN_SIZE, NCCL, ONE_SHOT, TWO_SHOT
from collogue.tools.bench.plot import Point, line_chart

Row = dict[str, Any]

_STYLE = (
    "<style>svg { font: 12px system-ui, sans-serif; background: #fff; } .title { font-weight: 600; font-size: 14px; } "
    ".grid { stroke: #e4e4e4; } .axis { stroke: #555; }</style>"
)


def figure(data: Row) -> str:
    """An SVG: Collogue's calls, other libraries' chains, and the floor of the replicated call."""
    rows = [r for r in data["cases"] if r["hidden_size"] == HIDDEN_SIZE and r["us"] and r["section"] in ("decode", "large")]
    whole = [r for r in rows if r.get("norm") and not r["keep_norm"]]

    def line(names: Sequence[str], format: str, operation: str | None = None) -> list[Point]:
        best: dict[int, Row] = {}
        for r in whole:
            mine = r["what"] in names and r["format"] == format and r.get("operation") == operation
            if mine and r["us"] < best.get(r["tokens"], {"us": float("inf")})["us"]:
                best[r["tokens"]] = r
        return [Point(t, r["us"], r["us"], r["us"]) for t, r in sorted(best.items())]

    floors = {r["tokens"]: r["floor_us"] for r in whole if r["what"] == "collogue" and r["format"] == "none" and not r.get("operation")}
    series = {
        "Collogue, replicated, norm": line(["collogue"], "none"),
        "Collogue, sharded, FP8 per token": line(["collogue"], "fp8_per_token", "sharded"),
        "Collogue, sharded, NVFP4": line(["collogue"], "nvfp4/128x4", "sharded"),
        "NCCL, then compiled norm": line([NCCL + COMPILED], "none"),
        "torch symmetric memory, then compiled norm": line([ONE_SHOT + COMPILED, TWO_SHOT + COMPILED], "none"),
        "NCCL all-reduce alone": [Point(r["tokens"], r["us"], r["us"], r["us"]) for r in rows if r["what"] == NCCL],
        "floor of the replicated call": [Point(t, us, us, us) for t, us in floors.items()],
    }
    gpus = data["machine"]["gpus"]
    title = f"All-reduce + residual + RMSNorm (+ quantization), {len(gpus)} x {gpus[0]}, H = {HIDDEN_SIZE}, bfloat16"
    drawn = line_chart(title, "tokens", "microseconds per call", {name: points for name, points in series.items() if points})
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">\n", f">\n{_STYLE}\n", 1) + "\n"


if __name__ == "__main__":
    results, out = map(Path, sys.argv[1:])
    out.write_text(figure(json.loads(results.read_text(encoding="utf-8"))), encoding="utf-8")
