// From the rounded norm of a row to codes and scales. Scale layouts and their padding. Knows nothing of ranks.
#pragma once
#include "exchange.cuh"
#include "params.cuh"

namespace collogue {

template <class C>
struct Quantizer {
  using D = typename C::D;
  static constexpr Format kFormat = C::kFormat;
  static constexpr bool kCodes4 = kFormat == Format::kNVFP4 || kFormat == Format::kMXFP4;
  static constexpr bool kMX = kFormat == Format::kMXFP4 || kFormat == Format::kMXFP8;
  static constexpr bool kPerRow = kFormat == Format::kFP8PerToken;
  // A group lies within a warp's 256 elements and is a power of two: its maximum is a few shuffles away.
  static constexpr bool kGroupInWarp = C::kGroup && 256 % (C::kGroup ? C::kGroup : 1) == 0;
  static constexpr bool kGroupInBlock = C::kGroup && !kGroupInWarp;

  struct Shared {
    float factor[kFormat == Format::kNVFP4 ? 128 : 1];          // g / sf by the code of sf
    float unit_amax[kGroupInBlock ? C::kBlocks * 16 : 1];       // of every 16 elements of the row
  };

  const Params& p;
  Shared& shared;
  float scale;       // g, or 1 / s
  u32 token;
  u8 *codes, *scales;  // of this thread's first vector

  // Before the barrier at the start; may run before the previous kernel has ended.
  COLLOGUE_DEVICE Quantizer(const Params& params, Shared& s) : p(params), shared(s), scale(0.0f) {
    if constexpr (kFormat == Format::kNVFP4 || kFormat == Format::kFP8Static) scale = p.scale ? *p.scale : p.scale_value;
    if constexpr (kFormat == Format::kFP8Static) scale = 1.0f / scale;
    if constexpr (kFormat == Format::kNVFP4)
      for (u32 code = thread_index(); code < 128; code += C::kThreads) {
        float factor = code == 127 ? from_bits(0x7fffffffu) : scale / e4m3_value(code);
        shared.factor[code] = code ? factor : 0.0f;
      }
  }

  // Works out where the codes and the scale of vector `c` (this thread's first) of row t go, now.
  COLLOGUE_DEVICE void aim(u32 t, u32 c) {
    if constexpr (kFormat != Format::kNone) {
      token = t;
      codes = p.codes + (static_cast<u64>(t) * (p.hidden / 8) + c) * (kCodes4 ? 4 : 8);
      compute_now(codes);
    }
    if constexpr (C::kGroup != 0) {
      scales = scale_address(t, c);
      compute_now(scales);
    }
  }

  // ---- whole-row pieces

  // Maximum over the lanes that share a group. All lanes.
  static COLLOGUE_DEVICE float group_amax(float amax) {
#pragma unroll
    for (int distance = 1; distance < C::kGroup / 8; distance *= 2) amax = larger(amax, exchange_lanes(amax, distance));
    return amax;
  }

  // This thread's vector i: eight elements at column `c * 8` of the row that aim() named. All lanes; `active`: the vector lies
  // in the row. `amax`: of the group (block formats) or of the row (per token).
  COLLOGUE_DEVICE void write(const Packed<D::kParts>& packed, int i, u32 c, bool active, float amax) const {
    float n[8];
    D::widen(packed, n);
    u8* const code = codes + i * 32 * (kCodes4 ? 4 : 8);
    if constexpr (kFormat == Format::kNVFP4) {
      const u32 sf = e4m3_code(scale * (amax * (1.0f / 6.0f)));
      float factor = shared.factor[sf & 0x7fu];
      // A positive finite factor keeps signs, and stored NaNs have none. Others come from scales 0, NaN, infinite or negative.
      u32 sign_bits = signs<D>(packed), mask = ~0u;
      if (!(factor > 0.0f && factor <= 3.402823466e38f)) {
        if (sf & 0x80u) factor = -factor;
        sign_bits = product_signs(n, factor);
        mask = sf ? ~0u : 0u;
      }
      const u32 w = e2m1_word(n, factor, sign_bits) & mask;
      if (active) store_word(code, w);
      store_scale_byte(i, c, active, sf);
    } else if constexpr (kMX) {
      const u32 byte = e8m0_of_amax<kCodes4 ? 2 : 8, C::kCeil>(amax), mask = bits(amax) ? ~0u : 0u;
      if constexpr (kCodes4) {
        const u32 w = e2m1_word(n, e8m0_inverse(byte), signs<D>(packed)) & mask;
        if (active) store_word(code, w);
      } else {
        write_e4m3(code, n, e8m0_inverse(byte), active, mask);
      }
      store_scale_byte(i, c, active, byte);
    } else if constexpr (kFormat == Format::kFP8GroupE8M0) {
      const u32 byte = max_u32(e8m0_of_amax<8, true>(amax), e8m0_not_below(p.smallest));
      write_e4m3(code, n, e8m0_inverse(byte), active, ~0u);
      store_scale_byte(i, c, active, byte);
    } else if constexpr (kFormat == Format::kFP8Static) {
      write_e4m3(code, n, scale, active, ~0u);
    } else {
      const float s = larger(amax / 448.0f, p.smallest);
      divide(n, s);
      write_e4m3(code, n, 1.0f, active, ~0u);
      if constexpr (kPerRow) {
        if (active && c == 0) reinterpret_cast<float*>(p.scales)[token] = s;
      } else if (active && leads(c)) {
        *reinterpret_cast<float*>(C::kVectors == 1 ? scales : scale_address(token, c)) = s;
      }
    }
  }

  // Groups that a warp does not hold: maxima of 16 elements through shared memory. The row lies in one CTA.
  COLLOGUE_DEVICE void share_amax(u32 c, bool active, float amax) {
    amax = larger(amax, exchange_lanes(amax, 1));
    if (active && (c & 1u) == 0) shared.unit_amax[c / 2] = amax;
  }
  COLLOGUE_DEVICE float shared_group_amax(u32 c, bool active) const {
    constexpr u32 units = C::kGroup / 16;
    float amax = 0.0f;
    if (active) {
      const u32 first = c / 2 / units * units;
      for (u32 i = 0; i < units; i++) amax = larger(amax, shared.unit_amax[first + i]);
    }
    return amax;
  }

  // ---- padding of the scale tensor: written every time, by all threads of the grid together

  COLLOGUE_DEVICE void pad(u32 thread, u32 threads, u32 tokens) const {
    if constexpr (kScaleBytes && C::kLayout != Layout::kLinear) {
      const u32 last = groups() - 1, missing = 3 - last % 4;  // bytes that complete the last word of every row
#pragma unroll 1
      for (u32 i = thread; missing && i < tokens; i += threads)
#pragma unroll 1
        for (u32 j = 1; j <= missing; j++) scale_address(i, last * (C::kGroup / 8))[j] = 0;
    }
    if constexpr (kScaleBytes && C::kLayout == Layout::k128x4) {
      if (tokens % 128 == 0) return;
      const u32 tiles = (groups() + 3) / 4, last = tokens / 128, used = tokens % 128;
      u8* const tile = p.scales + static_cast<u64>(last) * tiles * 512;
#pragma unroll 1
      for (u32 i = thread; i < tiles * 32; i += threads) {
        u8* const chunk = tile + i * 16;  // of rows i % 32, + 32, + 64, + 96
        const u32 row = i % 32;
        if (row >= used) store(chunk, Words{{0, 0, 0, 0}});
#pragma unroll
        for (u32 j = 1; j < 4; j++)
          if (row < used && row + 32 * j >= used) store_word(chunk + j * 4, 0u);
      }
    } else if constexpr (kScaleBytes && C::kLayout == Layout::k8x4) {
      const u32 tiles = (groups() + 3) / 4, last = tokens / 8, used = tokens % 8;
      if (used == 0) return;
      u8* const tile = p.scales + static_cast<u64>(last) * tiles * 32;
#pragma unroll 1
      for (u32 i = thread; i < tiles * 8; i += threads)
        if ((i & 7u) >= used) store_word(tile + i * 4, 0u);
    } else if constexpr (C::kLayout == Layout::kColumn) {
      const u32 columns = kFormat == Format::kFP8GroupE8M0 ? (groups() + 3) / 4 : groups(), missing = p.column_stride - tokens;
#pragma unroll 1
      for (u32 i = thread; i < columns * missing; i += threads)
        store_word(p.scales + (static_cast<u64>(i / missing) * p.column_stride + tokens + i % missing) * 4, 0u);
    }
  }

 private:
  static constexpr bool kScaleBytes = kFormat == Format::kNVFP4 || kMX || kFormat == Format::kFP8GroupE8M0;
  static constexpr u32 kVectorsPerGroup = C::kGroup ? C::kGroup / 8 : 1;

  static COLLOGUE_DEVICE u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }
  static COLLOGUE_DEVICE void store_word(u8* address, u32 w) { *reinterpret_cast<u32*>(address) = w; }
  static COLLOGUE_DEVICE bool leads(u32 c) { return c % kVectorsPerGroup == 0; }
  COLLOGUE_DEVICE u32 groups() const { return p.hidden / 8 / kVectorsPerGroup; }

  // Of the scale of vector c of row t.
  COLLOGUE_DEVICE u8* scale_address(u32 t, u32 c) const {
    const u32 k = c / kVectorsPerGroup, tiles = (groups() + 3) / 4;
    const u64 in_row = static_cast<u64>(t) * groups() + k, in_column = static_cast<u64>(k) * p.column_stride + t;
    if constexpr (!kScaleBytes)
      return p.scales + (C::kLayout == Layout::kColumn ? in_column : in_row) * 4;
    else if constexpr (C::kLayout == Layout::kLinear)
      return p.scales + in_row;
    else if constexpr (C::kLayout == Layout::k128x4)
      return p.scales + ((static_cast<u64>(t / 128) * tiles + k / 4) * 128 + t % 32 * 4 + t / 32 % 4) * 4 + k % 4;
    else if constexpr (C::kLayout == Layout::k8x4)
      return p.scales + ((static_cast<u64>(t / 8) * tiles + k / 4) * 8 + t % 8) * 4 + k % 4;
    else
      return p.scales + (static_cast<u64>(k / 4) * p.column_stride + t) * 4 + k % 4;
  }
  COLLOGUE_DEVICE void store_scale_byte(int i, u32 c, bool active, u32 byte) const {
    if (active && leads(c)) *(C::kVectors == 1 ? scales : scale_address(token, c)) = static_cast<u8>(byte);
  }

  // n / s with one reciprocal and a correction: the quotient that the division gives, wherever an E4M3 code depends on it, for
  // scales in between; below them the correction underflows (docs/contract.md).
  static COLLOGUE_DEVICE void divide(float (&n)[8], float s) {
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

  static COLLOGUE_DEVICE void write_e4m3(u8* code, const float (&n)[8], float factor, bool active, u32 mask) {
    u32 w[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      w[i] = e4m3_word(n[4 * i] * factor, n[4 * i + 1] * factor, n[4 * i + 2] * factor, n[4 * i + 3] * factor) & mask;
    if (active) *reinterpret_cast<uint2*>(code) = make_uint2(w[0], w[1]);
  }
};

}  // namespace collogue
