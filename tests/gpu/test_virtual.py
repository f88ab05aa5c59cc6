"""Virtual ranks: every world size for which the machine has no GPUs, with the kernels, plans and workspaces of real ranks."""

from __future__ import annotations

import pytest
import torch
from gpu.cases import FEW, FIXED, operation_cases, random_cases, sweep_of
from gpu.scenarios import SCENARIOS
from gpu.world import World

from collogue.testing import VirtualGroup, run_virtual
from collogue.tools.check import Answers, build_kernels

GPUS = torch.cuda.device_count()
SIZES = [size for size in range(1, 9) if size != GPUS or size < 2]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def kernels() -> None:
    build_kernels([case for size in SIZES for case in (*sweep_of(size, thorough=False), *random_cases(size), *operation_cases(size))])
    for overrides in FIXED.values():
        build_kernels([case for size in SIZES for case in random_cases(size, FEW)], overrides=overrides)


def run(size: int, scenario: str, device: str = "cuda") -> list[str]:
    answers = Answers()

    def rank(group: VirtualGroup) -> list[str]:
        world = World(group, answers)
        SCENARIOS[scenario](world)
        return world.findings

    return [text for findings in run_virtual(size, rank, device=device, timeout=120.0) for text in findings]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_virtual_ranks(scenario: str, size: int) -> None:
    if (scenario == "subgroups" and size < 4) or (scenario in ("late_rank", "mismatched_calls") and size < 2):
        pytest.skip("too few ranks")
    assert run(size, scenario) == []


@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(GPUS < 2, reason="one GPU: all virtual ranks share it anyway")
@pytest.mark.parametrize("scenario", ["random_sequence", "late_rank"])
def test_virtual_ranks_on_one_gpu(scenario: str) -> None:
    assert run(4, scenario, "cuda:0") == []
