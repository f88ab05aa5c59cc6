"""Islands: ranks that reach each other's memory. What their split is, and who adds whose rows of an island."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from collogue.contract.spec import Islands


def split(hosts: Sequence[str], reaches: Callable[[int, int], bool] = lambda a, b: True) -> Islands:
    """The islands of ranks on ``hosts``: in rank order, each joins the first one on its host all of whose ranks it ``reaches``, both ways.

    A pure function of what all ranks share. Islands are in the order of their first ranks.
    """
    islands: list[list[int]] = []
    for rank, host in enumerate(hosts):
        for island in islands:
            if all(hosts[other] == host and reaches(rank, other) and reaches(other, rank) for other in island):
                island.append(rank)
                break
        else:
            islands.append([rank])
    return tuple(map(tuple, islands))


def adder(island: Sequence[int], owner: int) -> int:
    """The rank of ``island`` that adds its terms of the rows of ``owner``: the owner itself where it is one of them."""
    return owner if owner in island else island[owner % len(island)]


def described(islands: Islands) -> str:
    """``2 islands: ranks 0 1; 2 3``."""
    if len(islands) == 1:
        return "1 island of all ranks"
    return f"{len(islands)} islands: ranks {'; '.join(' '.join(map(str, island)) for island in islands)}"
