"""What a scenario sees of its ranks: the same for a process on each GPU and for virtual ranks that share GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from collogue import Communicator, reference
from collogue.contract.spec import Output
from collogue.formats import scale_storage
from collogue.gpu.workspace import SENTINELS
from collogue.group import as_group
from collogue.planning.extent import CONTROL_BYTES, GENERATIONS, ONE_SHOT_GENERATIONS
from collogue.planning.plan import make_plan
from collogue.testing import VirtualGroup
from collogue.testing.compare import compare
from collogue.testing.inputs import make_partials
from collogue.tools.check import Answers, Case
from collogue.tools.check.kernels import request_of
from collogue.tools.check.rank import Given, arguments, poisoned

#: Where a workspace counts calls (``Control`` in kernels/protocol.cuh): the high half of ``counter``.
CALL_WORD = 1


@dataclass
class World:
    """One rank. What is wrong is noted, not raised: ranks that wait for each other must not leave one by one."""

    given: Any  # the group as a user has it
    answers: Answers
    tell: Callable[[str], None] = lambda text: None
    findings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.group = as_group(self.given)
        self.rank, self.size, self.device = self.group.rank, self.group.size, self.group.device

    @property
    def virtual(self) -> bool:
        return isinstance(self.given, VirtualGroup)

    def require(self, condition: bool, text: str) -> None:
        if not condition:
            self.findings.append(f"rank {self.rank}: {text}")

    def same(self, what: object, actual: Output, expected: Output) -> None:
        for difference in compare(actual, expected).values():
            self.require(not difference.count, f"{what}: {difference.count} differ, first {difference.first}")

    def raises(self, kind: type[Exception], call: Callable[[], object], what: str) -> str:
        """The text of the error, or nothing if there was none of this kind."""
        try:
            call()
        except kind as error:
            return str(error)
        except Exception as error:
            self.require(False, f"{what}: {type(error).__name__}: {error}")
            return ""
        self.require(False, f"{what}: no {kind.__name__}")
        return ""

    def settle(self) -> None:
        """Afterwards nothing of this world runs on any GPU. Collective."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.group.barrier()

    def in_turn(self, action: Callable[[], None]) -> None:
        """What waits for a whole GPU, rank by rank while nothing runs. Collective."""
        for rank in range(self.size):
            self.settle()
            if rank == self.rank:
                action()
        self.settle()

    def subgroup(self, ranks: list[int]) -> Any:
        """Collective; ``None`` on the others."""
        if self.virtual:
            return self.given.subgroup(ranks)
        group = dist.new_group(ranks)
        return group if self.rank in ranks else None


@dataclass
class Prepared(Given):
    """A case with its inputs on this rank, the right answer, and poisoned outputs to write."""

    expected: Output = field(default_factory=Output)
    out: Output = field(default_factory=Output)

    @classmethod
    def on(cls, world: World, case: Case, rank: int | None = None) -> Prepared:
        given = Given.of(case, world.rank if rank is None else rank, world.device, world.answers)
        expected = world.answers(case, world.device, world.rank)
        return cls(**vars(given), expected=expected, out=poisoned(expected))


def communicator(world: World, cases: list[Case], **options: Any) -> Communicator:
    tokens, width = max(c.tokens for c in cases), max(c.hidden_size for c in cases)
    options = {"max_tokens": tokens, "hidden_size": width, "dtype": cases[0].value_dtype, "timeout": 20.0} | options
    return Communicator(world.given, **options)


def answer_with(case: Case, device: torch.device, **changed: Any) -> Output:
    """The reference's answer to ``case`` with other arguments than its own."""
    _, residual, norm = arguments(case, 0, device)
    shape = {"tokens": case.tokens, "hidden_size": case.hidden_size, "dtype": case.value_dtype, "seed": case.seed, "device": device}
    partials = make_partials(case.inputs, case.world_size, **shape)
    return reference.all_reduce(partials, **({"residual": residual, "norm": norm} | changed))


def copy_output(source: Output, target: Output) -> None:
    """Every byte, the padding of scales too."""
    for name, tensor in source.items():
        to = getattr(target, name)
        if name == "scales":
            tensor, to = scale_storage(tensor), scale_storage(to)
        to.view(torch.uint8).copy_(tensor.view(torch.uint8))


def call_number(comm: Communicator) -> int:
    """Calls that this rank's workspace has counted."""
    workspace = comm._engine.workspace  # type: ignore[union-attr]
    return int(workspace.buffer.local[:16].view(torch.int32)[CALL_WORD])


@dataclass
class Region:
    """The generations of one-shot, or those of the other kernels: words as ``[generation, word]``, of which calls use the first."""

    words: torch.Tensor
    used: int

    @property
    def unused(self) -> torch.Tensor:
        return self.words[:, self.used :]


def regions(comm: Communicator, cases: list[Case]) -> tuple[Region, Region]:
    """Where the peers of this rank write when ``cases`` are called: one-shot's region, and the other kernels'."""
    workspace = comm._engine.workspace  # type: ignore[union-attr]
    extent = workspace.extent
    plans = [make_plan(comm.topology, request_of(case)) for case in cases]
    one_shot = max((plan.workspace_bytes for plan in plans if plan.algorithm == "one_shot"), default=0)
    others = max((plan.workspace_bytes for plan in plans if plan.algorithm != "one_shot"), default=0)
    words = workspace.buffer.local.view(torch.int32)
    first, second = words[CONTROL_BYTES // 4 : extent.offset // 4], words[extent.offset // 4 : extent.total // 4]
    return (
        # Cleaned in units of 256 bytes.
        Region(first.view(ONE_SHOT_GENERATIONS, -1), -(-one_shot // 256) * 64),
        Region(second.view(GENERATIONS, -1), others // 4),
    )


def require_clean(world: World, comm: Communicator, cases: list[Case]) -> None:
    """What ``cases`` have used holds nothing but sentinels, but for what a last one-shot call leaves to the next. Nothing may run."""
    sentinel = SENTINELS[comm.dtype.itemsize] - (1 << 32)
    last = (call_number(comm) - 1) % ONE_SHOT_GENERATIONS
    for name, region, left in zip(("one-shot", "other"), regions(comm, cases), (last, -1), strict=True):
        for generation, found in enumerate(region.words):
            dirty = int((found[: region.used] != sentinel).sum())
            world.require(
                generation == left or not dirty, f"{name} generation {generation} holds {dirty} old words after call {call_number(comm)}"
            )
