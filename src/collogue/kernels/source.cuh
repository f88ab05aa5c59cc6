// Where a thread's term of the sum comes from. A source is a type, named by Config::Source:
//   kWorkedOut  whether a term costs more than a load: then kernels ask for it once, in the lanes that use it
//   aim(t)      the row whose terms are asked for next
//   digest()    for compute_now(): what the first load needs
//   term(i)     this rank's term of this thread's vector i, in the dtype of the sum; zeros past the end of the row. Of several terms:
//               what begin() makes a sum of
//   terms(x)    the same for all of this thread's vectors; all 32 lanes together; only where that is another way (ask_for_terms)
// A term that is asked for twice is the same twice: nothing that it is made of changes during a call.
#pragma once
#include "activation.cuh"
#include "row.cuh"

namespace collogue {

// One tensor [T, H].
template <class C>
struct DirectSource {
  static constexpr bool kWorkedOut = false;
  const RowPlace<C>& row;
  const u8* first;  // of this thread's vectors

  COLLOGUE_DEVICE explicit DirectSource(const RowPlace<C>& r) : row(r), first(nullptr) {}
  COLLOGUE_DEVICE void aim(u32 t) { first = row.p.partial + row.offset(t); }
  COLLOGUE_DEVICE u32 digest() const { return folded(first); }
  COLLOGUE_DEVICE auto term(int i) const { return row.load(first, i); }
  COLLOGUE_DEVICE auto term(u32 t, int i) {
    aim(t);
    return term(i);
  }
};

// x[i] = term(i) for every vector. All 32 lanes together.
template <class Source, class Term, int kVectors>
COLLOGUE_DEVICE auto ask_for_terms(Source& source, Term (&x)[kVectors], int = 0) -> decltype(source.terms(x)) {
  source.terms(x);
}
template <class Source, class Term, int kVectors>
COLLOGUE_DEVICE void ask_for_terms(Source& source, Term (&x)[kVectors], ...) {
#pragma unroll
  for (int i = 0; i < kVectors; i++) x[i] = source.term(i);
}

// The dtype of weights that there are none of: all are 1.
struct NoWeight {
  static constexpr int kBytes = 0;
};

// What both sources of experts share: rows of Params::partial, so many at a time, weighted and added in order, each operation rounded.
template <class C, class W>
struct ExpertRows {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  static constexpr int kBatch = 4 / D::kParts;
  const RowPlace<C>& row;

  // Weight `at`; 1 where there are none.
  COLLOGUE_DEVICE float weight(u64 at) const {
    if constexpr (W::kBytes == 0)
      return 1.0f;
    else
      return load_value<W>(row.p.expert_weights + at * W::kBytes);
  }
  COLLOGUE_DEVICE const u8* place(u64 of_row) const {
    return row.p.partial + (of_row * row.p.hidden + row.vector(0) * 8) * D::kBytes;
  }
  COLLOGUE_DEVICE static void add_weighted(float (&sum)[8], const Vector& x, float w) {
    float f[8];
    D::widen(x, f);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] = sum[j] + (W::kBytes == 0 ? f[j] : f[j] * w);
  }
};

// collogue.ExpertCombine: the rows that index[t, k] names, in the order of k; what names no row is skipped, and nothing is loaded.
template <class C, class W, bool kShared>
struct ExpertCombineSource : ExpertRows<C, W> {
  static constexpr bool kWorkedOut = true;
  using Rows = ExpertRows<C, W>;
  using typename Rows::D;
  using typename Rows::Vector;
  using Rows::row;
  u32 t;
  // terms(): index and weight of this lane's slot of token `asked`.
  u32 asked, named;
  float by;

  COLLOGUE_DEVICE explicit ExpertCombineSource(const RowPlace<C>& r) : Rows{r}, t(0), asked(~0u), named(~0u), by(0.0f) {}
  COLLOGUE_DEVICE void aim(u32 of) { t = of; }
  COLLOGUE_DEVICE u32 digest() const { return folded(row.p.expert_index) ^ t; }
  COLLOGUE_DEVICE Vector term(int i) const {
    float sum[8] = {};
    const u32 slots = row.p.experts;
    const u64 first = static_cast<u64>(t) * slots;
    Vector shared{};
    if constexpr (kShared) shared = row.load(row.p.shared_expert + row.offset(t), i);
#pragma unroll 1
    for (u32 k = 0; k < slots; k += Rows::kBatch) {
      u32 named[Rows::kBatch];
      float w[Rows::kBatch];
      Vector x[Rows::kBatch];
#pragma unroll
      for (int b = 0; b < Rows::kBatch; b++) {
        named[b] = ~0u;
        w[b] = 0.0f;
        if (k + b < slots) {
          named[b] = load_input_word(row.p.expert_index + first + k + b);
          w[b] = this->weight(first + k + b);
        }
      }
#pragma unroll
      for (int b = 0; b < Rows::kBatch; b++)
        if (named[b] < row.p.expert_rows) x[b] = row.load(this->place(named[b]), i);
#pragma unroll
      for (int b = 0; b < Rows::kBatch; b++)
        if (named[b] < row.p.expert_rows) Rows::add_weighted(sum, x[b], w[b]);
    }
    return rounded(sum, shared);
  }
  COLLOGUE_DEVICE Vector term(u32 of, int i) {
    aim(of);
    return term(i);
  }
  // Index and weight of slot k are asked for by lane k, where a CTA does several tokens before the token's turn comes. So rows wait for
  // one load of theirs at most, and as many rows as registers hold are on their way together.
  COLLOGUE_DEVICE void terms(Vector (&x)[C::kVectors]) {
    if constexpr (C::kVectors * D::kParts > 4) {  // they would not fit
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) x[i] = term(i);
      return;
    }
    constexpr int kTogether = 8 / (D::kParts * C::kVectors);
    if (!C::kLoop || asked != t) ask(t);
    const u32 slots = row.p.experts, of_this = named;
    const float by_this = by;
    if constexpr (C::kLoop) ask(t + grid_rows());
    Vector shared[C::kVectors];
    float sum[C::kVectors][8] = {};
#pragma unroll
    for (int i = 0; i < C::kVectors; i++)
      if constexpr (kShared) shared[i] = row.load(row.p.shared_expert + row.offset(t), i);
#pragma unroll 1
    for (u32 k = 0; k < slots; k += kTogether) {
      Vector v[kTogether][C::kVectors];
#pragma unroll
      for (int b = 0; b < kTogether; b++) {
        const u32 of = of_lane(of_this, k + b);  // none in lanes past the last slot
        if (of < row.p.expert_rows) {
#pragma unroll
          for (int i = 0; i < C::kVectors; i++) v[b][i] = row.load(this->place(of), i);
        }
      }
#pragma unroll
      for (int b = 0; b < kTogether; b++) {
        const u32 of = of_lane(of_this, k + b);
        const float w = from_bits(of_lane(bits(by_this), k + b));
        if (of >= row.p.expert_rows) continue;
#pragma unroll
        for (int i = 0; i < C::kVectors; i++) Rows::add_weighted(sum[i], v[b][i], w);
      }
    }
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) x[i] = rounded(sum[i], shared[i]);
  }

 private:
  COLLOGUE_DEVICE void ask(u32 token) {
    const u32 slots = row.p.experts, lane = thread_index() % 32;
    const u64 slot = static_cast<u64>(token) * slots + lane;
    asked = token;
    named = ~0u;
    by = 0.0f;
    if (lane < slots && token < row.p.tokens) {
      named = load_input_word(row.p.expert_index + slot);
      by = this->weight(slot);
    }
  }
  // What is behind the sum over the slots.
  COLLOGUE_DEVICE Vector rounded(float (&sum)[8], const Vector& shared) const {
    if (row.p.scaling != 1.0f) {
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] = sum[j] * row.p.scaling;
    }
    if constexpr (kShared) add<D>(sum, shared);
    return D::round(sum);
  }
};

// collogue.ExpertReduce: row t of every expert whose weight is not 0, in order, and the token's own input.
template <class C, class W>
struct ExpertReduceSource : ExpertRows<C, W> {
  static constexpr bool kWorkedOut = true;
  using Rows = ExpertRows<C, W>;
  using typename Rows::D;
  using typename Rows::Vector;
  using Rows::row;
  u32 t;

  COLLOGUE_DEVICE explicit ExpertReduceSource(const RowPlace<C>& r) : Rows{r}, t(0) {}
  COLLOGUE_DEVICE void aim(u32 of) { t = of; }
  COLLOGUE_DEVICE u32 digest() const { return folded(row.p.expert_weights) ^ t; }
  COLLOGUE_DEVICE Vector term(int i) const {
    float sum[8] = {};
    const u32 experts = row.p.experts;
    const Vector input = row.load(row.p.shared_expert + row.offset(t), i);
#pragma unroll 1
    for (u32 e = 0; e < experts; e += Rows::kBatch) {
      float w[Rows::kBatch];
      Vector x[Rows::kBatch];
#pragma unroll
      for (int b = 0; b < Rows::kBatch; b++) {
        w[b] = 0.0f;
        if (e + b < experts) w[b] = this->weight(static_cast<u64>(e + b) * row.p.tokens + t);
      }
#pragma unroll
      for (int b = 0; b < Rows::kBatch; b++)
        if (w[b] != 0.0f) x[b] = row.load(this->place(static_cast<u64>(e + b) * row.p.tokens + t), i);
#pragma unroll
      for (int b = 0; b < Rows::kBatch; b++)
        if (w[b] != 0.0f) Rows::add_weighted(sum, x[b], w[b]);
    }
    add<D>(sum, input);
    return D::round(sum);
  }
  COLLOGUE_DEVICE Vector term(u32 of, int i) {
    aim(of);
    return term(i);
  }
};

// collogue.Gated: a product, of tensors whose rows lie Params::row_stride elements apart.
template <class C>
struct GatedSource {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  static constexpr bool kWorkedOut = true;
  const RowPlace<C>& row;
  u64 first;  // of this thread's vectors, in bytes

  COLLOGUE_DEVICE explicit GatedSource(const RowPlace<C>& r) : row(r), first(0) {}
  COLLOGUE_DEVICE void aim(u32 t) { first = (static_cast<u64>(t) * row.p.row_stride + row.vector(0) * 8) * D::kBytes; }
  COLLOGUE_DEVICE u32 digest() const { return folded(row.p.partial + first) ^ folded(row.p.up); }
  COLLOGUE_DEVICE Vector term(int i) const {
    const Vector gate = row.load(row.p.partial + first, i), up = row.load(row.p.up + first, i);
    float g[8], u[8];
    D::widen(gate, g);
    D::widen(up, u);
#pragma unroll
    for (int j = 0; j < 8; j++) g[j] = silu(g[j]) * u[j];
    return D::round(g);
  }
  COLLOGUE_DEVICE Vector term(u32 of, int i) {
    aim(of);
    return term(i);
  }
};

// A product of codes in float32, times the scales of its rows and columns, and a bias.
template <class C, bool kBias>
struct ProductSource {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  static constexpr bool kWorkedOut = true;
  const RowPlace<C>& row;
  const u8* first;  // of the row
  float by;         // the row's scale

  COLLOGUE_DEVICE explicit ProductSource(const RowPlace<C>& r) : row(r), first(nullptr), by(0.0f) {}
  COLLOGUE_DEVICE void aim(u32 t) {
    first = row.p.partial + static_cast<u64>(t) * row.p.hidden * Float32::kBytes;
    by = load_value<Float32>(row.p.row_scales + t * Float32::kBytes);
  }
  COLLOGUE_DEVICE u32 digest() const { return folded(first); }
  COLLOGUE_DEVICE Vector term(int i) const {
    if (!row.active(i)) return {};
    const u32 at = row.vector(i) * kVector;
    float product[8], scale[8];
    Float32::widen(load_vector<Float32>(first + at * Float32::kBytes), product);
    Float32::widen(load_vector<Float32>(row.p.column_scales + at * Float32::kBytes), scale);
#pragma unroll
    for (int j = 0; j < 8; j++) product[j] = product[j] * by * scale[j];
    if constexpr (kBias) add<D>(product, load_vector<D>(row.p.bias + at * D::kBytes));
    return D::round(product);
  }
};

// The sum of terms in their order, or, where kStarts has bits, of islands: another one begins at each bit, its terms are added for
// themselves, then the islands' sums in their order.
template <int kTerms, u32 kStarts>
struct OrderedSum {
  float sum[8], island[8];

  // Whether term k belongs to an island behind the first.
  static COLLOGUE_DEVICE constexpr bool later(int k) { return (kStarts & ((2u << k) - 1u)) >> 1 != 0; }
  // Term k: all of them, one after the other.
  COLLOGUE_DEVICE void add(int k, const float (&f)[8]) {
    const bool starts = k == 0 || (kStarts >> k & 1);
    if (k && starts && later(k - 1)) join();
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float& to = later(k) ? island[j] : sum[j];
      to = starts ? f[j] : to + f[j];
    }
    if (k == kTerms - 1 && later(k)) join();
  }

 private:
  COLLOGUE_DEVICE void join() {
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] = sum[j] + island[j];
  }
};

// What a thread has of the terms of one vector until they are added: of dtype T, those of kWide in float32.
template <class T, int kTerms, u32 kWide, u32 kStarts>
struct HeldTerms {
  static constexpr int kEach = kWide ? Float32::kParts : T::kParts;
  Packed<kEach> x[kTerms];

  // Term k, as numbers.
  COLLOGUE_DEVICE void widen(int k, float (&f)[8]) const {
    if (kWide >> k & 1) {
      Packed<Float32::kParts> v{};
#pragma unroll
      for (int i = 0; i < Float32::kParts; i++) v.part[i] = x[k].part[i < kEach ? i : 0];
      Float32::widen(v, f);
      return;
    }
    Packed<T::kParts> v;
#pragma unroll
    for (int i = 0; i < T::kParts; i++) v.part[i] = x[k].part[i];
    T::widen(v, f);
  }
};
template <class D, class T, int kTerms, u32 kWide, u32 kStarts>
COLLOGUE_DEVICE void begin(float (&sum)[8], const HeldTerms<T, kTerms, kWide, kStarts>& held) {
  OrderedSum<kTerms, kStarts> total;
  float f[8];
#pragma unroll
  for (int k = 0; k < kTerms; k++) {
    held.widen(k, f);
    total.add(k, f);
  }
#pragma unroll
  for (int j = 0; j < 8; j++) sum[j] = total.sum[j];
}

// The same, already added: where the terms of all of a thread's vectors would take too many registers.
struct AddedTerms {
  float sum[8];
};
template <class D>
COLLOGUE_DEVICE void begin(float (&sum)[8], const AddedTerms& added) {
#pragma unroll
  for (int j = 0; j < 8; j++) sum[j] = added.sum[j];
}

// Terms of one sum (OrderedSum), each a tensor [T, H] in memory: of dtype T, those of kWide float32 sums of an island.
template <class C, class T, int kTerms, u32 kWide, u32 kStarts>
struct TermsSource {
  static_assert(kTerms <= kMaxTerms);
  static constexpr bool kWorkedOut = true;
  static constexpr int kMostHeld = 12;  // of a thread, in 16 bytes each
  using Held = HeldTerms<T, kTerms, kWide, kStarts>;
  const RowPlace<C>& row;
  u64 first;  // of this thread's vectors, in elements

  COLLOGUE_DEVICE explicit TermsSource(const RowPlace<C>& r) : row(r), first(0) {}
  COLLOGUE_DEVICE void aim(u32 t) { first = row.offset(t) / C::D::kBytes; }
  COLLOGUE_DEVICE u32 digest() const { return folded(row.p.terms[0]); }
  COLLOGUE_DEVICE auto term(int i) const {
    Held held{};
    if constexpr (kTerms * Held::kEach * C::kVectors <= kMostHeld) {
#pragma unroll
      for (int k = 0; k < kTerms; k++) load(held, k, i);
      return held;
    } else {
      // Of float32 terms beside the sums of four vectors so many: registers of sm_80 hold no more.
      constexpr int kBatch = C::kVectors > 2 && Held::kEach > 1 ? 2 : kMostHeld / Held::kEach;
      OrderedSum<kTerms, kStarts> total;
      float f[8];
#pragma unroll
      for (int from = 0; from < kTerms; from += kBatch) {
#pragma unroll
        for (int k = from; k < kTerms && k < from + kBatch; k++) load(held, k, i);
#pragma unroll
        for (int k = from; k < kTerms && k < from + kBatch; k++) {
          held.widen(k, f);
          total.add(k, f);
        }
      }
      AddedTerms added;
#pragma unroll
      for (int j = 0; j < 8; j++) added.sum[j] = total.sum[j];
      return added;
    }
  }

 private:
  COLLOGUE_DEVICE void load(Held& held, int k, int i) const {
    if (!row.active(i)) return;
    const u64 at = first + i * 32 * kVector;
    const u8* const from = row.p.terms[k];
    if (kWide >> k & 1)
      put(held.x[k], load_vector<Float32>(from + at * Float32::kBytes));
    else
      put(held.x[k], load_vector<T>(from + at * T::kBytes));
  }
  template <class To, class From>
  static COLLOGUE_DEVICE void put(To& to, const From& from) {
    constexpr int kParts = sizeof(To) < sizeof(From) ? sizeof(To) / sizeof(Words) : sizeof(From) / sizeof(Words);
#pragma unroll
    for (int i = 0; i < kParts; i++) to.part[i] = from.part[i];
  }
};

}  // namespace collogue
