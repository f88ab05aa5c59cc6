"""``torch.ops.collogue``: the calls of a communicator as PyTorch operators, for whatever traces.

``collogue::all_reduce(Tensor partial, Tensor? residual, Tensor? weight, float eps, float weight_offset, str quant, Tensor? scale,
float scale_value, float smallest, bool keep_norm, str comm) -> Tensor[]``

The communicator is named (:attr:`collogue.Communicator.name`), the format is its label (:func:`collogue.spec.describe`), and what
comes back is the list of the call's outputs in the order of :class:`collogue.Output`. An eager ``comm.all_reduce`` does not come
by here; under ``torch.compile`` and other tracers it turns into this operator. A graph's number of tokens may grow beyond
``max_tokens``: the operator then makes several calls, where the format's scales belong to one row each.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from collogue import registry
from collogue.call import Call, allocate
from collogue.spec import NVFP4, FP8PerToken, FP8Static, Output, Quant, RMSNorm, Wanted, describe, parse

_ARGUMENTS = (
    "Tensor partial, Tensor? residual, Tensor? weight, float eps, float weight_offset, str quant, Tensor? scale, "
    "float scale_value, float smallest, bool keep_norm, str comm"
)

_library: Any = torch.library.Library("collogue", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"all_reduce({_ARGUMENTS}) -> Tensor[]", tags=[torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides])


def is_traced() -> bool:
    """Whether calls are being recorded rather than run: Dynamo, export, or any dispatch mode (fake tensors, ``make_fx``)."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def all_reduce(comm: str, partial: Tensor, residual: Tensor | None, norm: RMSNorm | None, quant: Quant | None, keep_norm: bool) -> Output:
    """A call of ``comm`` through the operator. Arguments as in :meth:`collogue.Communicator.all_reduce`."""
    scale = quant.given_scale if quant is not None else None
    tensors = torch.ops.collogue.all_reduce(
        partial,
        residual,
        None if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        describe(quant),  # not `quant.label`: Dynamo does not trace cached properties
        scale if isinstance(scale, Tensor) else None,
        scale if isinstance(scale, float | int) else 1.0,
        getattr(quant, "smallest", 0.0),
        keep_norm,
        comm,
    )
    wanted = Wanted.of(has_residual=residual is not None, has_norm=norm is not None, quant=quant, keep_norm=keep_norm)
    return output_of(tensors, wanted)


def output_of(tensors: list[Tensor], wanted: Wanted) -> Output:
    """The operator's list as an :class:`collogue.Output`."""
    rest = iter(tensors)
    out = Output()
    if wanted.reduced:
        out.reduced = next(rest)
    if wanted.residual:
        out.residual = next(rest)
    if wanted.norm:
        out.norm = next(rest)
    if wanted.codes:
        out.codes = next(rest)
    if wanted.scales:
        out.scales = next(rest)
    return out


@functools.lru_cache(maxsize=256)
def _format(label: str, scale: float, smallest: float) -> Quant | None:
    quant = parse(label, global_scale=scale, static_scale=scale)
    return dataclasses.replace(quant, smallest=smallest) if hasattr(quant, "smallest") else quant  # type: ignore[type-var]


def _run(
    partial: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    quant: str,
    scale: Tensor | None,
    scale_value: float,
    smallest: float,
    keep_norm: bool,
    comm: str,
) -> list[Tensor]:
    format = _format(quant, scale_value, smallest)
    if scale is not None and isinstance(format, NVFP4):
        format = dataclasses.replace(format, global_scale=scale)
    elif scale is not None and isinstance(format, FP8Static):
        format = dataclasses.replace(format, scale=scale)
    norm = None if weight is None else RMSNorm(weight, eps, weight_offset)
    owner = registry.find(comm)
    calls = [(partial.contiguous(), None if residual is None else residual.contiguous())]
    if partial.shape[0] > owner.max_tokens and isinstance(format, FP8Static | FP8PerToken | None):
        # Rows are independent and the batch never changes a bit. Other formats lay the scales of several rows out together.
        first, second = calls[0]
        size = owner.max_tokens
        calls = [(first[i : i + size], None if second is None else second[i : i + size]) for i in range(0, len(first), size)]
    outs = [owner.all_reduce(x, residual=r, norm=norm, quant=format, keep_norm=keep_norm) for x, r in calls]
    if len(outs) == 1:
        return [tensor for _, tensor in outs[0].items()]
    return [torch.cat([getattr(out, name) for out in outs]) for name, _ in outs[0].items()]


def _fake(
    partial: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    quant: str,
    scale: Tensor | None,
    scale_value: float,
    smallest: float,
    keep_norm: bool,
    comm: str,
) -> list[Tensor]:
    format = _format(quant, 1.0, smallest)
    wanted = Wanted.of(has_residual=residual is not None, has_norm=weight is not None, quant=format, keep_norm=keep_norm)
    call = Call(partial.contiguous(), residual, None, format, wanted)
    return [tensor for _, tensor in allocate(call).items()]


for _device in ("CPU", "CUDA"):
    _library.impl("all_reduce", _run, _device)
torch.library.register_fake("collogue::all_reduce", _fake, lib=_library)
