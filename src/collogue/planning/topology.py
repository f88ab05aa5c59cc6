"""What the machine has, agreed between the ranks of a group: the facts that plans are made from."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from collogue.calls.capacity import Capacity
from collogue.contract.number import check_seconds, is_whole
from collogue.errors import ArgumentError, PlatformError
from collogue.group import Group
from collogue.planning.algorithm import AllReduceBy
from collogue.planning.residency import Fitting, agreed, fitting
from collogue.planning.table import Table, TableArgument, check_alike, find, name_of

#: Seconds: kernels count a little more than it (:func:`collogue.gpu.launch.timeouts`) in 32 bits, with an hour to spare.
MAX_TIMEOUT = 4_500_000.0
#: Communicators that may share a GPU: with more, a call has hardly a CTA.
MOST_CONCURRENT = 16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


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
    (docs/design.md). ``fitting``: clusters that fit on every rank's GPU, where all drivers say it.
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

    @property
    def has_clusters(self) -> bool:
        """Thread-block clusters, PDL and mbarrier transactions: sm_90 and later."""
        return self.architecture is not None and not self.architecture.startswith("sm_8")

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
) -> Topology:
    """Exchange what every rank sees and return what all share. Collective.

    Raises :class:`ArgumentError` where ranks were given different arguments or tables, :class:`PlatformError` where they cannot
    reach each other's memory. The timeout is compared because who waits for what others relay gives up later than they do.
    """
    check_seconds("timeout", timeout, MAX_TIMEOUT)
    overrides.check()
    if not is_whole(concurrent) or not 1 <= concurrent <= MOST_CONCURRENT:
        hint = f"give how many communicators make calls at a time on a GPU, 1 to {MOST_CONCURRENT}"
        raise ArgumentError(f"concurrent is {concurrent!r}", hint=hint)
    facts = _facts(group, capacity, timeout, overrides, concurrent)
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
    if group.device.type == "cpu":
        return topology_of(group.size, capacity, overrides=overrides, table=found, concurrent=concurrent)
    _check_reach(group, every)
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
) -> Topology:
    """The topology of a world whose facts are known, with what of ``table`` is for it. ``device``: the GPU's name, if it matters."""
    if table is not None and not table.unused:
        if architecture is None:
            table = table.without("this group is on the CPU")
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
    facts: dict[str, Any] = {"asked": f"{shape}, timeout={float(timeout)}{overrides}{together}", "host": _host()}
    if group.device.type == "cuda":
        from collogue.planning.architecture import architecture_of

        properties = torch.cuda.get_device_properties(group.device)
        facts["architecture"] = architecture_of((properties.major, properties.minor))
        facts["device"] = properties.name
        facts["multiprocessors"] = properties.multi_processor_count
        facts["gpu"] = str(properties.uuid)
        facts["fitting"] = fitting(group.device) if properties.major >= 9 else None
    return facts


def _host() -> str:
    """This host's name and, as names may repeat, which boot of a kernel it is, where that can be had."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} (boot {_BOOT_ID.read_text().strip()})"
    return socket.gethostname()


def _check_reach(group: Group, every: list[dict[str, Any]]) -> None:
    """Every GPU must be on one host and reach every other's memory; all ranks raise if a pair does not."""
    for rank, facts in enumerate(every):
        if facts["host"] != every[0]["host"]:
            raise PlatformError(
                f"the group spans several hosts: rank 0 is on {every[0]['host']}, rank {rank} on {facts['host']}",
                hint="use a tensor-parallel group within one host",
            )
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    mine = group.device.index
    refused = [
        rank
        for rank, facts in enumerate(every)
        if facts["gpu"] in visible and visible[facts["gpu"]] != mine and not torch.cuda.can_device_access_peer(mine, visible[facts["gpu"]])
    ]
    for rank, peers in enumerate(group.all_gather_object(refused)):
        if peers:
            raise PlatformError(
                f"rank {rank} has no peer access to the GPU of rank {peers[0]}",
                hint="`collogue doctor` shows the peer access matrix; GPUs need NVLink or PCIe peer-to-peer",
            )
