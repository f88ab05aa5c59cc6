"""What stands between two blocks of a layer stack, in every way that ``collogue bench model`` compares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collogue.bench.stack import EPS, Block, Shape, attention, mlp, per_token
from collogue.communicator import Communicator
from collogue.spec import FP8PerToken, RMSNorm

#: Names of the ways: Collogue's, the baselines, and the stack without communication, which tells the share of the collectives.
COLLOGUE = ("collogue eager", "collogue pass", "collogue sharded")
BASELINES = ("nccl", "symm_mem one-shot", "symm_mem two-shot")
LOCAL = "no collectives"
ALL = (*COLLOGUE, *BASELINES, LOCAL)

#: ``step(partial, residual) -> last residual``
Step = Callable[[Tensor, Tensor], Tensor]


def make_step(name: str, shape: Shape, blocks: list[Block], comm: Communicator, group: dist.ProcessGroup, *, prefill: bool) -> Step:
    """One pass over the stack. ``shape`` and ``blocks`` are this rank's."""
    functions: dict[str, Callable[..., Tensor]] = {"attention": functools.partial(attention, shape, prefill), "mlp": mlp}
    if name in ("collogue eager", "collogue sharded"):
        return _by_calls(functions, blocks, comm, sharded=name == "collogue sharded")
    reduce = _reducer(name, comm, group)
    compile = _compiler(comm, fuses=name == "collogue pass")
    units = {kind: compile(functools.partial(_unit, reduce, function)) for kind, function in functions.items()}

    def step(partial: Tensor, residual: Tensor) -> Tensor:
        for block in blocks:
            partial, residual = units[block.kind](partial, residual, block.norm, *block.tensors)
        return residual

    return step


def _compiler(comm: Communicator, *, fuses: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``torch.compile``, or ``collogue.compile``. Without a GPU nothing is generated: only the graphs are made."""
    on_cpu = comm.device.type == "cpu"
    if fuses:
        from collogue.fusion import compile

        return functools.partial(compile, backend="eager" if on_cpu else "inductor", fullgraph=True)
    return functools.partial(torch.compile, backend="aot_eager" if on_cpu else "inductor", fullgraph=True)


def _unit(
    reduce: Callable[[Tensor], Tensor], block: Callable[..., Tensor], partial: Tensor, residual: Tensor, weight: Tensor, *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """A boundary as models write it, and the block behind it."""
    stream = reduce(partial) + residual
    codes, scales = per_token(torch.nn.functional.rms_norm(stream, (stream.shape[-1],), weight, EPS))
    return block(codes, scales, *tensors), stream


def _by_calls(functions: dict[str, Callable[..., Tensor]], blocks: list[Block], comm: Communicator, *, sharded: bool) -> Step:
    """One call per boundary, and compiled blocks."""
    compile = _compiler(comm, fuses=False)
    compiled = {kind: compile(function) for kind, function in functions.items()}
    norms, quant = [RMSNorm(block.norm, EPS) for block in blocks], FP8PerToken()

    def step(partial: Tensor, residual: Tensor) -> Tensor:
        stream = comm.shard(residual) if sharded else residual
        for block, norm in zip(blocks, norms, strict=True):
            out = comm.all_reduce(partial, residual=stream, norm=norm, quant=quant, sharded=sharded)
            assert out.residual is not None
            stream = out.residual
            partial = compiled[block.kind](out.codes, out.scales, *block.tensors)
        return comm.unshard(stream, residual.shape[0]) if sharded else stream

    return step


def _reducer(name: str, comm: Communicator, group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    if name == LOCAL:
        return lambda x: x
    if name in ("nccl", "collogue pass"):
        from torch.distributed._functional_collectives import all_reduce

        return lambda x: all_reduce(x, "sum", group)
    _symmetric_operator()
    _SYMMETRIC[comm.group_name] = _buffer(comm)
    two_shot, group_name = name.endswith("two-shot"), comm.group_name
    return lambda x: torch.ops.collogue_bench.symmetric(x, two_shot, group_name)


#: Symmetric tensors by group: inputs of torch's own all-reduces.
_SYMMETRIC: dict[str, Tensor] = {}


def _buffer(comm: Communicator) -> Tensor:
    import torch.distributed._symmetric_memory as symmetric_memory

    known = _SYMMETRIC.get(comm.group_name)
    count = comm.max_tokens * comm.hidden_size
    if known is not None and known.numel() >= count:
        return known
    buffer = symmetric_memory.empty(count, dtype=comm.dtype, device=comm.device)
    group_name: Any = comm.group_name
    symmetric_memory.rendezvous(buffer, group_name)
    return buffer


@functools.cache
def _symmetric_operator() -> Any:
    """torch's one-shot and two-shot all-reduce as one functional operator, so that torch.compile leaves the symmetric tensor alone."""

    def run(x: Tensor, two_shot: bool, group_name: str) -> Tensor:
        buffer = _SYMMETRIC[group_name][: x.numel()].view(x.shape)
        if not two_shot:  # copies its input into the symmetric tensor itself
            return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x.contiguous(), "sum", group_name)  # type: ignore[no-any-return]
        buffer.copy_(x)
        out = torch.empty_like(buffer)
        torch.ops.symm_mem.two_shot_all_reduce_out(buffer, "sum", group_name, out)
        return out

    library: Any = torch.library.Library("collogue_bench", "DEF")  # type: ignore[no-untyped-call]
    library.define("symmetric(Tensor x, bool two_shot, str group_name) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
    library.impl("symmetric", run, "CUDA")
    torch.library.register_fake("collogue_bench::symmetric", lambda x, two_shot, group_name: torch.empty_like(x), lib=library)
    return library
