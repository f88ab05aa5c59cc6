// Encoders of the narrow elements and scales: E2M1, E4M3, E8M0. Registers only. The same bits on every architecture.
#pragma once
#include "values.cuh"

namespace collogue {

// ---- E4M3

// The value of a positive code 0 .. 0x7e.
COLLOGUE_DEVICE float e4m3_value(u32 code) {
  const u32 exponent = code >> 3, mantissa = code & 7u;
  return exponent ? from_bits(((exponent + 120u) << 23) | (mantissa << 20)) : static_cast<float>(mantissa) * 0.001953125f;
}

// Adding a power of two whose unit in the last place is the step of E4M3 at |x| rounds |x| to that step; integers do the rest.
COLLOGUE_DEVICE u32 e4m3_by_integers(float x) {
  const float a = smaller(from_bits(bits(x) & 0x7fffffffu), 448.0f);
  const u32 magic = (bits(larger(a, 0.015625f)) & 0x7f800000u) + (20u << 23);
  const u32 code = bits(a + from_bits(magic)) - magic + (((magic >> 23) - (20u + 121u)) << 3);
  return x != x ? 0x7fu : code | ((bits(x) >> 24) & 0x80u);
}

// Four codes in a word, the first in bits 0 to 7, negative zero cleared.
COLLOGUE_DEVICE u32 e4m3_word(float a, float b, float c, float d) {
#if COLLOGUE_HAS_E4M3_CONVERSION
  const u32 w = e4m3_pair(a, b) | (e4m3_pair(c, d) << 16);
#else
  const u32 w = e4m3_by_integers(a) | (e4m3_by_integers(b) << 8) | (e4m3_by_integers(c) << 16) | (e4m3_by_integers(d) << 24);
#endif
  return w & (((w & 0x7f7f7f7fu) + 0x7f7f7f7fu) | 0x7f7f7f7fu);
}
COLLOGUE_DEVICE u32 e4m3_code(float x) {
#if COLLOGUE_HAS_E4M3_CONVERSION
  const u32 code = e4m3_pair(x, 0.0f);
#else
  const u32 code = e4m3_by_integers(x);
#endif
  return code == 0x80u ? 0u : code;
}

// ---- E2M1

// E2M1 of |x| plus 298: the caller subtracts. Rounds as e4m3_by_integers does; NaN and large values give 7.
COLLOGUE_DEVICE u32 e2m1_biased(float x) {
  const float a = smaller(from_bits(bits(x) & 0x7fffffffu), 6.0f);
  const u32 magic = (bits(larger(a, 1.0f)) & 0x7f800000u) + (22u << 23);
  return bits(a + from_bits(magic)) - magic + (magic >> 22);
}

// Keeps the signs (bit 3 of each nibble) of the codes that are not zero.
COLLOGUE_DEVICE u32 join_signs(u32 magnitudes, u32 sign_bits) {
  const u32 nonzero = (magnitudes | (magnitudes >> 1) | (magnitudes >> 2)) & 0x11111111u;
  return magnitudes | (sign_bits & (nonzero << 3));
}

// Eight codes of n * factor, the first in bits 0 to 3; `sign_bits`: of the products, at bit 4 * i + 3. NaN gives 7.
COLLOGUE_DEVICE u32 e2m1_word(const float (&n)[8], float factor, u32 sign_bits) {
#if COLLOGUE_HAS_E2M1_CONVERSION
  u32 w = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) w |= e2m1_pair(n[2 * i] * factor, n[2 * i + 1] * factor) << (8 * i);
  return join_signs(w & 0x77777777u, sign_bits);
#else
  u32 c[8];
#pragma unroll
  for (int i = 0; i < 8; i++) c[i] = e2m1_biased(n[i] * factor);
#pragma unroll
  for (int i = 0; i < 8; i += 2) c[i] += c[i + 1] << 4;
  c[0] += c[2] << 8;
  c[4] += c[6] << 8;
  return join_signs(c[0] + (c[4] << 16) - 298u * 0x11111111u, sign_bits);
#endif
}

// The signs of n * factor; a NaN has none.
COLLOGUE_DEVICE u32 product_signs(const float (&n)[8], float factor) {
  u32 s = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) s |= n[i] * factor < 0.0f ? 8u << (4 * i) : 0u;
  return s;
}

// ---- E8M0

// Byte k + 127 of the scale 2^k for a block whose largest magnitude is `amax`. `emax`: 8 (E4M3) or 2 (E2M1).
// floor: k = floor(log2 amax) - emax. ceil: the smallest power of two not below amax / 448 or amax / 6.
template <int emax, bool ceil>
COLLOGUE_DEVICE u32 e8m0_of_amax(float amax) {
  const u32 b = bits(amax);
  u32 exponent = b >> 23;
  if (ceil) exponent += (b & 0x7fffffu) > (emax == 8 ? 0x600000u : 0x400000u) ? 1u : 0u;
  return exponent > emax ? exponent - emax : 0u;
}
// 2^-k of byte k + 127.
COLLOGUE_DEVICE float e8m0_inverse(u32 byte) { return from_bits((254u - byte) << 23); }

// Byte of the smallest power of two not below a positive normal scale.
COLLOGUE_DEVICE u32 e8m0_not_below(float scale) { return (bits(scale) + 0x7fffffu) >> 23; }

// ---- eight elements

// n * factor as E4M3, and-ed with `mask`.
COLLOGUE_DEVICE void encode_e4m3(u32 (&codes)[2], const float (&n)[8], float factor, u32 mask) {
#pragma unroll
  for (int i = 0; i < 2; i++)
    codes[i] = e4m3_word(n[4 * i] * factor, n[4 * i + 1] * factor, n[4 * i + 2] * factor, n[4 * i + 3] * factor) & mask;
}
// n / s with one reciprocal and a correction: the quotient that the division gives, wherever an E4M3 code depends on it, for
// scales in between; below them the correction underflows (docs/contract.md).
COLLOGUE_DEVICE void divide(float (&n)[8], float s) {
  if (s >= 1e-27f && s <= 1e30f) {
    const float inverse = reciprocal(s);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float q = n[i] * inverse;
      n[i] = fused_multiply_add(fused_multiply_add(-q, s, n[i]), inverse, q);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) n[i] = n[i] / s;
  }
}

}  // namespace collogue
