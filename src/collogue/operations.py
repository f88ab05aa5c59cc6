"""The operations of a communicator: what is computed, and the types of what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from collogue import ops
from collogue.calls.call import Call
from collogue.calls.capacity import Capacity, count_tokens
from collogue.calls.gather import check_gather
from collogue.calls.outputs import check_padding
from collogue.contract.prologue import Gated, Prologue
from collogue.contract.quant import FP8Static, Quant, Scaled
from collogue.contract.spec import Operation, Output, RMSNorm, as_rows
from collogue.engine import Engine
from collogue.ops import is_traced

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class _Finishing(TypedDict, total=False):
    out: Output | None
    write_padding: bool


class _Given(_Finishing, total=False):
    branch_norm: RMSNorm | None
    rows: Sequence[int] | None


class _Sharded(_Given, total=False):
    sharded: bool


class Operations:
    """The calls of :class:`collogue.Communicator`. An output is typed as a tensor where the call has it, else as ``None``."""

    name: str
    _capacity: Capacity
    _engine: Engine | None

    @overload
    def all_reduce(
        self, partial: Tensor | Prologue, *, residual: None = None, norm: None = None, quant: None = None, **more: Unpack[_Sharded]
    ) -> Output[Tensor, None, None, None, None]: ...
    @overload
    def all_reduce(
        self, partial: Tensor | Prologue, *, residual: None = None, norm: None = None, quant: FP8Static, **more: Unpack[_Sharded]
    ) -> Output[Tensor, None, None, Tensor, None]: ...
    @overload
    def all_reduce(
        self, partial: Tensor | Prologue, *, residual: None = None, norm: None = None, quant: Scaled, **more: Unpack[_Sharded]
    ) -> Output[Tensor, None, None, Tensor, Tensor]: ...
    @overload
    def all_reduce(
        self, partial: Tensor | Prologue, *, residual: Tensor, norm: None = None, quant: None = None, **more: Unpack[_Sharded]
    ) -> Output[None, Tensor, None, None, None]: ...
    @overload
    def all_reduce(
        self, partial: Tensor | Prologue, *, residual: Tensor, norm: None = None, quant: FP8Static, **more: Unpack[_Sharded]
    ) -> Output[None, Tensor, None, Tensor, None]: ...
    @overload
    def all_reduce(
        self, partial: Tensor | Prologue, *, residual: Tensor, norm: None = None, quant: Scaled, **more: Unpack[_Sharded]
    ) -> Output[None, Tensor, None, Tensor, Tensor]: ...
    @overload
    def all_reduce(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: None = None,
        keep_norm: bool = False,
        **more: Unpack[_Sharded],
    ) -> Output[None, Tensor, Tensor, None, None]: ...
    @overload
    def all_reduce(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: FP8Static,
        keep_norm: Literal[False] = False,
        **more: Unpack[_Sharded],
    ) -> Output[None, Tensor, None, Tensor, None]: ...
    @overload
    def all_reduce(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: FP8Static,
        keep_norm: Literal[True],
        **more: Unpack[_Sharded],
    ) -> Output[None, Tensor, Tensor, Tensor, None]: ...
    @overload
    def all_reduce(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: Scaled,
        keep_norm: Literal[False] = False,
        **more: Unpack[_Sharded],
    ) -> Output[None, Tensor, None, Tensor, Tensor]: ...
    @overload
    def all_reduce(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: Scaled,
        keep_norm: Literal[True],
        **more: Unpack[_Sharded],
    ) -> Output[None, Tensor, Tensor, Tensor, Tensor]: ...
    @overload
    def all_reduce(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        **more: Unpack[_Sharded],
    ) -> Output: ...
    def all_reduce(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        sharded: bool = False,
        out: Output | None = None,
        branch_norm: RMSNorm | None = None,
        rows: Sequence[int] | None = None,
        write_padding: bool = True,
    ) -> Output:
        """Sum ``partial`` over the group, add the residual, normalize and quantize each row.

        ``s = x_0 + x_1 + ..; y = round(s + residual); n = norm(y); codes, scales = quant(n)``

        Args:
            partial: ``[T, H]``, the communicator's dtype, row-contiguous, 16-byte aligned. This rank's term; not modified. Or
                :class:`collogue.ExpertCombine`, ``ExpertReduce`` or ``Gated``: the term is computed in the same kernel.
            residual: ``[T, H]``, same dtype. The same values on every rank.
            norm: :class:`collogue.RMSNorm`. Without one, ``quant`` quantizes ``y``.
            quant: a format: :class:`collogue.NVFP4`, ``FP8PerToken``, ...: the subclasses of :class:`collogue.Quant`.
            keep_norm: also return the norm beside its codes.
            sharded: every rank keeps only the rows of y that it owns (sequence parallelism): ``residual`` is ``[R, H]``, the rows
                ``owned_rows(T)``, and so is the y returned. Norm, codes and scales have all T rows on every rank; at least one of
                norm and quant is then needed.
            out: tensors to write, exactly those the call returns; ``out.residual`` may be ``residual``.
            branch_norm: a norm of the sum, before the residual is added (Gemma 2 and 3, OLMo 2, GLM-4):
                ``y = round(residual + round(branch_norm(round(s))))``. Needs a residual. Its weight is read with the inputs.
            rows: with ``sharded``: how many rows each rank owns (``owned_rows(rows=rows)``), in place of equal blocks. Python ints from 0,
                the same list on every rank; their sum is T. A captured graph keeps them.
            write_padding: ``False``, only with ``out``: the padding of ``out.scales`` need not be written. Each of its bytes is then 0 or
                what it was before. For an ``out`` that a call with as many tokens has written: its padding is still there, and a call
                saves up to 127 rows of zeros. Each rank for itself; may be captured. Without padding it changes nothing.
        Returns:
            :class:`collogue.Output`: ``reduced`` or ``residual`` (y), ``norm``, ``codes``, ``scales``; identical bits on
            every rank, and the same bits whether ``sharded`` or not. The tensors are the caller's: no later call writes them.
        Order and rounding:
            Adds in float32 from +0, rank 0 first. ``y`` is rounded once and the norm reads the rounded value;
            quantization reads the rounded norm. The launch shape and the batch never change a bit (docs/contract.md).
        Synchronization:
            Collective: every rank calls with the same arguments in the same order. Runs on the current stream, may be
            captured in a CUDA graph after :meth:`prepare`. ``T = 0`` returns empty tensors and communicates nothing.
            A norm's weight may be read before the preceding kernel has finished (PDL): it must have been written by a kernel
            that a kernel between it and this call has waited for, or be given as ``RMSNorm(weight, prefetch=False)``. All other
            inputs, scale tensors too, may be written by the preceding kernel.
        Raises:
            ArgumentError (its subclasses) before anything is launched; ClosedError; NotPrepared; CollectiveError.
        Examples:
            >>> comm.all_reduce(partial, residual=residual, norm=collogue.RMSNorm(weight), quant=collogue.FP8PerToken())
            Output(residual=bfloat16[4, 64], codes=float8_e4m3fn[4, 64], scales=float32[4, 1] on cpu)
        """
        return self._call(
            "sharded" if sharded else "all_reduce", partial, residual, norm, quant, keep_norm, out, branch_norm, rows, write_padding
        )

    @overload
    def reduce_scatter(
        self, partial: Tensor | Prologue, *, residual: None = None, norm: None = None, quant: None = None, **more: Unpack[_Given]
    ) -> Output[Tensor, None, None, None, None]: ...
    @overload
    def reduce_scatter(
        self, partial: Tensor | Prologue, *, residual: None = None, norm: None = None, quant: FP8Static, **more: Unpack[_Given]
    ) -> Output[Tensor, None, None, Tensor, None]: ...
    @overload
    def reduce_scatter(
        self, partial: Tensor | Prologue, *, residual: None = None, norm: None = None, quant: Scaled, **more: Unpack[_Given]
    ) -> Output[Tensor, None, None, Tensor, Tensor]: ...
    @overload
    def reduce_scatter(
        self, partial: Tensor | Prologue, *, residual: Tensor, norm: None = None, quant: None = None, **more: Unpack[_Given]
    ) -> Output[None, Tensor, None, None, None]: ...
    @overload
    def reduce_scatter(
        self, partial: Tensor | Prologue, *, residual: Tensor, norm: None = None, quant: FP8Static, **more: Unpack[_Given]
    ) -> Output[None, Tensor, None, Tensor, None]: ...
    @overload
    def reduce_scatter(
        self, partial: Tensor | Prologue, *, residual: Tensor, norm: None = None, quant: Scaled, **more: Unpack[_Given]
    ) -> Output[None, Tensor, None, Tensor, Tensor]: ...
    @overload
    def reduce_scatter(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: None = None,
        keep_norm: bool = False,
        **more: Unpack[_Given],
    ) -> Output[None, Tensor, Tensor, None, None]: ...
    @overload
    def reduce_scatter(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: FP8Static,
        keep_norm: Literal[False] = False,
        **more: Unpack[_Given],
    ) -> Output[None, Tensor, None, Tensor, None]: ...
    @overload
    def reduce_scatter(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: FP8Static,
        keep_norm: Literal[True],
        **more: Unpack[_Given],
    ) -> Output[None, Tensor, Tensor, Tensor, None]: ...
    @overload
    def reduce_scatter(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: Scaled,
        keep_norm: Literal[False] = False,
        **more: Unpack[_Given],
    ) -> Output[None, Tensor, None, Tensor, Tensor]: ...
    @overload
    def reduce_scatter(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm,
        quant: Scaled,
        keep_norm: Literal[True],
        **more: Unpack[_Given],
    ) -> Output[None, Tensor, Tensor, Tensor, Tensor]: ...
    @overload
    def reduce_scatter(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        **more: Unpack[_Given],
    ) -> Output: ...
    def reduce_scatter(
        self,
        partial: Tensor | Prologue,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        out: Output | None = None,
        branch_norm: RMSNorm | None = None,
        rows: Sequence[int] | None = None,
        write_padding: bool = True,
    ) -> Output:
        """The rows of :meth:`all_reduce` that this rank owns, and no others: its first half, for engines that gather later.

        ``y = round(s[own] + residual); n = norm(y); codes, scales = quant(n)``, ``own = owned_rows(T)``, R of them.

        Args:
            partial: ``[T, H]``, all rows of this rank's term, as for :meth:`all_reduce`.
            residual: ``[R, H]``, same dtype: the rows of the residual that this rank owns.
            norm, quant, keep_norm, branch_norm: as for :meth:`all_reduce`.
            rows: how many rows each rank owns, in place of equal blocks, as for :meth:`all_reduce`; then ``own = owned_rows(rows=rows)``.
            out: tensors to write, exactly those the call returns; ``out.residual`` may be ``residual``.
            write_padding: as for :meth:`all_reduce`.
        Returns:
            :class:`collogue.Output`, each tensor with R rows: the bits that :meth:`all_reduce` has in these rows. Scales are in the layout
            of a tensor of R rows. R may be 0 (T < N); such a rank calls like all others. The tensors are the caller's.
        Order and rounding:
            Those of :meth:`all_reduce`.
        Synchronization:
            Collective, as :meth:`all_reduce`; ``T = 0`` communicates nothing.
        Raises:
            ArgumentError (its subclasses) before anything is launched; ClosedError; NotPrepared; CollectiveError.
        Examples:
            >>> comm.reduce_scatter(partial, residual=comm.shard(residual))
            Output(residual=bfloat16[4, 64] on cpu)
        """
        return self._call("reduce_scatter", partial, residual, norm, quant, keep_norm, out, branch_norm, rows, write_padding)

    def all_gather(
        self,
        shard: Output,
        tokens: int | None = None,
        *,
        quant: Quant | None = None,
        out: Output | None = None,
        rows: Sequence[int] | None = None,
        write_padding: bool = True,
    ) -> Output:
        """Give every rank the rows of all ranks: the second half of ``all_reduce(sharded=True)``.

        ``x = [shard of rank 0; shard of rank 1; ..]`` for every tensor that the shard holds.

        Args:
            shard: :class:`collogue.Output` with any of ``reduced``, ``residual``, ``norm`` (``[R, H]``, the communicator's dtype), and
                ``codes`` with their ``scales`` as :meth:`reduce_scatter` returns them; R is the length of ``owned_rows(tokens)``.
            tokens: T, the rows of all ranks together. May be left out where ``rows`` is given.
            quant: the format of codes and scales; its own scale is not read. ``None`` where the shard has no codes.
            out: tensors to write, exactly those that the shard holds; they share no memory with it.
            rows: how many rows each rank owns, in place of equal blocks, as for :meth:`all_reduce`.
            write_padding: as for :meth:`all_reduce`.
        Returns:
            :class:`collogue.Output` with the tensors that the shard holds, of T rows, the same on every rank. Scales go from the layout
            of R rows into that of T rows; all padding is zero. The tensors are the caller's.
        Order and rounding:
            Moves bits, any pattern; nothing is rounded.
        Synchronization:
            Collective, as :meth:`all_reduce`: every rank's shard holds the same tensors. ``T = 0`` communicates nothing.
        Raises:
            ArgumentError (its subclasses) before anything is launched; ClosedError; NotPrepared; CollectiveError.
        Examples:
            >>> shard = comm.reduce_scatter(partial, residual=comm.shard(residual))
            >>> comm.all_gather(shard, tokens=4)
            Output(residual=bfloat16[4, 64] on cpu)
        """
        if is_traced():
            split = as_rows(rows, self._capacity.world_size)
            check_padding(write_padding, out)
            return ops.gather(self.name, shard, count_tokens(tokens, split), quant, out, split)
        self._open()  # closed is the first thing that can be wrong
        return self._run(check_gather(self._capacity, shard, tokens, quant, rows, write_padding), out)

    @overload
    def finish(
        self, y: Tensor | Gated, *, norm: RMSNorm, quant: None = None, keep_norm: bool = False, **more: Unpack[_Finishing]
    ) -> Output[None, None, Tensor, None, None]: ...
    @overload
    def finish(
        self, y: Tensor | Gated, *, norm: None = None, quant: FP8Static, **more: Unpack[_Finishing]
    ) -> Output[None, None, None, Tensor, None]: ...
    @overload
    def finish(
        self, y: Tensor | Gated, *, norm: None = None, quant: Scaled, **more: Unpack[_Finishing]
    ) -> Output[None, None, None, Tensor, Tensor]: ...
    @overload
    def finish(
        self, y: Tensor | Gated, *, norm: RMSNorm, quant: FP8Static, keep_norm: Literal[False] = False, **more: Unpack[_Finishing]
    ) -> Output[None, None, None, Tensor, None]: ...
    @overload
    def finish(
        self, y: Tensor | Gated, *, norm: RMSNorm, quant: FP8Static, keep_norm: Literal[True], **more: Unpack[_Finishing]
    ) -> Output[None, None, Tensor, Tensor, None]: ...
    @overload
    def finish(
        self, y: Tensor | Gated, *, norm: RMSNorm, quant: Scaled, keep_norm: Literal[False] = False, **more: Unpack[_Finishing]
    ) -> Output[None, None, None, Tensor, Tensor]: ...
    @overload
    def finish(
        self, y: Tensor | Gated, *, norm: RMSNorm, quant: Scaled, keep_norm: Literal[True], **more: Unpack[_Finishing]
    ) -> Output[None, None, Tensor, Tensor, Tensor]: ...
    @overload
    def finish(
        self,
        y: Tensor | Gated,
        *,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        **more: Unpack[_Finishing],
    ) -> Output: ...
    def finish(
        self,
        y: Tensor | Gated,
        *,
        norm: RMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        out: Output | None = None,
        write_padding: bool = True,
    ) -> Output:
        """Normalize and quantize rows that are already summed: a model's first layer, whose input is an embedding and no partial sum.

        ``n = norm(y); codes, scales = quant(n)``

        Args:
            y: ``[T, H]``, the communicator's dtype, row-contiguous, 16-byte aligned. Not modified and not returned. Or
                :class:`collogue.Gated`: y is computed in the same kernel.
            norm, quant, keep_norm: as for :meth:`all_reduce`; at least one of norm and quant.
            out: tensors to write, exactly those the call returns.
            write_padding: as for :meth:`all_reduce`.
        Returns:
            :class:`collogue.Output`: ``norm``, ``codes``, ``scales``, the bits of :meth:`all_reduce` for the same y. The tensors are
            the caller's.
        Order and rounding:
            Those of :meth:`all_reduce` from y on.
        Synchronization:
            None: each rank for itself, any number of rows up to ``max_tokens``, of any width. Runs on the current stream, may be
            captured after :meth:`prepare`.
        Raises:
            ArgumentError (its subclasses) before anything is launched; ClosedError; NotPrepared.
        Examples:
            >>> comm.finish(residual, norm=collogue.RMSNorm(weight), quant=collogue.FP8PerToken())
            Output(codes=float8_e4m3fn[4, 64], scales=float32[4, 1] on cpu)
        """
        return self._call("finish", y, None, norm, quant, keep_norm, out, write_padding=write_padding)

    def _call(
        self,
        operation: Operation,
        partial: Tensor | Prologue,
        residual: Tensor | None,
        norm: RMSNorm | None,
        quant: Quant | None,
        keep_norm: bool,
        out: Output | None,
        branch_norm: RMSNorm | None = None,
        rows: Sequence[int] | None = None,
        write_padding: bool = True,
    ) -> Output:
        engine = None if _is_dynamo_compiling() else self._engine
        split = None if rows is None else as_rows(rows, self._capacity.world_size)
        if engine is not None and branch_norm is None:  # what most calls come to: its arguments are not put together first
            done = engine.latest(operation, partial, residual, norm, quant, keep_norm, out, split, write_padding)
            if done is not None:
                return done
        call = Call(partial, residual, norm, quant, keep_norm, operation, branch_norm=branch_norm, rows=split, write_padding=write_padding)
        if engine is not None:
            done = engine.quick(call, out)
            if done is not None:
                return done
        return ops.call(self.name, call, out) if is_traced() else self._run(call, out)

    def _open(self) -> object:
        """Raise :class:`ClosedError` where the communicator is closed."""
        raise NotImplementedError

    def _run(self, call: Call, out: Output | None = None) -> Output:
        """Check the call and run it."""
        raise NotImplementedError
