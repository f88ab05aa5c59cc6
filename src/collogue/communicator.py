"""What people call: :class:`Communicator`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal

import torch

from collogue import ops, registry
from collogue.calls.call import check_call
from collogue.calls.capacity import Capacity, check_tokens
from collogue.calls.gather import check_gather
from collogue.contract.number import is_whole
from collogue.contract.quant import Quant
from collogue.contract.spec import Operation, Output, RMSNorm, owned_rows
from collogue.engine import Engine, make_engine, run
from collogue.errors import ArgumentError, CaptureError, ClosedError, CollogueError, ShapeError
from collogue.gpu.journal import Journal
from collogue.gpu.watch import Watch, while_alive
from collogue.group import as_group
from collogue.planning.plan import Plan, check_width, make_plan
from collogue.planning.table import TableArgument
from collogue.planning.topology import Overrides, Topology, agree


class Communicator:
    """Finishes transformer layers inside their all-reduce, for one tensor-parallel group.

    Args:
        group: the tensor-parallel process group (``torch.distributed.ProcessGroup``). Required: there is no default.
        max_tokens: most rows of one call.
        hidden_size: largest ``H`` of a call; a multiple of 8. Calls may be narrower.
        dtype: of partials, residual and norm: bfloat16, float16 or float32.
        device: the device of every tensor; default: this process's CUDA device if the group has NCCL, else the CPU.
        timeout: seconds that a kernel waits for a peer before it gives up; at most 4,500,000, and the same on every rank.
        algorithm: ``"one_shot"`` or ``"two_shot"`` for every ``all_reduce`` that the workspace has room for; default: what the
            plan expects to be faster. Never changes a bit.
        max_sms: maximum number of SMs that a call may use, to leave the others to a GEMM; default: all. Never changes a bit.
            ``max_multiprocessors`` is its deprecated name.
        cta_threads: most threads of a CTA; default: what the plan expects to be faster. Never changes a bit.
        table: a file that ``collogue tune`` wrote, of measured times for the plan; the same content on every rank. Default: what
            the variable ``COLLOGUE_TABLE`` names (empty: none), else the table that ``collogue tune`` left for this machine in the
            user's cache directory. ``False``: none. Never changes a bit (docs/tuning.md).
    Attributes:
        name: what graphs call it (``torch.ops.collogue``): the group's name and the dtype, numbered if that is taken.
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
        algorithm: Literal["one_shot", "two_shot"] | None = None,
        max_sms: int | None = None,
        cta_threads: int | None = None,
        table: TableArgument = None,
        max_multiprocessors: int | None = None,
    ) -> None:
        if max_multiprocessors is not None:
            warnings.warn("max_multiprocessors is deprecated: use max_sms", DeprecationWarning, stacklevel=2)
            max_sms = max_multiprocessors if max_sms is None else max_sms
        self._engine: Engine | None = None
        self._group = as_group(group, device)
        self.rank, self.world_size, self.device = self._group.rank, self._group.size, self._group.device
        self.max_tokens, self.hidden_size, self.dtype, self.timeout = max_tokens, hidden_size, dtype, timeout
        self._capacity = Capacity(max_tokens, hidden_size, dtype, self.device, self.world_size, self.rank)
        self._capacity.check()
        overrides = Overrides(algorithm, max_sms, cta_threads)
        self.topology: Topology = agree(self._group, self._capacity, timeout, overrides, table)
        check_width(self.topology, hidden_size)
        self._engine = make_engine(self._group, self.topology, timeout)
        self.group_name = self._group.name
        self.name = registry.register(self, self.group_name)

    def all_reduce(
        self,
        partial: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        sharded: bool = False,
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
            sharded: every rank keeps only the rows of y that it owns (sequence parallelism): ``residual`` is ``[R, H]``, the rows
                ``owned_rows(T)``, and so is the y returned. Norm, codes and scales have all T rows on every rank; at least one of
                norm and quant is then needed.
            out: tensors to write, exactly those the call returns; ``out.residual`` may be ``residual``.
        Returns:
            :class:`collogue.Output`: ``reduced`` or ``residual`` (y), ``norm``, ``codes``, ``scales``; identical bits on
            every rank, and the same bits whether ``sharded`` or not. The tensors are the caller's: no later call writes them.
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
        return self._call("sharded" if sharded else "all_reduce", partial, residual, norm, quant, keep_norm, out)

    def reduce_scatter(
        self,
        partial: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        out: Output | None = None,
    ) -> Output:
        """The rows of :meth:`all_reduce` that this rank owns, and no others: its first half, for engines that gather later.

        ``y = round(s[rows] + residual); n = norm(y); codes, scales = quant(n)``, ``rows = owned_rows(T)``, R of them.

        Args:
            partial: ``[T, H]``, all rows of this rank's term, as for :meth:`all_reduce`.
            residual: ``[R, H]``, same dtype: the rows of the residual that this rank owns.
            norm, quant, keep_norm: as for :meth:`all_reduce`.
            out: tensors to write, exactly those the call returns; ``out.residual`` may be ``residual``.
        Returns:
            :class:`collogue.Output`, each tensor with R rows: the bits that :meth:`all_reduce` has in these rows. Scales are in the layout
            of a tensor of R rows. R may be 0 (T < N); such a rank calls like all others. The tensors are the caller's.
        Order and rounding:
            Those of :meth:`all_reduce`.
        Synchronisation:
            Collective, as :meth:`all_reduce`; ``T = 0`` communicates nothing.
        Raises:
            ArgumentError (its subclasses) before anything is launched; ClosedError; NotPrepared; CollectiveError.
        """
        return self._call("reduce_scatter", partial, residual, norm, quant, keep_norm, out)

    def all_gather(self, shard: Output, tokens: int, *, quant: Quant | None = None, out: Output | None = None) -> Output:
        """Give every rank the rows of all ranks: the second half of ``all_reduce(sharded=True)``.

        ``x = [shard of rank 0; shard of rank 1; ..]`` for every tensor that the shard holds.

        Args:
            shard: :class:`collogue.Output` with any of ``reduced``, ``residual``, ``norm`` (``[R, H]``, the communicator's dtype), and
                ``codes`` with their ``scales`` as :meth:`reduce_scatter` returns them; R is the length of ``owned_rows(tokens)``.
            tokens: T, the rows of all ranks together.
            quant: the format of codes and scales; its own scale is not read. ``None`` where the shard has no codes.
            out: tensors to write, exactly those that the shard holds; they share no memory with it.
        Returns:
            :class:`collogue.Output` with the tensors that the shard holds, of T rows, the same on every rank. Scales go from the layout
            of R rows into that of T rows; all padding is zero. The tensors are the caller's.
        Order and rounding:
            Moves bits, any pattern; nothing is rounded.
        Synchronisation:
            Collective, as :meth:`all_reduce`: every rank's shard holds the same tensors. ``T = 0`` communicates nothing.
        Raises:
            ArgumentError (its subclasses) before anything is launched; ClosedError; NotPrepared; CollectiveError.
        """
        if ops.is_traced():
            return ops.gather(self.name, shard, tokens, quant, out)
        return run(self._open(), check_gather(self._capacity, shard, tokens, quant), out)

    def finish(
        self,
        y: torch.Tensor,
        *,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        out: Output | None = None,
    ) -> Output:
        """Normalise and quantise rows that are already summed: a model's first layer, whose input is an embedding and no partial sum.

        ``n = norm(y); codes, scales = quant(n)``

        Args:
            y: ``[T, H]``, the communicator's dtype, row-contiguous, 16-byte aligned. Not modified and not returned.
            norm, quant, keep_norm: as for :meth:`all_reduce`; at least one of norm and quant.
            out: tensors to write, exactly those the call returns.
        Returns:
            :class:`collogue.Output`: ``norm``, ``codes``, ``scales``, the bits of :meth:`all_reduce` for the same y. The tensors are
            the caller's.
        Order and rounding:
            Those of :meth:`all_reduce` from y on.
        Synchronisation:
            None: each rank for itself, any number of rows up to ``max_tokens``. Runs on the current stream, may be captured after
            :meth:`prepare`.
        Raises:
            ArgumentError (its subclasses) before anything is launched; ClosedError; NotPrepared.
        """
        return self._call("finish", y, None, norm, quant, keep_norm, out)

    def _call(
        self,
        operation: Operation,
        partial: torch.Tensor,
        residual: torch.Tensor | None,
        norm: RMSNorm | None,
        quant: Quant | None,
        keep_norm: bool,
        out: Output | None,
    ) -> Output:
        if ops.is_traced():
            return ops.call(self.name, operation, partial, residual, norm, quant, keep_norm, out)
        return run(self._open(), check_call(self._capacity, partial, residual, norm, quant, keep_norm, operation), out)

    def owned_rows(self, tokens: int, rank: int | None = None) -> range:
        """The rows of ``tokens`` that ``rank`` (default: this rank) owns.

        ``[min(rank * B, T), min((rank + 1) * B, T))``, ``B = ceil(T / N)``: blocks in rank order, the last ones shorter or empty. A pure
        function of T, N and the rank, the same for :meth:`all_reduce` with ``sharded``, :meth:`reduce_scatter` and :meth:`all_gather`.
        """
        check_tokens(tokens)
        if rank is not None and not (is_whole(rank) and 0 <= rank < self.world_size):
            raise ArgumentError(f"there is no rank {rank!r}", hint=f"ranks of this group are 0 to {self.world_size - 1}")
        return owned_rows(tokens, self.world_size, self.rank if rank is None else rank)

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of ``x`` (``[T, ..]``) that this rank owns: a view, ``[R, ..]``. No communication."""
        if not isinstance(x, torch.Tensor) or x.ndim == 0:
            raise ShapeError("shard takes a tensor of rows", hint="pass [T, H], T the tokens of the whole")
        rows = self.owned_rows(x.shape[0])
        return x[rows.start : rows.stop]

    def unshard(self, shard: torch.Tensor, tokens: int) -> torch.Tensor:
        """The inverse of :meth:`shard`: ``[T, H]`` from every rank's ``[R, H]``, in the communicator's dtype, bit for bit.

        Synchronisation and errors are those of :meth:`all_gather`. The tensor is the caller's.
        """
        whole = self.all_gather(Output(residual=shard), tokens).residual
        assert whole is not None
        return whole

    def prepare(
        self,
        tokens: int | Iterable[int],
        *,
        residual: bool = True,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        hidden_size: int | None = None,
        operation: Operation = "all_reduce",
    ) -> None:
        """Build and load the kernels that calls of these shapes need, on all ranks. Collective.

        Call it before capturing a CUDA graph. ``norm`` and ``quant`` are as in :meth:`all_reduce`; their values do not matter.

        Args:
            tokens: T, the rows of the whole on every rank, also where a rank returns only those it owns.
            operation: ``"all_reduce"``, ``"sharded"`` (:meth:`all_reduce` with ``sharded=True``), ``"reduce_scatter"``, ``"all_gather"`` or
                ``"finish"``. For ``"all_gather"`` residual, norm and quant say what the shard holds (a residual or reduced; a norm; codes).
        """
        engine = self._open()
        self._refuse_capture("prepare")
        counts = list(tokens) if isinstance(tokens, Iterable) else [tokens]
        requests = [self._capacity.request(t, residual, norm, quant, keep_norm, hidden_size, operation) for t in counts]
        engine.prepare(map(self._capacity.signature, requests))
        self._group.barrier()

    def empty(
        self,
        tokens: int,
        *,
        residual: torch.Tensor | bool | None = None,
        norm: RMSNorm | bool | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        hidden_size: int | None = None,
        operation: Operation = "all_reduce",
    ) -> Output:
        """Outputs of such a call, uninitialised: allocated once, to be passed as ``out=`` to many calls.

        They lie in ordinary memory: every call writes each output once, straight to where it stays, so symmetric memory would save no copy.

        Args:
            tokens, operation: as in :meth:`prepare`.
            residual, norm, quant, keep_norm: as the call itself takes them; ``True`` stands for any residual or norm.
            hidden_size: H, default: the communicator's.
        Returns:
            :class:`collogue.Output`, the tensors that the call would return. They are the caller's.
        Synchronisation:
            None.
        Raises:
            ArgumentError (its subclasses); ClosedError.
        """
        self._open()
        there = isinstance(residual, torch.Tensor) or bool(residual)
        return self._capacity.signature(
            self._capacity.request(tokens, there, norm or None, quant, keep_norm, hidden_size, operation)
        ).empty()

    def fits(self, tokens: int, hidden_size: int | None = None) -> bool:
        """Whether a call of this many tokens (and this hidden size) is within the capacity. Exact, but for what a format asks of the width.

        A format's block must divide it, and on GPUs it is at most 16384 for an ``FP8Group`` whose size is not a power of two up to 256.
        Raises :class:`ShapeError` for what are no whole numbers.
        """
        return self._capacity.fits(tokens, hidden_size)

    def explain(
        self,
        tokens: int,
        *,
        residual: bool = True,
        norm: RMSNorm | bool = True,
        quant: Quant | None = None,
        keep_norm: bool = False,
        hidden_size: int | None = None,
        operation: Operation = "all_reduce",
    ) -> Plan:
        """The frozen plan of such a call: algorithm, why, launch shape and launches, predicted, least and measured time, bytes sent and
        bytes of workspace. ``print`` shows it line by line.

        ``tokens`` and ``operation`` are as in :meth:`prepare`.
        """
        self._open()
        return make_plan(self.topology, self._capacity.request(tokens, residual, norm or None, quant, keep_norm, hidden_size, operation))

    def check(self) -> None:
        """Raise what was found in an earlier call; return if there is nothing. Waits for no kernel.

        Looks at the failure record and, by a copy of the control words over a stream of its own, at what other ranks say of the
        group: a stop word, or marks of the last calls that differ. Every call looks at the record alone.

        Raises:
            CollectiveTimeout, MismatchedCall (also where ranks time out because an earlier call differed); CorruptedWorkspace where
            something has written over the control words; PlatformError where they cannot be read. With the environment variable
            ``COLLOGUE_DEBUG`` set, every call does the same.
        """
        self._open().check()

    def reset(self) -> None:
        """Make the communicator usable again after a :class:`CollectiveError`: clean workspace, failures forgotten.

        Synchronisation:
            Collective: every rank of the group calls it, and nothing between the failed call and this one. Waits for this
            rank's GPU and then for every rank. Outputs of failed calls stay undefined; calls captured in CUDA graphs stay valid.
        """
        engine = self._open()
        self._refuse_capture("reset")
        engine.reset()

    def watch(self, on_failure: Callable[[CollogueError], None], interval: float = 0.1) -> Watch:
        """Call ``on_failure(error)`` once, in a thread of its own, when something has failed: for replays of CUDA graphs.

        Does every ``interval`` seconds what :meth:`check` does, which waits for no kernel. Stop it before :meth:`reset`:
        the returned object has ``stop()`` and is a context manager. Closing or dropping the communicator ends it too, and is no failure.
        """
        self._open()
        return Watch(while_alive(self.check), on_failure, interval)

    def journal(self) -> Journal:
        """The last calls of every rank, read from the ranks' GPUs over a stream of its own. Waits for no kernel, is not collective."""
        return self._open().journal()

    def close(self, *, collective: bool = True) -> None:
        """Give the workspace back; later calls raise :class:`ClosedError`. Collective, unless ``collective=False``: after a rank has died.

        Not collective, no other rank may still be in a call that sends to this one. No graph that holds its calls may be replayed later.
        """
        self._refuse_capture("close")
        engine, self._engine = self._engine, None
        if engine is not None:
            registry.forget(self.name)
            engine.close(collective)

    def _refuse_capture(self, what: str) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise CaptureError(f"comm.{what}() under graph capture", hint="it meets the other ranks: call it before or after the capture")

    def _open(self) -> Engine:
        if self._engine is None:
            raise ClosedError("the communicator is closed", hint="make a new collogue.Communicator")
        return self._engine

    def __enter__(self) -> Communicator:
        return self

    # Not collectively where an error leaves the block: other ranks may not share it, and nothing must hide it.
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close(collective=error is None)
        except Exception:
            if error is None:
                raise
