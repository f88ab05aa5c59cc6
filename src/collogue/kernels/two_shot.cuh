// Two-shot: every rank owns a range of columns. Each sends its terms of a column to the owner, who adds them and the residual and
// sends y to everybody; all ranks then finish whole rows. One cluster per row at a time; the next row's terms leave before
// this row's are awaited. With kAhead several rows are on their way at a time (two_shot_ahead).
#pragma once
#include "protocol.cuh"
#include "row.cuh"

namespace collogue {

template <class C>
struct TwoShot {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  static constexpr u32 kVectorBytes = kVector * D::kBytes;

  const Params& p;
  Ranks<C>& ranks;
  const Row<C>& row;

  COLLOGUE_DEVICE u32 owner(int i) const { return row.vector(i) / p.width; }
  COLLOGUE_DEVICE bool owns(int i) const { return row.active(i) && owner(i) == p.rank; }
  COLLOGUE_DEVICE bool gives(int i) const { return row.active(i) && owner(i) != p.rank; }
  // Of vector i of row t among the columns of one owner.
  COLLOGUE_DEVICE u32 offset(u32 t, int i) const {
    return ((t - p.first) * p.width + row.vector(i) - owner(i) * p.width) * kVectorBytes;
  }
  // Where y arrives: behind the terms.
  COLLOGUE_DEVICE u32 y_offset(u32 t, int i) const { return Ranks<C>::kPeers * p.slot_bytes + offset(t, i); }

  // This rank's term of columns that another rank owns, to that rank.
  COLLOGUE_DEVICE void give(const Vector& x, u32 t, int i) const {
    if (ranks.stopped || !gives(i) || offset(t, i) >= p.slot_bytes) return;
    const u32 to = owner(i);
    ranks.send_vector(p.workspace[to] + p.data_offset + ranks.generation + ranks.position(p.rank, to) * p.slot_bytes + offset(t, i), ranks.disguise(x));
  }
  // y of vector i of row t; sends it where this rank owns it (the first step), waits for it elsewhere (the second). All lanes.
  template <bool kFirst = true, bool kSecond = true>
  COLLOGUE_DEVICE Vector reduce(const Vector& x, const Vector& residual, u32 t, int i) const {
    Vector y{};
    const bool mine = owns(i), others = gives(i);
    // Lanes of one warp may own and not own: the first step never waits for the second step of any rank.
    if (kFirst && any_in_warp(mine)) {
      float sum[8];
      ranks.receive_and_add(ranks.disguise(x), offset(t, i), mine, t, sum);
      if constexpr (C::kResidual) add<D>(sum, residual);
      if (mine) {
        y = D::round(sum);
        if (!ranks.stopped && offset(t, i) < p.slot_bytes) {
#pragma unroll
          for (int k = 1; k < C::kWorld; k++) ranks.send_vector(ranks.target(k) + y_offset(t, i), y);
        }
      }
    }
    if (kSecond && any_in_warp(others)) {
      const u8* const place = others ? ranks.arrivals(owner(i)) + y_offset(t, i) : nullptr;
      Vector arrived{};
      ranks.wait(
          [&] {
            if (others) arrived = ranks.load_arrived(place);
            return ranks.is_missing(arrived);
          },
          [&] { return ranks.is_missing(arrived) ? owner(i) : kNobody; }, kStageRows, t);
      if (others) y = arrived;
    }
    return y;
  }
  template <bool kFirst = true, bool kSecond = true>
  COLLOGUE_DEVICE void wipe(u32 t, int i) const {
    if constexpr (kFirst)
      if (owns(i)) ranks.wipe_terms(offset(t, i), true);
    if constexpr (kSecond)
      if (gives(i) && !ranks.stopped) ranks.wipe_vector(ranks.arrivals(owner(i)) + y_offset(t, i));
  }
};

// Rows ahead (kAhead): the terms of row t + 2 * ahead leave and row t + ahead is summed before row t is finished. Between these two a
// sum lies in the stream, where only the thread that wrote it reads it. A lane gives a vector or owns it, and loads it once.
template <class C>
struct RowsAhead {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  static_assert(C::kStream || !C::kAhead);

  const Params& p;
  const Row<C>& row;
  const TwoShot<C>& shot;
  const u32 end, step, ahead;  // ahead: from a row to the one that is summed in its turn
  Vector x, residual;          // the only vector of the next turn, loaded while this row is finished

  COLLOGUE_DEVICE void load(u32 t, int i) {
    x = row.load(p.partial + row.offset(t), i);
    if constexpr (C::kResidual)
      if (shot.owns(i)) residual = row.load(p.residual + row.offset(t), i);
  }
  COLLOGUE_DEVICE void give(u32 t) {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      if (shot.gives(i)) load(t, i);
      shot.give(x, t, i);
    }
  }
  COLLOGUE_DEVICE void keep_sum(u32 t, int i) const {
    const Vector y = shot.template reduce<true, false>(x, residual, t, i);
    if (!shot.owns(i)) return;
    store_vector<D>(stream(t, i), y);
    shot.template wipe<true, false>(t, i);
  }
  COLLOGUE_DEVICE void sum(u32 t) {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      if (shot.owns(i)) load(t, i);
      keep_sum(t, i);
    }
  }
  COLLOGUE_DEVICE u8* stream(u32 t, int i) const { return p.stream + row.offset(t) + i * Row<C>::kVectorStep; }
  COLLOGUE_DEVICE Vector kept(u32 t, int i) const {
    Vector y{};
    if (shot.owns(i)) y = load_vector<D>(stream(t, i));
    return y;
  }
  // What turn t gives and sums.
  COLLOGUE_DEVICE void fetch(u32 t) {
    const u32 of = t + (shot.owns(0) ? ahead : 2 * ahead);
    if (of < end) load(of, 0);
  }
  COLLOGUE_DEVICE void move(u32 t) {
    const bool gives = t + 2 * ahead < end, sums = t + ahead < end;
    if constexpr (C::kVectors == 1) {
      if (gives) shot.give(x, t + 2 * ahead, 0);
      if (sums) keep_sum(t + ahead, 0);
      fetch(t + step);
    } else {
      if (gives) give(t + 2 * ahead);
      if (sums) sum(t + ahead);
    }
  }
  // All rows from t on, of which the first 2 * ahead have been given.
  COLLOGUE_DEVICE void run(u32 t, Row<C>& rows) {
    for (u32 of = t; of < t + ahead && of < end; of += step) sum(of);
    if constexpr (C::kVectors == 1) fetch(t);
    for (u32 turn = 0; t < end; turn++, t += step) {
      if (turn) rows.next();
      Vector y[C::kVectors];
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) y[i] = kept(t, i);
      move(t);
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) {
        const Vector arrived = shot.template reduce<false, true>({}, {}, t, i);
        if (!shot.owns(i)) y[i] = arrived;
      }
      rows.aim(t);  // not before: registers
#pragma unroll
      for (int i = 0; i < C::kVectors; i++)
        if (!shot.owns(i)) rows.store_rounded(i, y[i]);
      const auto wipe = [&] {
#pragma unroll
        for (int i = 0; i < C::kVectors; i++) shot.template wipe<false, true>(t, i);
      };
      rows.finish(turn, y, wipe, NoWire{});
    }
  }
};

template <class C>
COLLOGUE_DEVICE void two_shot(const Params& p) {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  COLLOGUE_SHARED(typename Row<C>::Shared, shared);
  Row<C> row(p, shared);
  Ranks<C> ranks(p);
  const TwoShot<C> shot{p, ranks, row};
  const u32 end = p.first + p.count, step = grid_rows();
  u32 t = p.first + grid_row();

  wait_for_previous_kernel();
  // A single vector stays in registers from the row before; several are read again when their turn comes.
  Vector x[C::kVectors], next[C::kVectors], r{}, next_r{};
  const auto fetch = [&](u32 of, Vector (&to)[C::kVectors], Vector& residual) {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) to[i] = row.load(p.partial + row.offset(of), i);
    if constexpr (C::kResidual && C::kVectors == 1)
      if (shot.owns(0)) residual = row.load(p.residual + row.offset(of), 0);
  };
  const auto give = [&](u32 of, const Vector (&from)[C::kVectors]) {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) shot.give(from[i], of, i);
  };
  RowsAhead<C> rows{p, row, shot, end, step, p.ahead * step, {}, {}};
  if constexpr (!C::kAhead) fetch(t, x, r);
  ranks.ask();
  launch_next_kernel();
  ranks.start();
  if constexpr (C::kAhead)
    for (u32 of = t; of < t + 2 * rows.ahead && of < end; of += step) rows.give(of);
  else
    give(t, x);
  const u32 cta = grid_row() * blocks_in_row() + block_in_row(), ctas = grid_rows() * blocks_in_row();
  const u32 thread = cta * C::kThreads + thread_index(), threads = ctas * C::kThreads;
  ranks.announce(thread, threads / 32);
  Pair seen = {{0, 0}};
  if (thread / 32 == 0) seen = ranks.look_at_marks(ranks.call - 1);
  ranks.clean(thread, threads);
  if constexpr (C::kFormat != Format::kNone)
    if (p.pad) row.quant.pad(thread, threads, p.tokens);
  row.wait_for_barriers();
  if (C::kLoop && thread / 32 == 0) ranks.compare_previous_call(seen);

  if constexpr (C::kAhead) rows.run(t, row);
  for (u32 turn = 0; !C::kAhead; turn++) {
    const bool more = C::kLoop && t + step < end;
    if (more) {
      fetch(t + step, next, next_r);
      give(t + step, next);
    }
    if (!C::kLoop) row.aim(t);
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      if constexpr (C::kVectors > 1) {
        x[i] = row.load(p.partial + row.offset(t), i);
        if constexpr (C::kResidual) r = row.load(p.residual + row.offset(t), i);
      }
      x[i] = shot.reduce(x[i], r, t, i);
    }
    if (C::kLoop) row.aim(t);  // not before: registers
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) row.store_rounded(i, x[i]);
    row.finish(
        turn, x,
        [&] {
#pragma unroll
          for (int i = 0; i < C::kVectors; i++) shot.wipe(t, i);
        },
        NoWire{});
    if (!more) break;
    row.next();
    t += step;
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) x[i] = next[i];
    r = next_r;
  }
  if (!C::kLoop && thread / 32 == 0) ranks.compare_previous_call(seen);
  if (ranks.stopped) ranks.report();
}

}  // namespace collogue
