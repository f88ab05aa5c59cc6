"""The host path with its kernels, end to end on the CPU: a CUDA group's engine, whose launches run in the emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated import emulate_launches
from islands import check, check_experts
from ranks import communicator

from collogue.contract.quant import NVFP4, FP8Group, FP8PerToken, FP8Static
from collogue.host import engine as host
from collogue.host.finish import KernelFinisher
from collogue.planning.islands import split
from collogue.testing import VirtualGroup, run_virtual

pytestmark = pytest.mark.slow


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """CPU groups finish rows as CUDA groups do. Returns the names of the kernels that are built."""

    def finisher(self: Any) -> KernelFinisher:
        facts = replace(self.topology, architecture="sm_90a", multiprocessors=132)
        return KernelFinisher(facts, self.group.device, 1.0)

    monkeypatch.setattr(host.HostEngine, "make_finisher", finisher)
    return emulate_launches(monkeypatch, tmp_path_factory.getbasetemp().parent / "emulator")


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("hosts", ["aaa", "aab", "abab"])
def test_every_operation(hosts: str, algorithm: Any, kernels: list[str]) -> None:
    """Equal to the scalar version, by the kernels of a GPU."""
    islands = split(hosts)

    def rank(group: VirtualGroup) -> list[str]:
        comm = communicator(group, algorithm=algorithm, max_tokens=16)
        assert isinstance(comm._engine._finisher, KernelFinisher)  # type: ignore[union-attr]
        rows = [(3 * r + 1) % 4 for r in range(len(hosts))]
        found = check(comm, islands, 5, quant=NVFP4(3.0)) + check(comm, islands, 2, residual=False, norm=False)
        found += check(comm, islands, sum(rows), quant=FP8Group(32, "ue8m0", "column"), rows=rows, kind="normal")
        found += check(comm, islands, 1, quant=FP8Static(0.37), norm=False) + check(comm, islands, 7, quant=FP8PerToken(), kind="subnormal")
        return found + check_experts(comm, islands)

    assert [text for found in run_virtual(len(hosts), rank, hosts=list(hosts), timeout=400) for text in found] == []
    assert any("terms" in name for name in kernels)
    assert any(name.endswith("_sum") and "experts" in name for name in kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype, kernels: list[str]) -> None:
    def rank(group: VirtualGroup) -> list[str]:
        comm = communicator(group, algorithm="two_shot", dtype=dtype)
        return check(comm, [[0, 1], [2]], 5, quant=FP8PerToken())

    assert [text for found in run_virtual(3, rank, hosts=list("aab"), timeout=400) for text in found] == []
    assert kernels
