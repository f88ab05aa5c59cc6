"""Moving the residual stream of a rewritten graph to its owners: every fused call becomes ``collogue::sharded``.

A rank then keeps only its own rows of the stream, and what is gathered is the norm or its codes. Where a graph reads the whole stream
(at its end, as a rule) it is gathered there; between two fused calls it never is.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from collogue import registry
from collogue.ops import COMMUNICATOR
from collogue.pytorch.fusion.build import call_operator, item
from collogue.pytorch.fusion.graph import aten, root, value
from collogue.pytorch.fusion.report import Report


def shard_streams(graph: Graph, report: Report) -> None:
    """Rewrite every ``collogue::all_reduce`` of ``graph``. Numbers of tokens must be fixed: they say which rows a rank owns."""
    shards: dict[Node, Node] = {}
    calls = [node for node in graph.nodes if node.target is torch.ops.collogue.all_reduce.default]
    for call in calls:
        rows = value(call.args[0])
        comm = registry.find(str(call.args[COMMUNICATOR]))
        if rows is None or not isinstance(rows.shape[0], int) or not comm.fits(rows.shape[0], int(rows.shape[1])):
            report.remarks.append(f"{call}: residual not sharded: the number of tokens is not fixed, or beyond the communicator's")
            continue
        if call.args[2] is None and call.args[5] == "none":
            continue  # no norm behind the residual: the stream stays whole
        _shard(graph, call, rows.shape[0], comm.owned_rows(rows.shape[0]), shards)
    graph.eliminate_dead_code()
    left = sum(node.target is torch.ops.collogue.all_gather.default for node in graph.nodes)
    report.remarks.append(f"residual sharded in {len(shards)} calls, gathered whole {left} times")
    graph.lint()


def _shard(graph: Graph, call: Node, tokens: int, owned: range, shards: dict[Node, Node]) -> None:
    partial, residual, *rest = call.args
    with graph.inserting_before(call):
        mine = shards.get(root(residual)) if isinstance(residual, Node) else None
        if mine is None and isinstance(residual, Node):
            mine = call_operator(graph, aten.slice.Tensor, residual, 0, owned.start, owned.stop)
        sharded = call_operator(graph, torch.ops.collogue.sharded.default, partial, mine, *rest)
        own = item(graph, sharded, 0)
        gathered = call_operator(
            graph, torch.ops.collogue.all_gather.default, None, own, None, None, None, tokens, "none", 0.0, call.args[COMMUNICATOR]
        )
        whole = item(graph, gathered, 0)
    shards[whole] = own
    for user in list(call.users):
        assert user.target is operator.getitem
        if user.args[1] == 0:
            user.replace_all_uses_with(whole)
        else:
            user.args = (sharded, user.args[1])
    graph.eliminate_dead_code()
