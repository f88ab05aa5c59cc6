"""Collogue's own call as a subject of timing: input sets, outputs, and the gate that compares them with the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from collogue import ops
from collogue.calls.call import Call
from collogue.communicator import Communicator
from collogue.contract.spec import Output
from collogue.testing.compare import compare
from collogue.tools.bench.timing import SETS
from collogue.tools.check.case import Case
from collogue.tools.check.rank import Answers, Given, poison, poisoned


@dataclass(frozen=True)
class _Set:
    """One input set, the outputs that calls on it write, and what these must be."""

    given: Given
    out: Output
    expected: Output


class FusedCall:
    """The communicator's call of one case, on :data:`SETS` input sets in turn; each has its own residual, weight and outputs."""

    repeatable = True

    def __init__(self, comm: Communicator, case: Case, answers: Answers) -> None:
        self.comm = comm
        quant = case.quant(comm.device)
        if quant is not None:
            quant.check_hidden_size(case.hidden_size)
        self._sets = []
        for seed in range(SETS):
            mine = replace(case, seed=seed)
            expected = answers(mine, comm.device, comm.rank)
            self._sets.append(_Set(Given.of(mine, comm.rank, comm.device, answers), poisoned(expected), expected))

    def on(self, comm: Communicator) -> FusedCall:
        """The same call on the same inputs and outputs, made by another communicator."""
        other = copy.copy(self)
        other.comm = comm
        return other

    def call(self, turn: int) -> Output:
        """One call with ``out=``."""
        s = self._sets[turn % SETS]
        return s.given.call(self.comm, s.out)

    def fresh(self, turn: int) -> Output:
        """The same call, which allocates its outputs."""
        return self._sets[turn % SETS].given.call(self.comm)

    def dispatched(self, turn: int) -> Output:
        """The same call through ``torch.ops.collogue``, as compiled graphs make it."""
        given = self._sets[turn % SETS].given
        return ops.call(self.comm.name, Call(given.partial, given.residual, operation=given.case.operation, **given.kwargs))

    def gate(self, run: Callable[[], None]) -> str | None:
        """Every bit of every output of every set equals the reference."""
        for s in self._sets:
            poison(s.out)
        synchronize(self.comm.device)
        run()
        synchronize(self.comm.device)
        self.comm.check()
        for s in self._sets:
            for difference in compare(s.out, s.expected).values():
                if difference.count:
                    return f"{difference.count} elements differ: {difference.first}"
        return None


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; a CPU device has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
