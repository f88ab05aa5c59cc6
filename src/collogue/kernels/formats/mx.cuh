// MXFP4 and MXFP8: E2M1 or E4M3 codes, one E8M0 scale for 32 elements.
#pragma once
#include "format.cuh"

namespace collogue {

struct MX : FormatDefaults {
  static constexpr u32 kScaleBytes = 1, kScalesInWord = 4;
  static constexpr int kGroup = 32;
  static constexpr u32 kTurned = 0x7e7e7e7eu;  // no byte is 0xFE
};

template <bool kCeil>
struct MXFP4 : MX {
  static constexpr u32 kCodeBytes = 4;
  template <class D>
  COLLOGUE_DEVICE Codes<kCodeBytes> encode(const Params&, const Packed<D::kParts>& packed, float amax) const {
    float n[8];
    D::widen(packed, n);
    const u32 byte = e8m0_of_amax<2, kCeil>(amax), mask = bits(amax) ? ~0u : 0u;
    return {{e2m1_word(n, e8m0_inverse(byte), signs<D>(packed)) & mask}, byte};
  }
};

template <bool kCeil>
struct MXFP8 : MX {
  static constexpr u32 kCodeBytes = 8;
  template <class D>
  COLLOGUE_DEVICE Codes<kCodeBytes> encode(const Params&, const Packed<D::kParts>& packed, float amax) const {
    float n[8];
    D::widen(packed, n);
    Codes<kCodeBytes> codes;
    codes.scale = e8m0_of_amax<8, kCeil>(amax);
    encode_e4m3(codes.w, n, e8m0_inverse(codes.scale), bits(amax) ? ~0u : 0u);
    return codes;
  }
};

}  // namespace collogue
