// NVFP4: E2M1 codes, one E4M3 scale sf for 16 elements, one multiplier g for the tensor.
#pragma once
#include "format.cuh"

namespace collogue {

struct NVFP4 : FormatDefaults {
  static constexpr u32 kCodeBytes = 4, kScaleBytes = 1, kScalesInWord = 4;
  static constexpr int kGroup = 16;
  static constexpr bool kFillsShared = true;
  struct Shared {
    float factor[128];  // g / sf by the code of sf
  };

  float scale;  // g
  u32 factors;  // address of Shared::factor

  template <class C>
  COLLOGUE_DEVICE void prepare(const Params& p, Shared& shared) {
    factors = keep_if_room<C>(shared_address(&shared.factor[0]));
    scale = p.scale_value;
    if (!p.scale) fill<C>(shared);
  }
  COLLOGUE_DEVICE void ask(const Params& p) {
    if (p.scale) scale = *p.scale;
  }
  template <class C>
  COLLOGUE_DEVICE void get_ready(const Params& p, Shared& shared) {
    if (!p.scale) return;
    fill<C>(shared);
    sync_block();
  }
  template <class D>
  COLLOGUE_DEVICE Codes<kCodeBytes> encode(const Params&, const Packed<D::kParts>& packed, float amax) const {
    float n[8];
    D::widen(packed, n);
    const u32 sf = e4m3_code(scale * (amax * (1.0f / 6.0f)));
    float factor = from_bits(load_shared_word(factors + (sf & 0x7fu) * 4));
    // A positive finite factor keeps signs, and stored NaNs have none. Others come from scales 0, NaN, infinite or negative.
    u32 sign_bits = signs<D>(packed), mask = ~0u;
    if (!(factor > 0.0f && factor <= 3.402823466e38f)) {
      if (sf & 0x80u) factor = -factor;
      sign_bits = product_signs(n, factor);
      mask = sf ? ~0u : 0u;
    }
    return {{e2m1_word(n, factor, sign_bits) & mask}, sf};
  }

 private:
  template <class C>
  COLLOGUE_DEVICE void fill(Shared& shared) const {
#pragma unroll 1
    for (u32 code = thread_index(); code < 128; code += C::kThreads) {
      float factor = code == 127 ? from_bits(0x7fffffffu) : scale / e4m3_value(code);
      shared.factor[code] = code ? factor : 0.0f;
    }
  }
};

}  // namespace collogue
