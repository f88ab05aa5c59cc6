"""The division of the FP8 kernels in numpy: ``divide`` of kernels/quantize.cuh, with an exact fused multiply-add."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there (an inexact result takes the neighbour whose last bit is 1),
    and 53 bits rounded to odd round to 24 as the exact sum does.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = total.view(np.int64) % 2 == 0
    odd = np.nextafter(total, np.copysign(np.inf, error))
    return np.where((error != 0) & even, odd, total).astype(np.float32)


def by_reciprocal(n: Array, s: Array) -> Array:
    """What a kernel works out for ``n / s``: one reciprocal, one correction."""
    inverse = (np.float32(1) / s).astype(np.float32)
    q = (n * inverse).astype(np.float32)
    return fused_multiply_add(fused_multiply_add(-q, s, n), inverse, q)
