"""The numerical contract of quantization: against scalar loops, exact fractions, NVIDIA's encoders and hand-made numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle, without_negative_zero
from samples import DTYPES, F32, INTEGER, NAN, bits, every_bfloat16, formats_by_label, same, wild
from torch import Tensor

from collogue import formats, reference
from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.spec import RMSNorm


def expected_quantized(n: Tensor, quant: Quant, oracle: Oracle) -> tuple[Tensor, Tensor | None]:
    """(codes, one a byte; scales [T, K]) with numpy's float32 and NVIDIA's conversions, from finite rows."""
    e4m3 = lambda x: without_negative_zero(oracle.e4m3_encode(torch.from_numpy(np.ascontiguousarray(x))), 0x80)  # noqa: E731
    e2m1 = lambda x: without_negative_zero(oracle.e2m1_encode(torch.from_numpy(np.ascontiguousarray(x))), 8)  # noqa: E731
    encode = e2m1 if quant.element == "e2m1" else e4m3
    if isinstance(quant, FP8Static):
        return encode(n.float().numpy() * (F32(1) / F32(float(quant.scale)))), None
    x = n.float().numpy().reshape(n.shape[0], -1, quant.block or n.shape[1])
    amax = np.abs(x).max(axis=2)
    scale: Any
    if isinstance(quant, NVFP4):
        g = F32(float(quant.global_scale))
        scale = e4m3(g * (amax * (F32(1) / F32(6))))
        with np.errstate(all="ignore"):
            codes = encode(x * (g / oracle.e4m3_decode(scale).numpy())[..., None])
        codes[scale == 0] = 0
    else:
        if isinstance(quant, MXFP4 | MXFP8):
            scale = torch.tensor([[mx_code(Fraction(float(a)), quant) for a in row] for row in amax], dtype=torch.uint8)
            divisor = oracle.e8m0_decode(scale).numpy()
        else:
            divisor = np.maximum(amax / F32(448), F32(quant.smallest))  # type: ignore[attr-defined]
            scale = torch.from_numpy(divisor)
            if getattr(quant, "scale_format", "") == "ue8m0":
                scale = torch.tensor([[power_not_below(Fraction(float(a))) + 127 for a in row] for row in divisor], dtype=torch.uint8)
                divisor = oracle.e8m0_decode(scale).numpy()
        codes = encode(x / divisor[..., None])
    return codes.view(n.shape), scale


def power_not_below(x: Fraction) -> int:
    """The smallest k with ``2**k >= x``."""
    k = math.frexp(float(x))[1] + 1
    while Fraction(2) ** (k - 1) >= x:
        k -= 1
    return k


def mx_code(amax: Fraction, quant: MXFP4 | MXFP8) -> int:
    """The E8M0 code, from the definition of each rounding."""
    if amax == 0:
        return 0
    largest, emax = (448, 8) if quant.element == "e4m3" else (6, 2)
    if quant.rounding == "ceil":
        k = power_not_below(amax / largest)
    else:
        k = power_not_below(amax)
        k -= Fraction(2) ** k > amax  # floor(log2 amax)
        k -= emax
    return max(k, -127) + 127


@formats_by_label
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_against_numpy_and_cuda(oracle: Oracle, quant: Quant, dtype: torch.dtype) -> None:
    n = wild(37, 192, seed=3, dtype=dtype).nan_to_num(posinf=1.0, neginf=-1.0)
    n[5], n[6, :64] = 0, -0.0
    n[7] *= 2.0**-12
    codes, scales = reference.quantize(n, quant)
    expected_codes, expected_scales = expected_quantized(n, quant, oracle)
    shape, dtype_of_codes = formats.code_spec(quant, 37, 192)
    assert (codes.shape, codes.dtype) == (shape, dtype_of_codes)
    raw = codes.view(torch.uint8)
    assert torch.equal(formats.unpack_nibbles(raw) if quant.element == "e2m1" else raw, expected_codes)
    if expected_scales is None:
        assert scales is None
    else:
        assert scales is not None
        assert same(formats.read_scales(scales, quant, 37, 192), expected_scales)


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize("kind", [MXFP4, MXFP8])
def test_mx_scale_of_every_bfloat16_amax(kind: Any, rounding: Any) -> None:
    """All 32,640 finite magnitudes against exact fractions, subnormals included; the sign does not matter."""
    quant = kind(rounding, "linear")
    amax = every_bfloat16()
    amax = amax[amax.isfinite()]
    n = torch.zeros(len(amax), 32, dtype=torch.bfloat16)
    n[:, 17] = amax
    _, scales = reference.quantize(n, quant)
    assert scales is not None
    expected = {a: mx_code(Fraction(a), quant) for a in set(amax.float().abs().tolist())}
    assert scales.view(torch.uint8).view(-1).tolist() == [expected[abs(a)] for a in amax.float().tolist()]
    assert 0xFE not in expected.values()


@pytest.mark.parametrize("smallest", [2.0**-126, 1e-3, 1.0])
def test_ue8m0_scale_of_every_bfloat16_amax(smallest: float) -> None:
    quant = FP8Group(16, "ue8m0", smallest=smallest)
    amax = every_bfloat16()
    amax = amax[amax.isfinite()].abs().unique()
    n = torch.zeros(len(amax), 16, dtype=torch.bfloat16)
    n[:, 3] = -amax
    _, scales = reference.quantize(n, quant)
    assert scales is not None
    divisor = np.maximum(amax.float().numpy() / F32(448), F32(smallest)).tolist()
    got = scales.view(torch.uint8).view(-1).tolist()
    assert got == [power_not_below(Fraction(d)) + 127 for d in divisor]
    assert max(got) <= 247  # far from the byte 0xFE that is never produced


def test_amax_just_above_a_boundary_rounds_the_scale_up() -> None:
    """ceil: 448 * 2**k and 6 * 2**k need no larger scale, their successors do; float32 sees one unit in the last place."""
    group = FP8Group(32, "ue8m0", smallest=2.0**-126)
    for quant, largest in ((MXFP8("ceil", "linear"), 448.0), (group, 448.0), (MXFP4("ceil", "linear"), 6.0)):
        for k in (-100, -3, 0, 5, 100):
            at = torch.zeros(2, 32)
            at[:, 0] = largest * 2.0**k
            at[1, 0] = torch.nextafter(at[1, 0], torch.tensor(torch.inf))
            scales = reference.quantize(at, quant)[1]
            assert scales is not None
            assert scales.view(torch.uint8).view(-1).tolist() == [127 + k, 128 + k]


def test_static_multiplies_by_the_rounded_inverse(oracle: Oracle) -> None:
    """At the midpoints of the codes, where division would give other codes."""
    values = formats.e4m3_decode(torch.arange(0x7F, dtype=torch.uint8))
    middles = (values[1:] + values[:-1]) / 2
    differ = 0
    for scale in (0.37, 0.7, 1.3, 3.0, 1e-4):
        n = (middles * scale)[None, :120].contiguous()
        codes, _ = reference.quantize(n, FP8Static(scale))
        product = torch.from_numpy(n.numpy() * (F32(1) / F32(scale)))
        assert torch.equal(codes.view(torch.uint8), oracle.e4m3_encode(product))
        differ += int((codes.view(torch.uint8) != oracle.e4m3_encode(torch.from_numpy(n.numpy() / F32(scale)))).sum())
    assert differ > 0


def test_golden_vectors() -> None:
    """Dyadic cases worked out by hand."""
    ladder = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]])
    packed = [0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE]
    # amax 6: sf = e4m3(g * 1) = 1 for g = 1.
    codes, scales = reference.quantize(ladder, NVFP4(1.0, "linear"))
    assert (codes.tolist(), bits(scales).tolist()) == ([packed], [[0x38]])  # type: ignore[arg-type]
    # g = 448, x / 448: the scale is 448 * (amax / 6) = 1 again.
    codes, scales = reference.quantize(ladder * 2, NVFP4(2.0, "linear"))
    assert (codes.tolist(), bits(scales).tolist()) == ([packed], [[0x48]])  # type: ignore[arg-type]
    both = torch.cat([ladder, ladder / 2], 1)
    codes, scales = reference.quantize(both, MXFP4("ceil", "linear"))
    assert codes[0, :8].tolist() == packed
    assert bits(scales).tolist() == [[127]]  # type: ignore[arg-type]
    # 7 saturates under "floor" (scale 1) and does not under "ceil" (scale 2: 3.5 is a tie, to 4).
    seven = torch.full((1, 32), 7.0)
    assert reference.quantize(seven, MXFP4("floor"))[0].view(-1)[0] == 0x77
    assert reference.quantize(seven, MXFP4("ceil"))[0].view(-1)[0] == 0x66
    # FP8: amax 448 has scale 1; codes are the numbers themselves.
    x = torch.tensor([[448.0, -1.0, 0.5, 2.0**-9] + [0.0] * 12])
    expected = [[0x7E, 0xB8, 0x30, 0x01] + [0] * 12]
    for quant in (FP8Static(1.0), FP8PerToken(), FP8Group(16), FP8Group(16, "ue8m0")):
        assert bits(reference.quantize(x, quant)[0]).tolist() == expected


def test_smallest_bounds_the_scale() -> None:
    x = torch.zeros(1, 32)
    x[0, 0] = 1e-9
    default = 1.0 / (448 * 512)
    for quant, scale in ((FP8PerToken(), default), (FP8PerToken(smallest=0.5), 0.5), (FP8Group(32, smallest=1.0), 1.0)):
        assert same(reference.quantize(x, quant)[1], torch.tensor([[scale]]))
    scales = reference.quantize(x, FP8Group(32, "ue8m0", smallest=0.75))[1]
    assert scales is not None
    assert scales.float().tolist() == [[1.0]]


@formats_by_label
def test_nan_is_stored_but_does_not_reach_a_scale(quant: Quant) -> None:
    n = wild(3, 64, seed=5)
    clean = n.clone()
    clean[0, 1] = 0.0
    n[0, 1] = torch.nan
    codes, scales = reference.quantize(n, quant)
    expected, expected_scales = reference.quantize(clean, quant)
    raw = codes.view(torch.uint8).clone()
    if quant.element == "e2m1":
        assert raw[0, 0] >> 4 == 7
        raw[0, 0] &= 0xF
    else:
        assert raw[0, 1] == 0x7F
        raw[0, 1] = 0
    assert torch.equal(raw, expected.view(torch.uint8))
    assert (scales is None and expected_scales is None) or same(scales, expected_scales)


def test_blocks_that_are_all_nan_or_zero() -> None:
    for value in (torch.nan, 0.0, -0.0):
        n = torch.full((2, 32), value, dtype=torch.bfloat16)
        n[0, 1] = torch.nan
        for quant in (NVFP4(1.0), MXFP4("ceil"), MXFP4("floor"), MXFP8("floor"), MXFP8("ceil")):
            codes, scales = reference.quantize(n, quant)
            assert scales is not None
            assert not codes.view(torch.uint8).any()
            assert not formats.scale_storage(scales).any()
        codes, scales = reference.quantize(n, FP8PerToken())
        assert same(scales, torch.full((2, 1), 1.0 / (448 * 512)))
        assert bits(codes)[0, 1] == 0x7F


def test_infinity() -> None:
    n = torch.zeros(1, 32, dtype=torch.bfloat16)
    n[0, 0], n[0, 1], n[0, 2] = torch.inf, -torch.inf, 2.0**121

    def raw(quant: Quant) -> tuple[list[int], int]:
        codes, scales = reference.quantize(n, quant)
        assert scales is not None
        return codes.view(torch.uint8)[0, :3].tolist(), int(formats.read_scales(scales, quant, 1, 32)[0, 0])

    # The exponent of infinity counts as 128, so the scale is 2**120 (E4M3) or 2**126 (E2M1).
    for fp8 in (MXFP8("floor"), MXFP8("ceil"), FP8Group(32, "ue8m0")):
        assert raw(fp8) == ([0x7E, 0xFE, 0x40], 247)
    for fp4 in (MXFP4("floor"), MXFP4("ceil")):
        assert raw(fp4) == ([0xF7, 0x00, 0x00], 253)  # 2**121 / 2**126 rounds to 0
    # NVFP4's scale saturates at 448: 2**121 saturates too.
    assert raw(NVFP4(1.0)) == ([0xF7, 0x07, 0x00], 0x7E)
    # A float32 scale is infinite: finite elements become 0, infinities NaN.
    for quant in (FP8PerToken(), FP8Group(32)):
        codes, scales = reference.quantize(n, quant)
        assert same(scales, torch.tensor([[torch.inf]]))
        assert bits(codes)[0, :4].tolist() == [0x7F, 0x7F, 0, 0]
    assert bits(reference.quantize(n, FP8Static(1.0))[0])[0, :4].tolist() == [0x7E, 0xFE, 0x7E, 0]


def test_nvfp4_with_an_unvalidated_global_scale() -> None:
    """CUDA tensors are not read, so these values can occur; the formula defines the output."""

    def quantized(g: float) -> tuple[list[int], list[int]]:
        quant = NVFP4(1.0, "linear")
        object.__setattr__(quant, "global_scale", torch.tensor(g))  # past the check, as a CUDA tensor goes
        codes, scales = reference.quantize(torch.tensor([[6.0, -3.0] + [0.0] * 14]), quant)
        assert scales is not None
        return codes[0, :2].tolist(), scales.view(torch.uint8)[0].tolist()

    assert quantized(torch.nan) == ([0x77, 0x77], [0x7F])
    assert quantized(torch.inf) == ([0xF7, 0x77], [0x7E])  # g / sf is infinite, and 0 * inf is NaN
    assert quantized(0.0) == ([0x00, 0x00], [0x00])
    assert quantized(-1.0) == ([0xD7, 0x00], [0xB8])  # sf = -1, g / sf = 1
    assert quantized(-1e-9) == ([0x00, 0x00], [0x00])  # sf would be -0


@formats_by_label
def test_no_output_holds_a_negative_zero_or_a_sentinel(quant: Quant) -> None:
    """Every bfloat16 as an element, as a block's only element, and beside every other; every word of every output."""
    values = every_bfloat16().clone()
    alone = torch.zeros(2**16, 32, dtype=torch.bfloat16)
    alone[:, 0] = values
    negative = -torch.exp2(torch.arange(-140, 128).float()).to(torch.bfloat16)[:, None].expand(-1, 32)
    for n in (values.view(-1, 32), values.view(-1, 2**11).t().contiguous(), alone, negative.contiguous(), -alone.abs()):
        codes, scales = reference.quantize(n, quant)
        raw = codes.view(torch.uint8)
        if quant.element == "e2m1":
            assert not (((raw & 0xF) == 8) | ((raw >> 4) == 8)).any()
            assert not (raw.view(torch.int32) == 0x88888888 - 2**32).any()
        else:
            assert not (raw == 0x80).any()
            assert not (raw.view(torch.int32) == 0x80808080 - 2**32).any()
        if scales is None:
            continue
        memory = formats.scale_storage(scales)
        if scales.dtype == torch.float32:
            assert not (memory.view(torch.int32) == -(2**31)).any()
        elif isinstance(quant, NVFP4):
            assert not (memory == 0x80).any()
        else:
            assert not (memory == 0xFE).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_is_a_negative_zero(dtype: torch.dtype) -> None:
    """y and n: the sentinels 0x8000 in both halves of a word, and 0x80000000."""
    x = every_bfloat16().to(dtype).view(-1, 64)
    weight = torch.tensor([-1.0, 1e-38] * 32)
    residual = -torch.zeros_like(x)
    out = reference.all_reduce([x * 0, -x * 0, x], residual=residual, norm=RMSNorm(weight), keep_norm=True)
    for name in ("residual", "norm"):
        found = getattr(out, name)
        assert found is not None
        assert not (bits(found) == torch.iinfo(INTEGER[dtype]).min).any()
        nan = found.isnan()
        assert nan.any()
        assert (bits(found)[nan] == NAN[dtype]).all()


# Decoding


@formats_by_label
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_code_times_scale(oracle: Oracle, quant: Quant, dtype: torch.dtype) -> None:
    n = wild(9, 96, seed=8, dtype=dtype, spread=1.0)
    codes, scales = reference.quantize(n, quant)
    decoded = reference.dequantize(codes, scales, quant, hidden_size=96)
    raw = codes.view(torch.uint8)
    values = (oracle.e2m1_decode(formats.unpack_nibbles(raw)) if quant.element == "e2m1" else oracle.e4m3_decode(raw)).numpy()
    if isinstance(quant, FP8Static):
        expected = values * F32(float(quant.scale))
    else:
        assert scales is not None
        stored = formats.read_scales(scales, quant, 9, 96).contiguous()
        if stored.dtype == torch.uint8:
            stored = oracle.e4m3_decode(stored) if isinstance(quant, NVFP4) else oracle.e8m0_decode(stored)
        expected = values * np.repeat(stored.numpy(), quant.block or 96, axis=1)
        if isinstance(quant, NVFP4):
            expected = expected / F32(float(quant.global_scale))
    assert same(decoded, torch.from_numpy(expected))
    # Not far from the truth either: half a step of the element at the block's largest value.
    error = (decoded - n.float()).reshape(9, -1, quant.block or 96).abs().amax(2)
    amax = n.float().reshape(9, -1, quant.block or 96).abs().amax(2)
    bound = {"e2m1": 1 / 3, "e4m3": 1 / 8}[quant.element]
    if not isinstance(quant, FP8Static | NVFP4):
        assert (error <= amax * bound).all()


@pytest.mark.parametrize("quant", [MXFP4("floor"), MXFP4("ceil"), MXFP8("floor"), MXFP8("ceil"), FP8Group(32, "ue8m0"), FP8Static(0.25)])
def test_what_was_decoded_quantizes_to_itself(quant: Quant) -> None:
    """Power-of-two scales lose nothing, so decode and encode again is the identity on the values."""
    codes, scales = reference.quantize(wild(33, 96, seed=9, spread=1.0), quant)
    decoded = reference.dequantize(codes, scales, quant, hidden_size=96)
    again = reference.dequantize(*reference.quantize(decoded, quant), quant, hidden_size=96)
    assert same(again + 0.0, decoded + 0.0)


def test_dequantize_decodes_nan_to_the_one_nan() -> None:
    n = torch.ones(1, 32)
    n[0, 5] = torch.nan
    for quant in (FP8PerToken(), FP8Static(2.0), MXFP8("ceil")):
        codes, scales = reference.quantize(n, quant)
        decoded = reference.dequantize(codes, scales, quant, hidden_size=32)
        assert bits(decoded)[0, 5] == 0x7FFFFFFF
        assert decoded.isnan().sum() == 1
