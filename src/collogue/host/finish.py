"""What adds rows that have been brought together and applies the epilogue: the reference, or kernels of this rank's GPU.

A step is a :class:`.Call` of this rank alone: an ``all_reduce`` of :class:`.Terms` or of a prologue, or a ``finish``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import torch

from collogue.calls.call import Call
from collogue.calls.capacity import Capacity
from collogue.calls.outputs import write
from collogue.calls.product import ScaledProduct
from collogue.calls.request import Request, Signature, keep, make_request
from collogue.calls.terms import Terms
from collogue.contract import reference
from collogue.contract.prologue import Prologue
from collogue.contract.quant import Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.planning.topology import Topology


class Steps:
    """Makes the steps of a communicator's calls. Those that are alike share one signature."""

    def __init__(self, topology: Topology, device: torch.device) -> None:
        self._capacity = Capacity(topology.max_tokens, topology.hidden_size, topology.dtype, device)
        self._signatures: dict[object, Signature] = {}

    def add(
        self,
        term: Terms | Prologue,
        dtype: torch.dtype,
        *,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        branch_norm: RMSNorm | None = None,
    ) -> Call:
        """Add, and apply the epilogue that is given."""
        step = Call(term, residual, norm, quant, keep_norm, branch_norm=branch_norm)
        return self._signed(step, term.tokens, term.hidden_size, dtype)

    def finish(self, y: torch.Tensor, norm: RMSNorm | None, quant: Quant | None, keep_norm: bool) -> Call:
        """Norm and quantization of ``y``."""
        step = Call(y, norm=norm, quant=quant, keep_norm=keep_norm, operation="finish")
        return self._signed(step, y.shape[0], y.shape[1], y.dtype)

    def _signed(self, step: Call, tokens: int, hidden_size: int, dtype: torch.dtype) -> Call:
        key = step.operation, tokens, hidden_size, dtype, step.residual is None, step.keep_norm, *map(_kind, (step.norm, step.branch_norm))
        key += (None if step.quant is None else step.quant.label, _kind(step.partial))
        step.signature = self._signatures.get(key) or keep(self._signatures, key, self._signature(step, tokens, hidden_size, dtype))
        return step

    def _signature(self, step: Call, tokens: int, hidden_size: int, dtype: torch.dtype) -> Signature:
        norm, branch = step.norm, step.branch_norm
        request = make_request(
            tokens,
            hidden_size,
            dtype,
            residual=step.residual is not None,
            norm=norm is not None,
            wide_weight=norm is not None and norm.weight.dtype != dtype,
            quant=step.quant,
            keep_norm=step.keep_norm,
            operation=step.operation,
            late_weight=norm is not None and not norm.prefetch,
            prologue=None if isinstance(step.partial, torch.Tensor) else step.partial.form,
            branch=branch is not None,
            wide_branch=branch is not None and branch.weight.dtype != dtype,
        )
        return self._capacity.signature(request)

    def prepare(self, finisher: Finisher, requests: Iterable[Request]) -> None:
        """Have everything loaded that such steps need."""
        finisher.prepare(replace(Call(None), signature=self._capacity.signature(request)) for request in requests)  # type: ignore[arg-type]


def _kind(given: torch.Tensor | Terms | Prologue | ScaledProduct | RMSNorm | None) -> object:
    """What of an argument of a step its signature depends on."""
    if isinstance(given, RMSNorm):
        return given.weight.dtype, given.prefetch
    if isinstance(given, Terms):
        return tuple(value.dtype for value in given.values), given.islands
    return None if given is None or isinstance(given, torch.Tensor) else given.form


class Finisher(Protocol):
    """Runs steps on this rank's device."""

    def run(self, step: Call, out: Output) -> None: ...
    def prepare(self, steps: Iterable[Call]) -> None: ...
    def synchronize(self) -> None: ...
    def close(self) -> None: ...


class ReferenceFinisher:
    """The reference, on the CPU."""

    def run(self, step: Call, out: Output) -> None:
        given, dtype = step.partial, step.signature.request.dtype
        if isinstance(given, Terms):
            given = reference.stream(reference.sum_partials(given.values, given.islands), dtype, step.residual, step.branch_norm)
        elif isinstance(given, ScaledProduct):
            given = given.values()
        write(reference.finished(reference.term_of(given), step.norm, step.quant, step.wanted), out)

    def prepare(self, steps: Iterable[Call]) -> None:
        """Nothing to build."""

    def synchronize(self) -> None:
        """Nothing is queued."""

    def close(self) -> None:
        """Nothing is held."""


class KernelFinisher:
    """Kernels of this rank's GPU, as a world of one runs them (kernels/local.cuh)."""

    def __init__(self, topology: Topology, device: torch.device, timeout: float) -> None:
        from collogue.gpu.engine import KernelEngine, Nobody

        alone = replace(topology, world_size=1, transport="peer", islands=(), table=None)
        self._engine = KernelEngine(Nobody(device), alone, timeout)

    def run(self, step: Call, out: Output) -> None:
        if step.tokens:
            self._engine.run(step, out)

    def prepare(self, steps: Iterable[Call]) -> None:
        self._engine.prepare(step.signature for step in steps if step.tokens)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._engine.index)

    def close(self) -> None:
        self._engine.close(False)
