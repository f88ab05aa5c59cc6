"""What runs checked calls: kernels that reach every rank's memory, or an engine over the group's own collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from collogue.calls.call import Call, check_call
from collogue.calls.capacity import Capacity
from collogue.calls.outputs import check_out, check_padding
from collogue.calls.request import Signature
from collogue.contract.quant import Quant
from collogue.contract.spec import Output
from collogue.gpu.journal import Journal
from collogue.group import Group
from collogue.planning.topology import Topology


class Engine(Protocol):
    """Runs checked calls."""

    @property
    def latest(self) -> Callable[..., Output | None]: ...
    def quick(self, call: Call, out: Output | None) -> Output | None: ...
    def run(self, call: Call, out: Output | None) -> Output: ...
    def prepare(self, signatures: Iterable[Signature]) -> None: ...
    def check(self) -> None: ...
    def reset(self) -> None: ...
    def close(self, collective: bool) -> None: ...
    def journal(self) -> Journal: ...


def make_engine(group: Group, topology: Topology, timeout: float, name: str, wire: Quant | None = None) -> Engine:
    """The engine for the transport. ``name``: the communicator's, for errors. Collective."""
    if topology.transport == "host":
        from collogue.host.engine import HostEngine

        return HostEngine(group, topology, timeout, wire)
    from collogue.gpu.engine import KernelEngine

    return KernelEngine(group, topology, timeout, name)


def run(engine: Engine, capacity: Capacity, call: Call, out: Output | None = None) -> Output:
    """Check a call and run it; without tokens there is nothing to do."""
    check_padding(call.write_padding, out)
    if call.shard is None:
        check_call(capacity, call)
    if out is not None:
        check_out(call, out)
    if call.tokens == 0:
        return out if out is not None else call.signature.empty()
    return engine.run(call, out)
