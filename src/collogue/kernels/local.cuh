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
  u32 ctas_per_row = 1;
#if COLLOGUE_HAS_CLUSTERS
  if constexpr (C::kClustered) ctas_per_row = cluster_size();
#endif
  const u32 rows_at_once = block_count() / ctas_per_row;

  wait_for_previous_kernel();
  u32 turn = 0;
  for (u32 t = block_index() / ctas_per_row; t < p.tokens; t += rows_at_once, turn++) {
    if (turn) row.next();
    Packed<D::kParts> y[C::kVectors];
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int k = 0; k < C::kWorld + (C::kResidual ? 1 : 0); k++) {
        const u8* const term = k < C::kWorld ? p.partial + k * p.partial_stride : p.residual;
        Packed<D::kParts> x{};
        if (row.active(i)) x = load_vector<D>(term + row.offset(t, i));
        float f[8];
        D::widen(x, f);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] = sum[j] + f[j];
      }
      y[i] = row.store_stream(t, i, sum);
    }
    if (turn == 0) {
      launch_next_kernel();
      if constexpr (C::kFormat != Format::kNone)
        row.quant.pad(block_index() * C::kThreads + thread_index(), block_count() * C::kThreads);
    }
    row.finish(t, turn, y);
  }
}

}  // namespace collogue
