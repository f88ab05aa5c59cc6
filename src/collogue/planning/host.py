"""Plans of the host path: where the group's own collectives move bytes, who gets which terms, and which of two ways is taken."""

from __future__ import annotations

from collections.abc import Callable
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
    if 1 < len(topology.islands) < topology.world_size:
        why += "; the group moves all bytes, within islands too"
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
    every = exchanges(topology, request, algorithm)
    return max(sum(sum(each.sent[rank]) for each in every) for rank in range(topology.world_size))


@dataclass(frozen=True)
class Exchange:
    """A step of a call in which ranks send to each other: ``sent[a][b]`` bytes from rank a to rank b, in ``parts`` one after the other."""

    sent: tuple[tuple[int, ...], ...]
    parts: int = 1

    def busiest(self, counts: Callable[[int, int], bool]) -> int:
        """Most bytes from or to a rank, of the pairs (sender, receiver) that count."""
        ranks = range(len(self.sent))
        sent = [[self.sent[a][b] if counts(a, b) else 0 for b in ranks] for a in ranks]
        return max(*map(sum, sent), *map(sum, zip(*sent, strict=True)))


def exchanges(topology: Topology, request: Request, algorithm: str) -> list[Exchange]:
    """Those of such a call on the host path, in their order."""
    size, width, wanted = topology.world_size, request.hidden_size, request.wanted
    value_row = width * request.dtype.itemsize
    row = value_row if not topology.wire else row_bytes(parse(topology.wire), width)  # type: ignore[arg-type]
    if algorithm == "host_gather" and request.operation == "all_reduce":
        return [_exchange(size, lambda a, b: request.tokens * row)]
    own = [len(owned_rows(request.tokens, size, rank, request.rows)) for rank in range(size)]
    found = [] if request.operation == "all_gather" else _to_owners(topology.sums, own, row, 4 * width)
    if request.operation == "all_reduce":
        found.append(_exchange(size, lambda a, b: own[a] * value_row))
    elif request.operation != "reduce_scatter":
        back = wire_bytes(width, request.dtype, request.quant, sends_values(request))
        tensors = wanted.norm + wanted.codes + wanted.scales
        if request.operation == "all_gather":
            tensors += wanted.reduced + wanted.residual
        found.append(_exchange(size, lambda a, b: own[a] * back, tensors))
    return found


def _to_owners(sums: Islands | None, own: list[int], row: int, sum_row: int) -> list[Exchange]:
    """Of rows to the ranks that own so many, ``row`` bytes a term and ``sum_row`` a sum of an island of several ranks."""
    size = len(own)
    if sums is None:
        return [_exchange(size, lambda a, b: own[b] * row)]
    home = {rank: island for island in sums for rank in island}
    adds = {rank: sum(rows for o, rows in enumerate(own) if adder(home[rank], o) == rank) for rank in home}

    def between(a: int, b: int) -> int:
        sends = home[a] != home[b] and adder(home[a], b) == a
        return own[b] * (sum_row if len(home[a]) > 1 else row) if sends else 0

    within = _exchange(size, lambda a, b: adds[b] * row if home[a] == home[b] else 0)
    return [within, _exchange(size, between)]


def _exchange(size: int, sent: Callable[[int, int], int], parts: int = 1) -> Exchange:
    """What a rank has for itself stays where it is."""
    return Exchange(tuple(tuple(0 if a == b else sent(a, b) for b in range(size)) for a in range(size)), parts)


def _terms(dtype: torch.dtype, places: Places) -> TermsForm:
    """What a kernel is compiled for that adds terms of ``dtype``. Sums of islands among float32 terms are nothing special."""
    count, wide, starts = places.form
    return TermsForm(dtype, count, 0 if dtype == torch.float32 else wide, starts)


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
    if topology.wire:  # terms are quantized here, and decoded to float32 where they are added
        codes = {"reduced": False, "residual": False, "norm": False, "codes": True, "scales": True}
        packs = replace(finish, norm=False, wide_weight=False, late_weight=False, quant=parse(topology.wire))
        made.append(replace(packs, wanted=replace(finish.wanted, **codes)))
        dtype = torch.float32
    if request.operation == "all_reduce" and by_gather(topology, request):
        return [*made, replace(plain, prologue=_terms(dtype, gathered(topology)))]
    sums = topology.sums or ()
    mine = next((island for island in sums if rank in island), ())
    own = [len(owned_rows(request.tokens, topology.world_size, owner, request.rows)) for owner in range(topology.world_size)]
    far = sum(rows for owner, rows in enumerate(own) if len(mine) > 1 and owner not in mine and adder(mine, owner) == rank)
    if far:
        made.append(replace(sum_only, dtype=torch.float32, tokens=far, prologue=TermsForm(dtype, len(mine))))
    whole = request.operation == "all_reduce"
    add = replace(plain, tokens=own[rank], prologue=_terms(dtype, owned(topology, rank)))
    if whole:
        stream = {"reduced": not request.residual, "residual": request.residual, "norm": False, "codes": False, "scales": False}
        add = replace(add, norm=False, wide_weight=False, quant=None, late_weight=False, wanted=replace(add.wanted, **stream))
    made += [add] * (own[rank] > 0)
    return made + [finish] * (whole and (request.norm or request.quant is not None))
