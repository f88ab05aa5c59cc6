"""The arguments of an ``all_gather``, checked: a shard instead of a partial."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from collogue.calls.call import Call, check_no_grad, check_values
from collogue.calls.capacity import Capacity, check_hidden_size, count_tokens, raise_capacity
from collogue.calls.outputs import check_forms
from collogue.calls.request import Request, forms_of
from collogue.contract.quant import Quant, describe
from collogue.contract.spec import Output, Wanted, as_rows, check_split, owned_rows
from collogue.errors import ArgumentError, FormatError, ShapeError


def check_gather(
    capacity: Capacity,
    shard: Output,
    tokens: int | None,
    quant: Quant | None,
    rows: Sequence[int] | None = None,
    write_padding: bool = True,
) -> Call:
    """Check the arguments of one ``all_gather``: what ``shard`` holds must be this rank's rows of ``tokens``."""
    if not isinstance(shard, Output):
        raise ArgumentError(f"shard is a {type(shard).__name__}", hint="pass what comm.reduce_scatter returned, or collogue.Output(...)")
    split = as_rows(rows, capacity.world_size)
    tokens = count_tokens(tokens, split)
    check_split("all_gather", tokens, split)
    mine = len(owned_rows(tokens, capacity.world_size, capacity.rank, split))
    held = dict(shard.items())
    if not held:
        raise ShapeError("the shard holds nothing", hint="give it at least one of reduced, residual, norm, codes")
    if quant is not None and not isinstance(quant, Quant):
        raise FormatError(f"quant is a {type(quant).__name__}", hint="pass the format of the shard's codes")
    packed = held.keys() & {"codes", "scales"}
    if packed != _packed(quant):
        raise FormatError(
            f"the shard holds {sorted(packed) or 'no codes'}; quant is {describe(quant)}, which has {sorted(_packed(quant)) or 'none'}",
            hint="name the format of the shard's codes in quant=, and give the scales with their codes",
        )
    for name, tensor in held.items():
        if name in ("reduced", "residual", "norm"):
            check_values(f"shard.{name}", tensor, capacity)
        elif not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
            raise ShapeError(f"shard.{name} is not a tensor of two dimensions", hint="pass it as the call that made it returned it")
    hidden_size = _hidden_size(held, quant)
    if hidden_size > capacity.hidden_size or tokens > capacity.max_tokens:
        raise_capacity("the whole", tokens, hidden_size, capacity)
    check_hidden_size(hidden_size)
    if quant is not None:
        quant.check_hidden_size(hidden_size)
    wanted = Wanted.held(shard)
    whole = torch.empty(tokens, hidden_size, dtype=capacity.dtype, device="meta")
    shape = tokens, hidden_size, capacity.dtype
    request = Request(*shape, False, False, False, quant, wanted, "all_gather", rows=split, write_padding=bool(write_padding))
    owned = f"rank {capacity.rank} of {capacity.world_size} owns {mine} of {tokens} rows"
    forms = forms_of(request, mine, mine)
    check_forms("shard", held, forms, capacity.device, hint=f"{owned}; pass its shard as comm.reduce_scatter or comm.shard returns it")
    if torch.is_grad_enabled():
        check_no_grad(*((f"shard.{name}", tensor) for name, tensor in held.items()))
    signature = capacity.signature(request)
    return Call(whole, quant=quant, operation="all_gather", shard=shard, rows=split, write_padding=write_padding, signature=signature)


def _packed(quant: Quant | None) -> set[str]:
    if quant is None:
        return set()
    return {"codes"} if quant.scale_dtype is None else {"codes", "scales"}


def _hidden_size(held: dict[str, torch.Tensor], quant: Quant | None) -> int:
    """H of a shard: of its values, else of its codes."""
    for name in ("reduced", "residual", "norm"):
        if name in held:
            return held[name].shape[1]
    return held["codes"].shape[1] * (2 if quant is not None and quant.element == "e2m1" else 1)
