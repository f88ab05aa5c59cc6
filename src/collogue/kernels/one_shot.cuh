// One-shot: every rank sends its rows to every peer, adds all terms itself and finishes the row. One cluster per row.
#pragma once
#include "protocol.cuh"
#include "row.cuh"

namespace collogue {

template <class C>
COLLOGUE_DEVICE void one_shot(const Params& p) {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  COLLOGUE_SHARED(typename Row<C>::Shared, shared);
  Row<C> row(p, shared);
  Ranks<C> ranks(p);
  u32 t = grid_row(), slot_offset = static_cast<u32>(row.offset(t));
  const u8* partial = p.partial + row.offset(t);
  const u8* residual = C::kResidual ? p.residual + row.offset(t) : nullptr;
  compute_now(slot_offset ^ folded(partial) ^ folded(residual) ^ ranks.digest(), shared.digest);

  wait_for_previous_kernel();
  ranks.ask();
  // A single vector stays in registers; several are read again when their turn comes.
  Vector x[C::kVectors], r{};
#pragma unroll
  for (int i = 0; i < C::kVectors; i++) x[i] = row.load(partial, i);
  if constexpr (C::kResidual && C::kVectors == 1) r = row.load(residual, 0);
  launch_next_kernel();
  ranks.start();
  Pair seen = {{0, 0}};
  bool first_warp = false;
  for (u32 turn = 0;; turn++) {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      x[i] = ranks.disguise(x[i]);
      ranks.send(x[i], slot_offset + i * row.kVectorStep, row.active(i));
    }
    ranks.sent = clock_cycles();
    // What follows is worked out while the words travel, not before they leave.
    compute_now(t);
    row.aim(t);
    if (turn == 0) {
      u32 cta = grid_row() * blocks_in_row() + block_in_row(), tokens = p.tokens;
      compute_now(cta);
      compute_now(tokens);
      const u32 thread = cta * C::kThreads + thread_index(), threads = grid_rows() * blocks_in_row() * C::kThreads;
      ranks.announce(thread, threads / 32, Ranks<C>::kPeers * p.slot_bytes);
      first_warp = thread / 32 == 0;
      if (first_warp) seen = ranks.look_at_marks(ranks.call - 1);
      ranks.clean(thread, threads);
      if constexpr (C::kFormat != Format::kNone) row.quant.pad(thread, threads, tokens);
      row.get_ready();
      // With one row this waits until the row sum travels; with many, two registers fewer are worth more.
      if (C::kLoop && first_warp) ranks.compare_previous_call(seen);
    }
    const u8* place = ranks.slots() + slot_offset;
    u32 active = row.active(0);
    compute_now(place);
    compute_now(active);
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      if constexpr (C::kVectors > 1) {
        x[i] = ranks.disguise(row.load(p.partial + row.offset(t), i));
        if constexpr (C::kResidual) r = row.load(p.residual + row.offset(t), i);
      }
      float sum[8];
      ranks.receive_and_add(x[i], place + i * row.kVectorStep, C::kVectors == 1 ? active : row.active(i), t, sum);
      if constexpr (C::kResidual) add<D>(sum, r);
      x[i] = row.store_stream(i, sum);
    }
    const auto compare = [&] {
      if (!C::kLoop && first_warp) ranks.compare_previous_call(seen);
    };
    row.finish(turn, x, compare, NoWire{});

    if constexpr (!C::kLoop) break;
    t += grid_rows();
    if (t >= p.tokens) break;
    row.next();
    slot_offset = static_cast<u32>(row.offset(t));
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) x[i] = row.load(p.partial + row.offset(t), i);
    if constexpr (C::kResidual && C::kVectors == 1) r = row.load(p.residual + row.offset(t), 0);
  }
  if (ranks.stopped) ranks.report();
}

}  // namespace collogue
