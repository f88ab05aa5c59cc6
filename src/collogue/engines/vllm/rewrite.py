"""The rewriting of a graph: an all-reduce and the norm that reads it become one operator."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from collogue.engines.vllm.quantized import Operators, quantization


@dataclass
class Names:
    """The operators of vLLM that are looked for, and what replaces them."""

    all_reduce: Any
    norm: Any
    add_norm: Any
    group: str
    most: int
    quants: Operators = field(default_factory=Operators)


@dataclass
class Rewritten:
    """How many all-reduces of the group there were, how many were fused, and why the others were not."""

    fused: int = 0
    of: int = 0
    quantized: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        why = "; ".join(f"{count} x {reason}" for reason, count in self.reasons.items())
        what = f"{self.fused} of {self.of} all-reduces fused with their norm"
        return what + (f", {self.quantized} with quantization" if self.quantized else "") + (f" (left: {why})" if why else "")


def rewrite(graph: Graph, names: Names, servable: Any) -> Rewritten:
    """Fuse what matches in structure: the sum is read by one norm with a residual and by nothing else, or by a norm without one.

    ``servable(rows, weight)`` says of fake tensors whether the fused call takes them. The graph is changed in place.
    """
    done = Rewritten()
    for node in [node for node in graph.nodes if node.target is names.all_reduce]:
        if _argument(node, 1, "group_name") != names.group:
            continue
        done.of += 1
        reason = _fuse(graph, node, names, servable)
        if reason:
            done.reasons[reason] += 1
        else:
            done.fused += 1
    for node in [node for node in graph.nodes if node.target is torch.ops.collogue_vllm.all_reduce_norm.default]:
        done.quantized += _quantize(graph, node, names)
    if done.fused:
        graph.lint()
    return done


def _argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _fuse(graph: Graph, summed: Node, names: Names, servable: Any) -> str:
    """Fuse one all-reduce. Why not, or nothing."""
    readers = list(summed.users)
    norm = next((user for user in readers if user.target in (names.norm, names.add_norm) and user.args[0] is summed), None)
    if norm is None:
        return "no RMSNorm reads it"
    added = norm.target is names.add_norm
    shift = 1 if added else 0
    residual = norm.args[1] if added else None
    weight, eps = _argument(norm, 1 + shift, "weight"), _argument(norm, 2 + shift, "epsilon")
    if added and (len(readers) > 1 or residual is summed):
        return "more than the norm reads it"
    if not isinstance(weight, Node) or not isinstance(eps, float | int):
        return "the norm has no weight"
    if _argument(norm, 3 + shift, "variance_size") is not None:
        return "the norm is over a part of the row"
    given = [each for each in (summed.args[0], weight, residual) if isinstance(each, Node)]
    values = [value for each in given if isinstance(value := each.meta.get("val"), torch.Tensor)]
    if len(values) != len(given):
        return "its shape is not known"
    rows, vector, *stream = values
    if not servable(rows, vector) or (stream and (stream[0].dtype != rows.dtype or stream[0].ndim != 2)):
        return f"{list(rows.shape)} {rows.dtype} with a weight in {vector.dtype} is not served"
    place = {node: i for i, node in enumerate(graph.nodes)}
    first = min(readers, key=place.__getitem__)
    if any(place[each] >= place[first] for each in (weight, residual) if isinstance(each, Node)):
        return "something reads it before the norm's inputs are there"
    with graph.inserting_before(first):
        call = graph.call_function(
            torch.ops.collogue_vllm.all_reduce_norm.default, (summed.args[0], residual, weight, float(eps), 0.0, names.group, names.most)
        )
        normed, stream_node = (graph.call_function(operator.getitem, (call, i)) for i in range(2))
    normed.meta["val"] = stream_node.meta["val"] = summed.meta.get("val", rows)
    call.meta["val"] = [normed.meta["val"], stream_node.meta["val"]]
    if added:
        for user in list(norm.users):
            if user.target is not operator.getitem:
                raise RuntimeError(f"{norm} is read by {user.target}, not by getitem")
            user.replace_all_uses_with(normed if user.args[1] == 0 else stream_node)
            graph.erase_node(user)
    else:
        norm.replace_all_uses_with(normed)
    graph.erase_node(norm)
    summed.replace_all_uses_with(stream_node)
    graph.erase_node(summed)
    return ""


def _quantize(graph: Graph, call: Node, names: Names) -> bool:
    """Take the quantization of a fused call's norm into the call. Where others read the norm too, it is kept."""
    results = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    normed = results.get(0)
    if normed is None:
        return False
    found = next(((user, done) for user in normed.users if (done := quantization(user, normed, names.quants))), None)
    if found is None:
        return False
    quant, done = found
    place = {node: i for i, node in enumerate(graph.nodes)}
    if done.scale is not None and place[done.scale] >= place[call]:
        return False
    keep = len(normed.users) > 1
    outputs = {user.args[1]: user for user in quant.users if user.target is operator.getitem}
    with graph.inserting_before(call):
        whole = graph.call_function(
            torch.ops.collogue_vllm.all_reduce_norm_quant.default, (*call.args, done.label, done.scale, done.smallest, keep)
        )
        scales = [] if done.scales is None else [outputs.get(done.scales)]
        order = [results.get(1), outputs.get(done.codes), *scales, *([normed] if keep else [])]
        for i, old in enumerate(order):
            if old is not None:
                new = graph.call_function(operator.getitem, (whole, i))
                new.meta = dict(old.meta)
                old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not quant)
    for node in (*outputs.values(), quant, *results.values(), call):
        graph.erase_node(node)
    return True
