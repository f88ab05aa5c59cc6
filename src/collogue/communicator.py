"""What people call: :class:`Communicator`."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol

import torch

from collogue.call import Call, Capacity, allocate, check_call, check_hidden_size, check_out
from collogue.errors import ArgumentError, CapacityError, ClosedError, DTypeError
from collogue.group import as_group
from collogue.plan import Plan, Request, make_plan
from collogue.spec import VALUE_DTYPES, Output, Quant, RMSNorm, Wanted
from collogue.topology import Topology, agree


class Engine(Protocol):
    """Runs checked calls: the reference on CPU groups, kernels on CUDA groups."""

    def run(self, call: Call, out: Output | None) -> Output: ...
    def prepare(self, requests: Iterable[Request]) -> None: ...
    def check(self) -> None: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


class Communicator:
    """Finishes transformer layers inside their all-reduce, for one tensor-parallel group.

    Args:
        group: the tensor-parallel process group (``torch.distributed.ProcessGroup``). Required: there is no default.
        max_tokens: most rows of one call.
        hidden_size: largest ``H`` of a call; a multiple of 8. Calls may be narrower.
        dtype: of partials, residual and norm: bfloat16, float16 or float32.
        device: the device of every tensor; default: this process's CUDA device if the group has NCCL, else the CPU.
        timeout: seconds that a kernel waits for a peer before it gives up.
    Synchronisation:
        Making one is collective: every rank of the group, with the same arguments.
    Raises:
        GroupError, PlatformError, ArgumentError.
    """

    def __init__(
        self,
        group: Any,
        *,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        timeout: float = 30.0,
    ) -> None:
        self._engine: Engine | None = None
        self._group = as_group(group, device)
        self.rank, self.world_size, self.device = self._group.rank, self._group.size, self._group.device
        self.max_tokens, self.hidden_size, self.dtype, self.timeout = max_tokens, hidden_size, dtype, timeout
        self._capacity = Capacity(max_tokens, hidden_size, dtype, self.device)
        self._check_capacity()
        self.topology: Topology = agree(self._group, self._capacity)
        self._engine = self._make_engine()

    def _check_capacity(self) -> None:
        check_hidden_size(self.hidden_size)
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise CapacityError(f"max_tokens is {self.max_tokens!r}", hint="give the largest number of rows of one call")
        if self.dtype not in VALUE_DTYPES:
            raise DTypeError(f"dtype {self.dtype} is not supported", hint="use torch.bfloat16, torch.float16 or torch.float32")
        if not self.timeout > 0:
            raise ArgumentError(f"timeout is {self.timeout!r}", hint="give a positive number of seconds")

    def _make_engine(self) -> Engine:
        if self.device.type == "cpu":
            from collogue.cpu import ReferenceEngine

            return ReferenceEngine(self._group, self._capacity)
        from collogue.cuda import KernelEngine

        return KernelEngine(self._group, self._capacity, self.topology, self.timeout)

    def all_reduce(
        self,
        partial: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        out: Output | None = None,
    ) -> Output:
        """Sum ``partial`` over the group, add the residual, normalise and quantise each row.

        ``s = x_0 + x_1 + ..; y = round(s + residual); n = norm(y); codes, scales = quant(n)``

        Args:
            partial: ``[T, H]``, the communicator's dtype, row-contiguous, 16-byte aligned. This rank's term; not modified.
            residual: ``[T, H]``, same dtype. The same values on every rank.
            norm: :class:`collogue.RMSNorm`. Without one, ``quant`` quantises ``y``.
            quant: :class:`collogue.NVFP4`, ``MXFP4``, ``MXFP8``, ``FP8Static``, ``FP8PerToken`` or ``FP8Group``.
            keep_norm: also return the norm beside its codes.
            out: tensors to write, exactly those the call returns; ``out.residual`` may be ``residual``.
        Returns:
            :class:`collogue.Output`: ``reduced`` or ``residual`` (y), ``norm``, ``codes``, ``scales``; identical bits on
            every rank. The tensors are the caller's: no later call writes them.
        Order and rounding:
            Adds in float32 from +0, rank 0 first. ``y`` is rounded once and the norm reads the rounded value;
            quantisation reads the rounded norm. The launch shape and the batch never change a bit (docs/contract.md).
        Synchronisation:
            Collective: every rank calls with the same arguments in the same order. Runs on the current stream, may be
            captured in a CUDA graph after :meth:`prepare`. ``T = 0`` returns empty tensors and communicates nothing.
            Weights and scale tensors are read before the preceding kernel has finished if that kernel launches its
            dependents early (PDL): do not write them there.
        Raises:
            ArgumentError (its subclasses) before anything is launched; ClosedError; NotPrepared; CollectiveError.
        """
        engine = self._open()
        call = check_call(self._capacity, partial, residual, norm, quant, keep_norm)
        if out is not None:
            check_out(call, out)
        if call.tokens == 0:
            return out if out is not None else allocate(call)
        return engine.run(call, out)

    def prepare(
        self,
        tokens: int | Iterable[int],
        *,
        residual: bool = True,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        hidden_size: int | None = None,
    ) -> None:
        """Build and load the kernels that calls of these shapes need, on all ranks. Collective.

        Call it before capturing a CUDA graph. ``norm`` and ``quant`` are as in :meth:`all_reduce`; their values do not matter.
        """
        engine = self._open()
        counts = [tokens] if isinstance(tokens, int) else list(tokens)
        engine.prepare([self._request(t, residual, norm, quant, keep_norm, hidden_size) for t in counts])
        self._group.barrier()

    def fits(self, tokens: int, hidden_size: int | None = None) -> bool:
        """Whether a call of this many tokens (and this hidden size) is within the capacity. Exact."""
        width = self.hidden_size if hidden_size is None else hidden_size
        return 0 <= tokens <= self.max_tokens and 0 < width <= self.hidden_size and width % 8 == 0

    def explain(
        self,
        tokens: int,
        *,
        residual: bool = True,
        norm: RMSNorm | bool = True,
        quant: Quant | None = None,
        keep_norm: bool = False,
        hidden_size: int | None = None,
    ) -> Plan:
        """The frozen plan of such a call: algorithm, launch shape, why, bytes sent, predicted time and floor."""
        self._open()
        return make_plan(self.topology, self._request(tokens, residual, norm or None, quant, keep_norm, hidden_size))

    def _request(
        self, tokens: int, residual: bool, norm: RMSNorm | bool | None, quant: Quant | None, keep_norm: bool, hidden_size: int | None
    ) -> Request:
        width = self.hidden_size if hidden_size is None else hidden_size
        if not self.fits(tokens, width):
            raise CapacityError(
                f"{tokens} tokens of hidden size {width} do not fit",
                hint=f"the communicator was made for {self.max_tokens} tokens of hidden size {self.hidden_size}",
            )
        if quant is not None:
            quant.check_hidden_size(width)
        has_norm = norm if isinstance(norm, bool) else norm is not None
        wide_weight = isinstance(norm, RMSNorm) and norm.weight.dtype != self.dtype
        wanted = Wanted.of(has_residual=residual, has_norm=has_norm, quant=quant, keep_norm=keep_norm)
        return Request(tokens, width, self.dtype, residual, has_norm, wide_weight, quant, wanted)

    def check(self) -> None:
        """Raise what a kernel of an earlier call found (:class:`CollectiveError`); return if there is nothing. Waits for no kernel."""
        self._open().check()

    def reset(self) -> None:
        """Make the communicator usable again after a :class:`CollectiveError`: clean workspace, failures forgotten.

        Synchronisation:
            Collective: every rank of the group calls it, and nothing between the failed call and this one. Waits for this
            rank's GPU and then for every rank. Outputs of failed calls stay undefined; calls captured in CUDA graphs stay valid.
        """
        self._open().reset()

    def close(self) -> None:
        """Give the workspace back. Collective; later calls raise :class:`ClosedError`."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _open(self) -> Engine:
        if self._engine is None:
            raise ClosedError("the communicator is closed", hint="make a new collogue.Communicator")
        return self._engine

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
