"""Quantized weights: what is stored, what it means, and parts by rank."""

from __future__ import annotations

import pytest
import torch

import collogue
from collogue.contract.weight import FP8Block, QuantizedWeight, WeightFormat
from collogue.errors import CollogueError, DTypeError, FormatError, ScaleError, ShapeError
from collogue.pytorch.cut import Cut, Section

FORMATS: dict[str, WeightFormat] = {
    "static": collogue.FP8Static(0.01),
    "channel": collogue.FP8PerToken(),
    "block": FP8Block(16),
    "mxfp8": collogue.MXFP8("ceil", layout="linear"),
    "mxfp4": collogue.MXFP4("ceil", layout="linear"),
    "nvfp4": collogue.NVFP4(400.0, layout="linear"),
}
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def _weight(rows: int = 96, columns: int = 192) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


@formats
def test_decoded_weights_are_near(format: WeightFormat) -> None:
    """Half a step of the element, relative: 2**-4 for E4M3; for E2M1 a quarter of the block's amax, and the scale's own rounding."""
    weight = _weight()
    found = QuantizedWeight.of(weight, format).decode()
    step = 2.0**-4 * weight.abs() + 2.0**-9 if format.__class__.__name__[:3] in ("FP8", "MXF") and "mxfp4" not in _name(format) else None
    if step is None:
        block = format.block  # type: ignore[union-attr]
        amax = weight.view(96, -1, block).abs().amax(-1, keepdim=True).expand(-1, -1, block).reshape(weight.shape)
        step = amax * 0.35
    assert bool(((found - weight).abs() <= step).all())
    assert float((found - weight).abs().max()) > 0


def _name(format: WeightFormat) -> str:
    return next(name for name, each in FORMATS.items() if each is format)


def test_a_block_has_one_scale_and_the_last_may_be_smaller() -> None:
    weight = _weight(40, 24)
    found = QuantizedWeight.of(weight, FP8Block(16))
    assert found.scales is not None
    assert found.scales.shape == (3, 2)
    for row in range(3):
        for column in range(2):
            block = weight[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            codes, _ = collogue.quantize(block.reshape(1, -1), collogue.FP8PerToken())
            expected = (block.abs().amax() / 448).to(torch.float32)
            assert torch.equal(found.scales[row, column], expected)
            got = found.codes[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(1, -1)
            assert torch.equal(got.view(torch.uint8), codes.view(torch.uint8))


@formats
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_decode_to_parts(format: WeightFormat, world_size: int, dim: int) -> None:
    weight = QuantizedWeight.of(_weight(), format)
    size = weight.shape[dim]
    cut = Cut(dim, (Section(size, world_size),))
    whole = weight.decode()
    for rank in range(world_size):
        part = weight.part(cut, rank, world_size)
        assert torch.equal(part.decode(), cut.part(whole, rank, world_size))
        assert part.codes.is_contiguous()


@formats
def test_parts_of_several_sections(format: WeightFormat) -> None:
    weight = QuantizedWeight.of(_weight(), format)
    cut = Cut(0, (Section(64, 2), Section(32, 1)))
    for rank in range(2):
        assert torch.equal(weight.part(cut, rank, 2).decode(), cut.part(weight.decode(), rank, 2))


@pytest.mark.parametrize(("name", "dim"), [("block", 0), ("block", 1), ("mxfp8", 1), ("mxfp4", 1), ("nvfp4", 1)])
def test_a_part_that_ends_inside_a_block_is_an_error(name: str, dim: int) -> None:
    weight = QuantizedWeight.of(_weight(96, 96), FORMATS[name])
    with pytest.raises(ShapeError, match="layer: 96 features in 8 parts do not end at blocks of") as caught:
        weight.part(Cut(dim, (Section(96, 8),)), 0, 8, "layer")
    assert caught.value.hint


def test_an_uneven_end_is_no_matter_where_nothing_is_cut() -> None:
    weight = QuantizedWeight.of(_weight(40, 24), FP8Block(16))
    assert torch.equal(weight.part(Cut(0, (Section(24, 1), Section(16, 1))), 0, 1).decode(), weight.decode())


@pytest.mark.parametrize("name", ["static", "channel", "block", "nvfp4"])
def test_a_factor_goes_into_the_scales(name: str) -> None:
    weight = QuantizedWeight.of(_weight(), FORMATS[name])
    assert torch.equal(weight.times(0.25).decode(), weight.decode() * 0.25)
    assert weight.times(1.0) is weight


def test_mx_scales_hold_no_factor() -> None:
    with pytest.raises(FormatError, match="cannot hold the factor"):
        QuantizedWeight.of(_weight(), FORMATS["mxfp8"]).times(0.25)


def test_bytes() -> None:
    weight = _weight(256, 256)
    assert QuantizedWeight.of(weight, collogue.FP8Static(0.01)).nbytes == 256 * 256
    assert QuantizedWeight.of(weight, FP8Block()).nbytes == 256 * 256 + 4 * 4
    assert QuantizedWeight.of(weight, FORMATS["nvfp4"]).nbytes == 256 * 128 + 256 * 16


_CODES = torch.zeros(32, 64, dtype=torch.float8_e4m3fn)
_FP4 = torch.zeros(32, 32, dtype=torch.uint8)


def _bytes(last: int, blocks: int, dtype: torch.dtype) -> torch.Tensor:
    """Scales of 32 rows, all 0x38 but the last one."""
    scales = torch.full((32, 2 * blocks), 0x38, dtype=torch.uint8)
    scales[-1, -1] = last
    return scales.view(dtype)


@pytest.mark.parametrize(
    ("codes", "scales", "format", "error", "match"),
    [
        (_CODES, torch.zeros(32, 1), collogue.FP8PerToken(), ScaleError, "not positive"),
        (_CODES, torch.full((32, 1), torch.inf), collogue.FP8PerToken(), ScaleError, "not positive"),
        (_CODES, _bytes(0xFF, 1, torch.float8_e8m0fnu), collogue.MXFP8("floor", "linear"), ScaleError, "not numbers"),
        (_FP4, _bytes(0xFF, 1, torch.float8_e8m0fnu), collogue.MXFP4("floor", "linear"), ScaleError, "not numbers"),
        (_FP4, _bytes(0x7F, 2, torch.float8_e4m3fn), collogue.NVFP4(1.0, "linear"), ScaleError, "not finite"),
        (_FP4, _bytes(0xFF, 2, torch.float8_e4m3fn), collogue.NVFP4(1.0, "linear"), ScaleError, "not finite"),
        (_FP4, _bytes(0xA8, 2, torch.float8_e4m3fn), collogue.NVFP4(1.0, "linear"), ScaleError, "without a sign"),
        (_CODES, torch.ones(1, 32), collogue.FP8PerToken(), ShapeError, r"\(1, 32\)"),
        (_CODES, None, collogue.FP8PerToken(), ShapeError, "scales"),
        (_CODES, torch.ones(1), collogue.FP8Static(1.0), ShapeError, "scales"),
        (_CODES, torch.ones(2, 2), FP8Block(16), ShapeError, r"\(2, 4\)"),
        (_CODES.float(), torch.ones(32, 1), collogue.FP8PerToken(), ShapeError, "float32"),
        (_CODES, torch.ones(32, 2, dtype=torch.uint8), FORMATS["mxfp8"], ShapeError, "uint8"),
        (_CODES, torch.ones(32, 2), collogue.MXFP8("ceil"), FormatError, "128x4"),
        (_CODES, torch.ones(32, 1), collogue.FP8Group(), FormatError, "FP8Group is not a weight format"),
        (None, None, collogue.FP8PerToken(), ShapeError, "codes of a weight are a NoneType"),
        ([[1.0]], None, FP8Block(16), ShapeError, "codes of a weight are a list"),
        (_CODES, 1.0, collogue.FP8PerToken(), ShapeError, "scales of a weight are a float"),
        (_CODES, None, None, FormatError, "NoneType is not"),
        (torch.zeros(32, 8, dtype=torch.uint8), torch.ones(32, 1).to(torch.float8_e8m0fnu), FORMATS["mxfp4"], FormatError, "multiple"),
    ],
)
def test_what_does_not_fit_is_a_named_error(codes: object, scales: object, format: object, error: type[CollogueError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        QuantizedWeight(codes, scales, format)  # type: ignore[arg-type]
    assert caught.value.hint


@formats
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_one_error_for_all_formats(format: WeightFormat, value: float, dtype: torch.dtype) -> None:
    weight = _weight().to(dtype)
    weight[3, 5] = value
    with pytest.raises(ScaleError, match="1 of 18432 elements of a weight are NaN or infinite") as caught:
        QuantizedWeight.of(weight, format)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        (None, ShapeError, "got NoneType"),
        (torch.ones(64), ShapeError, r"got \[64\]"),
        (torch.ones(2, 2, 64), ShapeError, r"got \[2, 2, 64\]"),
        (torch.ones(0, 64), ShapeError, r"got \[0, 64\]"),
        (torch.ones(32, 64).double(), DTypeError, "float64"),
        (_CODES, DTypeError, "float8_e4m3fn"),
    ],
)
@formats
def test_what_is_no_matrix(weight: object, error: type[CollogueError], match: str, format: WeightFormat) -> None:
    with pytest.raises(error, match=match) as caught:
        QuantizedWeight.of(weight, format)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.parametrize(
    ("format", "match"),
    [("fp8", "str"), (None, "NoneType"), (collogue.FP8PerToken, "the class FP8PerToken"), (collogue.FP8Group(), "FP8Group")],
)
def test_what_is_no_format_of_weights(format: object, match: str) -> None:
    with pytest.raises(FormatError, match=f"{match} is not a weight format") as caught:
        QuantizedWeight.of(_weight(), format)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.parametrize("size", [0, 8, 24.0, True])
def test_block_sizes(size: object) -> None:
    with pytest.raises(FormatError, match="size"):
        FP8Block(size)  # type: ignore[arg-type]
