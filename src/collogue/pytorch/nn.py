"""Modules for tensor-parallel models: linear layers cut by rank, and norms that a fused call has already taken.

Weights are cut when a module is made from an unsharded one (``of``); the communicator says which rank this is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.contract.quant import Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.errors import ArgumentError, ShapeError
from collogue.ops import is_traced


def shard(tensor: Tensor, comm: Communicator, dim: int, what: str) -> nn.Parameter:
    """This rank's part of a weight along ``dim``, in memory of its own layout. Raises :class:`ShapeError` where it does not divide."""
    size = tensor.shape[dim]
    if size % comm.world_size:
        raise ShapeError(f"{what}: {size} features do not divide among {comm.world_size} ranks", hint="use a world size that divides it")
    part = tensor.detach().chunk(comm.world_size, dim)[comm.rank]
    return nn.Parameter(part.contiguous(), requires_grad=False)


class ColumnParallelLinear(nn.Module):
    """``x W_r^T + b_r``: this rank's output features of a linear layer, ``[.., O / N]``; with ``gather``, all of them, ``[.., O]``.

    Args:
        weight: ``[O / N, I]``, this rank's rows. bias: ``[O / N]`` or ``None``.
        gather: put the ranks' features together (collective). Needs a ``torch.distributed`` group.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, comm: Communicator, *, gather: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, False), None if bias is None else nn.Parameter(bias, False)
        self.comm, self.gather = comm, gather

    @classmethod
    def of(cls, linear: nn.Linear, comm: Communicator, *, gather: bool = False) -> ColumnParallelLinear:
        """This rank's part of an unsharded layer."""
        bias = None if linear.bias is None else shard(linear.bias, comm, 0, "bias")
        return cls(shard(linear.weight, comm, 0, "weight"), bias, comm, gather=gather)

    def forward(self, x: Tensor) -> Tensor:
        mine = F.linear(x, self.weight, self.bias)
        return gather_columns(mine, self.comm) if self.gather else mine


class RowParallelLinear(nn.Module):
    """``sum_r x_r W_r^T + b``, finished in the same call: residual, RMSNorm, quantisation.

    Args:
        weight: ``[H, I / N]``, this rank's columns. bias: ``[H]`` or ``None``; rank 0 adds it to its partial.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, comm: Communicator) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, False)
        self.bias = nn.Parameter(bias, False) if bias is not None and comm.rank == 0 else None
        self.comm = comm

    @classmethod
    def of(cls, linear: nn.Linear, comm: Communicator) -> RowParallelLinear:
        """This rank's part of an unsharded layer."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(shard(linear.weight, comm, 1, "weight"), bias, comm)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's term of the sum, ``[.., H]``."""
        return F.linear(x, self.weight, self.bias)

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        norm: RMSNorm | FusedRMSNorm | None = None,
        quant: Quant | None = None,
        keep_norm: bool = False,
    ) -> Output:
        """``x`` is ``[.., I / N]``. Everything else, and what comes back, is as in :meth:`collogue.Communicator.all_reduce`, with
        the leading dimensions of ``x``; ``codes`` and ``scales`` are those of ``[T, H]`` rows.
        """
        return finish(self.comm, self.partial(x), residual=residual, norm=norm, quant=quant, keep_norm=keep_norm)


class FusedRMSNorm(nn.Module):
    """An RMSNorm that a fused call before it has taken, as a rule.

    :func:`finish` takes it as ``norm=`` and may hand the result over (``hand_over=True``); the module then returns it when it is
    called with the very stream tensor that belongs to it. Called with anything else, or with that tensor changed in place since, it
    takes the norm itself, with the contract's bits. PyTorch counts such changes, but not in inference mode or under ``torch.compile``.
    """

    def __init__(self, weight: Tensor, comm: Communicator, eps: float = 1e-6, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), False)
        self.comm, self.eps, self.weight_offset = comm, eps, weight_offset
        self._ready: tuple[Tensor, int | None, Tensor] | None = None

    @property
    def description(self) -> RMSNorm:
        """What a call takes as ``norm=``."""
        return RMSNorm(self.weight, self.eps, self.weight_offset)

    def hand_over(self, stream: Tensor, normed: Tensor) -> None:
        """``normed`` is this norm of ``stream``; the next call will ask for it."""
        self._ready = stream, _changes(stream), normed

    def forward(self, stream: Tensor) -> Tensor:
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is stream and ready[1] == _changes(stream):
            return ready[2]
        normed = self.comm.finish(stream.reshape(-1, stream.shape[-1]), norm=self.description).norm
        assert normed is not None
        return normed.view(stream.shape)


def _changes(tensor: Tensor) -> int | None:
    """How many times the tensor was changed in place; ``None`` where nobody counts."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def gather_columns(x: Tensor, comm: Communicator) -> Tensor:
    """Every rank's ``[.., O / N]`` side by side: ``[.., O]``. Collective; moves bits only."""
    if comm.world_size == 1:
        return x
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
    partial: Tensor,
    *,
    residual: Tensor | None = None,
    norm: RMSNorm | FusedRMSNorm | None = None,
    quant: Quant | None = None,
    keep_norm: bool = False,
    hand_over: bool = False,
) -> Output:
    """:meth:`collogue.Communicator.all_reduce` for tensors with any number of leading dimensions, ``[.., H]``.

    ``hand_over`` gives the result to ``norm``, a :class:`FusedRMSNorm`, for its next call.
    """
    taker = norm if hand_over and isinstance(norm, FusedRMSNorm) else None
    if taker is not None and quant is not None and not keep_norm:
        raise ArgumentError("hand_over=True with quant=: there is no norm to hand over", hint="pass keep_norm=True")
    rows = (-1, partial.shape[-1])
    out = comm.all_reduce(
        partial.reshape(rows),
        residual=None if residual is None else residual.reshape(rows),
        norm=norm.description if isinstance(norm, FusedRMSNorm) else norm,
        quant=quant,
        keep_norm=keep_norm,
    )
    shaped = Output(
        reduced=None if out.reduced is None else out.reduced.view(partial.shape),
        residual=None if out.residual is None else out.residual.view(partial.shape),
        norm=None if out.norm is None else out.norm.view(partial.shape),
        codes=out.codes,
        scales=out.scales,
    )
    if taker is not None:
        assert shaped.residual is not None
        assert shaped.norm is not None
        taker.hand_over(shaped.residual, shaped.norm)
    return shaped
