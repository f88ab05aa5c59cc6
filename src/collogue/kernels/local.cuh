// Local: the terms already lie in this rank's memory. Adds them in order and finishes the row. Used for a world of one and
// on both sides of a transport.
#pragma once
#include "row.cuh"

namespace collogue {

template <class C>
COLLOGUE_DEVICE void local(const Params& p) {
  using D = typename C::D;
  COLLOGUE_SHARED typename Row<C>::Shared shared;
  Row<C> row(p, shared);
  row.init();
  wait_for_previous_kernel();
  u32 turn = 0;
  for (u32 t = grid_row(); t < p.tokens; t += grid_rows(), turn++) {
    if (turn) row.next();
    Packed<D::kParts> y[C::kVectors];
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int k = 0; k < C::kWorld + (C::kResidual ? 1 : 0); k++) {
        add<D>(sum, row.load(row.at(k < C::kWorld ? p.partial + k * p.partial_stride : p.residual, t), i));
      }
      y[i] = row.store_stream(t, i, sum);
    }
    if (turn == 0) {
      launch_next_kernel();
      if constexpr (C::kFormat != Format::kNone) {
        const u32 cta = grid_row() * blocks_in_row() + block_in_row(), ctas = grid_rows() * blocks_in_row();
        row.quant.pad(cta * C::kThreads + thread_index(), ctas * C::kThreads);
      }
    }
    row.finish(t, turn, y);
  }
}

}  // namespace collogue
