"""Modules for tensor-parallel models: linear layers cut by rank, and norms that a fused call has already taken.

Weights are cut when a module is made from an unsharded one (``of``); the communicator says which rank this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.contract.prologue import PROLOGUES, Prologue
from collogue.contract.quant import Quant
from collogue.contract.spec import Output, RMSNorm
from collogue.errors import ArgumentError
from collogue.ops import is_traced
from collogue.pytorch.cut import Cut

#: Modules of hooks that only watch, and that this package itself puts on modules.
_HARMLESS = ("torch.utils.", "transformers.utils.output_capturing", "collogue.")


def changes_what_runs(*hooks: Mapping[int, Any]) -> bool:
    """Whether there is a hook that may look at, or change, what modules compute."""
    return any(not str(getattr(hook, "__module__", "")).startswith(_HARMLESS) for each in hooks for hook in each.values())


def own_ways(module: nn.Module) -> str:
    """What calling ``module`` does beside its class's forward, in words; empty where that is nothing."""
    forward = vars(module).get("forward")
    if forward is not None and not str(getattr(forward, "__module__", "")).startswith("collogue."):
        return "has a forward of its own"
    return "has a forward hook" if changes_what_runs(module._forward_hooks, module._forward_pre_hooks) else ""


def odd_parameter(parameter: Tensor) -> str:
    """Why a parameter cannot be cut, in words; empty where it can."""
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        return f"of another type than Tensor ({type(parameter.data).__name__})"
    return "" if parameter.is_floating_point() and not parameter.is_meta else f"of {parameter.dtype} on {parameter.device}"


def check_linear(linear: object, name: str) -> None:
    """Raise :class:`ArgumentError` for what does anything but ``x W^T + b`` with a plain ``W``: its parts would not add up."""
    problem = ""
    if (
        not isinstance(linear, nn.Linear)
        or type(linear).forward is not nn.Linear.forward
        or type(linear).__call__ is not nn.Module.__call__
    ):
        problem = f"is a {type(linear).__module__}.{type(linear).__qualname__}, not a plain nn.Linear"
    else:
        weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        if weight is None or bias is not linear.bias:
            problem = "computes its weight or bias"
        else:
            named = {"weight": weight} | ({} if bias is None else {"bias": bias})
            named = {"weight": weight} | ({} if bias is None else {"bias": bias})
            odd = [f"has a {each} {problem}" for each, parameter in named.items() if (problem := odd_parameter(parameter))]
            problem = odd[0] if odd else own_ways(linear)
    if problem:
        raise ArgumentError(
            f"{name} {problem}",
            hint="cut plain nn.Linear layers: merge adapters (merge_and_unload), do not quantize before, add hooks afterwards if at all",
        )


def _plain(linear: nn.Linear, comm: Communicator, dim: int) -> Cut:
    """How to cut a plain linear layer's weight along ``dim``."""
    check_linear(linear, "the layer")
    return Cut.even(linear.weight.shape[dim], dim, comm.world_size, "weight")


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
        """This rank's part of an unsharded layer.

        Raises :class:`ShapeError` where its features do not divide, :class:`ArgumentError` where it is not a plain ``nn.Linear``: a
        subclass with a forward of its own, a quantized layer, one with hooks.
        """
        cut = _plain(linear, comm, 0)
        bias = None if linear.bias is None else cut.part(linear.bias, comm.rank, comm.world_size)
        return cls(cut.part(linear.weight, comm.rank, comm.world_size), bias, comm, gather=gather)

    def forward(self, x: Tensor) -> Tensor:
        mine = F.linear(x, self.weight, self.bias)
        return gather_columns(mine, self.comm) if self.gather else mine


class RowParallelLinear(nn.Module):
    """``sum_r x_r W_r^T + b``, finished in the same call: residual, RMSNorm, quantisation.

    Args:
        weight: ``[H, I / N]``, this rank's columns. bias: ``[H]`` or ``None``, the same on every rank; rank 0 adds it to its partial.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, comm: Communicator) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, False), None if bias is None else nn.Parameter(bias, False)
        self.comm = comm

    @classmethod
    def of(cls, linear: nn.Linear, comm: Communicator) -> RowParallelLinear:
        """This rank's part of an unsharded layer. Raises as :meth:`ColumnParallelLinear.of`."""
        cut = _plain(linear, comm, 1)
        return cls(cut.part(linear.weight, comm.rank, comm.world_size), None if linear.bias is None else linear.bias.detach(), comm)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's term of the sum, ``[.., H]``."""
        return F.linear(x, self.weight, self.bias if self.comm.rank == 0 else None)

    def forward(
        self,
        x: Tensor,
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
    takes the norm itself, with the contract's bits. PyTorch counts such changes, but not in inference mode or under ``torch.compile``.
    """

    def __init__(self, weight: Tensor, comm: Communicator, eps: float = 1e-6, weight_offset: float = 0.0, prefetch: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), False)
        self.comm, self.eps, self.weight_offset, self.prefetch = comm, eps, weight_offset, prefetch
        self._ready: tuple[Tensor, int | None, Tensor] | None = None

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
        normed = self.comm.finish(stream.reshape(-1, stream.shape[-1]), norm=self.description).norm
        assert normed is not None
        return normed.view(stream.shape)


def _description(norm: RMSNorm | FusedRMSNorm | None) -> RMSNorm | None:
    return norm.description if isinstance(norm, FusedRMSNorm) else norm


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
    a :class:`FusedRMSNorm`, for its next call.
    """
    taker = norm if hand_over and isinstance(norm, FusedRMSNorm) else None
    if taker is not None and quant is not None and not keep_norm:
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
        assert shaped.norm is not None
        taker.hand_over(shaped.residual, shaped.norm)
    return shaped
