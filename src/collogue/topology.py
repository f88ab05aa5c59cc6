"""What the machine has, agreed between the ranks of a group: the facts that plans are made from."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any, Literal

import torch

from collogue.call import Capacity
from collogue.errors import ArgumentError, PlatformError
from collogue.group import Group


@dataclass(frozen=True)
class Overrides:
    """What a user fixes of the plans: the algorithm of ``all_reduce``, and how many multiprocessors a call may use."""

    algorithm: Literal["one_shot", "two_shot"] | None = None
    max_multiprocessors: int | None = None
    cta_threads: int | None = None

    def __str__(self) -> str:
        """What has been fixed, to be read behind other arguments."""
        return "".join(f", {name}={value}" for name, value in vars(self).items() if value is not None)

    def check(self) -> None:
        """Raise :class:`ArgumentError` for what cannot be meant."""
        if self.algorithm not in (None, "one_shot", "two_shot"):
            raise ArgumentError(f"algorithm is {self.algorithm!r}", hint="give 'one_shot', 'two_shot' or nothing")
        if self.max_multiprocessors is not None and self.max_multiprocessors < 1:
            raise ArgumentError(f"max_multiprocessors is {self.max_multiprocessors!r}", hint="give a positive number or nothing")


@dataclass(frozen=True)
class Topology:
    """Facts that are the same on every rank. ``architecture`` is ``None`` on CPU groups."""

    world_size: int
    max_tokens: int
    hidden_size: int
    dtype: torch.dtype
    architecture: str | None
    multiprocessors: int
    ranks_per_gpu: int
    overrides: Overrides = Overrides()

    @property
    def has_clusters(self) -> bool:
        """Thread-block clusters, PDL and mbarrier transactions: sm_90 and later."""
        return self.architecture is not None and not self.architecture.startswith("sm_8")


def agree(group: Group, capacity: Capacity, overrides: Overrides = Overrides()) -> Topology:
    """Exchange what every rank sees and return what all share. Collective.

    Raises :class:`ArgumentError` where ranks were given different arguments, :class:`PlatformError` where they cannot
    reach each other's memory.
    """
    overrides.check()
    every = group.all_gather_object(_facts(group, capacity, overrides))
    for rank, facts in enumerate(every):
        if facts["capacity"] != every[0]["capacity"]:
            raise ArgumentError(
                f"rank 0 asked for {every[0]['capacity']}, rank {rank} for {facts['capacity']}",
                hint="make the communicator with the same arguments on every rank",
            )
    if group.device.type == "cpu":
        return Topology(group.size, capacity.max_tokens, capacity.hidden_size, capacity.dtype, None, 0, 1, overrides)
    _check_reach(group, every)
    architectures = sorted({facts["architecture"] for facts in every})
    if len(architectures) > 1:
        raise PlatformError(f"the ranks' GPUs differ: {', '.join(architectures)}", hint="use GPUs of one kind in one group")
    return Topology(
        group.size,
        capacity.max_tokens,
        capacity.hidden_size,
        capacity.dtype,
        architectures[0],
        min(facts["multiprocessors"] for facts in every),
        max(sum(other["gpu"] == facts["gpu"] for other in every) for facts in every),
        overrides,
    )


def _facts(group: Group, capacity: Capacity, overrides: Overrides) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "capacity": f"max_tokens={capacity.max_tokens}, hidden_size={capacity.hidden_size}, dtype={capacity.dtype}{overrides}",
        "host": socket.gethostname(),
    }
    if group.device.type == "cuda":
        from collogue.jit import architecture_of

        properties = torch.cuda.get_device_properties(group.device)
        facts["architecture"] = architecture_of((properties.major, properties.minor))
        facts["multiprocessors"] = properties.multi_processor_count
        facts["gpu"] = str(properties.uuid)
    return facts


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
