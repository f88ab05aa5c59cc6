"""Two shortcuts of the kernels that docs/contract.md argues for: the division of the FP8 formats, and a sum that starts without +0."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch

from collogue import kernels, reference
from collogue.contract.spec import VALUE_DTYPES
from collogue.formats import e4m3_encode, round_value

Array: TypeAlias = npt.NDArray[Any]

F32 = np.float32
SOURCE = (kernels.ROOT / "encode.cuh").read_text(encoding="utf-8")
_RANGE = re.search(r"if \(s >= (\S+)f && s <= (\S+)f\)", SOURCE)
assert _RANGE is not None
#: Scales that the kernels divide by with a reciprocal.
SMALLEST, LARGEST = F32(_RANGE[1]), F32(_RANGE[2])

#: Where E4M3 rounds one way or the other: halfway between neighboring codes, in both signs.
_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
BOUNDARIES = np.concatenate([(_VALUES[1:] + _VALUES[:-1]) / 2, -(_VALUES[1:] + _VALUES[:-1]) / 2]).astype(F32)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there (an inexact one takes the neighbor whose last bit is 1),
    and 53 bits rounded to odd round to 24 as the exact sum does.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    odd = np.nextafter(total, np.copysign(np.inf, error))
    return np.asarray(np.where((error != 0) & (total.view(np.int64) % 2 == 0), odd, total), F32)


def corrected(n: Array, s: Array) -> Array:
    """``n / s`` as ``divide`` of kernels/quantize.cuh works it out."""
    inverse = F32(1) / s
    q = n * inverse
    return fused_multiply_add(fused_multiply_add(-q, s, n), inverse, q)


def uncorrected(n: Array, s: Array) -> Array:
    return np.asarray(n * (F32(1) / s))


def codes(x: Array) -> Array:
    return np.asarray(e4m3_encode(torch.from_numpy(np.ascontiguousarray(x))).numpy())


def near_midpoints(window: int) -> tuple[Array, Array]:
    """Every (n, s), as integers of 24 bits, whose quotient can come closer than 2**-46 to a midpoint beside a boundary.

    A boundary has at most 5 bits, so the midpoint between it and the next float32 is an odd integer ``boundary * 2**20 +- 1``
    of 25 bits. docs/contract.md shows that only scales within ``window`` = 8 of a multiple of 2**20 come that close.
    """
    near = (np.arange(max(1 << 23, (k << 20) - window), min(1 << 24, (k << 20) + window + 1)) for k in range(8, 17))
    scales = np.concatenate(list(near)).astype(np.int64)
    pairs = []
    for boundary, beside in itertools.product(range(16, 33), (-1, 1)):
        product = scales * ((boundary << 20) + beside)
        n = product >> np.where(product >> 24 >= 1 << 24, 25, 24)
        pairs += [(n + i, scales) for i in (-1, 0, 1, 2)]
    n, s = (np.concatenate(side).astype(F32) for side in zip(*pairs, strict=True))
    return n, s


def power(exponent: int) -> Any:
    return F32(2.0) ** F32(exponent)


def test_the_formula_is_the_kernels() -> None:
    for line in (
        "const float inverse = reciprocal(s);",
        "const float q = n[i] * inverse;",
        "n[i] = fused_multiply_add(fused_multiply_add(-q, s, n[i]), inverse, q);",
    ):
        assert line in SOURCE


def test_fused_multiply_add_rounds_once() -> None:
    """Against exact fractions; many of the sums lie at or beside the midpoint of two float32."""
    random = np.random.default_rng(0)
    a, b = (np.ldexp(random.integers(-(1 << 24), 1 << 24, 2000).astype(F32), -23).astype(F32) for _ in range(2))
    c = np.concatenate([-(a * b)[:1000], np.ldexp(np.sign(a[1000:]), random.integers(-60, 30, 1000)).astype(F32)])
    for x, y, z, got in zip(a, b, c, fused_multiply_add(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        candidates = [F32(got), np.nextafter(got, F32(-np.inf)), np.nextafter(got, F32(np.inf))]
        distances = [abs(Fraction(float(candidate)) - exact) for candidate in candidates]
        assert distances[0] == min(distances)
        assert distances.count(distances[0]) == 1 or got.view(np.int32) % 2 == 0


@pytest.mark.parametrize("scale_exponent", [-112, -100, -68, -23, 0, 75])
def test_quotients_nearest_to_midpoints_beside_boundaries(scale_exponent: int) -> None:
    """The finite set that the argument leaves over, at every exponent of a boundary."""
    n, s = near_midpoints(16)
    wrong_without = 0
    for exponent in range(-11, 9):
        scale, value = s * power(scale_exponent), n * power(scale_exponent) * power(exponent)
        usable = (scale >= SMALLEST) & (scale <= LARGEST)
        scale, value = scale[usable], value[usable]
        assert scale.size
        expected = codes(value / scale)
        np.testing.assert_array_equal(codes(corrected(value, scale)), expected)
        wrong_without += int((codes(uncorrected(value, scale)) != expected).sum())
    assert wrong_without, "the correction has nothing to correct here: these inputs show nothing"


@pytest.mark.slow
def test_below_the_range_the_correction_underflows() -> None:
    """Why the range begins where it does: from 2**-92 on the residue is exact."""
    assert SMALLEST >= 2.0**-92
    n, s = near_midpoints(4096)
    n, s = n * power(-123) * power(-10), s * power(-123)
    assert s.max() < SMALLEST
    assert (codes(corrected(n, s)) != codes(n / s)).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_inputs_beside_every_boundary(dtype: torch.dtype) -> None:
    """Scales of every exponent, among them the ends of the range; the values of ``dtype`` around boundary * scale."""
    random = np.random.default_rng(1)
    exponents = np.arange(np.floor(np.log2(SMALLEST)), np.ceil(np.log2(LARGEST)))
    scales = np.ldexp(1 + random.random((40, exponents.size)), exponents.astype(int)).astype(F32).reshape(-1)
    scales = np.concatenate([scales, [SMALLEST, LARGEST]])
    scales = scales[(scales >= SMALLEST) & (scales <= LARGEST)]
    with np.errstate(over="ignore"):
        product = torch.from_numpy(scales[:, None] * BOUNDARIES)
    rounded = round_value(product, dtype)
    bits = rounded.view(torch.int32 if dtype == torch.float32 else torch.int16)
    tested = 0
    for step in (-2, -1, 0, 1, 2):
        values = (bits + step).view(dtype).float().numpy()
        usable = np.isfinite(values) & (np.abs(values) >= 2.0**-126)
        n, s = values[usable], np.broadcast_to(scales[:, None], values.shape)[usable]
        np.testing.assert_array_equal(codes(corrected(n, s)), codes(n / s))
        tested += n.size
    assert tested > 300_000


def test_small_quotients_are_zero() -> None:
    """Where the quotient or its correction is subnormal or 0, both codes are 0."""
    random = np.random.default_rng(2)
    s = np.geomspace(SMALLEST, LARGEST, 20_000).astype(F32)
    n = np.ldexp(random.random(s.size), random.integers(-149, -11, s.size)).astype(F32) * np.minimum(s, F32(1))
    assert not codes(n / s).any()
    assert not codes(corrected(n, s)).any()


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_a_sum_may_start_with_its_first_term(dtype: torch.dtype) -> None:
    """The contract starts from +0, the kernels from the first term: after rounding there is no difference."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    special = [0.0, -0.0, tiny, -tiny, 1.0, -1.0, torch.finfo(dtype).max, torch.inf, -torch.inf, torch.nan]
    for terms in (1, 2, 3):
        partials = [torch.tensor(column).to(dtype)[None] for column in zip(*itertools.product(special, repeat=terms), strict=True)]
        total = partials[0].float()
        for partial in partials[1:]:
            total = total + partial.float()
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        expected = reference.all_reduce(partials).reduced
        assert expected is not None
        assert torch.equal(round_value(total, dtype).view(bits), expected.view(bits))
        assert terms > 2 or (total.view(torch.int32) == -(1 << 31)).any(), "no sum is -0: these inputs show nothing"
