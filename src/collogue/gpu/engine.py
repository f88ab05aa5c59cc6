"""The engine of CUDA groups: plans calls, keeps kernels, fills parameters and launches."""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from collogue.calls.call import Call, check_indices
from collogue.calls.request import Request, Signature, keep
from collogue.contract.formats import scale_storage
from collogue.contract.spec import Output
from collogue.errors import ClosedError, NotPrepared
from collogue.gpu import jit
from collogue.gpu.bound import Bound, bind, key_of, unbound
from collogue.gpu.exclusive import Exclusive
from collogue.gpu.failure import FailureRecord
from collogue.gpu.journal import Journal
from collogue.gpu.launch import Launcher, timeouts
from collogue.gpu.order import AnyOrder, StreamOrder
from collogue.gpu.parameters import fill_call, fill_shape, fill_shard, fill_workspace, later_launches
from collogue.gpu.workspace import Workspace
from collogue.group import Group
from collogue.planning.plan import Kernel, Plan, make_kernels, make_plan
from collogue.planning.topology import Topology
from collogue.planning.variant import Variant

_LOGGER = logging.getLogger("collogue")


@dataclass(slots=True)
class _Ready:
    """A planned call with its kernels loaded. An all-gather has one of them for values, ``main`` for codes and scales.

    ``more``: first row, number of rows and padding of the launches after the first. ``term``: computes this rank's terms, in front.
    """

    main: Launcher | None
    values: Launcher | None = None
    more: tuple[tuple[int, int, int], ...] = ()
    term: Launcher | None = None

    def launch(self, stream: int) -> None:
        """All launches of a call other than an all-gather."""
        assert self.main is not None
        self.main(stream)
        if self.more:
            _launch_more(self.main, self.more, stream)


@dataclass
class Nobody:
    """A group of one rank: what kernels that send nothing need of a group."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        """Nobody else is there."""


class KernelEngine:
    """Runs checked calls on this rank's GPU. See :meth:`collogue.Communicator.all_reduce`."""

    #: What a user does to have kernels loaded before a capture.
    how_to_load = "call comm.prepare(tokens={tokens}, ...) or make the call once before the capture"

    def __init__(self, group: Group | Nobody, topology: Topology, timeout: float, name: str = "?") -> None:
        self.group = group
        self.topology = topology
        self.timeout = timeout
        self.index = group.device.index
        self.workspace = None if isinstance(group, Nobody) or topology.world_size == 1 else Workspace(group, topology, timeout, name)
        self._kernels: dict[Variant, Any] = {}
        self._ready: dict[Signature, _Ready] = {}
        self._bound: dict[object, Bound] = {}
        self.latest: Bound = unbound  # most calls are like the one before: to be tried before `quick`
        self.in_use = Exclusive()
        self._order: StreamOrder | AnyOrder = StreamOrder(self.index)
        self._terms: torch.Tensor | None = None  # this rank's terms, where a kernel in front computes them
        self.stream: int | None = None  # of the last call, where a call on it need not wait for anything
        record = (ctypes.c_uint64 * 2)() if self.workspace is None else (ctypes.c_uint64 * 2).from_address(self.workspace.failure_pointer)
        #: Fault and finder, and whom the finder missed: zero while nothing has failed.
        self.failure_words = ctypes.c_uint64.from_buffer(record, 0), ctypes.c_uint32.from_buffer(record, FailureRecord.late_rank.offset)
        self._warned = False
        if self.workspace is not None:
            _OPEN.add(self)
        self._debug = os.environ.get("COLLOGUE_DEBUG", "0") not in ("", "0")

    # ---- planning and loading

    def prepare(self, signatures: Iterable[Signature]) -> None:
        with self.in_use:
            for signature in signatures:
                self._make_ready(signature)

    def _make_ready(self, signature: Signature) -> _Ready:
        ready = self._ready.get(signature)
        if ready is None:
            if self.workspace is None and self.topology.world_size > 1:  # another thread has closed it meanwhile
                raise ClosedError("the communicator is closed", hint="make a new collogue.Communicator")
            ready = keep(self._ready, signature, self._build(signature.request))
        return ready

    def _build(self, request: Request) -> _Ready:
        plan = make_plan(self.topology, request)
        main = values = term = None
        if request.operation == "all_gather" and plan.algorithm == "local":
            return _Ready(None)  # the shard is the whole
        for kernel in make_kernels(self.topology, request, plan):
            if plan.term is not None and term is None:
                # Among ranks that share a GPU it must not take up SMs while it waits for the kernel in front: others' kernels need them.
                term = self._launcher(kernel, plan.term, early=self.topology.ranks_per_gpu == 1)
                if self._terms is None:  # once: graphs keep its address
                    most = self.topology.max_tokens * self.topology.hidden_size
                    self._terms = torch.empty(most, dtype=self.topology.dtype, device=self.group.device)
                continue
            launcher = self._launcher(kernel, plan)
            if request.operation == "all_gather" and kernel.variant.keep_norm:
                values = launcher
            else:
                main = launcher
        return _Ready(main, values, later_launches(self.topology, request, plan, self.group.rank), term)

    def _launcher(self, kernel: Kernel, plan: Plan, *, early: bool = True) -> Launcher:
        request, shape, variant = kernel.request, kernel.shape, kernel.variant
        if variant not in self._kernels:
            if torch.cuda.is_current_stream_capturing():
                raise NotPrepared(
                    f"{variant.name} is not loaded and a CUDA graph is being captured",
                    hint=self.how_to_load.format(tokens=request.tokens),
                )
            assert self.topology.architecture is not None
            code = jit.cubin(variant, self.topology.architecture)
            with torch.cuda.device(self.index):
                self._kernels[variant] = jit.load(code, variant.name)
        launcher = Launcher(self._kernels[variant], shape, dependent=early and self.topology.starts_early)
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

    def quick(self, call: Call, out: Output | None) -> Output | None:
        """The same for a call like one before in which nothing is unusual; ``None``, with nothing done, where anything is."""
        if not call.bindable:
            return None
        try:
            bound = self._bound.get(key_of(call, out))
        except (AttributeError, TypeError):  # arguments that are not what they should be
            return None
        if bound is None or bound is self.latest:
            return None
        self.latest = bound
        return bound(call.operation, call.partial, call.residual, call.norm, call.quant, call.keep_norm, out, call.rows, call.write_padding)

    def run(self, call: Call, out: Output | None) -> Output:
        if self._debug and not call.bindable and not torch.cuda.is_current_stream_capturing():
            check_indices(call.partial)
        with self.in_use:
            if self._debug or (self.workspace is not None and self.workspace.failed):
                self.check()
            ready = self._make_ready(call.signature)
            given, out = out, call.signature.empty() if out is None else out
            if torch._C._cuda_getDevice() != self.index:
                with torch.cuda.device(self.index):
                    self._launch(ready, call, out)
            else:
                self._launch(ready, call, out)
            if ready.main is not None and call.bindable and not self._debug and self.stream is not None:
                bound = bind(self, call, given, ready.main, ready.launch, more=bool(ready.more))
                if bound is not None:
                    self.latest = keep(self._bound, key_of(call, given), bound)
            return out

    def _launch(self, ready: _Ready, call: Call, out: Output) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        if torch.cuda.is_current_stream_capturing():  # in what order graphs are replayed is the user's to say
            _captured.add(self)
            self._send(ready, call, out, stream)
            return
        self._order.enter(stream)
        self._send(ready, call, out, stream)
        self._order.leave(stream)
        if self.stream != self._order.stream:
            self.stream = self._order.stream
            if self.workspace is not None:
                self.workspace.stream = stream
            self._look_at_others()

    def _look_at_others(self) -> None:
        """Warn once where more communicators make calls on streams of their own than this one was made for."""
        if self._warned or self.workspace is None or self.topology.ranks_per_gpu > 1:  # virtual ranks share a GPU on purpose
            return
        others = {engine.stream for engine in list(_OPEN) if engine.index == self.index and engine.stream not in (None, self.stream)}
        if len(others) >= self.topology.concurrent:
            self._warned = True
            _LOGGER.warning(
                "Communicators make calls on %d streams of cuda:%d, and this one was made with concurrent=%d. On full GPUs they may keep "
                "each other from starting until the timeout. Make each with concurrent=%d, or their calls on one stream.",
                len(others) + 1,
                self.index,
                self.topology.concurrent,
                len(others) + 1,
            )

    def _send(self, ready: _Ready, call: Call, out: Output, stream: int) -> None:
        if call.operation == "all_gather":
            self._all_gather(ready, call, out, stream)
            return
        assert ready.main is not None
        ready.main.quant = None
        fill_call(ready.main.params, call, out)
        if ready.term is not None:
            fill_call(ready.term.params, Call(call.partial), Output(reduced=self._terms))
            ready.term(stream)
            ready.main.params.partial = ready.term.params.stream
        ready.launch(stream)

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
                    fill_shard(ready.values.params, Output(norm=getattr(shard, name)), Output(norm=getattr(out, name)), name)
                    ready.values(stream)
                    _launch_more(ready.values, ready.more, stream)
        if ready.main is not None:
            fill_shard(ready.main.params, Output(codes=shard.codes, scales=shard.scales), out, "codes")
            ready.main(stream)
            _launch_more(ready.main, ready.more, stream)

    # ---- failures

    def check(self) -> None:
        if (workspace := self.workspace) is not None:  # another thread may close it meanwhile
            workspace.check()

    def journal(self) -> Journal:
        if self.workspace is None:
            return Journal(0, 1, 0, {0: ()})
        return self.workspace.journal()

    def reset(self) -> None:
        with self.in_use:
            torch.cuda.synchronize(self.index)
            if self.workspace is not None:
                self.workspace.reset()

    def close(self, collective: bool) -> None:
        with self.in_use.wait():
            torch.cuda.synchronize(self.index)
            if collective:
                self.group.barrier()
            self._ready.clear()
            self._bound.clear()
            self.latest = unbound
            self._kernels.clear()
            self._terms = None
            _captured.discard(self)
            _OPEN.discard(self)
            if self.workspace is not None:
                self.workspace.close()
            self.workspace = None
            if collective:
                self.group.barrier()  # giving memory back may wait for the GPU: virtual ranks must not launch before all have done it


#: Engines that communicate, until they are closed.
_OPEN: weakref.WeakSet[KernelEngine] = weakref.WeakSet()
#: Engines whose calls lie in CUDA graphs, until they are closed: a graph holds addresses, and nothing that keeps the memory.
_captured: set[KernelEngine] = set()


def _launch_more(launcher: Launcher, more: tuple[tuple[int, int, int], ...], stream: int) -> None:
    """The launches after the first; then the parameters are the first one's again, also where a launch is rejected."""
    params = launcher.params
    before = params.first, params.count, params.scale_rows
    try:
        for params.first, params.count, params.scale_rows in more:
            launcher(stream)
    finally:
        params.first, params.count, params.scale_rows = before
