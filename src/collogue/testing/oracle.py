"""What a call must return, computed without a communicator: by the scalar version, or by the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from collogue.contract import reference
from collogue.contract.prologue import ExpertReduce, Gated, Prologue
from collogue.contract.quant import Quant
from collogue.contract.spec import Operation, Output, RMSNorm
from collogue.testing import scalar

#: :func:`by_reference` or :func:`by_scalar`.
AllReduce: TypeAlias = Callable[[list[torch.Tensor], torch.Tensor | None, RMSNorm | None, Quant | None, bool], Output]

_INTEGER = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


def by_reference(
    partials: list[torch.Tensor],
    residual: torch.Tensor | None,
    norm: RMSNorm | None,
    quant: Quant | None,
    keep_norm: bool,
    branch_norm: RMSNorm | None = None,
    islands: Sequence[Sequence[int]] | None = None,
) -> Output:
    """:func:`collogue.reference.all_reduce`, on the device of the partials."""
    epilogue = {"residual": residual, "norm": norm, "quant": quant, "keep_norm": keep_norm, "branch_norm": branch_norm}
    return reference.all_reduce(partials, **epilogue, islands=islands)  # type: ignore[arg-type]


def by_scalar(
    partials: list[torch.Tensor],
    residual: torch.Tensor | None,
    norm: RMSNorm | None,
    quant: Quant | None,
    keep_norm: bool,
    branch_norm: RMSNorm | None = None,
    islands: Sequence[Sequence[int]] | None = None,
) -> Output:
    """:func:`collogue.testing.scalar.all_reduce` of CPU tensors, its bits as tensors."""
    dtype = partials[0].dtype
    result = scalar.all_reduce(
        [_bits(p) for p in partials],
        dtype=cast(scalar.DType, str(dtype).removeprefix("torch.")),
        residual=None if residual is None else _bits(residual),
        weight=None if norm is None else norm.weight.float().numpy(),
        eps=1e-6 if norm is None else norm.eps,
        weight_offset=0.0 if norm is None else norm.weight_offset,
        quant=quant,
        keep_norm=keep_norm,
        branch=None if branch_norm is None else (branch_norm.weight.float().numpy(), branch_norm.eps, branch_norm.weight_offset),
        islands=islands,
    )
    codes = None
    if result.codes is not None and quant is not None:
        codes = torch.from_numpy(result.codes)
        codes = codes.view(torch.float8_e4m3fn) if quant.element == "e4m3" else codes
    return Output(
        reduced=_values(result.reduced, dtype),
        residual=_values(result.residual, dtype),
        norm=_values(result.norm, dtype),
        codes=codes,
        scales=None if result.scales is None else _scales(result.scales),
    )


def scalar_term(given: Prologue) -> torch.Tensor:
    """A rank's term by the scalar version, of CPU tensors."""
    dtype = given.main.dtype
    name, rows = cast(scalar.DType, str(dtype).removeprefix("torch.")), _bits(given.main)
    if isinstance(given, Gated):
        term = scalar.gated(rows, _bits(given.up), name)
    elif isinstance(given, ExpertReduce):
        term = scalar.expert_reduce(rows, given.weights.float().numpy(), _bits(given.token_input), name)
    else:
        weights = None if given.weights is None else given.weights.float().numpy()
        shared = None if given.shared_expert is None else _bits(given.shared_expert)
        term = scalar.expert_combine(rows, given.index.numpy(), weights, shared, given.scaling, name)
    values = _values(term, dtype)
    assert values is not None
    return values


def by_rank(
    all_reduce: AllReduce,
    operation: Operation,
    partials: list[torch.Tensor],
    residual: torch.Tensor | None,
    norm: RMSNorm | None,
    quant: Quant | None,
    keep_norm: bool,
    split: Sequence[int] | None = None,
) -> list[Output]:
    """What ``operation`` returns on each rank, from nothing but ``all_reduce`` and the rule of who owns which rows.

    Args:
        residual: [T, H], the shards of all ranks concatenated.
        operation: ``all_gather`` gathers what ``reduce_scatter`` of the same arguments returns; ``finish`` takes a rank's partial for y.
        split: how many rows each rank owns, in place of equal blocks.
    """
    world, tokens = len(partials), partials[0].shape[0]
    rows = [torch.from_numpy(scalar.rows_of(rank, tokens, world, split)).to(partials[0].device) for rank in range(world)]
    if operation == "finish":
        return [replace(all_reduce([y], None, norm, quant, keep_norm), reduced=None, residual=None) for y in partials]
    if operation == "reduce_scatter":
        terms = [[p[own] for p in partials] for own in rows]
        streams = [None if residual is None else residual[own] for own in rows]
        return [all_reduce(x, y, norm, quant, keep_norm) for x, y in zip(terms, streams, strict=True)]
    whole = all_reduce(partials, residual, norm, quant, keep_norm)
    if operation != "sharded":
        return [whole] * world
    y = whole.reduced if whole.residual is None else whole.residual
    assert y is not None
    name = "reduced" if whole.residual is None else "residual"
    return [replace(whole, **{name: y[own]}) for own in rows]


def _bits(tensor: torch.Tensor) -> scalar.Array:
    torch_integer, numpy_integer = _INTEGER[tensor.element_size()]
    return cast(scalar.Array, tensor.view(torch_integer).numpy().view(numpy_integer))


def _values(bits: scalar.Array | None, dtype: torch.dtype) -> torch.Tensor | None:
    if bits is None:
        return None
    signed: Any = np.int16 if bits.itemsize == 2 else np.int32
    return torch.from_numpy(bits.view(signed)).view(dtype)


def _scales(scales: scalar.Scales) -> torch.Tensor:
    storage = torch.empty(scales.storage.size, dtype=torch.uint8)
    storage.copy_(torch.from_numpy(scales.storage))
    return storage.view(getattr(torch, scales.dtype)).as_strided(scales.shape, scales.stride)
