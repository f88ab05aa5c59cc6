"""The numerical contract of the sum, the norm and the whole call: order, rounding, special values, against scalar loops."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from samples import DTYPES, F32, INTEGER, NAN, bits, formats_by_label, same, wild
from torch import Tensor

from collogue import formats, reference
from collogue.contract.quant import FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.spec import RMSNorm
from collogue.errors import ArgumentError, FormatError, PlatformError

# Sum and prenorm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_partials_are_added_in_rank_order(dtype: torch.dtype) -> None:
    big = 2.0**24
    seen = set()
    for order in permutations((big, 1.0, -big)):
        partials = [torch.full((1, 8), v, dtype=dtype) for v in order]
        expected = F32(0)
        for v in order:
            expected = expected + F32(v)
        got = reference.all_reduce(partials).reduced
        assert same(got, torch.full((1, 8), float(expected), dtype=dtype))
        seen.add(float(expected))
    assert seen == {0.0, 1.0}  # the order is visible


def test_the_residual_comes_last_and_is_rounded_once() -> None:
    def row(v: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.full((1, 8), v, dtype=dtype)

    # 1 + 2**-8 is a tie in bfloat16; the residual's 2**-12 breaks it. Rounding the sum first gives 1.
    out = reference.all_reduce([row(1.0), row(2.0**-8)], residual=row(2.0**-12))
    assert out.reduced is None
    assert same(out.residual, row(1 + 2.0**-7))
    # In float32 the order of sum and residual shows: (2**24 + 1) - 2**24 = 0.
    out = reference.all_reduce([row(2.0**24, torch.float32), row(1.0, torch.float32)], residual=row(-(2.0**24), torch.float32))
    assert same(out.residual, row(0.0, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_and_subnormals_of_the_sum(dtype: torch.dtype) -> None:
    zero = torch.zeros(1, 8, dtype=dtype)
    assert same(reference.sum_partials([-zero, -zero]), torch.zeros(1, 8))
    assert same(reference.all_reduce([-zero, -zero], residual=-zero).residual, zero)
    # -tiny rounds to -0 in a 16-bit dtype: half of the smallest subnormal, from two ranks.
    smallest = torch.ones(1, 8, dtype=INTEGER[dtype]).view(dtype)
    assert same(reference.all_reduce([smallest, smallest]).reduced, (2 * torch.ones(1, 8, dtype=INTEGER[dtype])).view(dtype))
    assert same(reference.all_reduce([-smallest]).reduced, -smallest)
    assert same(formats.round_value(-smallest.float() / 2, dtype), zero)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_of_the_sum(dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    partials = [
        torch.tensor([[inf, inf, -inf, nan, -nan, 1.0, 0.0, -0.0]], dtype=dtype),
        torch.tensor([[1.0, -inf, 1.0, 1.0, 1.0, nan, 0, 0]], dtype=dtype),
    ]
    y = reference.all_reduce(partials).reduced
    assert y is not None
    code = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}[dtype]
    lowest = torch.iinfo(INTEGER[dtype]).min
    assert bits(y).tolist() == [[code, NAN[dtype], code + lowest, NAN[dtype], NAN[dtype], NAN[dtype], 0, 0]]


def test_float16_overflows_to_infinity() -> None:
    big = torch.full((1, 8), 65504.0, dtype=torch.float16)
    assert same(reference.all_reduce([big, big]).reduced, torch.full((1, 8), torch.inf, dtype=torch.float16))
    assert same(reference.all_reduce([big, big, -big]).reduced, big)  # the sum itself does not overflow


# Mean square and norm


def scalar_mean_square(row: Tensor) -> Any:
    """DESIGN's words, one float32 operation at a time."""
    y = [F32(v) for v in row.float().tolist()]
    y += [F32(0)] * (-len(y) % 256)
    total = F32(0)
    for start in range(0, len(y), 256):
        v = []
        for lane in range(32):
            e = y[start + 8 * lane : start + 8 * lane + 8]
            lane_sum = e[0] * e[0]
            for x in e[1:]:
                lane_sum = lane_sum + x * x
            v.append(lane_sum)
        for half in (16, 8, 4, 2, 1):
            for i in range(half):
                v[i] = v[i] + v[i + half]
        total = total + v[0]
    return total / F32(len(row))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [8, 24, 256, 264, 576, 2880])
def test_mean_square_in_the_fixed_order(hidden_size: int, dtype: torch.dtype) -> None:
    y = wild(4, hidden_size, seed=hidden_size, dtype=dtype, spread=1.0)
    expected = torch.tensor([float(scalar_mean_square(row)) for row in y])
    assert same(reference.mean_square(y), expected)


def test_the_order_of_the_mean_square_is_visible() -> None:
    """Other orders give other bits for the inputs above: the test before can fail."""
    y = wild(64, 2880, seed=7, spread=1.0)
    squares = y.float().square()
    exact = reference.mean_square(y)
    for other in (
        squares.sum(1) / 2880,
        squares.flip(1).cumsum(1)[:, -1] / 2880,
        reference.mean_square(y.roll(8, 1)),
        reference.mean_square(y.flip(1)),
    ):
        assert (bits(exact) != bits(other)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "weight_dtype"), [(0.0, None), (1.0, None), (1.0, torch.float32), (0.1, torch.float32)])
def test_rms_norm_against_a_scalar_loop(dtype: torch.dtype, offset: float, weight_dtype: torch.dtype | None) -> None:
    y, weight = wild(5, 264, seed=1, dtype=dtype, spread=1.0), wild(264, seed=2, dtype=weight_dtype or dtype, spread=1.0)
    expected = torch.empty_like(y)
    for t, row in enumerate(y):
        rstd = F32(1) / np.sqrt(scalar_mean_square(row) + F32(1e-5))
        products = [(F32(a) * rstd) * (F32(w) + F32(offset)) for a, w in zip(row.float().tolist(), weight.float().tolist(), strict=True)]
        expected[t] = torch.tensor(products).to(dtype) + 0.0
    assert same(reference.rms_norm(y, RMSNorm(weight, eps=1e-5, weight_offset=offset)), expected)


def test_norm_of_special_rows() -> None:
    weight = torch.full((8,), -1.0)
    y = torch.zeros(4, 8, dtype=torch.bfloat16)
    y[1, 3], y[2, 3], y[3, 3] = torch.nan, torch.inf, 2.0**100
    y[2:, 0] = 1.0
    n = bits(reference.rms_norm(y, RMSNorm(weight)))
    assert n[0].eq(0).all()  # 0 * -1 is -0, stored as +0
    assert n[1].eq(0x7FFF).all()
    assert n[2].tolist() == [0, 0, 0, 0x7FFF, 0, 0, 0, 0]  # rstd is 0
    assert n[3].eq(0).all()  # the mean square overflows


def test_norm_without_eps_of_a_zero_row_is_nan() -> None:
    n = reference.rms_norm(torch.zeros(1, 8), RMSNorm(torch.ones(8), eps=0.0))
    assert bits(n).eq(0x7FFFFFFF).all()


# The whole call


def test_outputs_that_were_asked_for() -> None:
    x, norm, quant = wild(3, 64), RMSNorm(torch.ones(64)), FP8PerToken()

    def names(**arguments: Any) -> set[str]:
        return {name for name, _ in reference.all_reduce([x, x], **arguments).items()}

    assert names() == {"reduced"}
    assert names(residual=x) == {"residual"}
    assert names(norm=norm) == {"residual", "norm"}
    assert names(norm=norm, quant=quant) == {"residual", "codes", "scales"}
    assert names(norm=norm, quant=quant, keep_norm=True) == {"residual", "norm", "codes", "scales"}
    assert names(quant=quant) == {"reduced", "codes", "scales"}
    assert names(residual=x, quant=FP8Static(1.0)) == {"residual", "codes"}
    with pytest.raises(FormatError):
        names(keep_norm=True)


@formats_by_label
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_and_unfused_agree_and_rows_do_not_depend_on_the_batch(quant: Quant, dtype: torch.dtype) -> None:
    partials = [wild(7, 96, seed=10 + r, dtype=dtype, spread=1.0) for r in range(3)]
    residual, norm = wild(7, 96, seed=20, dtype=dtype), RMSNorm(wild(96, seed=21, dtype=dtype, spread=0.5), weight_offset=1.0)
    before = [p.clone() for p in (*partials, residual)]
    out = reference.all_reduce(partials, residual=residual, norm=norm, quant=quant, keep_norm=True)
    assert all(same(a, b) for a, b in zip((*partials, residual), before, strict=True))

    y = reference.all_reduce(partials, residual=residual).residual
    assert y is not None
    n = reference.rms_norm(y, norm)
    codes, scales = reference.quantize(n, quant)
    assert same(out.residual, y)
    assert same(out.norm, n)
    assert same(out.codes, codes)
    for t in (0, 6):
        row = reference.all_reduce([p[t : t + 1] for p in partials], residual=residual[t : t + 1], norm=norm, quant=quant, keep_norm=True)
        assert row.norm is not None
        assert row.codes is not None
        assert same(row.norm, n[t : t + 1])
        assert same(row.codes, codes[t : t + 1])
        if scales is not None:
            assert row.scales is not None
            all_rows = formats.read_scales(scales, quant, 7, 96)
            assert same(formats.read_scales(row.scales, quant, 1, 96), all_rows[t : t + 1])


@formats_by_label
def test_no_tokens(quant: Quant) -> None:
    x = torch.zeros(0, 96, dtype=torch.bfloat16)
    out = reference.all_reduce([x, x], residual=x, norm=RMSNorm(torch.ones(96)), quant=quant, keep_norm=True)
    assert all(t.numel() == 0 for _, t in out.items())
    assert out.codes is not None
    assert reference.dequantize(out.codes, out.scales, quant, hidden_size=96).shape == (0, 96)


def test_wrong_arguments() -> None:
    x = wild(3, 64)
    wrong: list[Any] = [
        lambda: reference.all_reduce([]),
        lambda: reference.all_reduce([x[0]]),
        lambda: reference.all_reduce([x.int()]),
        lambda: reference.all_reduce([x, x[:2]]),
        lambda: reference.all_reduce([x, x.float()]),
        lambda: reference.all_reduce([x], residual=x.float()),
        lambda: reference.all_reduce([x], norm=RMSNorm(torch.ones(32))),
        lambda: reference.all_reduce([x], norm=RMSNorm(torch.ones(64, dtype=torch.float16))),
        lambda: reference.quantize(x[0], FP8PerToken()),
        lambda: reference.quantize(x, FP8Group(48)),
        lambda: reference.dequantize(x, None, FP8Static(1.0), hidden_size=64),
        lambda: reference.dequantize(reference.quantize(x, FP8PerToken())[0], None, FP8PerToken(), hidden_size=64),
        lambda: reference.dequantize(reference.quantize(x, FP8Static(1.0))[0], None, FP8Static(1.0), hidden_size=32),
        lambda: FP8Group(16, "ue8m0", smallest=2.0),
        lambda: FP8Group(16, "ue8m0", smallest=1e-39),
    ]
    for call in wrong:
        with pytest.raises(ArgumentError, match="\nhint: "):
            call()


def test_flushing_subnormal_numbers_is_an_error() -> None:
    x = torch.full((1, 8), 1e-39)
    assert torch.set_flush_denormal(True)
    try:
        for call in (
            lambda: reference.all_reduce([x]),
            lambda: reference.quantize(x, FP8PerToken()),
            lambda: reference.finish(x, quant=FP8PerToken()),
        ):
            with pytest.raises(PlatformError, match="flushes subnormal numbers to zero"):
                call()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(reference.all_reduce([x]).reduced, x)
