"""Recognizing an RMSNorm: PyTorch's own operator, or any written-out form.

``n = x * rsqrt(mean(x**2) + eps) * weight``, with the conversions to and from float32 wherever the model has them, a square written
as power, square or product, a root as ``rsqrt`` or ``1 / sqrt``, and ``1 + weight`` for Gemma.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from collogue.pytorch.fusion.graph import (
    along_rows,
    aten,
    equal,
    is_column,
    is_product,
    is_sum,
    names,
    number,
    other_operand,
    readers,
    reciprocal_of,
    root,
    rounded,
    same_shape,
    short,
    source,
    value,
)


@dataclass(frozen=True)
class Norm:
    """A norm found in a graph.

    ``results`` are the nodes that hold it in the stream's dtype, if any does; ``product`` is the last product, which may be wider.
    """

    results: tuple[Node, ...]
    product: Node
    weight: Node
    eps: float
    weight_offset: float
    roundings: tuple[str, ...]


def find_norm(stream: Node, why: list[str]) -> Norm | None:
    """The first RMSNorm over the rows of ``stream``. What comes close and is not one of ours leaves its reason in ``why``."""
    for reader, operand in readers(stream):
        if reader.target in (aten._fused_rms_norm.default, aten.rms_norm.default):
            found = _operator(stream, reader, why)
        elif _is_square(reader, operand):
            found = next(_written_out(stream, reader, why), None)
        else:
            continue
        if found is not None:
            return found
    return None


def _operator(stream: Node, node: Node, why: list[str]) -> Norm | None:
    _, shape, weight, eps = (*node.args, None, None)[:4]
    rows, dtype = value(stream), value(node.args[0])
    assert rows is not None
    if not isinstance(shape, list | tuple) or len(shape) != 1 or dtype is None or dtype.dtype != rows.dtype:
        why.append("the norm spans more than the last dimension, or works on a converted stream")
    elif not isinstance(weight, Node):
        why.append("the norm has no weight")
    elif not isinstance(eps, float | int):
        why.append("the norm's eps is not given; pass eps= to RMSNorm")
    elif node.target is aten.rms_norm.default:
        return Norm((node,), node, weight, float(eps), 0.0, ())
    else:
        results = tuple(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)
        if results:
            return Norm(results, results[0], weight, float(eps), 0.0, ())
    return None


def _is_square(node: Node, operand: Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return number(node.args[1]) == 2.0
    if node.target is aten.mul.Tensor:
        return root(node.args[0]) is root(node.args[1])
    return node.target is aten.square.default


def _written_out(stream: Node, square: Node, why: list[str]) -> Iterator[Norm]:
    squared = value(square)
    for mean, _ in readers(square):
        if mean.target is not aten.mean.dim or not along_rows(mean):
            continue
        if squared is not None and squared.dtype != torch.float32:
            why.append(f"the mean square is taken in {short(squared.dtype)}, not in float32")
            continue
        for plus, operand in readers(mean):
            eps = number(other_operand(plus, operand)) if is_sum(plus) else None
            if eps is None:
                why.append("eps is not a constant of the graph")
                continue
            for rstd in _roots(plus):
                yield from _scaled(stream, rstd, eps, why)


def _roots(plus: Node) -> Iterator[Node]:
    """``1 / sqrt(plus)`` in all its forms."""
    for node, _ in readers(plus):
        if node.target is aten.rsqrt.default or (node.target is aten.pow.Tensor_Scalar and node.args[1] == -0.5):
            yield node
        elif node.target is aten.sqrt.default:
            for inverse, _ in readers(node):
                if root(reciprocal_of(inverse)) is node:
                    yield inverse
                    # ATen writes `1.0 / x` as `reciprocal(x) * 1.0`.
                    yield from (user for user, _ in readers(inverse) if root(reciprocal_of(user)) is node)


def _scaled(stream: Node, rstd: Node, eps: float, why: list[str]) -> Iterator[Norm]:
    for scaled, operand in readers(rstd):
        if not is_product(scaled) or root(other_operand(scaled, operand)) is not root(stream):
            continue
        rows, column, result = value(other_operand(scaled, operand)), value(operand), value(scaled)
        one_by_one = rows is not None and column is not None and result is not None and is_column(column) and same_shape(rows, result)
        if not one_by_one or _dtype(scaled) != torch.float32:
            why.append("y * rstd is not taken row by row in float32")
            continue
        roundings = [*rounded("y", other_operand(scaled, operand)), *rounded("rstd", operand)]
        unweighted = True
        for product, factor in readers(scaled):
            if is_product(product):
                unweighted = False
                found = _weighted(stream, product, factor, eps, why)
                if found is not None:
                    yield replace(found, roundings=(*roundings, *found.roundings))
        if unweighted:
            why.append("the norm has no weight")


def _weighted(stream: Node, product: Node, factor: Node, eps: float, why: list[str]) -> Norm | None:
    rows, result = value(stream), value(product)
    weight = _weight(other_operand(product, factor), rows)
    if weight is None or rows is None or result is None or not equal(result.numel(), rows.numel()):
        why.append("y * rstd is multiplied by something that is not a weight of [H]")
        return None
    node, offset, roundings = weight
    roundings = [*(f"{rounding} before the weight" for rounding in rounded("y * rstd", factor)), *roundings]
    if result.dtype == rows.dtype:
        return Norm((product,), product, node, eps, offset, tuple(roundings))
    results = [name for name in names(product) if _dtype(name) == rows.dtype and _dtype(source(name)) == result.dtype]
    return Norm(tuple(results), product, node, eps, offset, tuple(roundings))


def _weight(operand: object, rows: torch.Tensor | None) -> tuple[Node, float, list[str]] | None:
    """The weight vector behind an operand, and the offset that is added to it."""
    taken, node, offset, roundings = value(operand), root(operand), 0.0, list[str]()
    if isinstance(node, Node) and is_sum(node):
        first, second = node.args
        plus = number(second) if number(second) is not None else number(first)
        summed = value(node)
        if plus is None or summed is None:
            return None
        roundings = rounded(f"weight + {plus:g}", operand)
        if summed.dtype != torch.float32:
            roundings.append(f"weight + {plus:g} to {short(summed.dtype)}")
        operand, offset = first if number(second) is not None else second, plus
        node = root(operand)
    held = value(node)
    if held is None or taken is None or rows is None or held.ndim == 0 or taken.ndim == 0:
        return None
    along = all(equal(size, rows.shape[-1]) for size in (taken.shape[-1], held.shape[-1], held.numel()))
    if not along or held.dtype not in (rows.dtype, torch.float32):
        return None
    return node, offset, [*rounded("weight", operand), *roundings]


def _dtype(node: object) -> torch.dtype | None:
    found = value(node)
    return None if found is None else found.dtype
