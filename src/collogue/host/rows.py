"""How rows go between the ranks of a group that moves bytes for them: terms to the rank that adds them, rows to everybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from collogue.calls.terms import Terms
from collogue.contract.quant import Quant
from collogue.contract.wire import unpack
from collogue.group import Group
from collogue.planning.host import Places, gathered, owned
from collogue.planning.islands import adder
from collogue.planning.topology import Topology


class Rows:
    """Moves the rows of one communicator; terms are packed where there is a ``wire``. ``what``: the call of which a step is part, which
    ranks compare. ``width``: H of the call.
    """

    def __init__(self, group: Group, topology: Topology, wire: Quant | None = None) -> None:
        self._group, self._rank, self._size = group, group.rank, group.size
        self._sums, self._wire, self.width = topology.sums, wire, 0
        self._gathered, self._owned = gathered(topology), owned(topology, group.rank)

    def everywhere(self, term: torch.Tensor, what: str) -> Terms:
        """Every rank's ``term`` [T, H], of which this rank's stays where it is."""
        every = [term if rank == self._rank else torch.empty_like(term) for rank in range(self._size)]
        self._swap(what, [term] * self._size, every)
        return self._terms(self._gathered, every)

    def gather(self, whole: torch.Tensor, blocks: Sequence[range], what: str) -> None:
        """Fill ``whole`` [T, ..], in which this rank's block stands."""
        rows = [whole[block.start : block.stop] for block in blocks]
        self._swap(what, [rows[self._rank]] * self._size, rows)

    def to_owners(self, term: torch.Tensor, blocks: Sequence[range], what: str, total: Callable[[Terms], torch.Tensor]) -> Terms:
        """The terms of the rows that this rank owns, ``blocks[rank]`` of [T, H]. ``total`` adds those of an island."""
        parts = [term[block.start : block.stop] for block in blocks]
        if self._sums is None:
            mine = parts[self._rank]
            every = [mine if rank == self._rank else torch.empty_like(mine) for rank in range(self._size)]
            self._swap(what, parts, every)
            return self._terms(self._owned, every)
        return self._over_islands(term, parts, what, total)

    def _over_islands(self, term: torch.Tensor, parts: list[torch.Tensor], what: str, total: Callable[[Terms], torch.Tensor]) -> Terms:
        """First within the island: to the owner, or to who adds for an owner elsewhere. Then the sums to their owners."""
        assert self._sums is not None
        island = next(each for each in self._sums if self._rank in each)
        owners = {rank: [o for o in range(self._size) if o not in island and adder(island, o) == rank] for rank in island}
        far, nothing = owners[self._rank], term[:0]
        give, take = [nothing] * self._size, [nothing] * self._size
        heights = [len(parts[owner]) for owner in far]
        for rank in island:
            send = [*owners[rank], rank]
            give[rank] = parts[rank] if len(send) == 1 else torch.cat([parts[owner] for owner in send])
            take[rank] = give[rank] if rank == self._rank else term.new_empty(sum(heights) + len(parts[self._rank]), term.shape[1])
        self._swap(f"{what}, within islands" if len(self._sums) < self._size else what, give, take)
        near = {rank: take[rank][sum(heights) :] for rank in island}  # of this rank's own rows
        there = [take[rank][: sum(heights)] for rank in island]
        sums = there[0] if len(island) == 1 else total(Terms(tuple(map(self._decoded, there))))
        give, take = [nothing] * self._size, [nothing] * self._size
        for place, owner in enumerate(far):
            give[owner] = sums[sum(heights[:place]) :][: heights[place]]
        mine = parts[self._rank]
        for rank, is_sum in zip(self._owned.ranks, self._owned.wide, strict=True):
            if rank not in near:
                take[rank] = mine.new_empty(len(mine), self.width, dtype=torch.float32) if is_sum else torch.empty_like(mine)
        self._swap(f"{what}, between islands", give, take)
        return self._terms(self._owned, [near.get(rank, each) for rank, each in enumerate(take)])

    def _swap(self, what: str, give: Sequence[torch.Tensor], take: Sequence[torch.Tensor]) -> None:
        if self._size > 1:
            self._group.swap(what, give, take)

    def _decoded(self, value: torch.Tensor) -> torch.Tensor:
        return value if self._wire is None or value.dtype != torch.uint8 else unpack(value, self._wire, self.width)

    def _terms(self, places: Places, every: Sequence[torch.Tensor]) -> Terms:
        return Terms(tuple(self._decoded(every[rank]) for rank in places.ranks), places.islands)
