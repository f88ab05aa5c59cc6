"""The engine of CUDA groups: plans calls, keeps kernels, fills parameters and launches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from collogue import jit
from collogue.call import Call, Capacity, allocate
from collogue.errors import NotPrepared
from collogue.group import Group
from collogue.launch import Launcher, Params
from collogue.plan import Kernel, Plan, Request, make_kernels, make_plan
from collogue.spec import Output, Quant, RMSNorm
from collogue.topology import Topology
from collogue.variant import Variant
from collogue.workspace import Workspace


@dataclass(slots=True)
class _Ready:
    """A planned call with its kernels loaded: ``main`` alone, or ``add`` before and ``main`` after the transport."""

    plan: Plan
    main: Launcher | None
    add: Launcher | None = None


class KernelEngine:
    """Runs checked calls on this rank's GPU. See :meth:`collogue.Communicator.all_reduce`."""

    def __init__(self, group: Group, capacity: Capacity, topology: Topology, timeout: float) -> None:
        self.group = group
        self.topology = topology
        self.timeout_ns = int(timeout * 1e9)
        self.index = group.device.index
        self.workspace = Workspace(group, topology) if topology.world_size > 1 else None
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
        kernels = make_kernels(self.topology, request, plan)
        return _Ready(plan, *(None if kernel is None else self._launcher(kernel) for kernel in (kernels.main, kernels.add)))

    def _launcher(self, kernel: Kernel) -> Launcher:
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
        params.hidden, params.tokens, params.rank = request.hidden_size, request.tokens, self.group.rank
        params.timeout_ns = self.timeout_ns
        params.column_stride = -(-request.tokens // 4) * 4
        if self.workspace is not None:
            params.slot_bytes, params.failure = self.workspace.slot_bytes, self.workspace.failure_pointer
            for rank, pointer in enumerate(self.workspace.buffer.pointers):
                params.workspace[rank] = pointer
        return launcher

    # ---- running

    def run(self, call: Call, out: Output | None) -> Output:
        if self.workspace is not None and self.workspace.failure.kind:
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
        if ready.add is not None:
            self._transport(ready, call, out, stream)
            return
        launcher = ready.main
        assert launcher is not None
        params = launcher.params
        params.partial = call.partial.data_ptr()
        if call.residual is not None:
            params.residual = call.residual.data_ptr()
        fill_epilogue(params, call.norm, call.quant, out)
        launcher(stream)

    def _transport(self, ready: _Ready, call: Call, out: Output, stream: int) -> None:
        """Row blocks to their owners, add there, gather y, finish everywhere. Bytes travel by the group; only kernels add."""
        world, rank, (tokens, width) = self.topology.world_size, self.group.rank, call.partial.shape
        rows = -(-tokens // world)
        counts = [max(0, min(rows, tokens - r * rows)) for r in range(world)]
        terms = call.partial.new_empty(world, rows, width)
        self.group.exchange_rows(terms, call.partial, counts)
        block = call.partial.new_empty(rows, width)
        add = ready.add
        assert add is not None
        if counts[rank]:
            params = add.params
            params.tokens = counts[rank]
            params.partial, params.partial_stride = terms.data_ptr(), rows * width * call.partial.element_size()
            if call.residual is not None:
                params.residual = call.residual.data_ptr() + rank * rows * width * call.partial.element_size()
            params.stream = block.data_ptr()
            add(stream)
        gathered = call.partial.new_empty(world, rows, width)
        self.group.all_gather(gathered, block)
        if ready.main is None:
            y = out.reduced if out.reduced is not None else out.residual
            assert y is not None
            y.copy_(gathered.view(world * rows, width)[:tokens])
            return
        params = ready.main.params
        params.partial = gathered.data_ptr()
        fill_epilogue(params, call.norm, call.quant, out)
        ready.main(stream)

    # ---- failures

    def check(self) -> None:
        if self.workspace is not None and self.workspace.failure.kind:
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


def fill_epilogue(params: Params, norm: RMSNorm | None, quant: Quant | None, out: Output) -> None:
    """Outputs, weights and scales of one call."""
    stream = out.residual if out.residual is not None else out.reduced
    params.stream = stream.data_ptr()  # type: ignore[union-attr]
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
    )


def _request_of(call: Call) -> Request:
    norm = call.norm
    wide = norm is not None and norm.weight.dtype != call.partial.dtype
    return Request(
        call.tokens, call.hidden_size, call.partial.dtype, call.residual is not None, norm is not None, wide, call.quant, call.wanted
    )
