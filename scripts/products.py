"""Products of quantized layers, timed beside each other on one GPU: ``products.py OUT.json``, about half a minute.

The four products of a layer of Llama-3.1-8B, by the calls that ``collogue.nn.ScaledLinear`` makes; codes are given, so nothing is
quantized. ``row_wise`` is PyTorch's product with per-token scales, ``scaled`` the one with scales of 1 and a kernel that scales its
float32 result: ``collogue.pytorch.products.FEW_ROWS`` says up to how many rows a layer takes that way. ``block_row`` and
``block_column``: blocks of 128 x 128, scales of the activations row by row and column by column. Calls lie in CUDA graphs, with so many
weights in turn that none stays in a cache; the ways are replayed in turn, and a time is the median over replays, in microseconds for one
product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import collogue
from collogue.nn import FP8Block, QuantizedWeight, ScaledLinear
from collogue.pytorch import products
from collogue.tools.record import circumstances

#: Output and input features.
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 8, 16, 32, 64, 128, 256, 1024)
#: Bytes of FP8 weights that go by before the first is read again.
APART = 256 << 20
#: The formats of weights and inputs, and whether few rows are scaled by a kernel.
WAYS: dict[str, tuple[Any, collogue.Quant, bool]] = {
    "tensor_wise": (collogue.FP8Static(0.001), collogue.FP8Static(0.01), False),
    "row_wise": (collogue.FP8PerToken(), collogue.FP8PerToken(), False),
    "scaled": (collogue.FP8PerToken(), collogue.FP8PerToken(), True),
    "block_row": (FP8Block(128), collogue.FP8Group(128), False),
    "block_column": (FP8Block(128), collogue.FP8Group(128, layout="column"), False),
}


def calls_of(shape: tuple[int, int], rows: int) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """One call for each weight, by way."""
    count = -(-APART // (shape[0] * shape[1]))
    x = torch.randn(rows, shape[1], device="cuda").bfloat16()
    plain = [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(std=0.02) for _ in range(count)]
    calls: dict[str, list[Callable[[], torch.Tensor]]] = {"bfloat16": [partial(torch.nn.functional.linear, x, w) for w in plain]}
    for name, (weight, quant, few) in WAYS.items():
        codes, scales = collogue.quantize(x, quant)
        out = collogue.Output(codes=codes, scales=scales)
        layers = [ScaledLinear(QuantizedWeight.of(each, weight), activation=quant) for each in plain]

        def call(layer: ScaledLinear, out: collogue.Output = out, few: bool = few) -> torch.Tensor:
            products.FEW_ROWS = rows if few else 0
            result: torch.Tensor = layer(out)
            return result

        calls[name] = [partial(call, layer) for layer in layers]
    return calls


def measure(shape: tuple[int, int], rows: int, replays: int) -> dict[str, float | None]:
    """Microseconds of one product, by way; ``None`` where PyTorch refuses it."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    found: dict[str, float | None] = {}
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for name, calls in calls_of(shape, rows).items():
        found[name] = None
        torch.cuda.synchronize()  # weights and codes were made on another stream
        try:
            with torch.cuda.stream(stream):
                for each in calls:
                    each()
        except (RuntimeError, ValueError) as error:
            print(f"{name}, {rows} rows: {error}", file=sys.stderr)
            continue
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for each in calls * 2:
                each()
        graphs[name] = graph, 2 * len(calls)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for replay in range(replays + 2):
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= 2:
                times[name].append(start.elapsed_time(end) * 1e3 / count)
    return found | {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Products of quantized layers, timed beside each other on one GPU.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--replays", type=int, default=11)
    given = parser.parse_args()
    few = products.FEW_ROWS
    us: dict[str, dict[int, dict[str, float | None]]] = {name: {} for name in SHAPES}
    with torch.inference_mode():
        for rows in given.rows:
            for name, shape in SHAPES.items():
                us[name][rows] = row = measure(shape, rows, given.replays)
                shown = "  ".join(f"{way} {'-' if value is None else f'{value:.2f}'}" for way, value in row.items())
                print(f"{rows:5} rows  {name:8} {shown}", flush=True)
            facts = {"shapes": SHAPES, "few_rows": few, "us": us, **circumstances()}
            given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
