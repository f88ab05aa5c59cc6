"""Host memory between a GPU and the sockets, with the CPU in the GPU's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from islands import check
from ranks import communicator
from samples import every_format

from collogue.link.staging import Staging
from collogue.testing.processes import run_processes


def test_blocks_are_apart_and_memory_is_kept() -> None:
    staging = Staging(torch.device("cpu"))
    first, empty, second = staging.blocks([5, 0, 300])
    assert (first.numel(), empty.numel(), second.numel()) == (5, 0, 300)
    assert second.data_ptr() >= first.data_ptr() + first.numel()
    values = torch.arange(5, dtype=torch.uint8)
    staging.fetch([(first, values)])
    second.fill_(7)
    target = torch.zeros(5, dtype=torch.uint8)
    staging.bring([(target, first)])
    assert torch.equal(target, values)
    assert staging.blocks([5])[0].data_ptr() == first.data_ptr()
    assert staging.blocks([10_000])[0].numel() == 10_000


def staged(group: dist.ProcessGroup, tell: Any) -> list[str]:
    comm = communicator(group, max_tokens=40, hidden_size=256)
    comm._engine.group.staging = Staging(torch.device("cpu"))
    found = []
    for i, quant in enumerate((None, *every_format(128))):
        found += check(comm, None, 5 + i, quant=quant, seed=i, width=256)
    return found


@pytest.mark.slow
def test_calls_have_the_same_bits() -> None:
    assert [text for found in run_processes(3, staged) for text in found] == []
