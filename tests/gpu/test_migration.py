"""A user's migration from FlashInfer on GPUs: the same calls, Collogue's bits. See `migration.py`."""

from __future__ import annotations

import pytest
import torch
from gpu.migration import TOKENS, TOKENS_VIRTUAL, calls, case_of, migrate, user

from collogue.testing import run_virtual
from collogue.testing.processes import run_processes
from collogue.tools.check import build_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]

SIZES = (3, 4, 8)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    world = min(2, torch.cuda.device_count())
    build_kernels(
        [case_of(call, size) for size in SIZES for call in calls(TOKENS_VIRTUAL)] + [case_of(call, world) for call in calls(TOKENS)]
    )


def test_a_process_on_each_gpu() -> None:
    world = min(2, torch.cuda.device_count())
    assert run_processes(world, user, device="cuda", silence=60.0) == [[]] * world


@pytest.mark.parametrize("world", SIZES)
def test_virtual_ranks(world: int) -> None:
    assert run_virtual(world, lambda group: migrate(group, calls(TOKENS_VIRTUAL)), device="cuda", timeout=60.0) == [[]] * world
