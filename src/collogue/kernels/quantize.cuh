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
  float scale;  // g, or 1 / s

  COLLOGUE_DEVICE Quantizer(const Params& params, Shared& s) : p(params), shared(s), scale(0.0f) {}

  // Before the barrier at the start; may run before the previous kernel has ended.
  COLLOGUE_DEVICE void init() {
    if constexpr (kFormat == Format::kNVFP4 || kFormat == Format::kFP8Static) scale = p.scale ? *p.scale : p.scale_value;
    if constexpr (kFormat == Format::kFP8Static) scale = 1.0f / scale;
    if constexpr (kFormat == Format::kNVFP4)
      for (u32 code = thread_index(); code < 128; code += thread_count()) {
        float factor = code == 127 ? from_bits(0x7fffffffu) : scale / e4m3_value(code);
        shared.factor[code] = code ? factor : 0.0f;
      }
  }

  // ---- whole-row pieces

  // Maximum over the lanes that share a group. All lanes.
  static COLLOGUE_DEVICE float group_amax(float amax) {
#pragma unroll
    for (int distance = 1; distance < C::kGroup / 8; distance *= 2) amax = larger(amax, exchange_lanes(amax, distance));
    return amax;
  }

  // One vector of eight elements at column `c * 8` of row `t`. All lanes; `active`: the vector lies in the row.
  // `amax`: of the group (block formats) or of the row (per token).
  COLLOGUE_DEVICE void write(const Packed<D::kParts>& packed, u32 t, u32 c, bool active, float amax) const {
    float n[8];
    D::widen(packed, n);
    const bool leads = active && (C::kGroup == 0 || (c * 8) % (C::kGroup ? C::kGroup : 8) == 0);
    const u32 k = C::kGroup ? c * 8 / (C::kGroup ? C::kGroup : 8) : 0;
    if constexpr (kFormat == Format::kNVFP4) {
      u32 sf = e4m3_code(scale * (amax * (1.0f / 6.0f)));
      const float factor = shared.factor[sf & 0x7fu];
      u32 w;
      if (factor > 0.0f && factor <= 3.402823466e38f)
        w = e2m1_word<D>(packed, n, factor);
      else if (sf == 0)
        w = 0;
      else
        w = e2m1_word_any_factor(n, sf & 0x80u ? -factor : factor);
      if (active) store_word(code_address(t, c), w);
      if (leads) store_scale_byte(t, k, sf);
    } else if constexpr (kMX) {
      const u32 byte = e8m0_of_amax<kCodes4 ? 2 : 8, C::kCeil>(amax);
      if constexpr (kCodes4) {
        const u32 w = e2m1_word<D>(packed, n, e8m0_inverse(byte));
        if (active) store_word(code_address(t, c), bits(amax) ? w : 0u);
      } else {
        write_e4m3(n, e8m0_inverse(byte), t, c, active, bits(amax) ? ~0u : 0u);
      }
      if (leads) store_scale_byte(t, k, byte);
    } else if constexpr (kFormat == Format::kFP8GroupE8M0) {
      const u32 byte = max_u32(e8m0_of_amax<8, true>(amax), e8m0_not_below(p.smallest));
      write_e4m3(n, e8m0_inverse(byte), t, c, active, ~0u);
      if (leads) store_scale_byte(t, k, byte);
    } else if constexpr (kFormat == Format::kFP8Static) {
      write_e4m3(n, scale, t, c, active, ~0u);
    } else {
      const float s = larger(amax / 448.0f, p.smallest);
      divide(n, s);
      write_e4m3(n, 1.0f, t, c, active, ~0u);
      if constexpr (kPerRow) {
        if (active && c == 0) reinterpret_cast<float*>(p.scales)[t] = s;
      } else {
        if (leads) reinterpret_cast<float*>(p.scales)[C::kLayout == Layout::kColumn ? k * p.column_stride + t : t * groups() + k] = s;
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

  COLLOGUE_DEVICE void pad(u32 thread, u32 threads) const {
    const u32 tokens = p.tokens;
    if constexpr (kScaleBytes && C::kLayout == Layout::k128x4) {
      if (tokens % 128 == 0) return;
      const u32 tiles = (groups() + 3) / 4, last = tokens / 128, used = tokens % 128;
      u8* const tile = p.scales + static_cast<u64>(last) * tiles * 512;
      for (u32 i = thread; i < tiles * 32; i += threads) {
        const u32 row = i & 31u;  // this chunk of 16 bytes: rows row, row + 32, + 64, + 96
        if (row >= used) {
          store(tile + i * 16, Words{{0, 0, 0, 0}});
          continue;
        }
        for (u32 j = (used - row + 31) / 32; j < 4; j++) store_word(tile + i * 16 + j * 4, 0u);
      }
    } else if constexpr (kScaleBytes && C::kLayout == Layout::k8x4) {
      const u32 tiles = (groups() + 3) / 4, last = tokens / 8, used = tokens % 8;
      if (used == 0) return;
      u8* const tile = p.scales + static_cast<u64>(last) * tiles * 32;
      for (u32 i = thread; i < tiles * 8; i += threads)
        if ((i & 7u) >= used) store_word(tile + i * 4, 0u);
    } else if constexpr (C::kLayout == Layout::kColumn) {
      const u32 columns = kFormat == Format::kFP8GroupE8M0 ? (groups() + 3) / 4 : groups(), missing = p.column_stride - tokens;
      for (u32 i = thread; i < columns * missing; i += threads)
        store_word(p.scales + (static_cast<u64>(i / missing) * p.column_stride + tokens + i % missing) * 4, 0u);
    }
  }

 private:
  static constexpr bool kScaleBytes = kFormat == Format::kNVFP4 || kMX || kFormat == Format::kFP8GroupE8M0;

  static COLLOGUE_DEVICE u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }
  static COLLOGUE_DEVICE void store_word(u8* address, u32 w) { *reinterpret_cast<u32*>(address) = w; }
  COLLOGUE_DEVICE u32 groups() const { return p.hidden / (C::kGroup ? C::kGroup : 1); }
  COLLOGUE_DEVICE u8* code_address(u32 t, u32 c) const { return p.codes + (static_cast<u64>(t) * (p.hidden / 8) + c) * (kCodes4 ? 4 : 8); }

  // n / s with one reciprocal and a correction: the bits of the division for every n and every s in between (docs/contract.md).
  static COLLOGUE_DEVICE void divide(float (&n)[8], float s) {
    if (s >= 1e-30f && s <= 1e30f) {
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

  COLLOGUE_DEVICE void write_e4m3(const float (&n)[8], float factor, u32 t, u32 c, bool active, u32 mask) const {
    u32 w[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
      w[i] = e4m3_word(n[4 * i] * factor, n[4 * i + 1] * factor, n[4 * i + 2] * factor, n[4 * i + 3] * factor) & mask;
    if (active) *reinterpret_cast<uint2*>(code_address(t, c)) = make_uint2(w[0], w[1]);
  }

  // Scale byte k of row t, and the zero bytes that pad its word if it is the row's last.
  COLLOGUE_DEVICE void store_scale_byte(u32 t, u32 k, u32 byte) const {
    if constexpr (C::kLayout == Layout::kLinear) {
      p.scales[static_cast<u64>(t) * groups() + k] = static_cast<u8>(byte);
    } else {
      const u32 tiles = (groups() + 3) / 4, column = k / 4;
      u64 word;
      if constexpr (C::kLayout == Layout::k128x4)
        word = (static_cast<u64>(t / 128) * tiles + column) * 128 + (t & 31u) * 4 + ((t / 32) & 3u);
      else if constexpr (C::kLayout == Layout::k8x4)
        word = (static_cast<u64>(t / 8) * tiles + column) * 8 + (t & 7u);
      else
        word = static_cast<u64>(column) * p.column_stride + t;
      u8* const address = p.scales + word * 4;
      address[k & 3u] = static_cast<u8>(byte);
      if (k + 1 == groups())
        for (u32 i = (k & 3u) + 1; i < 4; i++) address[i] = 0;
    }
  }
};

}  // namespace collogue
