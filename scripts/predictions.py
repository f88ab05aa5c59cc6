"""What :data:`collogue.planning.model.MODEL` was fitted to and tested with: ``python scripts/predictions.py``.

Rows are the graph latencies of Collogue on two H200 in the committed results. They are sorted by a hash of what was called; the first
half is fitted, the other half only compared. The same call in two files has one hash, so hardly one is on both sides.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from collogue.contract.quant import parse
from collogue.planning.explain import Machine, explain
from collogue.planning.gpus import GPUS
from collogue.planning.model import Model, fit, has_amax

RESULTS = Path("benchmarks/results")
SOURCES = ("latency-2xh200.json", "suites-2xh200.json")
RESULT = "predictions-2xh200.json"
_CALL = ("operation", "algorithm", "tokens", "hidden_size", "dtype", "format", "residual", "norm", "keep_norm", "weight_dtype")

#: Tokens of the examples.
EXAMPLES = (1, 64, 1024, 8192)

Row = dict[str, Any]


def rows(folder: Path) -> list[Row]:
    """Every graph latency of Collogue, in the order of its hash. Eager calls are not among them: they are as long as the host takes."""
    found = []
    for source in SOURCES:
        for case in json.loads((folder / source).read_text(encoding="utf-8"))["cases"]:
            if case["what"] == "collogue" and case["section"] != "eager" and case["us"] is not None:
                found.append(
                    {"source": source, "section": case["section"], **{name: case.get(name) for name in (*_CALL, "bytes_sent", "us")}}
                )
    return sorted(found, key=_hash)


def _hash(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(" ".join(str(row[name]) for name in _CALL).encode()).hexdigest()


def compared(model: Model, some: Iterable[Row]) -> list[Row]:
    """``some``, each with the prediction and its relative error."""
    return [{**row, "predicted_us": round(us, 3), "error": round(us / row["us"] - 1, 4)} for row in some for us in [_us(model, row)]]


def _us(model: Model, row: Row) -> float:
    amax = has_amax(parse(row["format"]))
    return model.us(GPUS["H200"], row["algorithm"], row["bytes_sent"], norm=row["norm"], amax=amax)[0]


def made(folder: Path) -> dict[str, Any]:
    """The content of :data:`RESULT`."""
    floors = [json.loads((folder / source).read_text(encoding="utf-8")) for source in SOURCES]
    words = [case for data in floors for case in data["cases"] if case["what"] == "one-word exchange" and case["section"] != "eager"]
    exchange = [case["us"] for case in words]
    wire = [row["bytes_sent"] / row["us"] for data in floors for row in data["wire"]]
    every = rows(folder)
    half = len(every) // 2
    model = fit(every[:half], statistics.median(exchange), statistics.median(wire))
    return {
        "what": "graph latencies of Collogue on two H200, predicted: the model is fitted to half of them and tested with the other half",
        "sources": list(SOURCES),
        "model": asdict(model),
        "fit": compared(model, every[:half]),
        "test": compared(model, every[half:]),
        "gpus": [asdict(gpu) for gpu in GPUS.values()],
        "examples": [_example(name, tokens) for name in GPUS for tokens in EXAMPLES],
    }


def _example(gpu: str, tokens: int) -> Row:
    """Predicted: an all-reduce with residual and norm on eight GPUs."""
    plan = explain(Machine.with_gpu(gpu), tokens, hidden_size=7168, world_size=8, max_tokens=max(EXAMPLES), table=False).plan
    return {"gpu": gpu, "tokens": tokens, "algorithm": plan.algorithm, "predicted_us": round(plan.predicted_us, 2)}


def main() -> None:
    """Write the file."""
    lines = json.dumps(made(RESULTS), indent=1)
    (RESULTS / RESULT).write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
