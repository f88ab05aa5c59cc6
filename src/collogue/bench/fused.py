"""Collogue's own call as a subject of timing: input sets, outputs, and the gate that compares them with the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from collogue.bench.timing import SETS
from collogue.check.case import Case
from collogue.check.rank import Answer, arguments, poison, poisoned
from collogue.communicator import Communicator
from collogue.spec import Output, RMSNorm
from collogue.testing.compare import compare


@dataclass(frozen=True)
class _Set:
    """One input set, the outputs that calls on it write, and what these must be."""

    partial: torch.Tensor
    residual: torch.Tensor | None
    norm: RMSNorm | None
    out: Output
    expected: Output


class FusedCall:
    """``comm.all_reduce`` of one case, on :data:`SETS` input sets in turn; each has its own residual, weight and outputs."""

    repeatable = True

    def __init__(self, comm: Communicator, case: Case, answer: Answer) -> None:
        self.comm = comm
        self._quant = case.quant(comm.device)
        if self._quant is not None:
            self._quant.check_hidden_size(case.hidden_size)
        self._keep = case.keep_norm and case.norm and case.format != "none"
        self._sets = []
        for seed in range(SETS):
            expected = answer(replace(case, seed=seed), comm.device)
            self._sets.append(_Set(*arguments(replace(case, seed=seed), comm.rank, comm.device), poisoned(expected), expected))

    def call(self, turn: int) -> Output:
        """One call with ``out=``."""
        s = self._sets[turn % SETS]
        return self.comm.all_reduce(s.partial, residual=s.residual, norm=s.norm, quant=self._quant, keep_norm=self._keep, out=s.out)

    def fresh(self, turn: int) -> Output:
        """The same call, which allocates its outputs."""
        s = self._sets[turn % SETS]
        return self.comm.all_reduce(s.partial, residual=s.residual, norm=s.norm, quant=self._quant, keep_norm=self._keep)

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
