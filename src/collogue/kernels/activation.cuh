// silu by operations that are each rounded by themselves: the same bits on every device (docs/contract.md, "A gated unit").
#pragma once
#include "values.cuh"

namespace collogue {

// The exponential of x, -32 <= x <= 88: 2^n times a polynomial of the rest.
COLLOGUE_DEVICE float exponential(float x) {
  constexpr float kToWhole = 12582912.0f;  // 1.5 * 2^23: added to a small number it rounds it to a whole one, which its last bits hold
  const float whole = x * 0x1.715476p+0f + kToWhole;
  const float n = whole - kToWhole;
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 0x1.6a23cep-10f;
  p = p * r + 0x1.123a2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * from_bits((bits(whole) << 23) + bits(1.0f));
}

COLLOGUE_DEVICE float silu(float g) {
  const float y = g / (1.0f + exponential(larger(-g, -32.0f)));
  return g < -88.0f ? 0.0f : y;
}

}  // namespace collogue
