"""A group of ranks, as Collogue sees it: who takes part, and how bytes move between them without arithmetic.

Two implementations: :class:`TorchGroup` over a ``torch.distributed`` process group, and
:class:`collogue.testing.VirtualGroup`, whose ranks are threads of one process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from collogue.errors import ArgumentError, CaptureError, CollectiveError, GroupError, MismatchedCall, PlatformError
from collogue.link.nccl import NcclQueue
from collogue.link.queued import QueuedLink
from collogue.link.sockets import machine

if TYPE_CHECKING:
    from collogue.link import Link
    from collogue.link.staging import Staging

#: Ranks of a group, and of one whose kernels write into each other's memory.
MAX_WORLD_SIZE, MAX_PEERS = 64, 8


@dataclass(frozen=True)
class SymmetricBuffer:
    """The same number of bytes on every rank, each mapped into this process.

    ``local`` is this rank's memory (``uint8``); ``pointers[r]`` is rank r's, as an address valid on this rank's device.
    ``keep`` holds all that must stay alive as long as the mapping.
    """

    local: torch.Tensor
    pointers: tuple[int, ...]
    keep: Any = None


@runtime_checkable
class Group(Protocol):
    """What a communicator needs of a group. Every method is collective except the attributes."""

    rank: int
    size: int
    device: torch.device
    #: As ``torch.distributed`` calls the group; communicators are named after it.
    name: str
    #: The same on ranks of one host, and on no others.
    host: str

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank."""

    def barrier(self) -> None:
        """Return when every rank has called."""

    def swap(self, what: str, give: Sequence[torch.Tensor], take: Sequence[torch.Tensor]) -> None:
        """``take[r] = give[this rank]`` of rank r, bytes only, contiguous; what a rank has for itself stays where it is.

        ``what`` is the same text on every rank, or all raise :class:`MismatchedCall`.
        """

    def all_gather(self, output: torch.Tensor, block: torch.Tensor) -> None:
        """``output[r] = block`` of rank r, bytes only. ``output`` is ``[N, *block.shape]``, contiguous."""

    def symmetric(self, nbytes: int) -> SymmetricBuffer:
        """Allocate ``nbytes`` on every rank and map them everywhere. Zeroed."""

    def stream(self) -> torch.cuda.Stream:
        """The stream that kernels of this rank run on now (CUDA groups only)."""


def compare(texts: list[str]) -> None:
    """Raise :class:`MismatchedCall` where the ranks' descriptions of a call differ."""
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise MismatchedCall(
                f"rank 0 called with ({texts[0]}), rank {rank} with ({text})",
                hint="every rank of the group must make the same call: same operation, tokens, hidden size and epilogue",
            )


def as_group(group: Any, device: torch.device | str | None = None) -> Group:
    """``group`` itself if it already is a :class:`Group`, else a :class:`TorchGroup` around the process group.

    Raises :class:`GroupError` where ``group`` is missing, is not a group, or does not contain this rank.
    """
    if group is None:
        raise GroupError(
            "group is required: there is no default to WORLD",
            hint="pass the tensor-parallel group, e.g. dist.new_group(ranks) or dist.group.WORLD",
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise GroupError("this rank is not in the group", hint="make the communicator only on the ranks of the group")
    known: Group
    if isinstance(group, dist.ProcessGroup):
        known = TorchGroup(group, device)
    elif isinstance(group, Group):
        known = group
    else:
        raise GroupError(f"not a process group: {type(group).__name__}", hint="pass a torch.distributed.ProcessGroup")
    if known.size > MAX_WORLD_SIZE:
        raise GroupError(
            f"the group has {known.size} ranks; Collogue supports 1 to {MAX_WORLD_SIZE}",
            hint="use a smaller tensor-parallel group",
        )
    return known


def host_name() -> str:
    """This process's host: what ``COLLOGUE_HOST`` says, else the machine."""
    return os.environ.get("COLLOGUE_HOST") or machine()


#: By name of a process group: one thread at a time makes a communicator or talks through the group itself, and how many were made.
_making: dict[str, threading.RLock] = {}
_made: Counter[str] = Counter()


@contextmanager
def making(group: Group) -> Iterator[None]:
    """For the steps that make a communicator, which ranks take together: two threads must not mix theirs."""
    if not isinstance(group, TorchGroup):
        yield
        return
    with group.alone:
        yield


class TorchGroup:
    """A ``torch.distributed`` process group. CUDA tensors travel by NCCL if the group has it, others by a :class:`.Link` once there is one.

    What NCCL moves is only queued, and a watchdog finds ranks that are late or call something else (:mod:`collogue.link.watchdog`).
    Ranks with GPUs may meet in a gloo group if ``device`` says so.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device | str | None = None) -> None:
        rank = dist.get_rank(group)
        if rank < 0:
            raise GroupError("this rank is not in the group", hint="make the communicator only on the ranks of the group")
        self.process_group = group
        self.name = str(group.group_name)
        self.rank = rank
        self.size = dist.get_world_size(group)
        nccl = "nccl" in dist.get_backend_config(group)
        self.device = _usable(device if device is not None else "cuda" if nccl else "cpu")
        self.queue = NcclQueue(group, self.device) if nccl and self.device.type == "cuda" else None
        self.host = host_name()
        self.alone = _making.setdefault(self.name, threading.RLock())
        self.link: Link | None = None
        self.staging: Staging | None = None

    def connect(self, timeout: float) -> Link | None:
        """Have all that this object exchanges, except by NCCL, travel by a link of its own, with bounded waits. Collective."""
        if self.size > 1:
            from collogue.link import Link
            from collogue.link.staging import Staging

            _made[self.name] += 1
            name = f"communicator {_made[self.name]} of group {self.name!r}"
            facts = self.name, name, self.rank, self.size, self.all_gather_object, timeout
            if self.queue is not None:
                self.link = QueuedLink(*facts, self.process_group.get_group_store(), self.queue)
                return self.link
            self.link = Link(*facts)
            self.staging = None if self.device.type == "cpu" else Staging(self.device)
        return self.link

    def all_gather_object(self, value: Any) -> list[Any]:
        if self.link is not None:
            return [pickle.loads(each) for each in self.link.exchange("an exchange of objects", pickle.dumps(value))]
        values: list[Any] = [None] * self.size
        with self.alone:
            try:
                dist.all_gather_object(values, value, group=self.process_group)
            except RuntimeError as error:
                hint = "a rank has ended, or is late; torch.distributed's own timeout is that of init_process_group"
                raise CollectiveError(f"group {self.name!r} failed: {error}", hint=hint) from error
        return values

    def barrier(self) -> None:
        if self.link is not None:
            self.link.exchange("a barrier", b"")
        else:
            self.all_gather_object(None)

    def swap(self, what: str, give: Sequence[torch.Tensor], take: Sequence[torch.Tensor]) -> None:
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and self.queue is None:
            raise CaptureError(
                f"{what}: bytes of group {self.name!r} travel through the host, which no CUDA graph can hold",
                hint="make the call outside of the capture, or give the communicator a group with NCCL",
            )
        link = self.link
        assert link is not None
        if self.queue is None:
            self._swap_by_link(link, what, give, take)
            return
        assert isinstance(link, QueuedLink)
        none = give[self.rank].new_empty(0, dtype=torch.uint8)
        given, taken = ([none if r == self.rank else _as_bytes(t) for r, t in enumerate(each)] for each in (give, take))
        move = functools.partial(self.queue.swap, given, taken)
        if capturing:  # replays are not numbered
            link.raise_failure()
            move()
        else:
            link.queue(what, move)

    def _swap_by_link(self, link: Link, what: str, give: Sequence[torch.Tensor], take: Sequence[torch.Tensor]) -> None:
        others = [rank for rank in range(self.size) if rank != self.rank]
        given = {id(give[rank]): _as_bytes(give[rank]) for rank in others}  # what all ranks get is copied once
        taken = {rank: _as_bytes(take[rank]) for rank in others}
        if self.staging is None:  # on the CPU the tensors themselves are sent and filled
            sent, filled = given, taken
        else:
            blocks = self.staging.blocks(each.numel() for each in (*given.values(), *taken.values()))
            sent, filled = dict(zip(given, blocks, strict=False)), dict(zip(taken, blocks[len(given) :], strict=True))
            self.staging.fetch(zip(sent.values(), given.values(), strict=True))
        payloads = [b"" if rank == self.rank else _memory(sent[id(each)]) for rank, each in enumerate(give)]
        link.exchange(what, payloads, {rank: _memory(each) for rank, each in filled.items()})
        if self.staging is not None:
            self.staging.bring((target, filled[rank]) for rank, target in taken.items() if target.numel())

    def all_gather(self, output: torch.Tensor, block: torch.Tensor) -> None:
        out, inp = _as_bytes(output), _as_bytes(block)
        if self.queue is not None:
            dist.all_gather_into_tensor(out, inp, group=self.process_group)
        elif self.link is not None:
            rows = list(out.view(self.size, -1).unbind(0))
            rows[self.rank].copy_(inp)
            self.swap(f"an all-gather of {inp.numel()} bytes from each rank", [inp] * self.size, rows)
        else:
            dist.all_gather(list(out.view(self.size, -1).unbind(0)), inp, group=self.process_group)

    def symmetric(self, nbytes: int) -> SymmetricBuffer:
        import torch.distributed._symmetric_memory as symmetric_memory

        local = self._permitted(lambda: symmetric_memory.empty(nbytes, dtype=torch.uint8, device=self.device).zero_())
        handle = self._permitted(lambda: symmetric_memory.rendezvous(local, self.process_group.group_name))
        return SymmetricBuffer(local, tuple(int(p) for p in handle.buffer_ptrs), handle)

    def _permitted(self, step: Callable[[], Any]) -> Any:
        """``step()``; where one rank's is rejected, every rank raises, and none goes on alone."""
        result, problem = None, ""
        try:
            result = step()
        except RuntimeError as error:
            problem = str(error) or type(error).__name__
        for rank, text in enumerate(self.all_gather_object(problem)):
            if text:
                raise PlatformError(
                    f"symmetric memory failed on rank {rank}: {text}",
                    hint='run `collogue doctor`: it says which permission a container lacks; transport="host" needs none',
                )
        return result

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)


def check_gpus(instead: str = "") -> None:
    """Raise :class:`PlatformError` where PyTorch can use no GPU. ``instead``: what else may be done, for the hint."""
    if not torch.cuda.is_available():
        hint = "run `collogue doctor`" + (f", or {instead}" if instead else "")
        raise PlatformError("there is no CUDA GPU that PyTorch can use", hint=hint)


def _usable(device: torch.device | str) -> torch.device:
    """``device`` as tensors have it: a GPU with its index, the CPU without. Raises where a communicator cannot have it."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device is {device!r}", hint="give 'cpu', or a GPU such as 'cuda:0'")
    if found.type == "cpu":
        return torch.device("cpu")
    check_gpus()
    found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    if found.index >= torch.cuda.device_count():
        raise PlatformError(f"there is no {found}, PyTorch sees {torch.cuda.device_count()} GPUs", hint="run `collogue doctor`")
    return found


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor of bytes on the CPU, where they are: while the tensor lives."""
    return memoryview((ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())).cast("B") if tensor.numel() else memoryview(b"")
