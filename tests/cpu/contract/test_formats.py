"""Formats: every encoder and decoder against NVIDIA's headers, every layout against an index formula."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from oracle import Oracle, without_negative_zero
from torch import Tensor

from collogue import formats
from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant, describe
from collogue.errors import DTypeError, FormatError, ShapeError


def every_16_bit_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()


def float32_patterns() -> Tensor:
    """Two million random bit patterns (so NaN, infinities, subnormals) and the neighborhood of every place where a rounding may change."""
    generator = torch.Generator().manual_seed(1)
    anywhere = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator).to(torch.int32)
    # Exponents 2**-14 to 2**14, where E2M1 and E4M3 do anything at all.
    near = torch.randint((127 - 14) << 23, (127 + 14) << 23, (1_000_000,), generator=generator).to(torch.int32)
    # Four leading mantissa bits and a half: all values and all midpoints of E4M3 and E2M1, one unit to both sides.
    corners = torch.arange(0, 256 << 5, dtype=torch.int32) << 18
    around = torch.cat([corners + d for d in (-1, 0, 1)])
    # The same for bfloat16 (16 bits and a half) at a few exponents, and for float16's subnormals.
    fine = torch.cat(
        [(exponent << 23) + (torch.arange(256, dtype=torch.int32) << 15) for exponent in (0, 1, 2, 102, 103, 110, 127, 142, 143, 253, 254)]
    )
    edge = torch.cat([fine + d for d in (-1, 0, 1)])
    magnitudes = torch.cat([near, around, edge]) & 0x7FFFFFFF
    return torch.cat([anywhere, magnitudes, magnitudes | -(2**31)]).view(torch.float32)


INPUTS = {
    "every bfloat16": lambda: every_16_bit_value(torch.bfloat16),
    "every float16": lambda: every_16_bit_value(torch.float16),
    "float32 patterns": float32_patterns,
}


@pytest.mark.parametrize("inputs", INPUTS)
def test_e2m1_encode_equals_cuda_fp4(oracle: Oracle, inputs: str) -> None:
    x = INPUTS[inputs]()
    expected = torch.where(x.isnan(), torch.tensor(7, dtype=torch.uint8), oracle.e2m1_encode(x))
    assert torch.equal(formats.e2m1_encode(x), without_negative_zero(expected, 8))


@pytest.mark.parametrize("inputs", INPUTS)
def test_e4m3_encode_equals_cuda_fp8(oracle: Oracle, inputs: str) -> None:
    x = INPUTS[inputs]()
    expected = torch.where(x.isnan(), torch.tensor(0x7F, dtype=torch.uint8), oracle.e4m3_encode(x))
    assert torch.equal(formats.e4m3_encode(x), without_negative_zero(expected, 0x80))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", INPUTS)
def test_round_value_equals_cuda(oracle: Oracle, inputs: str, dtype: torch.dtype) -> None:
    x = INPUTS[inputs]()
    expected = torch.where(x.isnan(), torch.tensor(0x7FFF, dtype=torch.int16), oracle.round_value(x, dtype))
    assert torch.equal(formats.round_value(x, dtype).view(torch.int16), without_negative_zero(expected, -(2**15)))


def test_round_value_to_float32_changes_only_zero_and_nan() -> None:
    x = float32_patterns()
    expected = torch.where(x.isnan(), 0x7FFFFFFF, x.view(torch.int32)).to(torch.int32)
    assert torch.equal(formats.round_value(x, torch.float32).view(torch.int32), without_negative_zero(expected, -(2**31)))
    # canonical_nan keeps the sign of zero.
    assert torch.equal(formats.canonical_nan(x).view(torch.int32), expected)
    assert x.isnan().sum() > 1000
    assert (x == 0).sum() >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_mask_and_canonical_nan_of_every_16_bit_value(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(formats.nan_mask(x), -x.isnan().to(torch.int16))
    expected = torch.where(x.isnan(), 0x7FFF, x.view(torch.int16)).to(torch.int16)
    assert torch.equal(formats.canonical_nan(x).view(torch.int16), expected)


@pytest.mark.parametrize(("element", "count"), [("e2m1", 16), ("e4m3", 256), ("e8m0", 256)])
def test_decode_equals_cuda(oracle: Oracle, element: str, count: int) -> None:
    codes = torch.arange(count, dtype=torch.uint8)
    expected = formats.canonical_nan(getattr(oracle, f"{element}_decode")(codes))
    assert torch.equal(getattr(formats, f"{element}_decode")(codes).view(torch.int32), expected.view(torch.int32))


def test_decode_then_encode_is_the_identity() -> None:
    """Every code comes back, but for the negative zeros and the second NaN; decode keeps any shape."""
    e4m3 = torch.arange(256, dtype=torch.uint8).view(16, 16)
    expected = e4m3.clone()
    expected[8, 0], expected[15, 15] = 0, 0x7F
    assert torch.equal(formats.e4m3_encode(formats.e4m3_decode(e4m3)), expected)
    e2m1 = torch.arange(16, dtype=torch.uint8)
    assert formats.e2m1_encode(formats.e2m1_decode(e2m1)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]


def test_ties_and_saturation_by_hand() -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.0001, 6.0, 1e9, inf, nan, -0.25, -0.2501, -5.0, -inf, -0.0])
    assert formats.e2m1_encode(x).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7, 7, 7, 7, 0, 9, 14, 15, 0]
    x = torch.tensor([2.0**-10, 1.5 * 2**-9, 2.0**-6, 1.0, 1.0625, 1.1875, 448.0, 464.0, 480.0, inf, nan, -(2.0**-10), -1.0, -inf, -0.0])
    assert formats.e4m3_encode(x).tolist() == [0, 2, 0x08, 0x38, 0x38, 0x3A, 0x7E, 0x7E, 0x7E, 0x7E, 0x7F, 0, 0xB8, 0xFE, 0]


def test_encoders_take_any_shape_and_only_float32() -> None:
    for encode in (formats.e2m1_encode, formats.e4m3_encode):
        assert encode(torch.zeros(0, 16)).shape == (0, 16)
        assert encode(torch.ones(2, 3, 4).transpose(0, 2)).shape == (4, 3, 2)
        with pytest.raises(DTypeError, match=r"hint: convert with \.float\(\)"):
            encode(torch.zeros(4, dtype=torch.bfloat16))


def test_encoders_do_not_change_their_input() -> None:
    x = float32_patterns()
    before = x.view(torch.int32).clone()
    formats.e2m1_encode(x), formats.e4m3_encode(x), formats.round_value(x, torch.float32), formats.canonical_nan(x)
    assert torch.equal(x.view(torch.int32), before)


def test_nibbles() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [7, 9, 3, 12]], dtype=torch.uint8)
    packed = formats.pack_nibbles(codes)
    assert packed.tolist() == [[0x21, 0x0F], [0x97, 0xC3]]
    assert torch.equal(formats.unpack_nibbles(packed), codes)


# Scale layouts


LAYOUTS = [
    pytest.param(quant, id=describe(quant))
    for quant in (
        *(
            make(layout)
            for layout in ("128x4", "8x4", "linear")
            for make in (partial(NVFP4, 1.0), partial(MXFP4, "floor"), partial(MXFP8, "ceil"))
        ),
        *(FP8Group(32, scale_format, layout) for scale_format in ("float32", "ue8m0") for layout in ("row", "column")),
        FP8PerToken(),
    )
]


def up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def expected_memory(quant: Quant, tokens: int, columns: int) -> tuple[int, Any]:
    """(number of elements in memory, index of (row, column)) from the written formulas; elements are bytes or float32 scales."""
    layout = getattr(quant, "layout", "row")
    if layout == "128x4":
        tiles = up(columns, 4) // 4
        return up(tokens, 128) * tiles * 4, lambda r, k: (r // 128 * tiles + k // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + k % 4
    if layout == "8x4":
        tiles = up(columns, 4) // 4
        return up(tokens, 8) * tiles * 4, lambda r, k: (r // 8 * tiles + k // 4) * 32 + (r % 8) * 4 + k % 4
    if layout == "column" and quant.scale_format == "ue8m0":  # type: ignore[attr-defined]
        return up(tokens, 4) * up(columns, 4), lambda r, k: (k // 4 * up(tokens, 4) + r) * 4 + k % 4
    if layout == "column":
        return up(tokens, 4) * columns, lambda r, k: k * up(tokens, 4) + r
    return tokens * columns, lambda r, k: r * columns + k


def some_scales(quant: Quant, tokens: int, columns: int) -> Tensor:
    spec = formats.scale_spec(quant, tokens, columns * (quant.block or 32))
    assert spec is not None
    if spec.dtype == torch.float32:
        return torch.arange(1, tokens * columns + 1, dtype=torch.float32).view(tokens, columns)
    return (torch.arange(tokens * columns) % 253 + 1).to(torch.uint8).view(tokens, columns)


@pytest.mark.parametrize("quant", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 9, 127, 128, 129, 300])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 18])
def test_place_scales_against_the_index_formula(quant: Quant, tokens: int, columns: int) -> None:
    columns = columns if quant.block else 1
    hidden_size = columns * (quant.block or 32)
    values = some_scales(quant, tokens, columns)
    placed = formats.place_scales(values, quant, tokens, hidden_size)

    size, index = expected_memory(quant, tokens, columns)
    expected = torch.zeros(size, dtype=values.dtype)  # so padding is checked to be zero
    flat = values.tolist()
    for r in range(tokens):
        for k in range(columns):
            expected[index(r, k)] = flat[r][k]
    assert torch.equal(formats.scale_storage(placed), expected.view(torch.uint8))
    assert torch.equal(formats.read_scales(placed, quant, tokens, hidden_size), values)

    spec = formats.scale_spec(quant, tokens, hidden_size)
    assert spec is not None
    assert (placed.shape, placed.stride(), placed.dtype) == (spec.shape, spec.stride, spec.dtype)
    assert spec.storage * placed.element_size() == formats.scale_storage(placed).numel() == placed.untyped_storage().nbytes()
    empty = formats.empty_scales(quant, tokens, hidden_size, "cpu")
    assert (empty.shape, empty.stride(), empty.dtype) == (placed.shape, placed.stride(), placed.dtype)
    assert formats.scale_storage(empty).numel() == formats.scale_storage(placed).numel()


def test_shapes_strides_and_dtypes_by_hand() -> None:
    def spec(quant: Quant, tokens: int = 130, hidden_size: int = 1152) -> Any:
        found = formats.scale_spec(quant, tokens, hidden_size)
        return found and (found.shape, found.stride, found.dtype, found.storage)

    e4m3, e8m0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
    assert spec(NVFP4(1.0)) == ((256, 72), (72, 1), e4m3, 256 * 72)
    assert spec(NVFP4(1.0, "8x4"), hidden_size=48) == ((136, 4), (4, 1), e4m3, 136 * 4)
    assert spec(NVFP4(1.0, "linear")) == ((130, 72), (72, 1), e4m3, 130 * 72)
    assert spec(MXFP8("floor")) == ((256, 36), (36, 1), e8m0, 256 * 36)
    assert spec(MXFP4("ceil", "linear")) == ((130, 36), (36, 1), e8m0, 130 * 36)
    assert spec(FP8PerToken()) == ((130, 1), (1, 1), torch.float32, 130)
    assert spec(FP8Static(1.0)) is None
    assert spec(FP8Group()) == ((130, 9), (9, 1), torch.float32, 130 * 9)
    assert spec(FP8Group(layout="column")) == ((130, 9), (1, 132), torch.float32, 132 * 9)
    assert spec(FP8Group(scale_format="ue8m0")) == ((130, 9), (9, 1), e8m0, 130 * 9)
    assert spec(FP8Group(scale_format="ue8m0", layout="column")) == ((130, 3), (1, 132), torch.int32, 132 * 3)


@pytest.mark.parametrize("quant", LAYOUTS)
def test_no_tokens(quant: Quant) -> None:
    hidden_size = 96
    columns = formats.scales_per_row(quant, hidden_size)
    placed = formats.place_scales(some_scales(quant, 0, columns), quant, 0, hidden_size)
    assert placed.ndim == 2
    assert placed.numel() == 0
    assert placed.shape[0] == 0
    assert formats.scale_storage(placed).numel() == 0
    assert formats.scale_storage(formats.empty_scales(quant, 0, hidden_size, "cpu")).numel() == 0
    assert formats.read_scales(placed, quant, 0, hidden_size).shape == (0, columns)


@pytest.mark.parametrize("quant", LAYOUTS)
def test_placed_scales_share_no_memory_with_the_values(quant: Quant) -> None:
    values = some_scales(quant, 4, 4 if quant.block else 1)
    placed = formats.place_scales(values, quant, 4, 4 * quant.block or 32)
    before = formats.scale_storage(placed).clone()
    values.zero_()
    assert torch.equal(formats.scale_storage(placed), before)


def test_scale_storage_of_a_view_stays_in_the_view() -> None:
    """Scales that lie inside a larger allocation: only their own bytes."""
    quant = FP8Group(32, layout="column")
    arena = torch.full((100,), -1.0)
    scales = arena.as_strided((3, 2), (1, 4), storage_offset=8)
    formats.scale_storage(scales).zero_()
    assert (arena[:8] == -1).all()
    assert (arena[8:16] == 0).all()
    assert (arena[16:] == -1).all()
    assert formats.scale_spec(quant, 3, 64) == formats.ScaleSpec((3, 2), (1, 4), torch.float32, 8)


def test_codes_and_errors() -> None:
    assert formats.code_spec(NVFP4(1.0), 3, 64) == ((3, 32), torch.uint8)
    assert formats.code_spec(MXFP8("ceil"), 3, 64) == ((3, 64), torch.float8_e4m3fn)
    for refused in (lambda: formats.code_spec(NVFP4(1.0), 3, 24), lambda: formats.scale_spec(FP8Group(64), 3, 96)):
        with pytest.raises(FormatError, match="hint: use a hidden size that is a multiple of"):
            refused()
    with pytest.raises(ShapeError, match="hint: its one scale is the caller's own"):
        formats.empty_scales(FP8Static(1.0), 3, 64, "cpu")
    placed = formats.place_scales(torch.ones(3, 2, dtype=torch.uint8), MXFP8("ceil"), 3, 64)
    for wrong in (placed[:8], placed.view(torch.uint8)):
        with pytest.raises(ShapeError, match="hint: pass the scales as they were returned"):
            formats.read_scales(wrong, MXFP8("ceil"), 3, 64)
