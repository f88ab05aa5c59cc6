// Codes and scales of a row: where they go, and how the elements that share a scale find their largest magnitude. What is done with it
// is the format's (format.cuh). Knows nothing of ranks.
#pragma once
#include "format.cuh"
#include "layouts.cuh"

namespace collogue {

// Which elements share a scale.
template <class Format>
struct Groups {
  static constexpr u32 kVectors = Format::kGroup ? Format::kGroup / 8 : 1;  // of a group
  static constexpr bool kPerRow = Format::kScaleBytes != 0 && Format::kGroup == 0;
  // A group lies within a warp's 256 elements and is a power of two: its maximum is a few shuffles away.
  static constexpr bool kInWarp = Format::kGroup && 256 % (Format::kGroup ? Format::kGroup : 1) == 0;
  static constexpr bool kInBlock = Format::kGroup && !kInWarp;
  // Whether vector c is the one whose thread stores the scale.
  static COLLOGUE_DEVICE bool leads(u32 c) { return kPerRow ? c == 0 : c % kVectors == 0; }
};

// Where the codes and the scales of a row go.
template <class C>
struct CodePlace {
  using Format = typename C::Format;
  using Layout = typename C::Layout;
  using G = Groups<Format>;

  const Params& p;
  u32 token;
  u8 *codes, *scales;  // of this thread's first vector

  // Works out where the codes and the scale of vector `c` (this thread's first) of row t go, now.
  COLLOGUE_DEVICE void aim(u32 t, u32 c) {
    if constexpr (Format::kCodeBytes != 0) {
      token = t;
      codes = p.codes + (static_cast<u64>(t) * (p.hidden / 8) + c) * Format::kCodeBytes;
      compute_now(codes);
    }
    if constexpr (Format::kGroup != 0) {
      scales = scale_address(t, c);
      compute_now(scales);
    }
  }
  // Stores vector `c`, this thread's i-th, of the row that aim() named. `active`: the vector lies in the row.
  COLLOGUE_DEVICE void write(const Codes<Format::kCodeBytes>& v, int i, u32 c, bool active) const {
    if (!active) return;
    u8* const code = codes + i * 32 * Format::kCodeBytes;
    if constexpr (Format::kCodeBytes == 4)
      store_word(code, v.w[0]);
    else
      *reinterpret_cast<uint2*>(code) = make_uint2(v.w[0], v.w[1]);
    if constexpr (G::kPerRow) {
      if (c == 0) reinterpret_cast<u32*>(p.scales)[token] = v.scale;
    } else if constexpr (Format::kGroup != 0) {
      if (!G::leads(c)) return;
      u8* const place = C::kVectors == 1 ? scales : scale_address(token, c);
      if constexpr (Format::kScaleBytes == 1)
        *place = static_cast<u8>(v.scale);
      else
        store_word(place, v.scale);
    }
  }
  // Of the scale of vector c of row t in its tensor, in bytes.
  COLLOGUE_DEVICE u64 scale_offset(u32 t, u32 c, u32 column_stride) const {
    if constexpr (G::kPerRow) return static_cast<u64>(t) * 4;
    return Layout::offset(t, c / G::kVectors, groups(), column_stride);
  }
  COLLOGUE_DEVICE u8* scale_address(u32 t, u32 c) const { return p.scales + scale_offset(t, c, p.column_stride); }
  COLLOGUE_DEVICE u32 groups() const { return p.hidden / 8 / G::kVectors; }

  // The padding of a scale tensor of so many rows, by all threads of the grid together; none for 0.
  COLLOGUE_DEVICE void pad(u32 rows, u32 thread, u32 threads) const {
    if constexpr (Format::kGroup != 0)
      if (rows) Layout::pad(p.scales, rows, groups(), p.column_stride, thread, threads);
  }
};

// From the rounded norm to codes and scales.
template <class C>
struct Quantizer {
  using D = typename C::D;
  using Format = typename C::Format;
  using G = Groups<Format>;
  struct Shared {
    typename Format::Shared format;
    float unit_amax[G::kInBlock ? C::kBlocks * 16 : 1];  // of every 16 elements of the row
  };

  Shared& shared;
  Format format;

  // The largest magnitude of the group of each vector that this thread holds, or of the row. All threads of the row.
  static COLLOGUE_DEVICE float group_amax(float amax) {
#pragma unroll
    for (int distance = 1; distance < Format::kGroup / 8; distance *= 2) amax = larger(amax, exchange_lanes(amax, distance));
    return amax;
  }
  // Groups that a warp does not hold: maxima of 16 elements through shared memory. The row lies in one CTA.
  COLLOGUE_DEVICE void share_amax(u32 c, bool active, float amax) {
    amax = larger(amax, exchange_lanes(amax, 1));
    if (active && (c & 1u) == 0) shared.unit_amax[c / 2] = amax;
  }
  COLLOGUE_DEVICE float shared_group_amax(u32 c, bool active) const {
    constexpr u32 units = Format::kGroup / 16;
    float amax = 0.0f;
    if (active) {
      const u32 first = c / 2 / units * units;
      for (u32 i = 0; i < units; i++) amax = larger(amax, shared.unit_amax[first + i]);
    }
    return amax;
  }
};

}  // namespace collogue
