"""Modules for tensor-parallel models: linear layers cut by rank, and norms that a fused call has already taken.

Weights are cut when a module is made from an unsharded one (``of``); the communicator says which rank this is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from collogue.calls.call import ALIGNMENT, check_no_grad
from collogue.communicator import Communicator
from collogue.contract.prologue import PROLOGUES, Prologue
from collogue.contract.quant import Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.contract.weight import FP8Block, QuantizedWeight, WeightFormat
from collogue.errors import ArgumentError
from collogue.functions import gated
from collogue.ops import is_traced
from collogue.pytorch.cut import Cut
from collogue.pytorch.plain import check_linear
from collogue.pytorch.scaled import Handover, Linear, ScaledLinear

__all__ = [
    "ColumnParallelLinear",
    "FP8Block",
    "FusedRMSNorm",
    "QuantizedWeight",
    "RowParallelLinear",
    "ScaledLinear",
    "finish",
    "gated",
    "gather_columns",
]


def _plain(linear: nn.Linear, comm: Communicator, dim: int) -> Cut:
    """How to cut a plain linear layer's weight along ``dim``."""
    check_linear(linear, "the layer")
    return Cut.even(linear.weight.shape[dim], dim, comm.world_size, "weight")


def _part(linear: nn.Linear, comm: Communicator, cut: Cut, format: WeightFormat | None) -> Tensor | QuantizedWeight:
    """This rank's part of the weight. It is quantized whole, so that no code depends on the number of ranks."""
    if format is None:
        return cut.part(linear.weight, comm.rank, comm.world_size)
    return QuantizedWeight.of(linear.weight, format).part(cut, comm.rank, comm.world_size, "the layer's weight")


class _Parallel(Linear):
    """A linear layer with a communicator, whose kernels quantize on GPUs."""

    comm: Communicator

    def quantized(self, rows: Tensor, quant: Quant) -> tuple[Tensor, Tensor | None]:
        """As :func:`collogue.quantize`; on a GPU by :meth:`collogue.Communicator.finish`, a kernel with the same bits."""
        if not rows.is_cuda or rows.dtype != self.comm.dtype or rows.shape[0] > self.comm.max_tokens:
            return super().quantized(rows, quant)
        out = self.comm.finish(rows.contiguous(), quant=quant)
        assert out.codes is not None
        return out.codes, out.scales


class ColumnParallelLinear(_Parallel):
    """``x W_r^T + b_r``: this rank's output features of a linear layer, ``[.., O / N]``; with ``gather``, all of them, ``[.., O]``.

    Args:
        weight: ``[O / N, I]``, this rank's rows, quantized or not. bias: ``[O / N]`` or ``None``.
        gather: put the ranks' features together (collective). Needs a ``torch.distributed`` group.
        activation: the format of ``x``, as in :class:`ScaledLinear`; ``None``: it is not quantized.
        dtype: of the result where ``x`` is an :class:`collogue.Output`.
    Examples:
        >>> up = collogue.nn.ColumnParallelLinear.of(torch.nn.Linear(64, 128, dtype=torch.bfloat16), comm)
        >>> up(torch.ones(4, 64).bfloat16()).shape[1] == 128 // comm.world_size
        True
    """

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        comm: Communicator,
        *,
        gather: bool = False,
        activation: Quant | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, bias, activation, dtype)
        self.comm, self.gather = comm, gather

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        comm: Communicator,
        *,
        gather: bool = False,
        format: WeightFormat | None = None,
        activation: Quant | None = None,
    ) -> ColumnParallelLinear:
        """This rank's part of an unsharded layer, its weight quantized to ``format`` if that is given.

        Raises :class:`ShapeError` where its features do not divide, or its parts do not end at blocks of scales,
        :class:`ArgumentError` where it is not a plain ``nn.Linear``: a subclass with a forward of its own, a quantized layer, one with
        hooks.
        """
        cut = _plain(linear, comm, 0)
        bias = None if linear.bias is None else cut.part(linear.bias, comm.rank, comm.world_size)
        return cls(_part(linear, comm, cut, format), bias, comm, gather=gather, activation=activation, dtype=linear.weight.dtype)

    def forward(self, x: Tensor | Output) -> Tensor:
        mine = self.product(x, self.bias)
        return gather_columns(mine, self.comm) if self.gather else mine


class RowParallelLinear(_Parallel):
    """``sum_r x_r W_r^T + b``, finished in the same call: residual, RMSNorm, quantization.

    Args:
        weight: ``[H, I / N]``, this rank's columns, quantized or not. bias: ``[H]`` or ``None``, the same on every rank; rank 0 adds it
            to its partial.
        activation: the format of ``x``, as in :class:`ScaledLinear`; ``None``: it is not quantized.
    Examples:
        >>> down = collogue.nn.RowParallelLinear.of(torch.nn.Linear(128, 64, dtype=torch.bfloat16), comm)
        >>> mine = torch.ones(4, 128 // comm.world_size).bfloat16()
        >>> out = down(mine, residual=residual, norm=collogue.RMSNorm(weight))
        >>> (list(out.residual.shape), list(out.norm.shape))
        ([4, 64], [4, 64])
    """

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        comm: Communicator,
        *,
        activation: Quant | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, bias, activation, dtype)
        self.comm = comm

    @classmethod
    def of(
        cls, linear: nn.Linear, comm: Communicator, *, format: WeightFormat | None = None, activation: Quant | None = None
    ) -> RowParallelLinear:
        """This rank's part of an unsharded layer. Raises as :meth:`ColumnParallelLinear.of`."""
        cut = _plain(linear, comm, 1)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(_part(linear, comm, cut, format), bias, comm, activation=activation, dtype=linear.weight.dtype)

    def partial(self, x: Tensor | Output) -> Tensor:
        """This rank's term of the sum, ``[.., H]``."""
        return self.product(x, self.bias if self.comm.rank == 0 else None)

    def forward(
        self,
        x: Tensor | Output,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm | FusedRMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
        branch_norm: RMSNorm | FusedRMSNorm | None = None,
    ) -> Output:
        """``x`` is ``[.., I / N]``. Everything else, and what comes back, is as in :meth:`collogue.Communicator.all_reduce`, with
        the leading dimensions of ``x``; ``codes`` and ``scales`` are those of ``[T, H]`` rows.
        """
        return finish(self.comm, self.partial(x), residual=residual, norm=norm, quant=quant, keep_norm=keep_norm, branch_norm=branch_norm)


class FusedRMSNorm(nn.Module):
    """An RMSNorm that a fused call before it has taken, as a rule.

    :func:`finish` takes it as ``norm=`` and may hand the result over (``hand_over=True``); the module then returns it when it is
    called with the very stream tensor that belongs to it. Called with anything else, or with that tensor changed in place since, it
    takes the norm itself, with the contract's bits. PyTorch counts such changes, but not under ``torch.compile``, nor of tensors made in
    inference mode.

    With :attr:`handover`, the norm is quantized: what it returns are codes, for the layers that share the hand-over.

    Examples:
        >>> norm = collogue.nn.FusedRMSNorm(weight, comm)
        >>> out = collogue.nn.finish(comm, partial, residual=residual, norm=norm, hand_over=True)
        >>> torch.equal(norm(out.residual), out.norm)  # handed over: nothing is computed
        True
    """

    def __init__(self, weight: Tensor, comm: Communicator, eps: float = 1e-6, weight_offset: float = 0.0, prefetch: bool = True) -> None:
        super().__init__()
        weight = weight.detach()
        aligned = type(weight) is not Tensor or weight.is_meta or weight.data_ptr() % ALIGNMENT == 0
        self.weight = nn.Parameter(weight if aligned else weight.clone(), False)  # files may hold weights off a boundary
        self.comm, self.eps, self.weight_offset, self.prefetch = comm, eps, weight_offset, prefetch
        self.handover: Handover | None = None
        self._ready: tuple[Tensor, int | None, Tensor] | None = None

    @property
    def variance_epsilon(self) -> float:
        """What transformers' norms call ``eps``."""
        return self.eps

    @variance_epsilon.setter
    def variance_epsilon(self, eps: float) -> None:
        self.eps = eps

    @property
    def quant(self) -> Quant | None:
        """The format of what it returns; ``None``: values."""
        return None if self.handover is None else self.handover.quant

    def result(self, out: Output, leading: tuple[int, ...]) -> Tensor:
        """What the module returns, ``[*leading, ..]``, from the outputs of a call with its description and format."""
        if self.handover is not None:
            return self.handover.give(out, leading)
        assert out.norm is not None
        return out.norm if out.norm.shape[:-1] == leading else out.norm.view(*leading, out.norm.shape[-1])

    @property
    def description(self) -> RMSNorm:
        """What a call takes as ``norm=``."""
        return RMSNorm(self.weight, self.eps, self.weight_offset, self.prefetch)

    def hand_over(self, stream: Tensor, normed: Tensor) -> None:
        """``normed`` is this norm of ``stream``; the next call will ask for it."""
        self._ready = stream, _changes(stream), normed

    def forward(self, stream: Tensor) -> Tensor:
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is stream and ready[1] == _changes(stream):
            return ready[2]
        out = self.comm.finish(stream.reshape(-1, stream.shape[-1]), norm=self.description, quant=self.quant)
        return self.result(out, stream.shape[:-1])


def _description(norm: RMSNorm | FusedRMSNorm | None) -> RMSNorm | None:
    return norm.description if isinstance(norm, FusedRMSNorm) else norm


def _changes(tensor: Tensor) -> int | None:
    """How many times the tensor was changed in place; ``None`` where nobody counts."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def gather_columns(x: Tensor, comm: Communicator) -> Tensor:
    """Every rank's ``[.., O / N]`` side by side: ``[.., O]``. Collective; moves bits only. GradError: ``x`` requires grad.

    Examples:
        >>> collogue.nn.gather_columns(partial, comm).shape[1] == 64 * comm.world_size
        True
    """
    if comm.world_size == 1:
        return x
    if torch.is_grad_enabled():
        check_no_grad(("the input", x))
    if is_traced():
        group: Any = comm.group_name
        from torch.distributed._functional_collectives import all_gather_tensor

        parts = all_gather_tensor(x.unsqueeze(0), 0, group)  # in another dimension PyTorch 2.11 cannot trace it
    else:
        parts = x.new_empty(comm.world_size, *x.shape)
        comm._group.all_gather(parts, x.contiguous())
    return parts.movedim(0, -2).reshape(*x.shape[:-1], -1)


def finish(
    comm: Communicator,
    partial: Tensor | Prologue,
    *,
    residual: Tensor | None = None,
    norm: RMSNorm | FusedRMSNorm | None = None,
    quant: Quant | None = None,
    keep_norm: bool = False,
    hand_over: bool = False,
    branch_norm: RMSNorm | FusedRMSNorm | None = None,
) -> Output:
    """:meth:`collogue.Communicator.all_reduce` for tensors with any number of leading dimensions, ``[.., H]``.

    ``partial`` may be a prologue; the leading dimensions are then those of ``residual``. ``hand_over`` gives the result to ``norm``,
    a :class:`FusedRMSNorm`, for its next call. Such a norm also says the format, where it has one.

    Examples:
        >>> out = collogue.nn.finish(comm, partial.view(2, 2, 64), norm=collogue.RMSNorm(weight))
        >>> list(out.norm.shape)
        [2, 2, 64]
    """
    taker = norm if hand_over and isinstance(norm, FusedRMSNorm) else None
    if isinstance(norm, FusedRMSNorm) and norm.quant is not None:
        if quant is not None:
            raise ArgumentError("the norm has a format of its own", hint="pass quant=None, or norm.description")
        quant = norm.quant
    elif taker is not None and quant is not None and not keep_norm:
        raise ArgumentError("hand_over=True with quant=: there is no norm to hand over", hint="pass keep_norm=True")
    if isinstance(partial, PROLOGUES):
        rows, shape = (-1, partial.hidden_size), (partial.tokens, partial.hidden_size) if residual is None else residual.shape
    else:
        rows, shape = (-1, partial.shape[-1]), partial.shape
    out = comm.all_reduce(
        partial if isinstance(partial, PROLOGUES) else partial.reshape(rows),
        residual=None if residual is None else residual.reshape(rows),
        norm=_description(norm),
        quant=quant,
        keep_norm=keep_norm,
        branch_norm=_description(branch_norm),
    )
    shaped = Output(
        reduced=None if out.reduced is None else out.reduced.view(shape),
        residual=None if out.residual is None else out.residual.view(shape),
        norm=None if out.norm is None else out.norm.view(shape),
        codes=out.codes,
        scales=out.scales,
    )
    if taker is not None:
        assert shaped.residual is not None
        taker.hand_over(shaped.residual, taker.result(shaped, shape[:-1]))
    return shaped
