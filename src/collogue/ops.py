"""``torch.ops.collogue``: the calls of a communicator as PyTorch operators, for everything that traces.

``all_reduce``, ``sharded``, ``reduce_scatter`` and ``finish`` take :data:`ARGUMENTS`, ``all_gather`` takes a shard's tensors, and
``alone``, which is :func:`collogue.quantize` and :func:`collogue.nn.gated`, has no communicator. The
communicator is named (:attr:`collogue.Communicator.name`), the format is its label (:func:`.quant.describe`), and what comes
back is the list of the call's outputs in the order of :class:`collogue.Output`.

Eager calls of a communicator do not come by here; under ``torch.compile`` and other tracers they turn into these operators. A
graph's number of tokens may grow beyond ``max_tokens``: ``all_reduce`` and ``finish`` then make several calls, where the format's
scales belong to one row each.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from collogue import registry
from collogue.calls.call import Call, check_alone, check_no_grad
from collogue.calls.capacity import check_kinds
from collogue.calls.outputs import check_padding, write_traced
from collogue.contract import reference
from collogue.contract.formats import code_spec, empty_scales
from collogue.contract.prologue import PROLOGUES, ExpertCombine, ExpertReduce, Gated, Prologue
from collogue.contract.quant import NVFP4, FP8Static, Quant, describe, parse
from collogue.contract.spec import OUTPUTS, OWNING, Operation, Output, RMSNorm, Wanted, as_rows, check_split
from collogue.errors import ArgumentError

#: Of every operator but ``all_gather``. ``partial`` is y for ``finish``; ``scale_value`` counts where ``scale`` is ``None``. Of a prologue
#: (its kind) ``partial`` is the experts' output, and ``shared_expert`` the token input of an ``expert_reduce``; of ``gated``, gate and up.
ARGUMENTS = (
    "Tensor partial, Tensor? residual, Tensor? weight, float eps, float weight_offset, str quant, Tensor? scale, "
    "float scale_value, float smallest, bool keep_norm, str comm, bool prefetch=True, str prologue='none', Tensor? expert_index=None, "
    "Tensor? expert_weights=None, Tensor? shared_expert=None, float scaling=1.0, "
    "Tensor? branch_weight=None, float branch_eps=0.0, float branch_offset=0.0, int[]? rows=None"
)
_GATHERED = (
    "Tensor? reduced, Tensor? residual, Tensor? norm, Tensor? codes, Tensor? scales, SymInt tokens, str quant, float smallest, str comm, "
    "int[]? rows=None"
)
_ALONE = "Tensor x, Tensor? up, str quant, Tensor? scale, float scale_value, float smallest"
_SUMMING: tuple[Operation, ...] = ("all_reduce", "sharded", "reduce_scatter", "finish")


def is_traced() -> bool:
    """Whether calls are being recorded rather than run: Dynamo, export, or any dispatch mode (fake tensors, ``make_fx``)."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def call(comm: str, asked: Call, out: Output | None = None) -> Output:
    """A call of the communicator ``comm`` through the operator of its operation. The operator's results are copied into ``out``."""
    check_padding(asked.write_padding, out)
    partial, norm, quant, branch = asked.partial, asked.norm, asked.quant, asked.branch_norm
    scale = quant.given_scale if quant is not None else None
    tensors = getattr(torch.ops.collogue, asked.operation).default(
        partial.main if isinstance(partial, PROLOGUES) else partial,
        asked.residual,
        None if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        describe(quant),  # not `quant.label`: Dynamo does not trace cached properties
        scale if isinstance(scale, Tensor) else None,
        scale if isinstance(scale, float | int) else 1.0,
        getattr(quant, "smallest", 0.0),
        asked.keep_norm,
        comm,
        norm is None or norm.prefetch,
        *_apart(partial),  # type: ignore[arg-type]  # terms are no argument of users
        None if branch is None else branch.weight,
        0.0 if branch is None else branch.eps,
        0.0 if branch is None else branch.weight_offset,
        None if asked.rows is None else list(asked.rows),
    )
    return _output(tensors, asked.wants(), out, asked.inputs())


def _apart(partial: Tensor | Prologue) -> tuple[str, Tensor | None, Tensor | None, Tensor | None, float]:
    """An operator's last arguments: what is not the main tensor."""
    if isinstance(partial, ExpertCombine):
        return "expert_combine", partial.index, partial.weights, partial.shared_expert, float(partial.scaling)
    if isinstance(partial, ExpertReduce):
        return "expert_reduce", None, partial.weights, partial.token_input, 1.0
    if isinstance(partial, Gated):
        return "gated", None, None, partial.up, 1.0
    return "none", None, None, None, 1.0


def _together(
    partial: Tensor, prologue: str, index: Tensor | None, weights: Tensor | None, shared: Tensor | None, scaling: float
) -> Tensor | Prologue:
    """The inverse. Raises :class:`ArgumentError` for arguments that are of no prologue."""
    if prologue == "expert_combine" and index is not None:
        return ExpertCombine(partial.contiguous(), index, weights, shared, scaling)
    if prologue == "gated" and shared is not None and index is weights is None and scaling == 1:
        return _gated(partial, shared)
    if prologue == "expert_reduce" and weights is not None and shared is not None and index is None and scaling == 1:
        return ExpertReduce(partial.contiguous(), weights, shared)
    if prologue != "none" or not (index is weights is shared is None and scaling == 1):
        raise ArgumentError(f"unknown prologue {prologue!r} of these tensors", hint="see the schema: collogue.ops.ARGUMENTS")
    return partial


def _gated(gate: Tensor, up: Tensor) -> Gated:
    """Tracers may have given one of the two other strides."""
    return Gated(gate, up) if gate.stride() == up.stride() else Gated(gate.contiguous(), up.contiguous())


def gather(
    comm: str, shard: Output, tokens: int, quant: Quant | None, out: Output | None = None, rows: Sequence[int] | None = None
) -> Output:
    """:meth:`collogue.Communicator.all_gather` through the operator."""
    given = (shard.reduced, shard.residual, shard.norm, shard.codes, shard.scales)
    split = None if rows is None else list(rows)
    tensors = torch.ops.collogue.all_gather.default(*given, tokens, describe(quant), getattr(quant, "smallest", 0.0), comm, split)
    there = [tensor is not None for tensor in given]
    return _output(tensors, Wanted(*there), out, [(f"shard.{name}", tensor) for name, tensor in shard.items()])


def alone(y: Tensor | Gated, quant: Quant | None) -> Output:
    """:func:`finish_alone` through the operator."""
    check_kinds(None, quant)
    scale = None if quant is None else quant.given_scale
    values = torch.ops.collogue.alone.default(
        y.gate if isinstance(y, Gated) else y,
        y.up if isinstance(y, Gated) else None,
        describe(quant),
        scale if isinstance(scale, Tensor) else None,
        scale if isinstance(scale, float | int) else 1.0,
        getattr(quant, "smallest", 0.0),
    )
    return _output(values, _wanted_alone(quant), None, ())


def _wanted_alone(quant: Quant | None) -> Wanted:
    return Wanted(reduced=quant is None, residual=False, norm=False, codes=quant is not None, scales=bool(quant and quant.scale_dtype))


def finish_alone(y: Tensor | Gated, quant: Quant | None) -> Output:
    """Codes and scales of ``y``, or, without a format, what it is computed to, as ``reduced``. No communicator."""
    if (y.gate if isinstance(y, Gated) else y).is_cuda:
        from collogue.gpu.alone import finish

        return finish(y, quant)
    check_alone(y, quant)
    return reference.finish_alone(y, quant)


def _output(tensors: list[Tensor], wanted: Wanted, out: Output | None, given: Iterable[tuple[str, Tensor]]) -> Output:
    """An operator's list as an :class:`collogue.Output`: ``out``, if there is one."""
    rest = iter(tensors)
    flags = (wanted.reduced, wanted.residual, wanted.norm, wanted.codes, wanted.scales)
    result = Output(*[next(rest) if flag else None for flag in flags])
    if out is None:
        return result
    write_traced(result, out, given)
    return out


def _tensors(out: Output) -> list[Tensor]:
    every = (out.reduced, out.residual, out.norm, out.codes, out.scales)
    return [tensor for tensor in every if tensor is not None]


@functools.lru_cache(maxsize=256)
def _format(label: str, scale: float, smallest: float) -> Quant | None:
    return parse(label, global_scale=scale, static_scale=scale, smallest=smallest)


def _scaled_format(label: str, scale: Tensor | None, scale_value: float, smallest: float) -> Quant | None:
    format = _format(label, scale_value, smallest)
    if scale is not None and isinstance(format, NVFP4):
        return NVFP4(scale, format.layout)
    return FP8Static(scale) if scale is not None and isinstance(format, FP8Static) else format


# ---- what runs


def _run(
    operation: Operation,
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
    prefetch: bool = True,
    prologue: str = "none",
    expert_index: Tensor | None = None,
    expert_weights: Tensor | None = None,
    shared_expert: Tensor | None = None,
    scaling: float = 1.0,
    branch_weight: Tensor | None = None,
    branch_eps: float = 0.0,
    branch_offset: float = 0.0,
    rows: Sequence[int] | None = None,
) -> list[Tensor]:
    given = _together(partial, prologue, expert_index, expert_weights, shared_expert, scaling)
    format = _scaled_format(quant, scale, scale_value, smallest)
    norm = None if weight is None else RMSNorm(weight, eps, weight_offset, prefetch)
    owner = registry.find(comm)
    engine, split = owner._engine, as_rows(rows, owner.world_size)
    branch = None if branch_weight is None else RMSNorm(branch_weight, branch_eps, branch_offset)
    if engine is None or branch is not None:
        done = None
    else:
        done = engine.latest(operation, given, residual, norm, format, keep_norm, None, split)
        if done is None:
            done = engine.quick(Call(given, residual, norm, format, keep_norm, operation, rows=split), None)
    if done is not None:
        return _tensors(done)
    term = given if isinstance(given, PROLOGUES) else given.contiguous()
    parts = _parts(operation, term, residual, format, owner.max_tokens)
    calls = (Call(part, theirs, norm, format, keep_norm, operation, branch_norm=branch, rows=split) for part, theirs in parts)
    outs = [owner._run(call) for call in calls]
    if len(outs) == 1:
        return _tensors(outs[0])
    return [torch.cat([getattr(out, name) for out in outs]) for name, _ in outs[0].items()]


def _parts(
    operation: Operation, partial: Tensor | Prologue, residual: Tensor | None, format: Quant | None, most: int
) -> Iterable[tuple[Tensor | Prologue, Tensor | None]]:
    """The call's rows, in as many calls as they need. Rows are independent, and the batch never changes a bit."""
    residual = None if residual is None else residual.contiguous()
    tokens = partial.tokens if isinstance(partial, PROLOGUES) else partial.shape[0]
    if tokens <= most:
        return [(partial, residual)]
    # Other operations share rows out among ranks, other formats lay the scales of several rows out together.
    if operation in OWNING or hasattr(format, "layout"):
        return [(partial, residual)]
    starts = range(0, tokens, most)
    terms = [partial.rows(i, i + most) if isinstance(partial, PROLOGUES) else partial[i : i + most] for i in starts]
    return [(term, None if residual is None else residual[i : i + most]) for i, term in zip(starts, terms, strict=True)]


class _Gathered(NamedTuple):
    """:data:`_GATHERED` as Python has them."""

    reduced: Tensor | None
    residual: Tensor | None
    norm: Tensor | None
    codes: Tensor | None
    scales: Tensor | None
    tokens: int
    quant: str
    smallest: float
    comm: str
    rows: Sequence[int] | None = None


def _run_gather(*given: Any) -> list[Tensor]:
    asked = _Gathered(*given)
    shard = Output(asked.reduced, asked.residual, asked.norm, asked.codes, asked.scales)
    format = _format(asked.quant, 1.0, asked.smallest)
    return _tensors(registry.find(asked.comm).all_gather(shard, asked.tokens, quant=format, rows=asked.rows))


def _run_alone(x: Tensor, up: Tensor | None, quant: str, scale: Tensor | None, scale_value: float, smallest: float) -> list[Tensor]:
    return _tensors(finish_alone(x if up is None else _gated(x, up), _scaled_format(quant, scale, scale_value, smallest)))


# ---- what tracers see


class _Arguments(NamedTuple):
    """:data:`ARGUMENTS` as Python has them."""

    partial: Tensor
    residual: Tensor | None
    weight: Tensor | None
    eps: float
    weight_offset: float
    quant: str
    scale: Tensor | None
    scale_value: float
    smallest: float
    keep_norm: bool
    comm: str
    prefetch: bool = True
    prologue: str = "none"
    expert_index: Tensor | None = None
    expert_weights: Tensor | None = None
    shared_expert: Tensor | None = None
    scaling: float = 1.0
    branch_weight: Tensor | None = None
    branch_eps: float = 0.0
    branch_offset: float = 0.0
    rows: Sequence[int] | None = None


#: Where the communicator stands among :data:`ARGUMENTS`.
COMMUNICATOR = _Arguments._fields.index("comm")


def _fake(operation: Operation, *given: Any, **named: Any) -> list[Tensor]:
    asked = _Arguments(*given, **named)
    partial, comm, format = asked.partial, asked.comm, _format(asked.quant, 1.0, asked.smallest)
    has_residual, has_norm = asked.residual is not None, asked.weight is not None
    wanted = Wanted.of(has_residual=has_residual, has_norm=has_norm, quant=format, keep_norm=asked.keep_norm, operation=operation)
    tokens, width = partial.shape[-2:] if asked.expert_index is None else (asked.expert_index.shape[0], partial.shape[1])
    owned = _owned(operation, tokens, comm, asked.rows)
    finished = owned if operation == "reduce_scatter" else tokens
    out = []
    if wanted.reduced or wanted.residual:
        out.append(partial.new_empty(owned, width))
    if wanted.norm:
        out.append(partial.new_empty(finished, width))
    return [*out, *_fake_codes(format, finished, width, partial.device)]


def _owned(operation: Operation, tokens: int, comm: str, rows: Sequence[int] | None) -> int:
    """How many rows a rank keeps: the length of ``owned_rows`` where rows have owners, for a number of tokens that need not be known."""
    if operation not in OWNING:
        check_split(operation, tokens, rows)
        return tokens
    owner = registry.find(comm)
    split = as_rows(rows, owner.world_size)
    check_split(operation, tokens, split)
    if split is not None:
        return split[owner.rank]
    block = -(-tokens // owner.world_size)
    smaller: Any = torch.sym_min
    owned: int = smaller((owner.rank + 1) * block, tokens) - smaller(owner.rank * block, tokens)
    return owned


def _fake_codes(format: Quant | None, rows: int, width: int, device: torch.device) -> list[Tensor]:
    if format is None:
        return []
    shape, dtype = code_spec(format, rows, width)
    codes = torch.empty(shape, dtype=dtype, device=device)
    return [codes] if format.scale_dtype is None else [codes, empty_scales(format, rows, width, device)]


def _fake_gather(*given: Any, **named: Any) -> list[Tensor]:
    asked = _Gathered(*given, **named)
    tokens, codes = asked.tokens, asked.codes
    if asked.rows is not None:
        _owned("all_gather", tokens, asked.comm, asked.rows)
    values = [x.new_empty(tokens, x.shape[1]) for x in (asked.reduced, asked.residual, asked.norm) if x is not None]
    if codes is None:
        return values
    format = _format(asked.quant, 1.0, asked.smallest)
    width = codes.shape[1] * (2 if format is not None and format.element == "e2m1" else 1)
    return [*values, *_fake_codes(format, tokens, width, codes.device)]


def _fake_alone(x: Tensor, up: Tensor | None, quant: str, scale: Tensor | None, scale_value: float, smallest: float) -> list[Tensor]:
    format = _format(quant, 1.0, smallest)
    return [x.new_empty(x.shape)] if format is None else _fake_codes(format, x.shape[0], x.shape[1], x.device)


# ---- autograd

#: What errors call the tensors of an operator's arguments, and where they stand.
_TENSORS = {"partial": 0, "residual": 1, "RMSNorm.weight": 2, "expert weights": 14, "shared_expert": 15, "branch_norm.weight": 17}
_GATHERED_TENSORS = {f"shard.{name}": place for place, name in enumerate(OUTPUTS)}


class _Untraced:
    """An operator's function, which Dynamo must not look into where a graph has broken: what it calls is not part of a model."""

    def __init__(self, function: Callable[..., list[Tensor]]) -> None:
        self._function = function
        self._disabled: Callable[..., list[Tensor]] | None = None

    def __call__(self, *given: Any) -> list[Tensor]:
        if self._disabled is None and "torch._dynamo" in sys.modules:  # nothing is imported for it
            self._disabled = torch.compiler.disable(self._function)  # type: ignore[no-untyped-call]
        return (self._disabled or self._function)(*given)


def _refuse_grad(operator: str, tensors: dict[str, int], run: Any, keys: Any, *given: Any) -> list[Tensor]:
    """Reject what an eager call rejects, tensors that require grad in grad mode, and go on below autograd.

    Where nothing traces, the kernel itself comes next: then without another way through the dispatcher.
    """
    if torch.is_grad_enabled():
        check_no_grad(*((name, given[place]) for name, place in tensors.items() if place < len(given)))
    if (keys & torch._C._after_autograd_keyset).highestPriorityTypeId() in _KERNELS:
        with torch._C._AutoDispatchBelowAutograd():
            eager: list[Tensor] = run(*given)
        return eager
    with torch._C._AutoDispatchBelowAutograd():
        done: list[Tensor] = getattr(torch.ops.collogue, operator).default.redispatch(keys & torch._C._after_autograd_keyset, *given)
    return done


_KERNELS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_library: Any = torch.library.Library("collogue", "DEF")  # type: ignore[no-untyped-call]
_TAGS = [torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides]


def register(name: str, arguments: str, tensors: dict[str, int], function: Any, fake: Any) -> None:
    run = _Untraced(function)
    _library.define(f"{name}({arguments}) -> Tensor[]", tags=_TAGS)
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    _library.impl(name, functools.partial(_refuse_grad, name, tensors, run), "Autograd", with_keyset=True)
    torch.library.register_fake(f"collogue::{name}", fake, lib=_library)


for _operation in _SUMMING:
    register(_operation, ARGUMENTS, _TENSORS, functools.partial(_run, _operation), functools.partial(_fake, _operation))
register("all_gather", _GATHERED, _GATHERED_TENSORS, _run_gather, _fake_gather)
register("alone", _ALONE, {"the values": 0, "up": 1}, _run_alone, _fake_alone)
