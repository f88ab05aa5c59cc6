"""The algorithms: one kernel each, of the same name, and what everybody else has to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

#: ``host_gather``: every rank gets all terms by the group's own collective, adds and finishes them; ``host_owners``: rows go to owners,
#: who add them, and come back (:mod:`collogue.host`).
Algorithm: TypeAlias = Literal["reference", "local", "one_shot", "two_shot", "sharded", "all_gather", "host_gather", "host_owners"]
#: What a user may ask for, and a table of measured times name: the algorithms of an ``all_reduce``.
AllReduceBy: TypeAlias = Literal["one_shot", "two_shot"]


@dataclass(frozen=True)
class Facts:
    """Of an algorithm.

    ``one_hop``: every rank adds and finishes all rows; it uses the generations of one-shot, and leaves its slots for the next call to
    clean. ``owned``: a launch is so many rows of each owner, not of the call. ``alone``: nothing is sent, nobody is waited for.
    """

    one_hop: bool = False
    owned: bool = False
    alone: bool = False

    @property
    def streams(self) -> bool:
        """Whether rows go through their owners, many at a time."""
        return not self.one_hop and not self.alone


#: By name; the place is the number in a journal.
ALGORITHMS = {
    "local": Facts(alone=True),
    "one_shot": Facts(one_hop=True),
    "two_shot": Facts(),
    "sharded": Facts(owned=True),
    "all_gather": Facts(owned=True),
}
