"""One rank of ``collogue ablate``: a communicator for each switch, whose calls are timed in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
import torch.distributed as dist
from cuda.bindings import driver

from collogue.communicator import Communicator
from collogue.errors import PlatformError
from collogue.gpu import engine as cuda
from collogue.gpu import jit
from collogue.gpu.launch import Launcher
from collogue.group import as_group
from collogue.planning.architecture import architecture_of
from collogue.planning.plan import LaunchShape
from collogue.planning.variant import Variant
from collogue.tools.ablation.build import PORTABLE_CLUSTER, Builder, planned_for, topology_of, variant_of
from collogue.tools.ablation.switches import Switch
from collogue.tools.bench.fused import FusedCall
from collogue.tools.bench.gate import call_each_set, each
from collogue.tools.bench.timing import Chain, Latency, measure, slowest
from collogue.tools.check.case import Case
from collogue.tools.check.rank import Answers

Row: TypeAlias = dict[str, Any]
_TIMEOUT = 5.0


@contextmanager
def built_by(builder: Builder, switch: Switch) -> Iterator[None]:
    """Inside, engines of this process load their kernels from ``builder`` and launch them as the switch says."""

    def cubin(variant: Variant, architecture: str) -> bytes:
        return builder.compile(switch, variant)[0]

    def launcher(kernel: Any, shape: LaunchShape, *, dependent: bool) -> Launcher:
        if shape.cluster > PORTABLE_CLUSTER:
            allow_large_clusters(kernel)
        return Launcher(kernel, shape, dependent=dependent and switch.dependent)

    with planned_for(switch), patch.object(jit, "cubin", cubin), patch.object(cuda, "Launcher", launcher):
        yield


def allow_large_clusters(kernel: Any) -> None:
    """Let a loaded kernel be launched in clusters of more CTAs than every GPU must accept. Raises :class:`PlatformError`."""
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    device = driver.CUdevice(torch.cuda.current_device())
    (error,) = driver.cuKernelSetAttribute(attribute, 1, driver.CUkernel(int(kernel.handle)), device)
    if error:
        raise PlatformError(f"this GPU takes no clusters of more than {PORTABLE_CLUSTER} CTAs: {error!r}", hint="leave this switch out")


class _Shape:
    """Everything of one case: a communicator and a captured call for each switch."""

    def __init__(self, group: dist.ProcessGroup, case: Case, builder: Builder, answers: Answers) -> None:
        self._group, self._case, self._builder, self._answers = group, case, builder, answers
        self.calls: dict[str, FusedCall] = {}
        #: What of the outputs is not the reference's, by switch.
        self.differs: dict[str, str | None] = {}

    def prepare(self, switch: Switch) -> None:
        """Collective. Loads the switch's kernel and compares what it writes."""
        case = self._case
        comm = Communicator(self._group, max_tokens=case.tokens, hidden_size=case.hidden_size, dtype=case.value_dtype, timeout=_TIMEOUT)
        if switch.threads is not None:
            engine: Any = comm._engine
            engine.topology = replace(engine.topology, overrides=replace(engine.topology.overrides, cta_threads=switch.threads))
        call = self.calls[switch.name] = FusedCall(comm, case, self._answers)
        with built_by(self._builder, switch):
            self.differs[switch.name] = call.gate(partial(call_each_set, call))

    def close(self) -> None:
        for call in self.calls.values():
            call.comm.close()


def ablate_rank(
    group: dist.ProcessGroup, tell: Callable[[str], None], switches: Sequence[Switch], cases: Sequence[Case], replays: int, rounds: int
) -> list[Row]:
    """Rows of every case and switch, the same on every rank; all switches of a case are replayed in turn.

    Where memory lies moves a time by a few hundredths of a microsecond. Every round has communicators, tensors and graphs of its own,
    and the round whose time is the median stands for the switch.
    """
    gc.disable()
    ranks, stream, answers = as_group(group), torch.cuda.Stream(), Answers()  # type: ignore[no-untyped-call]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    architecture = architecture_of((properties.major, properties.minor))
    rows: list[Row] = []

    def meet() -> None:
        torch.cuda.synchronize()
        dist.barrier(group)
        torch.cuda.synchronize()

    with Builder(architecture) as builder:
        tell("compiling")
        pairs = [(s, c) for s in switches for c in cases if s.applies(c.format, architecture)]
        builder.compile_all([(s, variant_of(s, topology_of(s, c, architecture, properties.multi_processor_count), c)) for s, c in pairs])
        dist.barrier(group)
        for case in cases:
            tell(str(case))
            mine = {s.name: s for s in switches if s.applies(case.format, architecture)}
            errors, differs = dict[str, str](), dict[str, str]()
            times: dict[str, list[Latency]] = {name: [] for name in mine}
            for _ in range(rounds):
                shape = _Shape(group, case, builder, answers)
                each(ranks, [name for name in mine if name not in errors], lambda n, s=shape, m=mine: s.prepare(m[n]), errors)  # type: ignore[misc]
                chains = {name: Chain(shape.calls[name].call, stream) for name in mine if name not in errors}
                everyone = ranks.all_gather_object((measure(chains, replays, meet), shape.differs))
                for name in chains:
                    times[name].append(slowest([found[name] for found, _ in everyone]))
                    for _, wrong in everyone:
                        if text := wrong[name]:
                            differs.setdefault(name, text)
                del chains
                shape.close()
            for name, switch in mine.items():
                row: Row = {"switch": name, "tokens": case.tokens, "format": case.format, "world_size": case.world_size}
                row |= {"valid": switch.valid, "replays": replays, "rounds_us": [latency.us for latency in times[name]]}
                if name in errors:
                    row |= {"us": None, "low_us": None, "high_us": None, "bits_changed": None, "error": errors[name]}
                else:
                    row |= asdict(sorted(times[name], key=lambda latency: latency.us)[rounds // 2])
                    row |= {"bits_changed": name in differs, "first_difference": differs.get(name), "error": None}
                rows.append(row)
            tell(" | ".join([str(case), *(f"{r['switch']} {r['us']:.2f}" for r in rows[-len(mine) :] if r["us"])]))
    return rows
