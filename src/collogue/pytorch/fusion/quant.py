"""Recognizing FP8 quantization as models write it: static with a given scale, or per token.

Static: ``clamp(n / s, -448, 448)`` or ``clamp(n * (1 / s), ..)``, converted to float8_e4m3fn; s is a constant
or a float32 tensor of one element.
Per token: ``s = max(amax(|n|) / 448, smallest)``, ``n / s`` converted to float8_e4m3fn.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from collogue.contract.quant import E4M3_MAX
from collogue.pytorch.fusion.graph import (
    along_rows,
    aten,
    equal,
    is_column,
    is_product,
    is_quotient,
    number,
    other_operand,
    readers,
    reciprocal_of,
    root,
    rounded,
    short,
    value,
)
from collogue.pytorch.fusion.norm import Norm


@dataclass(frozen=True)
class Quantized:
    """A quantization found behind a norm.

    Per token: ``scales`` is the node of the scales and ``smallest`` their lower bound. Static: ``divisor`` is a number or a node;
    ``inverted`` says that the graph has only its reciprocal.
    """

    codes: Node
    scales: Node | None = None
    smallest: float = 0.0
    divisor: Node | float | None = None
    inverted: bool = False
    roundings: tuple[str, ...] = ()


def find_quant(norm: Norm, why: list[str]) -> Quantized | None:
    """The first FP8 quantization of ``norm``."""
    starts = dict.fromkeys((*norm.results, norm.product))
    for start in starts:
        for scaled, operand in readers(start):
            if not (is_product(scaled) or (is_quotient(scaled) and scaled.args[0] is operand)):
                continue
            for codes, bounded in _codes(scaled, -torch.inf, torch.inf):
                found = _scale(scaled, operand, codes, bounded, {root(s) for s in starts}, why)
                if found is not None:
                    return found
    return None


def _codes(node: Node, low: float, high: float) -> Iterator[tuple[Node, bool]]:
    """Conversions to E4M3 behind ``node``, and whether the value was clamped to its range before."""
    for reader, _ in readers(node):
        bounds = _bounds(reader)
        converted = value(reader)
        if bounds is not None:
            yield from _codes(reader, max(low, bounds[0]), min(high, bounds[1]))
        elif converted is not None and converted.dtype == torch.float8_e4m3fn and len(reader.all_input_nodes) == 1:
            yield reader, (low, high) == (-E4M3_MAX, E4M3_MAX)


def _bounds(node: Node) -> tuple[float, float] | None:
    """Lower and upper bound of a clamp."""
    if node.target is aten.clamp.default:
        low, high = (*node.args[1:], None, None)[:2]
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    elif node.target is aten.clamp_min.default:
        low, high = node.args[1], None
    elif node.target is aten.clamp_max.default:
        low, high = None, node.args[1]
    elif node.target is aten.maximum.default:
        low, high = number(node.args[1]), None
        if low is None:
            return None
    else:
        return None
    return (-torch.inf if low is None else float(low), torch.inf if high is None else float(high))  # type: ignore[arg-type]


def _scale(scaled: Node, operand: Node, codes: Node, bounded: bool, normed: set[Node], why: list[str]) -> Quantized | None:
    divides = is_quotient(scaled)
    factor = scaled.args[1] if divides else other_operand(scaled, operand)
    behind = None if divides else reciprocal_of(factor)
    divisor = factor if divides else behind
    roundings = rounded("scale", divisor) if divides else [*rounded("scale", behind), *rounded("1 / scale", factor)]
    computed = value(scaled)
    if computed is not None and computed.dtype != torch.float32:
        roundings.append(f"n / scale to {short(computed.dtype)}")
    constant = number(factor)
    if constant is not None:
        if not bounded:
            why.append("FP8 codes without a clamp to +-448: what overflows would be NaN")
            return None
        if divides:
            roundings.append("n / scale becomes n * (1 / scale)")
        return Quantized(codes, divisor=constant if divides else 1.0 / constant, roundings=tuple(roundings))
    held = value(factor)
    if held is None:
        return None
    of_rows: list[str] = []
    if divisor is not None:  # first: one row has one scale, too
        turned = [] if divides else ["n * (1 / scale) becomes n / scale"]
        found = _per_token(root(divisor), held, codes, normed, [*roundings, *turned], of_rows)
        if found is not None:
            return found
    if not equal(held.numel(), 1):
        why += of_rows
        return None
    if not bounded:
        why.append("FP8 codes without a clamp to +-448: what overflows would be NaN")
        return None
    node = root(divisor if divisor is not None else factor)
    holds = value(node)
    if holds is None or holds.dtype != torch.float32 or holds.device != computed.device:  # type: ignore[union-attr]
        why.append("the FP8 scale is not a float32 tensor beside the norm")
        return None
    if divides:
        roundings.append("n / scale becomes n * (1 / scale)")
    return Quantized(codes, divisor=node, inverted=divisor is None, roundings=tuple(roundings))


def _per_token(
    scales: Node, factor: torch.Tensor, codes: Node, normed: set[Node], roundings: list[str], why: list[str]
) -> Quantized | None:
    """Walk back from the scales, which multiply or divide as ``factor``, to the amax: ``scale = max(gain * amax, smallest)``."""
    held = value(scales)
    if held is None or held.dtype != torch.float32:
        why.append("the FP8 scales are not float32")
        return None
    node, gain, smallest, exact = scales, 1.0, 0.0, True
    while True:
        bounds = _bounds(node)
        if bounds is not None and bounds[1] == torch.inf:
            smallest = max(smallest, bounds[0] * gain)
            exact = exact and gain == 1.0
        elif is_quotient(node) and number(node.args[1]):
            gain /= number(node.args[1])  # type: ignore[operator]
        elif is_product(node) and number(node.args[1]):
            gain *= number(node.args[1])  # type: ignore[operator]
            exact = False
        else:
            break
        node = root(node.args[0])
        if not isinstance(node, Node):
            return None
    if not is_column(factor) or _amax_of(node) not in normed or abs(gain * E4M3_MAX - 1.0) > 1e-6:
        why.append("the FP8 scales are not amax / 448 of the norm's rows")
        return None
    if not 2.0**-126 <= smallest <= 1.0:
        why.append("the FP8 scales have no lower bound: a row of zeros would give NaN")
        return None
    if not exact:
        roundings = [*roundings, "amax / 448 and its lower bound in another order of operations"]
    return Quantized(codes, scales=scales, smallest=smallest, roundings=tuple(roundings))


def _amax_of(node: Node) -> object:
    """What ``node`` is the largest absolute value of, along rows."""
    if node.target is operator.getitem and node.args[1] == 0 and isinstance(node.args[0], Node):
        node = node.args[0]
        if node.target is not aten.max.dim:
            return None
    elif node.target is not aten.amax.default:
        return None
    magnitudes = root(node.args[0])
    if not along_rows(node) or not isinstance(magnitudes, Node) or magnitudes.target is not aten.abs.default:
        return None
    return root(magnitudes.args[0])
