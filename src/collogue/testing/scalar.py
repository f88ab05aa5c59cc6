"""The numerical contract a second time, in plain numpy, sharing no code with ``reference`` and ``formats``.

It is written from the definitions instead of from bit tricks: a format is the sorted table of its values, to encode is to find
the nearest one (ties to the even code); a power-of-two scale is found by exact comparison in float64; a layout is an index
formula. Float32 arithmetic is numpy's, which rounds every operation by itself. Where the contract fixes an order, a Python loop
walks it. Values travel as raw bits (uint16 or uint32), so that no conversion can hide anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant

Array: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = Literal["bfloat16", "float16", "float32"]

F32 = np.float32


@dataclass(frozen=True)
class MiniFloat:
    """A binary format by its table: ``values[c]`` is the value of the non-negative code ``c``.

    ``saturate``: what lies beyond the table takes its last code. Otherwise the last code is infinity, and its entry in the table is
    the power of two that follows the largest finite value: that makes IEEE overflow the same search.
    """

    values: Array
    sign_bit: int
    nan: int

    @classmethod
    def of(cls, exponent_bits: int, mantissa_bits: int, codes: int, nan: int) -> MiniFloat:
        bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
        exponent, mantissa = np.divmod(np.arange(codes), steps)
        normal = np.ldexp(1.0 + mantissa / steps, exponent - bias)
        subnormal = np.ldexp(mantissa / steps, 1 - bias)
        return cls(np.where(exponent > 0, normal, subnormal), 2 ** (exponent_bits + mantissa_bits), nan)

    def encode(self, x: Array) -> Array:
        """Nearest value, ties to the even code, beyond the end the last code; one NaN; no negative zero."""
        magnitude = np.abs(x.astype(np.float64))
        above = np.clip(np.searchsorted(self.values, magnitude), 1, len(self.values) - 1)
        below = above - 1
        middle = (self.values[below] + self.values[above]) / 2  # exact in float64
        even = below + below % 2
        code = np.where(magnitude < middle, below, np.where(magnitude > middle, above, even))
        code = np.where(np.signbit(x) & (code != 0), code + self.sign_bit, code)
        return np.where(np.isnan(x), self.nan, code)

    def decode(self, codes: Array) -> Array:
        """Float32 values of codes whose absolute value is in the table; the NaN code otherwise."""
        magnitude = codes % self.sign_bit
        known = magnitude < len(self.values)
        value = np.where(known, self.values[np.where(known, magnitude, 0)], np.nan)
        return np.where(codes >= self.sign_bit, -value, value).astype(F32)


E2M1 = MiniFloat.of(2, 1, codes=8, nan=7)
E4M3 = MiniFloat.of(4, 3, codes=127, nan=0x7F)
FLOAT16 = MiniFloat.of(5, 10, codes=0x7C01, nan=0x7FFF)
BFLOAT16 = MiniFloat.of(8, 7, codes=0x7F81, nan=0x7FFF)


def widen(bits: Array, dtype: DType) -> Array:
    """Raw bits of dtype D as float32 values (exact)."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(F32)
    if dtype == "float16":
        return bits.astype(np.uint16).view(np.float16).astype(F32)
    return bits.astype(np.uint32).view(F32)


def narrow(x: Array, dtype: DType) -> Array:
    """``round_D``: raw bits of the nearest D; one NaN; no negative zero."""
    if dtype == "float32":
        bits = np.where(x == 0, F32(0), x).view(np.uint32)
        return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), bits)
    return (BFLOAT16 if dtype == "bfloat16" else FLOAT16).encode(x).astype(np.uint16)


@dataclass(frozen=True)
class Scales:
    """A scale tensor as memory: shape and stride in elements of ``dtype``, and every byte of the storage, padding included."""

    shape: tuple[int, int]
    stride: tuple[int, int]
    dtype: Literal["float8_e4m3fn", "float8_e8m0fnu", "float32", "int32"]
    storage: Array


@dataclass(frozen=True)
class Result:
    """The outputs of a call as raw bits, ``None`` where it has none. Codes are bytes, two E2M1 codes in one."""

    reduced: Array | None
    residual: Array | None
    norm: Array | None
    codes: Array | None
    scales: Scales | None


def sum_in_rank_order(partials: list[Array]) -> Array:
    """``s = +0; s = s + x_r`` for r = 0, 1, .."""
    total = np.zeros_like(partials[0])
    for partial in partials:
        total = total + partial
    return total


def expert_combine(rows: Array, index: Array, weights: Array | None, shared: Array | None, scaling: float, dtype: DType) -> Array:
    """A rank's term as raw bits [T, H], token by token and slot by slot.

    Args:
        rows: the experts' rows, raw bits [P, H]. index: int32 [T, K]; what is not a row of them contributes nothing.
        weights: their values, float32 [T, K], or ``None``. shared: raw bits [T, H], or ``None``.
    """
    total = np.zeros((len(index), rows.shape[1]), F32)
    with np.errstate(all="ignore"):
        for t, slots in enumerate(index):
            for k, row in enumerate(slots):
                if 0 <= row < len(rows):
                    x = widen(rows[row], dtype)
                    total[t] = total[t] + (x if weights is None else x * weights[t, k])
        if F32(scaling) != 1:
            total = total * F32(scaling)
        return narrow(total if shared is None else total + widen(shared, dtype), dtype)


def expert_reduce(rows: Array, weights: Array, token_input: Array, dtype: DType) -> Array:
    """A rank's term as raw bits [T, H] from raw bits [E, T, H], weights float32 [E, T] and raw bits [T, H]."""
    total = np.zeros(token_input.shape, F32)
    with np.errstate(all="ignore"):
        for e, t in np.ndindex(weights.shape):
            if weights[e, t] != 0:
                total[t] = total[t] + widen(rows[e, t], dtype) * weights[e, t]
        return narrow(total + widen(token_input, dtype), dtype)


def exponential(x: Array) -> Array:
    """``e(x)`` for float32 from -32 to 88: ``2**n`` by table, the rest by a polynomial, constant by constant."""
    n = np.rint(x * F32(12102203 * 2.0**-23))  # 1 / ln 2
    rest = (x - n * F32(45426 * 2.0**-16)) - n * F32(12566158 * 2.0**-43)  # ln 2, in two parts
    p = np.full_like(rest, F32(11866599 * 2.0**-33))
    for numerator, power in ((8985872, -30), (11185273, -28), (11184713, -26), (16777214, -25), (1, 0), (1, 0)):
        p = p * rest
        p = p + F32(numerator * 2.0**power)
    return np.asarray([F32(each) * F32(2.0 ** int(k)) for each, k in zip(p.ravel(), n.ravel(), strict=True)], F32).reshape(x.shape)


def silu(gate: Array) -> Array:
    """``g / (1 + e(-g))``; 0 below -88, and g itself from 32 on, where 1 + e(-32) is 1."""
    total = np.ones_like(gate)
    inside = (gate >= -88) & (gate < 32)
    total[inside] = F32(1) + exponential(-gate[inside])
    return np.where(gate < -88, F32(0), gate / total)


def gated(gate: Array, up: Array, dtype: DType) -> Array:
    """``silu(gate) * up`` as raw bits, from raw bits."""
    with np.errstate(all="ignore"):
        return narrow(silu(widen(gate, dtype)) * widen(up, dtype), dtype)


def mean_square(y: Array) -> Array:
    """Squares of 8 neighbors one after the other, 32 such sums folded by halves, blocks of 256 in index order: float32 [T]."""
    tokens, hidden_size = y.shape
    blocks = -(-hidden_size // 256)
    padded = np.zeros((tokens, blocks * 256), F32)
    padded[:, :hidden_size] = y
    cells = padded.reshape(tokens, blocks, 32, 8)
    lanes = cells[..., 0] * cells[..., 0]
    for j in range(1, 8):
        lanes = lanes + cells[..., j] * cells[..., j]
    for half in (16, 8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    total = np.zeros(tokens, F32)
    for block in range(blocks):
        total = total + lanes[:, block, 0]
    return total / F32(hidden_size)


def rms_norm(y: Array, weight: Array, eps: float, weight_offset: float) -> Array:
    """``(y * rstd) * (weight + weight_offset)`` in float32, not yet rounded to D."""
    rstd = F32(1) / np.sqrt(mean_square(y) + F32(eps))
    n: Array = (y * rstd[:, None]) * (weight.astype(F32) + F32(weight_offset))
    return n


def amax(blocks: Array) -> Array:
    """Largest absolute value along the last axis; NaN does not count."""
    top: Array = np.where(np.isnan(blocks), F32(0), np.abs(blocks)).max(axis=-1)
    return top


def power_not_below(x: Array) -> Array:
    """Smallest k with ``2**k >= x``, for positive float64 x."""
    mantissa, exponent = np.frexp(x)  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    return np.where(mantissa == 0.5, exponent - 1, exponent)


def finite_range(x: Array) -> Array:
    """As float64, with 2**128 for infinity: the exponent that its bits say."""
    return np.where(np.isinf(x), 2.0**128, x.astype(np.float64))


def mx_exponent(top: Array, largest: float, rounding: str) -> Array:
    """``k`` of the E8M0 scale, clamped to what a byte holds; any value where ``top`` is 0."""
    wide = np.where(top > 0, finite_range(top), 1.0)
    _, exponent = np.frexp(wide)
    k = exponent - 1 - (8 if largest == 448.0 else 2)  # floor(log2 top) - emax
    if rounding == "ceil":
        k = k + (np.ldexp(largest, k) < wide)
    clamped: Array = np.clip(k, -127, 127)
    return clamped


def quantize(n: Array, quant: Quant) -> tuple[Array, Scales | None]:
    """Codes (one byte an element, or two E2M1 codes a byte) and scales of the rounded rows ``n`` (float32 [T, H])."""
    tokens, hidden_size = n.shape
    block = quant.block or hidden_size
    blocks = n.reshape(tokens, hidden_size // block, block)
    top = amax(blocks)
    scale: Array | None
    if isinstance(quant, FP8Static):
        inverse = F32(1) / F32(float(quant.scale))
        codes, scale = E4M3.encode(blocks * inverse), None
    elif isinstance(quant, NVFP4):
        g = F32(float(quant.global_scale))
        scale = E4M3.encode(g * (top * F32(1.0 / 6.0)))
        with_scale = (scale != 0)[..., None]
        codes = np.where(with_scale, E2M1.encode(blocks * (g / E4M3.decode(scale))[..., None]), 0)
    elif isinstance(quant, MXFP8 | MXFP4):
        table = E4M3 if isinstance(quant, MXFP8) else E2M1
        k = mx_exponent(top, float(table.values[-1]), quant.rounding)
        divisor = np.ldexp(F32(1), k).astype(F32)
        scale = np.where(top > 0, k + 127, 0)
        codes = np.where((top > 0)[..., None], table.encode(blocks / divisor[..., None]), 0)
    elif isinstance(quant, FP8PerToken | FP8Group):
        scale = np.maximum(top / F32(448), F32(quant.smallest))
        if isinstance(quant, FP8Group) and quant.scale_format == "ue8m0":
            finite = np.where(np.isinf(top), 2.0**128 / 448.0, scale.astype(np.float64))
            k = np.clip(power_not_below(finite), -127, 127)
            scale, divisor = k + 127, np.ldexp(F32(1), k).astype(F32)
        else:
            divisor = scale
        codes = E4M3.encode(blocks / divisor[..., None])
    else:
        raise TypeError(f"no scalar version of {quant!r}")
    flat = codes.reshape(tokens, hidden_size).astype(np.uint8)
    if quant.element == "e2m1":
        flat = flat[:, 0::2] + 16 * flat[:, 1::2]
    return flat, None if scale is None else lay_out(scale, quant)


def lay_out(scale: Array, quant: Quant) -> Scales:
    """Put the logical scales ``[T, K]`` (bytes or float32) where the layout wants them; all other bytes are 0."""
    tokens, columns = scale.shape
    up4, quads = -(-tokens // 4) * 4, -(-columns // 4)
    r, k = np.indices(scale.shape)
    name = quant.layout if isinstance(quant, NVFP4 | MXFP8 | MXFP4 | FP8Group) else "row"
    if isinstance(quant, FP8PerToken) or (isinstance(quant, FP8Group) and quant.scale_format == "float32"):
        if name == "column":
            return Scales((tokens, columns), (1, up4), "float32", _scatter(scale, k * up4 + r, columns * up4, F32))
        return Scales((tokens, columns), (columns, 1), "float32", _scatter(scale, r * columns + k, tokens * columns, F32))
    if name == "column":
        return Scales((tokens, quads), (1, up4), "int32", _scatter(scale, (k // 4 * up4 + r) * 4 + k % 4, quads * up4 * 4))
    kind: Literal["float8_e4m3fn", "float8_e8m0fnu"] = "float8_e4m3fn" if isinstance(quant, NVFP4) else "float8_e8m0fnu"
    if name in ("row", "linear"):
        return Scales((tokens, columns), (columns, 1), kind, _scatter(scale, r * columns + k, tokens * columns))
    tile = 128 if name == "128x4" else 8
    height = -(-tokens // tile) * tile
    inside = (r % 32) * 16 + (r % 128 // 32) * 4 + k % 4 if tile == 128 else (r % 8) * 4 + k % 4
    index = (r // tile * quads + k // 4) * tile * 4 + inside
    return Scales((height, quads * 4), (quads * 4, 1), kind, _scatter(scale, index, height * quads * 4))


def _scatter(values: Array, index: Array, size: int, kind: Any = np.uint8) -> Array:
    """Bytes of a zeroed storage of ``size`` elements with ``storage[index] = values``."""
    storage = np.zeros(size, kind)
    storage[index] = values
    return storage.view(np.uint8)


def all_reduce(
    partials: list[Array],
    *,
    dtype: DType,
    residual: Array | None = None,
    weight: Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    quant: Quant | None = None,
    keep_norm: bool = False,
    branch: tuple[Array, float, float] | None = None,
    islands: Sequence[Sequence[int]] | None = None,
) -> Result:
    """The whole contract: sum in rank order, residual, RMSNorm, quantization.

    Args:
        partials: every rank's term, rank 0 first: raw bits of D, uint16 or uint32 [T, H].
        dtype: D.
        residual: raw bits [T, H], or None.
        weight: values of the norm's weight, float32 [H], or None for no norm.
        eps, weight_offset: rounded to float32.
        quant: what to quantize to, or None.
        keep_norm: also return the norm beside its codes.
        branch: weight, eps and offset of a norm of the sum, which the residual is added to.
        islands: the ranks of each; their sums, each in rank order, are added in order.
    Returns:
        Raw bits of every output.
    """
    with np.errstate(all="ignore"):
        terms = [widen(partial, dtype) for partial in partials]
        if islands is not None:
            terms = [sum_in_rank_order([terms[rank] for rank in island]) for island in islands]
        total = sum_in_rank_order(terms)
        if branch is not None:
            total = widen(narrow(rms_norm(widen(narrow(total, dtype), dtype), *branch), dtype), dtype)
        if residual is not None:
            total = total + widen(residual, dtype)
        y_bits = narrow(total, dtype)
        last = widen(y_bits, dtype)
        n_bits = None
        if weight is not None:
            n_bits = narrow(rms_norm(last, weight, eps, weight_offset), dtype)
            last = widen(n_bits, dtype)
        codes, scales = (None, None) if quant is None else quantize(last, quant)
    stream = residual is not None or weight is not None
    return Result(
        reduced=None if stream else y_bits,
        residual=y_bits if stream else None,
        norm=n_bits if quant is None or keep_norm else None,
        codes=codes,
        scales=scales,
    )


def rows_of(rank: int, tokens: int, world_size: int, rows: Sequence[int] | None = None) -> Array:
    """Indices of the rows that ``rank`` owns: row t belongs to rank ``t // ceil(T / N)``, or to the one whose turn it is in ``rows``."""
    t = np.arange(tokens)
    owners = t // max(1, -(-tokens // world_size)) if rows is None else np.repeat(np.arange(world_size), rows)
    own: Array = t[owners == rank]
    return own
