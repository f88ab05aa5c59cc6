// The value dtypes: eight consecutive elements of a row as packed words, and as floats. No memory, no ranks.
#pragma once
#include "ptx.cuh"

namespace collogue {

// Elements of a row that one thread handles together.
constexpr int kVector = 8;

template <int kWords>
struct Packed {
  Words part[kWords];  // 16 bytes each
};

struct BFloat16 {
  static constexpr int kBytes = 2, kParts = 1;
  static constexpr u32 kSentinel = 0x80008000u;  // two negative zeros: no legal pair of a sum's terms
  static COLLOGUE_DEVICE void widen(const Packed<1>& v, float (&f)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      f[2 * i] = from_bits(v.part[0].w[i] << 16);
      f[2 * i + 1] = from_bits(v.part[0].w[i] & 0xffff0000u);
    }
  }
  static COLLOGUE_DEVICE Packed<1> round(const float (&f)[8]) {
    Packed<1> v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.part[0].w[i] = clear_negative_zero_bf16_pair(round_bf16_pair(f[2 * i], f[2 * i + 1]));
    return v;
  }
  static COLLOGUE_DEVICE u32 larger_pair(u32 a, u32 b) { return larger_bf16_pair(a, b); }
  static COLLOGUE_DEVICE void widen_pair(u32 x, float& low, float& high) {
    low = from_bits(x << 16);
    high = from_bits(x & 0xffff0000u);
  }
};

struct Float16 {
  static constexpr int kBytes = 2, kParts = 1;
  static constexpr u32 kSentinel = 0x80008000u;
  static COLLOGUE_DEVICE void widen(const Packed<1>& v, float (&f)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) widen_f16_pair(v.part[0].w[i], f[2 * i], f[2 * i + 1]);
  }
  static COLLOGUE_DEVICE Packed<1> round(const float (&f)[8]) {
    Packed<1> v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.part[0].w[i] = clear_negative_zero_f16_pair(round_f16_pair(f[2 * i], f[2 * i + 1]));
    return v;
  }
  static COLLOGUE_DEVICE u32 larger_pair(u32 a, u32 b) { return larger_f16_pair(a, b); }
  static COLLOGUE_DEVICE void widen_pair(u32 x, float& low, float& high) { widen_f16_pair(x, low, high); }
};

struct Float32 {
  static constexpr int kBytes = 4, kParts = 2;
  static constexpr u32 kSentinel = 0x80000000u;
  static COLLOGUE_DEVICE void widen(const Packed<2>& v, float (&f)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) f[i] = from_bits(v.part[i / 4].w[i % 4]);
  }
  static COLLOGUE_DEVICE Packed<2> round(const float (&f)[8]) {
    Packed<2> v;
#pragma unroll
    for (int i = 0; i < 8; i++) v.part[i / 4].w[i % 4] = bits(f[i] + 0.0f);  // -0 becomes +0
    return v;
  }
};

template <class D>
COLLOGUE_DEVICE Packed<D::kParts> load_vector(const u8* p) {
  Packed<D::kParts> v;
#pragma unroll
  for (int i = 0; i < D::kParts; i++) v.part[i] = load(p + 16 * i);
  return v;
}
template <class D>
COLLOGUE_DEVICE void store_vector(u8* p, const Packed<D::kParts>& v) {
#pragma unroll
  for (int i = 0; i < D::kParts; i++) store(p + 16 * i, v.part[i]);
}

// One value that every thread of a row reads.
template <class D>
COLLOGUE_DEVICE float load_value(const u8* p) {
  if constexpr (D::kBytes == 4) {
    return from_bits(load_input_word(reinterpret_cast<const u32*>(p)));
  } else {
    float low, high;
    D::widen_pair(load_input_half(p), low, high);
    return low;
  }
}

// sum = sum + v, element by element.
template <class D>
COLLOGUE_DEVICE void add(float (&sum)[8], const Packed<D::kParts>& v) {
  float f[8];
  D::widen(v, f);
#pragma unroll
  for (int j = 0; j < 8; j++) sum[j] = sum[j] + f[j];
}

// sum = v. The contract starts from +0: the same value, and a -0 or a NaN's payload is gone after rounding.
template <class D>
COLLOGUE_DEVICE void begin(float (&sum)[8], const Packed<D::kParts>& v) {
  D::widen(v, sum);
}

// The largest magnitude of eight rounded values; NaN is ignored, all NaN gives 0.
template <class D>
COLLOGUE_DEVICE float largest_magnitude(const Packed<D::kParts>& v) {
  if constexpr (D::kBytes == 2) {
    u32 a[4];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = v.part[0].w[i] & 0x7fff7fffu;
    float low, high;
    D::widen_pair(D::larger_pair(D::larger_pair(a[0], a[1]), D::larger_pair(a[2], a[3])), low, high);
    return larger(larger(low, high), 0.0f);
  } else {
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) m = larger(m, from_bits(v.part[i / 4].w[i % 4] & 0x7fffffffu));
    return m;
  }
}

// The sign of each of eight values, at bit 4 * i + 3.
template <class D>
COLLOGUE_DEVICE u32 signs(const Packed<D::kParts>& v) {
  u32 s = 0;
  if constexpr (D::kBytes == 2) {
    const Words& a = v.part[0];
    s = ((a.w[0] >> 12) & 0x8u) | ((a.w[0] >> 24) & 0x80u) | ((a.w[1] >> 4) & 0x800u) | ((a.w[1] >> 16) & 0x8000u) |
        ((a.w[2] << 4) & 0x80000u) | ((a.w[2] >> 8) & 0x800000u) | ((a.w[3] << 12) & 0x8000000u) | (a.w[3] & 0x80000000u);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) s |= (v.part[i / 4].w[i % 4] >> 31) << (4 * i + 3);
  }
  return s;
}

}  // namespace collogue
