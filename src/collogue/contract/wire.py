"""Terms in a format of fewer bytes on their way to the rank that adds them: a caller's choice, which changes the bits of the sum."""

from __future__ import annotations

from dataclasses import replace

import torch

from collogue.contract import reference
from collogue.contract.formats import read_scales, scales_per_row
from collogue.contract.quant import MXFP8, FP8Group, Quant


def row_bytes(wire: Quant, hidden_size: int) -> int:
    """Of a term's row: its codes, then its scales."""
    assert wire.scale_dtype is not None
    return hidden_size + scales_per_row(wire, hidden_size) * wire.scale_dtype.itemsize


def pack(codes: torch.Tensor, scales: torch.Tensor, wire: Quant) -> torch.Tensor:
    """Codes and scales of a term [T, H] as bytes ``[T, row_bytes]``: no padding of a layout."""
    rows = read_scales(scales, wire, *codes.shape).contiguous().view(torch.uint8)
    return torch.cat([codes.view(torch.uint8), rows.view(len(codes), -1)], dim=1)


def unpack(packed: torch.Tensor, wire: Quant, hidden_size: int) -> torch.Tensor:
    """What such bytes decode to: float32 [T, H]."""
    assert wire.scale_dtype is not None
    plain: Quant = wire
    if isinstance(wire, FP8Group):
        plain = replace(wire, layout="row")
    elif isinstance(wire, MXFP8):
        plain = replace(wire, layout="linear")
    codes = packed[:, :hidden_size].contiguous().view(torch.float8_e4m3fn)
    scales = packed[:, hidden_size:].contiguous().view(wire.scale_dtype)
    return reference.dequantize(codes, scales, plain, hidden_size=hidden_size)
