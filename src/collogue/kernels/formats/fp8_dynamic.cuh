// FP8PerToken and FP8Group: E4M3 codes, and a scale (a divisor) that follows from the largest magnitude of the row or the group.
#pragma once
#include "format.cuh"

namespace collogue {

// A float for kElements of a row.
template <int kElements>
struct FP8Dynamic : FormatDefaults {
  static constexpr u32 kCodeBytes = 8, kScaleBytes = 4;
  static constexpr int kGroup = kElements;
  template <class D>
  COLLOGUE_DEVICE Codes<kCodeBytes> encode(const Params& p, const Packed<D::kParts>& packed, float amax) const {
    float n[8];
    D::widen(packed, n);
    Codes<kCodeBytes> codes;
    const float s = larger(amax / 448.0f, p.smallest);
    divide(n, s);
    encode_e4m3(codes.w, n, 1.0f, ~0u);
    codes.scale = bits(s);
    return codes;
  }
};
using FP8PerToken = FP8Dynamic<0>;
template <int kElements>
using FP8Group = FP8Dynamic<kElements>;

// The same with a power of two, rounded up: its exponent.
template <int kElements>
struct FP8GroupE8M0 : FormatDefaults {
  static constexpr u32 kCodeBytes = 8, kScaleBytes = 1;
  static constexpr int kGroup = kElements;
  template <class D>
  COLLOGUE_DEVICE Codes<kCodeBytes> encode(const Params& p, const Packed<D::kParts>& packed, float amax) const {
    float n[8];
    D::widen(packed, n);
    Codes<kCodeBytes> codes;
    const u32 least = e8m0_not_below(p.smallest), byte = e8m0_of_amax<8, true>(amax);
    codes.scale = byte > least ? byte : least;
    encode_e4m3(codes.w, n, e8m0_inverse(codes.scale), ~0u);
    return codes;
  }
};

}  // namespace collogue
