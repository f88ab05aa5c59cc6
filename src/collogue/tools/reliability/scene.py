"""Where faults are made: a rank's communicator, calls whose right answers are known, and its workspace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from collogue.communicator import Communicator
from collogue.contract.spec import Output
from collogue.errors import CollogueError
from collogue.group import as_group
from collogue.testing.compare import compare
from collogue.tools.check.case import Case
from collogue.tools.check.rank import Answers, Given
from collogue.tools.reliability.soak import build

#: Seconds that a kernel waits for a peer, unless a scene says otherwise.
TIMEOUT = 1.0


@dataclass
class Scene:
    """One rank among the others, with a communicator and calls whose right answers it knows. The last rank is the culprit."""

    group: Any
    device: torch.device
    comm: Communicator
    calls: dict[str, Given] = field(default_factory=dict)
    expected: dict[str, Output] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    watched: list[CollogueError] = field(default_factory=list)

    @property
    def culprit(self) -> bool:
        return self.comm.rank == self.comm.world_size - 1

    @classmethod
    def make(cls, group: Any, device: torch.device, timeout: float = TIMEOUT, hidden_size: int = 7168, rows: int = 700) -> Scene:
        """Collective. ``rows``: of the calls that are to be two-shot."""
        world = dist.get_world_size(group) if isinstance(group, dist.ProcessGroup) else group.size
        cases = {
            "a": Case(2, hidden_size, world_size=world, seed=1),
            "more tokens": Case(3, hidden_size, world_size=world, seed=2),
            "another eps": Case(2, hidden_size, world_size=world, eps=1e-5, seed=1),
            "another format": Case(2, hidden_size, format="fp8_per_token", world_size=world, seed=1),
            "b": Case(5, hidden_size, format="nvfp4/128x4", world_size=world, seed=3),
            "large": Case(rows, hidden_size, world_size=world, seed=4),
            "larger": Case(rows + 1, hidden_size, world_size=world, seed=5),
            "sharded": Case(64, hidden_size, format="fp8_per_token", world_size=world, operation="sharded", seed=6),
            "more sharded": Case(66, hidden_size, format="fp8_per_token", world_size=world, operation="sharded", seed=7),
            "scattered": Case(64, hidden_size, world_size=world, operation="reduce_scatter", seed=8),
            "gathered": Case(64, hidden_size, world_size=world, operation="all_gather", seed=9),
        }
        comm = Communicator(
            group, max_tokens=max(c.tokens for c in cases.values()), hidden_size=hidden_size, device=device, timeout=timeout
        )
        scene, answers = cls(group, device, comm), Answers()
        build(comm, list(cases.values()))
        for name, case in cases.items():
            scene.calls[name] = Given.of(case, comm.rank, device, answers)
            scene.expected[name] = answers(case, device, comm.rank)
            scene.calls[name].prepare(comm)
        return scene

    def call(self, name: str) -> None:
        """Queue a call. Its outputs are kept: memory that a stopped kernel may still write."""
        self.outputs[name] = self.calls[name].call(self.comm)

    def capture(self, name: str, count: int) -> tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]:
        """A graph of ``count`` such calls, and the stream that it was captured on."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        given = self.calls[name]
        out = self.outputs.setdefault(name, given.call(self.comm))
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for _ in range(count):
                    given.call(self.comm, out)
            finally:
                graph.capture_end()
        return graph, stream

    def settle(self) -> None:
        """This rank's GPU has done everything, and so have all others."""
        self.synchronize()
        as_group(self.group, self.device).barrier()  # not by what the communicator has of it: that may have failed

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def words(self, offset: int, count: int = 1) -> torch.Tensor:
        """Words of this rank's workspace."""
        workspace = self.comm._engine.workspace  # type: ignore[union-attr]
        local: torch.Tensor = workspace.buffer.local
        return local[offset : offset + 4 * count].view(torch.int32)

    def flip(self, offset: int, bit: int = 0) -> None:
        """One bit of this rank's workspace."""
        self.words(offset).bitwise_xor_(1 << bit)
        self.synchronize()

    def wrong(self) -> str | None:
        """What is wrong with the calls of a communicator that should work, if anything is. Collective."""
        for name in self.calls:
            self.call(name)
        self.settle()
        self.comm.check()
        for name, expected in self.expected.items():
            for difference in compare(self.outputs[name], expected).values():
                if difference.count:
                    return f"{name}: {difference.count} elements differ: {difference.first}"
        return None
