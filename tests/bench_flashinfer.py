"""A package in the shape of FlashInfer whose all-reduces run on virtual ranks of the CPU, in the memory that its workspace names."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import ModuleType
from typing import Any

import pytest
import torch


class _Base:
    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank, self._destroyed = world_size, rank, False


class _Trtllm(_Base):
    ipc_handles: Any
    workspace_tensor: Any
    mem_handles: Any
    metadata: Any

    def __init__(self) -> None:
        raise AssertionError("it would ask the driver for memory")

    def destroy(self) -> None:
        self._destroyed = True


def _words(pointer: int, count: int) -> list[int]:
    return list((ctypes.c_int32 * count).from_address(pointer))


class Fake:
    """The package's functions; ``off_by`` is added to every sum, and what was asked of each call is kept."""

    def __init__(self, world_size: int, off_by: float = 0.0) -> None:
        self.off_by, self.asked = off_by, list[dict[str, Any]]()
        self._meeting = threading.Barrier(world_size, timeout=20)

    def allreduce_fusion(self, **given: Any) -> None:
        """Each rank writes its term where the workspace says, meets the others, and reads theirs."""
        x, workspace = given["input"], given["workspace"]
        n, pointers = workspace.world_size, workspace.workspace_tensor.tolist()
        assert isinstance(workspace, _Trtllm)
        assert len(pointers) == 3 * n + 1
        control = _words(pointers[-1], 5)
        assert control[:3] + control[4:] == [0, 0, 0, 0]
        # Three buffers of -0 lie one behind the other, and each holds the terms of all ranks.
        assert control[3] >= n * x.nbytes
        assert set(_words(pointers[2 * n + workspace.rank], 3 * control[3] // 4)) == {-(2**31) + 2**15} or x.dtype == torch.float32
        self.asked.append({k: v for k, v in given.items() if not isinstance(v, torch.Tensor)})
        ctypes.memmove(pointers[workspace.rank], x.data_ptr(), x.nbytes)
        self._meeting.wait()
        terms = [torch.empty_like(x) for _ in range(n)]
        for term, pointer in zip(terms, pointers, strict=False):
            ctypes.memmove(term.data_ptr(), pointer, x.nbytes)
        self._meeting.wait()
        total = (torch.stack([term.float() for term in terms]).sum(0) + self.off_by).to(x.dtype)
        if given["pattern"] == 0:
            given["output"].copy_(total)
            return
        y = (total.float() + given["residual_in"].float()).to(x.dtype)
        wide = y.float()
        norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + given["rms_eps"]) * given["rms_gamma"].float()
        given["residual_out"].copy_(y)
        if given["pattern"] == 1:
            given["norm_out"].copy_(norm)
        else:
            scaled = norm.to(x.dtype).float() / given["scale_factor"]
            given["quant_out"].copy_(scaled.clamp(-448, 448).to(torch.float8_e4m3fn))


def install(monkeypatch: pytest.MonkeyPatch, world_size: int, off_by: float = 0.0) -> Fake:
    """Put the package where imports find it, for one test."""
    fake = Fake(world_size, off_by)

    class Pattern:
        kAllReduce, kARResidualRMSNorm, kARResidualRMSNormFP8Quant = 0, 1, 2

    names: dict[str, dict[str, Any]] = {
        "flashinfer": {},
        "flashinfer.comm": {"allreduce_fusion": fake.allreduce_fusion, "AllReduceFusionPattern": Pattern},
        "flashinfer.comm.allreduce": {"AllReduceFusionWorkspace": _Base, "TRTLLMAllReduceFusionWorkspace": _Trtllm},
        "flashinfer.comm.trtllm_ar": {"get_trtllm_comm_module": lambda: None},
    }
    modules = {name: ModuleType(name) for name in names}
    for name, content in names.items():
        for key, value in content.items():
            setattr(modules[name], key, value)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
        monkeypatch.setitem(sys.modules, name, modules[name])
    return fake
