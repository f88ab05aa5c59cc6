// Two-shot: every rank owns a range of columns. Each sends its terms of a column to the owner, who adds them and the residual and
// sends y to everybody; all ranks then finish whole rows. One cluster per row at a time; the next row's terms leave before
// this row's are awaited.
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
  // y of vector i of row t; sends it where this rank owns it, waits for it elsewhere. All lanes.
  COLLOGUE_DEVICE Vector reduce(const Vector& x, const Vector& residual, u32 t, int i) const {
    Vector y{};
    const bool mine = owns(i), others = gives(i);
    // Lanes of one warp may own and not own: the first step never waits for the second step of any rank.
    if (any_in_warp(mine)) {
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
    if (any_in_warp(others)) {
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
  COLLOGUE_DEVICE void wipe(u32 t, int i) const {
    if (owns(i)) ranks.wipe_terms(offset(t, i), true);
    if (gives(i) && !ranks.stopped) ranks.wipe_vector(ranks.arrivals(owner(i)) + y_offset(t, i));
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
  fetch(t, x, r);
  ranks.ask();
  launch_next_kernel();
  ranks.start();
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

  for (u32 turn = 0;; turn++) {
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
