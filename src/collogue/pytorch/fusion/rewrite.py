"""The rewriting: all-reduce, norm of the branch, residual, RMSNorm and quantization of a graph become one ``collogue::all_reduce``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from collogue import registry
from collogue.contract.spec import VALUE_DTYPES, Output
from collogue.pytorch.fusion.build import call_operator, item
from collogue.pytorch.fusion.graph import aten, equal, is_sum, other_operand, readers, root, same_shape, short, value
from collogue.pytorch.fusion.norm import Norm, find_norm
from collogue.pytorch.fusion.quant import Quantized, find_quant
from collogue.pytorch.fusion.report import Fused, Missed, Report
from collogue.registry import Communicator

_collectives = torch.ops._c10d_functional


class NotFused(Exception):
    """Why an all-reduce stays as it is."""


@dataclass(frozen=True)
class Boundary:
    """An all-reduce with everything that one call can do of what follows it.

    ``branch``: the norm before the residual. With one, ``norm`` may be missing.
    """

    reduce: Node
    wait: Node
    comm: Communicator
    stream: Node
    residual: Node | None
    branch: Norm | None
    norm: Norm | None
    quant: Quantized | None


def fuse(graph: Graph, report: Report) -> None:
    """Rewrite every all-reduce in ``graph`` that a norm follows, in place, and say in ``report`` what happened to each."""
    for node in list(graph.nodes):
        if node.target is not _collectives.all_reduce.default:
            continue
        try:
            boundary = _find(node, report)
            _rewrite(graph, boundary, report)
        except NotFused as reason:
            report.missed.append(Missed(_where(node), str(reason)))
    graph.eliminate_dead_code()
    graph.lint()


# ---- finding


def _find(reduce: Node, report: Report) -> Boundary:
    wait = next((user for user in reduce.users if user.target is _collectives.wait_tensor.default), None)
    if wait is None or len(reduce.users) != 1:
        raise NotFused("the sum is not simply waited for")
    comm = _communicator(reduce)
    stream, residual = _stream(wait)
    why: list[str] = []
    norm, branch = find_norm(stream, why), None
    if norm is None:
        raise NotFused(why[-1] if why else "no RMSNorm reads the sum")
    added = _added(wait, norm) if residual is None else None
    if added is not None:
        (stream, residual), branch = added, norm
        norm = find_norm(stream, why)
    why.clear()
    quant = find_quant(norm, why) if norm is not None else None
    if norm is not None and quant is None and not norm.results:
        if branch is None:
            raise NotFused(why[-1] if why else "the norm is not rounded to the sum's dtype")
        norm = None
    report.remarks += [f"{_where(reduce)}: quantization not fused: {reason}" for reason in why if quant is None]
    return Boundary(reduce, wait, comm, stream, residual, branch, norm, quant)


def _added(wait: Node, norm: Norm) -> tuple[Node, Node] | None:
    """The addition of a residual to the norm of the sum, and the residual, where nothing else reads the sum or that norm."""
    found = [reader for result in norm.results for reader in readers(result)]
    if len(found) != 1 or not is_sum(found[0][0]):
        return None
    add, operand = found[0]
    residual = other_operand(add, operand)
    tensors = [value(each) for each in (wait, residual, operand, add)]
    if not isinstance(residual, Node) or any(each is None or each.dtype != tensors[0].dtype for each in tensors):  # type: ignore[union-attr]
        return None
    behind, open_ends = {wait}, [wait]
    while open_ends:
        for user in open_ends.pop().users:
            if user.op == "output" or user.is_impure():
                return None
            if user is not add and user not in behind:
                behind.add(user)
                open_ends.append(user)
    return (add, residual) if residual not in behind and same_shape(tensors[1], tensors[2]) else None  # type: ignore[arg-type]


def _communicator(reduce: Node) -> Communicator:
    partial, kind, group = value(reduce.args[0]), reduce.args[1], reduce.args[2]
    if kind != "sum":
        raise NotFused(f"it reduces by {kind}, not by sum")
    if partial is None or partial.dtype not in VALUE_DTYPES or partial.ndim < 1:
        raise NotFused("it reduces no rows of bfloat16, float16 or float32")
    if not isinstance(partial.shape[-1], int):
        raise NotFused("the hidden size is not fixed in the graph; instead of dynamic=True, mark the token dimensions by mark_dynamic")
    width, dtype = partial.shape[-1], short(partial.dtype)
    comm = registry.of_group(group, partial.dtype, width) if isinstance(group, str) and width % 8 == 0 else None
    if comm is None:
        raise NotFused(
            f"there is no communicator for {dtype} rows of {width} on the group {group!r}; make one before compiling, and keep it"
        )
    if comm.topology.wire:
        raise NotFused(f"the group's communicator sends terms as {comm.topology.wire}, which rounds them; make one without wire=")
    return comm


def _stream(wait: Node) -> tuple[Node, Node | None]:
    """The node that becomes y, and the residual that is added, if one is."""
    reduced, found = value(wait), list(readers(wait))
    if len(found) != 1 or not is_sum(found[0][0]):
        return wait, None
    add, operand = found[0]
    added = other_operand(add, operand)
    other, summed, own = value(added), value(add), value(operand)
    if other is None or summed is None or own is None or reduced is None:
        raise NotFused("a number is added to the sum")
    if root(added) is wait:
        raise NotFused("the sum is added to itself")
    if not same_shape(other, own):
        raise NotFused(f"what is added to the sum has shape {list(other.shape)} (a bias?); add it to one rank's partial instead")
    if not other.dtype == own.dtype == summed.dtype == reduced.dtype:
        raise NotFused("the residual has another dtype than the sum")
    return add, added


# ---- rewriting


def _rewrite(graph: Graph, found: Boundary, report: Report) -> None:
    place = _Place(graph, found.stream if found.residual is not None else found.wait)
    divisor = found.quant.divisor if found.quant is not None else None
    if isinstance(divisor, Node) and not place.can_have(divisor):
        reason = "the FP8 scale is computed from the sum, or too far from its place"
        if found.norm is None or not found.norm.results:
            raise NotFused(f"{reason}, and the norm is not rounded to the sum's dtype")
        report.remarks.append(f"{_where(found.reduce)}: quantization not fused: {reason}")
        found = replace(found, quant=None)
    partial, quant = found.reduce.args[0], found.quant
    rows = value(partial)
    assert rows is not None
    assert isinstance(partial, Node)
    shapes = found.residual if found.residual is not None else partial
    norms = [norm for norm in (found.norm, found.branch) if norm is not None]
    if not all(place.can_have(norm.weight) for norm in norms):
        raise NotFused("the norm's weight is computed from the sum, or too far from its place")
    for norm in norms:
        place.have(norm.weight)
    divisor = quant.divisor if quant is not None else None
    if isinstance(divisor, Node):
        place.have(divisor)
    with graph.inserting_before(place.before):
        width = rows.shape[-1]
        scale = call_operator(graph, aten.reciprocal.default, divisor) if quant is not None and quant.inverted else divisor
        label = "none" if quant is None else "fp8_per_token" if quant.scales is not None else "fp8_static"
        call = call_operator(
            graph,
            torch.ops.collogue.all_reduce.default,
            call_operator(graph, aten.reshape.default, partial, [-1, width]),
            None if found.residual is None else call_operator(graph, aten.reshape.default, found.residual, [-1, width]),
            *_arguments(graph, found.norm),
            label,
            scale if isinstance(scale, Node) else None,
            scale if isinstance(scale, float) else 1.0,
            0.0 if quant is None else quant.smallest,
            quant is not None,
            found.comm.name,
            *([] if found.branch is None else [*_NO_PROLOGUE, *_arguments(graph, found.branch)]),
        )
        out = Output(*(None if i is None else item(graph, call, i) for i in _places(found.norm, quant)))
        results = () if found.norm is None else found.norm.results
        replaced: list[tuple[Node | None, Any]] = [(found.stream, out.residual), *((result, out.norm) for result in results)]
        if quant is not None:
            replaced += [(quant.codes, out.codes), (quant.scales, out.scales)]
        shaped = [(old, _shaped(graph, new, old, shapes)) for old, new in replaced if old is not None]
    for old, new in shaped:
        old.replace_all_uses_with(new)
    told = _describe(found, label)
    _erase(graph, found)
    if quant is not None and not any(user.args[1] == 1 for user in call.users):
        _drop_norm(call)
    report.fused.append(replace(told, keeps_norm=bool(call.args[9])))


#: The operator's arguments between ``comm`` and the branch norm: ``prefetch``, and no experts.
_NO_PROLOGUE = (True, "none", None, None, None, 1.0)


def _arguments(graph: Graph, norm: Norm | None) -> tuple[Node | None, float, float]:
    """Weight, eps and offset."""
    if norm is None:
        return None, 0.0, 0.0
    held = value(norm.weight)
    assert held is not None
    weight = norm.weight if held.ndim == 1 else call_operator(graph, aten.reshape.default, norm.weight, [held.numel()])
    return weight, norm.eps, norm.weight_offset


def _places(norm: Norm | None, quant: Quantized | None) -> tuple[int | None, ...]:
    """Where each output of :class:`collogue.Output` stands in the operator's list, asked for with ``keep_norm``."""
    if quant is None:
        return None, 0, None if norm is None else 1, None, None
    return None, 0, 1, 2, 3 if quant.scales is not None else None


class _Place:
    """A place in the graph, and what can be had there."""

    def __init__(self, graph: Graph, before: Node) -> None:
        self.before = before
        self.earlier = set()
        for node in graph.nodes:
            if node is before:
                break
            self.earlier.add(node)

    def can_have(self, node: Node, limit: int = 8) -> bool:
        """Whether ``node`` stands earlier or can be moved up with what it is made of. Inputs can be, results of the sum cannot."""
        if node in self.earlier or node.op == "get_attr":
            return True
        movable = node.op == "call_function" and not node.is_impure() and node is not self.before and limit > 0
        return movable and all(self.can_have(needed, limit - 1) for needed in node.all_input_nodes)

    def have(self, node: Node) -> Node:
        """``node``, moved up with what it is made of, where it :meth:`can_have` it."""
        if node not in self.earlier:
            for needed in node.all_input_nodes:
                self.have(needed)
            self.before.prepend(node)
            self.earlier.add(node)
        return node


def _shaped(graph: Graph, node: Any, like: Node, shapes: Node) -> Node:
    """``node`` in the shape of ``like``. Sizes that are not fixed are read from ``shapes``, the residual or the partial."""
    target, known = value(like), value(shapes)
    assert target is not None
    assert known is not None
    unknown = [dim for dim, size in enumerate(target.shape) if not isinstance(size, int)]
    sizes: list[Any] = [*target.shape]
    for dim in unknown:
        if len(unknown) == 1:
            sizes[dim] = -1
        elif dim < known.ndim and equal(target.shape[dim], known.shape[dim]):
            sizes[dim] = call_operator(graph, aten.sym_size.int, shapes, dim)
        else:
            raise NotFused("the norm's result has sizes that are not those of the partial")
    return call_operator(graph, aten.reshape.default, node, sizes)


def _erase(graph: Graph, found: Boundary) -> None:
    """The sum is not waited for by anyone any more: dead code elimination leaves collectives alone."""
    graph.eliminate_dead_code()
    for node in (found.wait, found.reduce):
        if node.users:
            raise AssertionError(f"{node} is still read")
        graph.erase_node(node)


def _drop_norm(call: Node) -> None:
    """The norm beside its codes is not asked for where nobody reads it."""
    call.args = (*call.args[:9], False, *call.args[10:])
    del call.meta["val"][1]
    for user in list(call.users):
        place = user.args[1]
        assert isinstance(place, int)
        user.args = (call, place - (place > 1))


def _describe(found: Boundary, label: str) -> Fused:
    rows = value(found.reduce.args[0])
    assert rows is not None
    branch, norm, quant = found.branch, found.norm, found.quant
    roundings = [rounding for each in (branch, norm, quant) if each is not None for rounding in each.roundings]
    if found.residual is not None and branch is None and rows.dtype != torch.float32:
        roundings.insert(0, f"the sum to {short(rows.dtype)} before the residual")
    if norm is not None and not norm.results:  # Inductor may take a conversion and the one back out of the graph
        roundings.append(f"the norm to {short(rows.dtype)} before its quantization (added)")
    return Fused(
        where=_where(found.reduce),
        comm=found.comm.name,
        shape=str([str(size) if not isinstance(size, int) else size for size in rows.shape]).replace("'", ""),
        residual=found.residual is not None,
        eps=None if norm is None else norm.eps,
        weight_offset=0.0 if norm is None else norm.weight_offset,
        quant=label,
        keeps_norm=False,
        roundings=tuple(roundings),
        branch_eps=None if branch is None else branch.eps,
        branch_offset=0.0 if branch is None else branch.weight_offset,
    )


def _where(node: Node) -> str:
    """The module that the node comes from, else the line of the user's code, else the node's name."""
    modules = [path for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]
    if modules:
        return str(modules[-1]).replace("L['self'].", "")
    for line in reversed(str(node.meta.get("stack_trace") or "").splitlines()):
        if line.strip().startswith("File ") and "/torch/" not in line:
            file, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
            return f"{file.rsplit('/', 1)[-1]}:{number}"
    return str(node.name)
