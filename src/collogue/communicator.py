"""The public API: :class:`Communicator`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch

from collogue import registry
from collogue.calls.call import Call
from collogue.calls.capacity import Capacity, count_tokens
from collogue.contract.number import is_whole
from collogue.contract.prologue import Prologue, PrologueForm
from collogue.contract.quant import Quant
from collogue.contract.spec import Operation, Output, RMSNorm, as_rows, check_split, owned_rows
from collogue.engine import Engine, make_engine, run
from collogue.errors import ArgumentError, CaptureError, ClosedError, CollogueError, ShapeError
from collogue.gpu.journal import Journal
from collogue.gpu.watch import Watch, while_alive
from collogue.group import as_group, making
from collogue.operations import Operations
from collogue.planning.algorithm import AllReduceBy
from collogue.planning.host import plan_call
from collogue.planning.plan import Plan, check_width
from collogue.planning.table import TableArgument
from collogue.planning.topology import Order, Overrides, Topology, Transport, agree, check_terms


class Communicator(Operations):
    """All-reduces of one tensor-parallel group, with residual, RMSNorm and quantization in the same kernel.

    Args:
        group: the tensor-parallel process group (``torch.distributed.ProcessGroup``). Required: there is no default.
        max_tokens: maximum number of rows of one call.
        hidden_size: largest ``H`` of a call; a multiple of 8. Calls may be narrower.
        dtype: of partials, residual and norm: bfloat16, float16 or float32.
        device: the device of every tensor; default: this process's CUDA device if the group has NCCL, else the CPU.
        timeout: seconds that a call waits for a peer before it gives up; at most 4,500,000, and the same on every rank.
        algorithm: ``"one_shot"`` or ``"two_shot"`` for every ``all_reduce`` that the workspace has room for; default: what the
            plan expects to be faster. Never changes a bit.
        max_sms: maximum number of SMs that a call may use, to leave the others to a GEMM; default: all. Never changes a bit.
            ``max_multiprocessors`` is its deprecated name.
        concurrent: communicators of this GPU whose calls may run at a time, on streams of their own; the same on every rank, 1 to 16.
            Each then takes its part of the SMs and starts the next kernel of its stream late: with 1, two communicators that wait for
            their peers on full GPUs may keep each other from starting until the timeout. Costs about 0.6 us a call. Never changes a
            bit. Calls on one stream need 1, for any number of communicators (docs/reliability.md).
        cta_threads: maximum number of threads of a CTA; default: what the plan expects to be faster. Never changes a bit.
        table: a file that ``collogue tune`` wrote, of measured times for the plan; the same content on every rank. Default: what
            the variable ``COLLOGUE_TABLE`` names (empty: none), else the table that ``collogue tune`` left for this machine in the
            user's cache directory. ``False``: none. Never changes a bit (docs/tuning.md).
        transport: ``"peer"``: kernels write into each other's memory; ``"host"``: the group's own collectives move bytes, and kernels
            add and finish. Default: peer where every pair of ranks has peer access, else host (on the CPU, always). The same on every
            rank. Never changes a bit (docs/design.md).
        order: of a sum over several hosts. ``"islands"``: each island's ranks in rank order, then the islands' sums in order: the bits
            depend on the split into islands, and less crosses between them. ``"rank"``: all ranks in rank order. The same on every rank.
        wire: a format in which terms travel, and are decoded from in float32: ``collogue.FP8Group(128)``, ``MXFP8("ceil")`` or
            ``FP8PerToken()``. Half the bytes and less of this step; other bits of the sum, which ``collogue.reference`` gives for the
            same ``wire``. Default: none. The same on every rank. On GPUs the transport is then host.
    Attributes:
        islands: the split of the ranks that sums follow, by what the machine has: ``((0, 1), (2, 3))``; ``None``: rank order.
        name: what graphs call it (``torch.ops.collogue``): the group's name and the dtype, numbered if that is taken.
    Synchronization:
        Making one is collective: every rank of the group, with the same arguments. It waits for the others as long as the process
        group does (``init_process_group(timeout=)``), not ``timeout``: ranks may have loaded for minutes before.
    Raises:
        GroupError, PlatformError, ArgumentError.
    Examples:
        >>> comm = collogue.Communicator(group, max_tokens=16, hidden_size=64)
        >>> comm.all_reduce(partial, residual=residual, norm=collogue.RMSNorm(weight), quant=collogue.FP8PerToken())
        Output(residual=bfloat16[4, 64], codes=float8_e4m3fn[4, 64], scales=float32[4, 1] on cpu)
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
        algorithm: AllReduceBy | None = None,
        max_sms: int | None = None,
        cta_threads: int | None = None,
        concurrent: int = 1,
        table: TableArgument = None,
        max_multiprocessors: int | None = None,
        transport: Transport | None = None,
        order: Order = "islands",
        wire: Quant | None = None,
    ) -> None:
        if max_multiprocessors is not None:
            warnings.warn("max_multiprocessors is deprecated: use max_sms", DeprecationWarning, stacklevel=2)
            max_sms = max_multiprocessors if max_sms is None else max_sms
        self._engine: Engine | None = None
        self._group = as_group(group, device)
        self.rank, self.world_size, self.device = self._group.rank, self._group.size, self._group.device
        self.max_tokens, self.hidden_size, self.dtype, self.timeout = max_tokens, hidden_size, dtype, timeout
        self._capacity = Capacity(max_tokens, hidden_size, dtype, self.device, self.world_size, self.rank, wire)
        self._capacity.check()
        overrides = Overrides(algorithm, max_sms, cta_threads)
        with making(self._group):
            way: dict[str, Any] = {"concurrent": concurrent, "transport": transport, "order": order, "wire": wire}
            self.topology: Topology = agree(self._group, self._capacity, timeout, overrides, table, **way)
            self.islands = self.topology.sums
            check_width(self.topology, hidden_size)
            check_terms(self.topology)
            self.group_name = self._group.name
            self.name = registry.register(self, self.group_name)
            try:
                self._engine = make_engine(self._group, self.topology, timeout, self.name, wire)
            except BaseException:
                registry.forget(self.name)
                raise

    def _run(self, call: Call, out: Output | None = None) -> Output:
        return run(self._open(), self._capacity, call, out)

    def owned_rows(self, tokens: int | None = None, rank: int | None = None, *, rows: Sequence[int] | None = None) -> range:
        """The rows of ``tokens`` that ``rank`` (default: this rank) owns.

        ``[min(rank * B, T), min((rank + 1) * B, T))``, ``B = ceil(T / N)``: blocks in rank order, the last ones shorter or empty. A pure
        function of T, N and the rank, the same for :meth:`all_reduce` with ``sharded``, :meth:`reduce_scatter` and :meth:`all_gather`.

        With ``rows``, how many each rank owns: ``[S, S + rows[rank])``, ``S = rows[0] + .. + rows[rank - 1]``. Python ints from 0, the same
        list on every rank; their sum is T, and ``tokens`` may then be left out.

        Examples:
            >>> comm.owned_rows(4)
            range(0, 4)
        """
        split = as_rows(rows, self.world_size)
        tokens = count_tokens(tokens, split)
        check_split("sharded", tokens, split)
        if rank is not None and not (is_whole(rank) and 0 <= rank < self.world_size):
            raise ArgumentError(f"there is no rank {rank!r}", hint=f"ranks of this group are 0 to {self.world_size - 1}")
        return owned_rows(tokens, self.world_size, self.rank if rank is None else rank, split)

    def shard(self, x: torch.Tensor, *, rows: Sequence[int] | None = None) -> torch.Tensor:
        """The rows of ``x`` (``[T, ..]``) that this rank owns: a view, ``[R, ..]``. ``rows`` as in :meth:`owned_rows`. No communication.

        Examples:
            >>> comm.shard(residual).shape
            torch.Size([4, 64])
        """
        if not isinstance(x, torch.Tensor) or x.ndim == 0:
            raise ShapeError("shard takes a tensor of rows", hint="pass [T, H], T the tokens of the whole")
        own = self.owned_rows(x.shape[0], rows=rows)
        return x[own.start : own.stop]

    def unshard(self, shard: torch.Tensor, tokens: int | None = None, *, rows: Sequence[int] | None = None) -> torch.Tensor:
        """The inverse of :meth:`shard`: ``[T, H]`` from every rank's ``[R, H]``, in the communicator's dtype, bit for bit.

        ``rows``, synchronization and errors are those of :meth:`all_gather`. The tensor is the caller's.

        Examples:
            >>> torch.equal(comm.unshard(comm.shard(residual), tokens=4), residual)
            True
        """
        whole = self.all_gather(Output(residual=shard), tokens, rows=rows).residual
        assert whole is not None
        return whole

    def prepare(
        self,
        tokens: int | Iterable[int] | None = None,
        *,
        residual: bool = True,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        hidden_size: int | None = None,
        operation: Operation = "all_reduce",
        prologue: Prologue | PrologueForm | None = None,
        branch_norm: RMSNorm | bool | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Build and load the kernels that calls of these shapes need, on all ranks. Collective.

        Call it before capturing a CUDA graph. ``norm``, ``branch_norm`` and ``quant`` are as in :meth:`all_reduce`;
        their values do not matter.

        Args:
            tokens: T, the rows of the whole on every rank, also where a rank returns only those it owns.
            operation: ``"all_reduce"``, ``"sharded"`` (:meth:`all_reduce` with ``sharded=True``), ``"reduce_scatter"``, ``"all_gather"`` or
                ``"finish"``. For ``"all_gather"`` residual, norm and quant say what the shard holds (a residual or reduced; a norm; codes).
            prologue: what stands in the place of the partial, or its :class:`collogue.PrologueForm`.
            rows: how many rows each rank owns, as the call takes it; their sum is T, and ``tokens`` may then be left out. One kernel does
                all lists in which the largest block is more than a grid can do at once, another those in which it is not.
        Examples:
            >>> norm, quant = collogue.RMSNorm(weight), collogue.FP8PerToken()
            >>> comm.prepare([1, 2, 4, 8], norm=norm, quant=quant)
        """
        engine = self._open()
        self._refuse_capture("prepare")
        counts = list(tokens) if isinstance(tokens, Iterable) else [tokens]
        requests = [
            self._capacity.request(t, residual, norm, quant, keep_norm, hidden_size, operation, prologue, branch_norm or None, rows)
            for t in counts
        ]
        engine.prepare(map(self._capacity.signature, requests))
        self._group.barrier()

    def empty(
        self,
        tokens: int | None = None,
        *,
        residual: torch.Tensor | bool | None = None,
        norm: RMSNorm | bool | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        hidden_size: int | None = None,
        operation: Operation = "all_reduce",
        prologue: Prologue | PrologueForm | None = None,
        branch_norm: RMSNorm | bool | None = None,
        rows: Sequence[int] | None = None,
    ) -> Output:
        """Outputs of such a call, uninitialized: allocated once, to be passed as ``out=`` to many calls.

        They lie in ordinary memory: every call writes each output once, straight to where it stays, so symmetric memory would save no copy.

        Args:
            tokens, operation, rows: as in :meth:`prepare`.
            residual, norm, quant, keep_norm: as the call itself takes them; ``True`` stands for any residual or norm.
            hidden_size: H, default: the communicator's.
            prologue: as in :meth:`prepare`.
        Returns:
            :class:`collogue.Output`, the tensors that the call would return. They are the caller's.
        Synchronization:
            None.
        Raises:
            ArgumentError (its subclasses); ClosedError.
        Examples:
            >>> out = comm.empty(4, residual=True)
            >>> comm.all_reduce(partial, residual=residual, out=out) is out
            True
        """
        self._open()
        there = isinstance(residual, torch.Tensor) or bool(residual)
        request = self._capacity.request(
            tokens, there, norm or None, quant, keep_norm, hidden_size, operation, prologue, branch_norm or None, rows
        )
        return self._capacity.signature(request).empty()

    def fits(self, tokens: int, hidden_size: int | None = None) -> bool:
        """Whether a call of this many tokens (and this hidden size) is within the capacity. Exact, but for what a format asks of the width.

        A format's block must divide it, and on GPUs it is at most 16384 for an ``FP8Group`` whose size is not a power of two up to 256.
        Raises :class:`ShapeError` for numbers that are not whole.

        Examples:
            >>> (comm.fits(16), comm.fits(17))
            (True, False)
        """
        return self._capacity.fits(tokens, hidden_size)

    def explain(
        self,
        tokens: int | None = None,
        *,
        residual: bool = True,
        norm: RMSNorm | bool = True,
        quant: Quant | None = None,
        keep_norm: bool = False,
        hidden_size: int | None = None,
        operation: Operation = "all_reduce",
        prologue: Prologue | PrologueForm | None = None,
        branch_norm: RMSNorm | bool | None = None,
        rows: Sequence[int] | None = None,
    ) -> Plan:
        """The frozen plan of such a call: algorithm, why, launch shape and launches, predicted, least and measured time, bytes sent and
        bytes of workspace. ``print`` shows it line by line.

        ``tokens``, ``operation``, ``prologue`` and ``rows`` are as in :meth:`prepare`.

        Examples:
            >>> plan = comm.explain(4, quant=collogue.FP8PerToken())
            >>> print(plan.algorithm)
            reference
        """
        self._open()
        request = self._capacity.request(
            tokens, residual, norm or None, quant, keep_norm, hidden_size, operation, prologue, branch_norm or None, rows
        )
        return plan_call(self.topology, request)

    def check(self) -> None:
        """Raise what was found in an earlier call; return if there is nothing. Waits for no kernel.

        Looks at the failure record and, by a copy of the control words over a stream of its own, at what other ranks have reported:
        an abort flag, or signatures of the last calls that differ. Every call looks at the record alone; with the environment variable
        ``COLLOGUE_DEBUG`` set, every call does the same as ``check``.

        On the host path over NCCL: at what the watchdog has found, and what the others have published so far. Calls that differ raise
        within about a tenth of a second, here or in the next call (docs/design.md).

        Raises:
            CollectiveTimeout: a rank was late.
            MismatchedCall: ranks made different calls (also where ranks time out because an earlier call differed).
            CorruptedWorkspace: something has written over the control words.
            PlatformError: the control words cannot be read.
        Examples:
            >>> comm.check()  # nothing has failed
        """
        self._open().check()

    def reset(self) -> None:
        """Make the communicator usable again after a :class:`CollectiveError`: clean workspace, failures forgotten.

        Synchronization:
            Collective: every rank of the group calls it, and nothing between the failed call and this one. Waits for this
            rank's GPU and then for every rank. Outputs of failed calls stay undefined; calls captured in CUDA graphs stay valid.
        Raises:
            CollectiveTimeout: a rank has not called it.
            PlatformError: on the host path over NCCL, the group was aborted to end calls that waited. Make a new one.
        Examples:
            >>> try:
            ...     out = comm.all_reduce(partial)
            ... except collogue.CollectiveError:
            ...     comm.reset()
        """
        engine = self._open()
        self._refuse_capture("reset")
        engine.reset()

    def watch(self, on_failure: Callable[[CollogueError], None], interval: float = 0.1) -> Watch:
        """Call ``on_failure(error)`` once, in a thread of its own, when something has failed: for replays of CUDA graphs.

        Does every ``interval`` seconds what :meth:`check` does, which waits for no kernel. Stop it before :meth:`reset`:
        the returned object has ``stop()`` and is a context manager. Closing or dropping the communicator ends it too, without a failure.

        Examples:
            >>> with comm.watch(lambda error: print(error.hint)):
            ...     out = comm.all_reduce(partial)
        """
        self._open()
        return Watch(while_alive(self.check), on_failure, interval)

    def journal(self) -> Journal:
        """The last calls of every rank, read from the ranks' GPUs over a stream of its own. Waits for no kernel, is not collective.

        Examples:
            >>> text = comm.journal().text(last=2)
        """
        return self._open().journal()

    def close(self, *, collective: bool = True) -> None:
        """Free the workspace; later calls raise :class:`ClosedError`. Collective, unless ``collective=False``: after a rank has died.

        Not collective, no other rank may still be in a call that sends to this one. No graph that holds its calls may be replayed later.

        Examples:
            >>> other = collogue.Communicator(group, max_tokens=16, hidden_size=64)
            >>> other.close()
        """
        self._refuse_capture("close")
        engine, self._engine = self._engine, None
        if engine is not None:
            registry.forget(self.name)
            engine.close(collective)
            del self._group  # a gloo group that outlives `destroy_process_group` may abort its process when the interpreter ends

    def __repr__(self) -> str:
        """``Communicator('0/bfloat16', rank 0 of 2 on cuda:0, at most 4096 x 7168 bfloat16)``."""
        state = ", closed" * (self._engine is None)
        most = f"at most {self.max_tokens} x {self.hidden_size} {str(self.dtype).removeprefix('torch.')}"
        return f"Communicator({self.name!r}, rank {self.rank} of {self.world_size} on {self.device}, {most}{state})"

    def __reduce__(self) -> NoReturn:
        """A communicator is one of a group of ranks: neither ``pickle`` nor ``copy`` can make another. Raises :class:`ArgumentError`."""
        raise ArgumentError(
            "a communicator cannot be copied or pickled", hint="make a collogue.Communicator on every rank, in the process that uses it"
        )

    def _refuse_capture(self, what: str) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise CaptureError(f"comm.{what}() under graph capture", hint="call it before or after the capture")

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
