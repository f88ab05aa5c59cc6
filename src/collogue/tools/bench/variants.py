"""What stands between two blocks of a layer stack, in every way that ``collogue bench model`` compares."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collogue.communicator import Communicator
from collogue.contract.spec import RMSNorm
from collogue.tools.bench.stack import EPS, STATIC, Activations, Block, Quantize, activation_scale

#: Names of the ways: Collogue's, the baselines, and the stack without communication, which tells the share of the collectives.
COLLOGUE = ("collogue eager", "collogue pass", "collogue sharded")
BASELINES = ("nccl", "symm_mem one-shot", "symm_mem two-shot")
LOCAL = "no collectives"
ALL = (*COLLOGUE, *BASELINES, LOCAL)

#: ``step(partial, residual) -> last residual``
Step = Callable[[Tensor, Tensor], Tensor]


#: By kind of block: ``function(codes, scale, *tensors) -> partial``.
Functions = dict[str, Callable[..., Tensor]]


class Blocks:
    """The blocks of one rank's stack, each kind compiled once for all ways that do not compile what lies between them as well.

    ``activations``: how codes are made of what lies between them.
    """

    def __init__(self, functions: Functions, blocks: list[Block], device: torch.device, activations: Activations = STATIC) -> None:
        self.functions, self.blocks, self.activations = functions, blocks, activations
        self.on_gpu, self.scale = device.type == "cuda", activation_scale(device)
        self._compiled = {kind: self.compile(function) for kind, function in functions.items()}

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.compile``. Without a GPU nothing is generated: only the graphs are made."""
        return torch.compile(with_own_code(function), backend="inductor" if self.on_gpu else "aot_eager", fullgraph=True)

    def fuse(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``collogue.compile``, likewise."""
        from collogue.pytorch.fusion import compile

        fused: Callable[..., Any] = compile(with_own_code(function), backend="inductor" if self.on_gpu else "eager", fullgraph=True)
        return fused

    def run(self, block: Block, codes: Tensor, scale: Tensor) -> Tensor:
        """This rank's partial sum."""
        partial: Tensor = self._compiled[block.kind](codes, scale, *block.tensors)
        return partial


_NUMBERS = itertools.count()


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """What was compiled, and which sizes have varied, is known to torch.compile by code object: units that share one disturb each other."""

    def unit(*args: Any) -> Any:
        return function(*args)

    unit.__code__ = unit.__code__.replace(co_name=f"unit_{next(_NUMBERS)}")
    return unit


def make_step(name: str, blocks: Blocks, comm: Communicator, group: dist.ProcessGroup) -> Step:
    """One pass over the stack, on this rank."""
    if name in ("collogue eager", "collogue sharded"):
        return _by_calls(blocks, comm, sharded=name == "collogue sharded")
    reduce = _reducer(name, comm, group)
    if name == "collogue pass":
        return _by_pass(blocks, reduce)
    finish = blocks.compile(functools.partial(_boundary, reduce, blocks.activations.quantize))

    def step(partial: Tensor, residual: Tensor) -> Tensor:
        for block in blocks.blocks:
            codes, scale, residual = finish(partial, residual, block.norm, blocks.scale)
            partial = blocks.run(block, codes, scale)
        return residual

    return step


def _boundary(
    reduce: Callable[[Tensor], Tensor], quantize: Quantize, partial: Tensor, residual: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What lies between two blocks, as models write it: codes, their scale and the residual stream."""
    stream = reduce(partial) + residual
    return *quantize(torch.nn.functional.rms_norm(stream, (stream.shape[-1],), weight, EPS), scale), stream


def _by_pass(blocks: Blocks, reduce: Callable[[Tensor], Tensor]) -> Step:
    """Every block with what stands before it, as models write it, compiled together by ``collogue.compile``."""

    def unit(block: Callable[..., Tensor], partial: Tensor, residual: Tensor, norm: Tensor, scale: Tensor, *tensors: Tensor) -> Any:
        codes, scale, stream = _boundary(reduce, blocks.activations.quantize, partial, residual, norm, scale)
        return block(codes, scale, *tensors), stream

    units = {kind: blocks.fuse(functools.partial(unit, function)) for kind, function in blocks.functions.items()}

    def step(partial: Tensor, residual: Tensor) -> Tensor:
        for block in blocks.blocks:
            partial, residual = units[block.kind](partial, residual, block.norm, blocks.scale, *block.tensors)
        return residual

    return step


def _by_calls(blocks: Blocks, comm: Communicator, *, sharded: bool) -> Step:
    """One call per boundary."""
    norms, quant = [RMSNorm(block.norm, EPS) for block in blocks.blocks], blocks.activations.quant(blocks.scale)

    def step(partial: Tensor, residual: Tensor) -> Tensor:
        stream = comm.shard(residual) if sharded else residual
        for block, norm in zip(blocks.blocks, norms, strict=True):
            out = comm.all_reduce(partial, residual=stream, norm=norm, quant=quant, sharded=sharded)
            assert out.residual is not None
            assert out.codes is not None
            stream = out.residual
            partial = blocks.run(block, out.codes, blocks.scale if out.scales is None else out.scales)
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
