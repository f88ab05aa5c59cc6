"""A user's migration from FlashInfer on GPUs: the same calls, Collogue's bits. See `migration.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu.migration import DTYPES, TOKENS, TOKENS_VIRTUAL, Call, P, calls, case_of, in_a_graph, in_place, migrate

from collogue.check import build_kernels
from collogue.testing import run_virtual
from collogue.testing.processes import run_processes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]

SIZES = (3, 4, 8)
IN_A_GRAPH = [Call(8, 7168, DTYPES[0], pattern) for pattern in (P.kAllReduce, P.kARResidualRMSNorm, P.kARResidualRMSNormOutFP4Quant)]
IN_A_GRAPH.append(Call(5, 4096, DTYPES[1], P.kARResidualRMSNormPerTokenGroupFP8PackedQuant))
IN_PLACE = [Call(tokens, 7168, DTYPES[0], P.kARResidualRMSNorm) for tokens in (1, 4096)]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    world = min(2, torch.cuda.device_count())
    build_kernels(
        [case_of(call, size) for size in SIZES for call in calls(TOKENS_VIRTUAL)] + [case_of(call, world) for call in calls(TOKENS)]
    )


def user(group: dist.ProcessGroup, tell: Any) -> list[str]:
    """One process of the user's."""
    todo = calls(TOKENS)
    found = migrate(group, todo, tell=tell)
    tell("the older calls")
    found += migrate(group, [call for call in todo if call.tokens <= 256][::3], tell=tell, old=True)
    tell("graphs")
    for call in IN_A_GRAPH:
        found += in_a_graph(group, call)
    tell("a group without NCCL")
    for call in IN_PLACE:
        found += in_place(dist.new_group(backend="gloo"), call)
    return found


def test_a_process_on_each_gpu() -> None:
    world = min(2, torch.cuda.device_count())
    assert run_processes(world, user, device="cuda", silence=60.0) == [[]] * world


@pytest.mark.parametrize("world", SIZES)
def test_virtual_ranks(world: int) -> None:
    assert run_virtual(world, lambda group: migrate(group, calls(TOKENS_VIRTUAL)), device="cuda", timeout=60.0) == [[]] * world
