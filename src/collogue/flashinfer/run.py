"""One call of FlashInfer's as calls of a communicator: norm and format from its arguments, outputs in its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from collogue.contract.prologue import PROLOGUES, Prologue
from collogue.contract.spec import Output, RMSNorm, Wanted
from collogue.errors import ArgumentError, ShapeError
from collogue.flashinfer.outputs import place
from collogue.flashinfer.patterns import Form, quant_of
from collogue.flashinfer.workspace import TRTLLMAllReduceFusionWorkspace, workspace_of


@dataclass(frozen=True)
class Epilogue:
    """What a call does after the sum, and where it writes. ``scaling``: scale factor, layout code and group size.

    ``prefetch`` as of :class:`collogue.RMSNorm`.
    """

    residual: torch.Tensor | None
    weight: torch.Tensor | None
    eps: float
    weight_bias: float
    scaling: tuple[torch.Tensor | float | None, int | None, int | None]
    buffers: dict[str, torch.Tensor | None]
    prefetch: bool


def run(
    workspace: TRTLLMAllReduceFusionWorkspace, form: Form, term: torch.Tensor | Prologue, after: Epilogue, *, with_sum: bool = False
) -> Output:
    """One call of the communicator. FlashInfer records no gradients and takes weights that require them.

    ``term``: ``[T, H]``, or what it is computed from. ``with_sum``: the sum before the residual too, by a call of its own.
    """
    with torch.no_grad():
        quant = quant_of(form, *after.scaling)
        residual, norm = None, None
        if form.norm:
            if after.residual is None or after.weight is None:
                raise ArgumentError("residual_in and rms_gamma are required", hint="only pattern 0 (kAllReduce) goes without them")
            residual, norm = after.residual, RMSNorm(after.weight, after.eps, after.weight_bias, after.prefetch)
        wanted = Wanted.of(has_residual=form.norm, has_norm=form.norm, quant=quant, keep_norm=form.keep_norm)
        if isinstance(term, PROLOGUES):
            assert residual is not None
            like, read = residual, [tensor for _, tensor in term.tensors()]
        else:
            like, read = term, [term]
        tokens, width = like.shape
        comm = workspace.communicator(tokens, width, like.dtype)
        placed = place(like, read, residual, quant, replace(wanted, reduced=wanted.reduced or with_sum), after.buffers)
        out = placed.out
        if with_sum:
            comm.all_reduce(term, out=Output(reduced=out.reduced))
            out = replace(out, reduced=None)
        comm.all_reduce(term, residual=residual, norm=norm, quant=quant, keep_norm=form.keep_norm, out=out)
        placed.finish()
        return placed.out


def workspace_of_rank(pointers: torch.Tensor, world_size: int, rank: int) -> TRTLLMAllReduceFusionWorkspace:
    """The workspace of the older functions. Raises :class:`ArgumentError` where it is another rank's."""
    workspace = workspace_of(pointers)
    if (world_size, rank) != (workspace.world_size, workspace.rank):
        raise ArgumentError(
            f"rank {rank} of {world_size} calls with the workspace of rank {workspace.rank} of {workspace.world_size}",
            hint="pass the workspace that this rank made",
        )
    return workspace


def shaped(name: str, tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """A contiguous tensor of as many elements, in this shape."""
    needed = " * ".join(map(str, shape))
    if tensor.numel() != torch.Size(shape).numel() or not tensor.is_contiguous():
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)} and strides {tensor.stride()}", hint=f"pass a contiguous tensor of {needed} elements"
        )
    return tensor.view(shape)
