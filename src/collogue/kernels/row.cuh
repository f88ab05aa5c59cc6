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
// Block sums, in shared memory, added in index order from +0. Blocks past the end hold +0.
template <int kBlocks>
COLLOGUE_DEVICE float add_blocks(u32 sums) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kBlocks; i += 4) {
    const Words v = load_shared(sums + i * 4);
#pragma unroll
    for (int j = 0; j < 4; j++) total = total + from_bits(v.w[j]);
  }
  return total;
}
template <int kBlocks>
COLLOGUE_DEVICE float largest_block(u32 amaxes) {
  float largest[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kBlocks; i += 4) {
    const Words v = load_shared(amaxes + i * 4);
#pragma unroll
    for (int j = 0; j < 4; j++) largest[j] = larger(largest[j], from_bits(v.w[j]));
  }
  return larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
}

// Takes what is worked out of a row beside the outputs here: nothing. gather.cuh has the one that sends it to every rank.
struct NoWire {
  template <class Vector>
  COLLOGUE_DEVICE void norm(int, const Vector&) const {}
  template <class Codes>
  COLLOGUE_DEVICE void codes(int, const Codes&) const {}
};

template <class C>
struct Row {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  using Quant = Quantizer<C>;
  struct Shared {
    typename Quant::Shared quant;
    ExchangeBuffer<C, C::kNorm> squares;
    ExchangeBuffer<C, Quant::kPerRow> amax;
    u32 stopped;  // of a warp that waited for all
    u32 digest;   // compute_now()
    u32 zero;     // get_ready()
  };
  static constexpr bool kBarrierAtStart = C::kNorm || Quant::kPerRow || C::kFormat == Format::kNVFP4;
  // Bytes between the vectors of one thread in a [T, H] tensor.
  static constexpr u32 kVectorStep = 32 * kVector * D::kBytes;

  const Params& p;
  Shared& shared;
  u32 first_vector;  // of this thread
  u32 vectors;       // of a row
  float eps;
  Exchange<C, C::kNorm> squares;
  Exchange<C, Quant::kPerRow> amax;
  Quant quant;
  Packed<C::WeightD::kParts> packed_weight;  // of the only vector, loaded early
  float weight[8];                           // the same as numbers; with several vectors, of the current one
  u8 *stream, *norm;

  // What needs no result of the previous kernel: weights, scale tables, barriers, addresses.
  COLLOGUE_DEVICE Row(const Params& params, Shared& s)
      : p(params),
        shared(s),
        first_vector(keep<C>((block_in_row() * (C::kThreads / 32) + thread_index() / 32) * C::kVectors * 32 + thread_index() % 32)),
        vectors(keep<C>(p.hidden / kVector)),
        eps(keep<C>(p.eps)),
        squares(shared.squares, (p.hidden + 255) / 256, first_block()),
        amax(shared.amax, (p.hidden + 255) / 256, first_block()),
        quant(params, shared.quant) {
    if constexpr (C::kNorm && C::kVectors == 1) {
      packed_weight = load_weight(0);
      if (thread_index() == 0) shared.zero = 0;
    }
    if constexpr (kBarrierAtStart) {
      sync_block();
#if COLLOGUE_HAS_CLUSTERS
      if constexpr (C::kClustered) cluster_arrive();
#endif
    }
  }
  // Before the first finish(), once, where there is time: after the sends.
  COLLOGUE_DEVICE void get_ready() {
#if COLLOGUE_HAS_CLUSTERS
    if constexpr (kBarrierAtStart && C::kClustered) cluster_wait();
#endif
    // The assembler would widen the weights, and wait for them, in front of the sends. It cannot know that this is a zero.
    if constexpr (C::kNorm && C::kVectors == 1) {
      const u32 nothing = load_shared_word(shared_address(&shared.zero));
#pragma unroll
      for (int i = 0; i < C::WeightD::kParts; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) packed_weight.part[i].w[j] ^= nothing;
      widen_weight(packed_weight);
    }
  }

  // Index of this thread's vector i in the row; vectors of a warp are consecutive.
  COLLOGUE_DEVICE u32 vector(int i) const { return first_vector + i * 32; }
  COLLOGUE_DEVICE bool active(int i) const { return vector(i) < vectors; }
  // Of 256 elements, of this warp.
  COLLOGUE_DEVICE u32 first_block() const { return first_vector / 32; }
  COLLOGUE_DEVICE u64 offset(u32 t) const { return (static_cast<u64>(t) * p.hidden + vector(0) * 8) * D::kBytes; }
  // Vector i of the row whose first vector of this thread lies at `first`; zeros past the end of the row.
  COLLOGUE_DEVICE Vector load(const u8* first, int i) const {
    Vector v{};
    if (active(i)) v = load_vector<D>(first + i * kVectorStep);
    return v;
  }

  // Works out where the outputs of row t go, now: a load of an address must not stand in the way of a result later. `stream_row`: of
  // the stream's tensor.
  COLLOGUE_DEVICE void aim(u32 t) { aim(t, t); }
  COLLOGUE_DEVICE void aim(u32 t, u32 stream_row) {
    if constexpr (C::kStream) {
      stream = p.stream + offset(stream_row);
      compute_now(stream);
    }
    if constexpr (C::kKeepNorm) {
      norm = p.norm + offset(t);
      compute_now(norm);
    }
    quant.aim(t, vector(0));
  }

  // The same where the row is already finished and only has to be put in its place.
  COLLOGUE_DEVICE void aim_finished(u32 t) {
    if constexpr (C::kKeepNorm) norm = p.norm + offset(t);
    quant.aim(t, vector(0));
  }

  // `sum`: the terms of vector i of row t, added in rank order. Rounds, stores and returns the stream y.
  COLLOGUE_DEVICE Vector store_stream(int i, const float (&sum)[8]) const {
    const Vector y = D::round(sum);
    store_rounded(i, y);
    return y;
  }
  COLLOGUE_DEVICE void store_rounded(int i, const Vector& y) const {
    if constexpr (C::kStream)
      if (active(i)) store_vector<D>(stream + i * kVectorStep, y);
  }
  COLLOGUE_DEVICE void store_norm(int i, const Vector& n) const {
    if (active(i)) store_vector<D>(norm + i * kVectorStep, n);
  }

  // From y to everything else. `turn` counts the rows this CTA has done. `meanwhile` is done once, while the row sum travels.
  // `wire` gets the norm and the codes of every vector. All threads of the row.
  template <class Meanwhile, class Wire>
  COLLOGUE_DEVICE void finish(u32 turn, Vector (&y)[C::kVectors], Meanwhile meanwhile, const Wire& wire) {
    if constexpr (C::kNorm)
      normalise(turn, y, meanwhile, wire);
    else
      meanwhile();
    if constexpr (C::kFormat != Format::kNone) quantise(turn, y, wire);
  }

  // Between two rows of one CTA: exchange buffers are used again two turns later, so no warp may fall two turns behind. The CTAs of a
  // cluster wait for each other where no sum of the row makes them: those that drift apart are an eighth slower (docs/large.md).
  COLLOGUE_DEVICE void next() const {
#if COLLOGUE_HAS_CLUSTERS
    // Orders nothing in shared memory: groups that are reduced there lie in one CTA.
    static_assert(!(C::kClustered && Quant::kGroupInBlock));
    if constexpr (C::kClustered && !C::kNorm && !Quant::kPerRow) {
      cluster_arrive();
      cluster_wait();
      return;
    }
#endif
    sync_block();
  }

 private:
  // On entry `row` holds the stream, on return the rounded norm. Vectors past the end of the row are zeros and add nothing.
  template <class Meanwhile, class Wire>
  COLLOGUE_DEVICE void normalise(u32 turn, Vector (&row)[C::kVectors], Meanwhile meanwhile, const Wire& wire) {
    float y[8];
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      D::widen(row[i], y);
      squares.send(turn, first_block(), i, fold_lanes(lane_sum(y)));
    }
    meanwhile();
    const float total = add_blocks<C::kBlocks>(squares.wait(turn));
    const float rstd = reciprocal(square_root(total / static_cast<float>(p.hidden) + eps));
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      D::widen(row[i], y);
      if constexpr (C::kVectors > 1) widen_weight(load_weight(i));
#pragma unroll
      for (int j = 0; j < 8; j++) y[j] = (y[j] * rstd) * weight[j];
      row[i] = D::round(y);
      if constexpr (C::kKeepNorm) {
        store_norm(i, row[i]);
        wire.norm(i, row[i]);
      }
    }
  }
  COLLOGUE_DEVICE auto load_weight(int i) const {
    using W = typename C::WeightD;
    Packed<W::kParts> packed{};
    if (active(i)) packed = load_vector<W>(p.weight + static_cast<u64>(vector(i)) * 8 * W::kBytes);
    return packed;
  }
  COLLOGUE_DEVICE void widen_weight(const Packed<C::WeightD::kParts>& packed) {
    C::WeightD::widen(packed, weight);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      weight[j] = weight[j] + p.weight_offset;
      if constexpr (C::kVectors == 1) compute_now(weight[j]);
    }
  }

  template <class Wire>
  COLLOGUE_DEVICE void quantise(u32 turn, const Vector (&n)[C::kVectors], const Wire& wire) {
    float row_amax = 0.0f;
    if constexpr (Quant::kPerRow) {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) {
        float a = largest_magnitude<D>(n[i]);
#pragma unroll
        for (int distance = 16; distance; distance /= 2) a = larger(a, exchange_lanes(a, distance));
        amax.send(turn, first_block(), i, a);
      }
      row_amax = largest_block<C::kBlocks>(amax.wait(turn));
    }
    if constexpr (Quant::kGroupInBlock) {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) quant.share_amax(vector(i), active(i), largest_magnitude<D>(n[i]));
      sync_block();
    }
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      float a = row_amax;
      if constexpr (Quant::kGroupInWarp) a = Quant::group_amax(largest_magnitude<D>(n[i]));
      if constexpr (Quant::kGroupInBlock) a = quant.shared_group_amax(vector(i), active(i));
      const auto codes = quant.encode(n[i], a);
      quant.write(codes, i, vector(i), active(i));
      wire.codes(i, codes);
    }
  }
};

}  // namespace collogue
