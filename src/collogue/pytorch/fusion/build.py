"""New nodes of a graph, with their fake values."""

from __future__ import annotations

import operator
from typing import Any

from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg


def call_operator(graph: Graph, target: Any, *args: Any) -> Node:
    """A call of ``target`` where the graph inserts now."""
    node = graph.call_function(target, args)
    values = map_arg(args, lambda n: n.meta["val"])
    mode = detect_fake_mode(values)
    assert mode is not None
    with mode:
        node.meta["val"] = target(*values)
    return node


def item(graph: Graph, call: Node, index: int) -> Any:
    """Element ``index`` of an operator's list."""
    node = graph.call_function(operator.getitem, (call, index))
    node.meta["val"] = call.meta["val"][index]
    return node
