"""The whole of ``collogue accuracy``: which passes are run, and their results as data and as tables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import torch

from collogue.contract.quant import Quant, parse
from collogue.errors import FormatError
from collogue.pytorch.recipes import RECIPES
from collogue.tools.accuracy import layers as quantized_layers
from collogue.tools.accuracy.measure import Score, clipped, forward, score, sqnr
from collogue.tools.accuracy.models import Model
from collogue.tools.accuracy.orders import ORDERS, WIRES, contract
from collogue.tools.demo.formats import FORMATS, quants_for

Row: TypeAlias = dict[str, Any]

#: The static scale as a multiple of the calibrated one (as a divisor): below 1 saturates more, above 1 leaves range unused.
FACTORS = (0.25, 0.5, 1.0, 2.0, 16.0, 256.0)
STATIC = ("fp8_static", "nvfp4")
METHOD = (
    "Teacher-forced passes over the text. expected: the unsharded model, float32 throughout, unquantized. All other passes: weights "
    "and activations rounded to the dtype, matrix products accumulated in float32 and rounded to the dtype, logits in float32; the "
    "ranks' terms added in the named order (terms as F: quantized to F and decoded before they are added), "
    "then the residual, norm and quantization by the numerical contract. A quantized norm is "
    "decoded, rounded to the dtype and read by the next projections; the last fused call, before the vocabulary projection, stays "
    "unquantized. logit_rms and logit_max are of differences less their row's mean; agreement is the share of positions with the same "
    "largest logit. sqnr_db: 10 log10(sum n^2 / sum (n - decoded)^2) of each fused call's norm in the unquantized pass. Static scales "
    "come from other text. quantized_layers: the transformers model through collogue.parallelize(quant=..) on one rank: weights and "
    "inputs of all linear layers inside decoder layers are quantized, and multiplied by the device's product or decoded."
)


def passes(formats: Sequence[str], static: Sequence[str]) -> int:
    """How many forward passes :func:`run` makes: what a progress bar counts to."""
    under_orders = ["none", *_four_bit(formats)]
    others = [name for name in formats if name not in under_orders]
    return (
        5
        + len(WIRES)
        + len(RECIPES)
        + len(ORDERS) * len(under_orders)
        + len(others)
        + sum(len(FACTORS) - (name in formats) for name in static)
    )


def run(
    model: Model,
    *,
    world_size: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    formats: Sequence[str] = FORMATS,
    static: Sequence[str] = STATIC,
    device: str = "cpu",
    started: Callable[[str], None] = lambda name: None,
) -> Row:
    """Measure ``model``: every order of accumulation, every format, the orders again under the first 4-bit format, and static scales.

    Args:
        world_size: virtual ranks; sharded sizes of the model must divide by it.
        formats: as :func:`collogue.contract.quant.parse` reads them.
        static: formats with a static scale whose choice is swept over :data:`FACTORS`.
        started: hears the name of each pass.
    Returns:
        ``orders``, ``formats``, ``layers``, ``static_scales`` and ``quantized_layers``: lists of rows; ``seconds``.
    """
    for name in {*formats, *static}:
        parse(name)
    if not set(static) <= set(STATIC):
        raise FormatError(f"{', '.join(static)}: not all have a static scale", hint=f"choose from {', '.join(STATIC)}")
    model.shape.check_world_size(world_size)
    start = time.perf_counter()
    calls = model.shape.fused_calls

    def logits(world: int, order: str, quants: Sequence[Quant | None] | None = None, dtype: torch.dtype = dtype) -> torch.Tensor:
        found = forward(model, model.tokens, world_size=world, dtype=dtype, order=(ORDERS | WIRES)[order], quants=quants, device=device)
        return found.logits

    started("expected: float32, unsharded")
    expected = logits(1, "contract", dtype=torch.float32)

    def scored(world: int, order: str, quants: Sequence[Quant | None] | None = None) -> Row:
        return asdict(score(logits(world, order, quants), expected, model.tokens))

    started("calibration")
    seen = forward(model, model.calibration, world_size=world_size, dtype=dtype, order=contract, keep_norms=True, device=device)
    amax = [float(norm.float().abs().max()) for norm in seen.norms]
    started("norms")
    norms = forward(model, model.tokens, world_size=world_size, dtype=dtype, order=contract, keep_norms=True, device=device).norms

    orders = []
    started("unsharded")
    orders.append({"order": "contract", "world_size": 1, "format": "none", **scored(1, "contract")})
    for format in ("none", *_four_bit(formats)):
        for order in ORDERS:
            started(f"{order}, {format}")
            quants = quants_for(format, amax)
            orders.append({"order": order, "world_size": world_size, "format": format, **scored(world_size, order, quants)})

    for order in WIRES:
        started(order)
        orders.append({"order": order, "world_size": world_size, "format": "none", **scored(world_size, order)})

    def reuse(format: str) -> Row:
        """The contract's pass of ``format``, made once."""
        known = [row for row in orders if (row["order"], row["world_size"], row["format"]) == ("contract", world_size, format)]
        if known:
            return {name: known[0][name] for name in asdict(Score(0, 0, 0, 0, 0))}
        started(format)
        return scored(world_size, "contract", quants_for(format, amax))

    by_format = [{"format": name, **reuse(name)} for name in formats]
    layers = [row for name in formats if name != "none" for row in _layers(name, norms, amax)]
    done = {row["format"]: {k: v for k, v in row.items() if k != "format"} for row in by_format}
    static_scales = []
    for name in static:
        for factor in FACTORS:
            scaled = [value * factor for value in amax]
            row = done[name] if factor == 1.0 and name in done else None
            if row is None:
                started(f"{name}, scale x {factor:g}")
                row = scored(world_size, "contract", quants_for(name, scaled))
            static_scales.append({"format": name, "factor": factor, **row, **_static_error(name, norms, scaled)})
    return {
        "method": METHOD,
        "model": model.name,
        "world_size": world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": len(model.tokens),
        "calibration_tokens": len(model.calibration),
        "fused_calls": calls,
        "expected_perplexity": score(expected, expected, model.tokens).perplexity,
        "orders": orders,
        "formats": by_format,
        "layers": layers,
        "static_scales": static_scales,
        "quantized_layers": quantized_layers.run(model, expected, dtype=dtype, started=started),
        "seconds": time.perf_counter() - start,
    }


def _four_bit(formats: Sequence[str]) -> list[str]:
    """The first format of four bits, if there is one: orders of accumulation are also compared under it."""
    quants = [(name, parse(name)) for name in formats]
    return [name for name, quant in quants if quant is not None and quant.element == "e2m1"][:1]


def _layers(format: str, norms: Sequence[torch.Tensor], amax: Sequence[float]) -> list[Row]:
    """The error of ``format`` on the norm of every quantized fused call. Call 0 follows the embedding, then two a layer."""
    rows = []
    for call, (norm, quant) in enumerate(zip(norms, quants_for(format, amax), strict=True)):
        if quant is not None:
            rows.append(
                {
                    "format": format,
                    "call": call,
                    "layer": call // 2,
                    "read_by": "mlp" if call % 2 else "attention",
                    "sqnr_db": _finite(sqnr(norm, quant)),
                    "amax": float(norm.float().abs().max()),
                    "calibrated_amax": amax[call],
                }
            )
    return rows


def _static_error(format: str, norms: Sequence[torch.Tensor], amax: Sequence[float]) -> Row:
    """Mean and worst SQNR over the quantized calls, and the share of elements above the largest value that the scale stands for."""
    quants = quants_for(format, amax)
    pairs = [(norm, quant, largest) for norm, quant, largest in zip(norms, quants, amax, strict=True) if quant is not None]
    each = [sqnr(norm, quant) for norm, quant, _ in pairs]
    shares = [clipped(norm, largest) for norm, _, largest in pairs]
    return {"sqnr_mean_db": _finite(sum(each) / len(each)), "sqnr_worst_db": _finite(min(each)), "clipped": sum(shares) / len(shares)}


def _finite(value: float) -> float | None:
    """JSON has no infinity: ``None`` is a format without error."""
    return value if math.isfinite(value) else None


def text(data: Row) -> str:
    """The results as tables."""
    lines = [
        f"{data['model']}, world {data['world_size']}, {data['dtype']}, {data['tokens']} tokens; "
        f"expected perplexity {data['expected_perplexity']:.4f} (float32, unsharded)",
        "",
    ]
    head = ["perplexity", "difference", "std. error", "logit rms", "logit max", "agreement"]

    def numbers(row: Row) -> list[str]:
        cells = [f"{row['perplexity']:.4f}", f"{row['perplexity'] - data['expected_perplexity']:+.4f}", f"{row['standard_error']:.4f}"]
        return [*cells, f"{row['logit_rms']:.4f}", f"{row['logit_max']:.3f}", f"{100 * row['agreement']:.2f} %"]

    lines += aligned(
        [
            ["order of accumulation", "ranks", "format", *head],
            *([row["order"], str(row["world_size"]), row["format"], *numbers(row)] for row in data["orders"]),
        ]
    )
    lines += ["", *aligned([["format", *head], *([row["format"], *numbers(row)] for row in data["formats"])]), ""]
    lines += aligned(_layer_table(data["layers"])) if data["layers"] else []
    if data["static_scales"]:
        table = [["static scale of", "x calibrated", *head, "mean dB", "worst dB", "above range"]]
        for row in data["static_scales"]:
            errors = [_decibel(row["sqnr_mean_db"]), _decibel(row["sqnr_worst_db"]), f"{100 * row['clipped']:.3f} %"]
            table.append([row["format"], f"{row['factor']:g}", *numbers(row), *errors])
        lines += ["", *aligned(table)]
    if not data["quantized_layers"]:
        return "\n".join([*lines, "", "parallelize(quant=): not measured, transformers is not installed"]) + "\n"
    rows = [[row["quant"], *(numbers(row) if "error" not in row else [row["error"]])] for row in data["quantized_layers"]]
    lines += ["", *aligned([["parallelize(quant=)", *head], *(row for row in rows if len(row) > 2)])]
    lines += [f"{row[0]}: {row[1]}" for row in rows if len(row) == 2]
    return "\n".join(lines) + "\n"


def _layer_table(rows: Sequence[Row]) -> list[list[str]]:
    """SQNR in decibels: layers by formats, both norms of a layer in a cell."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    table = [["SQNR (dB), layer: attention / mlp", *formats]]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = []
        for name in formats:
            mine = [row for row in rows if row["layer"] == layer and row["format"] == name]
            cells.append(" / ".join(_decibel(row["sqnr_db"]) for row in mine))
        table.append([str(layer), *cells])
    return table


def _decibel(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text whose columns stand under each other; the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in table]
