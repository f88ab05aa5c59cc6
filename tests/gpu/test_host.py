"""The host path on GPUs: the group moves rows, kernels add and finish them. Virtual ranks, and processes that share GPUs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from islands import check, check_experts, check_wire, on_hosts
from ranks import HIDDEN_SIZE, communicator
from samples import every_format

from collogue.contract.quant import MXFP8, FP8Group, FP8PerToken, FP8Static
from collogue.errors import CaptureError, CollogueError
from collogue.planning.islands import split
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.processes import run_processes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(600)]


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("hosts", ["aa", "aaa", "aaaaaaaa", "aabb", "aaaabbbb", "aaab", "abab", "abc"])
def test_virtual_ranks(hosts: str, algorithm: Any) -> None:
    """Islands as virtual hosts, and one host whose transport is asked for: every format, every operation."""
    islands = split(hosts) if 1 < len(set(hosts)) < len(hosts) else None

    def rank(group: VirtualGroup) -> list[str]:
        found = []
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            comm = communicator(group, algorithm=algorithm, max_tokens=300, hidden_size=7168, dtype=dtype, transport="host", timeout=20)
            for i, quant in enumerate((None, *every_format(128, "cuda"))):
                found += check(comm, islands, 5, quant=quant, width=1024) + check(
                    comm, islands, 160, quant=quant, kind="normal", seed=i, width=7168
                )
            rows = [(3 * r + 1) % 4 for r in range(len(hosts))]
            found += check(comm, islands, sum(rows), rows=rows, kind="subnormal") + check_experts(comm, islands)
            group.settle()
            comm.close()
        return found

    assert [text for found in run_virtual(len(hosts), rank, device="cuda", hosts=list(hosts), timeout=300) for text in found] == []


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("hosts", ["a", "aa", "aaab", "abab"])
def test_terms_in_fewer_bytes(hosts: str, algorithm: Any) -> None:
    """A communicator with ``wire=`` takes the host path by itself; kernels quantize and add, and what is prepared can be captured."""

    def rank(group: VirtualGroup) -> list[str]:
        found = []
        for wire in (FP8Group(64), FP8Group(32, "ue8m0", "column"), FP8PerToken(), MXFP8("ceil"), MXFP8("floor", "8x4")):
            for dtype in (torch.bfloat16, torch.float32):
                comm = communicator(group, algorithm=algorithm, max_tokens=40, hidden_size=1024, dtype=dtype, wire=wire, timeout=20)
                assert comm.topology.transport == "host"
                found += check_wire(comm, 5) + check_wire(comm, 40)
                group.settle()
                comm.close()
        return found

    assert [text for found in run_virtual(len(hosts), rank, device="cuda", hosts=list(hosts), timeout=200) for text in found] == []


def on_gpu(group: dist.ProcessGroup, tell: Any, sizes: tuple[int, ...]) -> list[str]:
    return on_hosts(group, tell, sizes, f"cuda:{torch.cuda.current_device()}")


@pytest.mark.parametrize("sizes", [(2,), (3,), (4,), (2, 2), (3, 1)], ids=str)
def test_processes(sizes: tuple[int, ...]) -> None:
    """Over gloo where there are fewer GPUs than ranks, else over NCCL."""
    assert [text for found in run_processes(sum(sizes), on_gpu, sizes, device="cuda", silence=120) for text in found] == []


def captured(group: dist.ProcessGroup, tell: Any) -> str:
    """A call under capture: NCCL's replays give the bits of the eager call, other groups refuse it."""
    comm = communicator(group, device=f"cuda:{torch.cuda.current_device()}", transport="host")
    partial = torch.full((4, HIDDEN_SIZE), 1.0 + comm.rank, dtype=torch.bfloat16, device=comm.device)
    eager = comm.all_reduce(partial).reduced
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = comm.all_reduce(partial).reduced
    except CaptureError:
        return "refused"
    graph.replay()
    torch.cuda.synchronize()
    return "equal" if eager is not None and out is not None and torch.equal(eager, out) else "different"


def test_graphs() -> None:
    ranks = 2
    expected = "equal" if torch.cuda.device_count() >= ranks else "refused"
    assert run_processes(ranks, captured, device="cuda") == [expected] * ranks


def faulty(group: dist.ProcessGroup, tell: Any, fault: str) -> dict[str, Any]:
    """Over NCCL the last rank is late, makes calls in another order, or of another size: what ranks hear, when, and what then works."""
    device = f"cuda:{torch.cuda.current_device()}"
    ranks = list(range(dist.get_world_size(group)))
    comm = communicator(dist.new_group(ranks), device=device, transport="host", timeout=2)
    partial = torch.full((4, HIDDEN_SIZE), 1.0 + comm.rank, dtype=torch.bfloat16, device=comm.device)
    calls = [lambda: comm.all_reduce(partial), lambda: comm.all_reduce(partial, quant=FP8Static(1.0))]
    calls.append(lambda: comm.all_reduce(partial[:2]))
    for known in calls * 100:
        known()
    comm.check()
    torch.cuda.synchronize()
    dist.barrier()
    last = comm.rank == ranks[-1]
    made = {"order": calls[:2][:: -1 if last else 1], "size": calls[2:] if last else calls[:1], "late": [] if last else calls[:1]}[fault]
    begin, told = time.monotonic(), ""
    try:
        for each in made:
            each()
        torch.cuda.synchronize()  # the group is aborted, which ends the kernels
        while time.monotonic() - begin < 4:
            comm.check()
            time.sleep(0.01)
    except CollogueError as error:
        told = f"{type(error).__name__}: {error}"
    found = {"told": told, "seconds": time.monotonic() - begin}
    for name, step in (("call", calls[0]), ("reset", comm.reset)):
        try:
            step()
        except CollogueError as error:
            found[name] = f"{type(error).__name__}: {error}"
    tell("closing")
    comm.close(collective=False)
    dist.barrier()
    with communicator(dist.new_group(ranks), device=device, transport="host", timeout=20) as again:
        out = again.all_reduce(torch.full((4, HIDDEN_SIZE), 1.0, dtype=torch.bfloat16, device=again.device)).reduced
        found["again"] = out is not None and bool((out == len(ranks)).all())
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each rank")
@pytest.mark.parametrize(
    ("fault", "error", "seconds"), [("late", "CollectiveTimeout", 3.0), ("order", "MismatchedCall", 1.0), ("size", "MismatchedCall", 1.0)]
)
def test_the_watchdog_of_nccl(fault: str, error: str, seconds: float) -> None:
    for rank, found in enumerate(run_processes(2, faulty, fault, device="cuda")):
        assert found["told"].startswith(error), (rank, found)
        assert "rank 1" in found["told"], (rank, found)
        assert found["seconds"] < seconds, (rank, found)
        assert found["call"] == found["told"], (rank, found)
        assert found["reset"].startswith("PlatformError"), (rank, found)
        assert "make a new one" in found["reset"], (rank, found)
        assert found["again"], (rank, found)
