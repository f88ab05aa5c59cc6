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

  static constexpr u32 kCodeBytes = kCodes4 ? 4 : 8;  // of a vector
  static constexpr bool kScaleBytes = kFormat == Format::kNVFP4 || kMX || kFormat == Format::kFP8GroupE8M0;
  static constexpr u32 kVectorsPerGroup = C::kGroup ? C::kGroup / 8 : 1;
  struct Codes {
    u32 w[kCodes4 ? 1 : 2];
    u32 scale;
  };

  struct Shared {
    float factor[kFormat == Format::kNVFP4 ? 128 : 1];          // g / sf by the code of sf
    float unit_amax[kGroupInBlock ? C::kBlocks * 16 : 1];       // of every 16 elements of the row
  };

  const Params& p;
  Shared& shared;
  float scale;       // g, or 1 / s
  u32 factors;       // address of Shared::factor
  u32 token;
  u8 *codes, *scales;  // of this thread's first vector

  // Before the barrier at the start; may run before the previous kernel has ended.
  COLLOGUE_DEVICE Quantizer(const Params& params, Shared& s) : p(params), shared(s), scale(0.0f), factors(0) {
    if constexpr (kFormat == Format::kNVFP4 || kFormat == Format::kFP8Static) scale = p.scale ? *p.scale : p.scale_value;
    if constexpr (kFormat == Format::kFP8Static) scale = 1.0f / scale;
    if constexpr (kFormat == Format::kNVFP4) factors = keep<C>(shared_address(&shared.factor[0]));
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
      codes = p.codes + (static_cast<u64>(t) * (p.hidden / 8) + c) * kCodeBytes;
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

  // The codes of eight elements and the scale of their group: a byte, or the bits of a float. `amax`: of the group (block formats)
  // or of the row (per token). All lanes.
  COLLOGUE_DEVICE Codes encode(const Packed<D::kParts>& packed, float amax) const {
    float n[8];
    D::widen(packed, n);
    Codes codes;
    codes.scale = 0;
    if constexpr (kFormat == Format::kNVFP4) {
      const u32 sf = e4m3_code(scale * (amax * (1.0f / 6.0f)));
      float factor = from_bits(load_shared_word(factors + (sf & 0x7fu) * 4));
      // A positive finite factor keeps signs, and stored NaNs have none. Others come from scales 0, NaN, infinite or negative.
      u32 sign_bits = signs<D>(packed), mask = ~0u;
      if (!(factor > 0.0f && factor <= 3.402823466e38f)) {
        if (sf & 0x80u) factor = -factor;
        sign_bits = product_signs(n, factor);
        mask = sf ? ~0u : 0u;
      }
      codes.w[0] = e2m1_word(n, factor, sign_bits) & mask;
      codes.scale = sf;
    } else if constexpr (kMX) {
      const u32 byte = e8m0_of_amax<kCodes4 ? 2 : 8, C::kCeil>(amax), mask = bits(amax) ? ~0u : 0u;
      if constexpr (kCodes4)
        codes.w[0] = e2m1_word(n, e8m0_inverse(byte), signs<D>(packed)) & mask;
      else
        encode_e4m3(codes, n, e8m0_inverse(byte), mask);
      codes.scale = byte;
    } else if constexpr (kFormat == Format::kFP8GroupE8M0) {
      codes.scale = max_u32(e8m0_of_amax<8, true>(amax), e8m0_not_below(p.smallest));
      encode_e4m3(codes, n, e8m0_inverse(codes.scale), ~0u);
    } else if constexpr (kFormat == Format::kFP8Static) {
      encode_e4m3(codes, n, scale, ~0u);
    } else {
      const float s = larger(amax / 448.0f, p.smallest);
      divide(n, s);
      encode_e4m3(codes, n, 1.0f, ~0u);
      codes.scale = bits(s);
    }
    return codes;
  }
  // Stores them: vector `c`, this thread's i-th, of the row that aim() named. `active`: the vector lies in the row.
  COLLOGUE_DEVICE void write(const Codes& v, int i, u32 c, bool active) const {
    if (!active) return;
    u8* const code = codes + i * 32 * kCodeBytes;
    if constexpr (kCodes4)
      store_word(code, v.w[0]);
    else
      *reinterpret_cast<uint2*>(code) = make_uint2(v.w[0], v.w[1]);
    if constexpr (kPerRow) {
      if (c == 0) reinterpret_cast<u32*>(p.scales)[token] = v.scale;
    } else if constexpr (C::kGroup != 0) {
      if (!leads(c)) return;
      u8* const place = C::kVectors == 1 ? scales : scale_address(token, c);
      if constexpr (kScaleBytes)
        *place = static_cast<u8>(v.scale);
      else
        store_word(place, v.scale);
    }
  }

  // Of the scale of vector c of row t in its tensor, in bytes.
  COLLOGUE_DEVICE u64 scale_offset(u32 t, u32 c, u32 column_stride) const {
    const u32 k = c / kVectorsPerGroup, tiles = (groups() + 3) / 4;
    const u64 in_row = static_cast<u64>(t) * groups() + k, in_column = static_cast<u64>(k) * column_stride + t;
    if constexpr (!kScaleBytes)
      return (C::kLayout == Layout::kColumn ? in_column : in_row) * 4;
    else if constexpr (C::kLayout == Layout::kLinear)
      return in_row;
    else if constexpr (C::kLayout == Layout::k128x4)
      return ((static_cast<u64>(t / 128) * tiles + k / 4) * 128 + t % 32 * 4 + t / 32 % 4) * 4 + k % 4;
    else if constexpr (C::kLayout == Layout::k8x4)
      return ((static_cast<u64>(t / 8) * tiles + k / 4) * 8 + t % 8) * 4 + k % 4;
    else
      return (static_cast<u64>(k / 4) * column_stride + t) * 4 + k % 4;
  }
  COLLOGUE_DEVICE u8* scale_address(u32 t, u32 c) const { return p.scales + scale_offset(t, c, p.column_stride); }
  // Whether vector c is the first of its group.
  static COLLOGUE_DEVICE bool leads(u32 c) { return c % kVectorsPerGroup == 0; }

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

  // ---- padding of the scale tensor: written every time, by all threads of the grid together, whose number is a multiple of 32

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
      const u32 row = thread % 32;
      u8* chunk = tile + thread * 16;  // of rows `row`, + 32, + 64, + 96
#pragma unroll 1
      for (u32 i = thread; i < tiles * 32; i += threads, chunk += threads * 16) {
        compute_now(chunk);
        if (row >= used) store(chunk, Words{{0, 0, 0, 0}});
#pragma unroll
        for (u32 j = 1; j < 4; j++)
          if (row < used && row + 32 * j >= used) store_word(chunk + j * 4, 0u);
      }
    } else if constexpr (kScaleBytes && C::kLayout == Layout::k8x4) {
      const u32 tiles = (groups() + 3) / 4, last = tokens / 8, used = tokens % 8;
      if (used == 0) return;
      if (thread % 8 < used) return;
      u8* const tile = p.scales + static_cast<u64>(last) * tiles * 32;
#pragma unroll 1
      for (u32 i = thread; i < tiles * 8; i += threads) store_word(tile + i * 4, 0u);
    } else if constexpr (C::kLayout == Layout::kColumn) {
      const u32 columns = kFormat == Format::kFP8GroupE8M0 ? (groups() + 3) / 4 : groups(), missing = p.column_stride - tokens;
#pragma unroll 1
      for (u32 i = thread; i < columns * missing; i += threads)
        store_word(p.scales + (static_cast<u64>(i / missing) * p.column_stride + tokens + i % missing) * 4, 0u);
    }
  }

 private:
  static COLLOGUE_DEVICE u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }
  COLLOGUE_DEVICE u32 groups() const { return p.hidden / 8 / kVectorsPerGroup; }

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

  static COLLOGUE_DEVICE void encode_e4m3(Codes& codes, const float (&n)[8], float factor, u32 mask) {
#pragma unroll
    for (int i = 0; i < 2; i++)
      codes.w[i] = e4m3_word(n[4 * i] * factor, n[4 * i + 1] * factor, n[4 * i + 2] * factor, n[4 * i + 3] * factor) & mask;
  }
};

}  // namespace collogue
