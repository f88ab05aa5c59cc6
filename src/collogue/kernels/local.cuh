// Local: adds and finishes rows that lie in this rank's memory. Used where kernels communicate nothing: a world of one, rows that are
// finished without a sum, and the host path, which brings the terms of a sum here (TermsSource).
#pragma once
#include "source.cuh"

namespace collogue {

template <class C>
COLLOGUE_DEVICE void local(const Params& p) {
  using D = typename C::D;
  COLLOGUE_SHARED(typename Row<C>::Shared, shared);
  Row<C> row(p, shared);
  typename C::template Source<C> source(row);

  // All of a row is asked for before any of it is stored, and with kAhead before the row before it is finished: memory must not idle.
  decltype(source.term(0)) x[C::kVectors];
  Packed<D::kParts> residual[C::kResidual ? C::kVectors : 1];
  const auto load = [&](u32 t) {
    source.aim(t);
    ask_for_terms(source, x, 0);
    if constexpr (C::kResidual) {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) residual[i] = row.load(p.residual + row.offset(t), i);
    }
  };

  wait_for_previous_kernel();
  row.ask();
  if (C::kAhead && grid_row() < p.tokens) load(grid_row());
  for (u32 t = grid_row(), turn = 0; t < p.tokens; t += grid_rows(), turn++) {
    if (turn) row.next();
    row.aim(t);
    if (!C::kAhead) load(t);
    Packed<D::kParts> y[C::kVectors];
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      float sum[8];
      begin<D>(sum, x[i]);
      if constexpr (C::kBranch) {
        y[i] = D::round(sum);
        continue;
      }
      if constexpr (C::kResidual) add<D>(sum, residual[i]);
      y[i] = row.store_stream(i, sum);
    }
    Packed<D::kParts> joined[C::kBranch ? C::kVectors : 1];  // the next row's residual is asked for before this one's is used
    if constexpr (C::kBranch) {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) joined[i] = residual[i];
    }
    if (C::kAhead && t + grid_rows() < p.tokens) load(t + grid_rows());
    if (turn == 0) {
      launch_next_kernel();
      const u32 cta = grid_row() * blocks_in_row() + block_in_row(), ctas = grid_rows() * blocks_in_row();
      row.codes.pad(p.scale_rows, cta * C::kThreads + thread_index(), ctas * C::kThreads);
      row.get_ready();
    }
    if constexpr (C::kBranch) row.join(turn, y, [&](int i) { return joined[i]; });
    row.finish(turn, y, [] {}, NoWire{});
    if constexpr (!C::kLoop) break;
  }
}

}  // namespace collogue
