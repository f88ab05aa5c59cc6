"""Values and formats that several tests use, and bitwise comparison."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant, describe
from collogue.contract.weight import FP8Block, WeightFormat

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
NAN = {torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF, torch.float32: 0x7FFFFFFF}
F32 = np.float32

#: Formats of a linear layer's weight and input, each way to multiply them once.
PAIRS: dict[str, tuple[WeightFormat, Quant | None]] = {
    "tensor": (FP8Static(0.005), FP8Static(0.02)),
    "channel": (FP8PerToken(), FP8PerToken()),
    "block": (FP8Block(128), FP8Group(128)),
    "mxfp8": (MXFP8("ceil", layout="linear"), MXFP8("ceil")),
    "mxfp4": (MXFP4("ceil", layout="linear"), MXFP4("ceil")),
    "nvfp4": (NVFP4(900.0, layout="linear"), NVFP4(500.0)),
    "weights only": (MXFP4("ceil", layout="linear"), None),
}


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def wild(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, spread: float = 4.0) -> Tensor:
    """Values over many binades, so that the order of additions is visible in nearly every row."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape, generator=generator) * spread)).to(dtype)


def every_format(group: int = 32, device: str = "cpu") -> list[Quant]:
    return [
        NVFP4(3.0),
        NVFP4(torch.tensor([0.7], device=device), "8x4"),
        MXFP4("floor", "linear"),
        MXFP4("ceil"),
        MXFP8("floor"),
        MXFP8("ceil", "8x4"),
        FP8Static(0.37),
        FP8PerToken(),
        FP8Group(group),
        FP8Group(group, layout="column"),
        FP8Group(group, "ue8m0"),
        FP8Group(group, "ue8m0", "column"),
    ]


formats_by_label = pytest.mark.parametrize("quant", [pytest.param(q, id=describe(q)) for q in every_format()])
