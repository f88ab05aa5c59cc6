"""Walking a traced graph of ATen operators by structure: what a value is called after views and conversions, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten, prims = torch.ops.aten, torch.ops.prims

_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.copy.default,
}
_CASTS = {aten._to_copy.default, prims.convert_element_type.default}
#: Conversions that keep what they convert recognizable.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def value(node: object) -> torch.Tensor | None:
    """The fake tensor that stands for a node's value; ``None`` for everything that is not a tensor."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def short(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def equal(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal. Adds no guard."""
    return a is b or bool(statically_known_true(a == b))


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two shapes are known to be equal."""
    return len(a.shape) == len(b.shape) and all(map(equal, a.shape, b.shape))


def source(node: Node) -> Node | None:
    """What a view or conversion reads; ``None`` where the node is neither, or changes how elements lie in rows."""
    if node.op != "call_function" or node.target not in _VIEWS | _CASTS:
        return None
    before = node.args[1] if node.target is aten.copy.default else node.args[0]
    old, new = value(before), value(node)
    if not isinstance(before, Node) or old is None or new is None or old.device != new.device:
        return None
    if not ({old.dtype, new.dtype} <= set(FLOATS) and equal(old.numel(), new.numel())):
        return None
    # Rows stay rows. A statistic has one number a row, in whatever shape.
    rows = not old.ndim or not new.ndim or equal(old.shape[-1], new.shape[-1])
    return before if rows or is_column(old) or is_column(new) else None


def is_column(tensor: torch.Tensor) -> bool:
    """Whether each row has one number."""
    return tensor.ndim > 0 and equal(tensor.shape[-1], 1)


def root(node: object) -> Any:
    """The node behind all views and conversions. What is not a node stays what it is."""
    while isinstance(node, Node):
        before = source(node)
        if before is None:
            break
        node = before
    return node


def rounded(what: str, node: object) -> list[str]:
    """The conversions from the :func:`root` of ``node`` to ``node`` that round, as the report names them."""
    if not isinstance(node, Node):
        return []
    before = source(node)
    old, new = value(before), value(node)
    if before is None or old is None or new is None:
        return []
    narrows = torch.promote_types(old.dtype, new.dtype) != new.dtype
    return [*rounded(what, before), *([f"{what} to {short(new.dtype)}"] if narrows else [])]


def readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """``(reader, operand)`` of everything that reads ``node``, also through views and conversions, which are not listed themselves."""
    for user in list(node.users):
        if source(user) is node:
            yield from readers(user)
        else:
            yield user, node


def names(node: Node) -> Iterator[Node]:
    """``node`` and all views and conversions of it."""
    yield node
    for user in list(node.users):
        if source(user) is node:
            yield from names(user)


def other_operand(node: Node, operand: Node) -> Any:
    """The second operand of a commutative operator."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def number(value_or_node: object) -> float | None:
    """A Python number, or the one that a constant node holds."""
    if isinstance(value_or_node, int | float) and not isinstance(value_or_node, bool):
        return float(value_or_node)
    behind = root(value_or_node)
    if isinstance(behind, Node) and behind.target is aten.full.default and isinstance(behind.args[1], int | float):
        return float(behind.args[1])
    return None


def is_sum(node: Node) -> bool:
    """``a + b`` without a factor."""
    return node.target in (aten.add.Tensor, aten.add.Scalar) and not node.kwargs and len(node.args) == 2


def is_product(node: Node) -> bool:
    """``a * b``."""
    return node.target in (aten.mul.Tensor, aten.mul.Scalar)


def is_quotient(node: Node) -> bool:
    """``a / b``, not rounded to integers."""
    return node.target in (aten.div.Tensor, aten.div.Scalar) and not node.kwargs


def reciprocal_of(node: object) -> Any:
    """``x`` where ``node`` is ``1 / x``, else ``None``."""
    node = root(node)
    if not isinstance(node, Node):
        return None
    if is_product(node) and number(node.args[1]) == 1.0:
        return reciprocal_of(node.args[0])
    if node.target is aten.reciprocal.default:
        return node.args[0]
    if is_quotient(node) and number(node.args[0]) == 1.0:
        return node.args[1]
    return None


def along_rows(node: Node) -> bool:
    """Whether a reduction's ``dim`` is the last dimension alone."""
    operand = value(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else None
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return operand is not None and len(dims) == 1 and dims[0] in (-1, operand.ndim - 1)
