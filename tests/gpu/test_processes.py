"""One process for each GPU: real symmetric memory, real NCCL. One set of processes runs all scenarios."""

from __future__ import annotations

import pytest
import torch
from gpu.cases import FEW, FIXED, operation_cases, random_cases, sweep_of
from gpu.scenarios import SCENARIOS, run_all

from collogue.testing.processes import run_processes
from collogue.tools.check import build_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def findings() -> list[dict[str, list[str]]]:
    size = min(8, torch.cuda.device_count())
    build_kernels([*sweep_of(size, thorough=True), *random_cases(size), *operation_cases(size)])
    for overrides in FIXED.values():
        build_kernels(random_cases(size, FEW), overrides=overrides)
    return run_processes(size, run_all, list(SCENARIOS), device="cuda", silence=120.0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_process_on_each_gpu(scenario: str, findings: list[dict[str, list[str]]]) -> None:
    assert [text for rank in findings for text in rank[scenario]] == []
