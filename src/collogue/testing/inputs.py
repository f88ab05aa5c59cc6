"""Inputs of a call by name: the same bits on every rank, device and run.

Random bits come from an integer hash of the element's index, so nothing depends on a generator of one device. Partials differ
by rank; the residual and the weight do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from collogue.contract.prologue import ExpertCombine, ExpertReduce, Gated, Prologue, PrologueForm

Tensor: TypeAlias = torch.Tensor

#: Which stream of random bits a tensor takes; a partial takes its rank.
_RESIDUAL, _WEIGHT, _EXPERTS = 1000, 1001, 2000

#: Large and small value of "order": their ratio is 2**24, so a float32 sum loses the small one or not, by the order of terms.
_ORDER = {torch.bfloat16: (2.0**24, 1.0), torch.float32: (2.0**24, 1.0), torch.float16: (2.0**15, 2.0**-9)}
#: Bits of the mantissa: integers below 2**bits are the subnormal bit patterns.
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Inputs:
    """What one rank passes to a call. ``residual`` and ``weight`` are the same on every rank."""

    partial: Tensor
    residual: Tensor
    weight: Tensor


def make_inputs(
    kind: str,
    *,
    rank: int,
    tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """The inputs of ``rank``.

    Args:
        kind: a name of :data:`KINDS`.
        weight_dtype: of the norm's weight; default ``dtype``.
    Returns:
        partial and residual [T, H] in ``dtype``, weight [H] in ``weight_dtype``.
    """
    fill, shape = KINDS[kind], (tokens, hidden_size)
    weight = 1.0 + 0.25 * _normal(_random((1, hidden_size), _WEIGHT, seed, device))[0]
    return Inputs(
        partial=fill(_random(shape, rank, seed, device), rank, dtype),
        residual=fill(_random(shape, _RESIDUAL, seed, device), _RESIDUAL, dtype),
        weight=weight.to(weight_dtype or dtype),
    )


def make_partials(
    kind: str, world_size: int, *, tokens: int, hidden_size: int, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """The partials of all ranks, as :func:`make_inputs` gives each."""
    return [KINDS[kind](_random((tokens, hidden_size), rank, seed, device), rank, dtype) for rank in range(world_size)]


def make_prologue(
    form: PrologueForm,
    kind: str,
    *,
    rank: int,
    tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    count: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    wild: bool = False,
) -> Prologue:
    """What ``rank`` passes in the place of a partial: experts' rows of ``kind``, ``count`` slots of a token or experts.

    Rows that nothing names, or whose weight is 0, are NaN. Slots are -1 here and there, every slot of every third token of odd ranks, and
    of all tokens of rank 2, which has no rows at all; some rows are named twice. ``wild``: some indices lie outside of the tensor.
    Gates are up to 16 times as large as their kind's; of odd ranks, gate and up are halves of one tensor.
    """
    value, nan = (_EXPERTS + 4 * rank), torch.full((), torch.nan, dtype=dtype, device=device)
    weight_dtype = torch.float32 if form.weights == "float32" else dtype
    shared = KINDS[kind](_random((tokens, hidden_size), value + 1, seed, device), rank, dtype)
    if form.kind == "gated":
        bits = _random((tokens, hidden_size), value, seed, device)
        gate = (KINDS[kind](bits, rank, dtype).float() * (1 + _field(bits, 59, 4))).to(dtype)
        return Gated.of(torch.cat((gate, shared), dim=1)) if rank % 2 else Gated(gate, shared)
    if form.kind == "expert_reduce":
        bits = _random((count, tokens), value + 2, seed, device)
        weights = torch.where(_field(bits, 60, 3) < 3, 0.0, _normal(bits)).to(weight_dtype)
        rows = KINDS[kind](_random((count * tokens, hidden_size), value, seed, device), rank, dtype).view(count, tokens, hidden_size)
        return ExpertReduce(torch.where((weights == 0)[..., None], nan, rows), weights, shared)
    height = 0 if rank == 2 else tokens * count + 3
    bits = _random((tokens, count), value + 2, seed, device)
    index = _field(bits, 0, 30) % max(1, height if tokens < 3 else height // 2)
    empty = _field(bits, 60, 2) == 0
    if rank % 2:
        empty |= (torch.arange(tokens, device=device) % 3 == 0)[:, None]
    index = torch.where(empty | (rank == 2), -1, index)
    if wild:
        index = torch.where(
            _field(bits, 40, 4) == 0, torch.tensor([height, -7, 2**31 - 1, -(2**31)], device=device)[_field(bits, 44, 2)], index
        )
    index = index.int()
    rows = KINDS[kind](_random((height, hidden_size), value, seed, device), rank, dtype)
    named = torch.zeros(height, dtype=torch.bool, device=device)
    named[index[(index >= 0) & (index < height)].long()] = True
    given = None if form.weights == "none" else _normal(_random((tokens, count), value + 3, seed, device)).to(weight_dtype)
    return ExpertCombine(
        torch.where(named[:, None], rows, nan), index, given, shared if form.shared else None, scaling=2.5 if count % 2 == 0 else 1.0
    )


def _random(shape: tuple[int, int], stream: int, seed: int, device: torch.device | str) -> Tensor:
    """63 well-mixed bits for each element, int64. Integer arithmetic wraps alike on every device."""
    bits = torch.arange(shape[0] * shape[1], dtype=torch.int64, device=device).view(shape)
    bits = bits + (stream + 1) * 0x1000193 + (seed % 512 + 1) * 0x5851F42D4C957F
    for factor in (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85, 0x27BB2EE687B0B0FD):
        bits = bits * factor
        bits = bits ^ ((bits >> 29) & 0x7FFFFFFFF)
    return bits & 0x7FFFFFFFFFFFFFFF


def _field(bits: Tensor, first: int, width: int) -> Tensor:
    return (bits >> first) & ((1 << width) - 1)


def _normal(bits: Tensor) -> Tensor:
    """Nearly normal with deviation 1: a sum of three uniforms, exact in float32."""
    total = _field(bits, 0, 20) + _field(bits, 20, 20) + _field(bits, 40, 20)
    return (total - 3 * (1 << 19)).float() * 2.0**-19


def _fill_normal(bits: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    return _normal(bits).to(dtype)


def _fill_order(bits: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Large, small, -large by rank, turned from column to column, so that every order of the terms is met."""
    large, small = _ORDER[dtype]
    turn = (torch.arange(bits.shape[1], device=bits.device) + (2 if stream == _RESIDUAL else stream)) % 3
    odd = (1 + 2 * _field(bits, 0, 2)).float() * small
    big = torch.where(turn == 0, large, -large).expand(bits.shape)
    return torch.where(turn == 1, odd, big).to(dtype)


def _fill_subnormal(bits: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Random subnormal numbers of D with either sign."""
    values = _field(bits, 0, _MANTISSA[dtype]).to(_INTEGER[dtype]).view(dtype)
    return torch.where(_field(bits, 40, 1) == 1, -values, values)


def _sprinkle(bits: Tensor, dtype: torch.dtype, value: Tensor) -> Tensor:
    """Normal, with ``value`` in about one element of eight of rows 0, 3, 6, .. and all over the second quarter of row 0."""
    tokens, width = bits.shape
    hit = (_field(bits, 60, 3) == 0) & (torch.arange(tokens, device=bits.device) % 3 == 0)[:, None]
    hit[:1, width // 4 : width // 2] = True
    return torch.where(hit, value, _normal(bits).to(dtype))


def _fill_nan(bits: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """NaN of many payloads and both signs among normal numbers."""
    integer, mantissa = _INTEGER[dtype], _MANTISSA[dtype]
    infinity = torch.tensor(torch.inf, dtype=dtype, device=bits.device).view(integer)
    payload = (1 + _field(bits, 0, mantissa - 1)).to(integer) | infinity
    sign = _field(bits, 40, 1).to(torch.bool)
    nan = torch.where(sign, payload | torch.iinfo(integer).min, payload).view(dtype)
    return _sprinkle(bits, dtype, nan)


def _fill_inf(bits: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Infinities of both signs among normal numbers; where ranks disagree about the sign, the sum is NaN."""
    infinity = torch.full(bits.shape, torch.inf, dtype=dtype, device=bits.device)
    return _sprinkle(bits, dtype, torch.where(_field(bits, 41, 3) == 0, -infinity, infinity))


def _fill_outlier(bits: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Normal, with one element in 64 a few thousand times as large, and every second row tiny."""
    values = _normal(bits)
    values = torch.where(_field(bits, 57, 6) == 0, values * 3000.0, values)
    values[1::2] *= 2.0**-12
    return values.to(dtype)


def _fill_zeros(bits: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """Zeros of both signs."""
    zero = torch.zeros(bits.shape, dtype=dtype, device=bits.device)
    return torch.where(_field(bits, 40, 1) == 1, -zero, zero)


KINDS: dict[str, Callable[[Tensor, int, torch.dtype], Tensor]] = {
    "normal": _fill_normal,
    "order": _fill_order,
    "subnormal": _fill_subnormal,
    "nan": _fill_nan,
    "inf": _fill_inf,
    "outlier": _fill_outlier,
    "zeros": _fill_zeros,
}
