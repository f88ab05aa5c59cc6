"""What the machine has, agreed between the ranks of a group: the facts that plans are made from."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from collogue.calls.capacity import Capacity
from collogue.calls.terms import MAX_TERMS
from collogue.contract.number import check_seconds, is_whole
from collogue.contract.quant import Quant
from collogue.contract.spec import Islands, as_islands
from collogue.errors import ArgumentError, PlatformError, UnsupportedError
from collogue.group import MAX_PEERS, Group
from collogue.planning import islands as island
from collogue.planning.algorithm import AllReduceBy
from collogue.planning.architecture import architecture_of, has_clusters
from collogue.planning.residency import Fitting, agreed, fitting
from collogue.planning.table import Table, TableArgument, check_alike, find, name_of

#: Seconds: kernels count a little more than it (:func:`collogue.gpu.launch.timeouts`) in 32 bits, with an hour to spare.
MAX_TIMEOUT = 4_500_000.0
#: Communicators that may share a GPU: with more, a call has hardly a CTA.
MOST_CONCURRENT = 16
#: How ranks reach each other: kernels that write into each other's memory, or whatever the group moves bytes with.
Transport: TypeAlias = Literal["peer", "host"]
#: In what order the terms of a sum are added: by islands, or all in rank order.
Order: TypeAlias = Literal["islands", "rank"]
_LOGGER = logging.getLogger("collogue")


@dataclass(frozen=True)
class Overrides:
    """What a user fixes of the plans: the algorithm of ``all_reduce``, how many SMs a call may use, the widest CTA."""

    algorithm: AllReduceBy | None = None
    max_sms: int | None = None
    cta_threads: int | None = None

    def __str__(self) -> str:
        """What has been fixed, to be read behind other arguments."""
        return "".join(f", {name}={value}" for name, value in vars(self).items() if value is not None)

    def check(self) -> None:
        """Raise :class:`ArgumentError` for what cannot be meant."""
        if self.algorithm is not None and self.algorithm not in get_args(AllReduceBy):
            raise ArgumentError(f"algorithm is {self.algorithm!r}", hint=f"give {', '.join(map(repr, get_args(AllReduceBy)))} or nothing")
        limit, threads = self.max_sms, self.cta_threads
        if limit is not None and (not is_whole(limit) or limit < 1):
            raise ArgumentError(f"max_sms is {limit!r}", hint="give a positive number or nothing")
        if threads is not None and (not is_whole(threads) or threads not in range(32, 1025, 32)):
            raise ArgumentError(f"cta_threads is {threads!r}", hint="give a multiple of 32 up to 1024, or nothing")


@dataclass(frozen=True)
class Topology:
    """Facts that are the same on every rank. ``architecture`` is ``None`` on CPU groups; ``table`` holds what is for this machine.

    ``concurrent``: communicators whose calls may run on a GPU at a time, on streams of their own: each takes its part of the GPU, and
    launches its next kernel only when the one before waits for nobody any more. Else they may wait for each other forever
    (docs/design.md). ``fitting``: clusters that fit on every rank's GPU, where all drivers say it. ``islands``: the split of the ranks,
    one where it is empty; ``why``: of the transport. ``wire``: the label of the format in which terms travel.
    """

    world_size: int
    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    architecture: str | None
    multiprocessors: int
    ranks_per_gpu: int
    overrides: Overrides = Overrides()
    table: Table | None = None
    concurrent: int = 1
    fitting: Fitting | None = None
    transport: Transport = "peer"
    islands: Islands = ()
    order: Order = "islands"
    why: str = ""
    wire: str = ""

    @property
    def sums(self) -> Islands | None:
        """The islands whose sums are added; ``None``: all terms are, in rank order."""
        return None if self.order == "rank" or not self.islands else as_islands(self.islands, self.world_size)

    @property
    def reach(self) -> str:
        """Transport, islands and order, for people."""
        parts = [self.transport] + [self.why] * bool(self.why)
        if len(self.islands) > 1:
            parts.append(island.described(self.islands) + (", added in rank order" if self.sums is None else ", each added for itself"))
        parts += [f"terms travel as {self.wire}"] * bool(self.wire)
        return "; ".join(parts)

    @property
    def has_clusters(self) -> bool:
        """Thread-block clusters, PDL and mbarrier transactions: sm_90 and later."""
        return self.architecture is not None and has_clusters(self.architecture)

    @property
    def starts_early(self) -> bool:
        """Whether kernels are launched before the one before them has ended (PDL).

        Not with more than two virtual ranks on a GPU: of three that wait for each other so, one may never start (docs/design.md).
        """
        return self.has_clusters and self.ranks_per_gpu <= 2


def agree(
    group: Group,
    capacity: Capacity,
    timeout: float,
    overrides: Overrides = Overrides(),
    table: TableArgument = False,
    *,
    concurrent: int = 1,
    transport: Transport | None = None,
    order: Order = "islands",
    wire: Quant | None = None,
) -> Topology:
    """Exchange what every rank sees and return what all share. Collective.

    Raises :class:`ArgumentError` where ranks were given different arguments or tables, :class:`PlatformError` where they cannot
    reach each other's memory and are asked to. The timeout is compared because who waits for what others relay gives up later than they
    do.
    """
    check_way(transport, order)
    check_seconds("timeout", timeout, MAX_TIMEOUT)
    overrides.check()
    if not is_whole(concurrent) or not 1 <= concurrent <= MOST_CONCURRENT:
        hint = f"give how many communicators make calls at a time on a GPU, 1 to {MOST_CONCURRENT}"
        raise ArgumentError(f"concurrent is {concurrent!r}", hint=hint)
    facts = _facts(group, capacity, timeout, overrides, concurrent)
    facts["asked"] += (
        f", wire={wire}" * (wire is not None)
        + f", transport={transport}" * (transport is not None)
        + f", order={order}" * (order != "islands")
    )
    found, problem = _find_table(table, facts.get("device"), group.size)
    every = group.all_gather_object({**facts, "table": found.digest if found else "none", "problem": problem})
    for rank, theirs in enumerate(every):
        if theirs["asked"] != every[0]["asked"]:
            raise ArgumentError(
                f"rank 0 asked for {every[0]['asked']}, rank {rank} for {theirs['asked']}",
                hint="make the communicator with the same arguments on every rank",
            )
        if theirs["problem"]:
            raise ArgumentError(f"rank {rank}: {theirs['problem'][0]}", hint=theirs["problem"][1])
    check_alike(theirs["table"] for theirs in every)
    reached = reach(group, every)
    islands = island.split([theirs["host"] for theirs in every], lambda a, b: b in reached[a])
    chosen, why = choose(transport, [theirs["host"] for theirs in every], reached, gpus=group.device.type == "cuda", wire=wire)
    _LOGGER.info("Communicator of %d ranks: transport %s (%s), %s", group.size, chosen, why, island.described(islands))
    way: dict[str, Any] = {"transport": chosen, "islands": islands, "order": order, "why": why, "wire": "" if wire is None else wire.label}
    if group.device.type == "cpu":
        return topology_of(group.size, capacity, overrides=overrides, table=found, concurrent=concurrent, **way)
    architectures = sorted({theirs["architecture"] for theirs in every})
    if len(architectures) > 1:
        raise PlatformError(f"the ranks' GPUs differ: {', '.join(architectures)}", hint="use GPUs of one kind in one group")
    return topology_of(
        group.size,
        capacity,
        architecture=architectures[0],
        device=" and ".join(sorted({str(theirs.get("device")) for theirs in every})),
        multiprocessors=min(theirs["multiprocessors"] for theirs in every),
        ranks_per_gpu=max(sum(other["gpu"] == theirs["gpu"] for other in every) for theirs in every),
        overrides=overrides,
        table=found,
        concurrent=concurrent,
        fitting=agreed([theirs["fitting"] for theirs in every]),
        **way,
    )


def topology_of(
    world_size: int,
    capacity: Capacity,
    *,
    architecture: str | None = None,
    device: str | None = None,
    multiprocessors: int = 0,
    ranks_per_gpu: int = 1,
    overrides: Overrides = Overrides(),
    table: Table | None = None,
    concurrent: int = 1,
    fitting: Fitting | None = None,
    transport: Transport | None = None,
    islands: Islands = (),
    order: Order = "islands",
    why: str = "",
    wire: str = "",
) -> Topology:
    """The topology of a world whose facts are known, with what of ``table`` is for it. ``device``: the GPU's name, if it matters."""
    if table is not None and not table.unused:
        if architecture is None:
            table = table.without("this group is on the CPU")
        elif transport == "host":
            table = table.without("the ranks do not reach each other's memory")
        elif ranks_per_gpu > 1:
            table = table.without("ranks share GPUs")
        elif concurrent > 1:
            table = table.without("several communicators share the GPUs")
        elif overrides != Overrides():
            table = table.without("the communicator fixes the algorithm, the CTAs or the SMs")
        else:
            named = {} if device is None else {"device": device}
            table = table.select(architecture=architecture, **named, world_size=world_size, dtype=name_of(capacity.dtype))
    return Topology(
        world_size,
        capacity.max_tokens,
        capacity.hidden_size,
        capacity.dtype,
        architecture,
        multiprocessors,
        ranks_per_gpu,
        overrides,
        table,
        concurrent,
        fitting,
        transport or ("host" if architecture is None else "peer"),
        islands,
        order,
        why,
        wire,
    )


def _find_table(argument: TableArgument, device: str | None, world_size: int) -> tuple[Table | None, tuple[str, str] | None]:
    """The table, or message and hint of why it cannot be read: every rank must hear of it."""
    try:
        return find(argument, device=device, world_size=world_size), None
    except ArgumentError as error:
        return None, (error.message, error.hint)


def _facts(group: Group, capacity: Capacity, timeout: float, overrides: Overrides, concurrent: int) -> dict[str, Any]:
    shape = f"max_tokens={capacity.max_tokens}, hidden_size={capacity.hidden_size}, dtype={capacity.dtype}"
    together = f", concurrent={concurrent}" if concurrent != 1 else ""
    facts: dict[str, Any] = {"asked": f"{shape}, timeout={float(timeout)}{overrides}{together}", "host": group.host}
    return facts | (_gpu(group.device) if group.device.type == "cuda" else {})


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "architecture": architecture_of((properties.major, properties.minor)),
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu": str(properties.uuid),
        "fitting": fitting(device) if properties.major >= 9 else None,
    }


def alone(capacity: Capacity) -> Topology:
    """Of calls that one GPU makes without a group."""
    facts = _gpu(capacity.device)
    known = {name: facts[name] for name in ("architecture", "device", "multiprocessors", "fitting")}
    return topology_of(1, capacity, **known, why="no group")


def refused_here() -> frozenset[tuple[int, int]]:
    """Pairs (a, b) of this machine's GPUs of which a has no peer access to b."""
    pairs = itertools.permutations(range(torch.cuda.device_count()), 2)
    return frozenset((a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b))


def reach(group: Group, every: list[dict[str, Any]]) -> list[set[int]]:
    """By rank, the ranks of its host whose GPU it has peer access to, of ``every`` rank's ``host`` and ``gpu``; all of them on the CPU.

    Collective.
    """
    if group.device.type == "cpu":
        return [set(range(group.size))] * group.size
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    mine = group.device.index

    def reaches(facts: dict[str, Any]) -> bool:
        theirs = visible.get(facts["gpu"], mine)  # another container's GPU: symmetric memory will say
        return facts["host"] == every[group.rank]["host"] and (theirs == mine or torch.cuda.can_device_access_peer(mine, theirs))

    return [set(ranks) for ranks in group.all_gather_object([rank for rank, facts in enumerate(every) if reaches(facts)])]


def check_way(transport: object, order: object) -> None:
    """Raise :class:`ArgumentError` for a transport or an order that there is not."""
    for name, value, known in (("transport", transport, (None, *get_args(Transport))), ("order", order, get_args(Order))):
        if value not in known:
            raise ArgumentError(f"{name} is {value!r}", hint=f"give {', '.join(map(repr, filter(None, known)))} or nothing")


def choose(
    asked: Transport | None, hosts: Sequence[str], reached: Sequence[set[int]], *, gpus: bool, wire: Quant | None = None
) -> tuple[Transport, str]:
    """The transport of ranks on ``hosts`` and why: ``peer`` where every rank has a GPU and reaches every other's memory, unless another
    is asked for. ``reached``: by rank, whose memory it reaches.

    Raises :class:`PlatformError` where ``peer`` is asked for and cannot be, :class:`UnsupportedError` where it is with ``wire``.
    """
    if wire is not None and gpus:
        if asked == "peer":
            raise UnsupportedError(
                f'wire={wire!r} with transport="peer": kernels that write to peers send terms as they are',
                hint="leave transport out: the group then moves the terms, in that format; or leave wire out",
            )
        return "host", "asked for" if asked == "host" else f"terms travel as {wire.label}, which peer kernels do not send"
    problem, hint = "", 'leave transport out, or give transport="host"'
    far = next((rank for rank, host in enumerate(hosts) if host != hosts[0]), None)
    blind = next(((a, b) for a, ranks in enumerate(reached) for b in range(len(hosts)) if b not in ranks), None)
    if not gpus:
        problem = "ranks on the CPU have no memory that others reach"
    elif far is not None:
        problem = f"the group spans several hosts: rank 0 is on {hosts[0]}, rank {far} on {hosts[far]}"
    elif blind is not None:
        problem = f"rank {blind[0]} has no peer access to the GPU of rank {blind[1]}"
        hint += "; `collogue doctor` shows the peer access matrix"
    elif len(hosts) > MAX_PEERS:
        problem = f"the group has {len(hosts)} ranks; kernels reach {MAX_PEERS}"
    if asked == "peer" and problem:
        raise PlatformError(problem, hint=hint)
    if asked == "host":
        return "host", "asked for"
    return ("host", problem) if problem else ("peer", "every pair of ranks has peer access")


def check_terms(topology: Topology) -> None:
    """Raise :class:`UnsupportedError` where a sum has more terms than the kernel that adds them on the host path takes."""
    if topology.architecture is None or topology.transport == "peer":
        return
    sums = topology.sums
    most = topology.world_size if sums is None else max(map(len, sums)) + len(sums) - 1
    if most > MAX_TERMS:
        raise UnsupportedError(
            f"a sum of this group has {most} terms in {'rank order' if sums is None else 'its islands'}; kernels add at most {MAX_TERMS}",
            hint='use a smaller group, or order="islands" over hosts with at most 8 ranks each',
        )
