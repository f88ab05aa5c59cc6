"""``collogue explain``: the plan of a call on this machine or on another, without making a communicator."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch

from collogue.calls.capacity import Capacity, check_hidden_size, count_tokens
from collogue.calls.request import make_request
from collogue.contract.number import is_whole
from collogue.contract.prologue import PrologueForm
from collogue.contract.quant import Quant, describe, parse
from collogue.contract.spec import VALUE_DTYPES, Operation, as_rows
from collogue.errors import ArgumentError, DTypeError, PlatformError
from collogue.group import MAX_WORLD_SIZE, check_gpus
from collogue.planning import model
from collogue.planning.architecture import ARCHITECTURES, architecture_of
from collogue.planning.gpus import Gpu, gpu_named
from collogue.planning.host import plan_call
from collogue.planning.islands import split
from collogue.planning.plan import Plan, check_width
from collogue.planning.table import TableArgument, find, name_of
from collogue.planning.topology import Order, Topology, Transport, check_terms, check_way, choose, refused_here, topology_of


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know. ``architecture`` is ``None`` for the CPU; ``device`` is the GPU's name, ``None`` if it is any.

    ``gpus``: of a host; ``hosts``: how many there are, each with as many ranks, in rank order; ``refused``: ordered pairs of a host's GPUs
    without peer access. ``gpu``: of another machine, whose times are predicted.
    """

    architecture: str | None = None
    device: str | None = None
    multiprocessors: int = 0
    gpus: int = MAX_WORLD_SIZE
    gpu: Gpu | None = None
    hosts: int = 1
    refused: frozenset[tuple[int, int]] = frozenset()

    @classmethod
    def named(cls, architecture: str) -> Machine:
        """Any machine with GPUs of ``architecture``, one for each rank."""
        if architecture not in ARCHITECTURES:
            raise ArgumentError(f"unknown architecture {architecture!r}", hint=f"choose one of {', '.join(ARCHITECTURES)}")
        return cls(architecture, None, ARCHITECTURES[architecture].multiprocessors)

    @classmethod
    def here(cls, instead: str = "") -> Machine:
        """This machine's GPUs. Raises :class:`PlatformError` where there is none, with ``instead`` in the hint."""
        check_gpus(instead)
        properties = torch.cuda.get_device_properties(0)
        architecture = architecture_of((properties.major, properties.minor))
        count = torch.cuda.device_count()
        return cls(architecture, properties.name, properties.multi_processor_count, count, refused=refused_here())

    @classmethod
    def with_gpu(cls, name: str, hosts: int = 1, host_gbps: float | None = None) -> Machine:
        """A machine with GPUs called ``name``, one for each rank, of which :data:`~collogue.planning.gpus.GPUS` holds the facts.

        ``host_gbps``: gigabits per second of a GPU to other hosts, in place of what is assumed.
        """
        gpu = gpu_named(name)
        if host_gbps is not None:
            if not (math.isfinite(host_gbps) and host_gbps > 0):
                raise ArgumentError(f"host_gbps is {host_gbps!r}", hint="give gigabits per second of one GPU in one direction, such as 400")
            gpu = replace(gpu, host_gbps=host_gbps, host_link="as given")
        return cls(gpu.architecture, gpu.device, gpu.multiprocessors, gpu=gpu, hosts=hosts)

    @classmethod
    def of(cls, device: str, architecture: str | None, hosts: int = 1) -> Machine:
        """The machine of a command line: ``device`` is ``"cpu"``, ``"cuda"`` or ``"auto"``; a named architecture goes before it. With
        several ``hosts`` each is such a machine.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise ArgumentError(f"unknown device {device!r}", hint="choose one of auto, cpu, cuda")
        if architecture is not None:
            one = cls.named(architecture)
        else:
            on_gpus = device == "cuda" or (device == "auto" and torch.cuda.is_available())
            one = cls.here("name an --architecture") if on_gpus else cls()
        return replace(one, hosts=hosts)

    def hosts_of(self, world_size: int) -> list[str]:
        """The host of each of ``world_size`` ranks. Raises :class:`ArgumentError` where the hosts do not have as many ranks each."""
        if not is_whole(self.hosts) or self.hosts < 1:
            raise ArgumentError(f"hosts is {self.hosts!r}", hint="give how many hosts the ranks are on, 1 or more")
        if world_size % self.hosts:
            hint = "give a world size, which counts the ranks of all hosts, that is a multiple of the hosts"
            raise ArgumentError(f"{world_size} ranks are not the same number on each of {self.hosts} hosts", hint=hint)
        return [f"host {rank * self.hosts // world_size}" for rank in range(world_size)]

    def topology(
        self,
        world_size: int,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        table: TableArgument = None,
        *,
        transport: Transport | None = None,
        order: Order = "islands",
        wire: Quant | None = None,
    ) -> Topology:
        """What ``world_size`` ranks on such hosts would agree on. Ranks of a host take its GPUs in their order, and in turn.

        Raises :class:`ArgumentError` where a communicator cannot be made so.
        """
        check_way(transport, order)
        on_gpus, hosts = self.architecture is not None, self.hosts_of(world_size)
        capacity = Capacity(max_tokens, hidden_size, dtype, torch.device("cuda" if on_gpus else "cpu"), world_size, wire=wire)
        capacity.check()
        of_gpu = [rank % (world_size // self.hosts) % self.gpus for rank in range(world_size)]
        reached = [
            {b for b in range(world_size) if hosts[a] == hosts[b] and (of_gpu[a], of_gpu[b]) not in self.refused} for a in range(world_size)
        ]
        try:
            chosen, why = choose(transport, hosts, reached, gpus=on_gpus, wire=wire)
        except PlatformError as error:  # the machine is an argument as well
            raise ArgumentError(error.message, hint=error.hint) from error
        found = find(table, device=self.device, world_size=world_size)
        topology = topology_of(
            world_size,
            capacity,
            architecture=self.architecture,
            device=self.device,
            multiprocessors=self.multiprocessors,
            ranks_per_gpu=-(-world_size // (self.gpus * self.hosts)),
            table=found,
            transport=chosen,
            islands=split(hosts, lambda a, b: b in reached[a]),
            order=order,
            why=why,
            wire="" if wire is None else wire.label,
        )
        check_width(topology, hidden_size)
        check_terms(topology)
        return topology


def dtype_named(name: str) -> torch.dtype:
    """The dtype of values called ``name``. Raises :class:`DTypeError`."""
    known = {name_of(dtype): dtype for dtype in VALUE_DTYPES}
    if name not in known:
        raise DTypeError(f"unknown dtype {name!r}", hint=f"choose one of {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Explanation:
    """A call and its plan. ``call`` is one line."""

    call: str
    topology: Topology
    plan: Plan
    gpu: Gpu | None = None
    hosts: int = 1

    def __str__(self) -> str:
        """For people, at most 80 columns wide."""
        facts = [] if self.gpu is None else [str(self.gpu)] + [self.gpu.between_hosts] * (self.hosts > 1)
        below = [textwrap.fill(each, 80, subsequent_indent="  ") for each in facts]
        return "\n".join([textwrap.fill(self.call, 80), str(self.plan), *below])

    def as_json(self) -> dict[str, Any]:
        """As plain data; ``None`` where the text has a dash."""
        names = ("architecture", "multiprocessors", "world_size", "max_tokens", "islands", "order")
        facts = {name: getattr(self.topology, name) for name in names} | {"wire": self.topology.wire or None}
        without_launch = dict.fromkeys(("rows", "launches") if self.plan.shape is None else ())
        without_model = dict.fromkeys(("predicted_us", "floor_us") if not self.plan.modeled else ())
        gpu = None if self.gpu is None else asdict(self.gpu)
        return {"call": self.call, "hosts": self.hosts, **facts, **asdict(self.plan), **without_launch, **without_model, "gpu": gpu}


def explain(
    machine: Machine,
    tokens: int | None,
    *,
    hidden_size: int,
    world_size: int,
    dtype: str = "bfloat16",
    format: str = "none",
    operation: str = "all_reduce",
    residual: bool = True,
    norm: bool = True,
    keep_norm: bool = False,
    max_tokens: int | None = None,
    table: TableArgument = None,
    prologue: PrologueForm | None = None,
    branch_norm: bool = False,
    rows: Sequence[int] | None = None,
    transport: Transport | None = None,
    order: Order = "islands",
    wire: str = "none",
) -> Explanation:
    """The plan that ``comm.explain`` would give on every rank of such a communicator. ``tokens`` may be left out where ``rows`` are given.

    ``transport`` and ``order`` are as the communicator takes them, ``wire`` is the label of the format that it takes.
    Raises :class:`ArgumentError` (its subclasses) for calls that cannot be, and for a table that cannot be read.
    """
    if operation not in get_args(Operation):
        raise ArgumentError(f"unknown operation {operation!r}", hint=f"choose one of {', '.join(get_args(Operation))}")
    known: Operation = operation  # type: ignore[assignment]
    check_hidden_size(hidden_size)
    owned = as_rows(rows, world_size)
    tokens = count_tokens(tokens, owned)
    most, value_dtype, quant = max(tokens, max_tokens or 1), dtype_named(dtype), parse(format)
    if quant is not None:
        quant.check_hidden_size(hidden_size)
    way: dict[str, Any] = {"transport": transport, "order": order, "wire": parse(wire)}
    topology = machine.topology(world_size, most, hidden_size, value_dtype, table, **way)
    request = make_request(
        tokens,
        hidden_size,
        value_dtype,
        residual=residual,
        norm=norm,
        wide_weight=False,
        quant=quant,
        keep_norm=keep_norm,
        operation=known,
        prologue=prologue,
        branch=branch_norm,
        rows=owned,
    )
    steps = (("branch norm", branch_norm), ("residual", residual and operation != "finish"), ("norm", norm))
    epilogue = [name for name, there in steps if there]
    before = [] if prologue is None else [str(prologue)]
    parts = " + ".join([*before, operation, *epilogue, *([describe(quant)] if quant is not None else [])])
    ranks = f"{world_size} ranks" + ("" if owned is None else f" with {', '.join(map(str, owned))} rows")
    where = "on the CPU" if topology.architecture is None else f"on {machine.device or machine.architecture}"
    where += f", {machine.hosts} hosts" * (machine.hosts > 1)
    plan = plan_call(topology, request)
    if machine.gpu is not None:
        predicted, floor = model.predict(machine.gpu, plan, request, topology)
        of = f"{machine.hosts} hosts of {machine.gpu.name}" if machine.hosts > 1 else machine.gpu.name
        plan = replace(plan, predicted_us=predicted, floor_us=floor, model=f"{of} fitted to two H200 (docs/machines.md)")
    return Explanation(f"{parts}, {tokens} x {hidden_size} {dtype}, {ranks} {where}", topology, plan, machine.gpu, machine.hosts)
