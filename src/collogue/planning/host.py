"""Plans of the host path: where the group's own collectives move bytes, who gets which terms, and which of two ways is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from collogue.calls.request import Request, sum_alone
from collogue.calls.terms import MAX_TERMS, TermsForm
from collogue.contract.quant import parse
from collogue.contract.spec import Islands, largest_block, owned_rows
from collogue.contract.wire import row_bytes
from collogue.planning.algorithm import Algorithm
from collogue.planning.extent import wire_bytes
from collogue.planning.islands import adder
from collogue.planning.plan import Plan, launch_shape, make_plan, sends_values
from collogue.planning.topology import Topology

#: All terms to every rank, in one exchange, costs more bytes than rows to their owners and back, in two: this many more are taken.
MORE_BYTES = 256 << 10


@dataclass(frozen=True)
class Places:
    """The terms of a sum in the order in which they are added: from which rank each comes, and whether as its island's float32 sum.

    ``islands`` of places, whose sums are added; ``None``: one sum.
    """

    ranks: tuple[int, ...]
    wide: tuple[bool, ...]
    islands: Islands | None

    @classmethod
    def of(cls, islands: list[list[tuple[int, bool]]] | None, size: int) -> Places:
        """Of pairs of a rank and whether it sends a sum, by island; ``None``: every rank's own term, in rank order."""
        if islands is None:
            return cls(tuple(range(size)), (False,) * size, None)
        ranks = [rank for island in islands for rank, _ in island]
        wide = [sends_sum for island in islands for _, sends_sum in island]
        starts = [sum(map(len, islands[:i])) for i in range(len(islands))]
        places = tuple(tuple(range(start, start + len(island))) for start, island in zip(starts, islands, strict=True))
        return cls(tuple(ranks), tuple(wide), places)

    @property
    def form(self) -> tuple[int, int, int]:
        """Count, ``wide`` and ``starts`` of :class:`TermsForm`."""
        wide = sum(1 << k for k, is_sum in enumerate(self.wide) if is_sum)
        return len(self.ranks), wide, sum(1 << island[0] for island in self.islands or ())


def gathered(topology: Topology) -> Places:
    """The terms of a sum where every rank has all of them."""
    sums = topology.sums
    return Places.of(None if sums is None else [[(rank, False) for rank in island] for island in sums], topology.world_size)


def owned(topology: Topology, owner: int) -> Places:
    """The terms of a sum where ``owner`` adds them: of its own island's ranks, and what the ranks that add for the others send."""
    sums = topology.sums
    if sums is None:
        return Places.of(None, topology.world_size)
    parts = [[(r, False) for r in i] if owner in i else [(adder(i, owner), len(i) > 1)] for i in sums]
    return Places.of(parts, topology.world_size)


def by_gather(topology: Topology, request: Request) -> bool:
    """Whether every rank of an ``all_reduce`` adds all terms: as asked for, else in small calls, and where that costs nothing."""
    if topology.architecture is not None and topology.world_size > MAX_TERMS:
        return False
    asked = topology.overrides.algorithm
    if asked is not None:
        return asked == "one_shot"
    message = request.tokens * request.hidden_size * request.dtype.itemsize
    return (topology.world_size - 1) * message - 2 * (topology.world_size - 1) * message // topology.world_size <= MORE_BYTES


def plan_call(topology: Topology, request: Request) -> Plan:
    """The plan of one call, on either transport."""
    algorithm: Algorithm
    if topology.transport == "peer":
        return replace(make_plan(topology, request), transport=topology.reach)
    if topology.architecture is None:
        plan = replace(make_plan(topology, request), transport=topology.reach)
        if topology.world_size == 1 or request.tokens == 0 or request.operation == "finish":
            return plan
        together = request.operation == "all_gather" or (request.operation == "all_reduce" and by_gather(topology, request))
        algorithm = "host_gather" if together else "host_owners"
        return replace(plan, why=plan.why + _saved(topology, request, algorithm), bytes_sent=bytes_sent(topology, request, algorithm))
    alone = replace(topology, world_size=1)
    if topology.world_size == 1 or request.tokens == 0 or request.operation == "finish":
        return replace(make_plan(alone, request), transport=topology.reach)
    algorithm = "host_owners"
    rows, why = largest_block(request.tokens, topology.world_size, request.rows), "rows go to owners, who add them, and come back"
    if request.operation == "all_gather":
        algorithm, why = "host_gather", "rows go to every rank as they are"
    elif request.operation == "all_reduce" and by_gather(topology, request):
        algorithm, rows, why = "host_gather", request.tokens, "one exchange: every rank adds all terms"
    gathers = request.operation == "all_gather"
    width, branch = request.hidden_size, request.branch
    quant = None if request.operation == "all_reduce" and algorithm == "host_owners" else request.quant
    shape = None if gathers else launch_shape(alone, max(rows, 1), width, quant, "local", experts=True, branch=branch)
    sent = bytes_sent(topology, request, algorithm)
    return Plan(algorithm, why + _saved(topology, request, algorithm), shape, sent, 0.0, 0.0, rows, 1, transport=topology.reach)


def _saved(topology: Topology, request: Request, algorithm: str) -> str:
    """What terms in fewer bits save, in words; empty where they travel as they are."""
    if not topology.wire or request.operation == "all_gather":
        return ""
    sent, plain = (bytes_sent(each, request, algorithm) for each in (topology, replace(topology, wire="")))
    return f"; terms as {topology.wire}: {sent} bytes in place of {plain}"


def bytes_sent(topology: Topology, request: Request, algorithm: str) -> int:
    """Bytes that leave the rank that sends most."""
    size, width, tokens = topology.world_size, request.hidden_size, request.tokens
    value_row = width * request.dtype.itemsize
    row = value_row if not topology.wire else row_bytes(parse(topology.wire), width)  # type: ignore[arg-type]
    if algorithm == "host_gather" and request.operation == "all_reduce":
        return (size - 1) * tokens * row
    own = [len(owned_rows(tokens, size, rank, request.rows)) for rank in range(size)]
    back = value_row if request.operation == "all_reduce" else wire_bytes(width, request.dtype, request.quant, sends_values(request))
    sent = [rows * (size - 1) * (back if request.operation != "reduce_scatter" else 0) for rows in own]
    if request.operation == "all_gather":
        return max(sent)
    sums = topology.sums or (tuple(range(size)),)
    for island in sums:
        for rank in island:
            for owner, rows in enumerate(own):
                if adder(island, owner) != rank:
                    sent[rank] += rows * row
                elif owner not in island:
                    sent[rank] += rows * (4 * width if len(island) > 1 else row)
    return max(sent)


def steps(topology: Topology, request: Request, rank: int) -> list[Request]:
    """What the kernels of ``rank`` are asked for in such a call, one after the other."""
    plain = replace(request, operation="all_reduce", rows=None, prologue=None)
    sum_only = sum_alone(plain)
    finish = replace(plain, operation="finish", residual=False, branch=False, wide_branch=False)
    finish = replace(finish, wanted=replace(finish.wanted, reduced=False, residual=False))
    if request.operation == "all_gather":
        return []
    if request.operation == "finish":
        return [request]
    made = [replace(sum_only, prologue=request.prologue)] if request.prologue is not None else []
    dtype = request.dtype
    if request.operation == "all_reduce" and by_gather(topology, request):
        return [*made, replace(plain, prologue=TermsForm(dtype, *gathered(topology).form))]
    sums = topology.sums or ()
    mine = next((island for island in sums if rank in island), ())
    own = [len(owned_rows(request.tokens, topology.world_size, owner, request.rows)) for owner in range(topology.world_size)]
    far = sum(rows for owner, rows in enumerate(own) if len(mine) > 1 and owner not in mine and adder(mine, owner) == rank)
    if far:
        made.append(replace(sum_only, dtype=torch.float32, tokens=far, prologue=TermsForm(dtype, len(mine))))
    whole = request.operation == "all_reduce"
    add = replace(plain, tokens=own[rank], prologue=TermsForm(dtype, *owned(topology, rank).form))
    if whole:
        stream = {"reduced": not request.residual, "residual": request.residual, "norm": False, "codes": False, "scales": False}
        add = replace(add, norm=False, wide_weight=False, quant=None, late_weight=False, wanted=replace(add.wanted, **stream))
    made += [add] * (own[rank] > 0)
    return made + [finish] * (whole and (request.norm or request.quant is not None))
