"""A group of ranks, as Collogue sees it: who takes part, and how bytes move between them without arithmetic.

Two implementations: :class:`TorchGroup` over a ``torch.distributed`` process group, and
:class:`collogue.testing.VirtualGroup`, whose ranks are threads of one process.
"""

from __future__ import annotations

import ctypes
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from collogue.errors import ArgumentError, CollectiveError, GroupError, MismatchedCall, PlatformError

if TYPE_CHECKING:
    from collogue.link import Link

MAX_WORLD_SIZE = 8


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

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank."""

    def barrier(self) -> None:
        """Return when every rank has called."""

    def agree(self, what: str) -> None:
        """Return when every rank has called with the same text. Raises :class:`MismatchedCall` on every rank where they differ."""

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
            hint="use a tensor-parallel group within one host",
        )
    return known


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
    """A ``torch.distributed`` process group. CUDA tensors travel by NCCL, CPU tensors by a :class:`.Link` once there is one.

    Ranks with GPUs may meet in a gloo group if ``device`` says so: kernels move the tensors of calls, not the group.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device | str | None = None) -> None:
        rank = dist.get_rank(group)
        if rank < 0:
            raise GroupError("this rank is not in the group", hint="make the communicator only on the ranks of the group")
        self.process_group = group
        self.name = str(group.group_name)
        self.rank = rank
        self.size = dist.get_world_size(group)
        if device is None:
            device = "cuda" if "nccl" in dist.get_backend_config(group) else "cpu"
        self.device = _usable(device)
        self.alone = _making.setdefault(self.name, threading.RLock())
        self.link: Link | None = None

    def connect(self, timeout: float) -> Link | None:
        """Have all that this object exchanges on the CPU travel by a link of its own, with bounded waits. Collective."""
        if self.size > 1:
            from collogue.link import Link

            _made[self.name] += 1
            name = f"communicator {_made[self.name]} of group {self.name!r}"
            self.link = Link(self.name, name, self.rank, self.size, self.all_gather_object, timeout)
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

    def agree(self, what: str) -> None:
        if self.link is not None:
            self.link.exchange(what, b"")
        else:
            compare(self.all_gather_object(what))

    def all_gather(self, output: torch.Tensor, block: torch.Tensor) -> None:
        out, inp = _as_bytes(output), _as_bytes(block)
        if self.device.type == "cuda":
            dist.all_gather_into_tensor(out, inp, group=self.process_group)
        elif self.link is not None:
            mine = ctypes.string_at(inp.data_ptr(), inp.numel())
            given = self.link.exchange(f"an exchange of {inp.numel()} bytes", mine)
            for rank, row in enumerate(out.view(self.size, -1) if mine else ()):
                row.copy_(inp if rank == self.rank else torch.frombuffer(given[rank], dtype=torch.uint8))
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
                    hint="run `collogue doctor`: it says which permission a container lacks",
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
    return tensor.reshape(-1).view(torch.uint8)
