"""Quantized weights: codes and scales of a linear layer's ``[O, I]`` matrix, as checkpoints hold them, and their parts by rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from collogue.contract.formats import canonical_nan, code_spec, e4m3_decode, e4m3_encode
from collogue.contract.number import check_local, is_whole
from collogue.contract.quant import E4M3_MAX, MXFP4, MXFP8, NVFP4, SMALLEST_SCALE, FP8PerToken, FP8Static
from collogue.contract.reference import dequantize, quantize
from collogue.contract.spec import VALUE_DTYPES
from collogue.errors import DTypeError, FormatError, ScaleError, ShapeError


@dataclass(frozen=True)
class FP8Block:
    """E4M3 weights, one float32 scale (a **divisor**) per block of ``size`` x ``size``; the last block of a row or column may be smaller.

    ``scale = max(amax / 448, 2**-17 / 1.75)``, ``code = e4m3_sat(w / scale)``. Decoded: ``code * scale``. For weights only; the
    activations of such checkpoints are :class:`collogue.FP8Group`.

    Args:
        size: a multiple of 16, usually 128.
    Examples:
        >>> collogue.nn.QuantizedWeight.of(torch.ones(256, 128), collogue.nn.FP8Block()).scales.shape
        torch.Size([2, 1])
    """

    size: int = 128

    def __post_init__(self) -> None:
        if not is_whole(self.size) or self.size < 16 or self.size % 16:
            raise FormatError(f"FP8Block.size is {self.size!r}", hint="use a multiple of 16, usually 128")


#: How a weight may be quantized. FP8PerToken: one scale per output feature. NVFP4 and MX: along the input features, layout "linear".
WeightFormat: TypeAlias = FP8Static | FP8PerToken | FP8Block | MXFP8 | MXFP4 | NVFP4


class Slicer(Protocol):
    """What cuts a tensor along one dimension (:class:`collogue.pytorch.cut.Cut`)."""

    @property
    def dim(self) -> int: ...

    def in_units(self, unit: int, what: str) -> Slicer:
        """The same cut of a tensor with one element for every ``unit`` features."""

    def part(self, whole: Tensor, rank: int, world_size: int) -> Tensor: ...

    def whole(self, parts: list[Tensor]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight ``W`` of ``[O, I]``.

    =====================  ======================================  ==============================================
    format                 codes                                   scales
    =====================  ======================================  ==============================================
    ``FP8Static(scale)``   ``[O, I]`` E4M3                         ``None``: the format holds it
    ``FP8PerToken()``      ``[O, I]`` E4M3                         ``[O, 1]`` float32, one per output feature
    ``FP8Block(128)``      ``[O, I]`` E4M3                         ``[ceil(O / 128), ceil(I / 128)]`` float32
    ``MXFP8(..)``          ``[O, I]`` E4M3                         ``[O, I / 32]`` E8M0
    ``MXFP4(..)``          ``[O, I / 2]`` uint8, low nibble first  ``[O, I / 32]`` E8M0
    ``NVFP4(g)``           ``[O, I / 2]`` uint8, low nibble first  ``[O, I / 16]`` E4M3; ``g`` is a multiplier
    =====================  ======================================  ==============================================

    All scales are divisors but NVFP4's ``g``. MX and NVFP4 have ``layout="linear"``.

    Raises:
        ShapeError: codes or scales of another shape or dtype. FormatError: another format or layout, or a block that does not divide I.
        ScaleError: scales that are negative, infinite or NaN, or zero where they are float32 (read on the CPU only).
    Examples:
        >>> held = collogue.nn.QuantizedWeight.of(torch.ones(32, 64), collogue.FP8PerToken())
        >>> (held.shape, held.nbytes)
        ((32, 64), 2176)
    """

    codes: Tensor
    scales: Tensor | None
    format: WeightFormat

    def __post_init__(self) -> None:
        _check_format(self.format)
        if getattr(self.format, "layout", "linear") != "linear":
            raise FormatError(f"a weight's scales are laid out as {self.format!r}", hint='pass layout="linear"')
        for name, given in (("codes", self.codes), ("scales", self.scales)):
            if not isinstance(given, Tensor | None) or (given is None and name == "codes"):
                raise ShapeError(f"the {name} of a weight are a {type(given).__name__}", hint="pass a tensor, as the format stores them")
        if self.codes.ndim != 2:
            raise ShapeError(f"the codes of a weight are {list(self.codes.shape)}", hint="pass two dimensions, [O, I]")
        dtype = torch.uint8 if self._packed else torch.float8_e4m3fn
        if self.codes.dtype != dtype:
            raise ShapeError(f"the codes of a weight are {self.codes.dtype}, expected {dtype}", hint="pass codes as the format stores them")
        self._check_scales()

    def _check_scales(self) -> None:
        shape, dtype = _scales(self.format, *self.shape)
        given = None if self.scales is None else (tuple(self.scales.shape), self.scales.dtype)
        if given != (None if dtype is None else (shape, dtype)):
            raise ShapeError(
                f"the scales of a weight of {list(self.shape)} are {given}, {type(self.format).__name__} has {(shape, dtype)}",
                hint="pass scales as the format stores them",
            )
        if self.scales is not None and self.scales.device.type == "cpu":
            check_scales(self.scales)

    @property
    def _packed(self) -> bool:
        return _is_packed(self.format)

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of the matrix."""
        return _shape(self.codes, self.format)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @classmethod
    def of(cls, weight: Tensor, format: WeightFormat) -> QuantizedWeight:
        """Quantize ``weight`` ``[O, I]`` (bfloat16, float16 or float32), each row as :func:`collogue.quantize` does a token's.

        Raises:
            ShapeError, DTypeError: no matrix of values. FormatError: no format of weights. ScaleError: elements that are not finite.
        """
        _check_format(format)
        _check_matrix(weight)
        weight = weight.detach()
        if not isinstance(format, FP8Block):
            return cls(*quantize(weight, format), format)
        blocks = _blocks(weight.float(), format.size)
        scales = torch.clamp(blocks.abs().amax((1, 3)) / E4M3_MAX, min=SMALLEST_SCALE)
        codes = e4m3_encode(blocks / scales[:, None, :, None])
        return cls(_unblocked(codes, *weight.shape).view(torch.float8_e4m3fn), scales, format)

    def decode(self) -> Tensor:
        """``W`` in float32: ``code * scale``; NVFP4: ``(code * scale) / g``."""
        return decode(self.codes, self.scales, self.format)

    def times(self, factor: float) -> QuantizedWeight:
        """``factor * W``, taken into the scales: rounded once to float32.

        Raises:
            FormatError: MX scales are powers of two; ``factor`` would have to be one.
        """
        if factor == 1.0:
            return self
        if isinstance(self.format, FP8Static):
            return replace(self, format=replace(self.format, scale=self.format.scale * factor))
        if isinstance(self.format, NVFP4):
            return replace(self, format=replace(self.format, global_scale=self.format.global_scale / factor))
        if self.scales is None or self.scales.dtype != torch.float32:
            raise FormatError(f"the scales of {type(self.format).__name__} cannot hold the factor {factor}", hint="use another format")
        return replace(self, scales=self.scales * factor)

    def part(self, cut: Slicer, rank: int, world_size: int, name: str = "the weight") -> QuantizedWeight:
        """What ``rank`` holds where the rows (``cut.dim == 0``) or columns of ``W`` are cut.

        Raises:
            ShapeError: a part does not end where a block of scales ends.
        """
        of_codes, of_scales = self.cuts(cut, name)
        scales = self.scales
        if scales is not None and of_scales is not None:
            scales = _bytes(of_scales, scales, rank, world_size)
        return replace(self, codes=_bytes(of_codes, self.codes, rank, world_size), scales=scales)

    def cuts(self, cut: Slicer, name: str) -> tuple[Slicer, Slicer | None]:
        """The cut of the codes, and that of the scales, which may all be everyone's. Raises as :meth:`part` does."""
        block = 0 if self.scales is None else _block(self.format, cut.dim)
        unit = 2 if self._packed and cut.dim == 1 else 1
        return cut.in_units(unit, name), cut.in_units(block, name) if block else None


def check_scales(scales: Tensor) -> None:
    """Raise :class:`ScaleError` for scales that decode to nonsense. E4M3 ones may be zero. Synchronizes: reads them."""
    if scales.element_size() > 1:
        good, expected = (scales > 0) & scales.isfinite(), "positive and finite"
    elif scales.dtype == torch.float8_e4m3fn:
        good, expected = scales.view(torch.uint8) < 0x7F, "finite numbers without a sign"
    else:
        good, expected = scales.view(torch.uint8) != 0xFF, "numbers (0xFF is E8M0's NaN)"
    if not bool(good.all()):
        raise ScaleError(f"a weight has scales that are not {expected}", hint="check the checkpoint, and the scales' names")


def _bytes(cut: Slicer, whole: Tensor, rank: int, world_size: int) -> Tensor:
    """A part of a tensor of any dtype of one byte: PyTorch does not join them all."""
    if whole.element_size() > 1:
        return cut.part(whole, rank, world_size)
    return cut.part(whole.view(torch.uint8), rank, world_size).view(whole.dtype)


def decode(codes: Tensor, scales: Tensor | None, format: WeightFormat) -> Tensor:
    """``W`` in float32, of what a :class:`QuantizedWeight` has checked: nothing here looks at a value, so it is traced and captured."""
    rows, columns = _shape(codes, format)
    if not isinstance(format, FP8Block):
        return dequantize(codes, scales, format, hidden_size=columns)
    assert scales is not None
    values = _blocks(e4m3_decode(codes.contiguous().view(torch.uint8)), format.size)
    return canonical_nan(_unblocked(values * scales[:, None, :, None], rows, columns))


def _is_packed(format: WeightFormat) -> bool:
    return isinstance(format, MXFP4 | NVFP4)


def _shape(codes: Tensor, format: WeightFormat) -> tuple[int, int]:
    return codes.shape[0], codes.shape[1] * (2 if _is_packed(format) else 1)


def _block(format: WeightFormat, along: int) -> int:
    """How many rows or columns of ``W`` share a scale; 0: all do."""
    if isinstance(format, FP8Block):
        return format.size
    return 1 if along == 0 else format.block


def _scales(format: WeightFormat, out_features: int, in_features: int) -> tuple[tuple[int, int] | None, torch.dtype | None]:
    if isinstance(format, FP8Block):
        return (-(-out_features // format.size), -(-in_features // format.size)), torch.float32
    code_spec(format, out_features, in_features)
    if format.scale_dtype is None:
        return None, None
    return (out_features, in_features // format.block if format.block else 1), format.scale_dtype


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """``[O, I]`` as ``[blocks, size, blocks, size]``, zeros behind the end."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % size, 0, -rows % size))
    return padded.view(padded.shape[0] // size, size, padded.shape[1] // size, size)


def _unblocked(blocks: Tensor, rows: int, columns: int) -> Tensor:
    return blocks.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


def _check_format(format: object) -> None:
    if not isinstance(format, WeightFormat):
        what = f"the class {format.__name__}" if isinstance(format, type) else type(format).__name__
        raise FormatError(f"{what} is not a weight format", hint="pass FP8Static, FP8PerToken, FP8Block, MXFP8, MXFP4 or NVFP4, made")


def _check_matrix(weight: object) -> None:
    """Raise unless ``weight`` is a matrix of finite values; waits for its device."""
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.numel():
        found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ShapeError(f"a weight must be a tensor of shape [O, I], got {found}", hint="pass two dimensions, a layer's weight")
    check_local("a weight", weight)
    if weight.dtype not in VALUE_DTYPES:
        raise DTypeError(f"a weight has dtype {weight.dtype}; expected bfloat16, float16 or float32", hint="pass values, not codes")
    odd = 0 if weight.is_meta else weight.numel() - int(weight.isfinite().sum())
    if odd:
        raise ScaleError(
            f"{odd} of {weight.numel()} elements of a weight are NaN or infinite, which no scale holds", hint="check the checkpoint"
        )
