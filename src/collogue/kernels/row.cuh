// One row: from the sum of its terms to everything that is stored. The fixed order of the contract; no memory but outputs.
#pragma once
#include "quantize.cuh"

namespace collogue {

// The square of eight elements, added one after the other.
COLLOGUE_DEVICE float lane_sum(const float (&y)[8]) {
  float s = y[0] * y[0];
#pragma unroll
  for (int i = 1; i < 8; i++) s = s + y[i] * y[i];
  return s;
}
// 32 lane sums folded by halves; every lane gets the block's sum.
COLLOGUE_DEVICE float fold_lanes(float s) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) s = s + exchange_lanes(s, distance);
  return s;
}
// Block sums added in index order from +0. Blocks past the end hold +0.
template <int kBlocks>
COLLOGUE_DEVICE float add_blocks(const float* sums) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kBlocks; i += 4) {
    const Words v = *reinterpret_cast<const Words*>(sums + i);
#pragma unroll
    for (int j = 0; j < 4; j++) total = total + from_bits(v.w[j]);
  }
  return total;
}
template <int kBlocks>
COLLOGUE_DEVICE float largest_block(const float* amaxes) {
  float largest[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kBlocks; i += 4) {
    const Words v = *reinterpret_cast<const Words*>(amaxes + i);
#pragma unroll
    for (int j = 0; j < 4; j++) largest[j] = larger(largest[j], from_bits(v.w[j]));
  }
  return larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
}

template <class C>
struct Row {
  using D = typename C::D;
  using Exchange = RowExchange<C::kBlocks, C::kClustered>;
  using Quant = Quantizer<C>;
  struct Shared {
    typename Quant::Shared quant;
    Exchange squares;
    Exchange amax;
  };
  static constexpr bool kBarrierAtStart = C::kNorm || C::kFormat == Format::kFP8PerToken || C::kFormat == Format::kNVFP4;

  const Params& p;
  Shared& shared;
  Quant quant;
  u32 first_block;  // of this warp
  float weight[8];  // of the only vector, loaded early; with several vectors, of the current one

  COLLOGUE_DEVICE Row(const Params& params, Shared& s) : p(params), shared(s), quant(params, s.quant) {
    first_block = (block_in_row() * (C::kThreads / 32) + thread_index() / 32) * C::kVectors;
  }
  // Index of this thread's vector i in the row; vectors of a warp are consecutive.
  COLLOGUE_DEVICE u32 vector(int i) const { return (first_block + i) * 32 + (thread_index() & 31u); }
  COLLOGUE_DEVICE bool active(int i) const { return vector(i) * 8 < p.hidden; }
  COLLOGUE_DEVICE u64 offset(u32 t, int i) const { return (static_cast<u64>(t) * p.hidden + vector(i) * 8) * D::kBytes; }
  // This thread's first vector of row t of a [T, H] tensor; its vector i lies i * kVectorStep bytes further.
  static constexpr u32 kVectorStep = 32 * kVector * D::kBytes;
  COLLOGUE_DEVICE const u8* at(const u8* tensor, u32 t) const { return tensor + offset(t, 0); }
  // Zeros past the end of the row.
  COLLOGUE_DEVICE Packed<D::kParts> load(const u8* first, int i) const {
    Packed<D::kParts> v{};
    if (active(i)) v = load_vector<D>(first + i * kVectorStep);
    return v;
  }
  COLLOGUE_DEVICE u32 blocks() const { return (p.hidden + 255) / 256; }

  // What needs no result of the previous kernel: weights, scale tables, barriers.
  COLLOGUE_DEVICE void init() {
    if constexpr (C::kNorm) {
      if constexpr (C::kVectors == 1) load_weight(0, weight);
      shared.squares.init(blocks());
    }
    if constexpr (Quant::kPerRow) shared.amax.init(blocks());
    quant.init();
    if constexpr (kBarrierAtStart) {
      sync_block();
#if COLLOGUE_HAS_CLUSTERS
      if constexpr (C::kClustered) cluster_arrive();
#endif
    }
  }

  // `sum`: the terms of vector i of row t, added in rank order. Rounds, stores and returns the stream y.
  COLLOGUE_DEVICE Packed<D::kParts> store_stream(u32 t, int i, const float (&sum)[8]) const {
    const Packed<D::kParts> y = D::round(sum);
    if (active(i)) store_vector<D>(p.stream + offset(t, i), y);
    return y;
  }

  // From y to everything else. `turn` counts the rows this CTA has done. All threads of the row.
  COLLOGUE_DEVICE void finish(u32 t, u32 turn, Packed<D::kParts> (&y)[C::kVectors]) {
#if COLLOGUE_HAS_CLUSTERS
    if constexpr (kBarrierAtStart && C::kClustered)
      if (turn == 0) cluster_wait();
#endif
    if constexpr (C::kNorm) normalise(t, turn, y);
    if constexpr (C::kFormat != Format::kNone) quantise(t, turn, y);
  }

  // Between two rows of one CTA: exchange buffers are used again two turns later, so no warp may fall two turns behind.
  COLLOGUE_DEVICE void next() { sync_block(); }

 private:
  // On entry `row` holds the stream, on return the rounded norm.
  COLLOGUE_DEVICE void normalise(u32 t, u32 turn, Packed<D::kParts> (&row)[C::kVectors]) {
    float y[8];
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      D::widen(row[i], y);
      const float s = fold_lanes(active(i) ? lane_sum(y) : 0.0f);
      if (first_block + i < blocks()) shared.squares.send(turn, first_block + i, s);
    }
    const float total = add_blocks<C::kBlocks>(shared.squares.wait(turn, blocks()));
#ifdef EXP_RCP
    const float width = static_cast<float>(p.hidden), inverse = reciprocal(width);
    float mean = total * inverse;
    mean = fused_multiply_add(fused_multiply_add(-mean, width, total), inverse, mean);
    if (!(mean >= 1e-30f && mean <= 1e30f)) mean = total / width;
    const float rstd = reciprocal(square_root(mean + p.eps));
#else
    const float rstd = reciprocal(square_root(total / static_cast<float>(p.hidden) + p.eps));
#endif
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      D::widen(row[i], y);
      if constexpr (C::kVectors > 1) load_weight(i, weight);
#pragma unroll
      for (int j = 0; j < 8; j++) y[j] = (y[j] * rstd) * weight[j];
      row[i] = D::round(y);
      if constexpr (C::kKeepNorm)
        if (active(i)) store_vector<D>(p.norm + offset(t, i), row[i]);
    }
  }
  COLLOGUE_DEVICE void load_weight(int i, float (&w)[8]) const {
    using W = typename C::WeightD;
    Packed<W::kParts> packed{};
    if (active(i)) packed = load_vector<W>(p.weight + static_cast<u64>(vector(i)) * 8 * W::kBytes);
    W::widen(packed, w);
#pragma unroll
    for (int j = 0; j < 8; j++) w[j] = w[j] + p.weight_offset;
  }

  COLLOGUE_DEVICE void quantise(u32 t, u32 turn, const Packed<D::kParts> (&n)[C::kVectors]) {
    float row_amax = 0.0f;
    if constexpr (Quant::kPerRow) {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) {
        float a = active(i) ? largest_magnitude<D>(n[i]) : 0.0f;
#pragma unroll
        for (int distance = 16; distance; distance /= 2) a = larger(a, exchange_lanes(a, distance));
        if (first_block + i < blocks()) shared.amax.send(turn, first_block + i, a);
      }
      row_amax = largest_block<C::kBlocks>(shared.amax.wait(turn, blocks()));
    }
    if constexpr (Quant::kGroupInBlock) {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) quant.share_amax(vector(i), active(i), largest_magnitude<D>(n[i]));
      sync_block();
    }
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      float amax = row_amax;
      if constexpr (Quant::kGroupInWarp) amax = Quant::group_amax(active(i) ? largest_magnitude<D>(n[i]) : 0.0f);
      if constexpr (Quant::kGroupInBlock) amax = quant.shared_group_amax(vector(i), active(i));
      quant.write(n[i], t, vector(i), active(i), amax);
    }
  }
};

}  // namespace collogue
