"""Small number formats and scale layouts, in PyTorch, on any device.

E2M1 (4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), E4M3 (8 bits, largest 448, no infinity), E8M0 (a power of
two, bias 127), and the index maps that say where the scale of a block lies in memory. Encoders round to nearest even,
saturate, and store +0 for every negative zero, so code 8 and code 0x80 never occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collogue.contract.quant import Quant
from collogue.errors import DTypeError, ShapeError

#: An integer dtype of the same width, and the pattern of infinity in it. Above it, but for the sign, lies NaN.
INTEGER_VIEW = {torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00), torch.float32: (torch.int32, 0x7F800000)}
#: Rows of a scale tile, as (groups, rows of a group): the row ``r`` of a tile is (r // rows, r % rows). Tiles have four columns.
_TILE_ROWS = {"128x4": (4, 32), "8x4": (1, 8)}


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``.

    Examples:
        >>> collogue.formats.round_up(130, 128)
        256
    """
    return -(-value // multiple) * multiple


# Values


def nan_mask(x: Tensor) -> Tensor:
    """-1 (all bits) where ``x`` is NaN, else 0: an integer of the dtype's width. Arithmetic on these is faster than a select.

    Examples:
        >>> collogue.formats.nan_mask(torch.tensor([1.0, torch.nan]))
        tensor([ 0, -1], dtype=torch.int32)
    """
    integer, infinity = INTEGER_VIEW[x.dtype]
    return (infinity - (x.view(integer) & torch.iinfo(integer).max)) >> (torch.iinfo(integer).bits - 1)


def canonical_nan(x: Tensor) -> Tensor:
    """``x`` (bfloat16, float16 or float32) with every NaN replaced by 0x7FFF or 0x7FFFFFFF: what NVIDIA's hardware gives. A new tensor.

    Examples:
        >>> collogue.formats.canonical_nan(torch.tensor([-torch.nan])).view(torch.int32)
        tensor([2147483647], dtype=torch.int32)
    """
    integer, _ = INTEGER_VIEW[x.dtype]
    nan = nan_mask(x)
    sign = nan << (torch.iinfo(integer).bits - 1)
    return nan.bitwise_or_(x.view(integer)).bitwise_xor_(sign).view(x.dtype)


def round_value(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``x`` once, to nearest even, to ``dtype``; -0 becomes +0, and NaN the dtype's one NaN.

    Examples:
        >>> collogue.formats.round_value(torch.tensor([1.001, -0.0]), torch.bfloat16)
        tensor([1., 0.], dtype=torch.bfloat16)
    """
    # Adding +0 changes nothing but the sign of a zero. It follows the cast: a cast can make a negative zero.
    return canonical_nan(x.to(dtype) + 0.0)


# Elements


@dataclass(frozen=True)
class _Element:
    """A small floating-point format: ``mantissa`` bits after the point; subnormals below ``smallest_normal``; no infinity."""

    width: int
    mantissa: int
    smallest_normal: float
    largest: float
    nan_code: int


_E2M1 = _Element(width=4, mantissa=1, smallest_normal=1.0, largest=6.0, nan_code=7)
_E4M3 = _Element(width=8, mantissa=3, smallest_normal=2.0**-6, largest=448.0, nan_code=0x7F)


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32, device="cpu").view(torch.int32))


def _encode(x: Tensor, element: _Element) -> Tensor:
    """Codes (uint8) of float32 ``x``, in integer arithmetic: the same on every device."""
    if x.dtype != torch.float32:
        raise DTypeError(f"an encoder takes float32, got {x.dtype}", hint="convert with .float(), which is exact")
    bits, nan = x.view(torch.int32), nan_mask(x)
    shift, smallest = 23 - element.mantissa, _bits(element.smallest_normal)
    magnitude = (bits & 0x7FFFFFFF).clamp_(max=_bits(element.largest))
    # Normal: round the float32 mantissa in place, half to even; a carry into the exponent is the right answer. Then move the bias.
    codes = (magnitude >> shift).bitwise_and_(1).add_(magnitude).add_((1 << (shift - 1)) - 1)
    codes = codes.bitwise_right_shift_(shift).sub_((smallest >> shift) - (1 << element.mantissa))
    # Subnormal: the unit in the last place of `anchor` is the format's smallest step, so one addition rounds to it.
    # The first formula is too small below the smallest normal number, the second one ends there: the larger is right.
    anchor = element.smallest_normal * 2.0**shift
    subnormal = magnitude.clamp_(max=smallest).view(torch.float32).add_(anchor).view(torch.int32).sub_(_bits(anchor))
    codes = torch.maximum(codes, subnormal).bitwise_or_(nan & element.nan_code)
    # A sign, except on NaN and on code 0: adding all ones below the sign bit carries into it from every other code.
    sign = 1 << (element.width - 1)
    signs = (bits >> (32 - element.width)).bitwise_and_(nan.bitwise_not_()).bitwise_and_(sign).bitwise_and_(codes + (sign - 1))
    return codes.bitwise_or_(signs).to(torch.uint8)


def e2m1_encode(x: Tensor) -> Tensor:
    """E2M1 codes 0 to 15 of float32 ``x``, one a byte, as ``cvt.rn.satfinite.e2m1x2.f32`` rounds. NaN is 7; 8 never occurs.

    Examples:
        >>> collogue.formats.e2m1_encode(torch.tensor([0.5, 6.0, 100.0]))
        tensor([1, 7, 7], dtype=torch.uint8)
    """
    return _encode(x, _E2M1)


def e2m1_decode(codes: Tensor) -> Tensor:
    """float32 values of E2M1 codes 0 to 15, one a byte.

    Examples:
        >>> collogue.formats.e2m1_decode(torch.tensor([1, 7, 15], dtype=torch.uint8))
        tensor([ 0.5000,  6.0000, -6.0000])
    """
    whole = codes.int()
    # Exponent and mantissa as those of a float32 number that is 2**126 times smaller, perhaps a subnormal one.
    magnitude = ((whole & 7) << 22).view(torch.float32) * 2.0**126
    return (magnitude.view(torch.int32) | (whole >> 3) << 31).view(torch.float32)


def e4m3_encode(x: Tensor) -> Tensor:
    """E4M3 codes (uint8) of float32 ``x``. Saturates at 448, also from infinity; NaN is 0x7F; 0x80 never occurs.

    Examples:
        >>> collogue.formats.e4m3_encode(torch.tensor([1.0, 1000.0]))
        tensor([ 56, 126], dtype=torch.uint8)
    """
    return _encode(x, _E4M3)


def e4m3_decode(codes: Tensor) -> Tensor:
    """float32 values of E4M3 codes (uint8); 0x7F and 0xFF are NaN.

    Examples:
        >>> collogue.formats.e4m3_decode(torch.tensor([56, 126], dtype=torch.uint8))
        tensor([  1., 448.])
    """
    return canonical_nan(codes.view(torch.float8_e4m3fn).float())


def e8m0_decode(codes: Tensor) -> Tensor:
    """float32 values ``2**(code - 127)`` of E8M0 codes (uint8); code 0 is a subnormal, 0xFF is NaN.

    Examples:
        >>> collogue.formats.e8m0_decode(torch.tensor([127, 130], dtype=torch.uint8))
        tensor([1., 8.])
    """
    bits = codes.int() << 23
    return bits.masked_fill_(codes == 0, 1 << 22).masked_fill_(codes == 0xFF, 0x7FFFFFFF).view(torch.float32)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte, lower nibble first: uint8 ``[..., H]`` to ``[..., H / 2]``.

    Examples:
        >>> collogue.formats.pack_nibbles(torch.tensor([1, 2], dtype=torch.uint8))
        tensor([33], dtype=torch.uint8)
    """
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`: uint8 ``[..., H / 2]`` to ``[..., H]``.

    Examples:
        >>> collogue.formats.unpack_nibbles(torch.tensor([33], dtype=torch.uint8))
        tensor([1, 2], dtype=torch.uint8)
    """
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def code_spec(quant: Quant, tokens: int, hidden_size: int) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of ``out.codes``; row-contiguous.

    Examples:
        >>> collogue.formats.code_spec(collogue.NVFP4(1.0), 4, 64)
        ((4, 32), torch.uint8)
    """
    quant.check_hidden_size(hidden_size)
    if quant.element == "e2m1":
        return (tokens, hidden_size // 2), torch.uint8
    return (tokens, hidden_size), torch.float8_e4m3fn


# Scales


@dataclass(frozen=True)
class ScaleSpec:
    """What ``out.scales`` looks like. ``storage`` counts the elements of the allocation, padding included.

    Examples:
        >>> collogue.formats.scale_spec(collogue.FP8PerToken(), 4, 64)
        ScaleSpec(shape=(4, 1), stride=(1, 1), dtype=torch.float32, storage=4)
    """

    shape: tuple[int, int]
    stride: tuple[int, int]
    dtype: torch.dtype
    storage: int


@dataclass(frozen=True)
class _Layout:
    """A scale layout as an index map: the padded matrix, split into ``split`` dimensions, lies in memory in the order ``order``.

    ``order`` is its own inverse in every layout.
    """

    rows: int
    columns: int
    split: tuple[int, ...]
    order: tuple[int, ...]


def scales_per_row(quant: Quant, hidden_size: int) -> int:
    """K: how many scales a token has; 1 where one scale spans the row, 0 where the format stores none.

    Examples:
        >>> collogue.formats.scales_per_row(collogue.NVFP4(1.0), 64)
        4
    """
    if quant.scale_dtype is None:
        return 0
    return hidden_size // quant.block if quant.block else 1


def _layout(quant: Quant, tokens: int, columns: int) -> _Layout:
    name = getattr(quant, "layout", "row")
    if name in _TILE_ROWS:
        groups, rows = _TILE_ROWS[name]
        tall, wide = round_up(tokens, groups * rows), round_up(columns, 4)
        return _Layout(tall, wide, (tall // (groups * rows), groups, rows, wide // 4, 4), (0, 3, 2, 1, 4))
    if name == "column" and quant.scale_dtype == torch.float8_e8m0fnu:
        tall, wide = round_up(tokens, 4), round_up(columns, 4)
        return _Layout(tall, wide, (tall, wide // 4, 4), (1, 0, 2))
    if name == "column":
        tall = round_up(tokens, 4)
        return _Layout(tall, columns, (tall, columns), (1, 0))
    return _Layout(tokens, columns, (tokens, columns), (0, 1))


def scale_spec(quant: Quant, tokens: int, hidden_size: int) -> ScaleSpec | None:
    """Shape, strides, dtype and storage of ``out.scales``; ``None`` where the format returns none.

    ==========================  =======================================  =========================================
    format, layout              shape                                    memory
    ==========================  =======================================  =========================================
    block scales, 128x4         [round_up(T, 128), round_up(K, 4)]       [row tile, column tile, 32, 4, 4]
    block scales, 8x4           [round_up(T, 8), round_up(K, 4)]         [row tile, column tile, 8, 4]
    block scales, linear        [T, K]                                   row-major
    FP8PerToken                 [T, 1] float32                           row-major
    FP8Group, row               [T, K] float32 or E8M0                   row-major
    FP8Group float32, column    [T, K], strides (1, round_up(T, 4))      column-major
    FP8Group ue8m0, column      [T, ceil(K / 4)] int32, same strides     byte j of word w is the scale of group 4w + j
    ==========================  =======================================  =========================================

    All padding is zero bytes. A tile of 128x4 keeps (row r, column k) at byte ``(r % 32) * 16 + (r % 128 // 32) * 4 + k % 4``.

    Examples:
        >>> collogue.formats.scale_spec(collogue.NVFP4(1.0), 4, 64).shape
        (128, 4)
    """
    quant.check_hidden_size(hidden_size)
    dtype = quant.scale_dtype
    if dtype is None:
        return None
    columns = scales_per_row(quant, hidden_size)
    layout = _layout(quant, tokens, columns)
    if getattr(quant, "layout", None) == "column":
        if dtype == torch.float8_e8m0fnu:
            columns, dtype = layout.columns // 4, torch.int32
        return ScaleSpec((tokens, columns), (1, layout.rows), dtype, columns * layout.rows)
    return ScaleSpec((layout.rows, layout.columns), (layout.columns, 1), dtype, layout.rows * layout.columns)


def _required(quant: Quant, tokens: int, hidden_size: int) -> ScaleSpec:
    spec = scale_spec(quant, tokens, hidden_size)
    if spec is None:
        raise ShapeError(f"{quant.name} has no scale tensor", hint="its one scale is the caller's own")
    return spec


def empty_scales(quant: Quant, tokens: int, hidden_size: int, device: torch.device | str) -> Tensor:
    """An uninitialized scale tensor: a strided view of a flat storage that holds the padding too.

    Examples:
        >>> collogue.formats.empty_scales(collogue.FP8PerToken(), 4, 64, "cpu").shape
        torch.Size([4, 1])
    """
    spec = _required(quant, tokens, hidden_size)
    return torch.empty(spec.storage, dtype=spec.dtype, device=device).as_strided(spec.shape, spec.stride)


def scale_storage(scales: Tensor) -> Tensor:
    """All bytes of a scale tensor, the padding of column-major layouts included: a flat uint8 view.

    Examples:
        >>> scales = collogue.formats.empty_scales(collogue.FP8PerToken(), 4, 64, "cpu")
        >>> collogue.formats.scale_storage(scales).shape
        torch.Size([16])
    """
    return scales.as_strided((scale_elements(scales),), (1,)).view(torch.uint8)


def scale_elements(scales: Tensor) -> int:
    """How many elements the memory under a scale tensor has, the padding of column-major layouts included.

    Examples:
        >>> scales = collogue.formats.empty_scales(collogue.FP8Group(32, layout="column"), 5, 64, "cpu")
        >>> (scales.numel(), collogue.formats.scale_elements(scales))
        (10, 16)
    """
    return max(scales.numel(), scales.size(1) * scales.stride(1)) if scales.numel() else 0


def place_scales(values: Tensor, quant: Quant, tokens: int, hidden_size: int) -> Tensor:
    """Lay ``values`` [T, K] (raw bytes as uint8, or float32) out as ``out.scales``. A new tensor; every padding byte is 0.

    Examples:
        >>> values = torch.ones(4, 4, dtype=torch.uint8)
        >>> collogue.formats.place_scales(values, collogue.NVFP4(1.0), 4, 64).shape
        torch.Size([128, 4])
    """
    spec = _required(quant, tokens, hidden_size)
    columns = scales_per_row(quant, hidden_size)
    layout = _layout(quant, tokens, columns)
    padded = values.new_zeros(layout.rows, layout.columns)
    padded[:tokens, :columns] = values
    memory = padded.view(layout.split).permute(layout.order).reshape(-1)
    return memory.view(spec.dtype).as_strided(spec.shape, spec.stride)


def read_scales(scales: Tensor, quant: Quant, tokens: int, hidden_size: int) -> Tensor:
    """The inverse of :func:`place_scales`: [T, K] raw bytes (uint8) or float32.

    Examples:
        >>> quant, values = collogue.NVFP4(1.0), torch.ones(4, 4, dtype=torch.uint8)
        >>> placed = collogue.formats.place_scales(values, quant, 4, 64)
        >>> torch.equal(collogue.formats.read_scales(placed, quant, 4, 64), values)
        True
    """
    spec = _required(quant, tokens, hidden_size)
    if tuple(scales.shape) != spec.shape or scales.dtype != spec.dtype:
        raise ShapeError(
            f"scales are {scales.dtype} {list(scales.shape)}, {quant.name} has {spec.dtype} {list(spec.shape)}",
            hint="pass the scales as they were returned, and the same format",
        )
    columns = scales_per_row(quant, hidden_size)
    raw = scales.clone(memory_format=torch.contiguous_format).view(torch.float32 if spec.dtype == torch.float32 else torch.uint8)
    layout = _layout(quant, tokens, columns)
    if len(layout.split) == 5:  # tiles; elsewhere the tensor's own strides are the index map
        raw = raw.view([layout.split[i] for i in layout.order]).permute(layout.order).reshape(layout.rows, layout.columns)
    return raw[:tokens, :columns]
