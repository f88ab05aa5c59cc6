"""What the tests of the emulator share: sequences of calls, words that look like the sentinel, small cases, launches."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collogue.contract.quant import MXFP8
from collogue.gpu.engine import KernelEngine
from collogue.gpu.launch import Params
from collogue.gpu.parameters import fill_shape
from collogue.planning.plan import Kernel, Plan
from collogue.planning.variant import Variant
from collogue.testing.emulator import MODES, Case, Library, build
from collogue.testing.emulator.run import _Job, _Launch

Build = Callable[..., Library]

PROTOCOL = "protocol.cuh"
#: Longer and shorter calls after each other: words that an earlier call left behind would be taken for those of a later one.
TOKENS = (3, 1, 2, 1, 1, 3)
PRESENT = [mode for mode in MODES if mode != "absent"]
#: An all-gather in which a CTA has warps that do not wait.
TWO_WARPS = Case(2, 512, 64, kernel="all_gather")


def turning(*groups: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Partials whose sum is 512 in some of every four groups of 32 and zero in the others: E8M0 bytes 0x80 and 0."""

    def terms(rank: int, partial: torch.Tensor) -> torch.Tensor:
        partial = torch.zeros_like(partial)
        if rank == 0:
            partial.view(len(partial), -1, 4, 32)[:, :, list(groups), 5] = 512.0
        return partial

    return terms


#: The scale words of such a call are the sentinel, but that they travel turned.
TURNED = {
    torch.float32: (Case(2, 128, 32, kernel="sharded", residual=False, norm=False, quant=MXFP8("floor"), dtype=torch.float32), (3,)),
    torch.bfloat16: (Case(2, 128, 32, kernel="sharded", residual=False, norm=False, quant=MXFP8("floor")), (1, 3)),
}


# ---- launches of an engine

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


def emulate_launches(monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[str]:
    """Engines of one GPU launch in the emulator, from tensors on the CPU. Returns the names of the kernels that are built."""
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

    monkeypatch.setattr(KernelEngine, "_launcher", launcher)
    monkeypatch.setattr(KernelEngine, "_launch", lambda self, ready, call, out: self._send(ready, call, out, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    return names
