"""Groups and machines that cannot carry a communicator: every rank raises, with a hint, and nothing is left waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from ranks import check_works, communicator

import collogue
from collogue.calls.capacity import Capacity
from collogue.errors import ArgumentError, CapacityError, CaptureError, CollogueError, DTypeError, GroupError, PlatformError, ShapeError
from collogue.gpu.launch import timeouts
from collogue.group import TorchGroup, host_name
from collogue.link import sockets
from collogue.link.nccl import NcclQueue
from collogue.link.queued import QueuedLink
from collogue.planning import topology
from collogue.planning.topology import MAX_TIMEOUT
from collogue.testing import VirtualGroup, run_virtual


def refusals(world_size: int, make: Callable[[VirtualGroup], object], error: type[CollogueError]) -> list[str]:
    """What ``make`` says on each rank. The group still works afterwards."""

    def rank(group: VirtualGroup) -> str:
        with pytest.raises(error) as raised:
            make(group)
        assert type(raised.value) is error
        text = str(raised.value)
        assert text.splitlines()[-1] == f"hint: {raised.value.hint}"
        return text

    return run_virtual(world_size, rank, timeout=20)


# Groups


@pytest.mark.parametrize(
    ("group", "message", "hint"),
    [
        (None, "group is required", "dist.new_group(ranks)"),
        ("world", "not a process group: str", "torch.distributed.ProcessGroup"),
        (dist.GroupMember.NON_GROUP_MEMBER, "this rank is not in the group", "only on the ranks of the group"),
    ],
)
def test_what_is_no_group(group: Any, message: str, hint: str) -> None:
    with pytest.raises(GroupError) as raised:
        communicator(group)
    assert message in raised.value.message
    assert hint in raised.value.hint


def test_group_has_no_default() -> None:
    with pytest.raises(TypeError, match="group"):
        collogue.Communicator(max_tokens=1, hidden_size=8)  # type: ignore[call-arg]


def test_65_ranks_are_too_many() -> None:
    for text in refusals(65, communicator, GroupError):
        assert "the group has 65 ranks; Collogue supports 1 to 64\nhint: use a smaller tensor-parallel group" in text


# Devices


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD  # type: ignore[misc]
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["meta", "tpu", 1.5])
def test_devices_that_no_communicator_has(alone: dist.ProcessGroup, device: Any) -> None:
    with pytest.raises(ArgumentError) as raised:
        communicator(alone, device=device)
    assert str(raised.value) == f"device is {device!r}\nhint: give 'cpu', or a GPU such as 'cuda:0'"
    check_works(communicator(alone, device="cpu:0"))


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_where_there_is_none(alone: dist.ProcessGroup, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlatformError, match="there is no CUDA GPU that PyTorch can use\nhint: run `collogue doctor`"):
        communicator(alone, device=device)


def test_a_gpu_that_is_not_there(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PlatformError, match="there is no cuda:2, PyTorch sees 2 GPUs\nhint: "):
        communicator(alone, device="cuda:2")


@pytest.mark.parametrize(("usable", "error"), [(False, PlatformError), (True, ZeroDivisionError)])
def test_virtual_ranks_on_gpus_that_are_not_there(usable: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a rank that cannot choose its GPU end unheard."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(error):
        run_virtual(2, lambda group: None, device="cuda")


# What the communicator is made with


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 12}, ShapeError, "12 is not a positive multiple of 8\nhint: pad"),
        ({"hidden_size": 0}, ShapeError, "0 is not a positive"),
        ({"max_tokens": 0}, CapacityError, "max_tokens is 0\nhint: give the largest number of rows"),
        ({"max_tokens": True}, CapacityError, "max_tokens is True"),
        ({"max_tokens": 2.0}, CapacityError, "max_tokens is 2.0"),
        ({"dtype": torch.float64}, DTypeError, "torch.float64 is not supported\nhint: use torch.bfloat16"),
        ({"max_tokens": 3.0}, CapacityError, "max_tokens is 3.0"),
        ({"hidden_size": "64"}, ShapeError, "hidden size '64' is not a positive multiple of 8"),
        ({"hidden_size": 64.0}, ShapeError, "hidden size 64.0 is not"),
        ({"hidden_size": None}, ShapeError, "hidden size None is not"),
        ({"hidden_size": True}, ShapeError, "hidden size True is not"),
        ({"timeout": 0.0}, ArgumentError, "timeout is 0.0\nhint: give a positive number of seconds, at most 4,500,000"),
        ({"timeout": -1}, ArgumentError, "timeout is -1"),
        ({"timeout": float("nan")}, ArgumentError, "timeout is nan"),
        ({"timeout": float("inf")}, ArgumentError, "timeout is inf"),
        ({"timeout": 4_500_001}, ArgumentError, "timeout is 4500001"),
        ({"timeout": 10**400}, ArgumentError, "timeout is 1000"),
        ({"timeout": "30"}, ArgumentError, "timeout is '30'"),
        ({"timeout": None}, ArgumentError, "timeout is None"),
        ({"timeout": True}, ArgumentError, "timeout is True"),
        ({"algorithm": "three_shot"}, ArgumentError, "algorithm is 'three_shot'\nhint: give 'one_shot'"),
        ({"max_sms": 0}, ArgumentError, "max_sms is 0\nhint: give a positive number"),
        ({"max_sms": 2.5}, ArgumentError, "max_sms is 2.5"),
        ({"max_sms": True}, ArgumentError, "max_sms is True"),
        ({"cta_threads": 64.0}, ArgumentError, "cta_threads is 64.0\nhint: give a multiple of 32"),
        ({"cta_threads": 48}, ArgumentError, "cta_threads is 48"),
        ({"cta_threads": "64"}, ArgumentError, "cta_threads is '64'"),
        ({"table": True}, ArgumentError, "table is True\nhint: give a file"),
        ({"table": 3}, ArgumentError, "table is 3"),
        ({"transport": "wire"}, ArgumentError, "transport is 'wire'\nhint: give 'peer', 'host' or nothing"),
        ({"order": None}, ArgumentError, "order is None\nhint: give 'islands', 'rank' or nothing"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[CollogueError], message: str) -> None:
    for text in refusals(2, lambda group: communicator(group, **options), error):
        assert message in text


def test_the_longest_timeout_is_what_kernels_can_count() -> None:
    assert 0.99 * 2**32 < max(timeouts(MAX_TIMEOUT)) < 2**32
    run_virtual(2, lambda group: check_works(communicator(group, timeout=MAX_TIMEOUT)))


def test_ranks_may_write_the_same_timeout_in_two_ways() -> None:
    run_virtual(2, lambda group: check_works(communicator(group, timeout=20 if group.rank else 20.0)))


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 16},
        {"hidden_size": 128},
        {"dtype": torch.float16},
        {"timeout": 30.5},
        {"algorithm": "two_shot"},
        {"max_sms": 8},
        {"concurrent": 2},
        {"transport": "host"},
        {"order": "rank"},
    ],
)
def test_ranks_that_ask_for_different_communicators(options: dict[str, Any]) -> None:
    texts = refusals(3, lambda group: communicator(group, **(options if group.rank == 2 else {})), ArgumentError)
    assert len(set(texts)) == 1
    assert "rank 0 asked for max_tokens=8, hidden_size=64, dtype=torch.bfloat16, timeout=30.0, rank 2 for max_tokens=" in texts[0]
    ((name, value),) = options.items()
    assert f"{name}={value}" in texts[0]
    assert "hint: make the communicator with the same arguments on every rank" in texts[0]


# Machines: facts of GPUs that are not there


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Four GPUs that reach each other on one host. A test changes the facts of a rank; a rank's GPU has its number."""
    same = {"asked": "", "host": "alpha", "architecture": "sm_90a", "multiprocessors": 132, "fitting": None}
    facts = [{**same, "gpu": f"GPU-{r}"} for r in range(4)]
    made = SimpleNamespace(facts=facts, refused=set())
    monkeypatch.setattr(topology, "_facts", lambda group, *_: facts[group.rank])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) not in made.refused)
    return made


def on_gpus(group: VirtualGroup, **options: Any) -> collogue.Communicator:
    group.device = torch.device("cuda", group.rank)
    return communicator(group, **options)


def on_peers(group: VirtualGroup) -> collogue.Communicator:
    return on_gpus(group, transport="peer")


def agreed(size: int = 4, **options: Any) -> topology.Topology:
    """What all ranks agree on."""

    def rank(group: VirtualGroup) -> topology.Topology:
        group.device = torch.device("cuda", group.rank)
        return topology.agree(group, Capacity(8, 64, torch.bfloat16, group.device), 30.0, **options)

    every = run_virtual(size, rank)
    assert every == every[:1] * size
    return every[0]


def test_several_hosts(machine: SimpleNamespace) -> None:
    machine.facts[2]["host"] = machine.facts[3]["host"] = "beta"
    for text in refusals(4, on_peers, PlatformError):
        assert text == (
            'the group spans several hosts: rank 0 is on alpha, rank 2 on beta\nhint: leave transport out, or give transport="host"'
        )
    found = agreed()
    assert (found.transport, found.islands, found.sums) == ("host", ((0, 1), (2, 3)), ((0, 1), (2, 3)))
    assert found.reach == (
        "host; the group spans several hosts: rank 0 is on alpha, rank 2 on beta; 2 islands: ranks 0 1; 2 3, each added for itself"
    )
    assert agreed(order="rank").sums is None


def test_hosts_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sockets.socket, "gethostname", lambda: "node")
    hosts = []
    for boot in ("1-2", "3-4", "3-4"):
        (tmp_path / boot).write_text(boot + "\n")
        monkeypatch.setattr(sockets, "_BOOT_ID", tmp_path / boot)
        hosts.append(host_name())
    assert hosts == ["node (boot 1-2)", "node (boot 3-4)", "node (boot 3-4)"]
    monkeypatch.setattr(sockets, "_BOOT_ID", tmp_path / "nowhere")
    assert host_name() == "node"
    monkeypatch.setenv("COLLOGUE_HOST", "here")
    assert host_name() == "here"


def test_no_peer_access_names_the_pair(machine: SimpleNamespace) -> None:
    machine.refused = {(1, 3), (3, 1)}
    for text in refusals(4, on_peers, PlatformError):
        assert text.startswith("rank 1 has no peer access to the GPU of rank 3\nhint: leave transport out")
        assert "`collogue doctor` shows the peer access matrix" in text
    found = agreed()
    assert (found.transport, found.islands) == ("host", ((0, 1, 2), (3,)))


def test_ranks_without_any_peer_access_are_added_in_rank_order(machine: SimpleNamespace) -> None:
    machine.refused = {(a, b) for a in range(4) for b in range(4)}
    found = agreed()
    assert (found.transport, found.islands, found.sums) == ("host", ((0,), (1,), (2,), (3,)), None)


def test_the_transport_that_is_asked_for(machine: SimpleNamespace) -> None:
    assert agreed().transport == agreed(transport="peer").transport == "peer"
    assert agreed(transport="host").reach == "host; asked for"
    cpu = refusals(2, lambda group: communicator(group, transport="peer"), PlatformError)
    assert cpu[0].startswith("ranks on the CPU have no memory that others reach\nhint: leave transport out")


def test_different_gpus(machine: SimpleNamespace) -> None:
    machine.facts[3]["architecture"] = "sm_100a"
    for text in refusals(4, on_gpus, PlatformError):
        assert text == "the ranks' GPUs differ: sm_100a, sm_90a\nhint: use GPUs of one kind in one group"


def test_one_kind_of_gpu_is_agreed(machine: SimpleNamespace) -> None:
    """The same facts without a fault: the refusals above are due to the fault."""
    machine.facts[3]["multiprocessors"] = 114
    machine.facts[1]["gpu"] = "GPU-0"

    way = {"transport": "peer", "islands": ((0, 1, 2, 3),), "why": "every pair of ranks has peer access"}
    assert agreed() == topology.Topology(4, 8, 64, torch.bfloat16, "sm_90a", 114, 2, **way)  # type: ignore[arg-type]


# Symmetric memory


class Refusal(VirtualGroup):
    """A virtual rank whose symmetric memory is a real group's, so that it can be refused as there."""

    _permitted = TorchGroup._permitted
    symmetric = TorchGroup.symmetric
    process_group = SimpleNamespace(group_name="tensor-parallel")


@pytest.mark.parametrize("step", ["empty", "rendezvous"])
def test_symmetric_memory_refused_on_one_rank(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> torch.Tensor:
        if threading.current_thread().name == "rank1":
            raise RuntimeError("pidfd_open: Operation not permitted")
        return torch.zeros(16, dtype=torch.uint8)

    monkeypatch.setattr(symmetric_memory, "empty", lambda *_, **__: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(symmetric_memory, step, answer)

    def make(group: VirtualGroup) -> None:
        group.__class__ = Refusal
        group.symmetric(16)

    for text in refusals(3, make, PlatformError):
        assert text == (
            "symmetric memory failed on rank 1: pidfd_open: Operation not permitted\n"
            'hint: run `collogue doctor`: it says which permission a container lacks; transport="host" needs none'
        )


def test_a_group_works_after_a_refusal() -> None:
    def rank(group: VirtualGroup) -> None:
        with pytest.raises(ShapeError):
            communicator(group, hidden_size=4)
        check_works(communicator(group))

    run_virtual(2, rank)


# How bytes move


class Asked(QueuedLink):
    """Notes what it is asked for."""

    def __init__(self, done: list[Any]) -> None:
        self.done = done

    def queue(self, what: str, move: Callable[[], None]) -> None:
        self.done.append(what)
        move()

    def raise_failure(self) -> None:
        self.done.append("no failure")


@pytest.mark.parametrize("capturing", [False, True])
def test_nccl_moves_bytes_behind_a_watchdog(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks call is numbered before it is queued; under capture a failure is looked for, and that is all."""
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(dist, "all_to_all", lambda taken, given, group: done.append((taken, given, group)))
    device = torch.device("cuda", 0)
    facts = {"device": device, "queue": NcclQueue("group", device), "link": Asked(done), "rank": 1, "name": "0"}  # type: ignore[arg-type]
    give, take = [torch.arange(4.0) + r for r in range(3)], [torch.zeros(r, 2, dtype=torch.bfloat16) for r in range(3)]
    TorchGroup.swap(SimpleNamespace(**facts), "a call", give, take)  # type: ignore[arg-type]
    assert done.pop(0) == ("no failure" if capturing else "a call")
    ((taken, given, group),) = done
    assert group == "group"
    assert [each.numel() for each in given] == [16, 0, 16]
    assert [each.numel() for each in taken] == [0, 0, 8]
    assert given[2].data_ptr() == give[2].data_ptr()
    assert taken[2].data_ptr() == take[2].data_ptr()


def test_bytes_that_go_through_the_host_are_in_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    group: Any = SimpleNamespace(device=torch.device("cuda", 0), queue=None, name="7")
    with pytest.raises(CaptureError, match=r"bytes of group '7' travel through the host.*\nhint: make the call outside of the capture"):
        TorchGroup.swap(group, "all_reduce", [], [])
