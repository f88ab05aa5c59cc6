// One-shot: every rank sends its rows to every peer, adds all terms itself and finishes the row. One cluster per row.
#pragma once
#include "protocol.cuh"
#include "row.cuh"

namespace collogue {

template <class C>
COLLOGUE_DEVICE void one_shot(const Params& p) {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  COLLOGUE_SHARED typename Row<C>::Shared shared;
  Row<C> row(p, shared);
  row.init();
  Ranks<C> ranks(p);

  u32 t = grid_row();
  const u32 row_bytes = p.hidden * D::kBytes;
  u32 slot_offset = static_cast<u32>(row.offset(t, 0));
  const u8* partial = row.at(p.partial, t);
  const u8* residual = C::kResidual ? row.at(p.residual, t) : nullptr;
  compute_now(partial);
  compute_now(residual);
  compute_now(slot_offset);
  ranks.compute_pointers_now();

#ifdef EXP_PREFETCH
  if (row.active(0)) prefetch(partial);
  if (C::kResidual && row.active(0)) prefetch(residual);
  prefetch(ranks.own);
#endif
  wait_for_previous_kernel();
  ranks.ask();
  for (u32 turn = 0; t < p.tokens; turn++, t += grid_rows()) {
    if (turn) {
      row.next();
      partial += static_cast<u64>(grid_rows()) * row_bytes;
      residual += static_cast<u64>(grid_rows()) * row_bytes;
      slot_offset += grid_rows() * row_bytes;
    }
    // A single vector stays in registers; several are read again when their turn comes.
    Vector x[C::kVectors], r{};
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) x[i] = row.load(partial, i);
    if constexpr (C::kResidual && C::kVectors == 1) r = row.load(residual, 0);
    if (turn == 0) {
      launch_next_kernel();
      ranks.start();
    }
#pragma unroll
    for (int i = 0; i < C::kVectors; i++)
      if (row.active(i)) ranks.send(x[i], slot_offset + i * row.kVectorStep);
    const u32 sent = clock_cycles();
    if (turn == 0) {
      const u32 cta = grid_row() * blocks_in_row() + block_in_row(), ctas = grid_rows() * blocks_in_row();
      const u32 thread = cta * C::kThreads + thread_index(), threads = ctas * C::kThreads;
      ranks.count_warp(thread, threads / 32, p.tokens * (row_bytes / 16));
#ifndef EXP_NOWIPE
      ranks.wipe(thread, threads);
#endif
      if constexpr (C::kFormat != Format::kNone) row.quant.pad(thread, threads);
    }
    // Polling lines that are being written slows their arrival: leave the wire alone until the words can be here.
    while (clock_cycles() - sent < C::kFirstPoll) {
    }
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      if constexpr (C::kVectors > 1) {
        x[i] = row.load(partial, i);
        if constexpr (C::kResidual) r = row.load(residual, i);
      }
      float sum[8];
      ranks.receive_and_add(x[i], slot_offset + i * row.kVectorStep, row.active(i), t, sum);
      if constexpr (C::kResidual) add<D>(sum, r);
      x[i] = row.store_stream(t, i, sum);
    }
    row.finish(t, turn, x);
  }
}

}  // namespace collogue
