"""All-reduce alone, as NCCL and torch's symmetric memory do it: no residual, no norm, no quantisation. Never by multicast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from collogue.bench.cases import NCCL, ONE_SHOT, TWO_SHOT
from collogue.bench.timing import SETS
from collogue.check.case import Case


def integers(case: Case, rank: int, device: torch.device) -> torch.Tensor:
    """[T, H] small integers, whose sum over ranks is exact in every dtype: every right all-reduce gives the same bits."""
    index = torch.arange(case.tokens * case.hidden_size, device=device)
    return ((index * 7 + rank * 3) % 17 - 8).view(case.tokens, case.hidden_size).to(case.value_dtype)


class Baseline:
    """An all-reduce on :data:`SETS` tensors in turn.

    In place, sums would grow from call to call; so the gate runs on small integers once, and the timing on the zeros it leaves.
    """

    def __init__(self, group: dist.ProcessGroup, case: Case, tensors: list[torch.Tensor], function: Callable[[torch.Tensor], Any]) -> None:
        self._tensors, self._function = tensors, function
        rank, device = dist.get_rank(group), tensors[0].device
        self._own = integers(case, rank, device)
        self._expected = torch.stack([integers(case, r, device).float() for r in range(case.world_size)]).sum(0).to(self._own.dtype)
        self._returned: dict[int, Any] = {}
        self.repeatable = False

    def call(self, turn: int) -> None:
        """One all-reduce; what it returns, if it is not in place, is kept for the gate."""
        self._returned[turn % SETS] = self._function(self._tensors[turn % SETS])

    def gate(self, run: Callable[[], None]) -> str | None:
        """The sum of integers is exact."""
        for tensor in self._tensors:
            tensor.copy_(self._own)
        torch.cuda.synchronize()
        run()
        torch.cuda.synchronize()
        results = [r if isinstance(r, torch.Tensor) else t for t, r in zip(self._tensors, self._returned.values(), strict=True)]
        wrong = sum(int((result != self._expected).sum()) for result in results)
        for tensor in self._tensors:
            tensor.zero_()
        self._returned.clear()
        return f"{wrong} elements differ from the exact sum" if wrong else None


class Baselines:
    """Makes baselines; symmetric tensors are allocated once, for the largest message. Collective."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, largest_bytes: int) -> None:
        self._group, self._device, self._bytes = group, device, largest_bytes
        self._symmetric: list[torch.Tensor] = []

    def make(self, name: str, case: Case) -> Baseline:
        """The baseline ``name`` for the shape of ``case``. Raises what the library raises where it cannot do it."""
        if name == NCCL:
            shape = (case.tokens, case.hidden_size)
            tensors = [torch.zeros(shape, dtype=case.value_dtype, device=self._device) for _ in range(SETS)]
            return Baseline(self._group, case, tensors, lambda x: dist.all_reduce(x, group=self._group))
        group_name = self._group.group_name
        operations = {
            ONE_SHOT: lambda x: torch.ops.symm_mem.one_shot_all_reduce(x, "sum", group_name),
            TWO_SHOT: lambda x: torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", group_name),
        }
        return Baseline(self._group, case, self._views(case), operations[name])

    def _views(self, case: Case) -> list[torch.Tensor]:
        import torch.distributed._symmetric_memory as symmetric_memory

        if not self._symmetric:
            for _ in range(SETS):
                buffer = symmetric_memory.empty(self._bytes // 4, dtype=torch.float32, device=self._device)
                symmetric_memory.rendezvous(buffer, self._group.group_name)
                self._symmetric.append(buffer)
        count = case.tokens * case.hidden_size
        return [buffer.view(case.value_dtype)[:count].view(case.tokens, case.hidden_size) for buffer in self._symmetric]
