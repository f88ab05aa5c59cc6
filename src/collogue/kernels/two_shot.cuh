// Two-shot: every rank owns a range of columns. Each sends its terms of a column to the owner, who adds them and the residual and
// sends y to everybody; all ranks then finish whole rows. One cluster per row at a time; the terms of rows to come leave before
// this row is finished.
#pragma once
#include "opening.cuh"
#include "source.cuh"

namespace collogue {

template <class C>
struct TwoShot {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  static constexpr u32 kVectorBytes = kVector * D::kBytes;

  const Params& p;
  Ranks<C>& ranks;
  u32 owner[C::kVectors];   // of vector i's column; kNobody past the end of the row
  u32 column[C::kVectors];  // bytes from the owner's first column

  COLLOGUE_DEVICE TwoShot(const Params& params, Ranks<C>& r, const RowPlace<C>& row) : p(params), ranks(r) {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      const u32 of = row.vector(i) / p.width;
      owner[i] = row.active(i) ? of : kNobody;
      column[i] = (row.vector(i) - of * p.width) * kVectorBytes;
      if constexpr (C::kVectors == 1) {  // a division in every use is shorter, and slower
        compute_now(owner[i]);
        compute_now(column[i]);
      }
    }
  }
  COLLOGUE_DEVICE bool owns(int i) const { return owner[i] == p.rank; }
  COLLOGUE_DEVICE bool gives(int i) const { return owner[i] != p.rank && owner[i] != kNobody; }
  // Of vector i of row t among the columns of one owner.
  COLLOGUE_DEVICE u32 offset(u32 t, int i) const { return (t - p.first) * (p.width * kVectorBytes) + column[i]; }
  // Where y arrives: behind the terms.
  COLLOGUE_DEVICE u32 y_offset(u32 t, int i) const { return Ranks<C>::kPeers * p.slot_bytes + offset(t, i); }

  // This rank's term of a column that another rank owns, to that rank.
  COLLOGUE_DEVICE void give(const Vector& x, u32 t, int i) const {
    if (ranks.stopped || !gives(i) || offset(t, i) >= p.slot_bytes) return;
    const u32 to = owner[i];
    ranks.send_vector(p.workspace[to] + p.data_offset + ranks.generation + ranks.position(p.rank, to) * p.slot_bytes + offset(t, i), ranks.disguise(x));
  }
  // y of vector i of row t, in lanes that own it, from this rank's term `x`; sends it to everybody. All lanes.
  COLLOGUE_DEVICE void add_terms(Vector& y, const Vector& x, const Vector& residual, u32 t, int i) const {
    const bool mine = owns(i);
    if (!any_in_warp(mine)) return;
    float sum[8];
    ranks.receive_and_add(ranks.disguise(x), ranks.slots() + offset(t, i), mine, t, sum);
    if constexpr (C::kResidual && !C::kBranch) add<D>(sum, residual);
    if (!mine) return;
    y = D::round(sum);
    if (ranks.stopped || offset(t, i) >= p.slot_bytes) return;
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) ranks.send_vector(ranks.target(k) + y_offset(t, i), y);
  }
  // y of vector i of row t, in lanes where another rank owns it. All lanes.
  COLLOGUE_DEVICE void await_y(Vector& y, u32 t, int i) const {
    const bool others = gives(i);
    if (!any_in_warp(others)) return;
    const u8* const place = others ? ranks.arrivals(owner[i]) + y_offset(t, i) : nullptr;
    Vector arrived{};
    ranks.wait(
        [&] {
          if (others) arrived = ranks.load_arrived(place);
          return ranks.is_missing(arrived);
        },
        [&] { return ranks.is_missing(arrived) ? owner[i] : kNobody; }, kStageRows, t);
    if (others) y = arrived;
  }
  // The places of row t become clean again: of terms after add_terms, of y after await_y.
  COLLOGUE_DEVICE void wipe_terms(u32 t, int i) const {
    if (owns(i)) ranks.wipe_terms(offset(t, i), true);
  }
  COLLOGUE_DEVICE void wipe_y(u32 t, int i) const {
    if (gives(i) && !ranks.stopped) ranks.wipe_vector(ranks.arrivals(owner[i]) + y_offset(t, i));
  }
};

// This rank's terms of a row and, of a single vector, the residual; asked for before their turn comes.
template <class C>
struct AskedRow {
  Packed<C::D::kParts> term[C::kVectors], residual;
};

template <class C>
COLLOGUE_DEVICE void two_shot(const Params& p) {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  COLLOGUE_SHARED(typename Row<C>::Shared, shared);
  Row<C> row(p, shared);
  Ranks<C> ranks(p);
  typename C::template Source<C> source(row);
  const TwoShot<C> shot(p, ranks, row);
  const u32 end = p.first + p.count, step = grid_rows();
  u32 t = p.first + grid_row();
  constexpr u32 kAhead = C::kAhead;
  // A single vector is in registers before its turn comes; several are read in their turn.
  constexpr bool kEarly = C::kVectors == 1;
  const auto is_row = [&](u32 of) { return !C::kLoop || of < end; };
  // `used`: whether this lane does something with it.
  const auto load_term = [&](u32 of, int i, bool used) {
    return is_row(of) && (used || !C::template Source<C>::kWorkedOut) ? source.term(of, i) : Vector{};
  };
  const auto load_residual = [&](u32 of, int i) {
    Vector v{};
    if constexpr (C::kResidual && !C::kBranch)  // else every rank adds all of it, behind the norm
      if (shot.owns(i) && is_row(of)) v = row.load(p.residual + row.offset(of), i);
    return v;
  };

  // `next`: of the next row that this rank adds, in lanes that own; in the others of the next row whose terms it gives.
  AskedRow<C> first{}, next{};
  Opening<C> opening(ranks);
  opening.begin(row, [&] {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) first.term[i] = load_term(t, i, kEarly || shot.gives(i));
    if (kEarly) {
      first.residual = load_residual(t, 0);
      next.term[0] = kAhead ? load_term(t + step, 0, true) : first.term[0];
      next.residual = kAhead ? load_residual(t + step, 0) : first.residual;
    }
  });
#pragma unroll
  for (int i = 0; i < C::kVectors; i++) shot.give(first.term[i], t, i);
  if (kAhead && is_row(t + step)) {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) shot.give(kEarly ? next.term[i] : load_term(t + step, i, shot.gives(i)), t + step, i);
  }
  if (kEarly && C::kLoop && shot.gives(0)) next.term[0] = load_term(t + (kAhead + 1) * step, 0, true);
  opening.after_sends(row);
  if (!C::kLoop) row.aim(t);

  Vector y[C::kVectors] = {};
  if (kAhead) {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      shot.add_terms(y[i], kEarly ? first.term[i] : load_term(t, i, shot.owns(i)), kEarly ? first.residual : load_residual(t, i), t, i);
      shot.wipe_terms(t, i);
    }
  }
  for (u32 turn = 0;; turn++) {
    const u32 added = t + kAhead * step, given = added + step;
    Vector y_ahead[C::kVectors];
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      if (C::kLoop && is_row(given)) shot.give(kEarly ? next.term[i] : load_term(given, i, shot.gives(i)), given, i);
      Vector& sum = kAhead ? y_ahead[i] : y[i];
      sum = Vector{};
      if (!kAhead || is_row(added))
        shot.add_terms(sum, kEarly ? next.term[i] : load_term(added, i, shot.owns(i)), kEarly ? next.residual : load_residual(added, i), added, i);
      shot.await_y(y[i], t, i);
    }
    if (kEarly && C::kLoop) {
      next.term[0] = load_term(shot.owns(0) ? given : given + step, 0, true);
      next.residual = load_residual(given, 0);
    }
    if (C::kLoop) row.aim(t);  // not before: registers
    if constexpr (C::kBranch) {
      row.join(turn, y, [&](int i) { return row.load(p.residual + row.offset(t), i); });
    } else {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) row.store_rounded(i, y[i]);
    }
    row.finish(
        turn, y,
        [&] {
#pragma unroll
          for (int i = 0; i < C::kVectors; i++) {
            if (!kAhead || is_row(added)) shot.wipe_terms(added, i);
            shot.wipe_y(t, i);
          }
        },
        NoWire{});
    if (!C::kLoop || !is_row(t + step)) break;
    row.next();
    t += step;
    if (kAhead) {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) y[i] = y_ahead[i];
    }
  }
  opening.compare_later();
  opening.end();
}

}  // namespace collogue
