"""The host path with its kernels, end to end on the CPU: a CUDA group's engine, whose launches run in the emulator."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from islands import check, check_experts
from ranks import communicator

from collogue.contract.quant import NVFP4, FP8Group, FP8PerToken, FP8Static
from collogue.gpu.engine import KernelEngine
from collogue.gpu.launch import Params
from collogue.gpu.parameters import fill_shape
from collogue.host import engine as host
from collogue.host.finish import KernelFinisher
from collogue.planning.islands import split
from collogue.planning.plan import Kernel, Plan
from collogue.planning.variant import Variant
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.emulator import build
from collogue.testing.emulator.run import MODES, _Job, _Launch

pytestmark = pytest.mark.slow

_COMPILING = threading.Lock()


@dataclass
class Emulated:
    """A launcher whose kernel runs on the CPU, alone on its GPU."""

    run: Callable[[Any], None]
    kernel: Kernel
    params: Params
    quant: Any = None
    seed: int = 0

    def __call__(self, stream: int) -> None:
        self.seed += 1
        shape = self.kernel.shape
        failures, anywhere = (ctypes.c_uint64 * 64)(), (ctypes.c_uint64 * 2)(0, (1 << 64) - 1)
        launch = _Launch(ctypes.addressof(self.params), 0, 0, 0, 0, shape.cluster, shape.clusters, shape.threads)
        job = _Job(1, 1, MODES.index("fair"), 0, (1 << 32) - 1, ctypes.sizeof(_Job))
        job.gpus, job.ctas, job.seed, job.launch = 1, 1 << 30, self.seed, ctypes.addressof(launch)
        job.failures, job.failure_bytes = ctypes.addressof(failures), 64
        job.outputs, job.output = 1, ctypes.addressof(anywhere)
        with _COMPILING:  # the emulator has one machine
            self.run(ctypes.byref(job))
        assert job.error == b"", job.error
        assert job.ticks > 0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """CPU groups finish rows as CUDA groups do. Returns the names of the kernels that are built."""
    directory: Path = tmp_path_factory.getbasetemp().parent / "emulator"
    names: list[str] = []
    libraries: dict[Variant, Callable[[Any], None]] = {}

    def launcher(self: KernelEngine, kernel: Kernel, plan: Plan) -> Emulated:
        with _COMPILING:
            if kernel.variant not in libraries:
                names.append(kernel.variant.name)
                case: Any = SimpleNamespace(variant=kernel.variant, world=1)
                libraries[kernel.variant] = build.compile_cases([case], directory).emulate
        params = Params()
        fill_shape(params, self.topology, kernel.request, plan, 0)
        return Emulated(libraries[kernel.variant], kernel, params)

    def finisher(self: Any) -> KernelFinisher:
        facts = replace(self.topology, architecture="sm_90a", multiprocessors=132)
        return KernelFinisher(facts, self.group.device, 1.0)

    monkeypatch.setattr(KernelEngine, "_launcher", launcher)
    monkeypatch.setattr(KernelEngine, "_launch", lambda self, ready, call, out: self._send(ready, call, out, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(host.HostEngine, "make_finisher", finisher)
    return names


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
