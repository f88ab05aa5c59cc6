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

// Where one row lies: this thread's part of it, and of every output. Enough for rows that are only moved.
template <class C>
struct RowPlace {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  // Bytes between the vectors of one thread in a [T, H] tensor.
  static constexpr u32 kVectorStep = 32 * kVector * D::kBytes;

  const Params& p;
  u32 first_vector;  // of this thread
  u32 vectors;       // of a row
  CodePlace<C> codes;
  u8 *stream, *norm;

  COLLOGUE_DEVICE explicit RowPlace(const Params& params)
      : p(params),
        first_vector(keep_if_room<C>((block_in_row() * (C::kThreads / 32) + thread_index() / 32) * C::kVectors * 32 + thread_index() % 32)),
        vectors(keep_if_room<C>(p.hidden / kVector)),
        codes{params} {}

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
    codes.aim(t, vector(0));
  }
  // The same where the row is already finished and only has to be put in its place.
  COLLOGUE_DEVICE void aim_finished(u32 t) {
    if constexpr (C::kKeepNorm) norm = p.norm + offset(t);
    codes.aim(t, vector(0));
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

  // Rows that are only moved ask for nothing and need nothing (opening.cuh).
  COLLOGUE_DEVICE void ask() {}
  COLLOGUE_DEVICE void get_ready() {}
};

// The mathematics of one row.
template <class C>
struct Row : RowPlace<C> {
  using Place = RowPlace<C>;
  using typename Place::D;
  using typename Place::Vector;
  using Format = typename C::Format;
  using G = Groups<Format>;
  struct Shared {
    typename Quantizer<C>::Shared quant;
    ExchangeBuffer<C, C::kNorm> squares;
    ExchangeBuffer<C, C::kBranch> branch_squares;
    ExchangeBuffer<C, G::kPerRow> amax;
    u32 digest;  // compute_now()
    u32 zero;    // get_ready()
  };
  static constexpr bool kBarrierAtStart = C::kNorm || C::kBranch || G::kPerRow || Format::kFillsShared;
  // The weight is loaded once, before its turn: one vector, or two of 16-bit values. More are loaded for each row.
  static constexpr bool kWeightAhead = C::kNorm && C::kVectors * C::WeightD::kParts <= 2;

  using Place::p;
  Shared& shared;
  float eps;
  Exchange<C, C::kNorm> squares;
  Exchange<C, C::kBranch> branch_squares;
  Exchange<C, G::kPerRow> amax;
  Quantizer<C> quant;
  Packed<C::WeightD::kParts> packed_weight[kWeightAhead ? C::kVectors : 1];
  float weight[8];  // as numbers: of the only vector, or of the current one

  // What needs nothing that a kernel may just have written: tables of given numbers, barriers, addresses, and the weights unless they
  // are to be read late.
  COLLOGUE_DEVICE Row(const Params& params, Shared& s)
      : Place(params),
        shared(s),
        eps(keep_if_room<C>(p.eps)),
        squares(shared.squares, (p.hidden + 255) / 256, Place::first_block()),
        branch_squares(shared.branch_squares, (p.hidden + 255) / 256, Place::first_block()),
        amax(shared.amax, (p.hidden + 255) / 256, Place::first_block()),
        quant{shared.quant, {}} {
    quant.format.template prepare<C>(p, shared.quant.format);
    if constexpr (kWeightAhead) {
      if constexpr (!C::kLateWeight) load_weights();
      if (thread_index() == 0) shared.zero = 0;
    }
    if constexpr (kBarrierAtStart) {
      sync_block();
#if COLLOGUE_HAS_CLUSTERS
      if constexpr (C::kClustered) cluster_arrive();
#endif
    }
  }
  // With the inputs, behind wait_for_previous_kernel(): what a kernel may just have written.
  COLLOGUE_DEVICE void ask() {
    if constexpr (kWeightAhead && C::kLateWeight) load_weights();
    quant.format.ask(p);
  }
  // Before the first finish(), once, where there is time: after the sends.
  COLLOGUE_DEVICE void get_ready() {
#if COLLOGUE_HAS_CLUSTERS
    if constexpr (kBarrierAtStart && C::kClustered) cluster_wait();
#endif
    quant.format.template get_ready<C>(p, shared.quant.format);
    // The assembler would widen the weights, and wait for them, in front of the sends. It cannot know that this is a zero.
    if constexpr (kWeightAhead && C::kVectors == 1) {
      const u32 nothing = load_shared_word(shared_address(&shared.zero));
#pragma unroll
      for (int i = 0; i < C::WeightD::kParts; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) packed_weight[0].part[i].w[j] ^= nothing;
      widen_weight(packed_weight[0]);
    }
  }

  // From the rounded sum `x` to the stream y, which is stored and stands in `x` then: a norm of its own, rounded, and the residual.
  // `residual(i)`: of vector i. All threads of the row.
  template <class Residual>
  COLLOGUE_DEVICE void join(u32 turn, Vector (&x)[C::kVectors], Residual residual) {
    float f[8], w[8];
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      D::widen(x[i], f);
      branch_squares.send(turn, this->first_block(), i, fold_lanes(lane_sum(f)));
    }
    const float total = add_blocks<C::kBlocks>(branch_squares.wait(turn));
    const float rstd = reciprocal(square_root(total / static_cast<float>(p.hidden) + p.branch_eps));
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      using W = typename C::BranchWeightD;
      Packed<W::kParts> packed{};
      if (this->active(i)) packed = load_vector<W>(p.branch_weight + static_cast<u64>(this->vector(i)) * 8 * W::kBytes);
      W::widen(packed, w);
      D::widen(x[i], f);
#pragma unroll
      for (int j = 0; j < 8; j++) f[j] = (f[j] * rstd) * (w[j] + p.branch_offset);
      x[i] = D::round(f);
      D::widen(x[i], f);
      add<D>(f, residual(i));
      x[i] = this->store_stream(i, f);
    }
  }

  // From y to everything else. `turn` counts the rows this CTA has done. `meanwhile` is done once, while the row sum travels.
  // `wire` gets the norm and the codes of every vector. All threads of the row.
  template <class Meanwhile, class Wire>
  COLLOGUE_DEVICE void finish(u32 turn, Vector (&y)[C::kVectors], Meanwhile meanwhile, const Wire& wire) {
    if constexpr (C::kNorm)
      normalize(turn, y, meanwhile, wire);
    else
      meanwhile();
    if constexpr (Format::kCodeBytes != 0) quantize(turn, y, wire);
  }

  // Between two rows of one CTA: exchange buffers are used again two turns later, so no warp may fall two turns behind. The CTAs of a
  // cluster wait for each other where no sum of the row makes them: those that drift apart are an eighth slower (docs/large.md).
  COLLOGUE_DEVICE void next() const {
#if COLLOGUE_HAS_CLUSTERS
    // Orders nothing in shared memory: groups that are reduced there lie in one CTA.
    static_assert(!(C::kClustered && G::kInBlock));
    if constexpr (C::kClustered && !C::kNorm && !C::kBranch && !G::kPerRow) {
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
  COLLOGUE_DEVICE void normalize(u32 turn, Vector (&row)[C::kVectors], Meanwhile meanwhile, const Wire& wire) {
    float y[8];
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      D::widen(row[i], y);
      squares.send(turn, this->first_block(), i, fold_lanes(lane_sum(y)));
    }
    meanwhile();
    const float total = add_blocks<C::kBlocks>(squares.wait(turn));
    const float rstd = reciprocal(square_root(total / static_cast<float>(p.hidden) + eps));
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      D::widen(row[i], y);
      if constexpr (C::kVectors > 1) widen_weight(kWeightAhead ? packed_weight[kWeightAhead ? i : 0] : load_weight(i));
#pragma unroll
      for (int j = 0; j < 8; j++) y[j] = (y[j] * rstd) * weight[j];
      row[i] = D::round(y);
      if constexpr (C::kKeepNorm) {
        this->store_norm(i, row[i]);
        wire.norm(i, row[i]);
      }
    }
  }
  COLLOGUE_DEVICE void load_weights() {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) packed_weight[i] = load_weight(i);
  }
  COLLOGUE_DEVICE auto load_weight(int i) const {
    using W = typename C::WeightD;
    Packed<W::kParts> packed{};
    if (this->active(i)) packed = load_vector<W>(p.weight + static_cast<u64>(this->vector(i)) * 8 * W::kBytes);
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
  COLLOGUE_DEVICE void quantize(u32 turn, const Vector (&n)[C::kVectors], const Wire& wire) {
    float row_amax = 0.0f;
    if constexpr (G::kPerRow) {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) {
        float a = largest_magnitude<D>(n[i]);
#pragma unroll
        for (int distance = 16; distance; distance /= 2) a = larger(a, exchange_lanes(a, distance));
        amax.send(turn, this->first_block(), i, a);
      }
      row_amax = largest_block<C::kBlocks>(amax.wait(turn));
    }
    if constexpr (G::kInBlock) {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) quant.share_amax(this->vector(i), this->active(i), largest_magnitude<D>(n[i]));
      sync_block();
    }
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      float a = row_amax;
      if constexpr (G::kInWarp) a = Quantizer<C>::group_amax(largest_magnitude<D>(n[i]));
      if constexpr (G::kInBlock) a = quant.shared_group_amax(this->vector(i), this->active(i));
      const auto codes = quant.format.template encode<D>(p, n[i], a);
      this->codes.write(codes, i, this->vector(i), this->active(i));
      wire.codes(i, codes);
    }
  }
};

}  // namespace collogue
