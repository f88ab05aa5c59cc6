"""The engine of CUDA groups: plans calls, keeps kernels, fills parameters and launches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from collogue import header, jit
from collogue.call import Call, Capacity, allocate
from collogue.errors import NotPrepared
from collogue.formats import scale_storage
from collogue.group import Group
from collogue.launch import Launcher, Params, timeouts
from collogue.plan import CONTROL_BYTES, Extent, Kernel, Plan, Request, make_kernels, make_plan, memory_of, sends_values
from collogue.spec import Output, Quant, RMSNorm, owned_rows
from collogue.topology import Topology
from collogue.variant import Variant
from collogue.workspace import Workspace


@dataclass(slots=True)
class _Ready:
    """A planned call with its kernels loaded. An all-gather has one of them for values, ``main`` for codes and scales.

    ``more``: first row, number of rows and padding of the launches after the first.
    """

    main: Launcher | None
    values: Launcher | None = None
    more: tuple[tuple[int, int, int], ...] = ()


class KernelEngine:
    """Runs checked calls on this rank's GPU. See :meth:`collogue.Communicator.all_reduce`."""

    def __init__(self, group: Group, capacity: Capacity, topology: Topology, timeout: float) -> None:
        self.group = group
        self.topology = topology
        self.timeout = timeout
        self.index = group.device.index
        self.workspace = Workspace(group, topology, timeout) if topology.world_size > 1 else None
        self._kernels: dict[Variant, Any] = {}
        self._ready: dict[tuple[object, ...], _Ready] = {}

    # ---- planning and loading

    def prepare(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._make_ready(request)

    def _make_ready(self, request: Request) -> _Ready:
        key = _key_of_request(request)
        if key not in self._ready:
            self._ready[key] = self._build(request)
        return self._ready[key]

    def _build(self, request: Request) -> _Ready:
        plan = make_plan(self.topology, request)
        main = values = None
        if request.operation == "all_gather" and plan.algorithm == "local":
            return _Ready(None)  # the shard is the whole
        for kernel in make_kernels(self.topology, request, plan):
            launcher = self._launcher(kernel, plan)
            if request.operation == "all_gather" and kernel.variant.keep_norm:
                values = launcher
            else:
                main = launcher
        return _Ready(main, values, later_launches(self.topology, request, plan, self.group.rank))

    def _launcher(self, kernel: Kernel, plan: Plan) -> Launcher:
        request, shape, variant = kernel.request, kernel.shape, kernel.variant
        if variant not in self._kernels:
            if torch.cuda.is_current_stream_capturing():
                raise NotPrepared(
                    f"{variant.name} is not loaded and a CUDA graph is being captured",
                    hint=f"call comm.prepare(tokens={request.tokens}, ...) or make the call once before the capture",
                )
            assert self.topology.architecture is not None
            self._kernels[variant] = jit.load(jit.cubin(variant, self.topology.architecture), variant.name)
        launcher = Launcher(self._kernels[variant], shape, dependent=self.topology.has_clusters)
        params = launcher.params
        fill_shape(params, self.topology, request, plan, self.group.rank)
        params.timeout, params.relay_timeout = timeouts(self.timeout)
        if self.workspace is not None:
            params.failure = self.workspace.failure_pointer
            fill_workspace(params, self.workspace.extent, plan.algorithm)
            for rank, pointer in enumerate(self.workspace.buffer.pointers):
                params.workspace[rank] = pointer
        return launcher

    # ---- running

    def run(self, call: Call, out: Output | None) -> Output:
        if self.workspace is not None and self.workspace.failure.fault:
            self.workspace.raise_failure()
        ready = self._ready.get(_key_of_call(call))
        if ready is None:
            ready = self._make_ready(_request_of(call))
        if out is None:
            out = allocate(call)
        if torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                self._launch(ready, call, out)
        else:
            self._launch(ready, call, out)
        return out

    def _launch(self, ready: _Ready, call: Call, out: Output) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        launcher = ready.main
        if call.operation == "all_gather":
            self._all_gather(ready, call, out, stream)
            return
        assert launcher is not None
        params = launcher.params
        params.partial = call.partial.data_ptr()
        if call.residual is not None:
            params.residual = call.residual.data_ptr()
        fill_epilogue(params, call.norm, call.quant, out)
        launcher(stream)
        if ready.more:
            _launch_more(launcher, ready.more, stream)

    def _all_gather(self, ready: _Ready, call: Call, out: Output, stream: int) -> None:
        """One kernel for each tensor of values, one for codes and their scales."""
        shard = call.shard
        assert shard is not None
        if ready.values is None and ready.main is None:
            for name, tensor in shard.items():
                target = getattr(out, name)
                (scale_storage(target) if name == "scales" else target).copy_(scale_storage(tensor) if name == "scales" else tensor)
            return
        if ready.values is not None:
            for name in ("reduced", "residual", "norm"):
                if getattr(shard, name) is not None:
                    fill_shard(ready.values.params, Output(norm=getattr(shard, name)), Output(norm=getattr(out, name)))
                    ready.values(stream)
                    _launch_more(ready.values, ready.more, stream)
        if ready.main is not None:
            fill_shard(ready.main.params, Output(codes=shard.codes, scales=shard.scales), out)
            ready.main(stream)
            _launch_more(ready.main, ready.more, stream)

    # ---- failures

    def check(self) -> None:
        if self.workspace is not None and self.workspace.failure.fault:
            self.workspace.raise_failure()

    def reset(self) -> None:
        torch.cuda.synchronize(self.index)
        if self.workspace is not None:
            self.workspace.reset()

    def close(self) -> None:
        torch.cuda.synchronize(self.index)
        self.group.barrier()
        self._ready.clear()
        self._kernels.clear()
        self.workspace = None
        self.group.barrier()  # unloading a kernel may wait for the GPU: virtual ranks must not launch before all have done it


def fill_workspace(params: Params, extent: Extent, algorithm: str) -> None:
    """Which part of the workspace the kernel of ``algorithm`` uses."""
    params.one_shot_bytes = extent.one_shot
    if algorithm == "one_shot":
        params.data_offset, params.generation_bytes = CONTROL_BYTES, extent.one_shot
    else:
        params.data_offset, params.generation_bytes = extent.offset, extent.generation


def _launch_more(launcher: Launcher, more: tuple[tuple[int, int, int], ...], stream: int) -> None:
    """The launches after the first; then the parameters are the first one's again."""
    params = launcher.params
    before = params.first, params.count, params.pad
    for params.first, params.count, params.pad in more:
        launcher(stream)
    params.first, params.count, params.pad = before


def rows_of_scales(topology: Topology, request: Request, rank: int) -> int:
    """Rows of the scale tensor that a call writes on ``rank``."""
    if request.operation == "reduce_scatter":
        return len(owned_rows(request.tokens, topology.world_size, rank))
    return request.tokens


def later_launches(topology: Topology, request: Request, plan: Plan, rank: int) -> tuple[tuple[int, int, int], ...]:
    """First row, number of rows and padding of the launches after the first; the last one writes the padding."""
    total = request.tokens if plan.algorithm == "two_shot" else -(-request.tokens // topology.world_size)
    starts = range(plan.rows, plan.rows * plan.launches, plan.rows) if plan.launches > 1 else ()
    pad = rows_of_scales(topology, request, rank)
    return tuple((first, min(plan.rows, total - first), pad if first + plan.rows >= total else 0) for first in starts)


def fill_shape(params: Params, topology: Topology, request: Request, plan: Plan, rank: int) -> None:
    """What follows from the shape of a call: extents and places in the workspace. The first launch, where there are several."""
    world, tokens, algorithm = topology.world_size, request.tokens, plan.algorithm
    owned = len(owned_rows(tokens, world, rank))
    params.hidden, params.tokens, params.rank = request.hidden_size, tokens, rank
    params.first, params.count, params.block = 0, plan.rows, -(-tokens // world)
    rows = rows_of_scales(topology, request, rank)
    params.pad = rows if plan.launches == 1 else 0
    params.column_stride, params.shard_column_stride = -(-rows // 4) * 4, -(-owned // 4) * 4
    if algorithm != "local":
        memory = memory_of(algorithm, world, request.hidden_size, request.dtype, request.quant, values=sends_values(request))
        params.slot_bytes, params.gather_bytes = plan.rows * memory.slot, plan.rows * memory.gather
        params.wire_bytes, params.width = memory.wire, memory.width
    params.header[0], params.header[1] = header.pack(
        algorithm, request.operation, request.dtype, request.residual, request.norm, request.wanted.norm, request.quant
    )


def fill_shard(params: Params, shard: Output, out: Output) -> None:
    """What an all-gather moves: values (as ``norm``), or codes and their scales."""
    for source, target, name in (("shard_values", "norm", "norm"), ("shard_codes", "codes", "codes"), ("shard_scales", "scales", "scales")):
        if getattr(shard, name) is not None:
            setattr(params, source, getattr(shard, name).data_ptr())
            setattr(params, target, getattr(out, name).data_ptr())


def fill_epilogue(params: Params, norm: RMSNorm | None, quant: Quant | None, out: Output) -> None:
    """Outputs, weights and scales of one call."""
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
    params.smallest = getattr(quant, "smallest", 0.0)


def _key_of_call(call: Call) -> tuple[object, ...]:
    norm = call.norm
    return (
        *call.partial.shape,
        call.residual is not None,
        norm is not None,
        norm is not None and norm.weight.dtype != call.partial.dtype,
        call.quant.label if call.quant is not None else None,
        call.wanted.norm,
        call.wanted.residual,
        call.operation,
    )


def _key_of_request(request: Request) -> tuple[object, ...]:
    return (
        request.tokens,
        request.hidden_size,
        request.residual,
        request.norm,
        request.wide_weight,
        request.quant.label if request.quant is not None else None,
        request.wanted.norm,
        request.wanted.residual,
        request.operation,
    )


def _request_of(call: Call) -> Request:
    norm = call.norm
    wide = norm is not None and norm.weight.dtype != call.partial.dtype
    return Request(
        call.tokens,
        call.hidden_size,
        call.partial.dtype,
        call.residual is not None,
        norm is not None,
        wide,
        call.quant,
        call.wanted,
        call.operation,
    )
