"""What a call puts into the parameters of its kernels (kernels/params.cuh)."""

from __future__ import annotations

import itertools

import torch

from collogue.calls.call import Call
from collogue.calls.product import ScaledProduct
from collogue.calls.request import Request
from collogue.calls.terms import Terms
from collogue.contract.prologue import ExpertReduce, Gated, Prologue
from collogue.contract.spec import Output, largest_block, owned_rows
from collogue.gpu import header
from collogue.gpu.launch import Params
from collogue.planning.algorithm import ALGORITHMS
from collogue.planning.extent import CONTROL_BYTES, Extent
from collogue.planning.plan import Plan, launch_memory
from collogue.planning.topology import Topology


def fill_shape(params: Params, topology: Topology, request: Request, plan: Plan, rank: int) -> None:
    """What follows from the shape of a call: extents and places in the workspace. The first launch, where there are several."""
    world, tokens, algorithm = topology.world_size, request.tokens, plan.algorithm
    owned = len(owned_rows(tokens, world, rank, request.rows))
    params.hidden, params.tokens, params.rank = request.hidden_size, tokens, rank
    params.first, params.count, params.block = 0, plan.rows, -(-tokens // world)
    if request.rows is not None:
        ends = list(itertools.accumulate(request.rows))
        params.bounds[:] = [0, *ends, *[tokens] * (len(params.bounds) - 1 - len(ends))]
    rows = rows_of_scales(topology, request, rank)
    params.scale_rows = rows if plan.launches == 1 and request.write_padding else 0
    params.column_stride, params.shard_column_stride = -(-rows // 4) * 4, -(-owned // 4) * 4
    if not ALGORITHMS[algorithm].alone:
        memory = launch_memory(topology, request, algorithm)
        params.slot_bytes, params.gather_bytes = plan.rows * memory.slot, plan.rows * memory.gather
        params.wire_bytes, params.width = memory.wire, memory.width
    params.header[0], params.header[1] = header.pack(algorithm, request)


def fill_workspace(params: Params, extent: Extent, algorithm: str) -> None:
    """Which part of the workspace the kernel of ``algorithm`` uses."""
    params.one_shot_bytes = extent.one_shot
    if ALGORITHMS[algorithm].one_hop:
        params.data_offset, params.generation_bytes = CONTROL_BYTES, extent.one_shot
    else:
        params.data_offset, params.generation_bytes = extent.offset, extent.generation


def fill_shard(params: Params, shard: Output, out: Output, name: str) -> None:
    """What an all-gather moves: values (as ``norm``) of ``name``, or codes and their scales."""
    params.header[0] = header.moving(params.header[0], name)
    for source, field in (("shard_values", "norm"), ("shard_codes", "codes"), ("shard_scales", "scales")):
        if getattr(shard, field) is not None:
            setattr(params, source, getattr(shard, field).data_ptr())
            setattr(params, field, getattr(out, field).data_ptr())


def fill_call(params: Params, call: Call, out: Output) -> None:
    """Inputs, outputs and scalars of one call, other than an all-gather."""
    norm, quant = call.norm, call.quant
    _fill_term(params, call.partial)
    if call.residual is not None:
        params.residual = call.residual.data_ptr()
    if (branch := call.branch_norm) is not None:
        params.branch_weight = branch.weight.data_ptr()
        params.branch_eps, params.branch_offset = branch.eps, branch.weight_offset
    stream = out.residual if out.residual is not None else out.reduced
    if stream is not None:
        params.stream = stream.data_ptr()
    if norm is not None:
        params.weight = norm.weight.data_ptr()
        params.eps, params.weight_offset = norm.eps, norm.weight_offset
        if out.norm is not None:
            params.norm = out.norm.data_ptr()
    if quant is None:
        return
    params.codes = out.codes.data_ptr()  # type: ignore[union-attr]
    if out.scales is not None:
        params.scales = out.scales.data_ptr()
    scale = quant.given_scale
    if isinstance(scale, torch.Tensor):
        params.scale = scale.data_ptr()
    elif scale is not None:
        params.scale, params.scale_value = None, scale
    if (smallest := getattr(quant, "smallest", None)) is not None:
        params.smallest = smallest
        params.header[1] = header.bounded(params.header[1], smallest)


def _fill_term(params: Params, term: torch.Tensor | Prologue | Terms | ScaledProduct) -> None:
    """The partial, or what it is computed from."""
    if isinstance(term, torch.Tensor):
        params.partial = term.data_ptr()
        return
    if isinstance(term, Terms):
        for k, value in enumerate(term.values):
            params.terms[k] = value.data_ptr()
        return
    if isinstance(term, ScaledProduct):
        params.partial, params.row_scales, params.column_scales = (each.data_ptr() for each in (term.product, term.rows, term.columns))
        params.bias = None if term.bias is None else term.bias.data_ptr()
        return
    if isinstance(term, Gated):
        params.partial, params.up, params.row_stride = term.gate.data_ptr(), term.up.data_ptr(), term.row_stride
        return
    params.partial, params.experts = term.expert_output.data_ptr(), term.count
    if term.weights is not None:
        params.expert_weights = term.weights.data_ptr()
    if isinstance(term, ExpertReduce):
        params.shared_expert = term.token_input.data_ptr()
        return
    params.expert_index, params.expert_rows, params.scaling = term.index.data_ptr(), len(term.expert_output), term.scaling
    if term.shared_expert is not None:
        params.shared_expert = term.shared_expert.data_ptr()
    params.header[0] = header.combining(params.header[0], term.count)


def rows_of_scales(topology: Topology, request: Request, rank: int) -> int:
    """Rows of the scale tensor that a call writes on ``rank``."""
    if request.operation == "reduce_scatter":
        return len(owned_rows(request.tokens, topology.world_size, rank, request.rows))
    return request.tokens


def later_launches(topology: Topology, request: Request, plan: Plan, rank: int) -> tuple[tuple[int, int, int], ...]:
    """First row, number of rows and padding of the launches after the first; the last one writes the padding, if any does."""
    owned = ALGORITHMS[plan.algorithm].owned
    total = largest_block(request.tokens, topology.world_size, request.rows) if owned else request.tokens
    starts = range(plan.rows, plan.rows * plan.launches, plan.rows) if plan.launches > 1 else ()
    pad = rows_of_scales(topology, request, rank) if request.write_padding else 0
    return tuple((first, min(plan.rows, total - first), pad if first + plan.rows >= total else 0) for first in starts)
