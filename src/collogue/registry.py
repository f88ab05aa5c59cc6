"""Communicators by name: a traced graph holds a string where an eager call holds the object."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from collogue.calls.call import Call
from collogue.contract.quant import Quant
from collogue.contract.spec import Output
from collogue.engine import Engine
from collogue.errors import ClosedError
from collogue.planning.topology import Topology


class Communicator(Protocol):
    """What graphs need of a :class:`collogue.Communicator`."""

    name: str
    group_name: str
    rank: int
    world_size: int
    dtype: torch.dtype
    max_tokens: int
    hidden_size: int
    topology: Topology
    _engine: Engine | None

    def fits(self, tokens: int, hidden_size: int | None = None) -> bool: ...
    def owned_rows(self, tokens: int | None = None, rank: int | None = None, *, rows: Sequence[int] | None = None) -> range: ...
    def _run(self, call: Call, out: Output | None = None) -> Output: ...
    def all_gather(
        self,
        shard: Output,
        tokens: int | None = None,
        *,
        quant: Quant | None = None,
        out: Output | None = None,
        rows: Sequence[int] | None = None,
    ) -> Output: ...


_COMMUNICATORS: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()


def register(comm: Communicator, group_name: str) -> str:
    """Give ``comm`` a name and remember it weakly: ``"<group name>/<dtype>"``, numbered where another open communicator has that name.

    A process that makes its communicators in the same order gives them the same names, so graphs out of a compile cache find them.
    """
    first = f"{group_name}/{str(comm.dtype).removeprefix('torch.')}"
    name, number = first, 2
    while name in _COMMUNICATORS:
        name, number = f"{first}/{number}", number + 1
    _COMMUNICATORS[name] = comm
    return name


def forget(name: str) -> None:
    """The name is free again."""
    _COMMUNICATORS.pop(name, None)


def find(name: str) -> Communicator:
    """The open communicator of this name. Raises :class:`ClosedError`."""
    comm = _COMMUNICATORS.get(name)
    if comm is None:
        known = ", ".join(sorted(_COMMUNICATORS)) or "none"
        raise ClosedError(
            f"there is no open communicator {name!r}",
            hint=f"a graph refers to it: make it first, and keep it; open ones: {known}",
        )
    return comm


def of_group(group_name: str, dtype: torch.dtype, hidden_size: int) -> Communicator | None:
    """The newest open communicator of a ``torch.distributed`` group that takes rows of this dtype and width.

    An older one may be what is left of a model that nobody holds: it is there until the garbage collector comes, on each rank at another
    time.
    """
    for comm in reversed(list(_COMMUNICATORS.values())):
        if comm.group_name == group_name and comm.dtype == dtype and hidden_size <= comm.hidden_size:
            return comm
    return None


def fingerprint() -> list[tuple[str | int, ...]]:
    """What the open communicators are, for the keys of compile caches. Graphs may depend on the rank."""
    return [
        (name, comm.group_name, comm.rank, comm.world_size, str(comm.dtype), comm.max_tokens, comm.hidden_size)
        for name, comm in sorted(_COMMUNICATORS.items())
    ]
