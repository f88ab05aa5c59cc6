"""NVIDIA's ``cuda_fp4.h`` and its siblings compiled for the host: a second opinion on every conversion.

The headers come from the package nvidia-cuda-runtime. Their conversions keep the sign of zero; :func:`without_negative_zero`
maps their answers to the contract's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("oracle.cpp")
#: Two small headers that NVIDIA ships in other packages. They follow NVIDIA's folder, so the real ones win where they are installed.
STAND_INS = Path(__file__).with_name("headers")


def include_directory() -> Path:
    """Where nvidia-cuda-runtime keeps its headers: ``nvidia/cu13/include`` and the like."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for header in sorted(Path(root).glob("*/include/cuda_fp4.h")):
            return header.parent
    raise FileNotFoundError("cuda_fp4.h not found: the test extra installs nvidia-cuda-runtime")


class Oracle:
    """The compiled conversions. Every method takes and returns a contiguous CPU tensor."""

    def __init__(self, directory: Path) -> None:
        library = directory / "oracle.so"
        # -ffp-contract=off and no -march: plain IEEE float32, whatever the compiler's defaults.
        command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", str(SOURCE), "-o", str(library)]
        command += [f"-I{include_directory()}", f"-I{STAND_INS}"]
        subprocess.run(command, check=True, timeout=120)
        self._library = ctypes.CDLL(str(library))

    def _call(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        assert source.is_contiguous()
        assert source.device.type == "cpu"
        out = torch.empty(source.shape, dtype=dtype)
        function = getattr(self._library, name)
        function(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(source.numel()))
        return out

    def e2m1_encode(self, x: Tensor) -> Tensor:
        return self._call("e2m1_encode", x, torch.uint8)

    def e4m3_encode(self, x: Tensor) -> Tensor:
        return self._call("e4m3_encode", x, torch.uint8)

    def e2m1_decode(self, codes: Tensor) -> Tensor:
        return self._call("e2m1_decode", codes, torch.float32)

    def e4m3_decode(self, codes: Tensor) -> Tensor:
        return self._call("e4m3_decode", codes, torch.float32)

    def e8m0_decode(self, codes: Tensor) -> Tensor:
        return self._call("e8m0_decode", codes, torch.float32)

    def round_value(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """To bfloat16 or float16, as int16 bits."""
        return self._call({torch.bfloat16: "to_bfloat16", torch.float16: "to_float16"}[dtype], x, torch.int16)


def without_negative_zero(bits: Tensor, negative_zero: int) -> Tensor:
    """The contract's one difference: the code of -0 becomes 0."""
    return torch.where(bits == negative_zero, torch.zeros_like(bits), bits)
