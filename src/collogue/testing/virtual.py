"""Virtual ranks: N ranks of one process, a thread each, on the CPU or on the GPUs there are.

On GPUs each rank has a stream of its own and plain device memory as its workspace; kernels, plans and workspace code are
the ones that real ranks use. Timings of virtual ranks mean nothing: they share a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from collogue.group import SymmetricBuffer, check_gpus, compare, host_name
from collogue.testing import environment

T = TypeVar("T")


class _Meeting:
    """Where the threads of one virtual world meet: a barrier and a place for each rank's value."""

    def __init__(self, size: int, timeout: float) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class VirtualGroup:
    """One rank of a virtual world; a :class:`collogue.group.Group`."""

    def __init__(
        self, rank: int, size: int, device: torch.device, meeting: _Meeting, subgroups: dict[Any, _Meeting], host: str | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.host = host_name() if host is None else host
        self.name = f"virtual{rank}"
        self.device = device
        self._meeting = meeting
        self._subgroups = subgroups

    def subgroup(self, ranks: Sequence[int]) -> VirtualGroup | None:
        """The group of ``ranks`` of this one, or ``None`` on a rank that is not in it. Collective over this group."""
        key = tuple(ranks)
        if self.rank == 0:
            self._subgroups[key] = _Meeting(len(key), self._meeting.barrier._timeout)  # type: ignore[attr-defined]
        self.barrier()
        if self.rank not in key:
            return None
        return VirtualGroup(key.index(self.rank), len(key), self.device, self._subgroups[key], {}, self.host)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._meeting.exchange(self.rank, value)

    def barrier(self) -> None:
        self._meeting.exchange(self.rank, None)

    def swap(self, what: str, give: Sequence[torch.Tensor], take: Sequence[torch.Tensor]) -> None:
        self._finish()
        told = self._meeting.exchange(self.rank, (what, give))
        compare([text for text, _ in told])
        for rank, (_, given) in enumerate(told):
            if rank != self.rank:
                take[rank].copy_(given[self.rank])
        self.settle()

    def settle(self) -> None:
        """Wait for this rank's stream, then for every rank: afterwards nothing of this world runs on any GPU."""
        self._finish()
        self.barrier()

    def abort(self) -> None:
        """Release every rank from the meeting it waits in (``threading.BrokenBarrierError``). The group cannot be used again."""
        self._meeting.barrier.abort()

    def all_gather(self, output: torch.Tensor, block: torch.Tensor) -> None:
        self._move(block, lambda blocks: [output[r].copy_(b) for r, b in enumerate(blocks)])

    def _move(self, tensor: torch.Tensor, copy: Callable[[list[torch.Tensor]], object]) -> None:
        """Give every rank sight of every rank's ``tensor`` while it copies; on return all copies are done."""
        self._finish()
        tensors = self._meeting.exchange(self.rank, tensor)
        copy(tensors)
        self.settle()

    def _finish(self) -> None:
        if self.device.type == "cuda":
            self.stream().synchronize()

    def symmetric(self, nbytes: int) -> SymmetricBuffer:
        local = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        self._finish()
        buffers = self.all_gather_object(local)
        for other in {b.device: b for b in buffers if b.device != self.device}.values():
            # Ranks on several GPUs: at the first copy in each direction PyTorch enables peer access to all of its memory there.
            local[:1].to(other.device)
            other[:1].to(self.device)
        self.settle()
        return SymmetricBuffer(local, tuple(b.data_ptr() for b in buffers), buffers)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)


def run_virtual(
    world_size: int,
    fn: Callable[[VirtualGroup], T],
    *,
    device: str | torch.device = "cpu",
    timeout: float = 60.0,
    hosts: Sequence[str] | None = None,
) -> list[T]:
    """Call ``fn(group)`` in one thread per rank and return the results by rank.

    ``device="cuda"`` spreads the ranks over the GPUs there are, ``"cuda:0"`` puts all on one. The first exception of a rank is
    raised here; the others are released from the meeting that they wait in. Without a GPU ``"cuda"`` is a :class:`PlatformError`.
    ``hosts``: by rank, the name of the host that it is to be on.

    On GPUs, kernels of one rank wait for kernels of the others, so nothing that waits for a whole GPU (freeing memory, loading a
    kernel, starting a graph capture) may come between the launches of one call: :meth:`Communicator.prepare` first, and
    :meth:`VirtualGroup.settle` around everything else. CUDA must start with what :mod:`collogue.testing.environment` sets.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        environment.set_defaults()
        check_gpus("use the CPU")
    meeting = _Meeting(world_size, timeout)
    subgroups: dict[Any, _Meeting] = {}
    results: list[Any] = [None] * world_size
    errors: list[tuple[int, BaseException]] = []

    def release() -> None:
        for each in (meeting, *subgroups.values()):
            each.barrier.abort()

    def work(rank: int) -> None:
        try:
            where = kind
            if kind.type == "cuda" and kind.index is None:
                where = torch.device("cuda", rank % torch.cuda.device_count())
            if where.type == "cuda":
                torch.cuda.set_device(where)
            group = VirtualGroup(rank, world_size, where, meeting, subgroups, None if hosts is None else hosts[rank])
            if where.type == "cuda":
                with torch.cuda.stream(torch.cuda.Stream(where)):  # type: ignore[no-untyped-call]
                    results[rank] = fn(group)
                    torch.cuda.current_stream(where).synchronize()
            else:
                results[rank] = fn(group)
        except BaseException as error:  # handed to the caller below
            errors.append((rank, error))
            release()

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(world_size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt: a rank that were left in PyTorch would abort the process when the interpreter ends
        release()
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join(timeout)
        raise
    if errors:
        first = next((e for _, e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0][1])
        raise first
    return results
