// One-shot: every rank sends its rows to every peer, adds all terms itself and finishes the row. One cluster per row.
#pragma once
#include "protocol.cuh"
#include "row.cuh"

namespace collogue {

template <class C>
COLLOGUE_DEVICE void one_shot(const Params& p) {
  using D = typename C::D;
  COLLOGUE_SHARED typename Row<C>::Shared shared;
  Row<C> row(p, shared);
  row.init();
  u32 ctas_per_row = 1;
#if COLLOGUE_HAS_CLUSTERS
  if constexpr (C::kClustered) ctas_per_row = cluster_size();
#endif
  const u32 rows_at_once = block_count() / ctas_per_row;
  const u32 thread = block_index() * C::kThreads + thread_index(), threads = block_count() * C::kThreads;

  wait_for_previous_kernel();
  Ranks<C> ranks(p);
  u32 turn = 0;
  for (u32 t = block_index() / ctas_per_row; t < p.tokens; t += rows_at_once, turn++) {
    if (turn) row.next();
    // A single vector stays in registers; several are read again when their turn comes.
    Packed<D::kParts> x[C::kVectors], residual{};
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      x[i] = Packed<D::kParts>{};
      if (row.active(i)) x[i] = load_vector<D>(p.partial + row.offset(t, i));
    }
    if constexpr (C::kResidual && C::kVectors == 1)
      if (row.active(0)) residual = load_vector<D>(p.residual + row.offset(t, 0));
    if (turn == 0) launch_next_kernel();
#pragma unroll
    for (int i = 0; i < C::kVectors; i++)
      if (row.active(i)) ranks.send(x[i], row.offset(t, i));
    const u32 sent = clock_cycles();
    if (turn == 0) {
      ranks.count_warp(block_index(), block_count(), p.tokens * (p.hidden * D::kBytes / 16));
      ranks.wipe(thread, threads);
      if constexpr (C::kFormat != Format::kNone) row.quant.pad(thread, threads);
    }
    // Polling lines that are being written slows their arrival: leave the wire alone until the words can be here.
    while (clock_cycles() - sent < C::kFirstPoll) {
    }
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      if constexpr (C::kVectors > 1) {
        if (row.active(i)) x[i] = load_vector<D>(p.partial + row.offset(t, i));
        if (C::kResidual && row.active(i)) residual = load_vector<D>(p.residual + row.offset(t, i));
      }
      float sum[8];
      ranks.receive_and_add(x[i], row.offset(t, i), row.active(i), t, sum);
      if constexpr (C::kResidual) {
        float r[8];
        D::widen(residual, r);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = sum[j] + r[j];
      }
      x[i] = row.store_stream(t, i, sum);
    }
    row.finish(t, turn, x);
  }
}

}  // namespace collogue
