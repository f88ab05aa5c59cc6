// Local: finishes rows that lie in this rank's memory. Used where nothing is communicated: a world of one, and rows that are
// finished without a sum.
#pragma once
#include "source.cuh"

namespace collogue {

template <class C>
COLLOGUE_DEVICE void local(const Params& p) {
  using D = typename C::D;
  COLLOGUE_SHARED(typename Row<C>::Shared, shared);
  Row<C> row(p, shared);
  typename C::template Source<C> source(row);

  wait_for_previous_kernel();
  row.ask();
  for (u32 t = grid_row(), turn = 0; t < p.tokens; t += grid_rows(), turn++) {
    if (turn) row.next();
    row.aim(t);
    source.aim(t);
    Packed<D::kParts> y[C::kVectors];
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      float sum[8];
      begin<D>(sum, source.term(i));
      if constexpr (C::kResidual) add<D>(sum, row.load(p.residual + row.offset(t), i));
      y[i] = row.store_stream(i, sum);
    }
    if (turn == 0) {
      launch_next_kernel();
      const u32 cta = grid_row() * blocks_in_row() + block_in_row(), ctas = grid_rows() * blocks_in_row();
      row.codes.pad(p.scale_rows, cta * C::kThreads + thread_index(), ctas * C::kThreads);
      row.get_ready();
    }
    row.finish(turn, y, [] {}, NoWire{});
    if constexpr (!C::kLoop) break;
  }
}

}  // namespace collogue
