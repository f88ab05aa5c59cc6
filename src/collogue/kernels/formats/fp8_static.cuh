// FP8Static: E4M3 codes under one given scale, a divisor.
#pragma once
#include "format.cuh"

namespace collogue {

struct FP8Static : FormatDefaults {
  static constexpr u32 kCodeBytes = 8, kScaleBytes = 0;
  static constexpr int kGroup = 0;

  float factor;  // 1 / scale; between ask() and get_ready() the scale, where that is a tensor

  template <class C>
  COLLOGUE_DEVICE void prepare(const Params& p, Shared&) {
    factor = 1.0f / p.scale_value;
  }
  COLLOGUE_DEVICE void ask(const Params& p) {
    if (p.scale) factor = *p.scale;
  }
  template <class C>
  COLLOGUE_DEVICE void get_ready(const Params& p, Shared&) {
    if (p.scale) factor = 1.0f / factor;
  }
  template <class D>
  COLLOGUE_DEVICE Codes<kCodeBytes> encode(const Params&, const Packed<D::kParts>& packed, float) const {
    float n[8];
    D::widen(packed, n);
    Codes<kCodeBytes> codes;
    codes.scale = 0;
    encode_e4m3(codes.w, n, factor, ~0u);
    return codes;
  }
};

}  // namespace collogue
