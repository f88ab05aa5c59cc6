"""No word that a rank sends looks like one that has not arrived, whatever the outputs are (kernels/gather.cuh)."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from collogue import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant, RMSNorm, kernels, reference
from collogue.contract.spec import Output
from collogue.formats import pack_nibbles, read_scales, unpack_nibbles
from collogue.gpu.workspace import SENTINELS

INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
#: Values of given scales, sensible and not.
SCALES = (1.0, 37.5, 1e-30, 3e38, 0.0, -1.5, float("inf"), float("nan"))


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of 16 bits; of float32 every sign and exponent with mantissas around which codes and scales change."""
    if dtype.itemsize == 2:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    mantissas = torch.tensor([*range(0, 1 << 23, 1 << 17), 1, 0x3FFFFF, 0x400001, 0x5FFFFF, 0x600001, 0x7FFFFF, 2, 3], dtype=torch.int32)
    exponents = torch.arange(1 << 9, dtype=torch.int64).mul(1 << 23).to(torch.int32)
    return (exponents[:, None] | mantissas).flatten().view(dtype)


def nvfp4(scale: float) -> NVFP4:
    """With a scale that nobody has looked at, as a CUDA tensor has."""
    quant = NVFP4(1.0, "linear")
    object.__setattr__(quant, "global_scale", torch.tensor([scale]))
    return quant


def fp8_static(scale: float) -> FP8Static:
    quant = FP8Static(1.0)
    object.__setattr__(quant, "scale", torch.tensor([scale]))
    return quant


def quantized(x: torch.Tensor, quant: Quant) -> Output:
    return reference.all_reduce([x], quant=quant)


def blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """A row for every value, which is the only one in it that is not zero."""
    rows = torch.zeros(len(x), size, dtype=x.dtype)
    rows[:, 3] = x
    return rows


def pieces(words: set[int], bits: int) -> set[int]:
    return {word >> shift & ((1 << bits) - 1) for word in words for shift in range(0, 32, bits)}


def found(x: torch.Tensor, bits: int) -> set[int]:
    return {int(v) & ((1 << bits) - 1) for v in x.unique()}


@functools.cache
def values(dtype: torch.dtype) -> set[int]:
    """Of y and of the norm, in 16 bits or 32."""
    x = every_value(dtype).view(-1, 8)
    weight = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0]).to(dtype)
    outs = [reference.all_reduce([x]).reduced, reference.all_reduce([x], norm=RMSNorm(weight)).norm]
    return set().union(*(found(out.view(INTEGER[dtype]), 8 * dtype.itemsize) for out in outs if out is not None))


@functools.cache
def e2m1_nibbles(dtype: torch.dtype) -> set[int]:
    x = every_value(dtype)
    formats: list[Quant] = [*(nvfp4(s) for s in SCALES), MXFP4("floor"), MXFP4("ceil")]
    made = [quantized(x.view(-1, 32), quant).codes for quant in formats] + [quantized(blocks(x, 32), quant).codes for quant in formats]
    return set().union(*(found(unpack_nibbles(codes), 4) for codes in made if codes is not None))


@functools.cache
def e4m3_bytes(dtype: torch.dtype) -> set[int]:
    """Of codes, and of the scales of NVFP4."""
    x = every_value(dtype)
    formats: list[Quant] = [*(fp8_static(s) for s in SCALES), MXFP8("floor"), MXFP8("ceil"), FP8PerToken(), FP8Group(32)]
    made = [quantized(rows, quant).codes for quant in formats for rows in (x.view(-1, 32), blocks(x, 32))]
    made += [quantized(blocks(x, 16), nvfp4(s)).scales for s in SCALES]
    return set().union(*(found(codes.view(torch.uint8), 8) for codes in made if codes is not None))


@functools.cache
def e8m0_bytes(dtype: torch.dtype) -> set[int]:
    rows = blocks(every_value(dtype), 32)
    made = [quantized(rows, kind(rounding, "linear")).scales for kind in (MXFP4, MXFP8) for rounding in ("floor", "ceil")]
    return set().union(*(found(scales.view(torch.uint8), 8) for scales in made if scales is not None))


@functools.cache
def scale_words(dtype: torch.dtype) -> set[int]:
    """Of float scales, and of UE8M0 scales, which travel in words of their own."""
    rows = blocks(every_value(dtype), 32)
    made = [quantized(rows, quant) for quant in (FP8PerToken(), FP8Group(32))]
    floats = set().union(*(found(out.scales.contiguous().view(torch.int32), 32) for out in made if out.scales is not None))
    quant = FP8Group(32, scale_format="ue8m0")
    scales = quantized(rows, quant).scales
    assert scales is not None
    return floats | found(read_scales(scales, quant, len(rows), 32).contiguous().view(torch.uint8), 8)


dtypes = pytest.mark.parametrize("dtype", INTEGER, ids=str)


@pytest.mark.slow
@dtypes
def test_no_value_is_a_negative_zero(dtype: torch.dtype) -> None:
    bits = 8 * dtype.itemsize
    assert len(values(dtype)) > 4000
    assert not pieces({SENTINELS[dtype.itemsize]}, bits) <= values(dtype)
    assert 1 << (bits - 1) not in values(dtype)


@pytest.mark.slow
@dtypes
def test_no_word_of_codes_is_the_sentinel(dtype: torch.dtype) -> None:
    assert e2m1_nibbles(dtype) == set(range(16)) - {8}
    assert e4m3_bytes(dtype) == set(range(256)) - {0x80, 0xFF}
    assert not pieces({SENTINELS[dtype.itemsize]}, 4) <= e2m1_nibbles(dtype)
    assert not pieces({SENTINELS[dtype.itemsize]}, 8) <= e4m3_bytes(dtype)


@dtypes
def test_no_word_of_turned_e8m0_bytes_is_the_sentinel(dtype: torch.dtype) -> None:
    (turn,) = re.findall(r"kTurned = (0x\w+)u;", (kernels.ROOT / "formats" / "mx.cuh").read_text())
    sentinel = SENTINELS[dtype.itemsize]
    assert pieces({sentinel}, 8) <= e8m0_bytes(dtype)  # as they are, some word would be
    assert not pieces({sentinel ^ int(turn, 16)}, 8) <= e8m0_bytes(dtype)


@dtypes
def test_no_scale_that_travels_alone_is_the_sentinel(dtype: torch.dtype) -> None:
    assert SENTINELS[dtype.itemsize] not in scale_words(dtype)
    assert all(word < 1 << 31 for word in scale_words(dtype))


def test_nibbles_are_packed_as_they_are_unpacked() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, -1)
    assert torch.equal(pack_nibbles(unpack_nibbles(codes)), codes)
